"""What a run would take: memory of a process, floating-point operations, disk; printed by `train.py --dry_run`.

Below, `config` is a `train.TrainConfig`, and `model` may be on the meta device, since sizes follow from shapes alone.
"""

from itertools import groupby
from typing import NamedTuple

from data import IGNORE_INDEX, Dataset, assign_micro_batches, epoch_order, steps_per_epoch
from infra.device import DTYPES
from infra.distributed import print0
from mixup import chunk_size
from model import ModelConfig, Transformer
from tokenizer import Tokenizer


class LargestMicroBatch(NamedTuple):
    """The size of a run's largest micro-batch, which decides how much memory the run takes."""

    tokens: int
    supervised: int
    accumulates: bool  # whether a process accumulates gradients over several micro-batches


def largest_micro_batch(dataset: Dataset, config, world_size: int) -> LargestMicroBatch:
    """Go through an epoch of random pairs, as an SFTMix run does with other pairs, and find the largest micro-batch."""
    order, largest, accumulates = epoch_order(len(dataset), config.seed, 0), (0, 0), False
    for start in range(0, len(dataset), config.batch_size):
        indices = order[start : start + config.batch_size]
        lengths, num_supervised = dataset.lengths[indices], dataset.num_supervised[indices]
        assignment = assign_micro_batches(lengths.tolist(), len(indices) // 2, config.micro_batch_tokens, world_size)
        accumulates |= len(assignment) > world_size
        for units in assignment:
            members = [i for unit in units for i in unit]
            largest = max(largest, (int(lengths[members].sum()), int(num_supervised[members].sum())))
    return LargestMicroBatch(*largest, accumulates)


def activation_bytes(shape: ModelConfig, config, device_type: str) -> tuple[int, int]:
    """Bytes that autograd keeps for each token until the backward pass. -> (in a block, outside the blocks)

    D hidden size, F of the MLP, Q and K of all query and of all key heads. In bf16, inputs of matmuls have 2 bytes and
    the residual stream has 4. A CPU has no fused kernel for a norm, and computes attention in float32.
    """
    cpu, bf16, lora = device_type == "cpu", config.dtype == "bf16", config.lora_rank is not None
    D, F, element = shape.hidden_size, shape.intermediate_size, 2 if bf16 else 4
    Q, K = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    norm = (
        4 * D * (2 if cpu and not lora else 1)
    )  # its input; on a CPU also the normed input, for the weight's gradient
    inputs = element * 2 * D  # the outputs of the norms: the inputs of q, k, v and of gate, up
    attention = (4 if cpu else element) * 2 * (Q + K) + element * Q  # q, k, v, the output, and the input of o_proj
    mlp = element * 4 * F  # gate, act(gate), up, and act(gate) · up
    return 2 * norm + inputs + attention + mlp, norm + 2 * element * D


def estimate_memory(
    model: Transformer, largest: LargestMicroBatch, config, world_size: int, device_type: str
) -> dict[str, int]:
    """Bytes that a process holds at the peak of an SFTMix step, by purpose, and in "total".

    docs/scaling.md compares the estimate with measured runs.
    """
    bf16, vocab_size = config.dtype == "bf16", model.config.vocab_size
    element = 2 if bf16 else 4
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = vocab_size * model.config.hidden_size
    layers = model.model.layers
    block = sum(p.numel() for p in layers[0].parameters())
    if world_size > 1:  # FSDP gathers the head, the current block, and on a GPU the next block ahead of time
        gathered = element * (head + block * (1 if device_type == "cpu" else 2))
    else:  # autocast keeps its bf16 copies until the pass ends
        gathered = 2 * (head + block * len(layers)) if bf16 else 0
    full_gradients = 4 * head
    if world_size > 1:  # gradients before they are reduced to shards
        full_gradients += 4 * head + (element + 4) * block
    block_bytes, other_bytes = activation_bytes(model.config, config, device_type)
    activations = largest.tokens * (other_bytes + block_bytes * len(layers))
    rows = min(chunk_size(vocab_size, device_type), largest.supervised)
    chunk = rows * vocab_size * (8 if bf16 else 6)  # logits of the rows, and of half as many mixed rows
    if not config.lora_rank:
        chunk = max(chunk, 4 * head)  # after the last chunk, the head's gradient exists twice for a moment
    if config.activation_checkpointing:  # the inputs of the blocks; the loss is freed before a block is recomputed
        activations = largest.tokens * (other_bytes + 4 * model.config.hidden_size * len(layers))
        chunk = max(chunk, largest.tokens * block_bytes)
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) // world_size,
        "gradients": 4 * trainable // world_size,
        "optimizer state": 8 * trainable // world_size,  # AdamW's two moments
        "whole weights": gathered,
        "whole gradients": 0 if config.lora_rank else full_gradients,
        "activations": activations,
        "logits chunk": chunk,
    }
    in_pass = gathered + memory["whole gradients"] + activations + chunk
    # Accumulated gradients exist during the next pass; those of a single micro-batch grow as activations are freed.
    peak = memory["gradients"] + in_pass if largest.accumulates else max(memory["gradients"], in_pass)
    return memory | {"total": memory["weights"] + memory["optimizer state"] + peak}


