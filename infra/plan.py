"""What a run would take: memory, compute, disk."""

from typing import NamedTuple

from data import Dataset, deal, epoch_order
from mixup import chunk_rows
from model import ModelConfig, Transformer


class Work(NamedTuple):
    """The largest of a run's micro-batches, which decides how much memory it takes."""

    tokens: int
    supervised: int
    accumulates: bool  # a process adds up gradients over several


def heaviest_work(dataset: Dataset, config, num_processes: int) -> Work:
    """Deal an epoch out by pairs, as the SFTMix run does (there by other pairs), and find the largest micro-batch."""
    order, heaviest, accumulates = epoch_order(len(dataset), config.seed, 0), (0, 0), False
    for start in range(0, len(dataset), config.batch_size):
        chosen = order[start : start + config.batch_size]
        lengths, counts = dataset.lengths[chosen], dataset.num_supervised[chosen]
        micro_batches = deal(lengths.tolist(), len(chosen) // 2, config.micro_batch_tokens, num_processes)
        accumulates |= len(micro_batches) > num_processes
        for units in micro_batches:
            members = [i for unit in units for i in unit]
            heaviest = max(heaviest, (int(lengths[members].sum()), int(counts[members].sum())))
    return Work(*heaviest, accumulates)


def activation_bytes(shape: ModelConfig, config, device_type: str) -> tuple[int, int]:
    """What autograd keeps of a token until the backward pass: -> (bytes of a block, of what is around the blocks).

    D hidden size, F of the MLP, Q and K of all query and of all key heads; elements of products have 2 bytes in bf16,
    those of the stream between them 4. A CPU has no kernel for a whole norm, and attends in float32.
    """
    cpu, bf16, lora = device_type == "cpu", config.dtype == "bf16", config.lora_rank is not None
    D, F, product = shape.hidden_size, shape.intermediate_size, 2 if bf16 else 4
    Q, K = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    norm = 4 * D * (2 if cpu and not lora else 1)  # its input, and for its weight's gradient on a CPU the input normed
    inputs = product * 2 * D  # what the norms return, to q, k, v and to gate, up
    attention = (4 if cpu else product) * 2 * (Q + K) + product * Q  # q, k, v, what comes out, and that for o_proj
    mlp = product * 4 * F  # gate, its activation, up, and their product
    return 2 * norm + inputs + attention + mlp, norm + 2 * product * D


def estimate_memory(model: Transformer, work: Work, config, num_processes: int, device_type: str) -> dict:
    """Bytes a process holds at the peak of an SFTMix step, by what they are for, and in "total".

    `model` may be without weights (`empty_model`): sizes follow from shapes. docs/scaling.md has the estimate beside
    what runs were measured to take.
    """
    bf16, vocab_size = config.dtype == "bf16", model.config.vocab_size
    product = 2 if bf16 else 4
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = vocab_size * model.config.hidden_size
    layers = model.model.layers
    block = sum(p.numel() for p in layers[0].parameters())
    if num_processes > 1:  # what `shard` gathers: the head, the block at work, and on a GPU the next one on its way
        gathered = product * (head + block * (1 if device_type == "cpu" else 2))
    else:  # autocast's bf16 copies, which it keeps to the end of a pass
        gathered = 2 * (head + block * len(layers)) if bf16 else 0
    rows = min(chunk_rows(vocab_size, device_type), work.supervised)
    made = 4 * head
    if num_processes > 1:  # gradients on their way to being a share
        made += 4 * head + (product + 4) * block
    block_bytes, around = activation_bytes(model.config, config, device_type)
    activations = work.tokens * (around + block_bytes * len(layers))
    at_work = rows * vocab_size * (8 if bf16 else 6)  # logits of rows, and of half as many mixed ones
    if not config.lora_rank:
        at_work = max(at_work, 4 * head)  # when they are gone, the head's gradient is there twice for a moment
    if config.activation_checkpointing:  # the blocks' inputs; the loss is done when the first block is computed again
        activations = work.tokens * (around + 4 * model.config.hidden_size * len(layers))
        at_work = max(at_work, work.tokens * block_bytes)
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) // num_processes,
        "gradients": 4 * trainable // num_processes,
        "optimizer state": 8 * trainable // num_processes,  # AdamW's two moments
        "whole weights": gathered,
        "whole gradients": 0 if config.lora_rank else made,
        "activations": activations,
        "logits chunk": at_work,
    }
    passing = gathered + memory["whole gradients"] + activations + at_work
    # Over several micro-batches gradients are there during a pass; over one they come as activations go.
    on_top = memory["gradients"] + passing if work.accumulates else max(memory["gradients"], passing)
    return memory | {"total": memory["weights"] + memory["optimizer state"] + on_top}


def estimate_flops(model: Transformer, tokens: int, supervised: int, config) -> int:
    """Floating-point operations of the passes over so many tokens, all processes together.

    Forward 2 for a weight and token, backward 4 (2 for a frozen weight, which needs no gradient of its own), and 2 to
    compute a block again; `lm_head` sees the supervised tokens alone. What attention adds with length is left out.
    """
    backward = 2 if config.lora_rank else 4
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    return (2 + backward + 2 * config.activation_checkpointing) * blocks * tokens + (2 + backward) * head * supervised


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
