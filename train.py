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
import fcntl
import json
import math
import operator
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
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
    Tally,
    area_under_roc,
    check_models,
    choose_template,
    load_dataset,
    load_tokenizer,
    score_checkpoints,
    split_by_confidence,
    split_fours,
    usable_length,
)
from data import (
    IGNORE_INDEX,
    Batch,
    Dataset,
    ahead,
    demo_corpus,
    draw_lambda,
    epoch_order,
    load_examples,
    pack,
    paired_order,
    split_batch,
    to_device,
)
from eval import evaluate, table
from mixup import chunk_rows, pair_positions, sftmix_loss
from model import (
    DTYPES,
    MANIFEST,
    CommandLine,
    ModelConfig,
    Transformer,
    autocast,
    barrier,
    check_manifest,
    checksums,
    content_of,
    drop_gathered,
    empty_model,
    fastest_dtype,
    flush,
    folder_aside,
    open_model,
    own_rows,
    peak_memory_bytes,
    processes,
    rank,
    read_json,
    save_adapter,
    save_model,
    say,
    shard,
    signals_noted,
    sum_over_processes,
    whole,
    world_size,
    write_json,
    written_aside,
)
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
        if self.mixing_group == 4 and self.batch_size % 4:
            raise ValueError(f"--batch_size {self.batch_size}: must be a multiple of 4 for one epoch online")
        needs = [("model", "data"), ("data", "model"), ("eval_data", "model"), ("dry_run", "model")]
        for one, other in needs + ([("model", "output")] if self.dry_run is None else []):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"--{one} {getattr(self, one)}: needs --{other} too (without --model the demo runs)")

    @property
    def online(self) -> bool:
        """Whether the SFTMix run finds out by itself who is confident."""
        return self.confidence == "online"

    @property
    def mixing_group(self) -> int:
        """How many neighbours stay together in a step that mixes: a pair, or four yet to be split into two."""
        return 4 if self.online and self.epochs == 1 else 2


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


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on."""

    batch: Batch
    rows: torch.Tensor  # int64 [S]: the supervised positions
    owner: torch.Tensor  # int64 [S]: whose they are, by number in the batch
    members: torch.Tensor  # int64 [B]: the examples of the batch, by number in the data set
    lam: torch.Tensor  # float32 [M]: of each mixed position; [P] of each pair while it is open who meets whom
    # index_c and index_u of `pair_positions`, in main memory; None where the model has yet to say who is confident.
    meeting: list | None

    def to(self, device) -> "MicroBatch":
        """The same on `device`, copied while the device is at work: nobody waits."""
        tensors = (self.rows, self.owner, self.members, self.lam)
        return MicroBatch(self.batch.to(device), *(to_device(x, device) for x in tensors), self.meeting)


@dataclass(frozen=True)
class Step:
    """This process's share of a global batch, and the counts of the whole of it that the means divide by."""

    examples: np.ndarray  # all of them, over all processes, by number in the data set
    micro_batches: list[MicroBatch]
    num_supervised: int  # over all processes
    num_mixed: float
    num_tokens: int


def deal(lengths: list[int], group: int, max_tokens: int, num_processes: int) -> list[list[tuple]]:
    """Deal examples into micro-batches, as many for each process (some may be empty).

    Each run of `group` neighbours stays in one micro-batch; those left over go singly.

    >>> deal([30, 10, 20, 20, 5], group=2, max_tokens=50, num_processes=1)
    [[(0, 1), (4,)], [(2, 3)]]
    """
    whole = len(lengths) - len(lengths) % group
    units = [tuple(range(i, i + group)) for i in range(0, whole, group)] + [(i,) for i in range(whole, len(lengths))]
    bins = split_batch([sum(lengths[i] for i in unit) for unit in units], max_tokens, num_processes)
    return [[units[u] for u in members] for members in bins]


