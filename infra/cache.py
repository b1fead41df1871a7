"""The cache of encoded data: each data file is encoded once, in parallel, and then memory-mapped."""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data import ARRAY_DTYPES, Chunk, Dataset, encode_examples, read_chunk, split_into_chunks, to_example, unique_ids
from infra.distributed import barrier, broadcast_object, print0, rank
from infra.files import check_file, set_mode
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


def choose_cache(cache=None, output=None, file=None) -> str:
    """Choose the folder for encoded data, the same on all processes: --cache, else `sftmix` in the user's cache.

    If neither --cache nor XDG_CACHE_HOME is given, and the home folder is missing or cannot be written to, it is a
    folder in `output`, which all machines of a run see, or without `output` in the system's folder for temporary files;
    a line in `file` says so.
    Raises OSError if a folder that is given cannot be written to.
    """
    given = cache or (os.environ.get("XDG_CACHE_HOME") and Path(os.environ["XDG_CACHE_HOME"]) / "sftmix")
    if rank() == 0 and given:
        try:
            try_to_write(Path(given))
        except OSError as error:
            raise OSError(f"{given}: encoded data cannot be kept there ({error.strerror})") from None
    elif rank() == 0:
        try:
            given = Path.home() / ".cache" / "sftmix"
            os.stat(Path.home())  # a home folder is not created here
            try_to_write(given)
        except (RuntimeError, OSError) as error:  # RuntimeError: no HOME, and the user is not in passwd
            given = Path(output or tempfile.gettempdir()) / ("cache" if output else f"sftmix-{os.getuid()}")
            reason = getattr(error, "strerror", "no HOME is set")
            print0(f"encoded data is kept in {given}, since the home folder cannot hold it ({reason})", file)
    return broadcast_object(str(given))


def try_to_write(folder: Path) -> None:
    """Create a folder, and a file in it that is removed at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def cache_path(path, tokenizer: Tokenizer, template: str, max_length: int, cache=None) -> Path:
    """The folder for an encoded data file, named by a hash of everything that its ids depend on.

    `cache` is the folder of all these folders (None: what `choose_cache` returns). Raises FileNotFoundError, or
    ValueError if `path` is not a regular file.
    """
    path, digest = Path(path), hashlib.sha256()
    check_file(path)
    code = [(ROOT / name).read_bytes() for name in ("data.py", "tokenizer.py", "infra/cache.py")]
    settings = repr((path.suffix, template, max_length)).encode()
    for content in (*code, tokenizer.fingerprint, settings):
        digest.update(hashlib.sha256(content).digest())
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return Path(cache or choose_cache()) / digest.hexdigest()[:32]


def encode_file(path, tokenizer: Tokenizer, template: str, max_length: int, folder: Path) -> None:
    """Encode a data file into `folder`, chunk by chunk, with one process for each core.

    A `.jsonl` file is never in memory as a whole. The folder is renamed to its name when it is complete.
    Raises ValueError where `load_examples` does, and where no example is left.
    """
    path = Path(path)
    chunks = split_into_chunks(path)
    encode = partial(_encode_chunk, path, tokenizer, template, max_length)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    set_mode(tmp, folder.parent.stat().st_mode)  # mkdtemp gives permissions to the owner only
    counts, id_counts = Counter(), Counter()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(tmp / name, "wb")) for name in ARRAY_DTYPES}
            for dataset in parallel_map(encode, chunks, stack):
                counts += Counter(
                    examples=len(dataset),
                    tokens=len(dataset.loss_mask),
                    truncated=dataset.num_truncated,
                    dropped=dataset.num_dropped,
                )
                example_ids = np.array(list(unique_ids(dataset.ids, id_counts)), dtype=ARRAY_DTYPES["example_ids"])
                dataset = replace(dataset, example_ids=example_ids)
                for name, file in files.items():
                    getattr(dataset, name).tofile(file)
        if counts["examples"] + counts["dropped"] == 0:
            raise ValueError(f"{path}: no records in it")
        if counts["examples"] == 0:
            raise ValueError(f"{path}: no response starts within --max_length {max_length}")
        (tmp / "counts.json").write_text(json.dumps(counts))
        try:
            tmp.rename(folder)
        except OSError:
            if not folder.exists():  # else another run has encoded the same file meanwhile
                raise
    except BrokenProcessPool:
        raise OSError(f"{path}: a process that was encoding it has been killed; is memory short?") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _encode_chunk(path: Path, tokenizer: Tokenizer, template: str, max_length: int, chunk: Chunk) -> Dataset:
    return encode_examples(read_chunk(path, chunk, to_example), tokenizer, template, max_length)


def parallel_map(function: Callable, items: list, stack: ExitStack) -> Iterator:
    """`map(function, items)` with one process for each core, or in this process if there is one core or one item."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(items))
    if workers <= 1:
        return map(function, items)
    can_fork = "fork" in multiprocessing.get_all_start_methods()  # saves importing everything again
    context = multiprocessing.get_context("fork" if can_fork else None)
    pool = stack.enter_context(ProcessPoolExecutor(workers, context, _init_worker, (function,)))
    return pool.map(_call, items)


def _init_worker(function: Callable) -> None:
    """Send the function to a worker once: it holds a tokenizer, too large to send with each item."""
    _call.function = function
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent ends, even if the parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(item):
    return _call.function(item)


def load_cache(folder: Path) -> Dataset:
    """Memory-map what `encode_file` wrote. ValueError if it is not complete."""
    try:
        counts = json.loads((folder / "counts.json").read_text())
        arrays = {name: np.memmap(folder / name, dtype, mode="r") for name, dtype in ARRAY_DTYPES.items()}
        complete = [counts["tokens"]] * 2 + [counts["examples"]] * 3 == [len(array) for array in arrays.values()]
    except (ValueError, KeyError, TypeError, OSError):
        complete = False
    if not complete:
        raise ValueError(f"{folder}: damaged; remove that folder, and the data will be encoded again")
    return Dataset(*arrays.values(), counts.get("truncated", 0), counts.get("dropped", 0))


def load_dataset(path, tokenizer: Tokenizer, template: str, max_length: int, cache=None, file=None) -> Dataset:
    """Open a data file in its encoded form, and print to `file` what is in it. Rank 0 encodes it if it is not cached.

    Raises FileNotFoundError or ValueError, with what is wrong with the file.
    """
    folder = cache_path(path, tokenizer, template, max_length, cache)
    if rank() == 0 and not folder.exists():
        encode_file(path, tokenizer, template, max_length, folder)
    barrier()
    for _ in range(100):  # a network file system may show the new folder to other nodes with a delay
        if folder.exists():
            break
        time.sleep(0.1)
    else:
        raise ValueError(f"{folder}: not there, though process 0 has made it; --cache must be where all nodes see it")
    dataset = load_cache(folder)
    tokens, supervised = dataset.lengths.sum(), dataset.num_supervised.sum()
    print0(f"{path}: {len(dataset):,} examples, {tokens:,} tokens, {supervised:,} of them supervised", file)
    if dataset.num_truncated or dataset.num_dropped:
        print0(
            f"{path}: {dataset.num_truncated:,} truncated to {max_length} tokens, {dataset.num_dropped:,} dropped", file
        )
    return dataset
