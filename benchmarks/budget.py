"""The parts of a training step on an H100, on paper: FLOPs and bytes counted, and the time that they should take.

`python benchmarks/gpu.py --budget` prints the table. Nothing here is measured: each part takes the time of its FLOPs or
of its bytes to and from the GPU's memory, at an assumed share of the rate that the card's data sheet gives.

Letters: N tokens in a step, S of them supervised, M mixed positions, T tokens of an example, L blocks, D hidden size,
F of the MLP, Q and K sizes of all query and of all key heads, V vocabulary size, R positions in a chunk of the loss.
"""

import math
import re
from typing import NamedTuple

from benchmarks.scaling import GPU_FLOPS
from model import ModelConfig

GPU_BYTES = 3.35e12  # to and from the memory of an H100 SXM in a second, by its data sheet
MATMUL, ATTENTION, MEMORY = 0.6, 0.2, 0.85  # the shares of these that kernels are assumed to reach

LARGE = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip


class Work(NamedTuple):
    """What a step computes on: examples of equal length, the second half of each supervised."""

    tokens: int  # N
    length: int  # T

    @property
    def supervised(self) -> int:
        """S"""
        return self.tokens // 2

    @property
    def mixed(self) -> int:
        """M. Partners of unequal lengths leave some positions without one: 70 % are assumed to be in a pair."""
        return int(0.35 * self.supervised)


STEP = Work(tokens=16384, length=512)


class Version(NamedTuple):
    """How a step is computed."""

    name: str
    compiled: bool  # whether blocks are compiled
    chunk_rows: int  # R
    adds_in_place: bool  # whether the matmul for W's gradient adds to the float32 sum by itself


def chunk_rows(vocab_size: int, logits: int, multiple: int) -> int:
    """The number of positions in a chunk of so many logits, rounded down to a multiple."""
    return logits // vocab_size // multiple * multiple


BEFORE = chunk_rows(LARGE["vocab_size"], 2**26, 1)
AFTER = chunk_rows(LARGE["vocab_size"], 2**28, 256)
VERSIONS = [
    Version("eager, before", False, BEFORE, False),
    Version("compiled, before", True, BEFORE, False),
    Version("compiled, after", True, AFTER, True),
]


