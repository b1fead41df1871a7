"""What training takes at scale: the estimates of `train.py --dry_run`, and their check against measured runs.

    python benchmarks/scaling.py estimates    memory and time of 1B, 8B and 14B on 1, 8 and 64 GPUs, from shapes alone
    python benchmarks/scaling.py measured     estimate against measurement, on this machine, with 1, 2 and 4 processes

Both print the tables of docs/scaling.md. Measured is the peak of what PyTorch's CPU allocator has handed out during two
steps of `train.train`, weights loaded and all, as its profiler records it.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Dataset, epoch_order
from infra.distributed import own_rows, processes, rank, world_size
from infra.hf import empty_model, open_model, save_model
from infra.plan import Work, estimate_flops, estimate_memory, heaviest_work
from model import ModelConfig, Transformer, add_lora
from train import TrainConfig, train

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


def estimates() -> None:
    """Print the table of what was not run."""
    print("| model | GPUs | batch | full: GB a GPU | full: minutes a stage | LoRA: GB a GPU | LoRA: minutes a stage |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in AT_SCALE.items():
        for gpus in (1, 8, 64):
            batch = max(32, 2 * gpus)
            cells = []
            for lora_rank in (None, 16):
                config = TrainConfig(batch_size=batch, dtype="bf16", lora_rank=lora_rank, activation_checkpointing=True)
                with torch.device("meta"):
                    model = Transformer(ModelConfig(**shape))
                    if lora_rank:
                        model.to(torch.bfloat16)  # as a folder of the Hub keeps them
                        add_lora(model, lora_rank, config.lora_alpha)
                examples = max(2, batch // gpus)
                work = Work(examples * ALPACA["tokens"], examples * ALPACA["supervised"], accumulates=False)
                memory = estimate_memory(model, work, config, gpus, "cuda")["total"]
                seen = config.epochs * ALPACA["examples"]
                flops = estimate_flops(model, seen * ALPACA["tokens"], seen * ALPACA["supervised"], config)
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
]


def random_dataset(vocab_size: int, examples: int) -> Dataset:
    """Examples of 60 to 250 random tokens, the second half of each supervised."""
    rng, encoded = np.random.default_rng(0), []
    for length in rng.integers(60, 250, examples):
        ids = torch.from_numpy(rng.integers(3, vocab_size, length + 1)).int()
        targets = ids[1:].clone()
        targets[: length // 2] = -100
        encoded.append((ids[:-1], targets))
    return Dataset.of(encoded)


def peak_of(work) -> int:
    """The most bytes held while `work()` ran, above what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(changes.max())


def measure(folder: Path, settings: dict) -> dict:
    """Two steps of training on this process's share: its peak, its weights and optimizer state, and the estimate."""
    config = TrainConfig(batch_size=16, epochs=2, lr=1e-4, log_every=100, **settings)
    dataset = random_dataset(empty_model(folder, config.dtype).config.vocab_size, config.batch_size)
    share = {}

    def run():
        model = open_model(folder, config.dtype, "cpu", config.lora_rank)
        model.activation_checkpointing = config.activation_checkpointing
        order = partial(epoch_order, len(dataset), 0)
        train(model, dataset, config, order, lambda record: None, mixes=lambda epoch: True)
        trainable = sum(own_rows(p).numel() for p in model.parameters() if p.requires_grad)
        share["kept"] = sum(own_rows(p).numel() * p.element_size() for p in model.parameters()) + 8 * trainable

    peak = peak_of(run)
    model = empty_model(folder, config.dtype, config.lora_rank)
    work = heaviest_work(dataset, config, world_size())
    estimate = estimate_memory(model, work, config, world_size(), "cpu")["total"]
    return {"peak": peak, "estimate": estimate, **share}


def worker(folder: Path) -> None:
    """Measure every case with as many processes as there are; process 0 prints its share, one JSON line a case."""
    with processes():
        for name, _, settings in MEASURED:
            result = measure(folder / name, settings)
            if rank() == 0:
                print(json.dumps({"name": name, **settings, **result}), flush=True)


def measured() -> None:
    """Print the table of what was run."""
    print("| model | settings | processes | estimate, MB | measured, MB | ratio | weights and optimizer state, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        for name, shape in (("3M", TINY), ("58M", SMALL)):
            save_model(Transformer(ModelConfig(**shape)), Path(folder) / name)
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
                name, peak, estimate, kept = (case.pop(key) for key in ("name", "peak", "estimate", "kept"))
                settings = ", ".join(f"{key} {value}" for key, value in case.items())
                figures = f"{estimate / 1e6:,.0f} | {peak / 1e6:,.0f} | {estimate / peak:.2f} | {kept / 1e6:,.1f}"
                print(f"| {name} | {settings} | {number} | {figures} |", flush=True)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "worker":
        worker(Path(sys.argv[2]))
    elif what in ("estimates", "measured"):
        {"estimates": estimates, "measured": measured}[what]()
    else:
        sys.exit(__doc__)