def make_step(dataset: Dataset, chosen: np.ndarray, group: int, lam, micro_batch_tokens: int, device="cpu") -> Step:
    """Deal a global batch out, groups of neighbours in `chosen` staying together: lam [P], P pairs in all.

    `group` is 1: nobody meets anybody. 2: 0 meets 1, 2 meets 3, …, confident first. 4: of 0 to 3, of 4 to 7, … the
    model will say which two are confident. Those left over are trained on with NTP alone.
    """
    lengths, counts = dataset.lengths[chosen], dataset.num_supervised[chosen]
    micro_batches = []
    for units in deal(lengths.tolist(), group, micro_batch_tokens, world_size())[rank() :: world_size()]:
        units.sort(key=len, reverse=True)  # groups first, so that pair p is examples 2p and 2p+1
        members = [i for unit in units for i in unit]
        batch = pack([dataset[i] for i in chosen[members]])
        pairs = torch.tensor([i // 2 for unit in units if len(unit) > 1 for i in unit[::2]], dtype=torch.int64)
        rows, lam_here, meeting = batch.supervised, lam[pairs], None
        if group != 4:
            neighbours = torch.arange(2 * len(pairs)).view(-1, 2)
            *meeting, pair = pair_positions(batch.targets, batch.cu_seqlens, neighbours)
            lam_here = lam_here[pair]
        owner, numbers = batch.example[rows], torch.from_numpy(chosen[members])
        micro_batches.append(MicroBatch(batch, rows, owner, numbers, lam_here, meeting).to(device))
    return Step(chosen, micro_batches, int(counts.sum()), expected_mixed(counts, group), int(lengths.sum()))


def expected_mixed(counts: np.ndarray, group: int) -> float:
    """How many positions will be mixed: Σ min(N^c, N^u), averaged over the ways in which a group can fall into pairs.

    Among 4 there are 3 ways, and each two meet in one of them. What the mean divides by must be known before any of
    the batch is computed on; where the confident two are the shorter two, fewer positions than this are mixed.

    >>> expected_mixed(np.array([5, 7]), group=2), expected_mixed(np.array([1, 2, 3, 9]), group=4)
    (5.0, 3.3333333333333335)
    """
    if group == 1:
        return 0.0
    groups = np.sort(counts[: len(counts) - len(counts) % group].reshape(-1, group))  # each by number, ascending
    # Of its pairs with those after it, each is the smaller one.
    return float((groups @ np.arange(group - 1, -1, -1)).sum() / (group - 1))


def compute_gradients(
    model: Transformer, step: Step, mu: float, ntp_weight: float, dtype: str, tally=None, by: str = "probability"
) -> torch.Tensor:
    """Leave in `.grad` the gradient of the global batch's loss. -> this process's part of (loss, ntp, mix), [3]

    Every micro-batch's sums are divided by the **global** counts, so adding up gradients, over micro-batches here and
    over processes in `model.shard`, gives the gradient of the global mean: the same for any number of either.
    A `tally` takes note of log p(y) on the way; `by` is the measure that splits groups of four.
    """
    losses = torch.zeros(3, device=model.head_weight.device)
    for micro_batch in step.micro_batches:
        loss, ntp, mix = compute_loss(model, micro_batch, step, mu, ntp_weight, dtype, tally, by)
        loss.backward()
        losses += torch.stack([loss.detach(), ntp, mix])
    return losses


def compute_loss(
    model: Transformer, micro_batch: MicroBatch, step: Step, mu: float, ntp_weight: float, dtype: str, tally, by: str
):
    """A micro-batch's part of L = L_NTP + μ L_Mixup: -> (loss, ntp, mix), of which the first carries gradients."""
    batch, rows = micro_batch.batch, micro_batch.rows

    def loss_of(hidden):
        z, y = hidden[rows], batch.targets[rows]  # [S, D], [S]
        if micro_batch.meeting is None:
            index_c, index_u, pair = meet_in_fours(model, micro_batch, z, y, by)
            lam = micro_batch.lam[pair]
        else:
            (index_c, index_u), lam = micro_batch.meeting, micro_batch.lam
        log_p = None if tally is None else torch.empty(len(y), device=y.device)
        loss = sftmix_loss(
            z,
            model.head_weight,
            y,
            index_c,
            index_u,
            lam,
            mu=mu,
            ntp_weight=ntp_weight,
            num_supervised=step.num_supervised,
            num_mixed=step.num_mixed,
            log_p=log_p,
        )
        if tally is not None:
            tally.add(micro_batch.members[micro_batch.owner], log_p)
        return loss

    with autocast(batch.tokens.device, dtype):
        return model(batch.tokens, batch.positions, batch.cu_seqlens, head=loss_of)


def meet_in_fours(model: Transformer, micro_batch: MicroBatch, z, y, by: str):
    """`pair_positions` of a micro-batch whose groups of four the model splits now, by what it predicts as it is.

    How many positions that mixes decides the shapes of what follows: here, and only here, the GPU is waited for.
    """
    log_p = model.gold_log_probs(z, y)  # [S]
    values = torch.stack([log_p.exp() if by == "probability" else log_p, torch.ones_like(log_p)])
    total, count = values.new_zeros(2, len(micro_batch.members)).index_add_(1, micro_batch.owner, values)  # [B]
    scores = (total / count)[: 2 * len(micro_batch.lam)]
    return pair_positions(micro_batch.batch.targets.cpu(), micro_batch.batch.cu_seqlens, split_fours(scores.cpu()))


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
    group: Callable[[int], int] = lambda epoch: 1,
    tally: Tally | None = None,
    after_step: dict[int, Callable[[], None]] | None = None,
    savepoints: "Savepoints | None" = None,
) -> dict:
    """Train `model` in place: `config.epochs` passes, each in `order(epoch)`, mixing in a `group(epoch)` of neighbours.

    `order` is asked once an epoch, when all before it are done.
    In a group of 1, the default, nobody meets anybody: what is left of L is L_NTP. A `tally` takes note of log p(y) of
    what is trained on, and is closed after each epoch. `log` gets a progress record every `config.log_every` steps,
    `after_step` says what to call after which steps, counted from 1. Between these nothing waits for a GPU, but where
    fours are split. A step whose loss or gradient is not finite changes nothing, and is logged too.

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
            prepare = partial(prepare_step, dataset, config, order(epoch), group(epoch), device)
            mu, ntp_weight = (config.mu, config.ntp_weight) if group(epoch) > 1 else (0.0, 1.0)
            end = (epoch + 1) * epoch_steps
            steps = range(max(first, epoch * epoch_steps), end)
            for step, work in zip(steps, ahead(prepare, steps), strict=True):
                losses = compute_gradients(model, work, mu, ntp_weight, config.dtype, tally, config.confidence_by)
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


def prepare_step(dataset: Dataset, config: TrainConfig, indices: np.ndarray, group: int, device, step: int) -> Step:
    """The global batch of a step (counted from 0), given its epoch's order, dealt out and on the device."""
    start = step % steps_per_epoch(dataset, config) * config.batch_size
    chosen = indices[start : start + config.batch_size]
    num_pairs = len(chosen) // group * (group // 2)
    lam = draw_lambda(num_pairs, config.alpha, config.seed, step)
    return make_step(dataset, chosen, group, lam, config.micro_batch_tokens, device)


class Progress:
    """What the steps have come to, and how long everything took, pauses not counted.

    A step's figures are looked at when the next one is under way: a device is never waited for, unless `look` is told.
    """

    def __init__(self, total_steps: int, device):
        self.total_steps, self.device = total_steps, device
        self.started = self.logged = time.perf_counter()  # both are put forward by a pause
        self.unseen: deque = deque()
        self.stop = False  # whether a signal has asked some process to
        self.skipped = self.in_a_row = 0  # steps that changed nothing: all, and since the last that did
        # Since the last record: tokens, and of the steps that were not skipped the number and the sums of losses.
        self.tokens, self.counted, self.sums, self.grad_norm = 0, 0, [0.0, 0.0, 0.0], 0.0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.started = time.perf_counter() - value

    @property
    def since_logged(self) -> float:
        """Seconds since the last record."""
        return time.perf_counter() - self.logged

    @since_logged.setter
    def since_logged(self, value: float) -> None:
        self.logged = time.perf_counter() - value

    def add(self, step: int, figures, work: Step) -> None:
        """Take note of a step (counted from 1): its (loss, ntp, mix, signals, gradient norm), not yet looked at."""
        figures, copied = figures.to("cpu", non_blocking=True), None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self.unseen.append((step, figures, copied, work))

    def look(self, wait: bool) -> list[dict]:
        """Look at all steps but the newest, or with `wait` at that too: -> a record of each that was skipped."""
        records = []
        while len(self.unseen) > (0 if wait else 1):
            step, figures, copied, work = self.unseen.popleft()
            if copied:
                copied.synchronize()
            *losses, signals, grad_norm = figures.tolist()
            self.stop |= signals > 0
            self.tokens += work.num_tokens
            if math.isfinite(losses[0]) and math.isfinite(grad_norm):
                self.in_a_row, self.counted, self.grad_norm = 0, self.counted + 1, grad_norm
                self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
            else:
                self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
                what = {"loss": str(losses[0]), "grad_norm": str(grad_norm)}  # JSON has no such numbers
                records.append({"step": step, "skipped": self.skipped, **what, "examples": work.examples})
        return records

    def record(self, step: int, **more) -> dict:
        """The mean over the steps since the last one that were not skipped (None, if all were)."""
        now, seconds = time.perf_counter(), self.seconds
        loss, ntp, mix = (total / self.counted if self.counted else None for total in self.sums)
        record = {"step": step, "total_steps": self.total_steps, **more, "loss": loss, "ntp": ntp, "mix": mix}
        record["grad_norm"] = self.grad_norm
        record["tokens_per_second"] = self.tokens / (now - self.logged)
        record["seconds_left"] = seconds / step * (self.total_steps - step)
        self.tokens, self.counted, self.sums, self.logged = 0, 0, [0.0, 0.0, 0.0], now
        return record

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        yield
        pause = time.perf_counter() - begun
        self.started, self.logged = self.started + pause, self.logged + pause


# --- Going on where a run was stopped ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Savepoints:
    """The moments from which a stage can go on: `output`/resume/STAGE-step-N, of which the last `keep` stay.

    Each holds all that a step changes: weights and AdamW's moments (safetensors, written by PyTorch's distributed
    checkpoint, each process its own part, read by any number of them), and a `state.json` with the rest. Order and λ
    are functions of the seed and the step, and need no state.
    """

    output: Path
    stage: str
    every: int
    keep: int

    def _kept(self) -> list[tuple[int, Path]]:
        """(step, folder) of each, the oldest first."""
        prefix = f"{self.stage}-step-"
        found = [(f.name.removeprefix(prefix), f) for f in (self.output / "resume").glob(f"{prefix}*")]
        return sorted((int(step), folder) for step, folder in found if step.isdecimal())

    def save(self, step: int, model: Transformer, optimizer, tally: Tally | None, progress: "Progress") -> None:
        """Leave a savepoint after `step`, all processes together. OSError where that can't be; those before stay."""
        check_finite(model)
        drop_gathered(model)
        tensors = _training_tensors(model, optimizer, tally)
        updates = next(iter(optimizer.state.values()))["step"]
        state = {
            "step": step,
            "updates": int(updates),  # fewer than steps where some were skipped
            "closed_epochs": tally.closed if tally else 0,
            "progress": {name: getattr(progress, name) for name in _PROGRESS},
        }
        path = self.output / "resume" / f"{self.stage}-step-{step}"
        with folder_aside(path.with_name("partial")) as aside:
            with _distributed_checkpoint(path) as dcp:
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True))
            if rank() == 0:
                write_json(aside / "state.json", state)
                write_json(aside / MANIFEST, checksums(sorted(aside.iterdir())))
                flush(aside)
                shutil.rmtree(path, ignore_errors=True)  # a damaged one of an earlier try
                aside.rename(path)
                flush(path.parent)
                for _, old in self._kept()[: -self.keep]:
                    shutil.rmtree(old)
        barrier()

    def load(self, model: Transformer, optimizer, tally: Tally | None, progress: "Progress") -> int:
        """Put everything back as it was at the newest savepoint that is whole: -> how many steps are done by then."""
        newest = torch.zeros(1, dtype=torch.int64, device=model.head_weight.device)
        if rank() == 0:
            newest.fill_(self._newest_whole())
        step = int(sum_over_processes(newest))
        if rank() == 0:
            self._rewind_metrics(step)
        if step == 0:
            return 0
        path = self.output / "resume" / f"{self.stage}-step-{step}"
        say(f"{self.stage:>10}  goes on after step {step}")
        drop_gathered(model)
        state, tensors = read_json(path / "state.json"), _training_tensors(model, optimizer, tally)
        with _distributed_checkpoint(path) as dcp:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        for values in optimizer.state.values():
            values["step"].fill_(state["updates"])
        if tally:
            tally.closed = state["closed_epochs"]
            tally.sums.copy_(tensors["tally"] if rank() == 0 else torch.zeros_like(tally.sums))
        for name in _PROGRESS:
            setattr(progress, name, state["progress"][name])
        return step

    def _newest_whole(self) -> int:
        for step, folder in reversed(self._kept()):
            try:
                check_manifest(folder)
                if not (folder / MANIFEST).is_file():
                    raise ValueError(f"{folder / MANIFEST}: not found")
                return step
            except (ValueError, OSError) as error:
                say(f"warning: {error}: passed over, for the one before", sys.stderr)
        return 0

    def _rewind_metrics(self, step: int) -> None:
        """Take out of metrics.jsonl what this stage logged after `step`, and a last line that was cut short."""
        file, kept = self.output / "metrics.jsonl", []
        if not file.is_file():
            return
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if line.endswith("\n") and not (record["stage"] == self.stage and record["step"] > step):
                    kept.append(line)
        with written_aside(file) as aside:
            aside.write_text("".join(kept), encoding="utf-8")

    def clear(self) -> None:
        """The stage is finished: remove them."""
        if rank() == 0:
            for folder in [*(folder for _, folder in self._kept()), self.output / "resume" / self.stage]:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another stage's may be there
                (self.output / "resume").rmdir()
        barrier()


