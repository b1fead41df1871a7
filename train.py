"""The whole recipe: a reference run, the confidence of its checkpoints, the split, the SFTMix run, the comparison.

    torchrun train.py                                                        the demo, on nothing but this repository
    torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR  the real thing

Four stages, each of which leaves its product in the output folder:

    base         the model to start from: given, or pretrained on the demo's text         base/ (demo only)
    reference    plain next-token prediction (μ = 0), with checkpoints on the way         reference/
    confidence   how well those checkpoints predict each training example                 confidence.jsonl
    sftmix       from the base again, L = L_NTP + μ L_Mixup between the two halves        sftmix/

Every model is evaluated on the held-out data; `results.json` and the last table set them side by side.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from confidence import (
    Dynamics,
    area_under_roc,
    check_models,
    choose_template,
    load_dataset,
    load_tokenizer,
    score_checkpoints,
    split_by_confidence,
    usable_length,
)
from data import (
    IGNORE_INDEX,
    Batch,
    Dataset,
    demo_corpus,
    draw_lambda,
    epoch_order,
    load_examples,
    num_supervised,
    pack,
    paired_order,
    split_batch,
)
from eval import evaluate, table
from mixup import chunk_rows, pair_positions, sftmix_loss
from model import (
    DTYPES,
    CommandLine,
    ModelConfig,
    Transformer,
    autocast,
    barrier,
    empty_model,
    open_model,
    peak_memory_bytes,
    processes,
    rank,
    save_adapter,
    save_model,
    say,
    shard,
    sum_over_processes,
    whole,
    world_size,
    write_json,
)
from tokenizer import TEMPLATES, Tokenizer

MAX_GRAD_NORM = 1.0
PRODUCTS = {"base": "base", "reference": "reference", "confidence": "confidence.jsonl", "sftmix": "sftmix"}
STAGES = tuple(PRODUCTS)  # in order; each leaves its product in the output folder

# --- Configuration ----------------------------------------------------------------------------------------------------


def _flag(default, help: str, choices=None, above=None, at_least=None, below=None):
    """A field of TrainConfig: its default, what it is, and which values make sense."""
    bounds = {"above": above, "at_least": at_least, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the flags of the command line. The defaults are the paper's settings.

    Raises ValueError, naming flag, value and what is allowed.
    """

    model: str | None = _flag(None, "model folder in Hugging Face layout; without it the demo runs")
    data: str | None = _flag(None, "training examples, .jsonl or .json")
    eval_data: str | None = _flag(None, "held-out examples to evaluate every model on")
    output: str | None = _flag(None, "folder for everything the run makes (the demo's: runs/demo)")
    stage: str = _flag("all", "which part of the recipe to run", choices=("all", *STAGES))
    confidence: str | None = _flag(None, "split by the scores in this file instead of the reference run's")
    confidence_by: str = _flag("probability", "measure to split by", choices=("probability", "perplexity"))
    pairing: str = _flag(
        "confidence", "mix across the halves, or (a control) at random", choices=("confidence", "random")
    )
    mu: float = _flag(0.2, "weight of the Mixup term", at_least=0)
    alpha: float = _flag(0.5, "λ ~ Beta(alpha, alpha)", above=0)
    ntp_weight: float = _flag(1.0, "weight of the next-token term in the SFTMix run", at_least=0)
    epochs: int = _flag(3, "passes over the data", at_least=1)
    batch_size: int = _flag(32, "examples an optimizer step, over all processes", at_least=1)
    micro_batch_tokens: int = _flag(8192, "tokens a process computes on at once; less memory, same result", at_least=1)
    lr: float = _flag(2e-6, "peak learning rate", above=0)
    weight_decay: float = _flag(0.1, "AdamW's, on matrices", at_least=0)
    warmup_ratio: float = _flag(0.1, "share of the steps that warm up", at_least=0, below=1)
    num_checkpoints: int = _flag(5, "checkpoints of the reference run that are kept and scored", at_least=1)
    max_length: int | None = _flag(None, "cut longer examples (default: the model's, at most 1024)", at_least=1)
    template: str | None = _flag(
        None,
        "how a conversation is laid out (default: the model folder's chat_template, else alpaca)",
        choices=tuple(TEMPLATES),
    )
    dtype: str = _flag("bf16", "of matrix products; weights stay float32", choices=("bf16", "fp32"))
    save_dtype: str = _flag("fp32", "of the weights in saved models", choices=("bf16", "fp32"))
    lora_rank: int | None = _flag(None, "train adapters of this rank instead of the weights (LoRA)", at_least=1)
    lora_alpha: float = _flag(16.0, "an adapter's share is scaled by lora_alpha / lora_rank", above=0)
    activation_checkpointing: bool = _flag(False, "compute each block twice, to keep less in memory")
    seed: int = _flag(0, "of every random draw", at_least=0, below=2**63)
    log_every: int = _flag(10, "steps between progress lines", at_least=1)
    dry_run: int | None = _flag(
        None, "say what the run would take on N processes (without N: on as many as now), and stop", at_least=0
    )

    def __post_init__(self):
        for flag in fields(self):
            value, choices = getattr(self, flag.name), flag.metadata["choices"]
            if choices and value not in (*choices, flag.default):
                raise ValueError(f"--{flag.name} {value}: must be one of {', '.join(choices)}")
            if value == "":
                raise ValueError(f"--{flag.name}: must not be empty")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{flag.name} {value}: must be a finite number")
            for name, holds in (("above", float.__gt__), ("at_least", float.__ge__), ("below", float.__lt__)):
                bound = flag.metadata["bounds"][name]
                if None not in (bound, value) and not holds(float(value), float(bound)):
                    raise ValueError(f"--{flag.name} {value}: must be {name.replace('_', ' ')} {bound}")
        if self.stage in ("all", "sftmix") and self.batch_size % 2:
            raise ValueError(f"--batch_size {self.batch_size}: must be even, since SFTMix trains on pairs")
        if self.stage == "confidence" and self.confidence is not None:
            raise ValueError(f"--confidence {self.confidence}: leaves nothing to do for --stage confidence")
        needs = [("model", "data"), ("data", "model"), ("eval_data", "model"), ("dry_run", "model")]
        for one, other in needs + ([("model", "output")] if self.dry_run is None else []):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"--{one} {getattr(self, one)}: needs --{other} too (without --model the demo runs)")


