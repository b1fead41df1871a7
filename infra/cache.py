"""The cache of encoded data: each data file is encoded once, in parallel, and then memory-mapped."""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data import ARRAY_DTYPES, Dataset, Example, encode_examples, to_example, unique_ids
from infra.distributed import broadcast_object, exit_on_signals, on_rank0, print0, rank
from infra.files import MANIFEST, checksums, fsync, name_errors, set_mode, verify_manifest, write_json
from infra.records import BadRecord, Chunk, Reading, data_checksums, describe, find_files, split_files
from tokenizer import TEMPLATES, Tokenizer, check_conversation

ROOT = Path(__file__).parent.parent
# The code that ids depend on.
CODE = ("data.py", "tokenizer.py", *(f"infra/{name}.py" for name in ("cache", "formats", "records", "tokenizer_files")))


def resolve_cache(cache=None, output=None, file=None) -> str:
    """Choose the folder for encoded data, the same on all processes: --cache, else `sftmix` in the user's cache.

    If neither --cache nor XDG_CACHE_HOME is given, and the home folder is missing or cannot be written to, it is a
    folder in `output`, which all machines of a run see, or without `output` in the system's folder for temporary files;
    a line in `file` says so.
    """
    given = cache or (os.environ.get("XDG_CACHE_HOME") and Path(os.environ["XDG_CACHE_HOME"]) / "sftmix")
    if rank() == 0 and not given:
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


def cache_path(data, tokenizer: Tokenizer, template: str, max_length: int, cache) -> Path:
    """The folder for encoded data files, named by a hash of everything that their ids depend on.

    `cache` is the folder of all these folders. Raises what `find_files` does.
    """
    digest = hashlib.sha256()
    code = [(ROOT / name).read_bytes() for name in CODE]
    settings = repr((template, max_length)).encode()
    contents = repr(([file.suffixes for file in find_files(data)], data_checksums(data))).encode()
    for content in (*code, tokenizer.fingerprint, settings, contents):
        digest.update(hashlib.sha256(content).digest())
    return Path(cache) / digest.hexdigest()[:32]


def encode_files(data, tokenizer: Tokenizer, template: str, max_length: int, folder: Path) -> None:
    """Encode data files into `folder`, chunk by chunk, with one process for each core.

    A JSON list and a row group of a parquet file are read as a whole, all else in chunks. The folder is renamed to its
    name when it is complete. Bad records are kept beside the encoded examples. Raises ValueError for a file that cannot
    be read, or OSError.
    """
    encode = partial(_encode_chunk, tokenizer, template, max_length)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(f"{folder.parent}: encoded data cannot be kept there ({error.strerror})") from None
    set_mode(tmp, folder.parent.stat().st_mode)  # mkdtemp gives permissions to the owner only
    counts, id_counts, reading = Counter(), Counter(), Reading()
    try:
        with name_errors(folder), exit_on_signals(), ExitStack() as stack:
            files = {name: stack.enter_context(open(tmp / name, "wb")) for name in ARRAY_DTYPES}
            for dataset, found in parallel_map(encode, split_files(data)):
                reading.add(found)
                counts += Counter(
                    examples=len(dataset),
                    tokens=len(dataset.loss_mask),
                    truncated=dataset.num_truncated,
                    dropped=dataset.num_dropped,
                )
                example_ids = np.array(list(unique_ids(dataset.ids, id_counts)), dtype=ARRAY_DTYPES["example_ids"])
                dataset = replace(dataset, example_ids=example_ids)
                for name, file in files.items():
                    file.write(np.ascontiguousarray(getattr(dataset, name)).data)
            found = {"counts": reading.counts, "bad": reading.bad, "notes": reading.notes}
            found["files"] = [str(file) for file in find_files(data)]
            (tmp / "reading.json").write_text(json.dumps(found))
            (tmp / "counts.json").write_text(json.dumps(counts))
        with name_errors(folder):
            write_json(tmp / MANIFEST, checksums(tmp.iterdir()))
            for part in [*tmp.iterdir(), tmp]:
                fsync(part)
        try:
            tmp.rename(folder)
        except OSError:
            if not folder.exists():  # else another run has encoded the same files meanwhile
                raise
    except BrokenProcessPool:
        raise OSError(f"{describe(data)}: a process that was encoding it has been killed; is memory short?") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _encode_chunk(tokenizer: Tokenizer, template: str, max_length: int, chunk: Chunk) -> tuple[Dataset, Reading]:
    reading = Reading()

    def parse(record: dict) -> Example:
        example = to_example(record)
        check_conversation(example.messages, TEMPLATES[template])
        return example

    def examples():
        for example in reading.parse(chunk, parse):
            reading.notes.update(example.notes)
            yield example

    return encode_examples(examples(), tokenizer, template, max_length), reading


