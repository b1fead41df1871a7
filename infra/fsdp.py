"""A model in shards over all processes, by PyTorch's FSDP2; with one process, its parameters are plain tensors."""

import inspect
import math
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from infra.distributed import rank, world_size


def apply_fsdp(model: nn.Module, device) -> None:
    """Shard the weights of a `model.Transformer` by rows over all processes, and so gradients and optimizer state.

    PyTorch's FSDP2 gathers the weights of a block (in bf16 where the model computes in bf16) before the block computes
    and frees them afterwards; it sums gradients in float32. The weights outside the blocks, `lm_head` among them, and
    those of all norms, which stay float32, are gathered once a pass. So all processes must run the same number of
    forward and backward passes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second that one process saves

    def norm_weights() -> set[nn.Parameter]:
        return {parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight")}

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    # Inputs are not cast, so that cos and sin of the rotary embedding stay float32.
    norm_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    param_dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else None
    policy = replace(norm_policy, param_dtype=param_dtype)
    embedding, tied = model.model.embed_tokens, model.config.tie_word_embeddings
    # All norms are one group, that of the model, which is sharded first for this: a block would take its own norms.
    fully_shard(model, mesh=mesh, mp_policy=norm_policy, ignored_params=set(model.parameters()) - norm_weights())
    for module in (*model.model.layers, *([] if tied else [embedding])):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=norm_weights())
    # `lm_head` is used without a call of it. Its weight is gathered when the last norm is called, and not freed then.
    head = [embedding if tied else model.lm_head, model.model.norm]
    fully_shard(head, mesh=mesh, mp_policy=policy, ignored_params=norm_weights(), reshard_after_forward=False)
    for module in (*model.model.layers, embedding, head[0], model):
        # Losses are divided by global counts, so gradients are summed. The default, a mean, is silently a sum under
        # gloo (pytorch#162338); an explicit sum is a sum everywhere.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if not tied:
        embedding.set_unshard_in_backward(False)  # the gradient of a look-up needs no weight
    model.register_forward_pre_hook(_cu_seqlens_as_list, prepend=True, with_kwargs=True)


def _cu_seqlens_as_list(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keep `cu_seqlens` on the CPU: FSDP moves all tensors among a model's arguments to its device, but not lists."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if bound.arguments.get("cu_seqlens") is not None:
        bound.arguments["cu_seqlens"] = torch.as_tensor(bound.arguments["cu_seqlens"]).tolist()
    return bound.args, bound.kwargs


def set_zero_stage(model: nn.Module, stage: int, is_last: bool) -> None:
    """Say what a sharded model keeps unsharded after its next forward and backward pass; after a step's last, nothing.

    The stages are those of ZeRO (Rajbhandari et al. 2020). 3 keeps nothing: each pass gathers the weights of blocks
    twice, before its forward and its backward part, and reduces the gradients. 2 keeps the weights, which are gathered
    once a step. 1 keeps the gradients too, in float32, and the last pass reduces their sum.
    """
    if not hasattr(model, "set_requires_gradient_sync"):  # one process
        return
    if stage < 3:
        model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(stage == 3 or is_last)
    model.set_requires_gradient_sync(stage > 1 or is_last)


def is_sharded(parameter) -> bool:
    """Whether `apply_fsdp` has sharded this parameter."""
    return hasattr(parameter, "to_local")


def local_row_range(parameter) -> tuple[int, int]:
    """The rows of a parameter that this process holds, as (first, end)."""
    rows = len(parameter)
    if not is_sharded(parameter):
        return 0, rows
    size = math.ceil(rows / world_size())  # as torch.chunk divides
    return min(rank() * size, rows), min((rank() + 1) * size, rows)


def local_shard(parameter):
    """The rows that this process holds, as a plain tensor that shares the parameter's memory."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def full_tensor(parameter):
    """All rows of a parameter. For a sharded one this is a copy, and all processes must call it together."""
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a sharded model, so that its parameters are the float32 shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
