"""What the steps of a run have come to."""

import contextlib
import json
import math
import time
from collections import deque
from pathlib import Path

import torch

from data import Step
from infra.distributed import rank, say


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
