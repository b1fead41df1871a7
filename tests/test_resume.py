"""A run that was stopped, anywhere and by whatever, ends where an uninterrupted one does, bit for bit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, tiny_model, write_model_and_records
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem

import infra.files
import infra.hf
import infra.savepoints
import train as train_module
from data import load_examples
from infra.files import atomic_write, verify_manifest
from infra.hf import load_model, save_model
from infra.metrics import StepMetrics
from infra.output import check_not_started, lock_output, may_hold_data
from infra.resume import begin_run, continue_config
from infra.savepoints import Savepoints
from train import TrainConfig, main, make_optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model and 20 training examples."""
    path = tmp_path_factory.mktemp("resume")
    records = write_model_and_records(path, tokenizer)
    (path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:20]))
    (path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[20:24]))
    return path


def flags(folder, output, *more):
    small = "--epochs 2 --batch_size 6 --lr 1e-2 --num_checkpoints 2 --dtype fp32 --log_every 2 --save_every 3".split()
    paths = {"--model": "model", "--data": "train.jsonl", "--eval_data": "eval.jsonl"}
    given = [x for flag, name in paths.items() if flag not in more for x in (flag, folder / name)]
    return [str(a) for a in (*given, "--output", output, *small, *more)]


def outcome(output):
    """All that a run made, but for times and paths."""
    models = {f: load_file(output / f / "model.safetensors") for f in ("reference", "sftmix") if (output / f).exists()}
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        for key in ("tokens_per_second", "seconds", "seconds_left"):
            record.pop(key, None)
    return models, metrics, (output / "confidence.jsonl").read_text()


def assert_same(one, other):
    models, others = one[0], other[0]
    assert models.keys() == others.keys()
    for name in models:
        assert all(torch.equal(models[name][key], others[name][key]) for key in models[name])
    assert one[1:] == other[1:]


VARIANTS = {"full": (), "lora": ("--lora_rank", 2), "online": ("--confidence", "online")}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def uninterrupted(request, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "o"
    main(flags(folder, output, *request.param))
    assert not (output / "resume").exists() and not (output / "lock").exists()
    return request.param, outcome(output)


@pytest.fixture(scope="module")
def plain(folder):
    main(flags(folder, folder / "plain"))
    return outcome(folder / "plain")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 17, 3))
def test_a_run_killed_at_any_step_ends_at_the_same_weights(folder, uninterrupted, tmp_path, monkeypatch, moment):
    """Killed in the middle of its step number `moment`, counted over all stages, and once more three steps on."""
    choice, expected = uninterrupted
    num_steps = 8 if "online" in choice else 16
    moment = (moment - 1) % num_steps + 1
    steps, real = [], train_module.forward_backward

    def killed(*arguments, **named):
        steps.append(len(steps))
        if len(steps) in (moment, moment + 3):
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(train_module, "forward_backward", killed)
    for _ in range(4):
        try:
            main(flags(folder, tmp_path / "o", *choice, "--resume"))
            break
        except Killed:
            continue
    assert len(steps) > num_steps  # it was killed, and a step begun again
    assert_same(outcome(tmp_path / "o"), expected)


@pytest.mark.parametrize("write", range(0, 30, 5))
def test_a_run_killed_while_it_writes_ends_at_the_same_weights(folder, plain, tmp_path, monkeypatch, write):
    """The process goes between two flushes: what was being written is half there."""
    count, real = [], infra.files.fsync

    def killed(path):
        count.append(path)
        if len(count) == write + 1:
            raise Killed
        real(path)

    with monkeypatch.context() as patch:
        for module in (infra.files, infra.hf, infra.savepoints):
            patch.setattr(module, "fsync", killed)
        with pytest.raises(Killed):
            main(flags(folder, tmp_path / "o"))
    main(flags(folder, tmp_path / "o", "--resume"))
    assert_same(outcome(tmp_path / "o"), plain)


def stopped(folder, output, monkeypatch, *more, step=5):
    """A run killed in its `step`."""
    count, real = [], train_module.forward_backward

    def killed(*arguments, **named):
        count.append(1)
        if len(count) == step:
            raise Killed
        return real(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_module, "forward_backward", killed)
        main(flags(folder, output, "--save_every", "1", *more))