def parallel_map(function: Callable, items: Iterable) -> Iterator:
    """`map(function, items)` with one process for each core, or in this process if there is one core or one item.

    Items are taken as there are processes for them, and not all at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    items = iter(items)
    first = list(islice(items, cores))
    items = chain(first, items)
    if len(first) <= 1:
        yield from map(function, items)
        return
    can_fork = "fork" in multiprocessing.get_all_start_methods()  # saves importing everything again
    context = multiprocessing.get_context("fork" if can_fork else None)
    with ProcessPoolExecutor(len(first), context, _init_worker, (function,)) as pool:
        pending = deque()
        try:
            for item in items:
                pending.append(pool.submit(_call, item))
                if len(pending) == 2 * len(first):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:  # such as Ctrl-C, which would otherwise wait for all that is pending
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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


def load_cache(folder: Path, files: list[Path]) -> tuple[Dataset, Reading]:
    """Memory-map what `encode_files` wrote. ValueError if it is not complete.

    `files` are the data files under their present names, which are those that bad records get.
    """
    try:
        counts = Counter(json.loads((folder / "counts.json").read_text()))
        reading = json.loads((folder / "reading.json").read_text())
        name_of = dict(zip(reading["files"], map(str, files), strict=True))
        bad = [BadRecord(*record) for record in reading["bad"]]
        bad = [b._replace(file=name_of[b.file], place=name_of[b.file] + b.place.removeprefix(b.file)) for b in bad]
        counts_by_file = Counter({name_of[name]: count for name, count in reading["counts"].items()})
        reading = Reading(counts_by_file.total(), counts_by_file, bad, Counter(reading["notes"]))
        open_array = partial(np.memmap, mode="r") if counts["examples"] else np.fromfile  # an empty file has no map
        arrays = {name: open_array(folder / name, dtype) for name, dtype in ARRAY_DTYPES.items()}
        complete = [counts["tokens"]] * 2 + [counts["examples"]] * 3 == [len(array) for array in arrays.values()]
    except (ValueError, KeyError, TypeError, OSError):
        complete = False
    if not complete:
        raise ValueError(f"{folder}: damaged; remove that folder, and the data will be encoded again")
    return Dataset(*arrays.values(), counts["truncated"], counts["dropped"]), reading


def encode_once(data, tokenizer: Tokenizer, template: str, max_length: int, cache) -> Path:
    """Encode data files, unless the cache has them. -> the folder. ValueError if they change meanwhile."""
    folder = cache_path(data, tokenizer, template, max_length, cache)
    if folder.exists():
        try:
            verify_manifest(folder, required=True)
        except ValueError:
            raise ValueError(f"{folder}: damaged; remove that folder, and the data will be encoded again") from None
    else:
        encode_files(data, tokenizer, template, max_length, folder)
        if cache_path(data, tokenizer, template, max_length, cache) != folder:
            shutil.rmtree(folder)
            raise ValueError(f"{describe(data)}: has changed while it was read; run the command again")
    return folder


def load_dataset(
    data, tokenizer: Tokenizer, template: str, max_length: int, cache=None, *, skip_bad_records: bool = False, file=None
) -> Dataset:
    """Open data files in their encoded form, and print to `file` what is in them. Rank 0 encodes them if need be.

    Raises FileNotFoundError or ValueError, with what is wrong with the files. `skip_bad_records` leaves them out
    instead, unless they are more than half.
    """
    name, cache = describe(data), cache or resolve_cache()
    folder = on_rank0(encode_once, data, tokenizer, template, max_length, cache)
    for _ in range(700):  # a network file system may show the new folder to other nodes with a delay
        if folder.exists():
            break
        time.sleep(0.1)
    else:
        raise ValueError(f"{folder}: not there, though rank 0 has made it; --cache must be where all nodes see it")
    files = find_files(data)
    dataset, reading = load_cache(folder, files)
    reading.check(name, skip_bad_records)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no response to learn starts within --max_length {max_length}, or all have weight 0")
    if len(files) > 1:
        print0(f"{name}: {len(files)} files, {', '.join(f.name for f in files[:4])}{' …' * (len(files) > 4)}", file)
    tokens, supervised = dataset.lengths.sum(), dataset.num_supervised.sum()
    print0(f"{name}: {len(dataset):,} examples, {tokens:,} tokens, {supervised:,} of them supervised", file)
    if dataset.num_truncated or dataset.num_dropped:
        print0(
            f"{name}: {dataset.num_truncated:,} truncated to {max_length} tokens, {dataset.num_dropped:,} dropped"
            + " (no response to learn starts within them, or all have weight 0)" * bool(dataset.num_dropped),
            file,
        )
    for line in reading.summary():
        print0(f"{name}: {line}", file)
    return replace(dataset, bad_records=reading.bad)
