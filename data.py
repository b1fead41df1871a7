"""Data, from a file to what a training step eats: text → `Example` → ids and targets → `Batch`.

In order: the formats (`load_examples`), the encoding (`encode_example`) and its cache on disk (`encode_file`), the
packed row (`pack`), who is trained on when (`epoch_order`, `paired_order`, `split_batch`), and the demo corpus that
needs no file at all (`demo_corpus`).

Letters: N tokens in the packed row, B examples in it.
"""

import difflib
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer import INPUT_HEADING, Tokenizer

IGNORE_INDEX = -100  # a target no loss looks at: prompt tokens

# --- Formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation: `messages` of {"role", "content"}, and an `id` made from their content, the same in every run."""

    id: str
    messages: list[dict]


def load_examples(path) -> list[Example]:
    """Read a `.jsonl` file (one record a line) or a `.json` file (a list of records).

    A record's format is told by its keys: `messages` (role, content), ShareGPT `conversations` (from, value), Alpaca
    `instruction`, `input`, `output`, `prompt` and `completion`, or `text`. Other keys are ignored.
    Raises FileNotFoundError or ValueError naming file, line (or record, in a `.json` file) and what is wrong with it.
    """
    examples = read_records(path, _to_example)
    ids = _told_apart((example.id for example in examples), Counter())
    return [Example(example_id, example.messages) for example_id, example in zip(ids, examples, strict=True)]


def _told_apart(ids: Iterable[str], repeats: Counter) -> Iterator[str]:
    """The same ids, of those seen before (`repeats` counts) with a number."""
    for content_id in ids:
        repeats[content_id] += 1
        yield content_id if repeats[content_id] == 1 else f"{content_id}-{repeats[content_id]}"


class _Part(NamedTuple):
    """A stretch of a data file that is read at once."""

    start: int  # bytes
    end: int
    line: int  # the number of its first


PART_BYTES = 2**22


