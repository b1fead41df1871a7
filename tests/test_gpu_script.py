"""benchmarks/gpu.py: the small version on this machine, parts that fail, and the step's time on paper by hand."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import save_file

from benchmarks import gpu
from benchmarks.budget import LARGE, STEP, VERSIONS, Part, model_flops, print_budget, step_parts
from benchmarks.parts import Row, print_table, run_parts
from model import ModelConfig

# --- The script -------------------------------------------------------------------------------------------------------


def test_the_small_version_passes_its_checks_and_ends_with_a_table():
    done = run_script("benchmarks/gpu.py", "--first", "--small", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    header, line, *rows = done.stdout.splitlines()
    assert (header, line) == ("| what | result |", "|---|---|")
    results = dict(row.strip("| ").split(" | ") for row in rows)
    assert len(results) == len(rows) and "FAILED" not in done.stdout
    for what in (
        *("machine", "logits, float32", "gradients, bfloat16", "50 tokens decoded", "NTP, eager", "SFTMix, eager"),
        *("peak memory, eager", "the loss, lm_head", "the loss, lm_head: gradient of W", "a step, AdamW"),
    ):
        assert what in results
    same = [result for what, result in results.items() if what.startswith("20 steps")]
    assert same == ["the same weights, bit for bit"] * 3


def test_without_a_gpu_the_large_version_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--first"])
    with pytest.raises(SystemExit, match=r"gpu.py: error: PyTorch has no GPU here; --small runs on a CPU"):
        gpu.main()


def test_a_part_that_fails_costs_its_own_rows_alone(tmp_path, capsys):
    def raises():
        yield Row("before", "1 ms")
        raise ValueError("the reason\nand more")

    def dies():
        yield Row("alive", "2 ms")
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs():
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        yield Row("waits", "3 ms")
        child.wait()

    def passes():
        yield Row("after", "4 ms | 5 ms")

    rows = run_parts({"A": raises, "B": dies, "C": hangs, "D": passes}, seconds=60, part_seconds=3)
    assert rows == [
        Row("before", "1 ms"),
        Row("A", "ValueError: the reason", ok=False),
        Row("alive", "2 ms"),
        Row("B", "its process ended with exit code -9", ok=False),
        Row("waits", "3 ms"),
        Row("C", "took more than 3 s", ok=False),
        Row("after", "4 ms | 5 ms"),
    ]
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    end = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"  # what it had started has ended too
    print_table(rows[-2:])
    assert "| C | FAILED: took more than 3 s |\n| after | 4 ms / 5 ms |\n" in capsys.readouterr().out


class FakeRun:
    """Stands for `train.py`, which ends at once with a model of the next weight in `weights`."""

    weights: list = []  # noqa: RUF012
    returncode = 0

    def __init__(self, command, **_):
        folder = Path(command[command.index("--output") + 1]) / "sftmix"
        folder.mkdir(parents=True)
        save_file({"weight": torch.tensor([self.weights.pop(0)])}, folder / "model.safetensors")

    def communicate(self):
        return None, "a warning\ntrain.py: error: what is wrong\n"

    def poll(self):
        return self.returncode

    wait, kill = poll, poll


def test_runs_that_differ_fail_where_they_must_be_equal(monkeypatch):
    monkeypatch.setattr(gpu, "write_inputs", lambda *_: [])
    monkeypatch.setattr(gpu.subprocess, "Popen", FakeRun)
    outcomes = {}
    for deterministic in (False, True):
        for other in (2.0, 3.0):
            FakeRun.weights = [2.0, other]
            (row,) = gpu.run_twice(gpu.SMALL_SIZES, deterministic, kills=False)
            outcomes[deterministic, other] = (row.result, row.ok)
    assert outcomes == {
        (False, 2.0): ("the same weights, bit for bit", True),
        (False, 3.0): ("weights differ by 5.0e-01", True),
        (True, 2.0): ("the same weights, bit for bit", True),
        (True, 3.0): ("weights differ by 5.0e-01", False),
    }


def test_a_run_that_fails_or_is_not_killed_in_time_is_told(monkeypatch):
    monkeypatch.setattr(gpu, "write_inputs", lambda *_: [])
    monkeypatch.setattr(gpu.subprocess, "Popen", FakeRun)
    for returncode, kills, message in ((1, False, "train.py: error: what is wrong"), (0, True, "before it could be")):
        FakeRun.weights = [2.0, 2.0]
        monkeypatch.setattr(FakeRun, "returncode", returncode)
        with pytest.raises(RuntimeError, match=message):
            list(gpu.run_twice(gpu.SMALL_SIZES, deterministic=True, kills=kills))


@pytest.mark.parametrize(
    "name, shapes, part",
    [
        ("aten::mm", [[2048, 64], [64, 900]], "lm_head"),  # [R, D] @ [D, V]
        ("aten::mm", [[2048, 900], [900, 64]], "lm_head: gradient of z"),  # [R, V] @ [V, D]
        ("aten::addmm", [[900, 64], [900, 2048], [2048, 64], [], []], "lm_head: gradient of W"),  # + [V, R] @ [R, D]
        ("aten::mm", [[2048, 64], [64, 128], [2048, 128]], "blocks: matmuls"),  # with out=
        ("aten::_flash_attention_backward", [], "blocks: attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "blocks: attention"),
        ("aten::_fused_adamw_", [], "AdamW"),
        ("aten::_foreach_norm", [], "gradient clipping"),
        ("aten::embedding_dense_backward", [], "embedding"),
        ("triton_red_fused_add_mul_3", [], "element-wise, casts and sums"),
    ],
)
def test_operations_are_counted_to_their_part_of_a_step(name, shapes, part):
    assert gpu.part_of_step(name, shapes, vocab_size=900) == part


# --- The budget -------------------------------------------------------------------------------------------------------


def test_the_budget_by_hand():
    """A block has 2048·2048 weights in q and in o, 2048·512 in k and in v, and three times 2048·8192 in the MLP."""
    weights = 16 * (2 * 4_194_304 + 2 * 1_048_576 + 3 * 16_777_216)
    head = 128_256 * 2_048
    assert (weights, head) == (973_078_528, 262_668_288)
    keys = 16_384 * 256  # of all queries: half of 512 each
    flops = 6 * weights * 16_384 + 6 * head * 8_192 + 12 * 16 * 2_048 * keys
    assert model_flops(ModelConfig(**LARGE), STEP) == flops == pytest.approx(110.2e12, rel=1e-3)

    eager, compiled, after = (
        {part.name: part.milliseconds for part in step_parts(ModelConfig(**LARGE), STEP, version)}
        for version in VERSIONS
    )
    assert eager["blocks: matmuls"] == pytest.approx(1e3 * 6 * weights * 16_384 / (0.6 * 989e12))  # 161.2
    assert eager["AdamW"] == pytest.approx(1e3 * 28 * (weights + head) / (0.85 * 3.35e12))  # 12.2
    # 8,192 positions, 2 · 2,867 of them mixed: in chunks of 523 rows these are 11 + 5, in chunks of 2,048 rows 3 + 2.
    for parts, chunks, bytes_each in ((compiled, 16, 12), (after, 5, 8)):
        expected = 1e3 * head * (4 + chunks * bytes_each) / (0.85 * 3.35e12)  # 18.1 and 4.1
        assert parts["lm_head: gradients of W are summed"] == pytest.approx(expected)
    # Of 523 rows, a matmul in tiles of 128 computes 640.
    assert compiled["lm_head"] == pytest.approx(1e3 * 2 * head * 8_192 * 640 / 523 / (0.6 * 989e12))  # 8.9
    assert after["lm_head"] == pytest.approx(1e3 * 2 * head * 8_192 / (0.6 * 989e12))  # 7.3


def test_a_part_takes_the_longer_of_its_two_times():
    assert Part("x", flops=989e9, bytes=1).milliseconds == pytest.approx(1 / 0.6)
    assert Part("x", flops=1, bytes=3.35e9).milliseconds == pytest.approx(1 / 0.85)


def test_the_document_holds_the_budget_as_it_is_printed(capsys):
    print_budget()
    assert capsys.readouterr().out in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
