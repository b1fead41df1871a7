"""Processes and devices: what runs around a model, on one process or on many."""

import contextlib
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from infra.files import _remove
from model import Transformer

# --- Processes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes():
    """Join the processes `torchrun` started (or be the only one) and yield this one's device.

    A ValueError or OSError inside is something the user can mend: it becomes one line on stderr and exit code 1. So
    does memory that runs out, and the end of another process, and (with the exit code it has by convention) Ctrl-C.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        patience = timedelta(hours=1)  # for as long as process 0 may take to encode the data; torchrun ends the rest
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    try:
        yield device
    except (ValueError, OSError) as error:
        _end(str(error).replace("\n", " "))
    except (MemoryError, torch.OutOfMemoryError) as error:
        _end(
            f"out of memory ({str(error).partition('. ')[0]}); a lower --micro_batch_tokens or --batch_size takes less"
        )
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or re.search("by peer|Broken pipe|timed? ?out", str(error))):
            raise
        _end("another process of this run has ended, and without it this one cannot go on")
    except KeyboardInterrupt:
        _end("stopped", 128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.1)  # gloo's threads may hold a last tensor; to drop one when Python is gone aborts the process


def _end(why: str, code: int = 1):
    if not _speaks_for_its_machine():
        time.sleep(3)  # what all have met one of them says, and torchrun has ended the others by now
    why = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in why)  # a file's bytes must not steer a terminal
    why = why if len(why) <= 1000 else why[:1000] + " …"
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr, flush=True)
    sys.exit(code)


def _speaks_for_its_machine() -> bool:
    """Whether this is the one process on its machine that reports what all of them find wrong."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def signals_noted():
    """Yield a list. Inside, SIGTERM and SIGINT do not end this process but are noted in it.

    Of one process alone the second one ends it: somebody is in a hurry.
    """
    noted = []

    def note(number, frame):
        if noted and world_size() == 1:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes: what process 0 wrote before is there for everyone after."""
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(tensor):
    """Add up `tensor`, in place, over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text: str, file=None) -> None:
    """Tell the reader, in one voice however many processes there are."""
    if rank() == 0:
        print(text, file=file, flush=True)


# --- One model over several processes ---------------------------------------------------------------------------------


def shard(model: Transformer, dtype: str, device) -> None:
    """Split every weight by rows over all processes, and with it its gradient and its optimizer state (FSDP2).

    A block's weights are gathered, in bf16 if `dtype` says so, just before it computes, and dropped after; gradients
    are summed in float32, each process keeping those of its own rows. What the whole model needs, `lm_head` above all,
    is gathered once a pass. All processes must therefore compute at the same time, whatever they compute on.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second that one process need not wait for

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # angles are of float32
    )
    embedding = [] if model.config.tie_word_embeddings else [model.model.embed_tokens]
    for unit in (*model.model.layers, *embedding, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        # Losses are divided by global counts, so gradients add up. The default, an average, is silently a sum under
        # gloo (pytorch#162338); a sum that is asked for is a sum everywhere.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def is_sharded(parameter) -> bool:
    """Whether a parameter is one that `shard` has split."""
    return hasattr(parameter, "to_local")


def row_range(parameter) -> tuple[int, int]:
    """The rows of a parameter that this process holds: from, up to."""
    rows = len(parameter)
    if not is_sharded(parameter):
        return 0, rows
    size = math.ceil(rows / world_size())  # as torch.chunk cuts
    return min(rank() * size, rows), min((rank() + 1) * size, rows)


def own_rows(parameter):
    """Those rows, as a plain tensor that shares the parameter's memory."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def whole(parameter):
    """All rows of a parameter; of a sharded one, a copy that all processes must ask for together."""
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def drop_gathered(model: Transformer) -> None:
    """Drop the weights that a sharded model's forward pass has gathered: rounded copies, where it computes in bf16."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextlib.contextmanager
def folder_aside(path: Path):
    """Yield an empty folder for all processes to write to, of which at the end nothing stays."""
    if rank() == 0:
        _remove(path)
        path.mkdir(parents=True)
    barrier()
    try:
        yield path
    finally:
        if rank() == 0:
            _remove(path)


# --- Devices ----------------------------------------------------------------------------------------------------------


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fastest_dtype(device) -> str:
    """`bf16` on a GPU since Ampere, and on a CPU with tiles for it (AMX); on others its products are no faster."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16", False) else "fp32"


def autocast(device, dtype: str):
    """The context in which a forward pass runs: matrix products in bf16, or ("fp32") everything in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


def peak_memory_bytes(device) -> int:
    """The most memory this process has held: on a GPU since the last reset, in main memory since it started."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ahead(make: Callable, items: Iterable) -> Iterator:
    """`make(item)` for each item in turn, each made in the background while the one before it is in use.

    >>> list(ahead(str, [1, 2, 3]))
    ['1', '2', '3']
    """
    with ThreadPoolExecutor(max_workers=1) as background:
        coming = None
        for item in items:
            ready, coming = coming, background.submit(make, item)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on `device`; nobody waits for the copy, which a GPU makes from pinned memory in its turn."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # which a thread in the background has not chosen
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