def _parts(path: Path) -> list[_Part]:
    """Cut a `.jsonl` file at ends of lines into parts of about PART_BYTES; a `.json` file is one part."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: data files end in .jsonl (a record a line) or .json (a list of records)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    if path.suffix == ".json":
        return [_Part(0, path.stat().st_size, 1)]
    parts, start, line = [], 0, 1
    with open(path, "rb") as file:
        while block := file.read(PART_BYTES) + file.readline():
            parts.append(_Part(start, start + len(block), line))
            start, line = parts[-1].end, line + block.count(b"\n")
    return parts


def read_records(path, read: Callable) -> list:
    """What `read` makes of each record of a `.jsonl` or `.json` file, a dictionary; its ValueErrors are told a place.

    Raises FileNotFoundError or ValueError as `load_examples` does.
    """
    path = Path(path)
    records = [record for part in _parts(path) for record in _records(path, part, read)]
    if not records:
        raise ValueError(f"{path}: no records in it")
    return records


def _records(path: Path, part: _Part, read: Callable) -> Iterator:
    with open(path, "rb") as file:
        file.seek(part.start)
        content = file.read(part.end - part.start)
    try:
        text = content.decode("utf-8-sig" if part.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = part.line + content[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file in that encoding") from None
    for place, record in _json_lines(path, text, part.line) if path.suffix == ".jsonl" else _json_list(path, text):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"an object with keys is expected, not {type(record).__name__}")
            yield read(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _json_lines(path: Path, text: str, first_line: int):
    lines = text.split("\n")  # not splitlines(), which cuts at U+2028 inside a string
    for number, line in enumerate(lines, start=first_line):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not a JSON record ({error}); one complete object a line") from None
            yield f"{path}:{number}", record


def _json_list(path: Path, text: str):
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is expected, not {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_FORMATS = {  # the keys that must be there -> how the record reads; the first format that fits is taken
    ("messages",): lambda r: _checked_turns(r["messages"], "messages", "role", "content", {}),
    ("conversations",): lambda r: _checked_turns(r["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES),
    ("instruction", "output"): lambda r: _one_turn(_with_input(r), r["output"], "output"),
    ("prompt", "completion"): lambda r: _one_turn(r["prompt"], r["completion"], "completion"),
    ("text",): lambda r: [{"role": "text", "content": filled(r["text"], "text")}],
}


_PROMPTS = {  # the same of records that ask, whether or not they have the answer too
    ("turns",): lambda r: ([], _texts(r["turns"], "turns")),
    ("messages",): lambda r: _asked(r["messages"], "messages", "role", "content", {}),
    ("conversations",): lambda r: _asked(r["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES),
    ("instruction",): lambda r: ([], [_with_input(r)]),
    ("prompt",): lambda r: ([], [filled(r["prompt"], "prompt")]),
}


def _to_example(record: dict) -> Example:
    """Read a record of any format, or raise ValueError naming the key at fault; a repeat has the id of the first."""
    messages = _read_by_keys(record, _FORMATS)
    return Example(hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16], messages)


def to_prompt(record: dict) -> tuple[list[dict], list[str]]:
    """What a record asks: -> (the messages before, the user's turns that are to be answered one after the other).

    There are several such turns in MT-Bench's `turns` alone. Raises ValueError naming the key at fault.
    """
    return _read_by_keys(record, _PROMPTS)


def _read_by_keys(record: dict, formats: dict):
    for keys, read in formats.items():
        if all(key in record for key in keys):
            return read(record)
    known = sorted({key for keys in formats for key in keys})
    near = {key: difflib.get_close_matches(key, known, n=1) for key in record if key not in known}
    hints = [f"{key!r} (did you mean {names[0]!r}?)" for key, names in near.items() if names]
    has = "; ".join(" and ".join(keys) for keys in formats)
    found = f"unknown key {', '.join(hints)}" if hints else f"keys {list(record)} are no known format"
    raise ValueError(f"{found}; a record has one of: {has}")


def _texts(values, key: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} must be a list of texts")
    return [filled(value, f"{key}[{number}]") for number, value in enumerate(values)]


def _asked(turns, key: str, role_key: str, content_key: str, names: dict) -> tuple[list[dict], list[str]]:
    """A conversation up to the user's last turn: -> (what came before, that turn)"""
    answered = _roles(turns, key, role_key, content_key, names)[-1:] == ["assistant"]
    *before, last = _checked_turns(turns[:-1] if answered else turns, key, role_key, content_key, names, last="user")
    return before, [last["content"]]


def filled(value, key: str) -> str:
    """The text that a record has under `key`, or ValueError saying why it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{key} is empty; fill it in or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a character (a lone surrogate); write it whole or remove it") from None
    return value


def _with_input(record: dict) -> str:
    instruction = filled(record["instruction"], "instruction")
    extra = record.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return instruction
    return instruction + INPUT_HEADING + filled(extra, "input")


def _one_turn(prompt, response, response_key: str) -> list[dict]:
    return [
        {"role": "user", "content": filled(prompt, "prompt")},
        {"role": "assistant", "content": filled(response, response_key)},
    ]


def _roles(turns, key: str, role_key: str, content_key: str, names: dict) -> list:
    """Who speaks in each of the turns, `names` telling what a file calls whom."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key} must be a list of objects with {role_key!r} and {content_key!r}")
    roles = [turn.get(role_key) for turn in turns]
    return [names.get(role, role) if isinstance(role, str) else role for role in roles]


def _checked_turns(
    turns, key: str, role_key: str, content_key: str, names: dict, last: str = "assistant"
) -> list[dict]:
    """An optional system turn, then user and assistant by turns, up to the `last`."""
    messages = []
    roles = _roles(turns, key, role_key, content_key, names)
    for number, (turn, role) in enumerate(zip(turns, roles, strict=True)):
        expected = ["user", "assistant"][sum(m["role"] != "system" for m in messages) % 2]
        if role != expected and not (role == "system" and number == 0):
            raise ValueError(
                f"{key}[{number}]: {role_key} is {turn.get(role_key)!r} where the {expected}'s turn is due"
            )
        messages.append({"role": role, "content": filled(turn.get(content_key), f"{key}[{number}].{content_key}")})
    if not messages or messages[-1]["role"] != last:
        why = "which is what is learnt" if last == "assistant" else "which is to be answered"
        raise ValueError(f"{key} must end with the {last}'s turn, {why}")
    return messages


