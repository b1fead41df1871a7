"""Looking at and keeping records by their scores, the names in the data map, the end of the demo."""

import gzip
import json

import numpy as np
import pytest

from confidence import TrainingDynamics, main, split_by_confidence
from data import load_examples
from infra import data_map, records
from infra.demo import least_confident
from infra.output import print_report
from infra.selection import label_records, match_scores
from train import TrainConfig

# Record n has the confidence n/10 and the perplexity 1 + 2n. Lines are spaced as no program would write them.
LINES = [b'{ "prompt":"ask %d",  "completion" : "say \xc3\xa9 %d", "extra": null}' % (n, n) for n in range(1, 9)]
RECORDS = [json.loads(line) for line in LINES]


def save_scores(folder, data) -> str:
    """Scores of the records in a data file, by the number in their prompt."""
    examples = load_examples(data)
    number = np.array([float(example.messages[0]["content"].split()[1]) for example in examples])
    dynamics = TrainingDynamics([e.id for e in examples], number[None] / 10, 1 + 2 * number[None])
    dynamics.save(folder / "scores.jsonl")
    return str(folder / "scores.jsonl")


@pytest.fixture
def folder(tmp_path):
    """A folder with data.jsonl and its scores.jsonl; the order of the records is not that of their confidence."""
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(LINES[4:] + LINES[:4]) + b"\n")
    save_scores(tmp_path, tmp_path / "data.jsonl")
    return tmp_path


def run(folder, *flags, data=("data.jsonl",)) -> None:
    main(["--scores", str(folder / "scores.jsonl"), "--data", *(str(folder / name) for name in data), *flags])


def keep(folder, share, *flags, data=("data.jsonl",)) -> bytes:
    """What --keep writes."""
    run(folder, "--keep", str(share), "--output", str(folder / "kept.jsonl"), *flags, data=data)
    content = (folder / "kept.jsonl").read_bytes()
    (folder / "kept.jsonl").unlink()
    return content


def fails(capsys, run_it, *arguments, **named) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit):
        run_it(*arguments, **named)
    return capsys.readouterr().err.splitlines()[-1]


# --- Showing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, numbers", [([], [1, 2, 3]), (["--most"], [8, 7, 6]), (["--by", "perplexity"], [8, 7, 6])]
)
def test_the_least_confident_or_the_most_are_shown_with_scores_and_place(folder, capsys, flags, numbers):
    run(folder, "--show", "3", *flags)
    shown = capsys.readouterr().out
    first, line = numbers[0], [5, 6, 7, 8, 1, 2, 3, 4].index(numbers[0]) + 1
    head = f"1.  probability {first / 10:.4f}  perplexity {1 + 2 * first:.2f}  {folder}/data.jsonl:{line}\n"
    assert shown.startswith(f"{head}    user: ask {first}\n    assistant: say é {first}\n\n2.")
    assert [int(line.split()[-1]) for line in shown.splitlines() if "user" in line] == numbers


