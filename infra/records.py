"""Records of data files (.jsonl, .json, .parquet and .gz): which files, how each is read in chunks, which are bad.

A file is known by its content, not by its name. What the keys of a record mean is in infra/formats.py.
"""

import base64
import contextlib
import glob
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from infra.files import check_file, check_no_pointer, file_sha256, parse_json
from infra.terminal import printable

# --- Files ------------------------------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".jsonlines", ".ndjson", ".json", ".parquet", ".pq", ".gz")
# Of data files that are not read.
UNREAD_SUFFIXES = (*".csv .tsv .arrow .feather .zst .zstd .xz .bz2 .zip".split(),)
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def find_files(data) -> list[Path]:
    """The files of `data`: a file, a folder (its files by name), a pattern such as `part-*.jsonl`, or a list of these.

    Raises FileNotFoundError or ValueError with what is wrong.
    """
    if isinstance(data, (list, tuple)):
        return [file for part in data for file in find_files(part)]
    path = Path(data)
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        check_file(path)
        return [path]
    if files := sorted(Path(name) for name in glob.glob(str(data), recursive=True) if Path(name).is_file()):
        return files
    raise FileNotFoundError(f"{path}: " + ("no file matches" if glob.has_magic(str(data)) else "not found"))


_SPLIT_IN_NAME = re.compile(
    r"(?<![a-z])(train|test|val|eval|dev|held.?out|hold.?out)"
    r"(s|set|ing|id|idate|idation|uate|uation|data|file|split)?(?![a-z])"
)


def _split_in_name(file: Path) -> str | None:
    """The split that a file is of, by its name: test of medqa_test.jsonl, of testData.json"""
    found = _SPLIT_IN_NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", file.name).lower())
    return found and found[1]


def _data_files(files: Iterable[Path]) -> list[Path]:
    """Those that are data, by name, also if they are not read."""
    files = [f for f in sorted(files) if f.suffix.lower() in SUFFIXES + UNREAD_SUFFIXES]
    return [f for f in files if f.name not in METADATA_FILES and not f.name.startswith(".")]  # macOS's ._train.jsonl


def _files_of_folder(folder: Path) -> list[Path]:
    """The data files of a folder. Those of several splits are refused: to train on a test set is never meant."""
    files = _data_files(folder.iterdir())
    if unread := [f for f in files if f.suffix.lower() in UNREAD_SUFFIXES]:
        raise ValueError(f"{folder}: {unread[0].name} is not read; convert or unpack it, or give the other files")
    if not files:
        below = sorted({f.parent for f in _data_files(folder.rglob("*"))})
        hint = f"; there are some in {', '.join(map(str, below[:3]))}" if below else ""
        raise FileNotFoundError(f"{folder}: no file in it ends in {', '.join(SUFFIXES)}{hint}")
    found = [_split_in_name(f) for f in files]
    splits = sorted({*found} - {None})
    if len(splits) > 1:
        one = "train" if "train" in splits else splits[0]
        shards = {
            re.sub(r"[-_.]?\d+(-of-\d+)?$", "", _bare_name(f))
            for f, split in zip(files, found, strict=True)
            if split == one
        }
        given = " or ".join(f"'{folder}/{name}*'" for name in sorted(shards))
        raise ValueError(f"{folder}: has files of several splits ({', '.join(splits)}); give {given}")
    if splits and splits != ["train"] and None in found:
        named, other = files[found.index(splits[0])].name, files[found.index(None)].name
        raise ValueError(f"{folder}: {named} may be of another split than {other}; give the files themselves")
    for one, other in pairwise(sorted(files, key=_bare_name)):
        if _bare_name(one) == _bare_name(other):
            raise ValueError(f"{folder}: has both {one.name} and {other.name}; remove one of them")
    return files


def _bare_name(file: Path) -> str:
    """The name of a file without all suffixes of data files: train of train.jsonl.gz"""
    while file.suffix.lower() in SUFFIXES:
        file = file.with_suffix("")
    return file.name


def data_checksums(data) -> list[str]:
    """The SHA-256 of each file of `data`."""
    return [file_sha256(file) for file in find_files(data)]


