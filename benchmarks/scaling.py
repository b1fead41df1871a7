"""Memory and time of training at scale: the estimates of `train.py --dry_run`, and measured runs to check them.

    python benchmarks/scaling.py estimates    memory, time and communication of 1B to 14B on GPUs, from shapes alone
    python benchmarks/scaling.py measured     estimate against measurement, on this machine, with 1, 2 and 4 processes

They print the tables of docs/scaling.md. The measurement is the peak of the memory that PyTorch's CPU allocator holds
while a model is loaded and `train.train` makes two steps, as PyTorch's profiler records it.
"""

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import MICRO_BATCH_TOKENS, Dataset, epoch_order
from infra.distributed import init_distributed, rank, world_size
from infra.fsdp import local_shard
from infra.hf import load_config, meta_model, save_model
from infra.plan import (
    LargestMicroBatch,
    estimate_communication,
    estimate_cpu_memory,
    estimate_flops,
    estimate_memory,
    largest_micro_batch,
)
from model import ModelConfig, Transformer, add_lora
from train import Sampler, TrainConfig, load_trainable, train, weights_dtype

# Alpaca, encoded by Llama 2's tokenizer: 125 tokens an example, 64 of them supervised.
ALPACA = {"examples": 52_002, "tokens": 125, "supervised": 64}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
AT_SCALE = {
    "1B (Llama-3.2)": {**LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                       "head_dim": 64, "tie_word_embeddings": True},
    "8B (Llama-3.1)": {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "14B (Qwen2.5)": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
                      "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8},
}  # fmt: skip
GPU_FLOPS = 989e12  # H100 SXM, dense bf16, by its data sheet
UTILISATION = 0.4  # assumed
LINKS = {  # bytes a second that a GPU sends, and as many that it receives, by number of GPUs
    8: 450e9,  # half of the 900 GB/s of NVLink that the H100's data sheet gives for both directions
    # In a ring, a byte enters a machine once, over one of the eight adapters of 400 Gb/s that the data sheet of a
    # DGX H100 gives, and goes on over NVLink.
    64: 8 * 50e9,
}
WORKLOADS = [(8, 32, 125), (8, 32, 1024), (8, 128, 1024), (8, 512, 1024), (64, 128, 125), (64, 1024, 1024)]


def model_at_scale(name: str, lora_rank: int | None, config: TrainConfig) -> Transformer:
    """A model of AT_SCALE on the meta device; with adapters on weights in bf16, as they are on the Hub."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**AT_SCALE[name]))
        if lora_rank:
            model.to(torch.bfloat16)
            add_lora(model, lora_rank, config.lora_alpha)
    return model


def estimates() -> None:
    """Print the tables of estimates."""
    print_estimates()
    print()
    print_communication()
    print()
    print_cpu_memory()


def print_communication() -> None:
    """Print what each stage of ZeRO sends in a step of 8B, and how long that takes beside computing."""
    links = " and ".join(f"{speed / 1e9:.0f} GB/s on {gpus} GPUs" for gpus, speed in LINKS.items())
    print(f"Computing at {UTILISATION:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s, sending at {links}:\n")
    stages = " | ".join(f"ZeRO-{stage}: GB a GPU | GB sent | ms" for stage in (3, 2, 1))
    print(f"| GPUs | batch | tokens an example | micro-batches | compute, ms | {stages} |")
    print("|" + "---|" * 14)
    config = TrainConfig(dtype="bf16", activation_checkpointing=True)
    model = model_at_scale("8B (Llama-3.1)", None, config)
    for gpus, batch, length in WORKLOADS:
        tokens = batch // gpus * length
        passes = math.ceil(tokens / MICRO_BATCH_TOKENS)
        largest = LargestMicroBatch(tokens // passes, tokens // passes // 2, passes)
        compute = estimate_flops(model, tokens, tokens // 2, config) / (GPU_FLOPS * UTILISATION)
        cells = []
        for stage in (3, 2, 1):
            choice = replace(config, zero_stage=stage)
            memory = estimate_memory(model, largest, choice, gpus, "cuda")["total"]
            sent = estimate_communication(model, choice, gpus, passes)
            cells += [f"{memory / 1e9:.1f}", f"{sent / 1e9:.0f}", f"{sent / LINKS[gpus] * 1e3:.0f}"]
        print(f"| {gpus} | {batch} | {length:,} | {passes} | {compute * 1e3:.0f} | {' | '.join(cells)} |")


def print_cpu_memory() -> None:
    """Print the CPU memory that a process needs beside what Python and PyTorch take."""
    print("| model | GPUs | to load, GB | to write a savepoint, GB | to save a model, rank 0, GB |")
    print("|---|---|---|---|---|")
    config = TrainConfig(dtype="bf16")
    for name in AT_SCALE:
        model = model_at_scale(name, None, config)
        for gpus in (1, 8):
            sizes = estimate_cpu_memory(model, config, gpus, "cuda").values()
            print(f"| {name} | {gpus} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |")


def print_estimates() -> None:
    """Print memory and time by model and number of GPUs."""
    print("| model | GPUs | batch | full: GB a GPU | full: minutes a stage | LoRA: GB a GPU | LoRA: minutes a stage |")
    print("|---|---|---|---|---|---|---|")
    for name in AT_SCALE:
        for gpus in (1, 8, 64):
            batch = max(32, 2 * gpus)
            cells = []
            for lora_rank in (None, 16):
                config = TrainConfig(batch_size=batch, dtype="bf16", lora_rank=lora_rank, activation_checkpointing=True)
                model = model_at_scale(name, lora_rank, config)
                examples = max(2, batch // gpus)
                tokens, supervised = examples * ALPACA["tokens"], examples * ALPACA["supervised"]
                largest = LargestMicroBatch(tokens, supervised, num_micro_batches=1)
                memory = estimate_memory(model, largest, config, gpus, "cuda")["total"]
                examples = config.epochs * ALPACA["examples"]
                flops = estimate_flops(model, examples * ALPACA["tokens"], examples * ALPACA["supervised"], config)
                minutes = flops / (gpus * GPU_FLOPS * UTILISATION) / 60
                cells += [f"{memory / 1e9:.1f}", f"{minutes:.1f}"]
            print(f"| {name} | {gpus} | {batch} | {' | '.join(cells)} |")


TINY = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
SMALL = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
MEASURED = [  # name, shape, settings
    ("3M", TINY, {"dtype": "fp32"}),
    ("3M", TINY, {"dtype": "bf16"}),
    ("58M", SMALL, {"dtype": "fp32"}),
    ("58M", SMALL, {"dtype": "bf16"}),
    ("58M", SMALL, {"dtype": "bf16", "micro_batch_tokens": 1024}),
    ("58M", SMALL, {"dtype": "bf16", "activation_checkpointing": True}),
    ("58M", SMALL, {"dtype": "bf16", "lora_rank": 16}),
    ("58M, stored in bf16", SMALL, {"dtype": "bf16", "lora_rank": 16}),
    ("3M", TINY, {"dtype": "bf16", "micro_batch_tokens": 256, "zero_stage": 3}),
    ("3M", TINY, {"dtype": "bf16", "micro_batch_tokens": 256, "zero_stage": 2}),
    ("3M", TINY, {"dtype": "bf16", "micro_batch_tokens": 256, "zero_stage": 1}),
]


def random_dataset(vocab_size: int, examples: int) -> Dataset:
    """Examples of 60 to 250 random tokens, the second half of each supervised."""
    rng, encoded = np.random.default_rng(0), []
    for length in rng.integers(60, 250, examples):
        ids = torch.from_numpy(rng.integers(3, vocab_size, length + 1)).int()
        targets = ids[1:].clone()
        targets[: length // 2] = -100
        encoded.append((ids[:-1], targets))
    return Dataset.from_encoded(encoded)


def peak_of(function) -> int:
    """The peak of the bytes that `function()` allocates in CPU memory."""
    gc.collect()  # what earlier calls have left would be freed in this one, and subtracted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(changes.max())


def measure(folder: Path, settings: dict) -> dict:
    """Train for two steps. -> bytes of this process: the peak, the estimate, and weights with optimizer state"""
    fixed = {"model": str(folder), "data": "-", "output": "-", "batch_size": 16, "epochs": 2, "log_every": 100}
    config = TrainConfig(**fixed, **settings)
    dataset = random_dataset(load_config(folder).vocab_size, config.batch_size)
    result = {}

    def run():
        model = load_trainable(config, "cpu")
        sampler = Sampler(partial(epoch_order, len(dataset), 0))
        train(model, dataset, config, sampler, lambda record: None)
        trainable = sum(local_shard(p).numel() for p in model.parameters() if p.requires_grad)
        result["state"] = sum(local_shard(p).numel() * p.element_size() for p in model.parameters()) + 8 * trainable

    result["peak"] = peak_of(run)
    largest = largest_micro_batch(dataset, config, world_size())
    model = meta_model(folder, weights_dtype(config), config.lora_rank)
    result["estimate"] = estimate_memory(model, largest, config, world_size(), "cpu")["total"]
    return result


def worker(folder: Path) -> None:
    """Measure every case. Rank 0 prints a JSON line for each."""
    with init_distributed("cpu"):
        for name, _, settings in MEASURED:
            if world_size() == 1 and "zero_stage" in settings:
                continue
            result = measure(folder / name, settings)
            if rank() == 0:
                print(json.dumps({"name": name, **settings, **result}), flush=True)


def measured() -> None:
    """Print the table of measurements."""
    print("| model | settings | processes | estimate, MB | measured, MB | ratio | weights and optimizer state, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        for name, shape in {name: shape for name, shape, _ in MEASURED}.items():
            dtype = torch.bfloat16 if "stored in bf16" in name else torch.float32
            save_model(Transformer(ModelConfig(**shape)), Path(folder) / name, dtype=dtype)
        for number in (1, 2, 4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            done = subprocess.run(
                [*command, __file__, "worker", folder],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                sys.exit(done.stderr)
            for line in filter(lambda line: line.startswith("{"), done.stdout.splitlines()):
                case = json.loads(line)
                name, peak, estimate, state = (case.pop(key) for key in ("name", "peak", "estimate", "state"))
                settings = ", ".join(f"{key} {value}" for key, value in case.items())
                columns = f"{estimate / 1e6:,.0f} | {peak / 1e6:,.0f} | {estimate / peak:.2f} | {state / 1e6:,.1f}"
                print(f"| {name} | {settings} | {number} | {columns} |", flush=True)


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "worker":
        worker(Path(sys.argv[2]))
    elif command in ("estimates", "measured"):
        {"estimates": estimates, "measured": measured}[command]()
    else:
        sys.exit(__doc__)