def test_what_is_shown_is_cut_escaped_and_indented_and_repeats_are_shown_once(tmp_path, capsys):
    texts = ["1 \x1b[31mred\nnext", "1 \x1b[31mred\nnext", "2 " + "x" * 1000, "3"]
    rows = [{"prompt": f"ask {text}", "completion": "c"} for text in texts]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_scores(tmp_path, tmp_path / "data.jsonl")
    run(tmp_path, "--show", "9")
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[31mred\n        next\n") == 1 and "data.jsonl:2  (2 copies)\n" in shown
    assert " … (1,006 characters)\n" in shown and "x" * 600 not in shown and "3.  " in shown and "4.  " not in shown


# --- Keeping ----------------------------------------------------------------------------------------------------------


def test_kept_lines_stay_as_they_are_and_in_order(folder, capsys):
    assert keep(folder, 0.5) == b"\n".join(LINES[4:]) + b"\n"
    told = capsys.readouterr().err
    assert "data.jsonl: 8 records, 8 of them with a score\n" in told
    assert "kept.jsonl: 4 records kept, with a probability of at least 0.5000; 4 less confident left out\n" in told
    assert keep(folder, 0.25, "--by", "perplexity") == b"\n".join(LINES[:2]) + b"\n"
    assert "2 records kept, with a perplexity of at most 5.0000; 6 less" in capsys.readouterr().err
    assert keep(folder, 1) == (folder / "data.jsonl").read_bytes()


@pytest.mark.parametrize("chunk_bytes", [20, 2**22])
def test_every_format_is_kept_from_and_parts_of_a_file_do_not_matter(folder, monkeypatch, chunk_bytes):
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk_bytes)
    lines = "\ufeff".encode() + b"\r\n\r\n".join(LINES)  # a byte order mark, empty lines, no end of the last line
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.json").write_text(json.dumps(RECORDS, indent=1))
    turns = [[{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say é {n}"}] for n in (8, 1)]
    (folder / "turns.json").write_text(json.dumps(turns))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert keep(folder, 0.25, data=[name]) == LINES[6] + b"\r\n" + LINES[7] + b"\n"
    assert [json.loads(line) for line in keep(folder, 0.25, data=["a.json"]).splitlines()] == RECORDS[6:]
    assert keep(folder, 0.5, data=["turns.json"]).decode() == json.dumps(turns[0], ensure_ascii=False) + "\n"
    several = keep(folder, 0.25, data=["a.json", "data.jsonl", "a.jsonl"])  # a repeat has the score of the first
    assert [json.loads(line)["prompt"][4:] for line in several.splitlines()] == [*"78", *"78", *"78"]


def test_rows_of_parquet_become_lines(folder):
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet with pyarrow, which is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "data.parquet", row_group_size=3)
    assert [json.loads(line) for line in keep(folder, 0.25, data=["data.parquet"]).splitlines()] == RECORDS[6:]


def test_half_characters_and_dates_of_a_record_become_json():
    assert records.to_json_line({"a": "\ud800é"}) == b'{"a": "\\ud800\xc3\xa9"}\n'
    assert json.loads(records.to_json_line({"a": np.datetime64("2020-01-02")})) == {"a": "2020-01-02"}


def test_records_without_a_score_are_left_out_counted_and_named(folder, capsys):
    extra = [b'{"prompt": "new %d", "completion": "c"}' % n for n in range(7)]
    (folder / "more.jsonl").write_bytes(b"\n".join([*extra, b"{", *LINES[:4]]))
    told = fails(capsys, keep, folder, 1, data=["more.jsonl"])
    assert "more.jsonl:8: not valid JSON" in told and "--skip_bad_records leaves them out" in told
    assert not list(folder.glob("kept*"))
    assert keep(folder, 1, "--skip_bad_records", data=["more.jsonl"]) == b"\n".join(LINES[:4]) + b"\n"
    told = capsys.readouterr().err
    assert "more.jsonl: 12 records, 4 of them with a score\n" in told and "1 of 12 records skipped: not valid" in told
    places = ", ".join(f"{folder}/more.jsonl:{n}" for n in range(1, 6))
    assert "7 left out without a score (no response to learn within" in told and f": {places} and 2 more\n" in told
    assert "4 of 8 scores are of other records\n" in told


def test_data_that_was_not_scored_and_a_share_of_none_are_refused(folder, capsys):
    (folder / "other.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert "none of its 1 records has a score" in fails(capsys, keep, folder, 0.5, data=["other.jsonl"])
    assert "--keep 0.01: of 8 records that is none" in fails(capsys, keep, folder, 0.01)
    assert not list(folder.glob("kept*"))


def test_what_is_kept_is_written_whole_or_not_at_all(folder, capsys, monkeypatch):
    (folder / "kept.jsonl").write_text("mine")
    assert "already there" in fails(capsys, keep, folder, 0.5)
    assert (folder / "kept.jsonl").read_text() == "mine"
    (folder / "kept.jsonl").unlink()
    monkeypatch.setattr("infra.selection.json_lines", lambda chunk: iter([b"{}\n"]))  # a file that has become shorter
    assert "has changed while it was read" in fails(capsys, keep, folder, 0.5)
    assert not list(folder.glob("kept*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--show 3", "give --checkpoints, --data and --output; or --scores and --plot, --show or --keep"),
        ("--checkpoints c --data d --output o --keep 0.5", "give --checkpoints, --data and --output; or --scores"),
        ("--scores s --data d", "--scores: needs --plot, --show or --keep"),
        ("--scores s --show 3", "--show, --keep: need --data, the examples that were scored"),
        ("--scores s --data d --keep 0.5", "--keep: needs --output"),
        ("--scores s --data d --show 3 --output o", "--output: is for --keep, while --show prints"),
        ("--scores s --data d --keep 0.5 --output o --most", "--most: needs --show"),
        ("--checkpoints m --data d --output o --by perplexity", "--by: needs --show, --keep or --plot"),
        ("--scores s --data d --show 3 --max_length 64", "--max_length: is for scoring with --checkpoints"),
        ("--scores s --plot p --micro_batch_tokens 64", "--micro_batch_tokens: is for scoring with --checkpoints"),
        ("--scores s --data d --keep 90 --output o", "'90' is not a number from 0 to 1"),
        ("--scores s --data d --show 0", "'0' is not a positive integer"),
        ("--scores s --data d --keep 0.5 --output o.parquet", "--output o.parquet: is written as JSON lines"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(flags.split())
    told = capsys.readouterr().err
    assert exit.value.code == 2 and message in told and told.count("\n") == 1


# --- The data map and the demo ----------------------------------------------------------------------------------------


def test_the_extremes_are_named_in_the_data_map_and_names_do_not_overlap(folder, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    boxes, points = {}, []

    def savefig(figure, path, **_):
        figure.canvas.draw()
        axes = figure.axes[0]
        boxes.update({name.get_text(): Text.get_window_extent(name) for name in axes.texts})  # without its line
        for dots in axes.collections:
            points.extend(axes.transData.transform(dots.get_offsets()))

    monkeypatch.setattr(Figure, "savefig", savefig)
    run(folder, "--plot", str(folder / "map.png"))
    assert sorted(boxes) == sorted(f"ask {n} → say é {n}" for n in (1, 2, 3, 6, 7, 8))
    heights = {name: box.y0 for name, box in boxes.items()}
    assert sorted(heights, key=heights.get) == sorted(boxes)  # the least confident at the bottom
    placed = list(boxes.values())
    assert max(box.x0 for box in placed) - min(box.x0 for box in placed) < 1  # or lines would touch other names
    assert not any(a.overlaps(b) for i, a in enumerate(placed) for b in placed[:i])
    assert len(points) == 8 and not any(box.contains(*point) for box in placed for point in points)


def test_a_data_map_of_one_example_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    one = TrainingDynamics(["a"], np.array([[0.5]]), np.array([[2.0]]))
    data_map.plot_data_map(
        one, split_by_confidence(one.confidence), "probability", tmp_path / "one.png", {0: "from $\\5 to $6"}
    )
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_ends_with_what_it_is_least_sure_of(folder, capsys):
    (folder / "data").mkdir()
    (folder / "data.jsonl").rename(folder / "data" / "train.jsonl")
    (folder / "scores.jsonl").rename(folder / "confidence.jsonl")
    ids = [example.id for example in load_examples(folder / "data" / "train.jsonl")]
    (folder / "data" / "wrong.json").write_text(json.dumps([ids[3], ids[1]]))  # of records 8 and 6
    answers = ((8, "wrong"), (7, "right"), (6, "wrong"))
    rows = [f"{1 + 2 * n:.2f}  {answer}  ask {n} → say é {n}" for n, answer in answers]
    assert [line.strip() for line in least_confident(folder).splitlines()[1:]] == rows
    for damage in (lambda: None, (folder / "data" / "wrong.json").unlink):
        damage()
        print_report(TrainConfig(output=str(folder), max_length=256, dtype="fp32"))
        told = capsys.readouterr().out
        assert (rows[0] in told) == (folder / "data" / "wrong.json").exists()
        look = f"--scores {folder}/confidence.jsonl --data {folder}/data/train.jsonl"
        assert f"{look} --by perplexity --show 20\n" in told
    (folder / "results.json").write_text("{}")
    data = {"model": "m", "data": ("my data.jsonl", "more.jsonl"), "skip_bad_records": True}
    print_report(TrainConfig(output=str(folder), **data))
    assert "--data 'my data.jsonl' more.jsonl --skip_bad_records --by" in capsys.readouterr().out


def test_names_of_few_records_are_each_given_once(tmp_path):
    lines = [json.dumps({"instruction": f"q {i}", "output": f"a {i}"}) + "\n" for i in range(4)]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    ids = [example.id for example in load_examples(tmp_path / "few.jsonl")]
    dynamics = TrainingDynamics(ids, np.array([[0.1, 0.2, 0.3, 0.4]]), np.ones((1, 4)))
    found = match_scores(str(tmp_path / "few.jsonl"), ids, False)
    assert list(label_records(found, dynamics, "probability")) == [0, 1, 2, 3]
