"""Metrics of the training steps: means between log lines, throughput, skipped steps; what is logged of them."""

import contextlib
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch

from data import GlobalBatch
from infra.distributed import print0, rank


class StepMetrics:
    """Sums over training steps since the last log line, and the time they took without pauses.

    The values of a step are read from the device while the next step runs, so that nothing waits for the device.
    """

    _STATE = (
        "seconds",
        "logged_at",
        "skipped",
        "consecutive_skips",
        "tokens",
        "num_steps",
        "sums",
        "grad_norm",
    )

    def __init__(self, total_steps: int, device):
        self.total_steps, self.device = total_steps, device
        self._start = time.perf_counter()  # a pause moves it forward
        self.logged_at = 0.0  # `seconds` at the last log line
        self.pending: deque = deque()  # steps whose values have not been read
        self.stop = False  # whether a process has received a signal to stop
        self.skipped = self.consecutive_skips = 0
        # Since the last log line: tokens; the number of steps that were not skipped and their sums of loss, ntp, mix.
        self.tokens, self.num_steps, self.sums = 0, 0, [0.0, 0.0, 0.0]
        self.grad_norm = 0.0  # of the last step that was not skipped

    @property
    def seconds(self) -> float:
        """Since the start, without pauses."""
        return time.perf_counter() - self._start

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._start = time.perf_counter() - value

    def state_dict(self) -> dict:
        """What a savepoint keeps, as JSON values."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        for name in self._STATE:
            setattr(self, name, state[name])

    def add(self, step: int, losses, num_signals, grad_norm, batch: GlobalBatch) -> None:
        """Add a step (counted from 1) by its values on the device: losses [3] (loss, ntp, mix) and two numbers."""
        on_cuda, copied = self.device.type == "cuda", None
        values = torch.cat([losses, num_signals.reshape(1), grad_norm.reshape(1)]).to("cpu", non_blocking=on_cuda)
        if on_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.pending.append((step, values, copied, batch.num_tokens, batch.example_indices))

    def drain(self, wait: bool) -> list[dict]:
        """Read the values of all steps but the newest, or with `wait` of all. -> a record of each skipped step"""
        records = []
        while len(self.pending) > (0 if wait else 1):
            step, values, copied, num_tokens, example_indices = self.pending.popleft()
            if copied:
                copied.synchronize()
            *losses, num_signals, grad_norm = values.tolist()
            self.stop |= num_signals > 0
            self.tokens += num_tokens
            if math.isfinite(losses[0]) and math.isfinite(grad_norm):
                self.consecutive_skips, self.num_steps, self.grad_norm = 0, self.num_steps + 1, grad_norm
                self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
            else:
                self.skipped, self.consecutive_skips = self.skipped + 1, self.consecutive_skips + 1
                values = {"loss": str(losses[0]), "grad_norm": str(grad_norm)}  # JSON has no NaN
                records.append({"step": step, "skipped": self.skipped, **values, "examples": example_indices})
        return records

    def record(self, step: int, **more) -> dict:
        """The means since the last log line, over the steps that were not skipped (None without any)."""
        seconds = self.seconds
        loss, ntp, mix = (total / self.num_steps if self.num_steps else None for total in self.sums)
        record = {"step": step, "total_steps": self.total_steps, **more, "loss": loss, "ntp": ntp, "mix": mix}
        record["grad_norm"] = self.grad_norm
        record["tokens_per_second"] = self.tokens / (seconds - self.logged_at)
        record["seconds"] = seconds
        record["seconds_left"] = seconds / step * (self.total_steps - step)
        self.tokens, self.num_steps, self.sums, self.logged_at = 0, 0, [0.0, 0.0, 0.0], seconds
        return record

    @contextlib.contextmanager
    def paused(self):
        """The time inside does not count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


# --- What is logged ---------------------------------------------------------------------------------------------------


class StagePosition(NamedTuple):
    """Which of a run's stages one is, and how much work follows it."""

    stage: str
    number: int = 1  # of `num_stages`
    num_stages: int = 1
    work_after: float = 0.0  # the work of all that follows its training or scoring, divided by its own; 0: not known

    def __str__(self) -> str:
        return f"{self.number}/{self.num_stages} {self.stage}"

    def format_time(self, seconds: float, done: int, total: int) -> str:
        """The time left, by the time that `done` of `total` parts took: for the stage and, if known, for the run.

        >>> StagePosition("reference", 2, 4, work_after=1.5).format_time(seconds=20.0, done=2, total=8)
        '60 s left, 3 min in all'
        """
        if done == total:
            return f"took {format_seconds(seconds)}"
        each = seconds / done
        stage, run = (format_seconds(each * (n - done)) for n in (total, total + self.work_after * total))
        return f"{stage} left" + (f", {run} in all" if run != stage else "")


def format_seconds(seconds: float) -> str:
    """A duration in seconds, minutes or hours.

    >>> [format_seconds(seconds) for seconds in (8.4, 119, 120, 9000)]
    ['8 s', '119 s', '2 min', '2.5 h']
    """
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 119.5 * 60 else f"{seconds / 3600:.1f} h"


def log_step(file: Path, position: StagePosition, record: dict) -> None:
    """Append a record to `metrics.jsonl` and print it as a line."""
    if rank() == 0:
        with open(file, "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps({"stage": position.stage, **record}) + "\n")
    if "skipped" in record:
        examples = ", ".join(record["examples"][:4]) + (" …" if len(record["examples"]) > 4 else "")
        print0(
            f"{position}  step {record['step']}: skipped, since its loss is {record['loss']} and its gradient's norm "
            f"{record['grad_norm']}; among its examples is the cause: {examples} (all in {file.name})"
        )
        return
    step, total_steps = record["step"], record["total_steps"]
    loss = math.nan if record["loss"] is None else record["loss"]
    losses = f"ntp {record['ntp']:.4f}  mix {record['mix']:.4f}  " if record["mix"] else ""
    # A narrow terminal shows the first fields only.
    print0(
        f"{position}  step {step:>{len(str(total_steps))}}/{total_steps}  "
        f"{position.format_time(record['seconds'], step, total_steps)}  "
        f"loss {loss:.4f}  {losses}{record['tokens_per_second']:,.0f} tokens/s",
        progress=step / total_steps,
    )


def log_checkpoint(record: dict, position: StagePosition = StagePosition("confidence"), file=None) -> None:  # noqa: B008
    """Print a checkpoint that has been scored as a line."""
    done, total = record["done"], record["total"]
    print0(
        f"{position}  {done}/{total} checkpoints  {position.format_time(record['seconds'], done, total)}  "
        f"mean gold-token probability {record['probability']:.4f}  {record['checkpoint']}",
        file,
        progress=done / total,
    )
