"""The whole recipe: a reference run, the confidence of its checkpoints, the split, the SFTMix run, the comparison.

    torchrun train.py                                                        the demo, on nothing but this repository
    torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR  the real thing

Four stages, each of which leaves its product in the output folder:

    base         the model to start from: given, or pretrained on the demo's text         base/ (demo only)
    reference    plain next-token prediction (μ = 0), with checkpoints on the way         reference/
    confidence   how well those checkpoints predict each training example                 confidence.jsonl
    sftmix       from the base again, L = L_NTP + μ L_Mixup between the two halves        sftmix/

A run that was stopped, anywhere and by whatever, goes on with --resume and ends at the same weights, bit for bit.
Every model is evaluated on the held-out data; `results.json` and the last table set them side by side.
"""

import contextlib
import json
import math
import operator
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from confidence import Dynamics, Tally, area_under_roc, score_checkpoints, split_by_confidence
from data import (
    IGNORE_INDEX,
    Dataset,
    MicroBatch,
    Step,
    draw_lambda,
    epoch_order,
    load_examples,
    make_step,
    paired_order,
)
from eval import evaluate, table
from infra.cache import load_dataset
from infra.cli import CommandLine
from infra.demo import DEMO, DEMO_BASE, DEMO_MODEL, DEMO_VOCAB_SIZE, demo_corpus
from infra.distributed import (
    DTYPES,
    ahead,
    autocast,
    barrier,
    fastest_dtype,
    peak_memory_bytes,
    processes,
    rank,
    say,
    shard,
    signals_noted,
    sum_over_processes,
    whole,
    world_size,
)
from infra.files import read_json, write_json, written_aside
from infra.hf import (
    check_models,
    choose_template,
    empty_model,
    load_tokenizer,
    open_model,
    save_adapter,
    save_model,
    usable_length,
)
from infra.metrics import Progress, log_step
from infra.plan import estimate_flops, estimate_memory, gigabytes, heaviest_work
from infra.savepoints import Savepoints, check_finite, check_unchanged, claimed, contents_of
from mixup import sftmix_loss
from model import ModelConfig, Transformer
from tokenizer import TEMPLATES, Tokenizer

MAX_GRAD_NORM = 1.0
PRODUCTS = {"base": "base", "reference": "reference", "confidence": "confidence.jsonl", "sftmix": "sftmix"}
STAGES = tuple(PRODUCTS)  # in order; each leaves its product in the output folder
RESULTS = {
    "base": "base",
    "reference": "ntp",
    "confidence": "confidence",
    "sftmix": "sftmix",
}  # and this in results.json

# --- Configuration ----------------------------------------------------------------------------------------------------