_PROGRESS = ("seconds", "since_logged", "skipped", "in_a_row", "tokens", "counted", "sums", "grad_norm")


def _training_tensors(model: Transformer, optimizer, tally: Tally | None) -> dict[str, torch.Tensor]:
    """What steps change, by name: the trained weights, AdamW's two moments of each, and what a tally has noted."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            moments = optimizer.state[p]
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
    if tally:
        tensors["tally"] = sum_over_processes(tally.sums.clone())
        tensors["tally.history"] = tally.history
    return tensors


@contextlib.contextmanager
def _distributed_checkpoint(path: Path):
    """PyTorch's distributed checkpoint, whose errors become an OSError that says which savepoint it is about."""
    import torch.distributed.checkpoint as dcp  # a second that most tools need not wait for

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, with one process
            yield dcp
    except dcp.CheckpointException as error:
        why = sorted({str(why) or repr(why) for why, _ in error.failures.values()})
        raise OSError(f"{path}: {'; '.join(why)}") from None


def check_finite(model: Transformer) -> None:
    """Raise ValueError where weights are not finite numbers: these are not for saving."""
    broken = sum((~own_rows(p.detach()).isfinite()).sum() for p in model.parameters())
    if int(sum_over_processes(broken)):
        raise ValueError(
            "the run has diverged: weights are no longer finite numbers, and are not saved; try a lower --lr"
        )


