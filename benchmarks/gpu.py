"""A Llama of 1.2 billion parameters on one GPU: how much of the chip training uses, and what SFTMix costs there.

    python benchmarks/gpu.py            hidden 2048, 16 layers, 32 heads on 8, vocabulary 128,256; 16,384 tokens a step
    python benchmarks/gpu.py --small    the same script at a size that a CPU can do, to see that it runs

Prints a table: the rate of a bf16 product, tokens/s and model FLOPs utilisation of NTP and SFTMix steps (6 FLOPs a
parameter and token, and attention's; what is computed twice does not count twice), scoring, the loss's peak memory, and
attention by each of the kernels at hand.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scaling import peak_of
from confidence import score_examples
from data import Dataset, epoch_order
from mixup import sftmix_loss
from model import ModelConfig, Row, Transformer, _attention_by_example, packed_attention
from train import TrainConfig, train

LARGE = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
SMALL = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


def seconds_of(work, repeats: int = 5) -> float:
    """The median time of `work()`, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def product_rate(device, size: int) -> float:
    """FLOPs a second of a bf16 product of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 20)


def peak_bytes(work) -> int:
    """The most memory that `work()` takes above what is held before."""
    if not torch.cuda.is_available():
        return peak_of(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure, and print the table."""
    small, device = "--small" in sys.argv, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(**(SMALL if small else LARGE))
    length, tokens, steps = (64, 1024, 8) if small else (512, 16384, 12)
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    ids = torch.randint(3, config.vocab_size, (steps * tokens // length, length + 1)).int()
    targets = ids[:, 1:].clone()
    targets[:, : length // 2] = -100
    dataset = Dataset.of(list(zip(ids[:, :-1], targets, strict=True)))

    rate = product_rate(device, 512 if small else 8192)
    print(f"| | |\n|---|---|\n| bf16 product | {rate / 1e12:,.1f} TFLOP/s |")
    parameters = sum(p.numel() for p in model.parameters())
    embedding = config.vocab_size * config.hidden_size
    # A token: 6 FLOPs a parameter of the blocks, and of `lm_head` where it is supervised (half of them); attention's
    # two products with, on average, half an example's keys, forward and twice that backward.
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    flops = 6 * (parameters - embedding) + 6 * embedding / 2 + attention
    settings = {"batch_size": tokens // length, "epochs": 1, "lr": 1e-5, "dtype": "bf16", "log_every": 1}
    settings["micro_batch_tokens"] = tokens
    for compiling in (False, True):
        if compiling:
            model.compile_blocks()
        for name, mixing in (("NTP", False), ("SFTMix", True)):
            rates = []
            run = TrainConfig(**settings)
            train(
                model,
                dataset,
                run,
                partial(epoch_order, len(dataset), 0),
                lambda record, rates=rates: rates.append(record["tokens_per_second"]),
                mixes=lambda epoch, mixing=mixing: mixing,
            )
            speed = statistics.median(rates[3:])
            label = name + ", --compile" * compiling
            print(f"| {label} | {speed:,.0f} tokens/s, {speed * flops / rate:.1%} of that product's rate |", flush=True)
    scoring = seconds_of(lambda: score_examples(model.eval(), dataset, tokens, "bf16"), 2)
    print(f"| scoring | {steps * tokens / scoring:,.0f} tokens/s |")

    S, M = tokens // 2, int(0.35 * tokens / 2)
    hidden = torch.randn(S, config.hidden_size, device=device, requires_grad=True)
    y, rows = torch.randint(config.vocab_size, (S,), device=device), torch.randperm(S)

    def loss():
        with torch.autocast(device.type, torch.bfloat16):
            lam = torch.rand(M, device=device)
            sftmix_loss(hidden, model.head_weight, y, rows[:M], rows[M : 2 * M], lam, 0.2)[0].backward()
        hidden.grad = None
        model.zero_grad()

    loss()
    print(f"| the loss, {S:,} positions | {seconds_of(loss) * 1e3:,.1f} ms, {peak_bytes(loss) / 1e9:,.2f} GB |")

    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    row = Row(None, None, None, bounds, bounds.to(device), longest=length)
    shape = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(tokens, n, config.head_dim, device=device, dtype=dtype).requires_grad_() for n in shape)
    one_kernel = seconds_of(lambda: packed_attention(q, k, v, row).sum().backward())
    by_example = seconds_of(lambda: _attention_by_example(q, k, v, bounds).sum().backward())
    print(f"| attention of a layer | {one_kernel * 1e3:,.2f} ms, by example {by_example * 1e3:,.2f} ms |")


if __name__ == "__main__":
    main()
