"""Data on its way from a file to an optimizer step: text → `Example` → ids and targets → `Batch` → `GlobalBatch`.

In order: the formats of data files (`load_examples`), encoding (`encode_example`, `Dataset`), packing (`pack`), the
order of an epoch and λ (`paired_order`, `sample_lambda`), the batch of a step and its micro-batches (`build_batch`).

Letters: B examples in a packed row of N tokens (in arrays of a whole dataset: N examples), S supervised positions, P
pairs, M mixed positions; N^c and N^u are the supervised tokens of the two examples of a pair.
"""

import difflib
import hashlib
import heapq
import json
import math
from array import array
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mixup import IGNORE_INDEX, pair_positions, to_device
from tokenizer import INPUT_HEADING, Tokenizer

# --- Reading records --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation: `messages` of {"role", "content"}, and an `id` computed from them, the same in every run."""

    id: str
    messages: list[dict]


def load_examples(path) -> list[Example]:
    """Read a `.jsonl` file (a record a line) or a `.json` file (a list of records).

    The keys of a record tell its format: `messages` (role, content), ShareGPT `conversations` (from, value), Alpaca
    `instruction`, `input`, `output`, `prompt` and `completion`, or `text`. Other keys are ignored.
    Raises FileNotFoundError, or ValueError with the file, the line (in a `.json` file the record) and what is wrong.
    """
    examples = read_records(path, to_example)
    ids = unique_ids((example.id for example in examples), Counter())
    return [Example(example_id, example.messages) for example_id, example in zip(ids, examples, strict=True)]


def unique_ids(ids: Iterable[str], counts: Counter) -> Iterator[str]:
    """Append a number to each id that `counts` has seen before: a, b, a → a, b, a-2."""
    for content_id in ids:
        counts[content_id] += 1
        yield content_id if counts[content_id] == 1 else f"{content_id}-{counts[content_id]}"


class Chunk(NamedTuple):
    """A part of a data file that is read at once."""

    start: int  # in bytes, as end
    end: int
    line: int  # the number of the first line


CHUNK_BYTES = 2**22


