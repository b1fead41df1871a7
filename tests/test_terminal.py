"""What a terminal shows of a run, what a pipe receives, and that the help fits."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios

import pytest
import torch
from conftest import write_model_and_records

import confidence
import eval as eval_module
import train
from infra import distributed, metrics
from infra.distributed import init_distributed, print0
from infra.metrics import StagePosition, log_checkpoint, log_step
from infra.output import stage_position


class Terminal:
    """A pseudo-terminal. What is written to `stream` is read by `written` and laid out by `screen`."""

    def __init__(self, columns: int):
        self.columns, self.text = columns, ""
        self.reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.reader, False)
        self.stream = open(writer, "w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def written(self) -> str:
        """All that has been written so far. To be called before the terminal's buffer of 4 KiB is full."""
        self.stream.flush()
        try:
            while part := os.read(self.reader, 1 << 16):
                self.text += part.decode()
        except BlockingIOError:
            pass
        return self.text

    def screen(self) -> list[str]:
        """The lines that the terminal shows, without colours."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[\d;]*[a-zA-Z]|.|\n", self.written(), re.DOTALL):
            if part == "\r":
                column = 0
            elif part == "\x1b[K":
                rows[row] = rows[row][:column]
            elif part == "\n" or (not part.startswith("\x1b") and column == self.columns):
                row += 1
                rows.extend([""] * (row + 1 - len(rows)))
                column = 0 if part != "\n" else column
            if part not in "\r\n" and not part.startswith("\x1b"):
                rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


@pytest.fixture
def open_terminal(monkeypatch):
    """A function that connects stdout and stderr to a new terminal of so many columns, and returns it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with contextlib.ExitStack() as stack:

        def connect(columns: int = 80) -> Terminal:
            made = Terminal(columns)
            stack.callback(os.close, made.reader)
            stack.enter_context(made.stream)
            for name in ("stdout", "stderr"):
                monkeypatch.setattr(sys, name, made.stream)
            return made

        yield connect


def step_record(step: int, **more) -> dict:
    losses = {"loss": 1.25, "ntp": 1.0, "mix": 1.25, "grad_norm": 0.5}
    times = {"tokens_per_second": 12345.6, "seconds": 2.0 * step, "seconds_left": 2.0 * (20 - step)}
    return {"step": step, "total_steps": 20, "epoch": 0, **losses, **times, **more}


POSITION = StagePosition("sftmix", 4, 4, work_after=0.5)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "4/4 sftmix  step 10/20  20 s left, 40 s in all  loss 1.2500  ntp 1.0000"),
        (120, "4/4 sftmix  step 10/20  20 s left, 40 s in all  loss 1.2500  ntp 1.0000  mix 1.2500  12,346 tokens/s"),
        (30, "4/4 sftmix  step 10/20"),
    ],
)
def test_a_progress_line_takes_the_place_of_the_one_before(open_terminal, columns, shown, tmp_path):
    terminal = open_terminal(columns)
    print0("started")
    log_step(tmp_path / "m", POSITION, step_record(5))
    log_step(tmp_path / "m", POSITION, step_record(10))
    assert terminal.screen() == ["started", shown]
    print0("warning: one thing")
    log_step(tmp_path / "m", POSITION, step_record(20))
    print0("ended")
    started, warning, last, *rest = terminal.screen()
    assert (started, warning, rest) == ("started", "warning: one thing", ["ended", ""])
    assert last.startswith("4/4 sftmix  step 20/20") and ("took 40 s" in last or columns == 30)


def test_wide_characters_do_not_wrap_a_line(open_terminal):
    terminal = open_terminal()
    print0("漢" * 50, progress=0.5)
    print0("漢" * 39, progress=0.5)
    assert terminal.written().count("漢") == 39 + 39