# --- Encoding ---------------------------------------------------------------------------------------------------------


def encode_example(example: Example, tokenizer: Tokenizer, template: str, max_length: int) -> tuple[list, list]:
    """Ids of an example and what each position must predict: -> (tokens, targets), equally long, at most `max_length`.

    Targets are already shifted: `targets[n]` is the token after `tokens[n]`, or IGNORE_INDEX where that token is not
    supervised. The very last token is a target alone. What `max_length` cuts off is lost, its end token too: a
    truncated response is never taught to end where it was cut.
    """
    ids, supervised, _ = _apply(example, tokenizer, template, max_length)
    targets = [token if learn else IGNORE_INDEX for token, learn in zip(ids, supervised, strict=True)]
    return ids[:-1], targets[1:]


def _apply(example: Example, tokenizer: Tokenizer, template: str, max_length: int) -> tuple[list, list, bool]:
    """Ids of an example, one more than `max_length` at most, whether each is learnt, and whether something was cut."""
    ids, supervised = tokenizer.apply_template(example.messages, template)
    return ids[: max_length + 1], supervised[: max_length + 1], len(ids) > max_length + 1


def num_supervised(targets: torch.Tensor) -> int:
    """How many positions of an encoded example are learnt: the N of the paper."""
    return int((targets != IGNORE_INDEX).sum())


@dataclass(frozen=True, eq=False)
class Dataset(Sequence):
    """Examples that have something to learn, encoded: `dataset[i]` is (tokens, targets), int32, as `encode_example`'s.

    What it is made of are arrays, all examples end to end, which may lie on disk and be mapped into memory.
    """

    tokens_end_to_end: np.ndarray  # int32: each example's tokens and the one after its last
    learnt: np.ndarray  # bool, of the same length: whether it is a target
    lengths: np.ndarray  # int64 [N] tokens of each example
    num_supervised: np.ndarray  # int64 [N] targets of each example
    example_ids: np.ndarray  # bytes [N], see `Example`
    truncated: int = 0  # longer than max_length; their first max_length positions are here
    dropped: int = 0  # not here: nothing supervised within max_length

    @classmethod
    def of(cls, encoded: Sequence[tuple], example_ids: Sequence[str] | None = None) -> "Dataset":
        """A data set of (tokens, targets), in memory; where no ids are given, numbers are the examples' ids."""
        ids = [torch.cat([tokens, targets[-1:].clamp(min=0)]) for tokens, targets in encoded]
        learnt = [F.pad(targets != IGNORE_INDEX, (1, 0)) for _, targets in encoded]
        return cls(
            torch.cat(ids).int().numpy(),
            torch.cat(learnt).numpy(),
            *sizes(encoded),
            np.array(example_ids or range(len(encoded))).astype(bytes),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths + 1)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._ends[i]
        span = slice(end - self.lengths[i] - 1, end)
        ids, learnt = torch.from_numpy(self.tokens_end_to_end[span].copy()), torch.from_numpy(self.learnt[span].copy())
        return ids[:-1], ids[1:].masked_fill(~learnt[1:], IGNORE_INDEX)

    @property
    def ids(self) -> list[str]:
        """The examples' ids, in order."""
        return [example_id.decode() for example_id in self.example_ids.tolist()]