def split_into_chunks(path: Path) -> list[Chunk]:
    """Divide a `.jsonl` file at line ends into chunks of about CHUNK_BYTES; a `.json` file is one chunk."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: data files end in .jsonl (a record a line) or .json (a list of records)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    if path.suffix == ".json":
        return [Chunk(0, path.stat().st_size, 1)]
    chunks, start, line = [], 0, 1
    with open(path, "rb") as file:
        while content := file.read(CHUNK_BYTES) + file.readline():
            chunks.append(Chunk(start, start + len(content), line))
            start, line = chunks[-1].end, line + content.count(b"\n")
    return chunks


def read_records(path, parse: Callable[[dict], object]) -> list:
    """Apply `parse` to each record of a `.jsonl` or `.json` file. -> what it returned, in order

    Raises FileNotFoundError, or ValueError as `load_examples` does; the ValueErrors of `parse` get the place in front.
    """
    path = Path(path)
    records = [record for chunk in split_into_chunks(path) for record in read_chunk(path, chunk, parse)]
    if not records:
        raise ValueError(f"{path}: no records in it")
    return records


def read_chunk(path: Path, chunk: Chunk, parse: Callable[[dict], object]) -> Iterator:
    """`read_records` for one chunk of a file."""
    with open(path, "rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.end - chunk.start)
    try:
        text = content.decode("utf-8-sig" if chunk.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = chunk.line + content[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file in that encoding") from None
    for place, record in _json_lines(path, text, chunk.line) if path.suffix == ".jsonl" else _json_list(path, text):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"an object with keys is expected, not {type(record).__name__}")
            yield parse(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _json_lines(path: Path, text: str, first_line: int):
    lines = text.split("\n")  # str.splitlines would also split at U+2028 inside a string
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


# --- Formats ----------------------------------------------------------------------------------------------------------


# The keys of a list of turns, and a map from role names to user and assistant where a format has its own.
_TurnKeys = namedtuple("_TurnKeys", "turns role content roles")
_MESSAGES = _TurnKeys("messages", "role", "content", {})
_CONVERSATIONS = _TurnKeys("conversations", "from", "value", {"human": "user", "gpt": "assistant"})
_FORMATS = {  # required keys -> how to read the messages of a record; the first format whose keys are there is taken
    ("messages",): lambda r: _parse_turns(r["messages"], _MESSAGES),
    ("conversations",): lambda r: _parse_turns(r["conversations"], _CONVERSATIONS),
    ("instruction", "output"): lambda r: _single_turn(_instruction(r), r["output"], "output"),
    ("prompt", "completion"): lambda r: _single_turn(r["prompt"], r["completion"], "completion"),
    ("text",): lambda r: [{"role": "text", "content": require_text(r["text"], "text")}],
}
_PROMPT_FORMATS = {  # the same for records to be answered, with or without a response
    ("turns",): lambda r: ([], _text_list(r["turns"], "turns")),
    ("messages",): lambda r: _parse_prompt(r["messages"], _MESSAGES),
    ("conversations",): lambda r: _parse_prompt(r["conversations"], _CONVERSATIONS),
    ("instruction",): lambda r: ([], [_instruction(r)]),
    ("prompt",): lambda r: ([], [require_text(r["prompt"], "prompt")]),
}


def to_example(record: dict) -> Example:
    """Read a record of any format; ValueError names the key at fault. Equal records get equal ids."""
    messages = _read_by_keys(record, _FORMATS)
    return Example(hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16], messages)


def to_prompt(record: dict) -> tuple[list[dict], list[str]]:
    """Read what a record asks. -> (the messages before, the user turns to be answered one after the other)

    Only MT-Bench's `turns` has several user turns to answer. ValueError names the key at fault.
    """
    return _read_by_keys(record, _PROMPT_FORMATS)


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


def require_text(value, key: str) -> str:
    """Return `value` if it is a text with something in it; ValueError says what is wrong with it."""
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{key} is empty; fill it in or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a character (a lone surrogate); write it whole or remove it") from None
    return value


def _text_list(values, key: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} must be a list of texts")
    return [require_text(value, f"{key}[{number}]") for number, value in enumerate(values)]


def _instruction(record: dict) -> str:
    """An Alpaca record's instruction, with its input under a heading if it has one."""
    instruction = require_text(record["instruction"], "instruction")
    extra = record.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return instruction
    return instruction + INPUT_HEADING + require_text(extra, "input")


def _single_turn(prompt, response, response_key: str) -> list[dict]:
    return [
        {"role": "user", "content": require_text(prompt, "prompt")},
        {"role": "assistant", "content": require_text(response, response_key)},
    ]


def _parse_turns(turns, keys: _TurnKeys, last: str = "assistant") -> list[dict]:
    """Messages of a conversation: an optional system turn, then user and assistant in turn, ending with `last`."""
    messages = []
    for number, (turn, role) in enumerate(zip(turns, _roles(turns, keys), strict=True)):
        expected = ["user", "assistant"][sum(m["role"] != "system" for m in messages) % 2]
        if role != expected and not (role == "system" and number == 0):
            found = f"{keys.turns}[{number}]: {keys.role} is {turn.get(keys.role)!r}"
            raise ValueError(f"{found} where the {expected}'s turn is due")
        content = require_text(turn.get(keys.content), f"{keys.turns}[{number}].{keys.content}")
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] != last:
        why = "which is what is learnt" if last == "assistant" else "which is to be answered"
        raise ValueError(f"{keys.turns} must end with the {last}'s turn, {why}")
    return messages


def _parse_prompt(turns, keys: _TurnKeys) -> tuple[list[dict], list[str]]:
    """A conversation up to the last user turn, without an answer to it. -> (the messages before, that turn)"""
    is_answered = _roles(turns, keys)[-1:] == ["assistant"]
    *before, last = _parse_turns(turns[:-1] if is_answered else turns, keys, last="user")
    return before, [last["content"]]