@pytest.mark.parametrize("stream", ["pipe", "dumb", "unknown"])
def test_pipes_and_terminals_without_escape_sequences_receive_plain_lines(stream, open_terminal, monkeypatch, tmp_path):
    terminal = open_terminal()
    if stream == "pipe":
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    elif stream == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.delenv("TERM")
    for step in (5, 10, 20):
        log_step(tmp_path / "m", POSITION, step_record(step))
    log_step(tmp_path / "m", POSITION, step_record(20, loss=0.0, mix=None))
    print0("warning: ended")
    text = sys.stdout.getvalue() if stream == "pipe" else terminal.written().replace("\r\n", "\n")
    rest = "loss 1.2500  ntp 1.0000  mix 1.2500  12,346 tokens/s\n"
    assert text == (
        f"4/4 sftmix  step  5/20  30 s left, 50 s in all  {rest}"
        f"4/4 sftmix  step 10/20  20 s left, 40 s in all  {rest}"
        f"4/4 sftmix  step 20/20  took 40 s  {rest}"
        "4/4 sftmix  step 20/20  took 40 s  loss 0.0000  12,346 tokens/s\n"
        "warning: ended\n"
    )


@pytest.mark.parametrize(("no_color", "has_colours"), [(None, True), ("", True), ("1", False)])
def test_colours_are_left_out_with_no_color(open_terminal, monkeypatch, no_color, has_colours):
    terminal = open_terminal()
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    print0("half", progress=0.5)
    print0("warning: red")
    with pytest.raises(SystemExit), init_distributed("cpu"):
        raise ValueError("a bad flag")
    codes = [f"\x1b[{n}m" in terminal.written() for n in (2, 33, 31)]
    assert codes == [has_colours] * 3
    assert terminal.screen()[0] == "warning: red" and "error: a bad flag" in terminal.screen()[1]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), ZeroDivisionError(), SystemExit(143)])
def test_what_ends_a_run_is_printed_below_its_progress(open_terminal, error):
    terminal = open_terminal()
    progress = "half of the work  is done"
    print0(progress, progress=0.5)
    with pytest.raises((SystemExit, ZeroDivisionError)), init_distributed("cpu"):
        raise error
    print(">", end="")  # the shell's prompt
    shown = terminal.screen()
    assert shown[0] == progress and shown[-1] == ">"
    assert (len(shown) == 2) == isinstance(error, SystemExit)


def test_an_error_without_progress_leaves_no_empty_line(open_terminal):
    terminal = open_terminal()
    with pytest.raises(SystemExit), init_distributed("cpu"):
        raise ValueError("bad")
    assert [line.partition(": ")[2] for line in terminal.screen()] == ["error: bad", ""]


# --- The stages of a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model and 12 training examples."""
    path = tmp_path_factory.mktemp("terminal")
    records = write_model_and_records(path, tokenizer)
    (path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:12]))
    (path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[12:16]))
    return path


def flags(folder, output, *more):
    paths = {"model": "model", "data": "train.jsonl", "eval_data": "eval.jsonl"}
    given = [x for flag, name in paths.items() for x in (f"--{flag}", str(folder / name))]
    small = "--epochs 1 --batch_size 4 --num_checkpoints 2 --max_length 200 --log_every 1 --dtype fp32".split()
    return [*given, "--output", str(output), *small, *more]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_in_a_terminal_leaves_a_line_for_each_stage(open_terminal, columns, folder, tmp_path, monkeypatch):
    terminal, seen = open_terminal(columns), []
    for module in (distributed, metrics):
        monkeypatch.setattr(module, "print0", lambda *a, **k: (print0(*a, **k), seen.append(terminal.screen())))
    train.main(flags(folder, tmp_path / "o"))
    shown = terminal.screen()
    stages = [line for line in shown if re.match(r"\d/4 ", line)]
    fields = [line.split("  ")[:3] for line in stages]
    assert [f[:2] for f in fields] == [
        ["2/4 reference", "step 3/3"],
        ["3/4 confidence", "2/2 checkpoints"],
        ["4/4 sftmix", "step 3/3"],
    ]
    assert all(re.fullmatch(r"took \d+ s", f[2]) for f in fields)
    assert all(len(line) < columns for line in stages)
    assert any(line.startswith("SFTMix ") for line in shown)
    # During the run, each progress line stands alone at the bottom.
    assert any(re.match(r"2/4 reference  step 2/3  \d+ s left", screen[-1]) for screen in seen)
    assert all(sum("/4 " in line for line in screen) <= 3 for screen in seen)