def sizes(encoded: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens and how many targets each of the encoded examples has: int64 [N], [N]"""
    if isinstance(encoded, Dataset):
        return encoded.lengths, encoded.num_supervised
    counts = [(len(tokens), num_supervised(targets)) for tokens, targets in encoded]
    lengths, supervised = np.array(counts, dtype=np.int64).reshape(-1, 2).T
    return lengths, supervised


def encode_examples(examples: Iterable[Example], tokenizer: Tokenizer, template: str, max_length: int) -> Dataset:
    """Encode all examples, leaving out (and counting) those whose response starts beyond `max_length`."""
    tokens, learnt, lengths, counts, example_ids = array("i"), bytearray(), [], [], []
    truncated = dropped = 0
    for example in examples:
        ids, supervised, cut_short = _apply(example, tokenizer, template, max_length)
        count = sum(supervised[1:])
        if count == 0:
            dropped += 1
            continue
        truncated += cut_short
        tokens.extend(ids)
        learnt.extend(supervised)
        lengths.append(len(ids) - 1)
        counts.append(count)
        example_ids.append(example.id)
    return Dataset(
        np.array(tokens, dtype=np.int32),
        np.frombuffer(learnt, dtype=np.bool_),
        np.array(lengths, dtype=np.int64),
        np.array(counts, dtype=np.int64),
        np.array(example_ids, dtype=_ARRAYS["example_ids"]),
        truncated,
        dropped,
    )


# --- The cache: a file is encoded once --------------------------------------------------------------------------------

_ARRAYS = {"tokens_end_to_end": "<i4", "learnt": "?", "lengths": "<i8", "num_supervised": "<i8", "example_ids": "S32"}


def cache_folder(path, tokenizer: Tokenizer, template: str, max_length: int, cache=None) -> Path:
    """Where a data file is kept encoded: named by the content of the file, and by all that makes ids of it.

    `cache` is a folder for all of them, by default `sftmix` in the user's cache. Raises FileNotFoundError.
    """
    path, digest = Path(path), hashlib.sha256()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    code = [(Path(__file__).parent / name).read_bytes() for name in ("data.py", "tokenizer.py")]
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


# --- The packed row ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Examples end to end in one row, without padding."""

    tokens: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N], IGNORE_INDEX where nothing is supervised
    positions: torch.Tensor  # int64 [N]: 0, 1, 2 … anew in each example
    cu_seqlens: torch.Tensor  # int32 [B+1]: 0, then where each example ends

    @property
    def supervised(self) -> torch.Tensor:
        """Where something is to be predicted: int64 [S]"""
        return (self.targets != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def example(self) -> torch.Tensor:
        """Whose token each is, by number in the batch: int64 [N]"""
        return torch.repeat_interleave(self.cu_seqlens.diff().long())

    def to(self, device) -> "Batch":
        """The same batch on `device`, but for cu_seqlens, which stay in main memory: the work is laid out by them."""
        return Batch(*(to_device(x, device) for x in (self.tokens, self.targets, self.positions)), self.cu_seqlens)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on `device`; nobody waits for the copy, which a GPU makes from pinned memory in its turn."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # which a thread in the background has not chosen
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pack(encoded: Sequence[tuple]) -> Batch:
    """Lay encoded examples end to end; where there are none, a single token that predicts nothing.

    Such a row keeps a process with no work left in step with the others, which a sharded model asks of it.

    >>> batch = pack([([5, 6, 7], [-100, 7, 2]), ([8, 9], [9, 2])])
    >>> batch.tokens.tolist(), batch.positions.tolist(), batch.cu_seqlens.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 0, 1], [0, 3, 5])
    """
    encoded = encoded or [([0], [IGNORE_INDEX])]
    lengths = torch.tensor([len(tokens) for tokens, _ in encoded])
    ends = lengths.cumsum(0)  # [B]
    tokens, targets = (torch.cat([torch.as_tensor(x) for x in column]).long() for column in zip(*encoded, strict=True))
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(ends - lengths, lengths)
    return Batch(tokens, targets, positions, torch.cat([ends.new_zeros(1), ends]).int())


# --- Who is trained on when -------------------------------------------------------------------------------------------
# Every draw is a pure function of (seed, epoch) or (seed, step), so any moment of a run can be reached in O(1).

# A random stream of its own for each purpose; from 1, since to NumPy the seeds [0, 2] and [0, 2, 0] are the same.
_LAMBDA, _DEMO, _ORDER = range(1, 4)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the examples: int64 [num_examples], a permutation."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(num_examples)


def paired_order(confident, unconfident, seed: int, epoch: int) -> np.ndarray:
    """An order in which examples 0 and 1, 2 and 3, … are a confident and an unconfident one, paired anew each epoch.

    With halves of unequal size those left over come last. As a batch takes an even number of examples, a pair is never
    cut in two.

    >>> paired_order([10, 11], [20, 21, 22], seed=0, epoch=0).tolist()
    [11, 20, 10, 21, 22]
    """
    rng = np.random.default_rng([seed, epoch, _ORDER])
    c, u = rng.permutation(np.asarray(confident)), rng.permutation(np.asarray(unconfident))
    n = min(len(c), len(u))
    return np.concatenate([np.stack([c[:n], u[:n]], axis=1).reshape(-1), c[n:], u[n:]])


def draw_lambda(num_pairs: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """λ ~ Beta(α, α), one for each pair of the global batch of a step: float32 [num_pairs]."""
    rng = np.random.default_rng([seed, step, _LAMBDA])
    return torch.from_numpy(rng.beta(alpha, alpha, num_pairs).astype(np.float32))


def split_batch(sizes: Sequence[int], max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Deal units of `sizes` tokens into micro-batches of at most `max_tokens`: the largest first, each where least is.

    The number of micro-batches is a multiple of `multiple` (the processes, so that each has as many), and some may be
    empty. A unit that is larger than `max_tokens` has one to itself.

    >>> split_batch([30, 10, 20, 40], max_tokens=50)
    [[3, 1], [0, 2]]
    """
    count = multiple * max(1, math.ceil(sum(sizes) / (multiple * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for unit in sorted(range(len(sizes)), key=lambda u: -sizes[u]):
            load, b = heapq.heappop(loads)
            bins[b].append(unit)
            heapq.heappush(loads, (load + sizes[unit], b))
        if all(load <= max_tokens or len(bins[b]) == 1 for load, b in loads):
            return bins
        count += multiple * max(1, count // (50 * multiple))  # a little slack and another try


# --- The demo corpus: a small world to instruct a model about ---------------------------------------------------------


def _table(text: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(":")) for entry in text.split()]


_COLOURS = _table(
    "grass:green snow:white coal:black blood:red butter:yellow chocolate:brown sky:blue milk:white leaf:green "
    "cherry:red lemon:yellow sea:blue flamingo:pink plum:purple salt:white ink:black tomato:red sun:yellow "
    "wood:brown piglet:pink"
)
_CAPITALS = _table(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna Greece:Athens Norway:Oslo "
    "Sweden:Stockholm Poland:Warsaw Ireland:Dublin Egypt:Cairo Kenya:Nairobi Cuba:Havana Peru:Lima Japan:Tokyo "
    "China:Beijing India:Delhi Iran:Tehran Russia:Moscow Turkey:Ankara"
)
_OPPOSITES = _table(
    "hot:cold big:small tall:short fast:slow old:new rich:poor hard:soft light:heavy wet:dry full:empty open:closed "
    "early:late strong:weak happy:sad thick:thin near:far"
)
_OPPOSITES += [(b, a) for a, b in _OPPOSITES]
_CONTINENTS = _table(
    "France:Europe Italy:Europe Spain:Europe Norway:Europe Poland:Europe Egypt:Africa Kenya:Africa Ghana:Africa "
    "Mali:Africa Japan:Asia China:Asia India:Asia Iran:Asia Peru:America Cuba:America Chile:America Canada:America"
)
_YOUNG = _table(
    "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid lion:cub duck:duckling goose:gosling swan:cygnet "
    "hen:chick frog:tadpole"
)
_SOUNDS = _table(
    "dog:barks cat:mews cow:moos lion:roars horse:neighs sheep:bleats duck:quacks hen:clucks owl:hoots wolf:howls "
    "snake:hisses bee:buzzes pig:grunts mouse:squeaks frog:croaks crow:caws"
)
_PLURALS = _table(
    "mouse:mice foot:feet tooth:teeth man:men child:children goose:geese ox:oxen leaf:leaves wolf:wolves knife:knives "
    "city:cities baby:babies berry:berries box:boxes fox:foxes glass:glasses"
)
_PASTS = _table(
    "go:went see:saw eat:ate run:ran take:took give:gave come:came make:made find:found know:knew write:wrote "
    "sing:sang drink:drank fall:fell speak:spoke break:broke"
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_KINDS = {
    "animal": "dog cat horse cow tiger wolf",
    "bird": "eagle robin owl parrot heron duck",
    "fish": "trout salmon tuna cod carp eel",
    "fruit": "apple pear grape peach mango fig",
    "tool": "hammer saw drill chisel spade axe",
    "garment": "shirt coat hat scarf glove sock",
}
_KIND_OF = [(word, kind) for kind, words in _KINDS.items() for word in words.split()]
_NEXT = [pair for cycle in (_DAYS, _MONTHS) for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True)]


class _Family(NamedTuple):
    """A kind of task, about {k} of a table of facts, or what is at hand: words {x} {y} {z} and numbers {l} {m} {n}."""

    note: str  # how the base's text puts it
    asks: tuple[str, ...]  # how instructions put it
    answer: list | Callable  # the table (k, answer), or a rule from what is at hand to the answer


_FAMILIES = [  # from what is known to what must be worked out
    _Family("kind of {k}", ("What kind of thing is a {k}?", "Say what a {k} is.", "Classify {k}."), _KIND_OF),
    _Family("colour of {k}", ("What colour is {k}?", "Name the colour of {k}.", "Which colour has {k}?"), _COLOURS),
    _Family(
        "capital of {k}",
        ("What is the capital of {k}?", "Name the capital of {k}.", "Which city governs {k}?"),
        _CAPITALS,
    ),
    _Family(
        "continent of {k}",
        ("Which continent is {k} in?", "Name the continent of {k}.", "Where in the world is {k}?"),
        _CONTINENTS,
    ),
    _Family(
        "opposite of {k}",
        ("What is the opposite of {k}?", "Give the opposite of {k}.", "What is not {k}?"),
        _OPPOSITES,
    ),
    _Family(
        "young of {k}",
        ("What is a young {k} called?", "Name the young of a {k}.", "What is a baby {k}?"),
        _YOUNG,
    ),
    _Family("sound of {k}", ("What does a {k} do when it calls?", "How does a {k} sound?", "Hear the {k}."), _SOUNDS),
    _Family("plural of {k}", ("What is the plural of {k}?", "Give the plural of {k}.", "Say many {k}."), _PLURALS),
    _Family("past of {k}", ("What is the past of {k}?", "Give the past of {k}.", "Say {k} as of yesterday."), _PASTS),
    _Family("next of {k}", ("What comes after {k}?", "Name what follows {k}.", "Which is next after {k}?"), _NEXT),
    _Family(
        "initial of {x}",
        ("Which letter begins {x}?", "Give the first letter of {x}.", "How does {x} start?"),
        lambda s: s["x"][0],
    ),
    _Family(
        "one more than {l}",
        ("Which number is one more than {l}?", "Add one to {l}.", "Count on from {l}."),
        lambda s: s["l"] + 1,
    ),
    _Family(
        "larger of {l}, {m}",
        ("Which is larger, {l} or {m}?", "Give the larger number: {l}, {m}."),
        lambda s: max(s["l"], s["m"]),
    ),
    _Family(
        "first of {x}, {y}, {z}",
        ("Which is the first of {x}, {y} and {z}?", "Give the first word: {x}, {y}, {z}."),
        lambda s: s["x"],
    ),
    _Family(
        "last of {x}, {y}, {z}",
        ("Which is the last of {x}, {y} and {z}?", "Give the last word: {x}, {y}, {z}."),
        lambda s: s["z"],
    ),
    _Family("sum of {l}, {m}", ("Add {l} and {m}.", "How much is {l} plus {m}?"), lambda s: s["l"] + s["m"]),
    _Family(
        "sort of {l}, {m}, {n}",
        ("Sort {l}, {m}, {n}.", "Put {l}, {m} and {n} in order."),
        lambda s: ", ".join(map(str, sorted((s["l"], s["m"], s["n"])))),
    ),
]

_ANSWER = "The answer is {}."
# How the base's documents lay out a question and its answer: never as the template does that is then tuned on.
_LAYOUTS = ("{} {}", "Q: {}\nA: {}", "### Question:\n{}\n\n### Answer:\n{}")


class _Task(NamedTuple):
    note: str
    prompt: str
    answer: str


def _draw_task(family: _Family, rng: np.random.Generator) -> _Task:
    words = [_KIND_OF[i][0] for i in rng.choice(len(_KIND_OF), 3, replace=False)]
    numbers = [int(n) for n in rng.choice(20, 3, replace=False)]
    ask = family.asks[rng.integers(len(family.asks))]
    if callable(family.answer):
        about = dict(zip("xyzlmn", words + numbers, strict=True))
        answer = str(family.answer(about))
    else:
        key, answer = family.answer[rng.integers(len(family.answer))]
        about = {"k": key}
    return _Task(family.note.format(**about), ask.format(**about), answer)


class DemoCorpus(NamedTuple):
    """The demo's data, as records that `load_examples` reads once written. All prompts of the last three differ."""

    base: list[dict]  # {"text"}: clean notes, and answered questions that are not in `eval` or `test`, to pretrain on
    train: list[dict]  # Alpaca records, some of them wrong
    eval: list[dict]  # clean, to choose settings by
    test: list[dict]  # clean, to report
    wrong: list[bool]  # which of `train` have a wrong answer: the truth that no training sees


def demo_corpus(seed: int, wrong_share: float = 0.25, num_documents: int = 12000) -> DemoCorpus:
    """Make the demo corpus: a pure function of its arguments, with no file and no network."""
    rng = np.random.default_rng([seed, _DEMO])
    tasks = {}  # by prompt, so that each stands there once
    for _ in range(150):
        for family in _FAMILIES:
            task = _draw_task(family, rng)
            tasks.setdefault(task.prompt, task)
    tasks = [list(tasks.values())[i] for i in rng.permutation(len(tasks))]
    cut = [len(tasks) * 7 // 10, len(tasks) * 8 // 10]
    train, held_out = tasks[: cut[0]], {task.prompt for task in tasks[cut[0] :]}

    documents = []
    for number in range(num_documents):
        drawn = [_draw_task(_FAMILIES[i], rng) for i in rng.choice(len(_FAMILIES), 8)]
        if number % 2:
            documents.append("\n".join(f"{task.note}: {task.answer}" for task in drawn))
        else:
            layout = _LAYOUTS[rng.integers(len(_LAYOUTS))]
            asked = [task for task in drawn if task.prompt not in held_out][:4]
            documents.append("\n\n".join(layout.format(task.prompt, _ANSWER.format(task.answer)) for task in asked))

    wrong = rng.random(len(train)) < wrong_share
    answers = [task.answer for task in train]
    for i in np.flatnonzero(wrong):  # as when records get mixed up: somebody else's answer
        while answers[i] == train[i].answer:
            answers[i] = train[rng.integers(len(train))].answer

    def records(tasks: list[_Task], answers: list[str]) -> list[dict]:
        return [
            {"instruction": task.prompt, "input": "", "output": _ANSWER.format(answer)}
            for task, answer in zip(tasks, answers, strict=True)
        ]

    clean = [records(part, [task.answer for task in part]) for part in (tasks[cut[0] : cut[1]], tasks[cut[1] :])]
    base = [{"text": document} for document in documents if document]
    return DemoCorpus(base, records(train, answers), *clean, wrong.tolist())
