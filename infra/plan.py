"""What a run would take: memory of a process, floating-point operations, disk; printed by `train.py --dry_run`.

Below, `config` is a `train.TrainConfig`, and `model` may be on the meta device, since sizes follow from shapes alone.
"""

from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from data import ARRAY_DTYPES, IGNORE_INDEX, Dataset, assign_micro_batches, epoch_order, steps_per_epoch
from infra.device import DTYPES
from infra.distributed import print0
from infra.hf import MAX_SHARD_BYTES
from infra.output import stages_of
from infra.savepoints import MAX_FILE_BYTES
from mixup import chunk_size
from model import ModelConfig, Transformer
from tokenizer import Tokenizer


class LargestMicroBatch(NamedTuple):
    """The size of a run's largest micro-batch, which decides how much memory the run takes."""

    tokens: int
    supervised: int
    num_micro_batches: int  # the most micro-batches that a process has in a step


def largest_micro_batch(dataset: Dataset, config, world_size: int) -> LargestMicroBatch:
    """Go through an epoch of random pairs, as an SFTMix run does with other pairs, and find the largest micro-batch."""
    order, largest, num_micro_batches = epoch_order(len(dataset), config.seed, 0), (0, 0), 1
    for start in range(0, len(dataset), config.batch_size):
        indices = order[start : start + config.batch_size]
        lengths, num_supervised = dataset.lengths[indices], dataset.num_supervised[indices]
        assignment = assign_micro_batches(lengths.tolist(), len(indices) // 2, config.micro_batch_tokens, world_size)
        num_micro_batches = max(num_micro_batches, len(assignment) // world_size)
        for units in assignment:
            members = [i for unit in units for i in unit]
            largest = max(largest, (int(lengths[members].sum()), int(num_supervised[members].sum())))
    return LargestMicroBatch(*largest, num_micro_batches)


def activation_bytes(shape: ModelConfig, config, device_type: str) -> tuple[int, int]:
    """Bytes that autograd keeps for each token until the backward pass. -> (in a block, outside the blocks)

    D hidden size, F of the MLP, Q and K of all query and of all key heads. In bf16, inputs of matmuls have 2 bytes and
    the residual stream has 4. A CPU has no fused kernel for a norm, and computes attention in float32. On a GPU,
    attention in float32 repeats keys and values for each query head.
    """
    cpu, bf16, lora = device_type == "cpu", config.dtype == "bf16", config.lora_rank is not None
    D, F, element = shape.hidden_size, shape.intermediate_size, 2 if bf16 else 4
    Q, K = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    norm = 4 * D * (2 if cpu and not lora else 1)  # its input; on a CPU also the normed one, for the weight's gradient
    inputs = element * 2 * D  # the outputs of the norms: the inputs of q, k, v and of gate, up
    if device_type == "cuda" and not bf16:
        K = Q
    attention = (4 if cpu else element) * 2 * (Q + K) + element * Q  # q, k, v, the output, and the input of o_proj
    mlp = element * 4 * F  # gate, act(gate), up, and act(gate) · up
    return 2 * norm + inputs + attention + mlp, norm + 2 * element * D


def parameter_counts(model: Transformer) -> tuple[int, int, int, int]:
    """The number of parameters: (all, trained ones, those of `lm_head`, those of a block)"""
    numel = [p.numel() for p in model.parameters()]
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return sum(numel), sum(trainable), model.config.vocab_size * model.config.hidden_size, block


def temporary_bytes(
    model: Transformer, config, world_size: int, num_micro_batches: int, device_type: str
) -> tuple[int, int]:
    """Bytes of weights and gradients that a process holds only during a step. -> (weights, gradients)"""
    parameters, trainable, head, block = parameter_counts(model)
    element = DTYPES[config.dtype].itemsize
    gradients = 0 if config.lora_rank else 4 * head  # from the loss's forward pass to the backward pass
    if world_size == 1:  # autocast's copies of weights that are not in the dtype of matmuls, kept until the pass ends
        is_cast = model.head_weight.element_size() != element
        return is_cast * element * (head + block * len(model.model.layers)), gradients
    if not config.lora_rank:  # before they are reduced to shards
        gradients += 4 * head + (element + 4) * block
    if config.zero_stage == 1 and num_micro_batches > 1:  # summed over micro-batches in float32
        gradients += 4 * trainable
    if config.zero_stage < 3:  # all weights, and the buffer that the current block was gathered in
        return element * (parameters + block), gradients
    # FSDP gathers the head, the current block, and on a GPU the next block ahead of time.
    return element * (head + block * (1 if device_type == "cpu" else 2)), gradients


def estimate_memory(
    model: Transformer, largest: LargestMicroBatch, config, world_size: int, device_type: str
) -> dict[str, int]:
    """Bytes that a process holds at the peak of an SFTMix step, by purpose, and in "total".

    docs/scaling.md compares the estimate with measured runs.
    """
    vocab_size, num_layers = model.config.vocab_size, len(model.model.layers)
    trainable = parameter_counts(model)[1]
    temporary = temporary_bytes(model, config, world_size, largest.num_micro_batches, device_type)
    block_bytes, other_bytes = activation_bytes(model.config, config, device_type)
    activations = largest.tokens * (other_bytes + block_bytes * num_layers)
    rows = min(chunk_size(vocab_size, device_type), largest.supervised)
    # Of the chunk's rows, logits in the dtype of matmuls and in float32; of half as many mixed rows, logits in float32.
    # On a GPU also the gradient of the logits, in bf16, or in float32 with torch.compile.
    element = DTYPES[config.dtype].itemsize
    chunk = rows * vocab_size * {"cuda": {2: 10, 4: 8}}.get(device_type, {2: 8, 4: 6})[element]
    if config.activation_checkpointing:  # the inputs of the blocks; the loss is freed before a block is recomputed
        activations = largest.tokens * (other_bytes + 4 * model.config.hidden_size * num_layers)
        chunk = max(chunk, largest.tokens * block_bytes)
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) // world_size,
        "gradients": 4 * trainable // world_size,
        "optimizer state": 8 * trainable // world_size,  # AdamW's two moments
        "temporary weights": temporary[0],
        "temporary gradients": temporary[1],
        "activations": activations,
        "logits chunk": chunk,
    }
    in_pass = sum(temporary) + activations + chunk
    # With several micro-batches, the gradients so far exist during the next pass. With one, they grow while activations
    # are freed. Where unsharded gradients are accumulated (stage 1), their shards grow while they are freed.
    accumulates_shards = largest.num_micro_batches > 1 and (world_size == 1 or config.zero_stage > 1)
    peak = memory["gradients"] + in_pass if accumulates_shards else max(memory["gradients"], in_pass)
    return memory | {"total": memory["weights"] + memory["optimizer state"] + peak}