def error_of(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and error.endswith("\n")
    return exit.value.code, error


def test_a_changed_flag_or_file_is_refused_and_named(folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    shutil.copy(folder / "train.jsonl", data)
    given = ("--data", data)
    stopped(folder, tmp_path / "o", monkeypatch, *given)
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()}
    for change in (("--lr", "1e-3"), ("--mu", "0.3"), ("--epochs", "3"), ("--seed", "1"), ("--lora_rank", "2")):
        code, error = error_of(capsys, flags(folder, tmp_path / "o", *given, "--resume", *change))
        assert code == 1 and change[0] in error and "was begun with" in error and error.count("\n") == 1
    code, error = error_of(capsys, flags(folder, tmp_path / "o", *given))
    assert code == 1 and "reference: already there; --resume resumes the run" in error
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    code, error = error_of(capsys, flags(folder, tmp_path / "o", *given, "--resume"))
    assert code == 1 and f"--data {data}: is not what it was" in error
    assert {p: p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()} == before
    shutil.copy(folder / "train.jsonl", data)
    free = ("--log_every", "2", "--save_every", "2", "--keep_last", "1", "--micro_batch_tokens", "500")
    main(flags(folder, tmp_path / "o", *given, "--resume", *free))


def test_a_stage_of_the_demo_without_its_base_is_told(tmp_path, capsys):
    code, error = error_of(capsys, ["--output", str(tmp_path / "o"), "--stage", "reference"])
    assert code == 1 and f"{tmp_path / 'o'}/base: not found; --stage base makes it" in error


def test_a_stopped_run_is_not_begun_anew(folder, tmp_path, monkeypatch, capsys):
    stopped(folder, tmp_path / "o", monkeypatch, step=3)  # before it has made anything else
    capsys.readouterr()
    code, error = error_of(capsys, flags(folder, tmp_path / "o"))
    assert code == 1 and "a run was stopped here; --resume resumes it" in error


def test_no_other_reference_run_begins_under_a_stopped_sftmix_run(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "o" / "resume" / "sftmix-step-9").mkdir(parents=True)
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--stage", "reference"))
    assert code == 1 and "sftmix-step-9: of a stopped SFTMix run, whose split would change" in error
    (tmp_path / "o" / "resume" / "sftmix-step-9").rename(tmp_path / "o" / "sftmix")
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--stage", "reference"))
    assert code == 1 and "sftmix: was split by the scores of an earlier reference run; move it away" in error
    for choice in ({"confidence": "scores.jsonl"}, {"pairing": "random"}):  # whose split does not change
        (tmp_path / "o" / "config.json").write_text(json.dumps(choice))
        check_not_started(TrainConfig(model="m", data="d", output=str(tmp_path / "o"), stage="reference"))


def test_a_damaged_savepoint_is_said_and_the_one_before_is_used(folder, plain, tmp_path, monkeypatch, capsys):
    stopped(folder, tmp_path / "o", monkeypatch)
    kept = sorted((tmp_path / "o" / "resume").iterdir())
    assert [f.name for f in kept] == ["reference-step-3", "reference-step-4"]  # --keep_last 2
    file = next(kept[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    main(flags(folder, tmp_path / "o", "--resume"))
    told = capsys.readouterr()
    assert f"{file}: damaged" in told.err and "resumes after step 3" in told.out
    assert_same(outcome(tmp_path / "o"), plain)


def test_a_savepoint_outlives_a_damaged_one_of_a_later_step(tmp_path, capsys):
    model, metrics = tiny_model(), StepMetrics(10, torch.device("cpu"))
    optimizer, savepoints = make_optimizer(model, TrainConfig()), Savepoints(tmp_path, "reference", every=1, keep=1)
    for step in (9, 4):
        savepoints.save(step, model, optimizer, metrics)
        for file in (tmp_path / "resume" / "reference-step-9").glob("*.safetensors"):
            file.write_bytes(b"damaged")
    (tmp_path / "resume" / "reference-step-6.partial").mkdir()  # of a process that was killed
    assert savepoints.load(model, optimizer, metrics) == 4
    assert [folder.name for folder in (tmp_path / "resume").iterdir()] == ["reference-step-4"]


def test_savepoints_that_cannot_be_read_are_not_taken_for_none(tmp_path, monkeypatch):
    model, metrics = tiny_model(), StepMetrics(10, torch.device("cpu"))
    optimizer, savepoints = make_optimizer(model, TrainConfig()), Savepoints(tmp_path, "reference", every=1, keep=1)
    savepoints.save(4, model, optimizer, metrics)
    with monkeypatch.context() as patch:  # a file server that does not answer
        patch.setattr(infra.savepoints, "verify_manifest", lambda *_, **__: Path("/proc/self/mem").read_bytes())
        with pytest.raises(OSError, match="Input/output error"):
            savepoints.load(model, optimizer, metrics)
    assert savepoints.load(model, optimizer, metrics) == 4


def test_a_signal_while_the_last_savepoint_is_written_ends_the_run(folder, plain, tmp_path, monkeypatch):
    real = Savepoints.save

    def save(self, step, *state):
        real(self, step, *state)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Savepoints, "save", save)
        main(flags(folder, tmp_path / "o"))
    assert ended.value.code == 128 + signal.SIGTERM
    assert "ntp" not in json.loads((tmp_path / "o" / "results.json").read_text())
    main(flags(folder, tmp_path / "o", "--resume"))
    assert_same(outcome(tmp_path / "o"), plain)


def test_a_savepoint_takes_the_cpu_memory_of_a_part(tmp_path, monkeypatch):
    """Python's share of it: the serialized bytes. What a GPU would add is copied to memory that is not pinned."""
    model = tiny_model(vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    optimizer, metrics = make_optimizer(model, TrainConfig()), StepMetrics(10, torch.device("cpu"))
    state = 12 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(infra.savepoints, "MAX_FILE_BYTES", state // 20)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", None)  # copies to pinned memory; chosen where CUDA is
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    savepoints = Savepoints(tmp_path, "reference", every=1, keep=2)
    savepoints.save(1, model, optimizer, metrics)
    folder = tmp_path / "resume" / "reference-step-1"
    files = {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert set(json.loads((folder / "manifest.json").read_text())) == files and len(files) > 20
    monkeypatch.setattr(infra.savepoints, "checksums", lambda files: {})  # these take megabytes, whatever they read
    tracemalloc.start()
    savepoints.save(2, model, optimizer, metrics)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state / 20 < peak < state / 4


def test_a_savepoint_in_one_file_loads(tmp_path, monkeypatch):
    """As it was written before savepoints had parts."""
    model = tiny_model()
    optimizer, metrics = make_optimizer(model, TrainConfig()), StepMetrics(10, torch.device("cpu"))
    monkeypatch.setattr(infra.savepoints, "MAX_FILE_BYTES", 10**9)
    savepoints = Savepoints(tmp_path, "reference", every=1, keep=2)
    savepoints.save(3, model, optimizer, metrics)
    folder = tmp_path / "resume" / "reference-step-3"
    (file,) = folder.glob("*.safetensors")
    assert file.name == "shard-00001-model-00001-of-00001.safetensors"
    other = tiny_model(seed=1)
    assert savepoints.load(other, make_optimizer(other, TrainConfig()), metrics) == 3
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_finished_stages_are_not_run_again(folder, tmp_path, monkeypatch, capsys):
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    made = (tmp_path / "o" / "reference" / "model.safetensors").stat().st_mtime_ns
    main(flags(folder, tmp_path / "o", "--resume"))
    assert (tmp_path / "o" / "reference" / "model.safetensors").stat().st_mtime_ns == made
    assert (tmp_path / "o" / "sftmix" / "config.json").exists()


def test_scores_of_checkpoints_are_kept_on_the_way(folder, tmp_path, monkeypatch):
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    opened, real = [], infra.hf.load_model

    def load_model(path, *settings, **more):
        opened.append(path.name)
        if len(opened) == 2:
            raise Killed
        return real(path, *settings, **more)

    monkeypatch.setattr(infra.hf, "load_model", load_model)
    with pytest.raises(Killed):
        main(flags(folder, tmp_path / "o", "--resume"))
    main(flags(folder, tmp_path / "o", "--resume"))
    assert opened == ["step-4", "step-8", "step-8"]


def test_scores_on_the_way_are_not_those_of_another_reference_run(folder, tmp_path):
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    (tmp_path / "o" / "resume" / "confidence").mkdir(parents=True)
    (tmp_path / "o" / "resume" / "confidence" / "0-step-4.npz").write_bytes(b"of the first reference run")
    shutil.rmtree(tmp_path / "o" / "reference")
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    main(flags(folder, tmp_path / "o", "--stage", "confidence"))


def test_two_processes_go_on_where_one_was_killed(folder, plain, tmp_path, monkeypatch):
    stopped(folder, tmp_path / "o", monkeypatch, step=6)
    done = run_script("train.py", *flags(folder, tmp_path / "o", "--resume"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = outcome(tmp_path / "o")[0], plain[0]
    for key, weight in one["reference"].items():
        assert (weight - two["reference"][key]).norm() <= 1e-5 * weight.norm()


def test_torchrun_restarts_a_run_that_then_goes_on(folder, plain, tmp_path):
    """The worker is killed once it has a savepoint; torchrun begins it again, without --resume."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    arguments = flags(folder, tmp_path / "o", "--save_every", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "o").glob("resume/reference-step-*[0-9]")):
        assert process.poll() is None
        time.sleep(0.005)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and b"resumes after step" in said
    for name in ("reference", "sftmix"):
        one, other = load_file(tmp_path / "o" / name / "model.safetensors"), plain[0][name]
        for key, weight in one.items():  # with another number of threads
            assert (weight - other[key]).norm() <= 1e-4 * weight.norm()


def test_a_restart_that_one_machine_counts_is_one_on_all(folder, tmp_path, monkeypatch):
    """torchrun counts a failure on the machine that had it; the others join the next attempt without counting."""
    stopped(folder, tmp_path / "o", monkeypatch, step=6)
    with socket.create_server(("localhost", 0)) as server:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    processes = []
    for number in "01":
        group |= {"RANK": number, "LOCAL_RANK": number, "TORCHELASTIC_RESTART_COUNT": number, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train.py"), *flags(folder, tmp_path / "o")]
        processes.append(subprocess.Popen(command, env={**os.environ, **group}, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and "resumes after step" in said[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_finish_the_step_save_and_end_with_the_code_of_convention(folder, tmp_path, number):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = flags(folder, tmp_path / "o", "--epochs", "2000", "--save_every", "100000", "--log_every", "1")
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "o" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (state,) = (tmp_path / "o" / "resume").iterdir()
    verify_manifest(state)
    step = state.name.removeprefix("reference-step-")
    told = "\nfinishing the step and saving it; Ctrl-C again stops at once\n" if number == signal.SIGINT else ""
    assert error == f"{told}stopped after step {step}; --resume resumes it\n"
    assert json.loads((tmp_path / "o" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(step)


def test_a_run_stopped_by_a_signal_loses_no_step_of_its_log(folder, tmp_path, monkeypatch):
    def losses(output):
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    one, other = (
        flags(folder, tmp_path / name, "--stage", "reference", "--log_every", "8") for name in ("one", "other")
    )
    main(one)
    count, real = [], train_module.forward_backward

    def signalled(*arguments, **named):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_module, "forward_backward", signalled)
        main(other)
    main([*other, "--resume"])
    assert losses(tmp_path / "one") == losses(tmp_path / "other")


# --- The output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "results.json", "confidence.jsonl", "reference", "sftmix", "skipped.jsonl", "lock"]
)
def test_an_output_that_no_run_has_written_is_left_as_it_is(folder, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    assert error_of(capsys, flags(folder, tmp_path))[0] == 1
    code, error = error_of(capsys, flags(folder, tmp_path, "--resume"))
    assert code == 1 and f"{tmp_path / name}: already there, and not written by a run" in error
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"model_type": "llama"}']


def test_the_demo_does_not_replace_data(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    code, error = error_of(capsys, ["--output", str(tmp_path)])
    assert code == 1 and f"{tmp_path / 'data'}: already there" in error
    assert (tmp_path / "data" / "train.jsonl").read_text() == "mine"


def test_the_demo_does_not_replace_the_data_of_another_run(folder, tmp_path, capsys):
    """A run on the data in a folder `data` beside its output, where the demo is then begun by mistake."""
    data = tmp_path / "data" / "train.jsonl"
    data.parent.mkdir()
    shutil.copy(folder / "train.jsonl", data)
    main(flags(folder, tmp_path, "--data", data, "--stage", "base"))
    code, error = error_of(capsys, ["--output", str(tmp_path), "--resume"])
    assert code == 1 and f"{tmp_path / 'data'}: already there" in error
    assert data.read_bytes() == (folder / "train.jsonl").read_bytes()


@pytest.mark.parametrize("data", ["", "*.jsonl", "**/*.jsonl", "../*/*.jsonl"])
def test_the_output_does_not_become_part_of_the_data(folder, tmp_path, capsys, data):
    shutil.copy(folder / "train.jsonl", tmp_path)
    code, error = error_of(capsys, flags(folder, tmp_path, "--data", str(folder / "eval.jsonl"), str(tmp_path / data)))
    assert code == 1 and "is the folder of the data" in error and len(list(tmp_path.iterdir())) == 1


def test_an_output_below_the_data_is_not_part_of_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "d.jsonl").touch()
    for data, parts in (("a", ["a"]), ("a/d.jsonl", []), ("a/*.jsonl", ["a"]), ("*/*.jsonl", ["", "a"])):
        for folder in ("", "a", "a/o", "b"):
            expected = folder in parts or (data == "*/*.jsonl" and folder == "b")
            assert may_hold_data(str(tmp_path / data), tmp_path / folder) == expected
    assert may_hold_data(str(tmp_path / "**" / "*.jsonl"), tmp_path / "a" / "o")


def test_scores_that_are_gone_are_made_again_beside_savepoints(folder, plain, tmp_path, monkeypatch, capsys):
    stopped(folder, tmp_path / "o", monkeypatch, step=11)  # in the SFTMix run
    (tmp_path / "o" / "confidence.jsonl").unlink()
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--resume"))
    assert code == 1 and "--stage confidence makes it" in error
    main(flags(folder, tmp_path / "o", "--stage", "confidence"))
    main(flags(folder, tmp_path / "o", "--resume"))
    models, _, scores = outcome(tmp_path / "o")
    assert_same((models, scores), (plain[0], plain[2]))


def test_stages_started_one_by_one_are_of_one_run(folder, tmp_path, capsys):
    """Models that are compared have the same settings and held-out examples, but for what counts in a single stage."""
    output = tmp_path / "o"
    without = [word for word in flags(folder, output, "--stage", "confidence") if "eval" not in word]
    main(flags(folder, output, "--stage", "reference"))
    for change, said in (
        (("--lr", "1e-3"), "--lr 0.001: the run in"),
        (("--template", "mistral"), "--template mistral: the run in"),
        (("--eval_data", str(folder / "train.jsonl")), "--eval_data"),
    ):
        code, error = error_of(capsys, flags(folder, output, "--stage", "confidence", *change))
        assert code == 1 and said in error and error.count("\n") == 1
    main(without)
    code, error = error_of(capsys, ["sftmix" if word == "confidence" else word for word in without])
    assert code == 1 and f"--eval_data: the run in {output} was begun with it" in error
    code, error = error_of(capsys, flags(folder, output, "--stage", "sftmix", "--eval_data", folder / "train.jsonl"))
    assert code == 1 and "--eval_data" in error and "is not what it was" in error
    scores, others = output / "confidence.jsonl", tmp_path / "scores.jsonl"
    others.write_text("".join(reversed(scores.read_text().splitlines(keepends=True))))
    only = ("--stage", "sftmix", "--mu", "0.5", "--confidence_by", "perplexity")
    main(flags(folder, output, *only, "--confidence", scores))
    shutil.rmtree(output / "sftmix")
    main(flags(folder, output, *only, "--confidence", others))


@pytest.mark.parametrize("lost", ["results.json", "reference/config.json"])
def test_what_a_stage_has_made_is_not_taken_for_that_of_another_run(folder, tmp_path, capsys, lost):
    """A run killed before its first savepoint, or without its results, has made checkpoints with its settings."""
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    (tmp_path / "o" / lost).unlink()
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--stage", "base", "--lr", "1e-3"))
    assert code == 1 and "--lr 0.001: the run in" in error


def test_flags_of_another_stage_stay_as_they_were(folder, tmp_path, capsys):
    output, scores = tmp_path / "o", tmp_path / "scores.jsonl"
    only = ("--mu", "0.5", "--confidence", scores)
    main(flags(folder, output, "--stage", "reference", "--num_checkpoints", "3"))
    main(flags(folder, output, "--stage", "confidence"))
    shutil.move(output / "confidence.jsonl", scores)
    main(flags(folder, output, "--stage", "sftmix", *only))
    main(flags(folder, output, "--stage", "confidence"))
    code, error = error_of(capsys, flags(folder, output, "--resume", "--num_checkpoints", "3"))
    assert code == 1 and "--confidence None: the run in" in error
    main(flags(folder, output, "--stage", "sftmix", "--resume", *only))  # with another number of checkpoints
    relative = ("--confidence", os.path.relpath(scores))  # of a file, the content is compared
    main(flags(folder, output, "--resume", "--num_checkpoints", "3", *only, *relative))


def test_scores_and_checkpoints_are_those_that_the_run_has_made(folder, tmp_path, capsys):
    output = tmp_path / "o"
    main(flags(folder, output, "--stage", "reference"))
    shutil.move(output / "reference" / "checkpoints" / "step-4", tmp_path)
    code, error = error_of(capsys, flags(folder, output, "--stage", "confidence"))
    assert code == 1 and "reference/checkpoints: 1 of 2 checkpoints left" in error and not error[:-1].count("\n")
    shutil.move(tmp_path / "step-4", output / "reference" / "checkpoints")
    main(flags(folder, output, "--stage", "confidence"))
    scores = output / "confidence.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[1:]))
    for more in (("--stage", "sftmix"), ("--resume",)):
        code, error = error_of(capsys, flags(folder, output, *more))
        assert code == 1 and f"{scores}: is not what the confidence stage has written" in error
    code, error = error_of(capsys, flags(folder, output, "--stage", "sftmix", "--confidence", scores))
    assert code == 1 and f"{scores}: 1 of 20 examples have no confidence score" in error


def test_savepoints_of_a_finished_stage_go_when_the_run_goes_on(folder, tmp_path):
    """It was killed between the results of the stage and the removal of its savepoints."""
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    (tmp_path / "o" / "resume" / "reference-step-3").mkdir(parents=True)
    main(flags(folder, tmp_path / "o", "--resume"))
    assert not (tmp_path / "o" / "resume").exists()


def test_what_a_finished_stage_has_made_and_is_gone_is_said(folder, tmp_path, capsys):
    output = tmp_path / "o"
    main(flags(folder, output))
    shutil.rmtree(output / "sftmix")
    (output / "confidence.jsonl").unlink()
    main(flags(folder, output, "--resume"))
    told = capsys.readouterr().err
    for name, stage in (("confidence.jsonl", "confidence"), ("sftmix", "sftmix")):
        assert f"{output / name}: is gone, though its stage is finished; --stage {stage} makes it again" in told
    assert told.count("is gone") == 2
    code, error = error_of(capsys, flags(folder, output, "--stage", "sftmix"))
    assert code == 1 and f"{output}/confidence.jsonl: not found; train.py --stage confidence makes it" in error


def test_a_stage_that_is_made_again_and_stopped_is_not_taken_for_finished(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "o"
    main(flags(folder, output))
    shutil.rmtree(output / "sftmix")
    stopped(folder, output, monkeypatch, "--stage", "sftmix", "--mu", "1")
    assert sorted(json.loads((output / "results.json").read_text())) == ["base", "confidence", "ntp"]
    main(flags(folder, output, "--resume", "--mu", "1"))
    assert list(json.loads((output / "results.json").read_text())) == ["base", "ntp", "confidence", "sftmix"]
    main(flags(folder, tmp_path / "other", "--mu", "1"))
    one, other = (load_file(path / "sftmix" / "model.safetensors") for path in (output, tmp_path / "other"))
    assert_same(({"sftmix": one},), ({"sftmix": other},))


def test_scores_of_another_run_are_not_taken_for_those_of_this_one(folder, tmp_path, capsys):
    output = tmp_path / "o"
    main(flags(folder, output))
    shutil.rmtree(output / "reference")
    shutil.rmtree(output / "sftmix")
    main(flags(folder, output, "--stage", "reference", "--num_checkpoints", "1"))
    code, error = error_of(capsys, flags(folder, output, "--stage", "sftmix"))
    assert code == 1 and f"{output}/confidence.jsonl: is not recorded as made from this reference run" in error
    (output / "confidence.jsonl").unlink()  # as the message says
    main(flags(folder, output, "--stage", "confidence", "--num_checkpoints", "1"))
    main(flags(folder, output, "--stage", "sftmix", "--num_checkpoints", "1"))
    online = tmp_path / "online"
    main(flags(folder, online, "--confidence", "online"))
    main(flags(folder, online, "--stage", "reference"))
    shutil.rmtree(online / "sftmix")
    code, error = error_of(capsys, flags(folder, online, "--stage", "sftmix"))
    assert code == 1 and f"{online}/confidence.jsonl: holds the scores of a run with --confidence online" in error


def test_results_that_were_changed_are_named(folder, tmp_path, capsys):
    main(flags(folder, tmp_path / "o", "--stage", "base"))
    for changed in ('{"base": {"loss": 3.9}}', '{"base": [3.9]}', '{"ntp": {"checkpoints": "five"}}'):
        (tmp_path / "o" / "results.json").write_text(changed)
        code, error = error_of(capsys, flags(folder, tmp_path / "o", "--stage", "base", "--resume"))
        assert code == 1 and "results.json: changed since it was written" in error


def test_a_tokenizer_file_of_another_name_makes_another_base(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    main(flags(folder, tmp_path / "o", "--model", model, "--stage", "base"))
    (model / "generation_config.json").rename(model / "generation_config_old.json")  # in the same place of a listing
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--model", model, "--stage", "reference"))
    assert code == 1 and f"--model {model}: is not what it was" in error


@pytest.mark.parametrize("file, old, new", [("config.json", "10000.0", "500.0"), ("tokenizer_config.json", "{", "{ ")])
def test_a_base_with_another_configuration_is_another_base(folder, tmp_path, monkeypatch, capsys, file, old, new):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    stopped(folder, tmp_path / "o", monkeypatch, "--model", model)
    capsys.readouterr()
    (model / "manifest.json").unlink()
    content = (model / file).read_text()
    assert old in content
    (model / file).write_text(content.replace(old, new, 1))
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--resume", "--model", model))
    assert code == 1 and f"--model {model}: is not what it was" in error


# --- What is not finite -----------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_examples_named(folder, tmp_path, monkeypatch, capsys):
    real = train_module.compute_loss

    def poisoned(model, micro_batch, *more):
        """The loss and the gradient of the micro-batch with example 7 are not finite."""
        loss, ntp, mix = real(model, micro_batch, *more)
        return (loss * torch.nan, ntp, mix) if 7 in micro_batch.example_index else (loss, ntp, mix)

    monkeypatch.setattr(train_module, "compute_loss", poisoned)
    main(flags(folder, tmp_path / "o", "--stage", "reference"))
    records = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    skipped = [record for record in records if "skipped" in record]
    assert [record["skipped"] for record in skipped] == [1, 2]  # once an epoch
    culprit = load_examples(folder / "train.jsonl")[7].id
    assert all(culprit in record["examples"] and len(record["examples"]) <= 6 for record in skipped)
    assert all(record["loss"] is not None for record in records if "skipped" not in record)
    out, err = capsys.readouterr()
    assert "skipped, since its loss is nan" in out and "warning: 2 of 8 steps were skipped, not being finite" in err
    assert json.loads((tmp_path / "o" / "results.json").read_text())["ntp"]["skipped"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / "o" / "reference").parameters())
    code, error = error_of(capsys, flags(folder, tmp_path / "p", "--stage", "reference", "--max_skipped", "1"))
    assert code == 1 and "1 steps in a row had no finite loss and gradient" in error
    assert not (tmp_path / "p" / "reference" / "config.json").exists()


def test_a_skipped_step_changes_nothing(folder, tmp_path, monkeypatch):
    """Neither weights nor moments nor AdamW's count: the run ends as if that step had not been."""
    from conftest import random_encoded

    from data import Dataset
    from train import Sampler, TrainConfig, train

    dataset, real, weights = Dataset.from_encoded(random_encoded([12, 30, 7, 22])), train_module.forward_backward, []
    monkeypatch.setattr(train_module, "learning_rate", lambda *_: 1e-2)
    for bad in (None, 2):
        steps, model = [], tiny_model()

        def compute(model, work, *more, bad=bad, steps=steps):
            steps.append(work)
            losses = real(model, work, *more)
            return losses * torch.nan if len(steps) == bad else losses

        monkeypatch.setattr(train_module, "forward_backward", compute)
        config = TrainConfig(epochs=3 if bad is None else 4, batch_size=4, dtype="fp32")
        sampler = Sampler(lambda epoch: np.arange(4), num_ntp_epochs=config.epochs)
        train(model, dataset, config, sampler, lambda record: None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_poisoned_model_is_never_saved(folder, tmp_path, capsys):
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--lr", "1e38", "--weight_decay", "0"))
    assert code == 1 and "the run has diverged" in error
    assert not list((tmp_path / "o").rglob("*.safetensors"))


def test_weights_that_are_not_finite_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, tmp_path / "m" / "model.safetensors")
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--model", tmp_path / "m"))
    assert code == 1 and "model.norm.weight holds numbers that are not finite" in error


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_second_run_on_an_output_folder_is_refused(folder, tmp_path, capsys):
    with lock_output(tmp_path / "o"):
        done = run_script("train.py", *flags(folder, tmp_path / "o"))
    assert done.returncode == 1
    assert (
        done.stderr == f"train.py: error: {tmp_path}/o: another run is at work there; wait for it, or choose another\n"
    )
    assert not (tmp_path / "o").exists()


def test_a_model_folder_that_was_damaged_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    code, error = error_of(capsys, flags(folder, tmp_path / "o", "--model", tmp_path / "m"))
    assert code == 1 and f"{file}: damaged" in error and error.count("\n") == 1
    (tmp_path / "m" / "manifest.json").write_text('{"name": "a model", "files": 3}')  # of another program
    verify_manifest(tmp_path / "m")


def test_a_model_folder_with_a_configuration_is_whole(tmp_path, monkeypatch):
    """Killed before each of its flushes in turn, until none is left."""
    model, real, flushes = tiny_model(), infra.files.fsync, []

    def fsync(path):
        if len(flushes) == allowed:
            raise Killed
        flushes.append(path)
        real(path)

    for module in (infra.files, infra.hf):
        monkeypatch.setattr(module, "fsync", fsync)
    for allowed in range(100):
        path = tmp_path / str(allowed)
        flushes.clear()
        try:
            save_model(model, path, {"tokenizer.json": b"{}"}, max_shard_bytes=20_000)
            break
        except Killed:
            assert not (path / "config.json").exists() or len(load_model(path).state_dict()) == len(model.state_dict())
            assert not (path / "partial").exists()
    assert 5 < allowed < 99 and len(list(path.iterdir())) > 5


def test_what_is_written_aside_is_whole_or_not_there(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    with pytest.raises(Killed), atomic_write(file) as aside:
        aside.write_text("ne")
        raise Killed
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with atomic_write(file) as aside:
        aside.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_demo_that_was_stopped_before_its_template_was_chosen_goes_on(tmp_path):
    begun = TrainConfig(output=str(tmp_path), resume=True)
    (tmp_path / "config.json").write_text(json.dumps(asdict(begun)))
    chosen = replace(begun, template="alpaca")
    assert continue_config(chosen).template == "alpaca"
    (tmp_path / "config.json").write_text(json.dumps(asdict(chosen)))
    with pytest.raises(ValueError, match=r"--template chatml: the run in .* was begun with alpaca"):
        continue_config(replace(begun, template="chatml"))


def test_the_demo_may_be_given_scores_before_it_has_its_data(tmp_path):
    files = {name: str(tmp_path / name) for name in ("confidence", "model", "data", "eval_data")}
    (tmp_path / "model").mkdir()
    for name in files.keys() - {"model"}:
        (tmp_path / name).write_text("{}")
    begun = TrainConfig(output=str(tmp_path), confidence=files["confidence"], resume=True)
    begin_run(begun)
    begin_run(replace(begun, **files))  # as after its base
    content = json.loads((tmp_path / "config.json").read_text())["content"]
    assert content.keys() == files.keys()
    with pytest.raises(ValueError, match=r"--eval_data: the run in .* was begun with it"):
        begin_run(replace(begun, **files | {"eval_data": None}))
