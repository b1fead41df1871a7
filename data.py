"""Data on its way from a file to an optimizer step.

A record of a file → `Example` → ids and targets in a `Dataset` → `Batch`, a packed row → `MicroBatch` → `GlobalBatch`.
`infra.cache.load_dataset` takes the first two steps for whole files, with `to_example` and `encode_examples`.

In order: examples (`load_examples`), encoding (`encode_example`, `Dataset`), packing (`pack`), the order of an epoch
and λ (`paired_order`, `sample_lambda`), the batch of a step and its micro-batches (`build_batch`).

Letters: N examples of a dataset, B examples in a packed row of T tokens, S supervised positions, P pairs, M mixed
positions; N^c and N^u are the supervised tokens of the two examples of a pair.
"""

import hashlib
import heapq
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from infra.formats import to_messages
from infra.records import read_records
from mixup import IGNORE_INDEX, pair_positions, to_device
from tokenizer import Tokenizer

# --- Examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation: `messages` of {"role", "content"}, and an `id` computed from them, the same in every run.

    An assistant message with "weight": 0 is not learned. `notes` say what of the record is left out.
    """

    id: str
    messages: list[dict]
    notes: tuple[str, ...] = ()


def to_example(record: dict) -> Example:
    """Read a record of any format (infra/formats.py). Equal ones get equal ids. ValueError names the key at fault."""
    messages, notes = to_messages(record)
    # White space around a turn is no part of it, but around a plain text it is.
    content = [m if m["role"] == "text" else {**m, "content": m["content"].strip()} for m in messages]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Example(digest, messages, tuple(notes))


def load_examples(data, skip_bad_records: bool = False) -> list[Example]:
    """Read the examples of a data file, of a folder or a pattern of them, or of a list of these.

    The keys of a record tell its format. Raises FileNotFoundError, or ValueError with the file, the line (or the number
    of the record or row) and what is wrong.
    """
    examples = read_records(data, to_example, skip_bad_records)
    ids = unique_ids((example.id for example in examples), Counter())
    return [replace(example, id=example_id) for example_id, example in zip(ids, examples, strict=True)]


def unique_ids(ids: Iterable[str], counts: Counter) -> Iterator[str]:
    """Append a number to each id that `counts` has seen before: a, b, a → a, b, a-2."""
    for example_id in ids:
        counts[example_id] += 1
        yield example_id if counts[example_id] == 1 else f"{example_id}-{counts[example_id]}"


def content_id(example_id: str) -> str:
    """An id without the number of a repeat: a-2 → a"""
    return example_id.partition("-")[0]


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
    """Encoded examples that have supervised tokens.

    `dataset[i]` is what `encode_example` returns, (tokens, targets), as int32 tensors. The arrays hold all examples end
    to end, and may be memory-mapped files.
    """

    token_ids: np.ndarray  # int32: the ids of each example, one more than its length
    loss_mask: np.ndarray  # bool, as long as token_ids: whether each id is a target
    lengths: np.ndarray  # int64 [N]: tokens of each example
    num_supervised: np.ndarray  # int64 [N]: supervised tokens of each example
    example_ids: np.ndarray  # bytes [N]: `Example.id`
    num_truncated: int = 0  # examples cut to max_length
    num_dropped: int = 0  # examples left out, because no supervised token is within max_length
    bad_records: Sequence = ()  # of `infra.records.BadRecord`: left out, because they cannot be read

    @classmethod
    def from_encoded(cls, encoded: Sequence[tuple], example_ids: Sequence[str] | None = None) -> "Dataset":
        """A dataset in memory of (tokens, targets); without `example_ids`, the ids are 0, 1, 2, …"""
        encoded = [(torch.as_tensor(tokens), torch.as_tensor(targets)) for tokens, targets in encoded]
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
    def has_texts(self) -> bool:
        """Whether there are plain texts among the examples, which have no prompt: all of their tokens are predicted."""
        return bool((self.num_supervised == self.lengths).any())

    @property
    def ids(self) -> list[str]:
        """The ids of the examples, in order."""
        return [example_id.decode() for example_id in self.example_ids.tolist()]


def count_tokens(encoded: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """The number of tokens and of supervised tokens of each encoded example: two of int64 [N]"""
    if isinstance(encoded, Dataset):
        return encoded.lengths, encoded.num_supervised
    counts = [(len(tokens), int((torch.as_tensor(targets) != IGNORE_INDEX).sum())) for tokens, targets in encoded]
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
    """B examples end to end in one packed row of T tokens, without padding."""

    tokens: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T], IGNORE_INDEX where nothing is supervised
    positions: torch.Tensor  # int64 [T]: 0, 1, 2, … in each example
    cu_seqlens: torch.Tensor  # int32 [B+1]: 0, then the end of each example

    @property
    def supervised(self) -> torch.Tensor:
        """The supervised positions: int64 [S]"""
        return (self.targets != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def segment_ids(self) -> torch.Tensor:
        """The index in the row of the example that each token belongs to, 0 to B−1: int64 [T]"""
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
# Each is a pure function of (seed, epoch) or (seed, step), so that a run can resume at any step.

# The random stream of each purpose. They start at 1, because NumPy seeds [0, 2] and [0, 2, 0] alike.
LAMBDA_STREAM, DEMO_STREAM, ORDER_STREAM = range(1, 4)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of the examples: int64 [num_examples]"""
    return np.random.default_rng([seed, epoch, ORDER_STREAM]).permutation(num_examples)