class Part(NamedTuple):
    """A part of a step, which takes the longer of the times of its FLOPs and of its bytes."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    reached: float = MATMUL  # the share of GPU_FLOPS

    @property
    def milliseconds(self) -> float:
        """The time on paper."""
        return 1e3 * max(self.flops / (GPU_FLOPS * self.reached), self.bytes / (GPU_BYTES * MEMORY))


def block_weights(config: ModelConfig) -> int:
    """The weights of all blocks' matmuls.

    >>> block_weights(ModelConfig(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    160
    """
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    Q, K = config.num_attention_heads * d, config.num_key_value_heads * d
    return config.num_hidden_layers * (2 * D * Q + 2 * D * K + 3 * D * F)


def model_flops(config: ModelConfig, work: Work) -> float:
    """The FLOPs that a step needs: what model FLOPs utilisation counts.

    For each token 6 for each weight of the blocks (2 forward, 4 backward), 6 for each of `lm_head` if it is supervised,
    and 12 for each element of a query and each key it attends to: T/2 of them on average.
    """
    head = config.vocab_size * config.hidden_size
    keys = work.tokens * work.length / 2  # of all queries together
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return 6 * block_weights(config) * work.tokens + 6 * head * work.supervised + attention


def elementwise_bytes(config: ModelConfig, compiled: bool) -> tuple[int, int]:
    """Bytes that norms, rotary embedding, activation and residual connections of a block read and write for a token.

    -> (forward, backward). The residual stream and its gradient have 4 bytes an element, inputs and outputs of matmuls
    2. Uncompiled, each operation of `model.py` is a kernel: a cast reads 4 bytes and writes 2, and so on. Compiled,
    what stands between two matmuls is one kernel.
    """
    D, F = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim  # of q and k
    if compiled:
        # Forward: a residual connection and the norm after it read the stream (4) and a matmul's output (2) and write
        # both again; rotary embedding reads and writes q and k; the activation reads gate and up and writes one.
        # Backward: a norm reads the gradients of its 3 or 2 matmuls (2 each), its input and the stream's gradient (4
        # each), writes that gradient in both dtypes (6) and reads 8 again for its weight's gradient.
        norms = (6 + 4 + 4 + 6 + 8) + (4 + 4 + 4 + 6 + 8)
        return 2 * 12 * D + 4 * heads + 6 * F, norms * D + 4 * heads + 10 * F
    # Forward: norm 8 and its cast 6, the sum 10, both twice; cat 4, roll 4, x cos 6, the cast of the partner 6, addcmul
    # 12, cast 6; silu 4, the multiplication by up 6.
    forward = 2 * (8 + 6 + 10) * D + (4 + 4 + 6 + 6 + 12 + 6) * heads + (4 + 6) * F
    # Backward: of each sum a cast 6 and the addition of two float32 gradients 12; of each norm the cast 6, the input's
    # gradient 12, the weight's 8; 2 + 1 additions of bf16 gradients of matmuls, 6 each. Of rotary embedding: the
    # gradients of the cast 6, of addcmul 8 + 6, of roll 4, of x cos 8 + 6, the addition 6, of split and cat 4 + 4. Of
    # silu 6, of the multiplication by up 12.
    backward = (2 * (6 + 12 + 6 + 12 + 8) + 3 * 6) * D + (6 + 14 + 4 + 14 + 6 + 8) * heads + (6 + 12) * F
    return forward, backward


def loss_parts(config: ModelConfig, work: Work, version: Version) -> list[Part]:
    """The parts of the loss. Matmuls compute tiles of 128 rows, so the last rows of a chunk may be wasted."""
    V, D, S, M, R = config.vocab_size, config.hidden_size, work.supervised, work.mixed, version.chunk_rows
    chunks = math.ceil(2 * M / R) + math.ceil((S - 2 * M) / R)
    matmul = 2 * S * V * D * math.ceil(R / 128) * 128 / R
    # For each chunk, either the sum is read and written (8), or the bf16 result is written and read too (12).
    summed = 4 * V * D + chunks * V * D * (8 if version.adds_in_place else 12)
    return [
        Part("lm_head", matmul),
        # Three passes over the logits (2 bytes each) and their gradient written (2); of a pair also two passes over the
        # mixed logits, each of which reads both rows, and the partner's row in the last pass.
        Part("loss: element-wise", bytes=8 * S * V + (2 * 4 + 2 * 2) * M * V),
        Part("lm_head: gradient of z", matmul),
        Part("lm_head: gradient of W", 2 * S * V * D),
        Part("lm_head: gradients of W are summed", bytes=summed),
        Part("lm_head: cast of W, its gradient scaled", bytes=(6 + 8) * V * D),
    ]


def step_parts(config: ModelConfig, work: Work, version: Version) -> list[Part]:
    """All parts of a step of one micro-batch, in the order in which they begin."""
    N, D, head = work.tokens, config.hidden_size, config.vocab_size * config.hidden_size
    blocks, L = block_weights(config), config.num_hidden_layers
    parameters = blocks + head * (1 if config.tie_word_embeddings else 2)
    keys = N * work.length / 2  # that all queries attend to
    attention = 4 * L * config.num_attention_heads * config.head_dim * keys  # forward; the backward pass has 2.5 times
    return [
        # Rows are read and written; backward, a gradient of all rows is zeroed, added to, and added to that of lm_head.
        Part("embedding", bytes=16 * N * D + 4 * head + 12 * head * config.tie_word_embeddings),
        # A bf16 copy of each weight (6); the bf16 gradient is cast to float32 (6).
        Part("casts of the blocks' weights and gradients", bytes=12 * blocks),
        Part("blocks: matmuls", 6 * blocks * N),
        Part("blocks: attention", 3.5 * attention, reached=ATTENTION),
        Part("blocks: element-wise", bytes=L * N * sum(elementwise_bytes(config, version.compiled))),
        *loss_parts(config, work, version),
        Part("gradient clipping", bytes=12 * parameters),  # the norm reads 4, the scaling reads and writes 8
        Part("AdamW", bytes=28 * parameters),  # reads weight, gradient and two moments, writes all but the gradient
    ]


# Dense bf16, by the data sheets. Other cards of these generations (PCIe, NVL, parts of a card) have other rates.
DATA_SHEETS = {r"H100 80GB HBM3$|H200$": GPU_FLOPS, r"A100": 312e12}


def peak_flops(card: str, measured: float) -> tuple[float, str]:
    """The rate that a step's FLOPs are compared with, and its name: the data sheet's where the card is known.

    >>> peak_flops("NVIDIA H200", 6e14), peak_flops("NVIDIA H100 PCIe", 5e14)
    ((989000000000000.0, 'MFU'), (500000000000000.0, "of the measured matmul's rate"))
    """
    rates = [rate for pattern, rate in DATA_SHEETS.items() if re.search(pattern, card)]
    return (rates[0], "MFU") if rates else (measured, "of the measured matmul's rate")


def matmul_share_for(utilisation: float, parts: list[Part], flops: float) -> float:
    """The share of GPU_FLOPS that matmuls must reach for this utilisation, if all other parts take as long as here."""
    matmuls = sum(part.milliseconds for part in parts if part.flops and part.reached == MATMUL)
    others = sum(part.milliseconds for part in parts) - matmuls
    return MATMUL * matmuls / (1e3 * flops / (GPU_FLOPS * utilisation) - others)


def print_budget() -> None:
    """Print the table of docs/benchmarks.md."""
    config = ModelConfig(**LARGE)
    columns = [step_parts(config, STEP, version) for version in VERSIONS]
    totals = [sum(part.milliseconds for part in parts) for parts in columns]
    flops = model_flops(config, STEP)
    utilisation = [flops / (1e-3 * total * GPU_FLOPS) for total in totals]
    print(f"| ms, on paper | {' | '.join(version.name for version in VERSIONS)} |")
    print("|---|---|---|---|")
    for parts in zip(*columns, strict=True):
        print(f"| {parts[0].name} | {' | '.join(f'{part.milliseconds:.1f}' for part in parts)} |")
    print(f"| **total** | {' | '.join(f'{total:.0f}' for total in totals)} |")
    print(f"| MFU | {' | '.join(f'{share:.0%}' for share in utilisation)} |")
    print(f"\n{flops / 1e12:.1f} TFLOP a step, {1e3 * flops / GPU_FLOPS:.1f} ms at {GPU_FLOPS / 1e12:.0f} TFLOP/s.")
    print(f"Chunks of {BEFORE:,} rows before, of {AFTER:,} after.")
    print(
        f"Assumed: matmuls reach {MATMUL:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s, attention {ATTENTION:.0%}, "
        f"everything else {MEMORY:.0%} of {GPU_BYTES / 1e12:.2f} TB/s."
    )
    print(f"For an MFU of 50%, matmuls must reach {matmul_share_for(0.5, columns[-1], flops):.0%} in the last column.")