def _flag(default, help: str, choices=None, above=None, at_least=None, below=None, free=False):
    """A field of TrainConfig: its default, what it is, and which values make sense.

    What is `free` may change when a run is resumed: results do not depend on it, or not by its name.
    """
    bounds = {"above": above, "at_least": at_least, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the flags of the command line. The defaults are the paper's settings.

    Raises ValueError, naming flag, value and what is allowed.
    """

    model: str | None = _flag(None, "model folder in Hugging Face layout; without it the demo runs", free=True)
    data: str | None = _flag(None, "training examples, .jsonl or .json", free=True)
    eval_data: str | None = _flag(None, "held-out examples to evaluate every model on", free=True)
    output: str | None = _flag(None, "folder for everything the run makes (the demo's: runs/demo)", free=True)
    stage: str = _flag("all", "which part of the recipe to run", choices=("all", *STAGES), free=True)
    confidence: str | None = _flag(
        None,
        "split by the scores in this file instead of the reference run's; or, given the word 'online', by what the "
        "SFTMix run itself sees, which then needs no reference run",
    )
    confidence_by: str = _flag("probability", "measure to split by", choices=("probability", "perplexity"))
    pairing: str = _flag(
        "confidence", "mix across the halves, or (a control) at random", choices=("confidence", "random")
    )
    mu: float = _flag(0.2, "weight of the Mixup term", at_least=0)
    alpha: float = _flag(0.5, "λ ~ Beta(alpha, alpha)", above=0)
    ntp_weight: float = _flag(1.0, "weight of the next-token term in the SFTMix run", at_least=0)
    epochs: int = _flag(3, "passes over the data", at_least=1)
    batch_size: int = _flag(32, "examples an optimizer step, over all processes", at_least=1)
    micro_batch_tokens: int = _flag(
        8192, "tokens a process computes on at once; less memory, same result", at_least=1, free=True
    )
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
    dtype: str | None = _flag(
        None,
        "of matrix products; weights stay float32 (default: bf16 on a GPU or a CPU with bf16 tiles, else fp32)",
        choices=("bf16", "fp32"),
    )
    save_dtype: str = _flag("fp32", "of the weights in saved models", choices=("bf16", "fp32"))
    lora_rank: int | None = _flag(None, "train adapters of this rank instead of the weights (LoRA)", at_least=1)
    lora_alpha: float = _flag(16.0, "an adapter's share is scaled by lora_alpha / lora_rank", above=0)
    activation_checkpointing: bool = _flag(False, "compute each block twice, to keep less in memory", free=True)
    compile: bool = _flag(
        False, "have PyTorch fuse what lies between products: half a minute to begin, then faster", free=True
    )
    cache: str | None = _flag(
        None, "where encoded data is kept, for all processes (default: ~/.cache/sftmix)", free=True
    )
    seed: int = _flag(0, "of every random draw", at_least=0, below=2**63)
    log_every: int = _flag(10, "steps between progress lines", at_least=1, free=True)
    save_every: int = _flag(500, "steps between the states that a stopped run can go on from", at_least=1, free=True)
    keep_last: int = _flag(2, "how many of those states are kept", at_least=1, free=True)
    resume: bool = _flag(
        False, "go on with what is in --output, from the newest state there (begin, if there is nothing)", free=True
    )
    max_skipped: int = _flag(
        10, "end the run after so many steps in a row without a finite loss and gradient", at_least=1, free=True
    )
    dry_run: int | None = _flag(
        None,
        "say what the run would take on N processes (without N: on as many as now), and stop",
        at_least=0,
        free=True,
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
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"--{flag.name}: a number of {len(str(value))} digits; must be below 2**63")
            for name, holds in (("above", operator.gt), ("at_least", operator.ge), ("below", operator.lt)):
                bound = flag.metadata["bounds"][name]
                if None not in (bound, value) and not holds(value, bound):
                    raise ValueError(f"--{flag.name} {value}: must be {name.replace('_', ' ')} {bound}")
        if self.stage in ("all", "sftmix") and self.batch_size % 2:
            raise ValueError(f"--batch_size {self.batch_size}: must be even, since SFTMix trains on pairs")
        if self.stage == "confidence" and self.confidence is not None:
            raise ValueError(f"--confidence {self.confidence}: leaves nothing to do for --stage confidence")
        if self.online and self.pairing == "random":
            raise ValueError("--confidence online: --pairing random makes no use of it")
        if self.online and self.epochs < 2:
            raise ValueError(f"--epochs {self.epochs}: --confidence online needs 2 or more, the first being plain NTP")
        needs = [("model", "data"), ("data", "model"), ("eval_data", "model"), ("dry_run", "model")]
        for one, other in needs + ([("model", "output")] if self.dry_run is None else []):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"--{one} {getattr(self, one)}: needs --{other} too (without --model the demo runs)")

    @property
    def online(self) -> bool:
        """Whether the SFTMix run finds out by itself who is confident."""
        return self.confidence == "online"


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
    """AdamW on the float32 master weights, decaying matrices and sparing norms; its moments are there at once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for p in parameters:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def compute_gradients(
    model: Transformer, step: Step, mu: float, ntp_weight: float, dtype: str, tally=None
) -> torch.Tensor:
    """Leave in `.grad` the gradient of the global batch's loss. -> this process's part of (loss, ntp, mix), [3]

    Every micro-batch's sums are divided by the **global** counts, so adding up gradients, over micro-batches here and
    over processes in `model.shard`, gives the gradient of the global mean: the same for any number of either.
    A `tally` takes note of log p(y) on the way.
    """
    losses = torch.zeros(3, device=model.head_weight.device)
    for micro_batch in step.micro_batches:
        loss, ntp, mix = compute_loss(model, micro_batch, step, mu, ntp_weight, dtype, tally)
        loss.backward()
        losses += torch.stack([loss.detach(), ntp, mix])
    return losses


def compute_loss(
    model: Transformer, micro_batch: MicroBatch, step: Step, mu: float, ntp_weight: float, dtype: str, tally
):
    """A micro-batch's part of L = L_NTP + μ L_Mixup: -> (loss, ntp, mix), of which the first carries gradients."""
    batch, rows = micro_batch.batch, micro_batch.rows

    def loss_of(hidden):
        z, y = hidden[rows], batch.targets[rows]  # [S, D], [S]
        log_p = None if tally is None else torch.empty(len(y), device=y.device)
        loss = sftmix_loss(
            z,
            model.head_weight,
            y,
            *micro_batch.meeting,
            micro_batch.lam,
            mu=mu,
            ntp_weight=ntp_weight,
            num_supervised=step.num_supervised,
            num_mixed=step.num_mixed,
            log_p=log_p,
        )
        if tally is not None:
            tally.add(micro_batch.owner, log_p)
        return loss

    with autocast(batch.tokens.device, dtype):
        return model(batch.tokens, batch.positions, batch.cu_seqlens, head=loss_of)


def update(model: Transformer, optimizer, lr: float, losses, num_signals: int) -> torch.Tensor:
    """Clip the gradient and take the step: -> (loss, ntp, mix, signals, gradient norm) over all processes, [5]

    Where loss or gradient is not finite, nothing is changed. All of it stays on the device: nobody waits to know.
    """
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
    figures = sum_over_processes(torch.cat([losses, losses.new_full((1,), num_signals)]))
    finite = figures[0].isfinite() & grad_norm.isfinite()
    # Where this is 1, the kernel leaves weights, moments and its count of steps alone.
    optimizer.found_inf = 1 - finite.float()
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat([figures, grad_norm.reshape(1)])


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(
    model: Transformer,
    dataset: Dataset,
    config: TrainConfig,
    order: Callable[[int], np.ndarray],
    log: Callable[[dict], None],
    *,
    mixes: Callable[[int], bool] = lambda epoch: False,
    tally: Tally | None = None,
    after_step: dict[int, Callable[[], None]] | None = None,
    savepoints: "Savepoints | None" = None,
) -> dict:
    """Train `model` in place: `config.epochs` passes, each in `order(epoch)`, mixing neighbours if `mixes(epoch)`.

    `order` is asked once an epoch, when all before it are done.
    Where nothing is mixed, the default, what is left of L is L_NTP. A `tally` takes note of log p(y) of
    what is trained on, and is closed after each epoch. `log` gets a progress record every `config.log_every` steps,
    `after_step` says what to call after which steps, counted from 1. Between these nothing waits for a GPU.
    A step whose loss or gradient is not finite changes nothing, and is logged too.

    With `savepoints` it goes on from the newest of these, and leaves new ones. SIGTERM and SIGINT then finish the step,
    leave one, and end the process. -> {"seconds"} spent on training alone, and process 0's {"peak_memory_bytes"}
    """
    optimizer, device = make_optimizer(model, config), model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    epoch_steps = steps_per_epoch(dataset, config)
    total_steps = epoch_steps * config.epochs
    progress = Progress(total_steps, device)
    first = savepoints.load(model, optimizer, tally, progress) if savepoints else 0
    model.train()
    with signals_noted() if savepoints else contextlib.nullcontext([]) as signals:
        for epoch in range(first // epoch_steps, config.epochs):
            prepare = partial(prepare_step, dataset, config, order(epoch), mixes(epoch), device)
            mu, ntp_weight = (config.mu, config.ntp_weight) if mixes(epoch) else (0.0, 1.0)
            end = (epoch + 1) * epoch_steps
            steps = range(max(first, epoch * epoch_steps), end)
            for step, work in zip(steps, ahead(prepare, steps), strict=True):
                losses = compute_gradients(model, work, mu, ntp_weight, config.dtype, tally)
                lr = learning_rate(step, total_steps, config.lr, config.warmup_ratio)
                figures = update(model, optimizer, lr, losses, len(signals))

                done = step + 1
                logs = done % config.log_every == 0 or done == total_steps
                leaves = savepoints and (done % savepoints.every == 0 or done == total_steps)
                progress.add(done, figures, work)
                for skipped in progress.look(wait=logs or leaves):
                    log(skipped | {"examples": dataset.example_ids[skipped["examples"]].astype(str).tolist()})
                    if progress.in_a_row >= config.max_skipped:
                        raise ValueError(
                            f"step {skipped['step']}: the run has diverged ({progress.in_a_row} steps in a row had no "
                            f"finite loss and gradient); try a lower --lr than {config.lr}"
                        )
                if logs:
                    log(progress.record(done, epoch=epoch, lr=lr))
                if tally and done == end:
                    tally.close()
                if after_step and done in after_step:
                    with progress.paused():
                        after_step[done]()
                if leaves or (savepoints and progress.stop):
                    with progress.paused():
                        savepoints.save(done, model, optimizer, tally, progress)
                if savepoints and progress.stop:
                    say(f"stopped after step {done}; --resume goes on from there", sys.stderr)
                    sys.exit(128 + [*signals, signal.SIGTERM][0])
    model.eval()
    return {"seconds": progress.seconds, "peak_memory_bytes": peak_memory_bytes(device)}


def steps_per_epoch(dataset: Dataset, config: TrainConfig) -> int:
    """How many steps go through the data once, the last of them perhaps with fewer examples."""
    return math.ceil(len(dataset) / config.batch_size)


def prepare_step(dataset: Dataset, config: TrainConfig, indices: np.ndarray, mixes: bool, device, step: int) -> Step:
    """The global batch of a step (counted from 0), given its epoch's order, dealt out and on the device."""
    start = step % steps_per_epoch(dataset, config) * config.batch_size
    chosen = indices[start : start + config.batch_size]
    lam = draw_lambda(len(chosen) // 2 if mixes else 0, config.alpha, config.seed, step)
    return make_step(dataset, chosen, lam, config.micro_batch_tokens, device)


# --- Going on where a run was stopped ---------------------------------------------------------------------------------


# --- What a run leaves behind -----------------------------------------------------------------------------------------


def save(model: Transformer, path: Path, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Save a model, all processes together, and go on only when it is there; what is there already stays."""
    if (path / "config.json").exists():  # of this run, before it was stopped
        return
    barrier()  # all have looked
    check_finite(model)
    save_model(model, path, tokenizer.files_for(config.template), DTYPES[config.save_dtype])
    barrier()


def save_finished(model: Transformer, path: Path, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Save the product of a stage; what LoRA has learnt is merged into it, and beside it an adapter to the base."""
    if config.lora_rank and not (path / "adapter").exists():
        barrier()
        save_adapter(model, path / "adapter", config.model)
    save(model, path, tokenizer, config)


def model_to_train(config: TrainConfig, device) -> Transformer:
    """The model that a stage begins from."""
    model = open_model(config.model, config.dtype, device, config.lora_rank, config.lora_alpha, config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        model.compile_blocks()
    return model


def results_of(output: Path) -> dict:
    """What is in `results.json` so far: an entry for each stage that is finished."""
    file = output / "results.json"
    return read_json(file) if file.is_file() else {}


def finish(config: TrainConfig, stage: str, entry: dict) -> None:
    """Enter a stage's results, with which it is finished; nobody goes on from its savepoints any more."""
    if rank() == 0:
        write_json(Path(config.output) / "results.json", results_of(Path(config.output)) | {RESULTS[stage]: entry})
    savepoints_of(config, stage).clear()


def savepoints_of(config: TrainConfig, stage: str) -> Savepoints:
    """Where a stage's savepoints are."""
    return Savepoints(Path(config.output), stage, config.save_every, config.keep_last)


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


def settled(config: TrainConfig, device) -> tuple[TrainConfig, Tokenizer]:
    """The configuration with what the model's folder and the device decide filled in, and the folder's tokenizer.

    Raises FileNotFoundError or ValueError where the folder is not whole.
    """
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if config.compile and device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise ValueError("--compile: needs a C++ compiler on a CPU, and there is none here")
    check_models([config.model])
    max_length = usable_length(config.model, config.max_length)
    tokenizer = load_tokenizer(config.model)
    template = choose_template(tokenizer, config.template)
    tokenizer.files_for(template)  # all that will be saved can be made
    dtype = config.dtype or fastest_dtype(device)
    return replace(config, max_length=max_length, template=template, dtype=dtype), tokenizer


def load_inputs(config: TrainConfig, tokenizer: Tokenizer) -> Inputs:
    """Read and encode the data, and find what is wrong with it before anything is trained."""
    dataset = load_dataset(config.data, tokenizer, config.template, config.max_length, config.cache)
    if config.eval_data is None:
        say("no --eval_data: no model is evaluated")
        return Inputs(tokenizer, dataset, None)
    held_out = load_dataset(config.eval_data, tokenizer, config.template, config.max_length, config.cache)
    example_ids = set(held_out.example_ids.tolist())
    if shared := sum(example_id in example_ids for example_id in dataset.example_ids.tolist()):
        say(f"warning: {shared:,} held-out examples are training examples too; their loss proves nothing")
    return Inputs(tokenizer, dataset, held_out)


def base_stage(config: TrainConfig, log: Callable, device) -> dict:
    """The demo's base: write the corpus, and pretrain on its clean text with the loop that trains everything else."""
    data, corpus = Path(config.output) / "data", demo_corpus(config.seed)
    if rank() == 0:
        data.mkdir(parents=True, exist_ok=True)
        for split in ("base", "train", "eval", "test"):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in getattr(corpus, split)]
            with written_aside(data / f"{split}.jsonl") as aside:
                aside.write_text("".join(lines), encoding="utf-8")
        ids = [example.id for example in load_examples(data / "train.jsonl")]
        write_json(data / "wrong.json", [i for i, wrong in zip(ids, corpus.wrong, strict=True) if wrong])
    barrier()
    texts = [message["content"] for example in load_examples(data / "train.jsonl") for message in example.messages]
    words = TEMPLATES["alpaca"].first.format(bos="", user="") + TEMPLATES["alpaca"].reply
    tokenizer = Tokenizer.train(texts + [words] * 60, DEMO_VOCAB_SIZE)  # often enough that each word is worth a piece
    config = replace(config, template=choose_template(tokenizer, config.template))
    dataset = load_dataset(data / "base.jsonl", tokenizer, config.template, config.max_length, config.cache)
    torch.manual_seed(config.seed)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **DEMO_MODEL)).to(device)
    if world_size() > 1:
        shard(model, config.dtype, device)
    say(f"a base of {sum(p.numel() for p in model.parameters()):,} parameters, from random weights")
    order = partial(epoch_order, len(dataset), config.seed)
    spent = train(model, dataset, replace(config, **DEMO_BASE), order, log, savepoints=savepoints_of(config, "base"))
    save(model, Path(config.output) / "base", tokenizer, config)
    return spent


def reference_stage(config: TrainConfig, inputs: Inputs, log: Callable, device) -> dict:
    """NTP from the base, with checkpoints evenly spaced over the run, the last step's included."""
    model = model_to_train(config, device)
    folder = Path(config.output) / "reference"

    total_steps = steps_per_epoch(inputs.train, config) * config.epochs
    steps = {math.ceil(total_steps * k / config.num_checkpoints) for k in range(1, config.num_checkpoints + 1)}
    saves = {
        step: partial(save, model, folder / "checkpoints" / f"step-{step}", inputs.tokenizer, config) for step in steps
    }
    order = partial(epoch_order, len(inputs.train), config.seed)
    savepoints = savepoints_of(config, "reference")
    spent = train(model, inputs.train, config, order, log, after_step=saves, savepoints=savepoints)
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
    kept = Path(config.output) / "resume" / "confidence"
    dynamics = score_checkpoints(folders, inputs.train, config.micro_batch_tokens, config.dtype, device, kept=kept)
    return keep_scores(dynamics, config) | {"seconds": time.perf_counter() - started}


def keep_scores(dynamics: Dynamics, config: TrainConfig) -> dict:
    """Save the scores of a run, and say what can be said of them."""
    if rank() == 0:
        dynamics.save(Path(config.output) / "confidence.jsonl")
    barrier()
    result = {"checkpoints": len(dynamics.probability), "examples": len(dynamics.ids)}
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
        order = partial(order_by_halves, scores_of(config, inputs.train), config)
    model = model_to_train(config, device)
    savepoints = savepoints_of(config, "sftmix")
    spent = train(model, inputs.train, config, order, log, mixes=lambda epoch: True, savepoints=savepoints)
    save_finished(model, Path(config.output) / "sftmix", inputs.tokenizer, config)
    return measure(model, inputs, config) | spent


def order_by_halves(scores: Dynamics, config: TrainConfig, epoch: int) -> np.ndarray:
    """An epoch's order, in which neighbours are from the two halves."""
    confident, unconfident = split_by_confidence(scores.by(config.confidence_by))
    if epoch == 0 or config.online:
        say(f"{len(confident):,} confident and {len(unconfident):,} unconfident examples, by {config.confidence_by}")
    return paired_order(confident, unconfident, config.seed, epoch)


def online_stage(config: TrainConfig, inputs: Inputs, log: Callable, device) -> tuple[dict, dict]:
    """SFTMix in one run, each epoch's training passes being the checkpoints: -> results of it and of its scores.

    The first epoch is NTP. At the end of each the split is made anew, by the mean over the epochs so far of p(y) as it
    was when trained on, and from the second on there is Mixup.
    """
    dataset = inputs.train
    tally = Tally(dataset.num_supervised, device, config.epochs)

    def order(epoch: int) -> np.ndarray:
        """As of what the epochs before have shown."""
        if epoch == 0:
            return epoch_order(len(dataset), config.seed, epoch)
        return order_by_halves(Dynamics(dataset.ids, *tally.epochs()), config, epoch)

    model = model_to_train(config, device)
    savepoints = savepoints_of(config, "sftmix")
    spent = train(model, dataset, config, order, log, mixes=lambda epoch: epoch > 0, tally=tally, savepoints=savepoints)
    save_finished(model, Path(config.output) / "sftmix", inputs.tokenizer, config)
    return measure(model, inputs, config) | spent, keep_scores(Dynamics(dataset.ids, *tally.epochs()), config)


def measure(model: Transformer | None, inputs: Inputs, config: TrainConfig) -> dict:
    """Evaluate a model on the held-out examples; without them, every figure is None."""
    if inputs.held_out is None:
        return dict.fromkeys(("loss", "loss_interval", "accuracy", "accuracy_interval", "examples", "tokens"))
    read_examples = partial(load_examples, config.eval_data)
    settings = config.template, config.micro_batch_tokens, config.dtype
    return evaluate(model, inputs.held_out, read_examples, inputs.tokenizer, *settings)


# --- What a run would take --------------------------------------------------------------------------------------------


def dry_run(config: TrainConfig, device) -> None:
    """Say what a run would take, and show an example as it will be trained on; all that is written is the cache."""
    config, tokenizer = settled(config, device)
    inputs = load_inputs(config, tokenizer)
    num_processes, dataset = config.dry_run or world_size(), inputs.train
    model = empty_model(config.model, config.dtype, config.lora_rank, config.lora_alpha)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = steps_per_epoch(dataset, config)
    work = heaviest_work(dataset, config, num_processes)
    memory = estimate_memory(model, work, config, num_processes, device.type)
    tokens, supervised = int(dataset.lengths.sum()), int(dataset.num_supervised.sum())
    flops = config.epochs * estimate_flops(model, tokens, supervised, config)
    stored = (parameters - trainable if config.lora_rank else parameters) * DTYPES[config.save_dtype].itemsize
    models, what = min(config.num_checkpoints, config.epochs * steps) + 2, "checkpoints, reference, sftmix"
    if config.online:
        models, what = 1, "sftmix"
    if config.confidence is not None and not config.online:
        scores_of(config, dataset)

    warn_of_idleness(config, num_processes)
    say(f"\nparameters     {parameters:,}, of which {trainable:,} are trained")
    say(f"steps          {config.epochs * steps:,} a stage: {config.epochs} epochs of {steps:,}")
    say(f"micro-batches  of at most {work.tokens:,} tokens, on {num_processes} x {device.type}")
    say(f"compute        {flops / 1e15:,.2f} PFLOP a stage")
    savepoint = 3 * 4 * trainable  # weights and AdamW's two moments; the old one goes when the new is there
    say(f"disk           {gigabytes(models * stored)} for {models} models: {what}")
    say(f"               {gigabytes((config.keep_last + 1) * savepoint)} for savepoints, while a stage runs")
    say("memory         of a process, estimated:")
    for name, size in memory.items():
        say(f"  {name:17}{gigabytes(size):>10}" + (" at the peak, where not all is there at once" * (name == "total")))
    tokens, targets = dataset[0]
    ids, learnt = [*tokens.tolist(), int(targets[-1])], [False, *(targets != IGNORE_INDEX).tolist()]
    runs = groupby(zip(ids, learnt, strict=True), key=lambda token: token[1])
    shown = [(" ".join(inputs.tokenizer.piece(i) for i, _ in run), learn) for learn, run in runs]
    say(f"\nThe first example, {len(tokens):,} tokens; what is learnt stands in «»:")
    say(" ".join(f"« {text} »" if learn else text for text, learn in shown))


# --- The pipeline -----------------------------------------------------------------------------------------------------


def run(config: TrainConfig, device) -> None:
    """Run the stages asked for, each from what the earlier ones left in the output folder, and report."""
    output, demo = Path(config.output), config.model is None
    if not demo and output.resolve() == Path(config.model).resolve():
        raise ValueError(f"--output {output}: is the model's own folder; choose another")
    if demo and config.max_length > DEMO_MODEL["max_position_embeddings"]:
        raise ValueError(
            f"--max_length {config.max_length}: the demo's model has {DEMO_MODEL['max_position_embeddings']} positions"
        )
    warn_of_idleness(config, world_size())
    with claimed(output):
        run_stages(config, stages_to_run(config), device)
        if rank() == 0:
            report(output, demo)


def stages_to_run(config: TrainConfig) -> list[str]:
    """The stages asked for; to a run that goes on, those of them that are not finished.

    Raises FileExistsError where, in a run that does not go on, something of theirs is there already.
    """
    output = Path(config.output)
    stages = list(STAGES if config.stage == "all" else (config.stage,))
    if config.confidence is not None:  # the scores are there already, or come with the SFTMix run
        without = ("reference", "confidence") if config.online and config.stage == "all" else ("confidence",)
        stages = [stage for stage in stages if stage not in without]
    if config.resume:
        finished = results_of(output)
        stages = [stage for stage in stages if RESULTS[stage] not in finished]
    else:
        for made in [*stages, *(["confidence"] if config.online and "sftmix" in stages else [])]:
            product = output / PRODUCTS[made]
            if product.exists():
                raise FileExistsError(f"{product}: already there; --resume goes on, or choose another --output")
        if any((output / "resume").glob("*")):
            raise FileExistsError(
                f"{output}/resume: a run was stopped here; --resume goes on, or choose another --output"
            )
    barrier()  # all have looked before anybody writes
    return stages


def run_stages(config: TrainConfig, stages: list[str], device) -> None:
    """Run these stages, when nothing can be wrong any more with what they are given."""
    output = Path(config.output)
    if config.resume:
        config = check_unchanged(config)

    def log(stage: str) -> Callable:
        return partial(log_step, output / "metrics.jsonl", stage)

    spent = {"seconds": None, "peak_memory_bytes": None}
    if config.model is None:
        if rank() == 0:
            write_json(output / "config.json", asdict(config))
        if "base" in stages:
            spent = base_stage(config, log("base"), device)
        files = {"model": "base", "data": "data/train.jsonl", "eval_data": "data/test.jsonl"}
        config = replace(config, **{flag: str(output / name) for flag, name in files.items()})
    config, tokenizer = settled(config, device)
    inputs = load_inputs(config, tokenizer)
    if "confidence" in stages and "reference" not in stages:
        checkpoints_of(config)
    if "sftmix" in stages and "confidence" not in stages and config.pairing == "confidence" and not config.online:
        scores_of(config, inputs.train)
    if rank() == 0:  # nothing more can be wrong with what was given
        content = contents_of(config)
        if config.resume:
            check_unchanged(config, content)
        write_json(output / "config.json", asdict(config) | {"content": content})

    if "base" in stages:
        measured = measure(open_model(config.model, config.dtype, device) if inputs.held_out else None, inputs, config)
        finish(config, "base", measured | spent)
    if "reference" in stages:
        finish(config, "reference", reference_stage(config, inputs, log("reference"), device))
    if "confidence" in stages:
        finish(config, "confidence", confidence_stage(config, inputs, device))
    if "sftmix" in stages and config.online:
        sftmix, scores = online_stage(config, inputs, log("sftmix"), device)
        finish(config, "confidence", scores)
        finish(config, "sftmix", sftmix)
    elif "sftmix" in stages:
        finish(config, "sftmix", sftmix_stage(config, inputs, log("sftmix"), device))


def report(output: Path, demo: bool) -> None:
    """The last words of a run: the table, what confidence found, where everything is, and what to try next."""
    results = results_of(output)
    names = {"base": "base", "ntp": "NTP", "sftmix": "SFTMix"}
    try:
        print("\n" + table({name: results[key] for key, name in names.items() if key in results}) + "\n")
        for name, area in results.get("confidence", {}).get("roc_area", {}).items():
            print(f"Low confidence by {name} finds the wrong answers with an area under the ROC curve of {area:.3f}.")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{output}/results.json: changed since it was written ({error})") from None
    made = ("data", *PRODUCTS.values(), "config.json", "metrics.jsonl", "results.json")
    print(f"In {output}/ now:", ", ".join(name for name in made if (output / name).exists()))
    if (output / "confidence.jsonl").exists():
        print(f"The data map:  python confidence.py --scores {output}/confidence.jsonl --plot map.png")
    if demo:
        print("The real thing:  torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR")


def main(argv=None) -> None:
    """Read the command line and run what it asks for."""
    config = parse_config(argv)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun has started this anew, after something failed
        config = replace(config, resume=True)
    with processes() as device:
        (run if config.dry_run is None else dry_run)(config, device)


if __name__ == "__main__":
    main()