def describe(data) -> str:
    """A name for `data` in messages: its path, or how many files there are."""
    if not isinstance(data, (list, tuple)):
        return str(data)
    return str(data[0]) if len(data) == 1 else f"{data[0]} and {len(data) - 1} more"


# --- Chunks of a file -------------------------------------------------------------------------------------------------

CHUNK_BYTES, CHUNK_ROWS = 2**22, 4096
MAX_CHUNKS = 16  # of a row group, which is read as a whole for each of them


class Unreadable(NamedTuple):
    """What stands where a record should be."""

    text: str
    reason: str


class Lines(NamedTuple):
    """Whole lines of a file, each of which holds a record."""

    path: Path
    first: int  # the number of the first line
    content: bytes

    def records(self) -> Iterator[tuple]:
        """(place, record) of each line that is not empty; a line that is no JSON is an `Unreadable`."""
        for number, line in enumerate(self.content.split(b"\n"), start=self.first):
            if line.strip():
                try:
                    record = parse_json(line)
                except ValueError as error:
                    record = Unreadable(line.decode(errors="replace"), f"{error}; one complete object a line")
                yield f"{self.path}:{number}", record


class Document(NamedTuple):
    """A file that is one JSON value: a list of records, or an object that holds one."""

    path: Path

    def records(self) -> Iterator[tuple]:
        """(place, record) of each record. ValueError if the file is not JSON."""
        with _open(self.path) as file:
            content = file.read()
        try:
            value = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if isinstance(value, dict):
            lists = _lists_of_records(value)
            if len(lists) > 1:
                raise ValueError(f"{self.path}: has several lists, {', '.join(lists)}; write each to a file of its own")
            value = next(iter(lists.values()), [value])
        for number, record in enumerate(value, start=1):
            yield f"{self.path}: record {number}", record


class Rows(NamedTuple):
    """Rows of a row group of a parquet file."""

    path: Path
    row_group: int
    start: int  # in the row group
    count: int
    first: int  # the number of the first row in the file

    def records(self) -> Iterator[tuple]:
        """(place, record) of each row."""
        with _parquet(self.path) as file:
            table = file.read_row_group(self.row_group, use_threads=False).slice(self.start, self.count)
            columns = [self._values(*named) for named in zip(table.column_names, table.columns, strict=True)]
        for number, values in enumerate(zip(*columns, strict=True), start=self.first):
            yield f"{self.path}: row {number}", dict(zip(table.column_names, values, strict=True))

    def _values(self, name: str, column) -> list:
        """The values of a column as Python objects; numbers for dates that Python does not have."""
        kind = str(column.type)
        if kind == "float":  # 0.1 stays 0.1
            column = column.cast("string").cast("double")
        elif kind == "timestamp[ns]":  # Python's have microseconds
            column = column.cast("string")
        try:
            return column.to_pylist()
        except (ValueError, OverflowError):  # beyond the year 9999, nanoseconds, an unknown time zone
            if column.type.num_fields:
                raise ValueError(f"{self.path}: column {name} has dates that Python does not have") from None
            return column.cast("int32" if kind.startswith("date32") else "int64").to_pylist()


Chunk = Lines | Document | Rows


def split_file(path: Path) -> Iterator[Chunk]:
    """Divide a data file into chunks that can be read alone. ValueError says what a file is that holds no records."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"PAR1":
        yield from _split_parquet(path)
        return
    if {".csv", ".tsv"} & {*map(str.lower, path.suffixes)}:
        table, lines = "read_csv(FILE, dtype=str, keep_default_na=False)", "orient='records', lines=True"
        convert = f"pandas.{table}.to_json('data.jsonl', {lines})"
        raise ValueError(f"{path}: tables in text are not read; convert it, for instance by {convert}")
    for signature, what in _NO_TEXT.items():
        if start.startswith(signature):
            raise ValueError(f"{path}: {what}")
    check_no_pointer(path)
    with _open(path) as file:
        content, first = file.read(CHUNK_BYTES) + file.readline(), 1
        content = content.removeprefix(b"\xef\xbb\xbf")
        if _is_document(path, content, is_whole=not (rest := file.read(64)).strip()):
            yield Document(path)
            return
        while content:
            yield Lines(path, first, content)
            first += content.count(b"\n")
            content = rest + file.read(CHUNK_BYTES) + file.readline()
            rest = b""


def split_files(data) -> Iterator[Chunk]:
    """The chunks of all files of `data`, in order."""
    return (chunk for file in find_files(data) for chunk in split_file(file))


_NO_TEXT = {  # how files begin that hold no text in UTF-8
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"ARROW1": "an Arrow file; save it as .parquet or .jsonl",
    b"\xff\xff\xff\xff": "an Arrow file; save it as .parquet or .jsonl",
}


@contextlib.contextmanager
def _open(path: Path):
    """Open a file that may be compressed with gzip, whatever it is called. ValueError if it is damaged."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if is_gzip else open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the compressed file is damaged ({error})") from None


