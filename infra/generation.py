"""Generation: each sequence of a batch is continued by greedy decoding or nucleus sampling, with a KV cache.

Letters: B sequences generated together, B' of which are still computed on, V vocabulary.
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import pack
from infra.distributed import all_reduce_sum, print0, rank, world_size
from infra.fsdp import is_sharded
from model import KVCache, Transformer

# What a generation step may use. On a GPU, cuDNN would plan its kernel for each number of keys, which each step raises.
DECODING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Sampling(NamedTuple):
    """How the next token is chosen: at temperature 0 the most likely token, else a random token of the nucleus.

    The nucleus is the smallest set of most likely tokens with a total probability of `top_p` (Holtzman et al. 2020).
    The random numbers depend on the seed, the prompt, and how often it has been asked before, and not on the other
    prompts of a batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def uniform(self, prompt: list[int], count: int, repeat: int = 0) -> np.ndarray:
        """Random numbers in [0, 1), one for each token after a prompt: float64 [count]"""
        digest = hashlib.sha256(np.array(prompt, dtype="<i8")).digest()
        return np.random.default_rng([self.seed, *np.frombuffer(digest, dtype="<u4"), repeat]).random(count)

    def next_tokens(self, logits, uniform):
        """Choose a token for each sequence. logits [B, V], uniform [B] -> int64 [B]

        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4, 3)
        >>> Sampling(temperature=1.0, top_p=0.7).next_tokens(logits, torch.tensor([0.0, 0.6, 0.65, 0.99])).tolist()
        [0, 0, 1, 1]
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        below_top = logits.double() - logits.amax(-1, keepdim=True)  # a tiny temperature makes −inf, never +inf
        p, tokens = (below_top / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = p.cumsum(-1)
        in_nucleus = cumulative - p < self.top_p  # up to the token that makes the sum reach top_p
        threshold = uniform[:, None] * cumulative.masked_fill(~in_nucleus, 0).amax(-1, keepdim=True)
        index = (in_nucleus & (cumulative < threshold)).sum(-1, keepdim=True)  # inverse transform sampling
        return tokens.gather(-1, index)[:, 0]


GREEDY = Sampling()


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    repeats: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt. -> the new ids of each, none for a prompt that is too long for the model, with a warning

    A sequence ends with one of `stop_ids`, after `max_new_tokens`, or where the model has no more positions.
    `repeats` says how often each prompt has been asked before (by default never), so that another answer is sampled.
    Under `torchrun` the prompts are distributed over the processes, and all processes return all new ids.
    """
    device, limit = model.head_weight.device, model.config.max_length
    max_new_tokens, repeats = min(max_new_tokens, limit), repeats or [0] * len(prompts)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
    if len(fitting) < len(prompts):
        print0(f"warning: {len(prompts) - len(fitting)} prompts are too long for the model: no answer", sys.stderr)
    # Row i holds the new ids of prompt i, plus 1, then zeros. Each process fills in the rows of its own prompts and
    # leaves the others zero, so a sum gathers all rows.
    results = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    by_length = sorted(fitting, key=lambda i: len(prompts[i]))  # a batch has prompts of similar lengths
    own = by_length[rank() :: world_size()]
    for start in range(0, math.ceil(len(fitting) / world_size()), batch_size):  # as many batches in all processes
        indices = own[start : start + batch_size]
        batch = [prompts[i] for i in indices]
        rows = torch.tensor(indices, dtype=torch.int64, device=device)
        with torch.inference_mode(not is_sharded(model.head_weight)):  # faster than no_grad, but FSDP refuses it
            asked_before = [repeats[i] for i in indices]
            new_tokens = decode_batch(model, batch, max_new_tokens, stop_ids, sampling, asked_before)
            for step, new_ids in enumerate(new_tokens):
                results[rows, step] = new_ids + 1
    all_reduce_sum(results)
    return [[token - 1 for token in row if token] for row in results.tolist()]


@torch.no_grad()
def decode_batch(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    repeats: Sequence[int],
) -> Iterator[torch.Tensor]:
    """Continue a batch of prompts. Yields the next id of each, int64 [B], and −1 for a sequence that has ended.

    Each process takes part in each forward pass of a sharded model, so it ends when the sequences of all processes
    have ended. Without sequences of its own to continue, it computes on a single one and ignores the result.
    """
    device = model.head_weight.device
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    asked = list(zip(prompts, repeats, strict=True)) or [([], 0)]
    uniform = np.array([sampling.uniform(prompt, max_new_tokens, repeat) for prompt, repeat in asked])
    uniform = torch.from_numpy(uniform).to("cpu" if device.type == "mps" else device)  # MPS has no float64
    batch = pack([(prompt, prompt) for prompt in prompts]).to(device)  # the targets are not used
    lengths = batch.cu_seqlens.diff().long().to(device)  # [B]: of the prompts
    longest = int(lengths.max())
    cache_length = min(longest + max_new_tokens, model.config.max_length)
    cache = KVCache(model.config, len(lengths), cache_length)
    active = torch.arange(len(lengths), device=device)  # [B']: indices of the sequences that are computed on
    running = torch.full((len(lengths),), len(prompts) > 0, device=device)  # bool [B']: not ended
    # The first pass gets the packed prompts, each later one the newest token of each active sequence.
    tokens, positions, cu_seqlens = batch.tokens, batch.positions, batch.cu_seqlens
    last = cu_seqlens[1:].long() - 1  # [B']: where in the packed row each prompt ends
    for step in range(max_new_tokens):
        with sdpa_kernel(DECODING_KERNELS):
            logits = model(tokens, positions, cu_seqlens, cache, head=lambda z, last=last: model.logits(z[last]))
        draws = uniform[active.to(uniform.device), step]
        new = sampling.next_tokens(logits.to(uniform.device), draws).to(device)  # [B']
        new_ids = torch.full((len(prompts),), -1, device=device)  # [B]
        new_ids[active[running]] = new[running]
        yield new_ids
        running &= ~torch.isin(new, stop) & (lengths[active] + step < cache_length)
        if not all_reduce_sum(running.sum()):
            break
        if not running.all():
            order = compact(running)
            cache.reorder(order)
            active, new, running = active[order], new[order], running[order]
        tokens, positions, cu_seqlens = new, (lengths[active] + step).clamp(max=cache_length - 1), None
        last = slice(None)


def compact(running):
    """Move the last running sequences into the places of those that have ended. -> the sequence for each place

    The others keep their places, so that few keys and values are copied. If none is running, the first one remains.
    bool [B'] -> int64 [number of running sequences]

    >>> compact(torch.tensor([True, False, True, False, True])).tolist(), compact(torch.zeros(2) > 0).tolist()
    ([0, 4, 2], [0])
    """
    num_running = int(running.sum())
    if num_running == 0:
        return torch.zeros(1, dtype=torch.int64, device=running.device)
    order = torch.arange(num_running, device=running.device)
    order[~running[:num_running]] = num_running + running[num_running:].nonzero()[:, 0]
    return order
