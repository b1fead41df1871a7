"""A Llama of 1.2 billion parameters on one GPU: how much of the GPU training uses, and what SFTMix costs there.

    python benchmarks/gpu.py            hidden 2048, 16 layers, 32 heads on 8, vocabulary 128,256; 16,384 tokens a step
    python benchmarks/gpu.py --small    a small model, to test the script on a CPU

Prints a table: the rate of a bf16 matmul, tokens/s and model FLOPs utilisation of NTP and SFTMix steps (6 FLOPs for
each parameter and token, and those of attention; recomputation does not count), the rate of scoring, time and peak
memory of the loss, and the time of attention with each of the two kernels.
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
from model import ModelConfig, Transformer, VarlenMetadata, _sdpa_per_example, varlen_attention
from train import Sampler, TrainConfig, train

LARGE = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
SMALL = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


def seconds_of(function, repeats: int = 5) -> float:
    """The median time of `function()`, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_rate(device, size: int) -> float:
    """FLOP/s of a bf16 matmul of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 20)


def peak_bytes(function) -> int:
    """The peak of the bytes that `function()` allocates."""
    if not torch.cuda.is_available():
        return peak_of(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def random_dataset(vocab_size: int, examples: int, length: int) -> Dataset:
    """Examples of `length` random tokens, the second half of each supervised."""
    ids = torch.randint(3, vocab_size, (examples, length + 1)).int()
    targets = ids[:, 1:].clone()
    targets[:, : length // 2] = -100
    return Dataset.from_encoded(list(zip(ids[:, :-1], targets, strict=True)))


def measure_training(model: Transformer, dataset: Dataset, tokens: int, length: int, matmul_flops: float) -> None:
    """Print the rates of training, with steps of `tokens`, and of scoring."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    embedding = config.vocab_size * config.hidden_size
    # For each token: 6 FLOPs for each parameter of the blocks, and of `lm_head` for the half that is supervised; the
    # two matmuls of attention with, on average, half an example's keys, once forward and twice backward.
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    flops = 6 * (parameters - embedding) + 6 * embedding / 2 + attention
    settings = {"batch_size": tokens // length, "epochs": 1, "lr": 1e-5, "dtype": "bf16", "log_every": 1}
    settings["micro_batch_tokens"] = tokens
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        for name, mix in (("NTP", False), ("SFTMix", True)):
            records = []
            sampler = Sampler(order=partial(epoch_order, len(dataset), 0), is_mixed=lambda epoch, mix=mix: mix)
            train(model, dataset, TrainConfig(**settings), sampler, records.append)
            rate = statistics.median(record["tokens_per_second"] for record in records[3:])
            label = name + ", --compile" * compiled
            share = rate * flops / matmul_flops
            print(f"| {label} | {rate:,.0f} tokens/s, {share:.1%} of the matmul's rate |", flush=True)
    seconds = seconds_of(lambda: score_examples(model, dataset, tokens), 2)
    print(f"| scoring | {len(dataset) * length / seconds:,.0f} tokens/s |")


def measure_loss(model: Transformer, tokens: int, device) -> None:
    """Print the time and the peak memory of the loss, forward and backward, on half of `tokens` positions."""
    S, M = tokens // 2, int(0.35 * tokens / 2)
    hidden = torch.randn(S, model.config.hidden_size, device=device, requires_grad=True)
    targets, indices = torch.randint(model.config.vocab_size, (S,), device=device), torch.randperm(S)

    def loss():
        with torch.autocast(device.type, torch.bfloat16):
            lam = torch.rand(M, device=device)
            index_c, index_u = indices[:M], indices[M : 2 * M]
            sftmix_loss(hidden, model.head_weight, targets, index_c, index_u, lam, 0.2)[0].backward()
        hidden.grad = None
        model.zero_grad()

    loss()
    print(f"| the loss, {S:,} positions | {seconds_of(loss) * 1e3:,.1f} ms, {peak_bytes(loss) / 1e9:,.2f} GB |")


def measure_attention(config: ModelConfig, tokens: int, length: int, device) -> None:
    """Print the time of a layer's attention, forward and backward, with each of the two kernels."""
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    varlen = VarlenMetadata(None, None, None, cu_seqlens, cu_seqlens.to(device), max_seqlen=length)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(tokens, n, config.head_dim, device=device, dtype=dtype).requires_grad_() for n in heads)
    one_kernel = seconds_of(lambda: varlen_attention(q, k, v, varlen).sum().backward())
    per_example = seconds_of(lambda: _sdpa_per_example(q, k, v, cu_seqlens).sum().backward())
    print(f"| attention of a layer | {one_kernel * 1e3:,.2f} ms, a kernel per example {per_example * 1e3:,.2f} ms |")


def main() -> None:
    """Measure, and print the table."""
    small, device = "--small" in sys.argv, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(**(SMALL if small else LARGE))
    length, tokens, steps = (64, 1024, 8) if small else (512, 16384, 12)
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    model.compute_dtype = torch.bfloat16
    dataset = random_dataset(config.vocab_size, steps * tokens // length, length)

    matmul_flops = matmul_rate(device, 512 if small else 8192)
    print(f"| | |\n|---|---|\n| bf16 matmul | {matmul_flops / 1e12:,.1f} TFLOP/s |")
    measure_training(model, dataset, tokens, length, matmul_flops)
    measure_loss(model, tokens, device)
    measure_attention(config, tokens, length, device)


if __name__ == "__main__":
    main()