def _roles(turns, keys: _TurnKeys) -> list:
    """The role of each turn; a role that is not known stays as it is."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{keys.turns} must be a list of objects with {keys.role!r} and {keys.content!r}")
    names = [turn.get(keys.role) for turn in turns]
    return [keys.roles.get(name, name) if isinstance(name, str) else name for name in names]


# --- Encoding ---------------------------------------------------------------------------------------------------------


def encode_example(example: Example, tokenizer: Tokenizer, template: str, max_length: int) -> tuple[list, list]:
    """Ids of an example and what each position must predict. -> (tokens, targets), equally long, at most `max_length`

    Targets are already shifted: `targets[n]` is the token after `tokens[n]`, or IGNORE_INDEX where that token is not
    supervised. The last token of the example is a target only. Truncation to `max_length` removes the end token too, so
    a truncated response never teaches the model to end there.
    """
    ids, loss_mask, _ = _render_truncated(example, tokenizer, template, max_length)
    targets = [token if in_loss else IGNORE_INDEX for token, in_loss in zip(ids, loss_mask, strict=True)]
    return ids[:-1], targets[1:]


def _render_truncated(
    example: Example, tokenizer: Tokenizer, template: str, max_length: int
) -> tuple[list, list, bool]:
    """Ids of an example and their loss mask, at most `max_length` + 1 of each, and whether the example was longer."""
    ids, loss_mask = tokenizer.render_conversation(example.messages, template)
    return ids[: max_length + 1], loss_mask[: max_length + 1], len(ids) > max_length + 1


# The arrays of a `Dataset` and their dtypes, in memory and on disk.
ARRAY_DTYPES = {"token_ids": "<i4", "loss_mask": "?", "lengths": "<i8", "num_supervised": "<i8", "example_ids": "S32"}


@dataclass(frozen=True, eq=False)
class Dataset(Sequence):
    """Encoded examples that have supervised tokens. `dataset[i]` is (tokens, targets), int32, as of `encode_example`.

    The arrays hold all examples end to end. They may be memory-mapped files.
    """

    token_ids: np.ndarray  # int32: the ids of each example, one more than its length
    loss_mask: np.ndarray  # bool, as long as token_ids: whether each id is a target
    lengths: np.ndarray  # int64 [N]: tokens of each example
    num_supervised: np.ndarray  # int64 [N]: targets of each example
    example_ids: np.ndarray  # bytes [N]: `Example.id`
    num_truncated: int = 0  # examples cut to max_length
    num_dropped: int = 0  # examples left out, because no supervised token is within max_length

    @classmethod
    def from_encoded(cls, encoded: Sequence[tuple], example_ids: Sequence[str] | None = None) -> "Dataset":
        """A dataset in memory of (tokens, targets); without `example_ids`, the ids are 0, 1, 2, …"""
        ids = [torch.cat([tokens, targets[-1:].clamp(min=0)]) for tokens, targets in encoded]
        loss_mask = [F.pad(targets != IGNORE_INDEX, (1, 0)) for _, targets in encoded]
        names = np.array(example_ids or range(len(encoded))).astype(bytes)
        return cls(torch.cat(ids).int().numpy(), torch.cat(loss_mask).numpy(), *count_tokens(encoded), names)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths + 1)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._ends[i]
        span = slice(end - self.lengths[i] - 1, end)
        ids, loss_mask = torch.from_numpy(self.token_ids[span].copy()), torch.from_numpy(self.loss_mask[span].copy())
        return ids[:-1], ids[1:].masked_fill(~loss_mask[1:], IGNORE_INDEX)

    @property
    def ids(self) -> list[str]:
        """The ids of the examples, in order."""
        return [example_id.decode() for example_id in self.example_ids.tolist()]


def count_tokens(encoded: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """The number of tokens and of targets of each encoded example: two of int64 [N]"""
    if isinstance(encoded, Dataset):
        return encoded.lengths, encoded.num_supervised
    counts = [(len(tokens), int((targets != IGNORE_INDEX).sum())) for tokens, targets in encoded]
    return tuple(np.array(counts, dtype=np.int64).reshape(-1, 2).T)


def encode_examples(examples: Iterable[Example], tokenizer: Tokenizer, template: str, max_length: int) -> Dataset:
    """Encode examples. Those without a supervised token within `max_length` are left out and counted."""
    token_ids, loss_mask, lengths, num_supervised, example_ids = array("i"), bytearray(), [], [], []
    num_truncated = num_dropped = 0
    for example in examples:
        ids, mask, is_truncated = _render_truncated(example, tokenizer, template, max_length)
        if not any(mask[1:]):
            num_dropped += 1
            continue
        num_truncated += is_truncated
        token_ids.extend(ids)
        loss_mask.extend(mask)
        lengths.append(len(ids) - 1)
        num_supervised.append(sum(mask[1:]))
        example_ids.append(example.id)
    columns = (np.array(token_ids), np.frombuffer(loss_mask, np.bool_), lengths, num_supervised, example_ids)
    arrays = [np.asarray(column, dtype) for column, dtype in zip(columns, ARRAY_DTYPES.values(), strict=True)]
    return Dataset(*arrays, num_truncated, num_dropped)


# --- Packing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B examples end to end in one packed row of N tokens, without padding."""

    tokens: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N], IGNORE_INDEX where nothing is supervised
    positions: torch.Tensor  # int64 [N]: 0, 1, 2, … in each example
    cu_seqlens: torch.Tensor  # int32 [B+1]: 0, then the end of each example

    @property
    def supervised(self) -> torch.Tensor:
        """The supervised positions: int64 [S]"""
        return (self.targets != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def segment_ids(self) -> torch.Tensor:
        """The number of the example that each token belongs to, 0 to B−1: int64 [N]"""
        return torch.repeat_interleave(self.cu_seqlens.diff().long())

    def to(self, device) -> "Batch":
        """Copy to `device`, except cu_seqlens: the CPU needs it to launch attention."""
        return Batch(*(to_device(x, device) for x in (self.tokens, self.targets, self.positions)), self.cu_seqlens)


def pack(encoded: Sequence[tuple]) -> Batch:
    """Lay encoded examples end to end.

    Without examples, the row is a single token that predicts nothing: a process without work for a micro-batch still
    has to take part in the passes of a sharded model.

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


# --- The order of an epoch, and λ -------------------------------------------------------------------------------------
# Each is a pure function of (seed, epoch) or (seed, step), so that a run can continue at any step.

# The random stream of each purpose. They start at 1, because NumPy seeds [0, 2] and [0, 2, 0] alike.
LAMBDA_STREAM, DEMO_STREAM, ORDER_STREAM = range(1, 4)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of the examples: int64 [num_examples]"""
    return np.random.default_rng([seed, epoch, ORDER_STREAM]).permutation(num_examples)


def paired_order(confident, unconfident, seed: int, epoch: int) -> np.ndarray:
    """A random order of all examples in which each confident example is followed by an unconfident one: int64 [N]

    So examples 0 and 1, 2 and 3, … of the order are pairs, other pairs in each epoch. The surplus of the larger half
    comes last. A batch holds an even number of examples and never separates a pair.

    >>> paired_order([10, 11], [20, 21, 22], seed=0, epoch=0).tolist()
    [11, 20, 10, 21, 22]
    """
    rng = np.random.default_rng([seed, epoch, ORDER_STREAM])
    c, u = rng.permutation(np.asarray(confident)), rng.permutation(np.asarray(unconfident))
    n = min(len(c), len(u))
    return np.concatenate([np.stack([c[:n], u[:n]], axis=1).reshape(-1), c[n:], u[n:]])


def sample_lambda(num_pairs: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """λ ~ Beta(α, α) for each pair in the global batch of a step: float32 [num_pairs]"""
    rng = np.random.default_rng([seed, step, LAMBDA_STREAM])
    return torch.from_numpy(rng.beta(alpha, alpha, num_pairs).astype(np.float32))


# --- Global batches and micro-batches ---------------------------------------------------------------------------------

MICRO_BATCH_TOKENS = 8192  # the default number of tokens in a forward pass


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The number of optimizer steps in an epoch; the last one may have fewer examples."""
    return math.ceil(num_examples / batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass."""

    batch: Batch
    supervised: torch.Tensor  # int64 [S]: the supervised positions of the batch
    example_index: torch.Tensor  # int64 [S]: the number in the dataset of the example that each belongs to
    mix_indices: tuple  # index_c and index_u of `mixup.pair_positions`, int64 [M] each, always in main memory
    lam: torch.Tensor  # float32 [M]: λ at each mixed position

    def to(self, device) -> "MicroBatch":
        """Copy to `device` without waiting for it."""
        supervised, example_index, lam = (to_device(x, device) for x in (self.supervised, self.example_index, self.lam))
        return MicroBatch(self.batch.to(device), supervised, example_index, self.mix_indices, lam)


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of this process for one optimizer step, and the counts of all processes together."""

    micro_batches: list[MicroBatch]
    example_indices: np.ndarray  # of all processes: the numbers in the dataset
    num_supervised: int  # of all processes: the denominator of L_NTP
    num_mixed: int  # of all processes: the denominator of L_Mixup
    num_tokens: int  # of all processes

    def to(self, device) -> "GlobalBatch":
        """Copy the micro-batches to `device` without waiting for it."""
        return replace(self, micro_batches=[micro_batch.to(device) for micro_batch in self.micro_batches])


def build_micro_batch(encoded: Sequence[tuple], indices: np.ndarray, lam: torch.Tensor) -> MicroBatch:
    """Pack the examples `indices` [B]. Of these, 0 and 1, 2 and 3, … are mixed, one pair for each λ in lam [P]."""
    batch = pack([encoded[i] for i in indices])
    supervised = batch.supervised
    example_index = torch.from_numpy(indices)[batch.segment_ids[supervised]]
    pairs = torch.arange(2 * len(lam)).view(-1, 2)  # [P, 2]: (0, 1), (2, 3), …
    *mix_indices, pair = pair_positions(batch.targets, batch.cu_seqlens, pairs)
    return MicroBatch(batch, supervised, example_index, tuple(mix_indices), lam[pair])


def build_batch(
    dataset: Dataset,
    indices: np.ndarray,
    lam: torch.Tensor,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> GlobalBatch:
    """Build the part of a global batch that one process computes on.

    `indices` are the examples of the global batch. Of these, 0 and 1, 2 and 3, … are mixed (confident, unconfident),
    one pair for each λ in lam [P]; the others are trained on with NTP alone. The two of a pair share a micro-batch.
    """
    lengths, num_supervised = dataset.lengths[indices], dataset.num_supervised[indices]
    assignment = assign_micro_batches(lengths.tolist(), len(lam), micro_batch_tokens, world_size)
    micro_batches = []
    for units in assignment[rank::world_size]:
        units = sorted(units, key=len, reverse=True)  # pairs first
        members = [i for unit in units for i in unit]
        pair_ids = torch.tensor([unit[0] // 2 for unit in units if len(unit) == 2], dtype=torch.int64)
        micro_batches.append(build_micro_batch(dataset, indices[members], lam[pair_ids]))
    num_mixed = num_supervised[: 2 * len(lam)].reshape(-1, 2).min(axis=1).sum()  # Σ min(N^c, N^u)
    return GlobalBatch(micro_batches, indices, int(num_supervised.sum()), int(num_mixed), int(lengths.sum()))


def assign_micro_batches(lengths: list[int], num_pairs: int, max_tokens: int, world_size: int) -> list[list[tuple]]:
    """Assign examples to micro-batches, the same number for each process; some may be empty.

    Examples 0 and 1, 2 and 3, … stay together, `num_pairs` times; each of the others is on its own.

    >>> assign_micro_batches([30, 10, 20, 20, 5], num_pairs=2, max_tokens=50, world_size=1)
    [[(0, 1), (4,)], [(2, 3)]]
    """
    units = [(2 * p, 2 * p + 1) for p in range(num_pairs)] + [(i,) for i in range(2 * num_pairs, len(lengths))]
    micro_batches = make_micro_batches([sum(lengths[i] for i in unit) for unit in units], max_tokens, world_size)
    return [[units[u] for u in micro_batch] for micro_batch in micro_batches]


def make_micro_batches(sizes: Sequence[int], max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Distribute items of `sizes` tokens over micro-batches of at most `max_tokens` tokens of about equal size.

    The number of micro-batches is a multiple of `multiple`, and some may be empty. An item larger than `max_tokens` has
    a micro-batch to itself. Greedy: the largest item first, each to the micro-batch with the fewest tokens so far.

    >>> make_micro_batches([30, 10, 20, 40], max_tokens=50)
    [[3, 1], [0, 2]]
    """
    count = multiple * max(1, math.ceil(sum(sizes) / (multiple * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            load, b = heapq.heappop(loads)
            bins[b].append(item)
            heapq.heappush(loads, (load + sizes[item], b))
        if all(load <= max_tokens or len(bins[b]) == 1 for load, b in loads):
            return bins
        count += multiple * max(1, count // (50 * multiple))  # retry with 2 % more