@contextlib.contextmanager
def claimed(folder: Path):
    """Keep every other run out of an output folder for as long as this one is at work in it.

    Raises FileExistsError where another is. The lock is the system's, and goes with the process however that ends.
    """
    if rank() != 0:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):  # that run has just ended, and taken it
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise FileExistsError(f"{folder}: another run is at work there; wait for it, or choose another") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new:
                with contextlib.suppress(OSError):  # something was made
                    folder.rmdir()


def check_unchanged(config: TrainConfig, content: dict | None = None) -> TrainConfig:
    """Compare with the run that is to be resumed: -> config, with what that run had settled where no flag says it.

    Raises ValueError naming the first flag on which the result depends that has another value, or (`content`: their
    checksums) the first file that has another content.
    """
    file = Path(config.output) / "config.json"
    if not file.is_file():
        return config
    before = read_json(file)
    settled = {name: before.get(name) for name in ("max_length", "template", "dtype") if getattr(config, name) is None}
    config = replace(config, **settled)
    for flag in fields(config):
        value = getattr(config, flag.name)
        if not flag.metadata["free"] and value != before.get(flag.name):
            raise ValueError(
                f"--{flag.name} {value}: the run in {config.output} was begun with {before.get(flag.name)}, and would "
                "become another one; give it as it was, or choose another --output"
            )
    known = before.get("content")
    for name, checksum in (content or {}).items():
        if isinstance(known, dict) and checksum != known.get(name, checksum):
            raise ValueError(
                f"--{name} {getattr(config, name)}: is not what it was when the run in {config.output} began; "
                "bring its content back, or choose another --output"
            )
    return config


