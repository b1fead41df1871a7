"""The savepoints of a training stage, from which a stopped run resumes.

A savepoint is what other projects call a training checkpoint; here, checkpoints are the models whose confidence the
paper measures.
"""

import contextlib
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.distributed import (
    all_reduce_sum,
    barrier,
    gather_objects,
    on_rank0,
    print0,
    rank,
    temporary_folder,
)
from infra.files import MANIFEST, atomic_write, checksums, fsync, read_json, utf8_folder, verify_manifest, write_json
from infra.fsdp import local_shard, reshard
from infra.hf import split_into_shards
from infra.metrics import StepMetrics
from model import Transformer

MAX_FILE_BYTES = 5 * 10**8  # of a savepoint


@dataclass(frozen=True)
class Savepoints:
    """The savepoints of a stage, in `output`/resume/STAGE-step-N; the newest `keep` of them are kept.

    A savepoint holds all that a step changes: the trained weights, the moments of AdamW and the tensors of
    `accumulator` (a `confidence.ScoreAccumulator` or None), written by PyTorch's distributed checkpoint as safetensors,
    which any number of processes can read; and `state.json` with the rest. The order of the examples and λ are
    functions of the seed and the step, and need no state.
    """

    output: Path
    stage: str
    every: int
    keep: int

    def save(self, step: int, model: Transformer, optimizer, metrics: StepMetrics, accumulator=None) -> None:
        """Save after `step`, on all processes together. OSError if writing fails; the older savepoints stay."""
        check_finite(model)
        reshard(model)
        tensors = _training_tensors(model, optimizer) | _score_tensors(accumulator)
        num_updates = int(next(iter(optimizer.state.values()))["step"])  # fewer than steps if some were skipped
        state = {"step": step, "num_updates": num_updates, "metrics": metrics.state_dict()}
        path = self.output / "resume" / f"{self.stage}-step-{step}"
        # The name has the step, so that it is new: over NFS, another node may still see the old folder of a name that
        # was used before.
        with temporary_folder(path.with_name(f"{path.name}.partial")) as tmp:
            with _distributed_checkpoint(path) as dcp, utf8_folder(tmp) as folder:
                dcp.save(tensors, storage_writer=_storage_writer(dcp, folder, tensors))
            # Each process reads again what it has written itself, which is still in its machine's page cache.
            manifests = gather_objects(checksums(tmp.glob(f"shard-{rank() + 1:05}-*")))
            if rank() == 0:
                write_json(tmp / "state.json", state)
                manifests.append(checksums([tmp / "state.json"]))
                write_json(tmp / MANIFEST, {name: entry for part in manifests for name, entry in sorted(part.items())})
                fsync(tmp)
                shutil.rmtree(path, ignore_errors=True)  # a damaged savepoint of an earlier attempt
                tmp.rename(path)
                fsync(path.parent)
                # A savepoint after `step` is damaged, or from before the run went back to an earlier one.
                existing = self._existing()
                kept = [number for number, _ in existing if number <= step][-self.keep :]
                for number, folder in existing:
                    if number not in kept:
                        shutil.rmtree(folder)
        barrier()

    def load(self, model: Transformer, optimizer, metrics: StepMetrics, accumulator=None) -> int:
        """Restore the newest intact savepoint. -> the number of steps done, 0 if there is no savepoint"""
        step = on_rank0(self._rewind)
        if step == 0:
            return 0
        path = self.output / "resume" / f"{self.stage}-step-{step}"
        print0(f"{self.stage}: resumes after step {step}")
        reshard(model)
        state = read_json(path / "state.json")
        score_tensors = _score_tensors(accumulator)
        tensors = _training_tensors(model, optimizer) | score_tensors
        with _distributed_checkpoint(path) as dcp, utf8_folder(path) as folder:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))  # in place
        for moments in optimizer.state.values():
            moments["step"].fill_(state["num_updates"])
        metrics.load_state_dict(state["metrics"])
        if accumulator:
            accumulator.load_state_dict(
                {name.removeprefix("scores."): tensor for name, tensor in score_tensors.items()}
            )
        return step

    def clear(self) -> None:
        """Remove the savepoints of a finished stage, and resume/STAGE, where the confidence stage keeps scores."""
        if rank() == 0:
            for folder in [*(folder for _, folder in self._existing()), self.output / "resume" / self.stage]:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another stage has savepoints
                (self.output / "resume").rmdir()
        barrier()

    def _existing(self) -> list[tuple[int, Path]]:
        """(step, folder) of each savepoint, oldest first."""
        prefix = f"{self.stage}-step-"
        found = [(f.name.removeprefix(prefix), f) for f in (self.output / "resume").glob(f"{prefix}*")]
        return sorted((int(step), folder) for step, folder in found if step.isdecimal())

    def _rewind(self) -> int:
        """Remove what is newer than the newest intact savepoint, in metrics.jsonl too. -> its step, 0 without one"""
        for unfinished in (self.output / "resume").glob("*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        step = self._newest_intact()
        self._rewind_metrics(step)
        return step

    def _newest_intact(self) -> int:
        """The step of the newest intact savepoint, 0 without one. OSError if none of them can be read."""
        unreadable = None
        for step, folder in reversed(self._existing()):
            try:
                verify_manifest(folder, required=True)
                return step
            except (ValueError, OSError) as error:
                print0(f"warning: {error}: passed over", sys.stderr)
                unreadable = error if isinstance(error, OSError) else unreadable
        if unreadable:  # it may be intact, and a run that starts again would remove it
            raise unreadable
        return 0

    def _rewind_metrics(self, step: int) -> None:
        """Remove from metrics.jsonl the lines of this stage after `step`, and an incomplete last line."""
        file, kept = self.output / "metrics.jsonl", []
        if not file.is_file():
            return
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if line.endswith("\n") and not (record["stage"] == self.stage and record["step"] > step):
                    kept.append(line)
        with atomic_write(file) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")


def _training_tensors(model: Transformer, optimizer) -> dict[str, torch.Tensor]:
    """The trained weights and AdamW's two moments of each, by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return tensors


def _score_tensors(accumulator) -> dict[str, torch.Tensor]:
    return {f"scores.{name}": tensor for name, tensor in accumulator.state_dict().items()} if accumulator else {}


def _storage_writer(dcp, folder: Path, tensors: dict[str, torch.Tensor]):
    """A writer of PyTorch's distributed checkpoint that needs little CPU memory.

    It copies a file's tensors from the GPU, and serializes them, before it writes them. So each process writes files of
    at most MAX_FILE_BYTES, or of one tensor that is larger, one after the other.
    """
    sizes = {name: local_shard(tensor).nbytes for name, tensor in tensors.items()}
    files = enumerate(split_into_shards(sizes, MAX_FILE_BYTES), start=1)
    file_of = {name: number for number, names in files for name in names}
    writer = dcp.HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
    writer.per_thread_copy_ahead = 0  # or it would copy to pinned memory, which PyTorch never gives back
    return writer


@contextlib.contextmanager
def _distributed_checkpoint(path: Path):
    """Yield PyTorch's distributed checkpoint module; its errors become an OSError that names the savepoint."""
    import torch.distributed.checkpoint as dcp  # takes a second, which most scripts save

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected with one process
            yield dcp
    except dcp.CheckpointException as error:
        reasons = sorted({str(reason) or repr(reason) for reason, _ in error.failures.values()})
        raise OSError(f"{path}: {'; '.join(reasons)}") from None


def check_finite(model: Transformer) -> None:
    """Raise ValueError if a weight is not finite: such a model is not saved."""
    num_broken = sum((~local_shard(p.detach()).isfinite()).sum() for p in model.parameters())
    if int(all_reduce_sum(num_broken)):
        raise ValueError(
            "the run has diverged: weights are no longer finite numbers, and are not saved; try a lower --lr"
        )
