"""Records of data files by a model's confidence in them: the extremes to look at, the most confident ones to keep.

Below, `dynamics` is a `confidence.TrainingDynamics`, and `by` is `probability` or `perplexity`. Files are read in
chunks: once for the ids of all records, and again for the records that are shown or kept.
"""

import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Example, content_id, to_example, unique_ids
from infra.distributed import print0
from infra.files import atomic_write
from infra.records import Reading, as_object, describe, find_files, json_lines, split_files
from infra.terminal import printable

NUM_NAMED = 5  # records without a score
SHOWN_CHARACTERS = 600  # of a message
NUM_LABELS = 3  # of the least, and of the most, confident examples in the data map
LABEL_CHARACTERS = 34  # of a prompt and of a response there


# --- Flags ------------------------------------------------------------------------------------------------------------


def add_selection_flags(parser) -> None:
    """Add the flags that say which records to show or keep."""
    group = parser.group("selection")
    group.add_argument("--show", type=parser.positive, metavar="N", help="print the N least confident examples")
    group.add_argument("--most", action="store_true", help="with --show: the most confident ones")
    group.add_argument("--keep", type=parser.number(0, 1), metavar="SHARE", help="write the most confident records")
    group.add_argument(
        "--by", choices=("probability", "perplexity"), help="measure of confidence (default: probability)"
    )


def check_flags(parser, args) -> None:
    """Exit with one line if flags of confidence.py are missing or do not go together."""
    selects = args.show is not None or args.keep is not None
    if not args.scores and (selects or None in (args.checkpoints, args.data, args.output)):
        parser.error("give --checkpoints, --data and --output; or --scores and --plot, --show or --keep")
    if args.scores and args.checkpoints:
        parser.error("--scores: takes the place of --checkpoints")
    if args.scores and not (selects or args.plot is not None):
        parser.error("--scores: needs --plot, --show or --keep")
    if selects and not args.data:
        parser.error("--show, --keep: need --data, the examples that were scored")
    if args.scores and (args.keep is None) != (args.output is None):
        parser.error("--output: is for --keep, while --show prints" if args.output else "--keep: needs --output")
    if args.keep is not None and args.output.endswith((".parquet", ".gz", ".json")):
        parser.error(f"--output {args.output}: is written as JSON lines; call it .jsonl")
    if args.most and args.show is None:
        parser.error("--most: needs --show")
    for name in ("template", "max_length", "micro_batch_tokens", "dtype", "cache"):
        if args.scores and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: is for scoring with --checkpoints, and --scores has scores already")
    if args.by and not (selects or args.plot is not None):
        parser.error("--by: needs --show, --keep or --plot")


# --- Records and their scores -----------------------------------------------------------------------------------------


class ScoredRecords(NamedTuple):
    """The records of data files that have scores: R of them, in the order of the files."""

    name: str  # of the data in messages
    files: list[Path]
    numbers: np.ndarray  # int64 [R]: the number of each among all records of the files, from 0
    score_index: np.ndarray  # int64 [R]: the index of its scores

    def ranked(self, scores: np.ndarray) -> np.ndarray:
        """The most confident records first, of equal ones the earlier, as in the split: int64 [R]"""
        return np.argsort(-scores[self.score_index], kind="stable")


def match_scores(data, ids: list[str], skip_bad_records: bool) -> ScoredRecords:
    """Find the scores `ids` of the records of data files, and print to stderr what has none.

    A repeat of a record that was scored once has the score of the first. Raises FileNotFoundError, or ValueError if the
    files cannot be read, have bad records (unless these are to be skipped), or none of their records has a score.
    """
    files, name = find_files(data), describe(data)
    index_of = {example_id: index for index, example_id in enumerate(ids)}
    numbers, score_index, reading, counts = array("q"), array("q"), Reading(), Counter()
    for chunk in split_files(files):
        for example in reading.parse(chunk, to_example):
            (example_id,) = unique_ids([example.id], counts)
            numbers.append(reading.num_records - 1)
            score_index.append(index_of.get(example_id, index_of.get(example.id, -1)))
    reading.check(name, skip_bad_records)
    numbers, score_index = np.array(numbers, dtype=np.int64), np.array(score_index, dtype=np.int64)
    has_score = score_index >= 0
    if not has_score.any():
        raise ValueError(f"{name}: none of its {reading.num_records:,} records has a score; were others scored?")
    records = ScoredRecords(name, files, numbers[has_score], score_index[has_score])
    print0(f"{name}: {reading.num_records:,} records, {has_score.sum():,} of them with a score", sys.stderr)
    for line in reading.summary():
        print0(f"{name}: {line}", sys.stderr)
    if len(unscored := numbers[~has_score]):
        places = [place for place, _ in _read(files, unscored[:NUM_NAMED])]
        more = f" and {len(unscored) - NUM_NAMED:,} more" if len(unscored) > NUM_NAMED else ""
        why = "no response to learn within the --max_length of the scores, or not in the data that was scored"
        print0(f"{name}: {len(unscored):,} left out without a score ({why}): {', '.join(places)}{more}", sys.stderr)
    if other := len(ids) - len(np.unique(records.score_index)):
        print0(f"{other:,} of {len(ids):,} scores are of other records", sys.stderr)
    return records


