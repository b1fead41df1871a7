"""SFTMix: a reference run, the confidence of its checkpoints, the Mixup run.

    torchrun train.py                                   the demo needs no file
    torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR

A run has four stages. Each of them writes a part of the output folder:

    base         the model to start from: given, or pretrained by the demo
    reference    plain next-token prediction (μ = 0), saving checkpoints
    confidence   how well those checkpoints predict each training example
    sftmix       from the base again: L = L_NTP + μ L_Mixup, with Mixup
                 between the confident and the unconfident half

A checkpoint is a model, which can be scored and opened elsewhere; a savepoint
is the whole state of training. A stopped run resumes from its last savepoint
with --resume. It ends at the same weights, bit for bit, on a CPU without
--compile, and on a GPU with --deterministic. Each model is evaluated on the
held-out data; results.json and a table at the end compare them.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # must be set before PyTorch is imported

import torch

from confidence import ScoreAccumulator, TrainingDynamics, roc_auc, score_checkpoints, split_by_confidence
from data import (
    MICRO_BATCH_TOKENS,
    Dataset,
    GlobalBatch,
    MicroBatch,
    build_batch,
    epoch_order,
    paired_order,
    sample_lambda,
    steps_per_epoch,
)
from eval import evaluate
from infra.cache import load_dataset, resolve_cache
from infra.cli import DATA_HELP, MAX_LENGTH_HELP, TEMPLATE_DEFAULT, ArgumentParser, add_flags, check_values, flag
from infra.demo import DEMO_BASE_FLAGS, DEMO_FLAGS, DEMO_MODEL, train_demo_tokenizer, write_demo_data
from infra.device import DEVICE_TYPES, DTYPES, peak_memory_bytes, resolve_hardware, set_deterministic
from infra.distributed import (
    all_reduce_sum,
    defer_signals,
    init_distributed,
    on_rank0,
    prefetch,
    print0,
    rank,
    set_up_process,
    world_size,
)
from infra.files import file_sha256
from infra.fsdp import apply_fsdp, full_tensor, set_zero_stage
from infra.hf import load_model, meta_model, stored_dtype
from infra.inputs import Inputs, load_inputs, resolve_model
from infra.metrics import StepMetrics, log_checkpoint
from infra.output import (
    STAGES,
    check_output,
    lock_output,
    print_report,
    record_stage,
    reference_checkpoints,
    save_checkpoint,
    save_result,
    save_skipped,
    stage_log,
    stage_position,
    stage_savepoints,
    stages_of,
    stages_to_run,
)
from infra.plan import print_example, print_plan
from infra.resume import begin_run, check_model_unchanged, check_scores, continue_config
from infra.savepoints import Savepoints
from mixup import sftmix_loss
from model import ModelConfig, Transformer
from tokenizer import TEMPLATES

MAX_GRAD_NORM = 1.0

# --- Configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run; its fields are the flags of the command line.

    The defaults are the paper's settings as reported, except that the paper splits by perplexity; docs/paper.md lists
    what our sources leave open. Raises ValueError with the flag, its value and what is allowed.
    """

    model: str | None = flag(None, "model folder in Hugging Face layout; without it the demo runs", group="data")
    data: str | tuple[str, ...] | None = flag(None, f"training examples: {DATA_HELP}")
    eval_data: str | tuple[str, ...] | None = flag(None, "held-out examples to evaluate every model on, likewise")
    skip_bad_records: bool = flag(False, "leave out records that cannot be read, and list them in skipped.jsonl")
    template: str | None = flag(None, f"chat template {TEMPLATE_DEFAULT}", choices=tuple(TEMPLATES))
    max_length: int | None = flag(None, MAX_LENGTH_HELP, at_least=1)
    cache: str | None = flag(None, "folder for encoded data, shared by all processes (default: ~/.cache/sftmix)")

    stage: str = flag("all", "which part of the recipe to run", choices=("all", *STAGES), group="recipe")
    confidence: str | None = flag(
        None,
        "file of scores to split by, instead of the reference run's; or the word 'online': split by the scores that "
        "the SFTMix run itself computes, without a reference run",
    )
    confidence_by: str = flag(
        "probability",
        "confidence to split by: mean gold-token probability, or (the paper's) perplexity",
        choices=("probability", "perplexity"),
    )
    pairing: str = flag(
        "confidence", "mix across the halves, or (a control) at random", choices=("confidence", "random")
    )
    mu: float = flag(0.2, "weight of the Mixup term", at_least=0)
    alpha: float = flag(0.5, "λ ~ Beta(alpha, alpha)", above=0)
    ntp_weight: float = flag(1.0, "weight of L_NTP in the SFTMix run (1 in the paper; 0: Mixup alone)", at_least=0)
    num_checkpoints: int = flag(5, "checkpoints of the reference run that are kept and scored", at_least=1)

    epochs: int = flag(3, "passes over the data", at_least=1, group="optimizer")
    batch_size: int = flag(32, "examples per optimizer step, over all processes", at_least=1)
    lr: float = flag(2e-6, "peak learning rate", above=0)
    weight_decay: float = flag(0.1, "weight decay of AdamW, on matrices only", at_least=0)
    warmup_ratio: float = flag(0.1, "share of the steps that warm up", at_least=0, below=1)
    lora_rank: int | None = flag(None, "train adapters of this rank instead of the weights (LoRA)", at_least=1)
    lora_alpha: float = flag(16.0, "an adapter's output is scaled by lora_alpha / lora_rank", above=0)
    seed: int = flag(0, "seed of all random numbers", at_least=0, below=2**63)
    max_skipped: int = flag(10, "end the run after N steps in a row without finite loss and gradient", at_least=1)

    micro_batch_tokens: int = flag(
        MICRO_BATCH_TOKENS,
        "most tokens in a forward pass, or one longer pair; fewer take less memory, with the same result",
        at_least=1,
        group="hardware",
    )
    dtype: str | None = flag(
        None,
        "dtype of matmuls; trained weights stay float32 (default: bf16 on a GPU or a CPU with bf16 matmuls, else fp32)",
        choices=("bf16", "fp32"),
    )
    zero_stage: int = flag(
        3,
        "ZeRO stage, what a step keeps in shards: 1 optimizer state, 2 also gradients, 3 also weights",
        at_least=1,
        below=4,
    )
    device: str | None = flag(None, "what to train on (default: the best there is)", choices=DEVICE_TYPES)
    activation_checkpointing: bool = flag(False, "recompute each block in the backward pass, to save memory")
    compile: bool | None = flag(
        None, "torch.compile the blocks: half a minute at the start, then faster (default: on an NVIDIA GPU)"
    )
    deterministic: bool = flag(
        False, "give the same bits in each run on the same GPU, more slowly; a CPU does, uncompiled"
    )
    tf32: bool = flag(False, "let float32 matmuls on a GPU round their inputs to TF32's 10 bits: faster")
    dry_run: int | None = flag(
        None, "print what the run would take on N processes (without N: as many as now), and stop", const=0, at_least=0
    )

    output: str | None = flag(None, "folder for everything the run makes (the demo's: runs/demo)", group="saving")
    save_dtype: str = flag("fp32", "dtype of the weights in saved models", choices=("bf16", "fp32"))
    log_every: int = flag(10, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between savepoints, from which --resume resumes", at_least=1)
    keep_last: int = flag(2, "how many savepoints are kept", at_least=1)
    resume: bool = flag(False, "resume the run in --output from its newest savepoint (start it, if there is none)")

    def __post_init__(self):
        check_values(self)
        if self.stage in ("all", "sftmix") and self.batch_size % 2:
            raise ValueError(f"--batch_size {self.batch_size}: must be even, since SFTMix trains on pairs")
        if self.stage == "confidence" and self.confidence is not None:
            raise ValueError(f"--confidence {self.confidence}: leaves nothing to do for --stage confidence")
        if self.pairing == "random" and (self.confidence is not None or self.confidence_by != "probability"):
            raise ValueError("--pairing random: makes no use of --confidence and --confidence_by")
        if self.lora_rank is None and self.lora_alpha != 16.0:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: is for LoRA, which needs --lora_rank")
        if self.dry_run is not None and self.stage in ("base", "confidence"):
            raise ValueError(f"--dry_run: plans training, and --stage {self.stage} trains no model")
        if self.online and self.epochs < 2:
            raise ValueError(f"--epochs {self.epochs}: --confidence online needs 2 or more, the first being plain NTP")
        needs = [("model", "data"), ("data", "model"), ("eval_data", "model"), ("dry_run", "model")]
        if self.dry_run is None:
            needs.append(("model", "output"))
        for one, other in needs:
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"--{one} {getattr(self, one)}: needs --{other} too (without --model the demo runs)")

    @property
    def online(self) -> bool:
        """Whether the SFTMix run splits by the scores of its own earlier epochs."""
        return self.confidence == "online"


