"""The encoded-data cache: a file is encoded once."""

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

from data import _ARRAYS, Dataset, _Part, _parts, _records, _to_example, _told_apart, encode_examples
from infra.distributed import barrier, rank, say
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


def cache_folder(path, tokenizer: Tokenizer, template: str, max_length: int, cache=None) -> Path:
    """Where a data file is kept encoded: named by the content of the file, and by all that makes ids of it.

    `cache` is a folder for all of them, by default `sftmix` in the user's cache. Raises FileNotFoundError.
    """
    path, digest = Path(path), hashlib.sha256()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    code = [(ROOT / name).read_bytes() for name in ("data.py", "tokenizer.py", "infra/cache.py")]
    settings = repr((path.suffix, template, max_length)).encode()
    for content in (*code, tokenizer.fingerprint, settings):
        digest.update(hashlib.sha256(content).digest())
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sftmix"
    return Path(cache) / digest.hexdigest()[:32]


def encode_file(path, tokenizer: Tokenizer, template: str, max_length: int, folder: Path) -> None:
    """Encode a data file into `folder`, part by part and with as many processes as there are cores.

    Of a `.jsonl` file, text and ids are never in memory as a whole. The folder is there only once all of it is.
    Raises ValueError where `load_examples` would, and where no example is left.
    """
    path = Path(path)
    parts = _parts(path)
    encode = partial(_encode_part, path, tokenizer, template, max_length)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    aside.chmod(folder.parent.stat().st_mode)  # which mkdtemp keeps to the owner alone
    counts, repeats = Counter(), Counter()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(aside / name, "wb")) for name in _ARRAYS}
            for dataset in _over_cores(encode, parts, stack):
                counts += Counter(
                    examples=len(dataset),
                    tokens=len(dataset.learnt),
                    truncated=dataset.truncated,
                    dropped=dataset.dropped,
                )
                example_ids = np.array(list(_told_apart(dataset.ids, repeats)), dtype=_ARRAYS["example_ids"])
                dataset = replace(dataset, example_ids=example_ids)
                for name, file in files.items():
                    getattr(dataset, name).tofile(file)
        if counts["examples"] + counts["dropped"] == 0:
            raise ValueError(f"{path}: no records in it")
        if counts["examples"] == 0:
            raise ValueError(f"{path}: no response starts within --max_length {max_length}")
        (aside / "counts.json").write_text(json.dumps(counts))
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # another run may have been faster
                raise
    except BrokenProcessPool:
        raise OSError(f"{path}: a process that was encoding it has been killed; is memory short?") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _encode_part(path: Path, tokenizer: Tokenizer, template: str, max_length: int, part: _Part) -> Dataset:
    return encode_examples(_records(path, part, _to_example), tokenizer, template, max_length)


def _over_cores(function: Callable, items: list, stack: ExitStack) -> Iterator:
    """`map(function, items)`, by as many processes as there are cores; one of them where there is one item."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(items))
    if workers <= 1:
        return map(function, items)
    forks = "fork" in multiprocessing.get_all_start_methods()  # then they need not import everything anew
    context = multiprocessing.get_context("fork" if forks else None)
    pool = stack.enter_context(ProcessPoolExecutor(workers, context, _set_task, (function,)))
    return pool.map(_do_task, items)


def _set_task(function: Callable) -> None:
    """Give a process of `_over_cores` its task: a tokenizer goes with it, too large to send along with each item."""
    _do_task.function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the process that needs this one, which may be killed, and go when it is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do_task(item):
    return _do_task.function(item)


def open_encoded(folder: Path) -> Dataset:
    """Open what `encode_file` left, mapped into memory: nothing is read before it is used.

    Raises ValueError where it is not whole.
    """
    try:
        counts = json.loads((folder / "counts.json").read_text())
        arrays = {name: np.memmap(folder / name, dtype, mode="r") for name, dtype in _ARRAYS.items()}
        whole = [counts["tokens"]] * 2 + [counts["examples"]] * 3 == [len(array) for array in arrays.values()]
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        raise ValueError(f"{folder}: damaged; remove that folder, and the data will be encoded again")
    return Dataset(*arrays.values(), counts.get("truncated", 0), counts.get("dropped", 0))


def load_dataset(path, tokenizer: Tokenizer, template: str, max_length: int, cache=None, file=None) -> Dataset:
    """Open a data file's encoded form, which process 0 makes where there is none yet, and say on `file` what is in it.

    Raises FileNotFoundError or ValueError where the file is not as it should be.
    """
    folder = cache_folder(path, tokenizer, template, max_length, cache)
    if rank() == 0 and not folder.exists():
        encode_file(path, tokenizer, template, max_length, folder)
    barrier()
    for _ in range(100):  # another node may learn of a new folder a little later
        if folder.exists():
            break
        time.sleep(0.1)
    else:
        raise ValueError(f"{folder}: not there, though process 0 has made it; --cache must be where all nodes see it")
    dataset = open_encoded(folder)
    tokens, supervised = dataset.lengths.sum(), dataset.num_supervised.sum()
    say(f"{path}: {len(dataset):,} examples, {tokens:,} tokens, {supervised:,} of them supervised", file)
    if dataset.truncated or dataset.dropped:
        say(f"{path}: {dataset.truncated:,} truncated to {max_length} tokens, {dataset.dropped:,} dropped", file)
    return dataset