def _is_document(path: Path, content: bytes, is_whole: bool) -> bool:
    """Whether a file is one JSON value over its lines, and not one a line."""
    first, _, rest = content.lstrip().partition(b"\n")
    try:
        value = parse_json(first)
    except ValueError:  # no value on its own: the first line of a longer one, or a bad record
        continues = first.rstrip()[-1:] in (b"{", b"[", b",") or ".json" in map(str.lower, path.suffixes)
        second = rest.lstrip().partition(b"\n")[0]
        return first[:1] == b"[" or (first[:1] == b"{" and continues and not _is_object(second))
    if not is_whole or rest.strip():
        return False
    if isinstance(value, dict):
        return bool(_lists_of_records(value))
    return _is_list_of((dict, list), value) and not is_conversation(value)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _lists_of_records(value: dict) -> dict[str, list]:
    """The lists of records that an object holds, one of them under a usual key; none if it is a record itself."""
    if value.keys() & {"messages", "conversations", "instruction", "prompt", "question", "query", "problem", "text"}:
        return {}
    usual = {"data", "train", "validation", "valid", "eval", "dev", "test", "records", "examples", "rows"}
    lists = {key: items for key, items in value.items() if items and _is_list_of(dict, items)}
    lists = {key: items for key, items in lists.items() if not is_conversation(items)}
    return lists if usual & lists.keys() else {}


def is_conversation(value) -> bool:
    """Whether a value is a list of messages, which is a record, and not a list of records."""
    keys = ({"role", "from"}, {"content", "value"})  # one of each
    return bool(value) and _is_list_of(dict, value) and all(turn.keys() & names for turn in value for names in keys)


def _is_list_of(kinds, value) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


@contextlib.contextmanager
def _parquet(path: Path):
    """Open a parquet file. What pyarrow raises becomes a ValueError that names the file."""
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: a parquet file needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: the parquet file is damaged ({str(error).splitlines()[0]})") from None


def _split_parquet(path: Path) -> Iterator[Rows]:
    first = 1
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    for row_group, size in enumerate(sizes):
        count = max(CHUNK_ROWS, math.ceil(size / MAX_CHUNKS))
        for start in range(0, size, count):
            yield Rows(path, row_group, start, count, first + start)
        first += size


def json_lines(chunk: Chunk) -> Iterator[bytes]:
    """Each record as a line of JSON; lines that are in the file stay as they are."""
    if isinstance(chunk, Lines):
        return (line + b"\n" for line in chunk.content.split(b"\n") if line.strip())
    return (to_json_line(record) for _, record in chunk.records())


def to_json_line(value) -> bytes:
    """A value as a line of JSON in UTF-8. Half characters stay escaped; dates and bytes of parquet files are texts."""
    return (json.dumps(value, ensure_ascii=False, default=to_text) + "\n").encode(errors="backslashreplace")


