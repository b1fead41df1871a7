"""Processes: what runs around a model, in one process or in many."""

import atexit
import contextlib
import getpass
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from infra.device import local_rank, resolve_device
from infra.terminal import below_progress, printable, render, style

# --- The environment of a process -------------------------------------------------------------------------------------


def set_up_process() -> None:
    """Prepare standard streams and environment variables, so that none of what a machine lacks ends a program.

    Characters that the encoding of stdout does not have are replaced. Closed streams are opened on /dev/null, or the
    next file that is opened would receive what is printed. stdout, if it is closed, stays None.
    PyTorch's compilers ask for the user's name and write to the home folder; both may be missing in a container.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stderr is None:  # print(file=None) prints to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # stderr escapes such characters by default
    atexit.register(_flush_streams)  # before Python flushes them, which may fail

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
    if not os.access(os.path.expanduser("~"), os.W_OK):
        temporary = os.environ.get("TMPDIR", "/tmp")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{temporary}/triton_{getpass.getuser()}")


def _flush_streams() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream) -> None:
    """Send what is still to be printed to a stream to /dev/null."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


# --- Processes --------------------------------------------------------------------------------------------------------

PEER_ERRORS = "by peer|Broken pipe|[Tt]imed? ?out"  # how gloo says that another process does not answer
TIMEOUT = timedelta(minutes=30)  # of collectives; `wait_for_rank0` waits longer


@contextlib.contextmanager
def init_distributed(device_type: str | None = None):
    """Join the process group that `torchrun` describes, if there is one, and yield the device of this process.

    ValueError, OSError, running out of memory, Ctrl-C and the failure of another process become one line on stderr and
    a non-zero exit code: these are errors that the user can mend.
    """
    try:
        device = resolve_device(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # parts of sums stay float32
        if "RANK" in os.environ:
            backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
        yield device
    except BaseException as error:
        code = _report(error)
        if dist.is_initialized():
            # The other processes may wait for this one in a collective, and leaving the group, as Python does at its
            # end, would wait for them in turn. So the process ends at once, and torchrun ends the others.
            _flush_streams()
            os._exit(code)
        if isinstance(error, Exception | KeyboardInterrupt):
            sys.exit(code)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads may hold a last tensor; freeing it after Python has ended aborts


def _report(error: BaseException) -> int:
    """Print one line on stderr for an error that the user can mend, else a traceback. -> the exit code"""
    text = str(error)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            print(below_progress(stream), end="", file=stream, flush=True)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        _print_error("stopped")
        return 128 + signal.SIGINT
    is_peer_error = isinstance(error, dist.DistError) or re.search(PEER_ERRORS, text)
    no_memory = [line for line in text.splitlines() if re.search("out of memory|can't allocate memory", line)]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and no_memory):
        reason = (no_memory or [text])[-1].partition(". ")[0]
        _print_error(f"out of memory ({reason}); a lower --micro_batch_tokens or --batch_size takes less")
    elif isinstance(error, ValueError | OSError):
        _print_error(re.sub(r"\n(?!  )", " ", text))  # one line, or one with an indented list below it
    elif isinstance(error, dist.DistError) and not dist.is_initialized():
        _print_error(f"the processes do not find one another ({text.strip().splitlines()[-1]})")
    elif isinstance(error, RuntimeError) and dist.is_initialized() and is_peer_error:
        reason = text.strip().splitlines()[-1]
        _print_error(f"without another process, which has ended, this one cannot go on ({reason})", wait=True)
    elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = text.strip().partition("\n")[0]
        _print_error(f"torch.compile fails on this model ({reason:.300}); --no_compile does without")
    elif "does not have a deterministic implementation" in text:
        operation = text.partition(" does not")[0]
        _print_error(f"--deterministic: PyTorch has no deterministic {operation} on this device; leave the flag out")
    else:
        traceback.print_exception(error)
    return 1


