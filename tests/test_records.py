"""Data files of every kind, told apart by what they hold; several of them; bad records."""

import gzip
import json
from types import SimpleNamespace

import pytest

import infra.records
from data import load_examples, to_example
from infra.records import CHUNK_ROWS, NUM_REASONS, Reading, find_files, json_lines, read_records, split_file

RECORDS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PAIR = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
INDENTED = json.dumps(RECORDS, indent=1).encode()
ONE = json.dumps(RECORDS[:1]).encode()


@pytest.mark.parametrize(
    "name, content, count",
    [
        ("d.jsonl", LINES, 5),
        ("d.JSONL", LINES, 5),
        ("d.ndjson", LINES, 5),
        ("d.txt", LINES, 5),
        ("d.json", LINES, 5),  # a file is what it holds
        ("d.json", INDENTED, 5),
        ("d.jsonl", INDENTED, 5),
        ("d.json", json.dumps({"version": 1, "data": RECORDS}).encode(), 5),
        ("d.json", json.dumps({"version": 1, "data": RECORDS}, indent=2).encode(), 5),
        ("d.json", ONE, 1),
        ("d.json", json.dumps([*RECORDS, PAIR]).encode(), 6),
        ("d.jsonl", ONE + b"\n\n", 1),
        ("d.json", json.dumps(RECORDS[0], indent=1).encode(), 1),
        ("d.jsonl", json.dumps(RECORDS[0] | {"examples": RECORDS}).encode(), 1),  # a record, whatever else it holds
        ("d.json", json.dumps([record | {"content": "a"} for record in RECORDS]).encode(), 5),  # no conversation
        ("d.jsonl", json.dumps({"data": ["Why?", "So."]}).encode(), 1),
        ("d.jsonl", json.dumps({"data": PAIR}).encode(), 1),
        ("d.jsonl.gz", gzip.compress(LINES), 5),
        ("d.jsonl", gzip.compress(LINES), 5),
        ("d.json.gz", gzip.compress(b"\xef\xbb\xbf" + INDENTED), 5),
        ("d.jsonl.gz", gzip.compress(b'{"data": [\n' + LINES.strip().replace(b"\n", b",\n") + b"\n]}"), 5),
        ("d.json.gz", gzip.compress(b'{"version": 1, "data":\n' + ONE + b"}"), 1),
        ("d.jsonl", gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]), 5),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [20, 2**22])
def test_a_file_is_read_as_what_it_holds(monkeypatch, tmp_path, name, content, count, chunk_bytes):
    monkeypatch.setattr(infra.records, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / name).write_bytes(content)
    assert len(load_examples(tmp_path / name)) == count


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs.*git lfs pull"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
        (gzip.compress(LINES)[:-10], "the compressed file is damaged"),
        (json.dumps({"train": RECORDS, "test": RECORDS}).encode(), "has several lists, train, test; write each to a"),
        (json.dumps({"data": RECORDS, "hard": RECORDS}).encode(), "has several lists, data, hard; write each to a"),
        (b"", "no records in it"),
        (b"[]", "no records in it"),
        (b'[{"text": "a"},\n', "not valid JSON"),
    ],
)
def test_a_file_that_holds_no_records_is_named_by_what_it_is(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"d.jsonl: {message}"):
        load_examples(tmp_path / "d.jsonl")


def test_a_bad_first_line_is_one_bad_record(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"instruction": "a",\n' + LINES)
    assert len(load_examples(tmp_path / "d.jsonl", skip_bad_records=True)) == 5


def test_a_compressed_list_that_ends_too_early_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(infra.records, "CHUNK_BYTES", 20)
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(100 * RECORDS, indent=1).encode())[:-20])
    with pytest.raises(ValueError, match="the compressed file is damaged"):
        load_examples(tmp_path / "d.json.gz")


