"""What the tests share: a tiny model and a tiny tokenizer, made on the spot, and runs in several processes."""

import atexit
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import infra.device
from infra.hf import save_model
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # or each failure prints pages of it
os.environ.setdefault("OMP_NUM_THREADS", "2")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it, and so would the runs that are to be stopped by it
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sftmix-tests-")  # where data is kept encoded
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def tiny_model(vocab_size=300, seed=0, **changes) -> Transformer:
    """A model of random weights, large enough that its predictions differ from uniform."""
    torch.manual_seed(seed)
    config = {"vocab_size": vocab_size, "initializer_range": 0.2, "tie_word_embeddings": True, **TINY, **changes}
    return Transformer(ModelConfig(**config)).eval()


def random_encoded(lengths, vocab_size=300, seed=0):
    """Encoded examples with a random prompt of at least one token each and the rest supervised."""
    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[: int(torch.randint(0, length, (1,), generator=generator))] = -100
        encoded.append((ids[:-1].int(), targets.int()))
    return encoded


best_device_type = infra.device.best_device_type


def pytest_configure(config):
    """Whole programs run on the CPU, whatever --device says: tests compare what they write bit for bit."""
    if config.getoption("--device") == "cuda" and torch.cuda.is_available():
        torch.cuda.init()  # reads the variable below, which from then on is for the processes that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    infra.device.best_device_type = lambda: "cpu"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="what the numerical tests run on")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device that --device names. Tests that ask for it are skipped where the machine has no such device."""
    device = torch.device(request.config.getoption("--device"))
    if not getattr(torch, device.type).is_available():
        pytest.skip(f"--device {device.type}: PyTorch has no such device here")
    return device


def tolerance(device: torch.device, cpu: float, other: float) -> float:
    """The tolerance of a comparison: other devices sum in another order, and not always in the same one."""
    return cpu if device.type == "cpu" else other


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A SentencePiece tokenizer of 400 pieces, trained on a few sentences."""
    text = "Below is an instruction that describes a task. Write a response. ### Instruction: ### Response: "
    words = "the quick brown fox jumps over a lazy dog, and the dog sleeps on. What is it? It is a dog; 1 2 3 4 5!"
    return Tokenizer.train([text, words, words.upper()] * 5, vocab_size=400)


def write_model_and_records(folder: Path, tokenizer: Tokenizer) -> list[dict]:
    """Save a tiny model as `folder`/model, and make Alpaca records of few words to train and test it on."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    save_model(model, folder / "model", tokenizer.files_for("alpaca"))
    words = "the quick brown fox jumps over a lazy dog sleeps on".split()
    return [{"instruction": f"{w} {v}", "output": f"{v} {w}."} for w in words for v in words if w != v]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a tokenizer's files into a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def run_script(*arguments, processes=1, cwd=None, timeout=120) -> subprocess.CompletedProcess:
    """Run a Python file of the project, in so many processes under torchrun, with one thread each."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [str(a) for a in arguments]
    return subprocess.run(
        command + arguments, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