def _print_error(message: str, wait: bool = False) -> None:
    """Print `message` as one line on stderr. If several processes fail, only the first one prints.

    The others wait until it has printed and torchrun has ended them. `wait`: another process has failed before.
    """
    if wait or local_rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    message = printable(message)
    message = message if len(message) <= 2000 else message[:2000] + " …"
    with contextlib.suppress(OSError):  # stderr may be a closed pipe
        print(f"{Path(sys.argv[0]).name}: {style('error:', 'red', sys.stderr)} {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def defer_signals():
    """Yield a list to which SIGTERM, SIGINT and SIGHUP are appended instead of ending the process.

    In a run of one process, a second SIGINT raises KeyboardInterrupt. A second SIGTERM or SIGHUP does not: those that a
    job manager sends to all processes come again from torchrun, and a closing terminal may send several.
    """
    received = []

    def handler(number, frame):
        if number == signal.SIGINT and signal.SIGINT in received and world_size() == 1:
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT and world_size() == 1:  # by os.write, since the signal may interrupt a print
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing the step and saving it; Ctrl-C again stops at once\n")

    with _signal_handler(handler, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        yield received


def exit_on_signals():
    """Inside the `with` block, SIGTERM and SIGHUP raise SystemExit, so that `finally` clauses run."""

    def handler(number, frame):
        sys.exit(128 + number)

    return _signal_handler(handler, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signal_handler(handler: Callable, *numbers: int):
    """Handle these signals inside the `with` block. SIGHUP stays ignored if it is, as `nohup` has it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers = [number for number in numbers if number != signal.SIGHUP]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


def rank() -> int:
    """The rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def wait_for_rank0() -> None:
    """Wait until rank 0 is here, for up to a day, since what it does alone (encoding data) may take long."""
    if world_size() > 1:
        if rank() != 0:  # rank 0 comes last: it need not wait a day for a process that has failed
            dist.distributed_c10d._set_pg_timeout(timedelta(days=1))
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(TIMEOUT)


def all_reduce_sum(tensor):
    """Sum `tensor` over all processes, in place. -> the same tensor"""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value):
    """The value of rank 0, on all processes."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def on_rank0(function: Callable, *args):
    """Call a function, which may take long, on rank 0. -> what it returns, on all processes

    So only rank 0 looks for files of a run: NFS lets another node miss a file for up to a minute after it has looked
    for it in vain.
    """
    value = function(*args) if rank() == 0 else None
    wait_for_rank0()
    return broadcast_object(value)


def gather_objects(value) -> list:
    """The values of all processes by rank, on rank 0; elsewhere an empty list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def print0(text: str, file=None, progress: float | None = None) -> None:
    """Print a line on rank 0. If `file` (default: stdout) is closed or full, the run continues without it.

    `progress` is the share of the work that is done. On a terminal, the next line replaces a line with a share below 1.
    """
    if rank() != 0:
        return
    try:
        print(render(text, file or sys.stdout, progress), end="", file=file, flush=True)
    except BlockingIOError:  # a pipe that is full at the moment
        pass
    except OSError as error:
        _discard(file or sys.stdout)
        if file is None:
            print0(f"stdout: {error.strerror}; the run continues, and no longer prints there", sys.stderr)


def print_result(text: str, end: str = "\n") -> None:
    """Print a result on rank 0. A closed pipe ends the program quietly; OSError names stdout if it is full."""
    if rank() != 0:
        return
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise OSError(error.errno, error.strerror, "stdout") from None


@contextlib.contextmanager
def temporary_folder(path: Path):
    """Yield an empty folder that all processes may write to; it is removed at the end."""
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    barrier()
    try:
        yield path
    finally:
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)


# --- Threads ----------------------------------------------------------------------------------------------------------


def prefetch(make: Callable, items: Iterable, device) -> Iterator:
    """Yield `make(item)` for each item, computing the next one in a background thread.

    `device` is what `make` copies to: on Apple GPUs, two threads can crash the process (pytorch#197805), so there is no
    second one.

    >>> list(prefetch(str, [1, 2, 3], "cpu"))
    ['1', '2', '3']
    """
    if torch.device(device).type == "mps":
        yield from map(make, items)
        return
    with ThreadPoolExecutor(max_workers=1) as background:
        coming = None
        for item in items:
            ready, coming = coming, background.submit(make, item)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()