def test_the_whole_time_left_is_that_of_the_work_to_come(folder):
    """Twelve examples, three epochs: nine passes to train, two to score; the held-out data is half as much."""

    class Counts:
        def __init__(self, lengths):
            self.lengths = torch.tensor(lengths)

        def __len__(self):
            return len(self.lengths)

    inputs = train.Inputs(None, Counts([10] * 12), Counts([10] * 6))
    config = train.TrainConfig(model="m", data="d", output="o", num_checkpoints=2, batch_size=4)
    reference, scoring, sftmix = (stage_position(config, s, inputs) for s in ("reference", "confidence", "sftmix"))
    assert [str(p) for p in (reference, scoring, sftmix)] == ["2/4 reference", "3/4 confidence", "4/4 sftmix"]
    assert reference.work_after == pytest.approx((0.5 + 2 + 9 + 0.5) / 9)
    assert scoring.work_after == pytest.approx((9 + 0.5) / 2)
    assert sftmix.work_after == pytest.approx(0.5 / 9)
    lora = train.replace(config, lora_rank=4, activation_checkpointing=True, num_checkpoints=100)
    assert stage_position(lora, "reference", inputs).work_after == pytest.approx((0.5 + 9 + 9 + 0.5) / 9)
    assert str(stage_position(train.replace(config, confidence="f"), "sftmix", inputs)) == "3/3 sftmix"
    assert str(stage_position(train.replace(config, confidence="online"), "sftmix", inputs)) == "2/2 sftmix"
    alone = stage_position(train.replace(config, stage="sftmix"), "sftmix", inputs._replace(held_out=None))
    assert alone == StagePosition("sftmix", 1, 1, 0.0)
    base = stage_position(train.TrainConfig(), "base")  # the demo's data is not made yet
    assert base == StagePosition("base", 1, 4, 0.0)


def test_scoring_counts_the_checkpoints_of_this_run(capsys):
    record = {"checkpoint": "a/step-1", "probability": 0.25, "done": 1, "total": 3, "seconds": 100.0}
    log_checkpoint(record, StagePosition("confidence", 3, 4, 2.0))
    assert capsys.readouterr().out == (
        "3/4 confidence  1/3 checkpoints  3 min left, 13 min in all  mean gold-token probability 0.2500  a/step-1\n"
    )


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 100, 250])
@pytest.mark.parametrize(
    ("main", "command"),
    [(train.main, []), (confidence.main, []), (eval_module.main, [])]
    + [(eval_module.main, [name]) for name in ("perplexity", "match", "choice", "generate", "chat")],
)
def test_the_help_fits_the_terminal(main, command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0 and max(map(len, lines)) <= min(columns, 100)
    assert lines[0].startswith("usage: ") and "" in lines[1:5]  # a line for each use, and not one of all flags
    groups = [line for line in lines if re.fullmatch(r"[a-z]+:", line)]
    assert len(groups) == len(set(groups))
    if main is train.main:
        assert groups == ["options:", "data:", "recipe:", "optimizer:", "hardware:", "saving:"]
    else:
        assert groups[0] == "options:" and set(groups[1:]) <= {
            "commands:",
            "data:",
            "hardware:",
            "saving:",
            "generation:",
            "selection:",
        }
    options = lines[lines.index("options:") :]
    assert options[1].lstrip().startswith("-h, --help") and options[2] == ""  # all others are in a group


def test_the_usage_line_names_what_is_required(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit):
        eval_module.main(["generate", "--help"])
    assert capsys.readouterr().out.startswith("usage: eval.py generate --model DIR --data FILE [flags]\n")


def test_a_description_is_wrapped_where_it_does_not_fit(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    about = capsys.readouterr().out.partition("options:")[0].splitlines()[1:]
    assert max(map(len, about)) <= 50 and "    torchrun train.py" in {line[:21] for line in about}