def contents_of(config: TrainConfig) -> dict:
    """Checksums of what a run reads."""
    read = ("model", "data", "eval_data", *(() if config.online else ("confidence",)))
    return {name: content_of(getattr(config, name)) for name in read if getattr(config, name) is not None}


# --- What a run leaves behind -----------------------------------------------------------------------------------------


def log_step(file: Path, stage: str, record: dict) -> None:
    """A line for `metrics.jsonl` and one for the reader."""
    if rank() == 0:
        with open(file, "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps({"stage": stage, **record}) + "\n")
    if "skipped" in record:
        examples = ", ".join(record["examples"][:4]) + (" …" if len(record["examples"]) > 4 else "")
        say(
            f"{stage:>10}  step {record['step']}: skipped, since its loss is {record['loss']} and its gradient's norm "
            f"{record['grad_norm']}; among its examples is the cause: {examples} (all in {file.name})"
        )
        return
    parts = f"ntp {record['ntp']:.4f}  mix {record['mix']:.4f}  " if record["mix"] else ""
    left = (
        f"{record['seconds_left'] / 60:.0f} min" if record["seconds_left"] >= 120 else f"{record['seconds_left']:.0f} s"
    )
    say(
        f"{stage:>10}  step {record['step']:>{len(str(record['total_steps']))}}/{record['total_steps']}  "
        f"loss {record['loss'] or math.nan:.4f}  {parts}{record['tokens_per_second']:,.0f} tokens/s  {left} left"
    )


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
    """Say so where a batch has too few pairs (or fours) to give every process one."""
    if config.batch_size < config.mixing_group * num_processes:
        unit = "a pair" if config.mixing_group == 2 else "four examples"
        say(f"warning: --batch_size {config.batch_size} is less than {unit} for each of {num_processes} processes")


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
    spent = train(model, inputs.train, config, order, log, group=lambda epoch: 2, savepoints=savepoints)
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
    was when trained on, and from the second on there is Mixup. A single epoch has no earlier one to learn from: there
    each group of four is split by the model's probabilities in that very step.
    """
    dataset = inputs.train
    tally = Tally(dataset.num_supervised, device, config.epochs)

    def order(epoch: int) -> np.ndarray:
        """As of what the epochs before have shown."""
        if epoch == 0:
            return epoch_order(len(dataset), config.seed, epoch)
        return order_by_halves(Dynamics(dataset.ids, *tally.epochs()), config, epoch)

    def group(epoch: int) -> int:
        return config.mixing_group if epoch > 0 or config.epochs == 1 else 1

    model = model_to_train(config, device)
    savepoints = savepoints_of(config, "sftmix")
    spent = train(model, dataset, config, order, log, group=group, tally=tally, savepoints=savepoints)
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


class Work(NamedTuple):
    """The largest of a run's micro-batches, which decides how much memory it takes."""

    tokens: int
    supervised: int
    accumulates: bool  # a process adds up gradients over several


def heaviest_work(dataset: Dataset, config: TrainConfig, num_processes: int) -> Work:
    """Deal an epoch out by pairs, as the SFTMix run does (there by other pairs), and find the largest micro-batch."""
    order, heaviest, accumulates = epoch_order(len(dataset), config.seed, 0), (0, 0), False
    for start in range(0, len(dataset), config.batch_size):
        chosen = order[start : start + config.batch_size]
        lengths, counts = dataset.lengths[chosen], dataset.num_supervised[chosen]
        micro_batches = deal(lengths.tolist(), config.mixing_group, config.micro_batch_tokens, num_processes)
        accumulates |= len(micro_batches) > num_processes
        for units in micro_batches:
            members = [i for unit in units for i in unit]
            heaviest = max(heaviest, (int(lengths[members].sum()), int(counts[members].sum())))
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
    inputs = product * 2 * D  # what the norms return, to q, k, v and to gate, up
    attention = (4 if cpu else product) * 2 * (Q + K) + product * Q  # q, k, v, what comes out, and that for o_proj
    mlp = product * 4 * F  # gate, its activation, up, and their product
    return 2 * norm + inputs + attention + mlp, norm + 2 * product * D


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
    made = 4 * head
    if num_processes > 1:  # gradients on their way to being a share
        made += 4 * head + (product + 4) * block
    block_bytes, around = activation_bytes(model.config, config, device_type)
    activations = work.tokens * (around + block_bytes * len(layers))
    at_work = rows * vocab_size * (8 if bf16 else 6)  # logits of rows, and of half as many mixed ones
    if not config.lora_rank:
        at_work = max(at_work, 4 * head)  # when they are gone, the head's gradient is there twice for a moment
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


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


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
