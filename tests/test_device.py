"""The device of a process, and processes of which one fails."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, best_device_type, run_script, write_model_and_records

import infra.device
import infra.distributed
from infra.device import resolve_compile, resolve_device, resolve_dtype
from infra.distributed import init_distributed, wait_for_rank0
from infra.resume import RESUME_MAY_CHANGE
from train import main, parse_config


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that PyTorch sees so many GPUs of this compute capability."""

    def pretend(count: int, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return pretend


# --- Which device -----------------------------------------------------------------------------------------------------


def test_each_process_has_the_gpu_of_its_number(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"^--device cuda: process 2 .* PyTorch sees 2; --nproc_per_node 2 starts"):
        resolve_device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "usable, there, visible, expected",
    [
        (1, True, None, "cuda"),
        (0, True, None, "cuda"),  # and then `resolve_device` says why it is not usable
        (0, True, "0", "cuda"),
        (0, True, "", "cpu"),
        (0, True, "-1", "cpu"),
        (0, False, None, "cpu"),
    ],
)
def test_an_nvidia_gpu_is_chosen_unless_it_is_hidden(gpus, monkeypatch, usable, there, visible, expected):
    gpus(usable)
    monkeypatch.setattr(infra.device.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"] * there))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert best_device_type() == expected


def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_train_on_the_cpu(gpus, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 1). Please update.\nMore.")

    gpus(0)
    monkeypatch.setattr(infra.device, "best_device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError) as error:
        resolve_device(None)
    assert str(error.value) == (
        "PyTorch cannot use a GPU here (The NVIDIA driver on your system is too old (found version 1)); --device cpu "
        "does without one"
    )
    assert resolve_device("cpu").type == "cpu"


def test_an_apple_gpu_has_a_single_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps").type == best_device_type() == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert best_device_type() == "cpu"
    with pytest.raises(ValueError, match="--device mps: an Apple GPU runs a single process"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: PyTorch finds no Apple GPU"):
        resolve_device("mps")


def test_bf16_is_refused_on_a_gpu_before_ampere(gpus):
    gpus(1, capability=(7, 5))
    assert resolve_dtype(None, "cuda") == resolve_dtype("fp32", "cuda") == "fp32"
    with pytest.raises(ValueError, match="--dtype bf16: Tesla T4 has no bf16 matmuls"):
        resolve_dtype("bf16", "cuda")
    gpus(1, capability=(8, 0))
    assert resolve_dtype(None, "cuda") == "bf16" and resolve_dtype("fp32", "cuda") == "fp32"
    assert resolve_dtype(None, "mps") == "fp32" and resolve_dtype("bf16", "mps") == "bf16"


@pytest.mark.parametrize(
    ("supported", "dtype"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32"), ({}, "fp32")],
)
def test_cpu_dtype_is_bf16_where_the_cpu_multiplies_in_it(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: supported)
    assert resolve_dtype(None, "cpu") == dtype and resolve_dtype("fp32", "cpu") == "fp32"


# --- How it computes --------------------------------------------------------------------------------------------------


def pretend_to_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)


def test_nothing_is_compiled_where_each_run_gives_the_same_bits(monkeypatch):
    """What is compiled depends on the first row, which in a resumed run is another one."""
    pretend_to_compile(monkeypatch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert resolve_compile(None, torch.device("cuda")) is False
    with pytest.raises(ValueError, match="--compile: does not give the same bits in each run"):
        resolve_compile(True, torch.device("cuda"))


def test_blocks_are_compiled_by_default_on_an_nvidia_gpu_alone(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    pretend_to_compile(monkeypatch)
    compiled = [resolve_compile(compile, device) for device in (cuda, cpu) for compile in (None, True, False)]
    assert compiled == [True, True, False, False, True, False]


def test_compilation_that_fails_is_an_error_only_if_it_was_asked_for(monkeypatch, capsys):
    def compile(function):
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    told = "torch.compile does not work here (Failed to find C compiler.)"
    assert resolve_compile(None, torch.device("cuda")) is False
    assert capsys.readouterr().err == f"the blocks are not compiled, since {told}\n"
    with pytest.raises(ValueError, match=f"--compile: {told}".replace("(", "\\(").replace(")", "\\)")):
        resolve_compile(True, torch.device("cpu"))


def test_flags_of_the_device_are_parsed():
    given = ["--model", "m", "--data", "d", "--output", "o"]
    assert parse_config(given).compile is None
    assert [parse_config([*given, flag]).compile for flag in ("--compile", "--no_compile")] == [True, False]
    config = parse_config([*given, "--device", "cpu", "--deterministic", "--tf32"])
    assert (config.device, config.deterministic, config.tf32) == ("cpu", True, True)
    with pytest.raises(SystemExit):
        parse_config([*given, "--device", "tpu"])


def test_the_allocator_is_configured_before_pytorch_is_imported():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    (configured,) = (i for i, line in enumerate(lines) if "expandable_segments" in line)
    assert configured < lines.index("import torch") and lines[configured].startswith("os.environ.setdefault(")


def test_tf32_is_refused_where_it_has_no_effect(tmp_path, tokenizer, capsys):
    write_model_and_records(tmp_path, tokenizer)
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    given = ["--model", tmp_path / "model", "--data", tmp_path / "d.jsonl", "--output", tmp_path / "o", "--tf32"]
    with pytest.raises(SystemExit):
        main(map(str, given))
    assert "--tf32: is for --dtype fp32 on a GPU" in capsys.readouterr().err


def test_deterministic_turns_the_modes_on_before_the_device_is_used():
    script = (
        "import os, torch, train\n"
        "def run(config, device):\n    import torch._inductor.config as inductor\n"
        "    print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,\n"
        "        torch.cuda.is_initialized(), os.environ['CUBLAS_WORKSPACE_CONFIG'], inductor.deterministic)\n"
        "train.run = run\n"
        "train.main(['--deterministic'])\n"
    )
    assert run_script("-c", script).stdout == "True False False :4096:8 True\n"


def test_an_operation_without_a_deterministic_form_is_named(capsys):
    with pytest.raises(SystemExit) as exit, init_distributed():
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic…'")
    told = "--deterministic: PyTorch has no deterministic put_ on this device; leave the flag out\n"
    assert exit.value.code == 1 and capsys.readouterr().err.endswith(f"error: {told}")


@pytest.mark.parametrize(
    "error, told",
    [
        (RuntimeError("a.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), "out of memory ("),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). More."), "out of memory (MPS backend"),
        (dist.DistNetworkError("The client socket has timed out"), "the processes do not find one another (The client"),
        (
            torch._dynamo.exc.InternalTorchDynamoError("no kernel\nat line 3"),
            "torch.compile fails on this model (no kernel); --no_compile does without",
        ),
        (AttributeError("no attribute '_set_timeout'"), "Traceback"),
        (KeyError("timeout"), "Traceback"),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), "Traceback"),
    ],
)
def test_what_an_error_is_called(error, told, capsys):
    with pytest.raises(SystemExit), init_distributed():
        raise error
    printed = capsys.readouterr().err
    assert printed.startswith(told) if told == "Traceback" else f"error: {told}" in printed


# --- One of several processes fails -----------------------------------------------------------------------------------

FAILURES = {
    "out of memory": (1, "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')"),
    "disk full": (0, "raise OSError(28, 'No space left on device', 'o/model.safetensors')"),
    "a signal": (1, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"),
}
TOLD = {
    "out of memory": "out of memory (CUDA out of memory); a lower --micro_batch_tokens or --batch_size takes less",
    "disk full": "[Errno 28] No space left on device: 'o/model.safetensors'",
    "a signal": None,  # torchrun's report has it
}


@pytest.mark.parametrize("failure", FAILURES)
def test_where_one_process_fails_all_end_soon_and_one_line_says_why(tmp_path, failure):
    number, statement = FAILURES[failure]
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\nimport torch\nimport torch.distributed as dist\n"
        "dist.destroy_process_group = lambda: time.sleep(100)  # NCCL's waits for the others, unlike gloo's\n"
        "from infra.distributed import all_reduce_sum, defer_signals, exit_on_signals, init_distributed, rank\n"
        "with init_distributed(), exit_on_signals() if rank() == 1 else defer_signals():\n"
        "    all_reduce_sum(torch.ones(1))\n"
        f"    if rank() == {number}:\n        open('failed', 'w').write(str(time.time()))\n        {statement}\n"
        "    all_reduce_sum(torch.ones(1))  # waits for the process that failed\n"
    )
    done = run_script(script, processes=2, cwd=tmp_path)
    assert done.returncode != 0 and time.time() - float((tmp_path / "failed").read_text()) < 30
    told = [line for line in done.stderr.splitlines() if line.startswith("script.py: error: ")]
    assert told == ([f"script.py: error: {TOLD[failure]}"] if TOLD[failure] else []), done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(script) not in done.stderr


@pytest.mark.parametrize("rank, before", [(0, []), (1, [timedelta(days=1)])])
def test_only_what_rank_0_does_alone_may_take_a_day(monkeypatch, rank, before):
    timeouts = []
    monkeypatch.setattr(infra.distributed, "rank", lambda: rank)
    monkeypatch.setattr(infra.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", timeouts.append)
    monkeypatch.setattr(dist, "barrier", lambda: timeouts.append("waits"))
    wait_for_rank0()
    assert timeouts == [*before, "waits", infra.distributed.TIMEOUT]


def test_a_group_of_processes_is_left_when_all_has_gone_well(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    with init_distributed() as device:
        assert dist.is_initialized() and device.type == "cpu" and os.environ["RANK"] == "0"
    assert not dist.is_initialized()


def test_a_resumed_run_may_use_another_device():
    assert {"device", "compile", "deterministic"} <= RESUME_MAY_CHANGE