def to_text(value) -> str:
    """The text that stands in JSON for a value of another type: base64 for bytes, for others what Python prints."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


# --- Records ----------------------------------------------------------------------------------------------------------


NUM_REASONS = 8  # that a summary names
_NUMBERS_OF_A_RECORD = re.compile(r"(?<=\[)\d+(?=\])|(?<=line )\d+|(?<=column )\d+|(?<=char )\d+")


class BadRecord(NamedTuple):
    """A record that cannot be read."""

    file: str
    place: str
    reason: str
    record: str  # as text


def as_object(record) -> dict:
    """A record as an object; a list of messages stands for {"messages": …}. ValueError for anything else."""
    record = {"messages": record} if is_conversation(record) else record
    if not isinstance(record, dict):
        raise ValueError(f"an object with keys is expected, not {type(record).__name__}")
    return record


@dataclass
class Reading:
    """What was found while reading records: how many there are, which are bad, what was ignored."""

    num_records: int = 0  # good and bad ones
    counts: Counter = field(default_factory=Counter)  # records of each file
    bad: list[BadRecord] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)  # what was left out of how many records

    def add(self, other: "Reading") -> None:
        """Add what was found in a later chunk."""
        self.num_records += other.num_records
        self.counts += other.counts
        self.bad += other.bad
        self.notes += other.notes

    def parse(self, chunk: Chunk, parse: Callable) -> Iterator:
        """Yield `parse(record)` of the good records of a chunk; a ValueError of `parse` makes a record bad."""
        file = str(chunk.path)
        for place, record in chunk.records():
            self.num_records += 1
            self.counts[file] += 1
            if isinstance(record, Unreadable):
                self.bad.append(BadRecord(file, place, record.reason, record.text))
                continue
            try:
                yield parse(as_object(record))
            except ValueError as error:
                text = to_json_line(record).decode().rstrip("\n")
                self.bad.append(BadRecord(file, place, str(error), text))

    def summary(self) -> list[str]:
        """Lines that say what was left out or ignored, of how many records."""
        ignored = {note: n for note, n in self.notes.items() if note.startswith("ignored key ")}
        reasons = Counter(_NUMBERS_OF_A_RECORD.sub("N", bad.reason) for bad in self.bad)
        named = dict(reasons.most_common(NUM_REASONS))
        if len(reasons) > NUM_REASONS:
            named[f"{len(reasons) - NUM_REASONS} other reasons"] = reasons.total() - sum(named.values())
        lines = [f"{n:,} of {self.num_records:,} records skipped: {reason}" for reason, n in named.items()]
        lines += [
            f"{note} (in {n:,} of {self.num_records:,} records)" for note, n in (self.notes - Counter(ignored)).items()
        ]
        if ignored:
            keys = [f"{note.removeprefix('ignored key ')} (in {n:,})" for note, n in ignored.items()]
            lines.append(f"ignored keys: {', '.join(keys)} of {self.num_records:,} records")
        return [printable(line) for line in lines]

    def check(self, name: str, skip_bad: bool | None) -> None:
        """ValueError if there are no records, or bad ones that may not be left out: their number and the first five.

        `skip_bad` is the value of --skip_bad_records, or None for a script without that flag.
        """
        num_bad = len(self.bad)
        if self.num_records == 0:
            raise ValueError(f"{name}: no records in it")
        bad_by_file = Counter(bad.file for bad in self.bad)
        mostly_bad = [file for file, count in bad_by_file.items() if count > self.counts[file] / 2]
        if num_bad == 0 or (skip_bad and not mostly_bad):
            return
        first, *more = [f"{bad.place}: {bad.reason}" for bad in self.bad[:5]]
        advice = "correct or remove them" if skip_bad is None or mostly_bad else "--skip_bad_records leaves them out"
        if skip_bad:
            advice = f"in {mostly_bad[0]} more than half, so that none is skipped"
        if not more:
            raise ValueError(f"{first} ({advice})")
        named = "".join(f"\n  {line}" for line in (first, *more))
        raise ValueError(f"{name}: {num_bad:,} of {self.num_records:,} records are bad ({advice}), such as{named}")


def summarize_notes(data, parsed: list) -> list[str]:
    """Lines that say what was left out of records: the `notes` of what `read_records` has returned."""
    notes = Counter(note for value in parsed for note in value.notes)
    lines = Reading(len(parsed), notes=notes).summary()
    return [f"{describe(data)}: {line}" for line in lines]


def read_records(data, parse: Callable, skip_bad: bool | None = None) -> list:
    """Apply `parse` to each record of the files of `data`. -> what it returned, in order

    `skip_bad` is as for `Reading.check`. Raises FileNotFoundError, or ValueError for what is wrong with a file or its
    records.
    """
    reading, parsed = Reading(), []
    for chunk in split_files(data):
        parsed += reading.parse(chunk, parse)
    reading.check(describe(data), skip_bad)
    return parsed