# The demo's settings: its model is small and starts from a base that has seen little, so it takes larger steps.
DEMO = {"output": "runs/demo", "lr": 1e-3, "batch_size": 16, "max_length": 256, "dtype": "fp32", "log_every": 50}
DEMO_BASE = {"lr": 3e-3, "batch_size": 8, "epochs": 1}  # of the base's pretraining
DEMO_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
DEMO_VOCAB_SIZE = 1024


def parse_config(argv=None) -> TrainConfig:
    """Read the command line; a flag or value that makes no sense ends the program with one line and exit code 2."""
    parser = CommandLine(description=__doc__)
    for flag in fields(TrainConfig):
        kind = {int: int, int | None: int, float: float}.get(flag.type, str)
        values = "{" + ",".join(flag.metadata["choices"]) + "}" if flag.metadata["choices"] else flag.name.upper()
        text = flag.metadata["help"] + ("" if flag.default is None else f" (default {flag.default})")
        if flag.type is bool:
            parser.add_argument(f"--{flag.name}", action="store_const", const=True, help=flag.metadata["help"])
        elif flag.name == "dry_run":
            parser.add_argument("--dry_run", type=int, nargs="?", const=0, metavar="N", help=text)
        else:
            parser.add_argument(f"--{flag.name}", type=kind, metavar=values, help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        return TrainConfig(**({} if "model" in given else DEMO) | given)
    except ValueError as error:
        parser.error(str(error))


# --- One step ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to `peak` over the first `warmup_ratio` of the steps, then half a cosine down towards 0.

    >>> [round(learning_rate(step, 10, 1.0, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on the float32 master weights, decaying matrices and sparing norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on."""

    batch: Batch
    pairs: torch.Tensor  # int64 [P, 2]: examples of the batch, confident then unconfident
    lam: torch.Tensor  # float32 [P]


@dataclass(frozen=True)
class Step:
    """This process's share of a global batch, and the counts of the whole of it that the means divide by."""

    micro_batches: list[MicroBatch]
    num_supervised: int  # over all processes
    num_mixed: int
    num_tokens: int


def deal(lengths: list[int], num_pairs: int, max_tokens: int, num_processes: int) -> list[list[tuple]]:
    """Deal examples into micro-batches, as many for each process (some may be empty), the first of them by pairs.

    >>> deal([30, 10, 20, 20, 5], num_pairs=2, max_tokens=50, num_processes=1)
    [[(0, 1), (4,)], [(2, 3)]]
    """
    units = [(2 * p, 2 * p + 1) for p in range(num_pairs)] + [(i,) for i in range(2 * num_pairs, len(lengths))]
    bins = split_batch([sum(lengths[i] for i in unit) for unit in units], max_tokens, num_processes)
    return [[units[u] for u in members] for members in bins]


def make_step(dataset: Dataset, chosen: np.ndarray, lam: torch.Tensor, micro_batch_tokens: int) -> Step:
    """Deal a global batch out: `chosen` examples, of which the first 2·P are P pairs (0 with 1, 2 with 3, …), lam [P].

    The two members of a pair stay together. Whoever meets nobody is trained on with NTP alone.
    """
    examples = [dataset.encoded[i] for i in chosen]
    lengths = [len(tokens) for tokens, _ in examples]
    supervised = [num_supervised(targets) for _, targets in examples]
    micro_batches = []
    for units in deal(lengths, len(lam), micro_batch_tokens, world_size())[rank() :: world_size()]:
        pairs = [unit for unit in units if len(unit) == 2]  # these go first, so that pair p is examples 2p and 2p+1
        members = [i for pair in pairs for i in pair] + [unit[0] for unit in units if len(unit) == 1]
        indices = torch.arange(2 * len(pairs)).view(-1, 2)
        drawn = lam[[pair[0] // 2 for pair in pairs]]
        micro_batches.append(MicroBatch(pack([examples[i] for i in members]), indices, drawn))
    num_mixed = sum(min(supervised[2 * p], supervised[2 * p + 1]) for p in range(len(lam)))
    return Step(micro_batches, sum(supervised), num_mixed, sum(lengths))


def compute_gradients(model: Transformer, step: Step, mu: float, ntp_weight: float, dtype: str) -> torch.Tensor:
    """Leave in `.grad` the gradient of the global batch's loss. -> this process's part of (loss, ntp, mix), [3]

    Every micro-batch's sums are divided by the **global** counts, so adding up gradients, over micro-batches here and
    over processes in `model.shard`, gives the gradient of the global mean: the same for any number of either.
    """
    losses = torch.zeros(3, device=model.head_weight.device)
    for micro_batch in step.micro_batches:
        loss, ntp, mix = compute_loss(model, micro_batch, step, mu, ntp_weight, dtype)
        loss.backward()
        losses += torch.stack([loss.detach(), ntp, mix])
    return losses


def compute_loss(model: Transformer, micro_batch: MicroBatch, step: Step, mu: float, ntp_weight: float, dtype: str):
    """A micro-batch's part of L = L_NTP + μ L_Mixup: -> (loss, ntp, mix), of which the first carries gradients."""
    device = model.head_weight.device
    batch = micro_batch.batch.to(device)
    supervised = batch.targets != IGNORE_INDEX  # [N]
    index_c, index_u, pair = pair_positions(batch.targets, batch.cu_seqlens, micro_batch.pairs.to(device))

    def loss_of(hidden):
        return sftmix_loss(
            hidden[supervised],  # [S, D]
            model.head_weight,
            batch.targets[supervised],
            index_c,
            index_u,
            micro_batch.lam.to(device)[pair],
            mu=mu,
            ntp_weight=ntp_weight,
            num_supervised=step.num_supervised,
            num_mixed=step.num_mixed,
        )

    with autocast(device, dtype):
        return model(batch.tokens, batch.positions, batch.cu_seqlens, head=loss_of)


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(
    model: Transformer,
    dataset: Dataset,
    config: TrainConfig,
    order: Callable[[int], np.ndarray],
    log: Callable[[dict], None],
    *,
    mixing: bool,
    after_step: Callable[[int, int], None] = lambda step, total_steps: None,
) -> dict:
    """Train `model` in place: `config.epochs` passes in `order(epoch)`; if `mixing`, by pairs of neighbours in it.

    Without `mixing` it is NTP: μ = 0, nobody meets anybody, and what is left of L is L_NTP. `log` gets a progress
    record every `config.log_every` steps, `after_step(step, total_steps)` is called after each, counted from 1.
    -> {"seconds"} spent on training alone, and process 0's {"peak_memory_bytes"}
    """
    optimizer = make_optimizer(model, config)
    mu, ntp_weight = (config.mu, config.ntp_weight) if mixing else (0.0, 1.0)
    device = model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps_per_epoch = math.ceil(len(dataset.encoded) / config.batch_size)
    total_steps = steps_per_epoch * config.epochs
    started = logged = time.perf_counter()  # both are put forward by the time after_step takes
    losses, tokens, steps = torch.zeros(3, device=device), 0, 0  # since the last progress line
    model.train()
    for step in range(total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step_of_epoch == 0:
            indices = order(epoch)
        chosen = indices[step_of_epoch * config.batch_size : (step_of_epoch + 1) * config.batch_size]
        lam = draw_lambda(len(chosen) // 2 if mixing else 0, config.alpha, config.seed, step)
        work = make_step(dataset, chosen, lam, config.micro_batch_tokens)

        losses += compute_gradients(model, work, mu, ntp_weight, config.dtype)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
        lr = learning_rate(step, total_steps, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens, steps = tokens + work.num_tokens, steps + 1
        if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
            loss, ntp, mix = (sum_over_processes(losses) / steps).tolist()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise ValueError(
                    f"step {step + 1}: the run has diverged (loss {loss}); try a lower --lr than {config.lr}"
                )
            now = time.perf_counter()
            log(
                {
                    "step": step + 1,
                    "total_steps": total_steps,
                    "epoch": epoch,
                    "loss": loss,
                    "ntp": ntp,
                    "mix": mix,
                    "lr": lr,
                    "grad_norm": float(grad_norm),
                    "tokens_per_second": tokens / (now - logged),
                    "seconds_left": (now - started) / (step + 1) * (total_steps - step - 1),
                }
            )
            losses, tokens, steps, logged = torch.zeros(3, device=device), 0, 0, now
        paused = time.perf_counter()
        after_step(step + 1, total_steps)
        pause = time.perf_counter() - paused
        started, logged = started + pause, logged + pause
    model.eval()
    return {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes(device)}


# --- What a run leaves behind -----------------------------------------------------------------------------------------


def log_step(file: Path, stage: str, record: dict) -> None:
    """A line for `metrics.jsonl` and one for the reader."""
    if rank() == 0:
        with open(file, "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps({"stage": stage, **record}) + "\n")
    parts = f"ntp {record['ntp']:.4f}  mix {record['mix']:.4f}  " if record["mix"] else ""
    left = (
        f"{record['seconds_left'] / 60:.0f} min" if record["seconds_left"] >= 120 else f"{record['seconds_left']:.0f} s"
    )
    say(
        f"{stage:>10}  step {record['step']:>{len(str(record['total_steps']))}}/{record['total_steps']}  "
        f"loss {record['loss']:.4f}  {parts}{record['tokens_per_second']:,.0f} tokens/s  {left} left"
    )


def save(model: Transformer, path: Path, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Save a model, all processes together, and go on only when it is there."""
    save_model(model, path, tokenizer.files_for(config.template), DTYPES[config.save_dtype])
    barrier()


def save_finished(model: Transformer, path: Path, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Save the product of a stage; what LoRA has learnt is merged into it, and beside it an adapter to the base."""
    if config.lora_rank:
        save_adapter(model, path / "adapter", config.model)
    save(model, path, tokenizer, config)


def model_to_train(config: TrainConfig, device) -> Transformer:
    """The model that a stage begins from."""
    model = open_model(config.model, config.dtype, device, config.lora_rank, config.lora_alpha, config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def update_results(output: Path, name: str, entry: dict) -> None:
    """Set one entry of `results.json`."""
    if rank() == 0:
        file = output / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        write_json(file, results | {name: entry})
    barrier()


# --- The stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the stages read."""

    tokenizer: Tokenizer
    train: Dataset
    held_out: Dataset | None  # None without --eval_data: no model is evaluated then


def warn_of_idleness(config: TrainConfig, num_processes: int) -> None:
    """Say so where a batch has too few pairs to give every process one."""
    if config.batch_size < 2 * num_processes:
        say(f"warning: --batch_size {config.batch_size} is less than a pair for each of {num_processes} processes")


def settled(config: TrainConfig) -> tuple[TrainConfig, Tokenizer]:
    """The configuration with what the model's folder decides filled in, and its tokenizer; the folder must be whole."""
    check_models([config.model])
    max_length = usable_length(config.model, config.max_length)
    tokenizer = load_tokenizer(config.model)
    template = choose_template(tokenizer, config.template)
    tokenizer.files_for(template)  # all that will be saved can be made
    return replace(config, max_length=max_length, template=template), tokenizer


def load_inputs(config: TrainConfig, tokenizer: Tokenizer) -> Inputs:
    """Read and encode the data, and find what is wrong with it before anything is trained."""
    dataset = load_dataset(config.data, tokenizer, config.template, config.max_length)
    if config.eval_data is None:
        say("no --eval_data: no model is evaluated")
        return Inputs(tokenizer, dataset, None)
    held_out = load_dataset(config.eval_data, tokenizer, config.template, config.max_length)
    if shared := len(set(dataset.ids) & set(held_out.ids)):
        say(f"warning: {shared:,} held-out examples are training examples too; their loss proves nothing")
    return Inputs(tokenizer, dataset, held_out)


def base_stage(config: TrainConfig, log: Callable, device) -> dict:
    """The demo's base: write the corpus, and pretrain on its clean text with the loop that trains everything else."""
    data, corpus = Path(config.output) / "data", demo_corpus(config.seed)
    if rank() == 0:
        data.mkdir(parents=True, exist_ok=True)
        for split in ("base", "train", "eval", "test"):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in getattr(corpus, split)]
            (data / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        ids = [example.id for example in load_examples(data / "train.jsonl")]
        (data / "wrong.json").write_text(json.dumps([i for i, wrong in zip(ids, corpus.wrong, strict=True) if wrong]))
    barrier()
    texts = [message["content"] for example in load_examples(data / "train.jsonl") for message in example.messages]
    words = TEMPLATES["alpaca"].first.format(bos="", user="") + TEMPLATES["alpaca"].reply
    tokenizer = Tokenizer.train(texts + [words] * 60, DEMO_VOCAB_SIZE)  # often enough that each word is worth a piece
    config = replace(config, template=choose_template(tokenizer, config.template))
    dataset = load_dataset(data / "base.jsonl", tokenizer, config.template, config.max_length)
    torch.manual_seed(config.seed)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **DEMO_MODEL)).to(device)
    if world_size() > 1:
        shard(model, config.dtype, device)
    say(f"a base of {sum(p.numel() for p in model.parameters()):,} parameters, from random weights")
    order = partial(epoch_order, len(dataset), config.seed)
    spent = train(model, dataset, replace(config, **DEMO_BASE), order, log, mixing=False)
    save(model, Path(config.output) / "base", tokenizer, config)
    return spent


def reference_stage(config: TrainConfig, inputs: Inputs, log: Callable, device) -> dict:
    """NTP from the base, with checkpoints evenly spaced over the run, the last step's included."""
    model = model_to_train(config, device)
    folder = Path(config.output) / "reference"

    def save_checkpoint(step: int, total_steps: int) -> None:
        if step in {math.ceil(total_steps * k / config.num_checkpoints) for k in range(1, config.num_checkpoints + 1)}:
            save(model, folder / "checkpoints" / f"step-{step}", inputs.tokenizer, config)

    order = partial(epoch_order, len(inputs.train), config.seed)
    spent = train(model, inputs.train, config, order, log, mixing=False, after_step=save_checkpoint)
    save_finished(model, folder, inputs.tokenizer, config)
    return measure(model, inputs, config) | spent


def checkpoints_of(config: TrainConfig) -> list[Path]:
    """The checkpoints of a finished reference run, oldest first."""
    reference = Path(config.output) / "reference"
    if not (reference / "config.json").exists():
        raise FileNotFoundError(f"{reference}: no finished reference run there; --stage reference makes one")
    folders = [f for f in (reference / "checkpoints").glob("step-*") if f.name.removeprefix("step-").isdecimal()]
    if not folders:
        raise FileNotFoundError(f"{reference}/checkpoints: no checkpoints left; --stage reference makes them")
    check_models([config.model, *folders])
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def scores_of(config: TrainConfig, dataset: Dataset) -> Dynamics:
    """The examples' scores, from the run itself or, made by whatever model, from the file of --confidence."""
    return Dynamics.load(config.confidence or Path(config.output) / "confidence.jsonl").select(dataset.ids)


def confidence_stage(config: TrainConfig, inputs: Inputs, device) -> dict:
    """Score every training example with every checkpoint of the reference run."""
    folders = checkpoints_of(config)
    started = time.perf_counter()
    dynamics = score_checkpoints(folders, inputs.train, config.micro_batch_tokens, config.dtype, device)
    if rank() == 0:
        dynamics.save(Path(config.output) / "confidence.jsonl")
    barrier()
    result = {"checkpoints": len(folders), "examples": len(inputs.train), "seconds": time.perf_counter() - started}
    truth = Path(config.output) / "data" / "wrong.json"
    if truth.exists():  # the demo knows which answers are wrong: does low confidence point at them?
        wrong = np.isin(dynamics.ids, json.loads(truth.read_text()))
        result["roc_area"] = {m: area_under_roc(-dynamics.by(m), wrong) for m in ("probability", "perplexity")}
    return result


def sftmix_stage(config: TrainConfig, inputs: Inputs, log: Callable, device) -> dict:
    """From the base again, with Mixup between the confident and the unconfident half (or, a control, random ones)."""
    if config.pairing == "random":
        order = partial(epoch_order, len(inputs.train), config.seed)  # neighbours in a random order are random pairs
    else:
        scores = scores_of(config, inputs.train)
        confident, unconfident = split_by_confidence(scores.by(config.confidence_by))
        say(f"{len(confident):,} confident and {len(unconfident):,} unconfident examples, by {config.confidence_by}")
        order = partial(paired_order, confident, unconfident, config.seed)
    model = model_to_train(config, device)
    spent = train(model, inputs.train, config, order, log, mixing=True)
    save_finished(model, Path(config.output) / "sftmix", inputs.tokenizer, config)
    return measure(model, inputs, config) | spent


def measure(model: Transformer | None, inputs: Inputs, config: TrainConfig) -> dict:
    """Evaluate a model on the held-out examples; without them, every figure is None."""
    if inputs.held_out is None:
        return dict.fromkeys(("loss", "loss_interval", "accuracy", "accuracy_interval", "examples", "tokens"))
    return evaluate(model, inputs.held_out, inputs.tokenizer, config.template, config.micro_batch_tokens, config.dtype)


# --- What a run would take --------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """The largest of a run's micro-batches, which decides how much memory it takes."""

    tokens: int
    supervised: int
    accumulates: bool  # a process adds up gradients over several


def heaviest_work(dataset: Dataset, config: TrainConfig, num_processes: int) -> Work:
    """Deal an epoch out by pairs, as the SFTMix run does (there by other pairs), and find the largest micro-batch."""
    order, heaviest, accumulates = epoch_order(len(dataset), config.seed, 0), (0, 0), False
    for start in range(0, len(dataset), config.batch_size):
        chosen = [dataset.encoded[i] for i in order[start : start + config.batch_size]]
        lengths = [len(tokens) for tokens, _ in chosen]
        micro_batches = deal(lengths, len(chosen) // 2, config.micro_batch_tokens, num_processes)
        accumulates |= len(micro_batches) > num_processes
        for units in micro_batches:
            members = [i for unit in units for i in unit]
            sizes = sum(lengths[i] for i in members), sum(num_supervised(chosen[i][1]) for i in members)
            heaviest = max(heaviest, sizes)
    return Work(*heaviest, accumulates)


def activation_bytes(shape: ModelConfig, config: TrainConfig, device_type: str) -> tuple[int, int]:
    """What autograd keeps of a token until the backward pass: -> (bytes of a block, of what is around the blocks).

    D hidden size, F of the MLP, Q and K of all query and of all key heads; elements of products have 2 bytes in bf16,
    those of the stream between them 4. A CPU has no kernel for a whole norm, and attends in float32.
    """
    cpu, bf16, lora = device_type == "cpu", config.dtype == "bf16", config.lora_rank is not None
    D, F, product = shape.hidden_size, shape.intermediate_size, 2 if bf16 else 4
    Q, K = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    norm = 4 * D * (2 if cpu and not lora else 1)  # its input, and for its weight's gradient on a CPU the input normed
    inputs = 2 * 5 * D if bf16 else 4 * 2 * D  # q, k, v, gate, up have a bf16 copy each, or what the norms return
    attention = (4 if cpu else product) * 2 * (Q + K) + product * Q  # q, k, v, what comes out, and that for o_proj
    mlp = product * 4 * F  # gate, its activation, up, and their product
    return 2 * norm + inputs + attention + mlp, norm + 2 * 4 * D


def estimate_memory(model: Transformer, work: Work, config: TrainConfig, num_processes: int, device_type: str) -> dict:
    """Bytes a process holds at the peak of an SFTMix step, by what they are for, and in "total".

    `model` may be without weights (`empty_model`): sizes follow from shapes. docs/scaling.md has the estimate beside
    what runs were measured to take.
    """
    bf16, vocab_size = config.dtype == "bf16", model.config.vocab_size
    product = 2 if bf16 else 4
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = vocab_size * model.config.hidden_size
    layers = model.model.layers
    block = sum(p.numel() for p in layers[0].parameters())
    if num_processes > 1:  # what `shard` gathers: the head, the block at work, and on a GPU the next one on its way
        gathered = product * (head + block * (1 if device_type == "cpu" else 2))
    else:  # autocast's bf16 copies, which it keeps to the end of a pass
        gathered = 2 * (head + block * len(layers)) if bf16 else 0
    rows = min(chunk_rows(vocab_size, device_type), work.supervised)
    made = (product + 4) * (head + (block if num_processes > 1 else 0))  # gradients on their way to being a share
    if bf16 and device_type == "cpu":
        made += 4 * head  # which adds bf16 to float32 by way of a copy
    block_bytes, around = activation_bytes(model.config, config, device_type)
    activations = work.tokens * (around + block_bytes * len(layers))
    at_work = rows * vocab_size * (14 if bf16 else 12)  # logits and log p of rows, and of half as many mixed ones
    if config.activation_checkpointing:  # the blocks' inputs; the loss is done when the first block is computed again
        activations = work.tokens * (around + 4 * model.config.hidden_size * len(layers))
        at_work = max(at_work, work.tokens * block_bytes)
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) // num_processes,
        "gradients": 4 * trainable // num_processes,
        "optimizer state": 8 * trainable // num_processes,  # AdamW's two moments
        "whole weights": gathered,
        "whole gradients": 0 if config.lora_rank else made,
        "activations": activations,
        "logits chunk": at_work,
    }
    passing = gathered + memory["whole gradients"] + activations + at_work
    # Over several micro-batches gradients are there during a pass; over one they come as activations go.
    on_top = memory["gradients"] + passing if work.accumulates else max(memory["gradients"], passing)
    return memory | {"total": memory["weights"] + memory["optimizer state"] + on_top}


def estimate_flops(model: Transformer, tokens: int, supervised: int, config: TrainConfig) -> int:
    """Floating-point operations of the passes over so many tokens, all processes together.

    Forward 2 for a weight and token, backward 4 (2 for a frozen weight, which needs no gradient of its own), and 2 to
    compute a block again; `lm_head` sees the supervised tokens alone. What attention adds with length is left out.
    """
    backward = 2 if config.lora_rank else 4
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    return (2 + backward + 2 * config.activation_checkpointing) * blocks * tokens + (2 + backward) * head * supervised


def dry_run(config: TrainConfig, device) -> None:
    """Say what a run would take, and show an example as it will be trained on; nothing is written."""
    config, tokenizer = settled(config)
    inputs = load_inputs(config, tokenizer)
    num_processes, dataset = config.dry_run or world_size(), inputs.train
    model = empty_model(config.model, config.dtype, config.lora_rank, config.lora_alpha)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = math.ceil(len(dataset) / config.batch_size)
    work = heaviest_work(dataset, config, num_processes)
    memory = estimate_memory(model, work, config, num_processes, device.type)
    tokens = sum(len(tokens) for tokens, _ in dataset.encoded)
    supervised = sum(num_supervised(targets) for _, targets in dataset.encoded)
    flops = config.epochs * estimate_flops(model, tokens, supervised, config)
    stored = (parameters - trainable if config.lora_rank else parameters) * DTYPES[config.save_dtype].itemsize
    models = min(config.num_checkpoints, config.epochs * steps) + 2
    if config.confidence is not None:
        scores_of(config, dataset)

    warn_of_idleness(config, num_processes)
    say(f"\nparameters     {parameters:,}, of which {trainable:,} are trained")
    say(f"steps          {config.epochs * steps:,} a stage: {config.epochs} epochs of {steps:,}")
    say(f"micro-batches  of at most {work.tokens:,} tokens, on {num_processes} x {device.type}")
    say(f"compute        {flops / 1e15:,.2f} PFLOP a stage")
    say(f"disk           {gigabytes(models * stored)} for {models} models: checkpoints, reference, sftmix")
    say("memory         of a process, estimated:")
    for name, size in memory.items():
        say(f"  {name:17}{gigabytes(size):>10}" + (" at the peak, where not all is there at once" * (name == "total")))
    tokens, targets = dataset.encoded[0]
    ids, learnt = [*tokens.tolist(), int(targets[-1])], [False, *(targets != IGNORE_INDEX).tolist()]
    runs = groupby(zip(ids, learnt, strict=True), key=lambda token: token[1])
    shown = [(" ".join(inputs.tokenizer.piece(i) for i, _ in run), learn) for learn, run in runs]
    say(f"\nThe first example, {len(tokens):,} tokens; what is learnt stands in «»:")
    say(" ".join(f"« {text} »" if learn else text for text, learn in shown))


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# --- The pipeline -----------------------------------------------------------------------------------------------------


def run(config: TrainConfig, device) -> None:
    """Run the stages asked for, each from what the earlier ones left in the output folder, and report."""
    output, demo = Path(config.output), config.model is None
    stages = STAGES if config.stage == "all" else (config.stage,)
    if config.confidence is not None:  # the scores are there already
        stages = tuple(stage for stage in stages if stage != "confidence")
    warn_of_idleness(config, world_size())
    if not demo and output.resolve() == Path(config.model).resolve():
        raise ValueError(f"--output {output}: is the model's own folder; choose another")
    for stage in stages:
        product = output / PRODUCTS[stage]
        if product.exists():
            raise FileExistsError(f"{product}: already there; remove it, or choose another --output")
    if demo and config.max_length > DEMO_MODEL["max_position_embeddings"]:
        raise ValueError(
            f"--max_length {config.max_length}: the demo's model has {DEMO_MODEL['max_position_embeddings']} positions"
        )
    barrier()  # all have looked before process 0 writes

    def log(stage: str) -> Callable:
        return partial(log_step, output / "metrics.jsonl", stage)

    spent = {"seconds": None, "peak_memory_bytes": None}
    if demo:
        if "base" in stages:
            spent = base_stage(config, log("base"), device)
        files = {"model": "base", "data": "data/train.jsonl", "eval_data": "data/test.jsonl"}
        config = replace(config, **{flag: str(output / name) for flag, name in files.items()})
    config, tokenizer = settled(config)
    inputs = load_inputs(config, tokenizer)
    if "confidence" in stages and "reference" not in stages:
        checkpoints_of(config)
    if "sftmix" in stages and "confidence" not in stages and config.pairing == "confidence":
        scores_of(config, inputs.train)
    if rank() == 0:  # nothing more can be wrong with what was given
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "config.json", asdict(config))

    if "base" in stages:
        measured = measure(open_model(config.model, config.dtype, device) if inputs.held_out else None, inputs, config)
        update_results(output, "base", measured | spent)
    if "reference" in stages:
        update_results(output, "ntp", reference_stage(config, inputs, log("reference"), device))
    if "confidence" in stages:
        update_results(output, "confidence", confidence_stage(config, inputs, device))
    if "sftmix" in stages:
        update_results(output, "sftmix", sftmix_stage(config, inputs, log("sftmix"), device))
    if rank() == 0:
        report(output, demo)


def report(output: Path, demo: bool) -> None:
    """The last words of a run: the table, what confidence found, where everything is, and what to try next."""
    results = json.loads((output / "results.json").read_text())
    names = {"base": "base", "ntp": "NTP", "sftmix": "SFTMix"}
    print("\n" + table({name: results[key] for key, name in names.items() if key in results}) + "\n")
    for name, area in results.get("confidence", {}).get("roc_area", {}).items():
        print(f"Low confidence by {name} finds the wrong answers with an area under the ROC curve of {area:.3f}.")
    made = ("data", *PRODUCTS.values(), "config.json", "metrics.jsonl", "results.json")
    print(f"In {output}/ now:", ", ".join(name for name in made if (output / name).exists()))
    if (output / "confidence.jsonl").exists():
        print(f"The data map:  python confidence.py --scores {output}/confidence.jsonl --plot map.png")
    if demo:
        print("The real thing:  torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR")


def main(argv=None) -> None:
    """Read the command line and run what it asks for."""
    config = parse_config(argv)
    with processes() as device:
        (run if config.dry_run is None else dry_run)(config, device)


if __name__ == "__main__":
    main()
