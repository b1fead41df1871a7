"""Ten minutes on one GPU: what must be checked and measured there, and how much of the GPU training uses.

    python benchmarks/gpu.py --first            a Llama of 1.2 billion parameters; needs a GPU of 80 GB
    python benchmarks/gpu.py --first --small    tiny models, to test the script, on a CPU too
    python benchmarks/gpu.py --budget           a step's parts on paper, see benchmarks/budget.py

Prints a line on stderr for each measurement, and at the end a table. Each part runs in a process of its own: if it
fails or takes too long, its row says so and the others go on. Exit code 1 says that a row failed.
"""

import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py, before PyTorch is imported

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.budget import LARGE, STEP, Work, model_flops, peak_flops, print_budget
from benchmarks.parts import Row, print_table, run_parts
from confidence import score_examples
from data import Dataset, build_batch, epoch_order, sample_lambda
from infra.demo import demo_corpus
from infra.generation import generate
from infra.hf import save_model
from infra.plan import estimate_memory, largest_micro_batch
from mixup import sftmix_loss
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from train import Sampler, TrainConfig, forward_backward, make_optimizer, optimizer_step, train


class Sizes(NamedTuple):
    """What is measured on."""

    model: dict  # of most parts
    work: Work  # of a step
    steps: int
    checked: dict  # the model that is compared with the CPU, and trained twice on
    checked_length: int  # tokens, in batches of
    batch_size: int  # examples
    matmul: int  # rows of the square matrices
    compiled: tuple[bool, ...]  # whether blocks are compiled: both, or only not


CHECKED = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
           "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
