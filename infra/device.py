"""The device of a process: its choice, the dtype of matmuls, torch.compile, determinism, peak memory."""

import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE_TYPES = ("cuda", "mps", "cpu")


def local_rank() -> int:
    """The number of this process among those of its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def resolve_device(device_type: str | None) -> torch.device:
    """The device of this process. None: the best that there is.

    Raises ValueError if PyTorch cannot use the device, or cannot use the NVIDIA GPU that the machine has: training on
    the CPU instead would only look like a slow GPU.
    """
    prefix = f"--device {device_type}: " if device_type else ""
    device_type = device_type or best_device_type()
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{prefix}PyTorch finds no Apple GPU here")
    if device_type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{prefix}an Apple GPU runs a single process; --device cpu runs several")
    if device_type != "cuda":
        return torch.device(device_type)
    if not torch.cuda.is_available():
        raise ValueError(f"{prefix}PyTorch cannot use a GPU here ({_why_no_cuda()}); --device cpu does without one")
    if local_rank() >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"{prefix}process {local_rank()} of this machine has no GPU of its own: PyTorch sees {count}; "
            f"--nproc_per_node {count} starts as many processes"
        )
    return torch.device("cuda", local_rank())


def best_device_type() -> str:
    """`cuda` where the machine has an NVIDIA GPU, else `mps` for a single process on an Apple GPU, else `cpu`."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or (any(Path("/dev").glob("nvidia[0-9]*")) and not hidden):
        return "cuda"
    single = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return "mps" if single and torch.backends.mps.is_available() else "cpu"


def _why_no_cuda() -> str:
    """Why `torch.cuda.is_available()` is false."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an old driver, or PyTorch without CUDA
        return str(error).strip().partition(". ")[0].partition("\n")[0]
    return "no device is visible"


def resolve_dtype(name: str | None, device) -> str:
    """`name`, or by default the fastest dtype: `bf16` on GPUs since Ampere and on CPUs with bf16 matmuls, else `fp32`.

    Raises ValueError for `bf16` on a GPU that has no arithmetic for it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if name == "bf16" and not has_bf16:
            gpu = torch.cuda.get_device_name(device)
            raise ValueError(
                f"--dtype bf16: {gpu} has no bf16 matmuls (GPUs since Ampere do); --dtype fp32 works, in a new run"
            )
    else:
        supported = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_bf16 = supported.get("amx_bf16", False) or supported.get("avx512_bf16", False)
    return name or ("bf16" if has_bf16 else "fp32")


def set_deterministic() -> None:
    """From now on, every operation gives the same bits whenever it runs on the same GPU, or raises RuntimeError.

    To be called before CUDA starts, which reads the first variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # so that compiled kernels are chosen without timing them, too
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice


def resolve_compile(compile: bool | None, device) -> bool:
    """`compile`, or by default whether the device is an NVIDIA GPU on which `torch.compile` works.

    It needs a C++ compiler, on a GPU Triton too, and is tried once. ValueError if it does not work, but was asked for.
    Kernels depend on the length of the first row, and a resumed run begins with another row. So nothing is compiled
    after `set_deterministic`, and to ask for it is a ValueError.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if compile and deterministic:
        raise ValueError("--compile: does not give the same bits in each run; leave it out, or --deterministic")
    if compile is False or (compile is None and (device.type != "cuda" or deterministic)):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).partition("\n")[0]
        if compile:
            raise ValueError(f"--compile: torch.compile does not work here ({reason})") from None
        if local_rank() == 0:
            print(f"the blocks are not compiled, since torch.compile does not work here ({reason})", file=sys.stderr)
        return False
    return True


def resolve_hardware(config, device):
    """Fill in what the device decides of a `train.TrainConfig`. -> config

    Raises ValueError for what the device cannot do.
    """
    dtype = resolve_dtype(config.dtype, device)
    if config.tf32 and (device.type != "cuda" or dtype != "fp32"):
        raise ValueError("--tf32: is for --dtype fp32 on a GPU; other runs have no float32 matmuls to replace")
    return replace(config, dtype=dtype, compile=resolve_compile(config.compile, device))


def memory_bytes(device) -> int:
    """The memory of this process: that of its GPU, or its share of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    cpu_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return cpu_memory // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory_bytes(device) -> int:
    """Peak memory of this process: on a GPU since the last reset, on a CPU since the process started."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