def test_dates_that_python_does_not_have_are_texts_or_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    days, seconds = pyarrow.array([10**7], pyarrow.int32()), pyarrow.array([10**12], pyarrow.int64())
    columns = {
        "nanoseconds": pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns")),
        "year 29348": days.cast(pyarrow.date32()),
        "year 33658": seconds.cast(pyarrow.timestamp("s")),
        "no such zone": pyarrow.array([0], pyarrow.timestamp("ms", tz="No/Zone")),
    }
    parquet.write_table(pyarrow.table({"text": ["a"], **columns}), tmp_path / "d.parquet")
    (example,) = load_examples(tmp_path / "d.parquet")
    assert example.messages[0]["content"] == "a"
    nested = pyarrow.array([[{"t": 10**12}]], pyarrow.list_(pyarrow.struct([("t", pyarrow.timestamp("s"))])))
    parquet.write_table(pyarrow.table({"text": ["a"], "when": nested}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d.parquet: column when has dates that Python does not have"):
        load_examples(tmp_path / "d.parquet")


def test_a_parquet_row_as_a_line_of_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "float": pyarrow.array([0.1, None], pyarrow.float32()),
        "time": pyarrow.array([1000, 1], pyarrow.timestamp("ns")),
        "bytes": [b"\x89", None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    (chunk,) = split_file(tmp_path / "d.parquet")
    assert [json.loads(line) for line in json_lines(chunk)] == [
        {"float": 0.1, "time": "1970-01-01 00:00:00.000001000", "bytes": "iQ=="},
        {"float": None, "time": "1970-01-01 00:00:00.000000001", "bytes": None},
    ]


def test_a_large_row_group_is_not_read_for_every_few_rows(monkeypatch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(infra.records, "CHUNK_ROWS", 2)
    parquet.write_table(pyarrow.table({"text": [str(n) for n in range(100)]}), tmp_path / "d.parquet")
    assert len(list(split_file(tmp_path / "d.parquet"))) == 15  # of 7 rows each, the last of 2
    assert [example.messages[0]["content"] for example in load_examples(tmp_path / "d.parquet")] == [
        *map(str, range(100))
    ]


def test_parquet_is_read_in_parts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    number = range(2 * CHUNK_ROWS)
    columns = {"prompt": [f"Say {n}." for n in number], "messages": [None for _ in number]}
    columns["completion"] = [f"It is {n}." if n != 5000 else "" for n in number]
    file = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table(columns), file, row_group_size=CHUNK_ROWS + 5)
    assert [(part.row_group, part.start, part.first) for part in split_file(file)] == [
        (0, 0, 1),
        (0, CHUNK_ROWS, CHUNK_ROWS + 1),
        (1, 0, CHUNK_ROWS + 6),
    ]
    with pytest.raises(ValueError, match=r"parquet: row 5001: completion is empty"):
        load_examples(file)
    examples = load_examples(file, skip_bad_records=True)
    texts = [example.messages[0]["content"] for example in examples]
    assert texts == [text for n, text in enumerate(columns["prompt"]) if n != 5000]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="parquet: the parquet file is damaged"):
        load_examples(file)


def test_a_folder_a_pattern_and_several_files_are_read_in_order(tmp_path):
    for n, name in enumerate(["b.jsonl", "a.jsonl", "c.json", "notes.md", "._a.jsonl"]):
        (tmp_path / name).write_text(json.dumps(RECORDS[n]))
    names = lambda data: [file.name for file in find_files(data)]  # noqa: E731
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.json"]
    assert names(str(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names([tmp_path / "c.json", tmp_path / "*.jsonl"]) == ["c.json", "a.jsonl", "b.jsonl"]
    said = [example.messages[0]["content"] for example in load_examples(tmp_path)]
    assert said == ["Say 1.", "Say 0.", "Say 2."]


def test_files_that_are_not_there_or_not_meant_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(ValueError, match=r"table\.csv: tables in text are not read; convert it"):
        list(infra.records.split_files(tmp_path / "table.csv"))
    with pytest.raises(ValueError, match=r"table\.csv is not read; convert or unpack it, or give the other files"):
        find_files(tmp_path)
    (tmp_path / "table.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: not found"):
        find_files(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"\*.jsonl: no file matches"):
        find_files(tmp_path / "*.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"no file in it ends in .*; there are some in .*data"):
        find_files(tmp_path)
    (tmp_path / "data" / "test-00000.parquet").touch()
    with pytest.raises(ValueError, match=r"several splits \(test, train\); give '.*data/train\*'$"):
        find_files(tmp_path / "data")
    for names in (
        *(("train.jsonl", "val.jsonl"), ("medqa_train.jsonl", "medqa_dev.jsonl"), ("Train.json", "valid.json")),
        *(("trainset.jsonl", "testset.jsonl"), ("train-1.jsonl", "held_out.jsonl"), ("medTrain.pq", "medTest.pq")),
        *(("traindata.jsonlines", "testdata.jsonlines"), ("train-00000-of-00002.parquet", "evaluation.json")),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in (*names, "intervals.jsonl"):
            (folder / name).touch()
        with pytest.raises(ValueError, match=r"several splits .* give '.*'$") as error:
            find_files(folder)
        assert [f.name for f in find_files(str(error.value).split("'")[1])] == [names[0]]
    (tmp_path / "ultrachat").mkdir()
    for name in (
        "train_sft-00000-of-00002.parquet",
        "train_sft-00001-of-00002.parquet",
        "train_gen-0.parquet",
        "test.pq",
    ):
        (tmp_path / "ultrachat" / name).touch()
    with pytest.raises(ValueError, match=r"give '.*/train_gen\*' or '.*/train_sft\*'$"):
        find_files(tmp_path / "ultrachat")
    for names, message in {
        ("alpaca.jsonl", "alpaca_test.jsonl"): "alpaca_test.jsonl may be of another split than alpaca.jsonl",
        ("a.jsonl", "a.jsonl.GZ", "b.jsonl"): "has both a.jsonl and a.jsonl.GZ",
        ("a.b.jsonl", "a.b.parquet", "a.jsonl"): "has both a.b.jsonl and a.b.parquet",
    }.items():
        folder = tmp_path / f"of {names[0]}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(ValueError, match=message):
            find_files(folder)
    (tmp_path / "words").mkdir()
    for name in ("values.jsonl", "testimonials.jsonl", "developer.jsonl"):
        (tmp_path / "words" / name).touch()
    assert len(find_files(tmp_path / "words")) == 3
    with pytest.raises(ValueError, match=r"is a pipe or a device, .* write it to a file first"):
        find_files("/dev/null")


def test_all_bad_records_are_counted_and_the_first_five_named(tmp_path):
    lines = LINES.decode().splitlines() * 10
    lines[10:20] = ['{"instruction": "x", "output": ""}'] * 9 + ["{"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"d.jsonl: 10 of 50 records are bad") as error:
        load_examples(tmp_path / "d.jsonl")
    named = str(error.value).splitlines()[1:]
    assert [line.split(":")[1] for line in named[:5]] == ["11", "12", "13", "14", "15"]
    assert len(named) == 5 and "(--skip_bad_records leaves them out)" in str(error.value)
    assert len(load_examples(tmp_path / "d.jsonl", skip_bad_records=True)) == 40


def test_a_file_that_is_bad_for_the_most_part_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"a": 1}\n{"b": 2}\n')
    (tmp_path / "good.jsonl").write_bytes(LINES)  # good records of another file do not make up for it
    with pytest.raises(ValueError, match=r"2 of 8 records are bad \(in .*d.jsonl more than half, so"):
        load_examples(tmp_path, skip_bad_records=True)
    with pytest.raises(ValueError, match=r"2 of 8 records are bad \(correct or remove them\)"):
        load_examples(tmp_path)


def test_the_summary_names_the_most_frequent_reasons():
    reading = Reading()
    records = [{"messages": [{"role": name, "content": "x"}]} for name in [*"abcdefghijkl", "l"]]
    part = SimpleNamespace(path="d", records=lambda: ((f"d:{n}", record) for n, record in enumerate(records)))
    assert list(reading.parse(part, to_example)) == []
    lines = reading.summary()
    assert len(lines) == NUM_REASONS + 1 and "2 of 13 records skipped: messages[N]: the role 'l'" in lines[0]
    assert lines[-1] == "4 of 13 records skipped: 4 other reasons"


def test_the_summary_says_what_was_left_out_of_how_many():
    reading = Reading()
    records = [RECORDS[0] | {"tools": "[]", "id": n} for n in range(3)] + [{"text": ""}, {"text": " "}]
    records += [{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": n}]} for n in range(2)]
    part = SimpleNamespace(path="d", records=lambda: ((f"d:{n}", record) for n, record in enumerate(records)))
    for example in reading.parse(part, to_example):
        reading.notes.update(example.notes)
    assert reading.summary() == [
        "2 of 7 records skipped: text is empty; fill it in or remove the record",
        "2 of 7 records skipped: messages[N]: the role 'tool' is not supported (tools are not); known are "
        "system, developer, user, human, assistant, gpt, chatgpt, bing, bard, model",
        "ignored keys: tools (in 3), id (in 3) of 7 records",
    ]


def test_records_of_any_kind_can_be_read(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(LINES)
    assert read_records(tmp_path / "d.jsonl", lambda record: record["output"])[-1] == "It is 4."


def test_a_script_that_skips_no_records_does_not_advise_it(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"{}\n" + LINES)
    with pytest.raises(ValueError, match=r"d.jsonl:1: keys .* \(correct or remove them\)"):
        read_records(tmp_path / "d.jsonl", lambda record: record["output"] if record else to_example({"output": ""}))


def test_keys_do_not_reach_the_terminal_as_control_characters():
    reading = Reading(num_records=1)
    reading.notes["ignored key \x1b[31m"] = 1
    assert reading.summary() == ["ignored keys: \\x1b[31m (in 1) of 1 records"]