def estimate_communication(model: Transformer, config, world_size: int, num_micro_batches: int) -> int:
    """Bytes that a process sends, and as many that it receives, in a step of so many micro-batches.

    Of what is gathered or reduced, each of n processes sends (n−1)/n. `infra.fsdp.set_zero_stage` says how often
    weights are gathered, in the dtype of matmuls, and gradients reduced, in float32. What is outside the blocks is
    gathered once a pass: FSDP keeps `lm_head` until the backward pass, which has no use for an embedding's weight.
    """
    parameters, trainable, head, _ = parameter_counts(model)
    gathered, reduced = parameters, trainable
    if config.zero_stage == 3:
        once = head if model.config.tie_word_embeddings else 2 * head  # norms are too small to count
        gathered = num_micro_batches * (2 * parameters - once)
    if config.zero_stage > 1:
        reduced = num_micro_batches * trainable
    return (DTYPES[config.dtype].itemsize * gathered + 4 * reduced) * (world_size - 1) // world_size


def estimate_cpu_memory(model: Transformer, config, world_size: int, device_type: str) -> dict[str, int]:
    """Bytes of CPU memory that a process needs to read and to write, by purpose; one at a time.

    Weights are read one at a time. Savepoints are written file by file: PyTorch holds a file's tensors (on a CPU they
    are there already), and safetensors two copies of their bytes. Rank 0 holds the weights of one file of a model.
    """
    state = [[p.numel() * 4 // world_size] * 3 for p in model.parameters() if p.requires_grad]
    file = max(min(MAX_FILE_BYTES, sum(map(sum, state))), max(map(max, state)))
    sizes = [p.numel() * DTYPES[config.save_dtype].itemsize for p in model.parameters()]
    return {
        "loading": max(p.numel() * p.element_size() for p in model.parameters()) // world_size,
        "savepoints": file * (2 if device_type == "cpu" else 3),
        "saving models": max(min(MAX_SHARD_BYTES, sum(sizes)), max(sizes)),
    }


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
    parameters, trainable, _, _ = parameter_counts(model)
    steps = steps_per_epoch(len(dataset), config.batch_size)
    largest = largest_micro_batch(dataset, config, world_size)
    tokens, supervised = int(dataset.lengths.sum()), int(dataset.num_supervised.sum())
    flops = config.epochs * estimate_flops(model, tokens, supervised, config)
    stored = (parameters - trainable if config.lora_rank else parameters) * DTYPES[config.save_dtype].itemsize
    stages, num_models = stages_of(config), {}
    if "reference" in stages:
        num_models = {"checkpoints": min(config.num_checkpoints, config.epochs * steps), "reference": 1}
    if "sftmix" in stages:
        num_models["sftmix"] = 1
    savepoint = 3 * 4 * trainable  # weights and AdamW's two moments; a new one is complete before an old one is removed

    print0(f"\nparameters     {parameters:,}, of which {trainable:,} are trained")
    print0(f"steps          {config.epochs * steps:,} a stage: {config.epochs} epochs of {steps:,}")
    print0(f"micro-batches  of at most {largest.tokens:,} tokens, on {world_size} x {device_type}")
    print0(f"compute        {flops / 1e15:,.2f} PFLOP a stage")
    count, names = sum(num_models.values()), ", ".join(num_models)
    print0(f"disk           {format_bytes(count * stored)} for {count} models: {names}")
    print0(f"               {format_bytes((config.keep_last + 1) * savepoint)} for savepoints, while a stage runs")
    print0("memory         of a process, estimated:")
    for name, size in estimate_memory(model, largest, config, world_size, device_type).items():
        note = " at the peak, where not all is there at once" if name == "total" else ""
        print0(f"  {name:20}{format_bytes(size):>10}{note}")
    print0("CPU memory     of a process, beside what Python and PyTorch take, estimated; one at a time:")
    for name, size in estimate_cpu_memory(model, config, world_size, device_type).items():
        note = ", on rank 0" if name == "saving models" else ""
        print0(f"  {name:20}{format_bytes(size):>10}{note}")
    data = sum(getattr(dataset, name).nbytes for name in ARRAY_DTYPES)
    print0(f"  {'encoded data':20}{format_bytes(data):>10}, mapped: freed where memory is short")
    if world_size > 1:
        print_zero_stages(model, largest, config, world_size, device_type)


def print_zero_stages(
    model: Transformer, largest: LargestMicroBatch, config, world_size: int, device_type: str
) -> None:
    """Print what each stage of ZeRO takes: memory of a process, and bytes that it sends in a step."""
    count = largest.num_micro_batches
    print0(f"--zero_stage   memory of a process, and what it sends in a step of {count} micro-batches:")
    for stage in (3, 2, 1):
        choice = replace(config, zero_stage=stage)
        memory = estimate_memory(model, largest, choice, world_size, device_type)["total"]
        sent = estimate_communication(model, choice, world_size, count)
        print0(f"  {stage:<20}{format_bytes(memory):>10}{format_bytes(sent):>10}")


def print_example(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Print the tokens of the first example, with the supervised ones between « and »."""
    tokens, targets = dataset[0]
    ids, in_loss = tokens.tolist(), [False, *(targets != IGNORE_INDEX).tolist()]
    if in_loss[-1]:
        ids.append(int(targets[-1]))
    spans = groupby(zip(ids, in_loss), key=lambda token: token[1])  # noqa: B905 (the last may be a target only)
    texts = [(" ".join(tokenizer.id_to_token(i) for i, _ in span), supervised) for supervised, span in spans]
    print0(f"\nThe first example, {len(tokens):,} tokens; what is learned stands in «»:")
    print0(" ".join(f"« {text} »" if supervised else text for text, supervised in texts))


def format_bytes(size: int) -> str:
    """A number of bytes as text, in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