def _read(files: list[Path], numbers: np.ndarray) -> Iterator[tuple]:
    """(place, record) of the records with these numbers, in the order of the files."""
    return compress((record for chunk in split_files(files) for record in chunk.records()), _mask(numbers))


def _mask(numbers: np.ndarray) -> np.ndarray:
    """Whether each record, up to the last one of `numbers`, is one of them: bool"""
    mask = np.zeros(numbers.max() + 1, dtype=bool)
    mask[numbers] = True
    return mask


def _read_examples(records: ScoredRecords, chosen: list[int]) -> list[tuple[str, Example]]:
    """(place, example) of the records `chosen`, in that order."""
    found = [(place, to_example(as_object(record))) for place, record in _read(records.files, records.numbers[chosen])]
    return [found[i] for i in np.argsort(np.argsort(chosen))]


# --- Looking at them, keeping them ------------------------------------------------------------------------------------


def extreme_records(records: ScoredRecords, dynamics, by: str, count: int, most: bool) -> dict[int, int]:
    """The `count` least, or most, confident records that differ, in order -> how often each is there."""
    contents = [content_id(dynamics.ids[index]) for index in records.score_index]
    ranked = records.ranked(dynamics.score(by))
    first_of = {}  # content -> its most extreme record
    for record in ranked if most else ranked[::-1]:
        first_of.setdefault(contents[record], int(record))
        if len(first_of) == count:
            break
    copies = Counter(content for content in contents if content in first_of)
    return {record: copies[content] for content, record in first_of.items()}


def show_records(records: ScoredRecords, dynamics, by: str, count: int, most: bool) -> Iterator[str]:
    """The least, or most, confident records as text, each with its scores and its place. Repeats are shown once."""
    copies = extreme_records(records, dynamics, by, count, most)
    probability, perplexity = dynamics.confidence, dynamics.mean_perplexity
    examples = _read_examples(records, list(copies))
    for number, ((record, n), (place, example)) in enumerate(zip(copies.items(), examples, strict=True), start=1):
        index = records.score_index[record]
        scores = f"probability {probability[index]:.4f}  perplexity {perplexity[index]:,.2f}"
        lines = [f"{number}.  {scores}  {place}" + (f"  ({n} copies)" if n > 1 else "")]
        for message in example.messages:
            text = message["content"]
            cut = f" … ({len(text):,} characters)" if len(text) > SHOWN_CHARACTERS else ""
            text = printable(text[:SHOWN_CHARACTERS])
            lines.append(f"    {message['role']}: " + (text + cut).replace("\n", "\n        "))
        yield "\n".join(lines) + "\n"


def label_records(records: ScoredRecords, dynamics, by: str) -> dict[int, str]:
    """Short names for the least and the most confident records: the index of their scores -> prompt → response"""
    extremes = (extreme_records(records, dynamics, by, NUM_LABELS, most) for most in (False, True))
    chosen = list(dict.fromkeys(record for found in extremes for record in found))  # of few records, the two overlap
    labels = {}
    for record, (_, example) in zip(chosen, _read_examples(records, chosen), strict=True):
        texts = [" ".join(message["content"].split()) for message in example.messages[-2:]]
        short = [text[: LABEL_CHARACTERS - 1] + "…" if len(text) > LABEL_CHARACTERS else text for text in texts]
        labels[int(records.score_index[record])] = " → ".join(short)
    return labels


def keep_records(records: ScoredRecords, dynamics, by: str, share: float, output: Path) -> None:
    """Write the most confident share of the records as JSON lines, in the order of the files.

    A line of a .jsonl file stays as it is, byte for byte. ValueError if the share is less than one record.
    """
    count = round(share * len(records.numbers))
    if count == 0:
        raise ValueError(f"--keep {share}: of {len(records.numbers):,} records that is none")
    scores, ranked = dynamics.score(by)[records.score_index], records.ranked(dynamics.score(by))
    lines = (line for chunk in split_files(records.files) for line in json_lines(chunk))
    with atomic_write(output) as tmp, open(tmp, "wb") as kept:
        if sum(bool(kept.write(line)) for line in compress(lines, _mask(records.numbers[ranked[:count]]))) != count:
            raise ValueError(f"{records.name}: has changed while it was read; run the command again")
    cut = abs(scores[ranked[count - 1]])
    bound = f"{by} of {'at most' if by == 'perplexity' else 'at least'} {cut:,.4f}"
    left_out = f"{len(scores) - count:,} less confident left out"
    print0(f"{output}: {count:,} records kept, with a {bound}; {left_out}", sys.stderr)