def parse_config(argv=None) -> TrainConfig:
    """Parse the command line. An unknown flag or a value that is not allowed is one line on stderr and exit code 2."""
    parser = ArgumentParser("%(prog)s [--model DIR --data FILE --output DIR] [flags]", description=__doc__)
    add_flags(parser, TrainConfig)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, list):  # of a flag that takes several values
            given[name] = value[0] if len(value) == 1 else tuple(value)
    try:
        defaults = {} if "model" in given else DEMO_FLAGS
        return TrainConfig(**{**defaults, **given})
    except ValueError as error:
        parser.error(str(error))


# --- One optimizer step -----------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to `peak` over the first `warmup_ratio` of the steps, then a cosine decay towards 0.

    >>> [round(learning_rate(step, 10, 1.0, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on the float32 weights, with weight decay on matrices only.

    The state is allocated here, and not in the first step, so that a savepoint can be loaded into it.
    """
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


def forward_backward(
    model: Transformer, batch: GlobalBatch, mu: float, ntp_weight: float, accumulator=None, zero_stage: int = 3
) -> torch.Tensor:
    """Compute the gradient of the global batch's loss. -> this process's part of (loss, ntp, mix), [3]

    The sums of each micro-batch are divided by the counts of the **global** batch. So gradients are summed and never
    averaged, over micro-batches here and over processes in FSDP (`apply_fsdp` turns averaging off): the result is the
    gradient of the global mean, for any number of either. `accumulator`, a ScoreAccumulator or None, gets log p(y) of
    what is trained on; `infra.fsdp.set_zero_stage` explains `zero_stage`.
    """
    losses = torch.zeros(3, device=model.head_weight.device)
    for micro_batch in batch.micro_batches:
        set_zero_stage(model, zero_stage, is_last=micro_batch is batch.micro_batches[-1])
        loss, ntp, mix = compute_loss(model, micro_batch, batch, mu, ntp_weight, accumulator)
        loss.backward()
        losses += torch.stack([loss.detach(), ntp, mix])
    return losses


def compute_loss(
    model: Transformer, micro_batch: MicroBatch, batch: GlobalBatch, mu: float, ntp_weight: float, accumulator=None
):
    """A micro-batch's part of L = L_NTP + μ L_Mixup. -> (loss, ntp, mix), of which loss carries gradients"""
    row, supervised = micro_batch.row, micro_batch.supervised

    def head(hidden):  # called at the end of the forward pass, where FSDP has gathered the weight of lm_head
        targets = row.targets[supervised]  # [S]
        log_p = None if accumulator is None else torch.empty(len(targets), device=targets.device)
        loss = sftmix_loss(
            hidden[supervised],  # [S, D]
            model.head_weight,
            targets,
            micro_batch.index_c,
            micro_batch.index_u,
            micro_batch.lam,
            mu=mu,
            ntp_weight=ntp_weight,
            num_supervised=batch.num_supervised,
            num_mixed=batch.num_mixed,
            log_p=log_p,
        )
        if accumulator is not None:
            accumulator.add(micro_batch.example_index, log_p)
        return loss

    return model(row.tokens, row.positions, row.cu_seqlens, head=head)


def optimizer_step(model: Transformer, optimizer, lr: float, loss: torch.Tensor) -> torch.Tensor:
    """Clip the gradient and update the weights. -> the gradient norm, []

    If the loss (of all processes, []) or the gradient norm is not finite, weights and optimizer state do not change.
    Both values stay on the device, and nothing waits for them.
    """
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
    is_finite = loss.isfinite() & grad_norm.isfinite()
    optimizer.found_inf = 1 - is_finite.float()  # if 1, the fused kernel leaves weights and optimizer state unchanged
    for group in optimizer.param_groups:
        group["lr"] = lr
    if loss.device.type != "mps" or is_finite:  # the kernel of Apple GPUs ignores it
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# --- The training loop ------------------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """The order in which each epoch goes through the examples, and in which epochs they are mixed."""

    order: Callable[[int], np.ndarray]  # epoch -> int64 [N]; called at the start of the epoch
    num_ntp_epochs: int = 0  # how many epochs are plain NTP; in later ones, examples 0 and 1, 2 and 3, … are mixed
    accumulator: ScoreAccumulator | None = None  # gets log p(y) of what is trained on, for the orders to come


def train(
    model: Transformer,
    dataset: Dataset,
    config: TrainConfig,
    sampler: Sampler,
    log: Callable[[dict], None],
    after_step: dict[int, Callable[[], None]] | None = None,
    savepoints: Savepoints | None = None,
) -> dict:
    """Train `model` in place for `config.epochs`.

    -> {"seconds": time without that of saving, "peak_memory_bytes": of this process, "skipped": number of steps}

    `log` receives a record every `config.log_every` steps and for each skipped step. `after_step` maps a number of
    finished steps to a function that is then called. With `savepoints`, training resumes from the newest of them and
    writes new ones; SIGTERM, SIGINT and SIGHUP then finish the step, write a savepoint and end the process.
    """
    optimizer, device = make_optimizer(model, config), model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    epoch_steps = steps_per_epoch(len(dataset), config.batch_size)
    total_steps = epoch_steps * config.epochs
    metrics, accumulator = StepMetrics(total_steps, device), sampler.accumulator
    done = savepoints.load(model, optimizer, metrics, accumulator) if savepoints else 0
    model.train()
    with defer_signals() if savepoints else contextlib.nullcontext([]) as signals:
        for epoch in range(done // epoch_steps, config.epochs):
            is_mixed = epoch >= sampler.num_ntp_epochs
            ntp_weight = config.ntp_weight if is_mixed else 1.0
            prepare = partial(prepare_batch, dataset, config, sampler.order(epoch), is_mixed, device)
            for batch in prefetch(prepare, range(done, (epoch + 1) * epoch_steps), device):
                lr = learning_rate(done, total_steps, config.lr, config.warmup_ratio)
                losses = forward_backward(model, batch, config.mu, ntp_weight, accumulator, config.zero_stage)
                # The number of signals is summed with the losses, so that all processes stop after the same step.
                sums = all_reduce_sum(torch.cat([losses, losses.new_full((1,), len(signals))]))
                losses, num_signals = sums.split([3, 1])
                grad_norm = optimizer_step(model, optimizer, lr, loss=losses[0])
                done += 1
                metrics.add(done, losses, num_signals, grad_norm, batch)

                should_log = done % config.log_every == 0 or done == total_steps
                should_save = savepoints and (done % savepoints.every == 0 or done == total_steps)
                # The values of a step are read one step later, on all processes alike, unless they are needed now.
                read_step_values(metrics, dataset, config, log, wait=should_log)
                if should_log:
                    log(metrics.record(done, epoch=epoch, lr=lr))
                if accumulator and done == (epoch + 1) * epoch_steps:
                    accumulator.end_epoch()  # before a savepoint, which holds the scores of the epoch
                if after_step and done in after_step:
                    with metrics.paused():
                        after_step[done]()
                if should_save or metrics.stop:  # only with savepoints are signals deferred
                    read_step_values(metrics, dataset, config, log, wait=True)
                    with metrics.paused():
                        savepoints.save(done, model, optimizer, metrics, accumulator)
                if metrics.stop:
                    exit_stopped(done, signals)
        if savepoints and all_reduce_sum(torch.tensor(len(signals), device=device)):  # since the last step
            exit_stopped(done, signals)
    model.eval()
    if metrics.skipped:
        print0(f"warning: {metrics.skipped} of {total_steps} steps were skipped, not being finite", sys.stderr)
    return {"seconds": metrics.seconds, "peak_memory_bytes": peak_memory_bytes(device), "skipped": metrics.skipped}


def exit_stopped(done: int, signals: list[int]) -> None:
    """End the process after step `done`, with the exit code of its signal, or of SIGTERM if another process got one."""
    print0(f"stopped after step {done}; --resume resumes it", sys.stderr)
    sys.exit(128 + (signals[0] if signals else signal.SIGTERM))


def prepare_batch(
    dataset: Dataset, config: TrainConfig, order: np.ndarray, is_mixed: bool, device, step: int
) -> GlobalBatch:
    """Build the batch of a step (counted from 0 over all epochs) from its epoch's order, and copy it to `device`."""
    start = step % steps_per_epoch(len(dataset), config.batch_size) * config.batch_size
    indices = order[start : start + config.batch_size]
    lam = sample_lambda(len(indices) // 2 if is_mixed else 0, config.alpha, config.seed, step)
    return build_batch(dataset, indices, lam, config.micro_batch_tokens, rank(), world_size()).to(device)


def read_step_values(metrics: StepMetrics, dataset: Dataset, config: TrainConfig, log: Callable, wait: bool) -> None:
    """Read the values of finished steps into `metrics`: sums for the log, and whether to stop.

    Steps whose loss or gradient was not finite are logged. Raises ValueError after `config.max_skipped` in a row.
    """
    for skipped in metrics.drain(wait):
        log(skipped | {"examples": dataset.example_ids[skipped["examples"]].astype(str).tolist()})
        if metrics.consecutive_skips >= config.max_skipped:
            raise ValueError(
                f"step {skipped['step']}: the run has diverged ({metrics.consecutive_skips} steps in a row had no "
                f"finite loss and gradient); try a lower --lr than {config.lr}"
            )


# --- Models -----------------------------------------------------------------------------------------------------------


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """float32, since bf16 would round small updates away. Where weights are frozen and matmuls bf16: as stored."""
    return stored_dtype(config.model) if config.lora_rank and config.dtype == "bf16" else torch.float32


def load_trainable(config: TrainConfig, device) -> Transformer:
    """Load the base model for training."""
    model = load_model(
        config.model,
        weights_dtype(config),
        device,
        compute_dtype=DTYPES[config.dtype],
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        seed=config.seed,
    )
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        model.compile_blocks()
    return model


def evaluate_model(model: Transformer | None, inputs: Inputs, config: TrainConfig) -> dict:
    """Evaluate a model on the held-out examples. Without any, each entry is None."""
    if inputs.held_out is None:
        return dict.fromkeys(("loss", "loss_interval", "accuracy", "accuracy_interval", "examples", "tokens"))
    return evaluate(model, inputs.held_out, inputs.tokenizer, config.template, config.micro_batch_tokens)


# --- The stages -------------------------------------------------------------------------------------------------------


def base_stage(config: TrainConfig, inputs: Inputs, device) -> dict:
    """Evaluate the base, its weights in the dtype of the models that it is compared with."""
    model = None
    if inputs.held_out:
        model = load_model(config.model, weights_dtype(config), device, compute_dtype=DTYPES[config.dtype])
    return evaluate_model(model, inputs, config)


def train_stage(
    stage: str, config: TrainConfig, inputs: Inputs, sampler: Sampler, device, checkpoint_steps: Collection[int] = ()
) -> dict:
    """Train the base, saving checkpoints after these steps; save and evaluate it. -> its entry in results.json"""
    model, folder = load_trainable(config, device), Path(config.output) / stage
    after_step = {
        step: partial(save_checkpoint, model, folder / "checkpoints" / f"step-{step}", inputs.tokenizer, config)
        for step in checkpoint_steps
    }
    log, savepoints = stage_log(config, stage, inputs), stage_savepoints(config, stage)
    train_stats = train(model, inputs.train, config, sampler, log, after_step, savepoints)
    save_result(model, folder, inputs.tokenizer, config)
    return evaluate_model(model, inputs, config) | train_stats


def ntp_sampler(dataset: Dataset, config: TrainConfig) -> Sampler:
    """Plain next-token prediction: a random order, nothing is mixed."""
    return Sampler(partial(epoch_order, len(dataset), config.seed), num_ntp_epochs=config.epochs)


def reference_stage(config: TrainConfig, inputs: Inputs, device) -> dict:
    """Train the base with NTP, and save checkpoints evenly spaced over the run, the last step's included."""
    total_steps = steps_per_epoch(len(inputs.train), config.batch_size) * config.epochs
    steps = {math.ceil(total_steps * k / config.num_checkpoints) for k in range(1, config.num_checkpoints + 1)}
    entry = train_stage("reference", config, inputs, ntp_sampler(inputs.train, config), device, steps)
    return entry | {"checkpoints": len(steps)}


def confidence_stage(config: TrainConfig, inputs: Inputs, device) -> dict:
    """Score every training example with every checkpoint of the reference run."""
    start = time.perf_counter()
    dynamics = score_checkpoints(
        on_rank0(reference_checkpoints, config),
        inputs.train,
        config.micro_batch_tokens,
        DTYPES[config.dtype],
        device,
        resume_dir=Path(config.output) / "resume" / "confidence",
        log=partial(log_checkpoint, position=stage_position(config, "confidence", inputs)),
    )
    return record_dynamics(dynamics, config) | {"seconds": time.perf_counter() - start}


def record_dynamics(dynamics: TrainingDynamics, config: TrainConfig) -> dict:
    """Save the training dynamics of a run. -> their entry in results.json"""
    file = Path(config.output) / "confidence.jsonl"
    if rank() != 0:
        return {}  # rank 0 alone records it
    dynamics.save(file)
    entry = {"checkpoints": len(dynamics.probability), "examples": len(dynamics.ids)}
    entry["sha256"] = file_sha256(file)
    if config.online:
        entry["online"] = True
    truth = Path(config.output) / "data" / "wrong.json"
    if truth.exists():  # the demo knows which answers are wrong: does low confidence find them?
        wrong = np.isin(dynamics.ids, json.loads(truth.read_text()))
        entry["roc_area"] = {by: roc_auc(-dynamics.score(by), wrong) for by in ("probability", "perplexity")}
    return entry


def reads_scores(config: TrainConfig, stages: list[str]) -> bool:
    """Whether these stages split by scores that are there already."""
    makes_them = "confidence" in stages or config.online
    return "sftmix" in stages and config.pairing == "confidence" and not makes_them


def load_halves(config: TrainConfig, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The confident and the unconfident half, by the scores in the file of --confidence or by those of the run."""
    if config.confidence is None:
        check_scores(config)
    file = config.confidence or Path(config.output) / "confidence.jsonl"
    dynamics = TrainingDynamics.load(file)
    try:
        return split_by_confidence(dynamics.select(dataset.ids).score(config.confidence_by))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def sftmix_sampler(config: TrainConfig, dataset: Dataset, halves, device) -> Sampler:
    """The pairs of the SFTMix run: across the halves, at random, or across the halves that the run itself finds.

    `halves` is None if the confidence stage of this run makes the scores, or if they are not needed.
    """
    random_order = partial(epoch_order, len(dataset), config.seed)
    if config.pairing == "random":
        return Sampler(random_order)  # neighbors in a random order are random pairs
    if not config.online:
        halves = halves or on_rank0(load_halves, config, dataset)
        return Sampler(partial(paired_order, *halves, config.seed))
    accumulator = ScoreAccumulator(dataset.num_supervised, device, config.epochs)

    def online_order(epoch: int) -> np.ndarray:
        """The first epoch is NTP. Each later epoch is split by the mean over the epochs before it."""
        if epoch == 0:
            return random_order(epoch)
        dynamics = TrainingDynamics(dataset.ids, *accumulator.epoch_scores())
        return paired_order(*split_by_confidence(dynamics.score(config.confidence_by)), config.seed, epoch)

    return Sampler(online_order, num_ntp_epochs=1, accumulator=accumulator)


def sftmix_stage(config: TrainConfig, inputs: Inputs, halves, device) -> dict:
    """Train the base again, with Mixup."""
    sampler = sftmix_sampler(config, inputs.train, halves, device)
    entry = train_stage("sftmix", config, inputs, sampler, device)
    if sampler.accumulator:
        dynamics = TrainingDynamics(inputs.train.ids, *sampler.accumulator.epoch_scores())
        record_stage(config, "confidence", record_dynamics(dynamics, config))
    return entry


def pretrain_demo_base(config: TrainConfig, device) -> dict:
    """Write the demo's data and pretrain the demo's base on its clean text, with the loop of all other stages."""
    output = Path(config.output)
    on_rank0(begin_run, config)
    on_rank0(write_demo_data, output / "data", config.seed)
    tokenizer = train_demo_tokenizer(output / "data")
    config = replace(config, template=tokenizer.choose_template(config.template))
    dataset = load_dataset(output / "data" / "base.jsonl", tokenizer, config.template, config.max_length, config.cache)
    torch.manual_seed(config.seed)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **DEMO_MODEL)).to(device)
    model.compute_dtype = DTYPES[config.dtype]
    if world_size() > 1:
        apply_fsdp(model, device)
    print0(f"a base of {sum(p.numel() for p in model.parameters()):,} parameters, from random weights")
    log, savepoints = stage_log(config, "base"), stage_savepoints(config, "base")
    base_config = replace(config, **DEMO_BASE_FLAGS)
    train_stats = train(model, dataset, base_config, ntp_sampler(dataset, base_config), log, savepoints=savepoints)
    save_checkpoint(model, output / "base", tokenizer, config)
    return train_stats


# --- A run ------------------------------------------------------------------------------------------------------------


def run(config: TrainConfig, device) -> None:
    """Run the stages asked for, each from what the earlier ones left in the output folder, and report."""
    output, demo = Path(config.output), config.model is None
    on_rank0(check_output, config)
    if demo and config.max_length > DEMO_MODEL["max_position_embeddings"]:
        raise ValueError(
            f"--max_length {config.max_length}: the demo's model has {DEMO_MODEL['max_position_embeddings']} positions"
        )
    warn_about_batch_size(config, world_size())
    with lock_output(output):
        run_stages(config, stages_to_run(config), device)
        if rank() == 0:
            print_report(config)


def warn_about_batch_size(config: TrainConfig, world_size: int) -> None:
    """Warn if a batch is too small to give every process a pair, or if it has an odd number of examples."""
    if not {"reference", "sftmix"} & {*stages_of(config)}:
        return
    if config.batch_size % 2:
        print0(f"warning: --batch_size {config.batch_size} is odd; --stage sftmix, which trains on pairs, refuses it")
    if config.batch_size < 2 * world_size:
        print0(f"warning: --batch_size {config.batch_size} is less than a pair for each of {world_size} processes")


def run_stages(config: TrainConfig, stages: list[str], device) -> None:
    """Check all that a run is given, then run these stages."""
    config = resolve_hardware(continue_config(config), device)
    train_stats = {"seconds": None, "peak_memory_bytes": None, "skipped": None}
    if config.model is None:
        if "base" in stages:
            train_stats = pretrain_demo_base(config, device)
        elif not on_rank0((Path(config.output) / "base" / "config.json").exists):
            raise FileNotFoundError(f"{config.output}/base: not found; --stage base makes it")
        paths = {"model": "base", "data": "data/train.jsonl", "eval_data": "data/test.jsonl"}
        config = replace(config, **{name: str(Path(config.output) / path) for name, path in paths.items()})
    config, tokenizer = resolve_model(config)
    inputs = load_inputs(config, tokenizer)
    # What a later stage reads is looked for now, and not after hours of the stages before.
    if "confidence" in stages and "reference" not in stages:
        on_rank0(reference_checkpoints, config)
    halves = on_rank0(load_halves, config, inputs.train) if reads_scores(config, stages) else None
    on_rank0(begin_run, config)
    on_rank0(save_skipped, Path(config.output), inputs.train, inputs.held_out)

    if "base" in stages:
        record_stage(config, "base", base_stage(config, inputs, device) | train_stats)
    if "reference" in stages:
        record_stage(config, "reference", reference_stage(config, inputs, device))
    if "confidence" in stages:
        record_stage(config, "confidence", confidence_stage(config, inputs, device))
    if "sftmix" in stages:
        if stages[0] != "sftmix":  # the base was read before another stage, perhaps hours ago
            on_rank0(check_model_unchanged, config)
        record_stage(config, "sftmix", sftmix_stage(config, inputs, halves, device))


def dry_run(config: TrainConfig, device) -> None:
    """Print what a run would take, and an example as it would be trained on. Only the data cache is written."""
    config, tokenizer = resolve_model(resolve_hardware(config, device))
    dataset, num_processes = load_inputs(config, tokenizer).train, config.dry_run or world_size()
    model = meta_model(config.model, weights_dtype(config), config.lora_rank, config.lora_alpha)
    if config.confidence and reads_scores(config, stages_of(config)):  # those of the run may be still to come
        on_rank0(load_halves, config, dataset)
    warn_about_batch_size(config, num_processes)
    print_plan(model, dataset, config, num_processes, device.type)
    print_example(dataset, tokenizer)


def main(argv=None) -> None:
    """Read the command line and run."""
    config = parse_config(argv)
    if config.deterministic:
        set_deterministic()
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    with init_distributed(config.device) as device:
        # torchrun restarts a run after a failure, and counts the restarts only on the machine that failed: so they are
        # summed over all processes.
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if all_reduce_sum(torch.tensor(restarts, device=device)):
            config = replace(config, resume=True)
        config = replace(config, cache=resolve_cache(config.cache, config.output))
        if config.dry_run is None:
            run(config, device)
        else:
            dry_run(config, device)


if __name__ == "__main__":
    set_up_process()
    main()
