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
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from infra.distributed import rank, to_device, world_size
from mixup import pair_positions
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


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on."""

    batch: Batch
    rows: torch.Tensor  # int64 [S]: the supervised positions
    owner: torch.Tensor  # int64 [S]: whose they are, by number in the data set
    lam: torch.Tensor  # float32 [M]: of each mixed position
    meeting: tuple  # index_c and index_u of `pair_positions`, int64 [M] each, in main memory

    def to(self, device) -> "MicroBatch":
        """The same on `device`, copied while the device is at work: nobody waits."""
        tensors = (self.rows, self.owner, self.lam)
        return MicroBatch(self.batch.to(device), *(to_device(x, device) for x in tensors), self.meeting)


@dataclass(frozen=True)
class Step:
    """This process's share of a global batch, and the counts of the whole of it that the means divide by."""

    examples: np.ndarray  # all of them, over all processes, by number in the data set
    micro_batches: list[MicroBatch]
    num_supervised: int  # over all processes
    num_mixed: int
    num_tokens: int


def deal(lengths: list[int], num_pairs: int, max_tokens: int, num_processes: int) -> list[list[tuple]]:
    """Deal examples into micro-batches, as many for each process (some may be empty).

    Of the first examples 0 and 1, 2 and 3, … `num_pairs` pairs stay together; the others go singly.

    >>> deal([30, 10, 20, 20, 5], num_pairs=2, max_tokens=50, num_processes=1)
    [[(0, 1), (4,)], [(2, 3)]]
    """
    units = [(2 * p, 2 * p + 1) for p in range(num_pairs)] + [(i,) for i in range(2 * num_pairs, len(lengths))]
    bins = split_batch([sum(lengths[i] for i in unit) for unit in units], max_tokens, num_processes)
    return [[units[u] for u in members] for members in bins]


def make_step(dataset: Dataset, chosen: np.ndarray, lam, micro_batch_tokens: int, device="cpu") -> Step:
    """Deal a global batch out: 0 meets 1, 2 meets 3, …, confident first, as many pairs as there are λ in lam [P].

    Those left over are trained on with NTP alone.
    """
    lengths, counts = dataset.lengths[chosen], dataset.num_supervised[chosen]
    micro_batches = []
    for units in deal(lengths.tolist(), len(lam), micro_batch_tokens, world_size())[rank() :: world_size()]:
        units.sort(key=len, reverse=True)  # pairs first, so that pair p is examples 2p and 2p+1
        members = [i for unit in units for i in unit]
        batch = pack([dataset[i] for i in chosen[members]])
        pairs = torch.tensor([i // 2 for unit in units if len(unit) > 1 for i in unit[::2]], dtype=torch.int64)
        neighbours = torch.arange(2 * len(pairs)).view(-1, 2)
        *meeting, pair = pair_positions(batch.targets, batch.cu_seqlens, neighbours)
        rows, numbers = batch.supervised, torch.from_numpy(chosen[members])
        owner = numbers[batch.example[rows]]
        micro_batches.append(MicroBatch(batch, rows, owner, lam[pairs][pair], tuple(meeting)).to(device))
    num_mixed = counts[: 2 * len(lam)].reshape(-1, 2).min(axis=1).sum()  # Σ min(N^c, N^u)
    return Step(chosen, micro_batches, int(counts.sum()), int(num_mixed), int(lengths.sum()))
