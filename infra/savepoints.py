"""Going on where a run was stopped."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from infra.distributed import barrier, drop_gathered, folder_aside, own_rows, rank, say, sum_over_processes
from infra.files import MANIFEST, check_manifest, checksums, content_of, flush, read_json, write_json, written_aside
from infra.metrics import Progress
from model import Transformer


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

    def save(self, step: int, model: Transformer, optimizer, tally, progress: "Progress") -> None:
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

    def load(self, model: Transformer, optimizer, tally, progress: "Progress") -> int:
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


def _training_tensors(model: Transformer, optimizer, tally) -> dict[str, torch.Tensor]:
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


def check_unchanged(config, content: dict | None = None):
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


def contents_of(config) -> dict:
    """Checksums of what a run reads."""
    read = ("model", "data", "eval_data", *(() if config.online else ("confidence",)))
    return {name: content_of(getattr(config, name)) for name in read if getattr(config, name) is not None}