TINY = {**CHECKED, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
FULL_SIZES = Sizes(LARGE, STEP, 12, CHECKED, 500, 16, 8192, (False, True))
SMALL_SIZES = Sizes(TINY, Work(256, 64), 4, TINY, 50, 4, 256, (False,))


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def seconds_of(function: Callable, repeats: int = 5) -> float:
    """The median time of `function()`, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def matmul_rate(size: int) -> float:
    """FLOP/s of a bf16 matmul of square matrices."""
    a, b = (torch.randn(size, size, device=find_device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 20)


def make_model(shape: dict, compiled: bool = False) -> Transformer:
    torch.manual_seed(0)
    with find_device():
        model = Transformer(ModelConfig(**shape))
    model.compute_dtype = torch.bfloat16
    if compiled:
        model.compile_blocks()
    return model


def random_dataset(vocab_size: int, work: Work, steps: int) -> Dataset:
    """Examples of random tokens for so many steps, the second half of each supervised."""
    torch.manual_seed(0)
    ids = torch.randint(3, vocab_size, (steps * work.tokens // work.length, work.length + 1)).int()
    targets = ids[:, 1:].clone()
    targets[:, : work.length // 2] = -100
    return Dataset.from_encoded(list(zip(ids[:, :-1], targets, strict=True)))


def train_config(work: Work) -> TrainConfig:
    """An epoch of steps of one micro-batch each."""
    batch = {"batch_size": work.tokens // work.length, "micro_batch_tokens": work.tokens}
    return TrainConfig(epochs=1, lr=1e-5, dtype="bf16", log_every=1, **batch)


# --- What must be right -----------------------------------------------------------------------------------------------


def machine(sizes: Sizes) -> Iterator[Row]:
    """What all of this ran on."""
    yield Row("machine", f"{card_name()}, PyTorch {torch.__version__}")
    yield Row(f"bf16 matmul of {sizes.matmul:,} rows", f"{matmul_rate(sizes.matmul) / 1e12:,.1f} TFLOP/s")


def parity(sizes: Sizes) -> Iterator[Row]:
    """Logits and the loss's gradients against the CPU's in float32. bf16 may cost twice what it costs on the CPU."""
    model, work = make_model(sizes.checked).cpu(), Work(8 * sizes.checked_length, sizes.checked_length)
    dataset = random_dataset(sizes.checked["vocab_size"], work, steps=1)
    batch = build_batch(dataset, epoch_order(8, 0, 0), sample_lambda(4, 0.5, 0, 0), work.tokens)

    def outcome(device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        moved, moved_batch = copy.deepcopy(model).to(device), batch.to(device)
        moved.compute_dtype = dtype
        row = moved_batch.micro_batches[0].row
        with torch.no_grad():
            logits = moved.logits(moved(row.tokens, row.positions, row.cu_seqlens)).float().cpu()
        forward_backward(moved, moved_batch, 0.2, 1.0)
        return logits, torch.cat([p.grad.flatten().cpu() for p in moved.parameters()])

    expected = outcome("cpu", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        on_cpu, here = outcome("cpu", dtype), outcome(find_device(), dtype)
        for what, a, b, c in zip(("logits", "gradients"), here, on_cpu, expected, strict=True):
            error, allowed = relative_difference(a, c), max(2 * relative_difference(b, c), 1e-4)
            result = f"differ from the CPU's by {error:.1e}, allowed {allowed:.1e}"
            yield Row(f"{what}, {str(dtype).removeprefix('torch.')}", result, error <= allowed)


def write_inputs(folder: Path, sizes: Sizes) -> list[str]:
    """Write a model and examples made of the demo's texts. -> the flags of an SFTMix stage of 20 steps on them"""
    texts = [record["text"] for record in demo_corpus(0, num_documents=20 * sizes.batch_size).base]
    tokenizer = Tokenizer.train(texts, 512)
    shape = {**sizes.checked, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    save_model(make_model(shape).cpu(), folder / "model", tokenizer.files_for("alpaca"))
    records = [{"text": " ".join((texts * 2)[i : i + 8])} for i in range(20 * sizes.batch_size)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = "--stage sftmix --pairing random --epochs 1 --lr 1e-3 --save_every 5".split()
    flags += ["--batch_size", sizes.batch_size, "--max_length", sizes.checked_length, "--device", find_device().type]
    flags += ["--model", folder / "model", "--data", folder / "data.jsonl", "--cache", folder / "cache"]
    return [str(flag) for flag in flags]


def run_twice(sizes: Sizes, deterministic: bool, kills: bool) -> Iterator[Row]:
    """Run an SFTMix stage of 20 steps twice and compare the weights. `kills`: kill the second run, and resume it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / "train.py"), *write_inputs(folder, sizes)]
        command += ["--deterministic"] * deterministic

        def start(name: str, *more: str) -> subprocess.Popen:
            output = ["--output", str(folder / name), *more]
            return subprocess.Popen(command + output, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        runs = {"one": start("one"), "other": start("other")}
        if kills:
            while runs["other"].poll() is None and not list((folder / "other" / "resume").glob("sftmix-step-*")):
                time.sleep(0.001)
            runs["other"].kill()
            if runs["other"].wait() == 0:
                raise RuntimeError("the run ended before it could be killed")
            if runs["other"].returncode == -signal.SIGKILL:
                runs["other"] = start("other", "--resume")
        for run in runs.values():
            error = run.communicate()[1].strip()
            if run.returncode:
                raise RuntimeError(error.splitlines()[-1] if error else f"train.py: exit code {run.returncode}")
        one, other = (load_file(folder / name / "sftmix" / "model.safetensors") for name in runs)
    what = f"20 steps, {'killed and resumed' if kills else 'twice'}{', --deterministic' if deterministic else ''}"
    if all(torch.equal(one[key], other[key]) for key in one):
        yield Row(what, "the same weights, bit for bit")
    else:
        change = relative_difference(*(torch.cat([weights[key].flatten() for key in one]) for weights in (other, one)))
        yield Row(what, f"weights differ by {change:.1e}", ok=not deterministic)


# --- What is measured -------------------------------------------------------------------------------------------------


def decoding(sizes: Sizes) -> Iterator[Row]:
    """Greedy decoding of one sequence, in bf16."""
    model, prompts = make_model(sizes.model).to(torch.bfloat16), [list(range(3, 131))]
    started = time.perf_counter()
    generate(model, prompts, 50)
    first = time.perf_counter() - started
    later = seconds_of(lambda: generate(model, prompts, 50), 3)
    yield Row("50 tokens decoded", f"{20 * later:.2f} ms a token; {20 * first:.2f} the first time")


def training(sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Steps of NTP and of SFTMix with their peak memory (on a CPU that of the process), and scoring."""
    model, config, work = make_model(sizes.model, compiled), train_config(sizes.work), sizes.work
    dataset, label = random_dataset(model.config.vocab_size, work, sizes.steps), "compiled" if compiled else "eager"
    peak, of_what = peak_flops(card_name(), matmul_rate(sizes.matmul))
    rates = {}
    for name, num_ntp_epochs in (("NTP", config.epochs), ("SFTMix", 0)):
        records = []
        sampler = Sampler(partial(epoch_order, len(dataset), 0), num_ntp_epochs)
        memory = train(model, dataset, config, sampler, records.append)["peak_memory_bytes"]
        rates[name] = statistics.median(record["tokens_per_second"] for record in records[sizes.steps // 4 :])
        share = rates[name] / work.tokens * model_flops(model.config, work) / peak
        result = f"{rates[name]:,.0f} tokens/s, {rates[name] / rates['NTP']:.2f} of NTP's; {share:.1%} {of_what}"
        yield Row(f"{name}, {label}", result)
    estimate = estimate_memory(model, largest_micro_batch(dataset, config, 1), config, 1, find_device().type)["total"]
    yield Row(f"peak memory, {label}", f"{memory / 1e9:.2f} GB; estimated {estimate / 1e9:.2f}")
    if not compiled:
        seconds = seconds_of(lambda: score_examples(model, dataset, work.tokens), 2)
        yield Row("scoring", f"{int(dataset.lengths.sum()) / seconds:,.0f} tokens/s")


def part_of_step(name: str, shapes: list, vocab_size: int) -> str:
    """The part of a step, in the words of benchmarks/budget.py, to which an operation belongs.

    >>> part_of_step("aten::mm", [[512, 64], [64, 1024]], vocab_size=1024)  # [R, D] @ [D, V]
    'lm_head'
    >>> part_of_step("aten::addmm_", [[1024, 64], [1024, 512], [512, 64]], vocab_size=1024)  # [V, R] @ [R, D]
    'lm_head: gradient of W'
    """
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        a, b = shapes[:2] if name == "aten::mm" else shapes[1:3]
        if vocab_size in a:
            return f"lm_head: gradient of {'W' if a[0] == vocab_size else 'z'}"
        return "lm_head" if vocab_size in b else "blocks: matmuls"
    words = {"attention": "blocks: attention", "attn": "blocks: attention", "bmm": "blocks: attention",
             "adamw": "AdamW", "foreach": "gradient clipping", "embedding": "embedding"}  # fmt: skip
    return next((part for word, part in words.items() if word in name), "element-wise, casts and sums")


def time_parts(what: str, function: Callable, vocab_size: int) -> Iterator[Row]:
    """The time of `function()`, and that of its parts on the device, from PyTorch's profiler."""
    yield Row(what, f"{1e3 * seconds_of(function):.1f} ms")
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    milliseconds = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operation, with the kernels that it launches
            microseconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            milliseconds[part_of_step(event.name, event.input_shapes, vocab_size)] += microseconds / 1e3
    for part, value in milliseconds.most_common():
        yield Row(f"{what}, {part}", f"{value:.1f} ms")


def loss_by_parts(sizes: Sizes) -> Iterator[Row]:
    """The loss alone, forward and backward."""
    device, S, M = find_device(), sizes.work.supervised, sizes.work.mixed
    V, D = sizes.model["vocab_size"], sizes.model["hidden_size"]
    hidden, weight = (torch.randn(n, D, device=device).requires_grad_() for n in (S, V))
    targets, lam, order = torch.randint(V, (S,), device=device), torch.rand(M, device=device), torch.randperm(S)

    def loss():
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            sftmix_loss(hidden, weight, targets, order[:M], order[M : 2 * M], lam, 0.2)[0].backward()

    yield from time_parts("the loss", loss, V)


def step_by_parts(sizes: Sizes) -> Iterator[Row]:
    """A whole SFTMix step, compiled where that is measured."""
    model, work, V = make_model(sizes.model, True in sizes.compiled), sizes.work, sizes.model["vocab_size"]
    dataset, optimizer = random_dataset(V, work, 1), make_optimizer(model, train_config(work))
    order, lam = epoch_order(len(dataset), 0, 0), torch.rand(len(dataset) // 2)
    batch = build_batch(dataset, order, lam, work.tokens).to(find_device())
    yield from time_parts(
        "a step", lambda: optimizer_step(model, optimizer, 1e-5, forward_backward(model, batch, 0.2, 1.0)[0]), V
    )


# --- The command line -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--first", action="store_true", help="check and measure everything on this machine's GPU")
    mode.add_argument("--budget", action="store_true", help="print a step's parts on paper")
    parser.add_argument("--small", action="store_true", help="tiny models, to test the script, on a CPU too")
    args = parser.parse_args()
    if args.budget:
        return print_budget()
    # CUDA must not be initialised before the parts are forked, as looking for a GPU does without this variable.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not args.small and not torch.cuda.is_available():
        sys.exit("gpu.py: error: PyTorch has no GPU here; --small runs on a CPU")
    sizes = SMALL_SIZES if args.small else FULL_SIZES
    parts = {
        "machine": machine,
        "parity": parity,
        "20 steps, twice": partial(run_twice, deterministic=False, kills=False),
        "20 steps, twice, --deterministic": partial(run_twice, deterministic=True, kills=False),
        "20 steps, killed and resumed, --deterministic": partial(run_twice, deterministic=True, kills=True),
        "decoding": decoding,
        **{f"training, compiled: {c}": partial(training, compiled=c) for c in sizes.compiled},
        "the loss": loss_by_parts,
        "a step": step_by_parts,
    }
    rows = run_parts({name: partial(part, sizes) for name, part in parts.items()}, seconds=500, part_seconds=200)
    print_table(rows)
    sys.exit(not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