def paired_order(confident, unconfident, seed: int, epoch: int) -> np.ndarray:
    """A random order of all examples in which each confident example is followed by an unconfident one: int64 [N]

    So examples 0 and 1, 2 and 3, … of the order are pairs, other pairs in each epoch. The surplus of the larger half
    comes last: at most one example, if the halves are those of `confidence.split_by_confidence`. A batch holds an even
    number of examples and never separates a pair.

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

MICRO_BATCH_TOKENS = 8192  # by default, the most tokens in a forward pass, if no pair is longer


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The number of optimizer steps in an epoch; the last one may have fewer examples."""
    return math.ceil(num_examples / batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass."""

    row: Batch
    supervised: torch.Tensor  # int64 [S]: the supervised positions of the row
    example_index: torch.Tensor  # int64 [S]: the index in the dataset of the example that each belongs to
    index_c: torch.Tensor  # int64 [M]: which of the S supervised positions are mixed; always on the CPU
    index_u: torch.Tensor  # int64 [M]: and with which of them (`mixup.pair_positions`)
    lam: torch.Tensor  # float32 [M]: λ at each mixed position

    def to(self, device) -> "MicroBatch":
        """Copy to `device` without waiting for it."""
        moved = {name: to_device(getattr(self, name), device) for name in ("supervised", "example_index", "lam")}
        return replace(self, row=self.row.to(device), **moved)


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of this process for one optimizer step, and the counts of all processes together."""

    micro_batches: list[MicroBatch]
    example_indices: np.ndarray  # of all processes: indices in the dataset
    num_supervised: int  # of all processes: the denominator of L_NTP
    num_mixed: int  # of all processes: the denominator of L_Mixup
    num_tokens: int  # of all processes

    def to(self, device) -> "GlobalBatch":
        """Copy the micro-batches to `device` without waiting for it."""
        return replace(self, micro_batches=[micro_batch.to(device) for micro_batch in self.micro_batches])


def build_micro_batch(encoded: Sequence[tuple], indices: np.ndarray, lam: torch.Tensor) -> MicroBatch:
    """Pack the examples `indices` [B]. Of these, 0 and 1, 2 and 3, … are mixed, one pair for each λ in lam [P]."""
    row = pack([encoded[i] for i in indices])
    supervised = row.supervised
    example_index = torch.from_numpy(indices)[row.segment_ids[supervised]]
    pairs = torch.arange(2 * len(lam)).view(-1, 2)  # [P, 2]: (0, 1), (2, 3), …
    index_c, index_u, pair = pair_positions(row.targets, row.cu_seqlens, pairs)
    return MicroBatch(row, supervised, example_index, index_c, index_u, lam[pair])


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
    micro_batches = balanced_partitions([sum(lengths[i] for i in unit) for unit in units], max_tokens, world_size)
    return [[units[u] for u in micro_batch] for micro_batch in micro_batches]


def balanced_partitions(sizes: Sequence[int], max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Divide the indices of items of `sizes` tokens into parts of at most `max_tokens`, about equal in tokens.

    The number of parts is a multiple of `multiple`, and some may be empty. An item larger than `max_tokens` has a part
    to itself. Greedy: the largest item first, each to the part with the fewest tokens so far.

    >>> balanced_partitions([30, 10, 20, 40], max_tokens=50)
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