def estimate_flops(model: Transformer, tokens: int, supervised: int, config) -> int:
    """Floating-point operations of the passes over so many tokens, all processes together.

    For each weight and token: 2 in the forward pass, 4 in the backward pass (2 for a frozen weight, which needs no
    gradient), 2 to recompute a block. `lm_head` sees only supervised tokens. Attention over the sequence is left out.
    """
    backward = 2 if config.lora_rank else 4
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    return (2 + backward + 2 * config.activation_checkpointing) * blocks * tokens + (2 + backward) * head * supervised


def print_plan(model: Transformer, dataset: Dataset, config, world_size: int, device_type: str) -> None:
    """Print what each stage of a run takes in steps, compute, disk and memory."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = steps_per_epoch(len(dataset), config.batch_size)
    largest = largest_micro_batch(dataset, config, world_size)
    tokens, supervised = int(dataset.lengths.sum()), int(dataset.num_supervised.sum())
    flops = config.epochs * estimate_flops(model, tokens, supervised, config)
    stored = (parameters - trainable if config.lora_rank else parameters) * DTYPES[config.save_dtype].itemsize
    num_models, names = min(config.num_checkpoints, config.epochs * steps) + 2, "checkpoints, reference, sftmix"
    if config.online:
        num_models, names = 1, "sftmix"
    savepoint = 3 * 4 * trainable  # weights and AdamW's two moments; a new one is complete before an old one is removed

    print0(f"\nparameters     {parameters:,}, of which {trainable:,} are trained")
    print0(f"steps          {config.epochs * steps:,} a stage: {config.epochs} epochs of {steps:,}")
    print0(f"micro-batches  of at most {largest.tokens:,} tokens, on {world_size} x {device_type}")
    print0(f"compute        {flops / 1e15:,.2f} PFLOP a stage")
    print0(f"disk           {format_bytes(num_models * stored)} for {num_models} models: {names}")
    print0(f"               {format_bytes((config.keep_last + 1) * savepoint)} for savepoints, while a stage runs")
    print0("memory         of a process, estimated:")
    for name, size in estimate_memory(model, largest, config, world_size, device_type).items():
        note = " at the peak, where not all is there at once" if name == "total" else ""
        print0(f"  {name:17}{format_bytes(size):>10}{note}")


def print_example(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Print the tokens of the first example, with the supervised ones between « and »."""
    tokens, targets = dataset[0]
    ids, in_loss = [*tokens.tolist(), int(targets[-1])], [False, *(targets != IGNORE_INDEX).tolist()]
    spans = groupby(zip(ids, in_loss, strict=True), key=lambda token: token[1])
    texts = [(" ".join(tokenizer.id_to_token(i) for i, _ in span), supervised) for supervised, span in spans]
    print0(f"\nThe first example, {len(tokens):,} tokens; what is learned stands in «»:")
    print0(" ".join(f"« {text} »" if supervised else text for text, supervised in texts))


def format_bytes(size: int) -> str:
    """A number of bytes as text, in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
