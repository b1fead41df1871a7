"""SFTMix's loss (Xiao et al., arXiv 2410.05248): next-token prediction plus Mixup between two halves of the data.

Example i has the supervised tokens y_1 … y_N; z_n is the last hidden state at the position that predicts y_n, and
W is `lm_head`, so p(y_n) = softmax(W z_n)[y_n]. A confident example c and an unconfident one u make a pair:

    L_NTP   = mean over supervised positions of −log p(y_n)
    z̃_n     = λ z^c_n + (1−λ) z^u_n                            for n ≤ min(N^c, N^u), one λ ~ Beta(α, α) a pair
    ỹ_n     = λ y^c_n + (1−λ) y^u_n                            (one-hot)
    L_Mixup = mean over mixed positions of H(ỹ_n, softmax(W z̃_n)),  H(ỹ, p) = −Σ_v ỹ_v log p_v
    L       = L_NTP + μ L_Mixup

Read `mixup` and `sftmix_loss_literal` for what is computed, `pair_positions` for who meets whom, and `sftmix_loss` for
how to get the same value and the same gradients at the price of L_NTP alone. Tensors in, tensors out: this file
imports nothing but torch and can be taken into any trainer.

Letters: N tokens in the packed row (N^c and N^u: supervised tokens of the two examples of a pair), B examples in the
row, S supervised positions, P pairs, M mixed positions, D hidden size, V vocabulary, R rows of a chunk.
"""

import functools
import os
import shutil

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # a target no loss looks at: prompt tokens


# --- The recipe, word for word ----------------------------------------------------------------------------------------


def mixup(z_c, z_u, y_c, y_u, lam, vocab_size: int):
    """z̃ = λ z^c + (1−λ) z^u and ỹ = λ y^c + (1−λ) y^u: the literal interpolation of states and one-hot targets.

    z_c and z_u [M, D], y_c and y_u int64 [M], lam a number or [M] -> (z_mixed [M, D], y_mixed [M, V]).

    >>> z_c, z_u = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    >>> z, y = mixup(z_c, z_u, torch.tensor([0]), torch.tensor([2]), lam=0.75, vocab_size=3)
    >>> z.tolist(), y.tolist()
    ([[3.0, 2.0]], [[0.75, 0.0, 0.25]])
    """
    lam = torch.as_tensor(lam, dtype=z_c.dtype, device=z_c.device).reshape(-1, 1)  # [M, 1], or [1, 1]
    one_hot_c, one_hot_u = F.one_hot(y_c, vocab_size).to(z_c.dtype), F.one_hot(y_u, vocab_size).to(z_c.dtype)  # [M, V]
    return lam * z_c + (1 - lam) * z_u, lam * one_hot_c + (1 - lam) * one_hot_u


def sftmix_loss_literal(
    hidden, weight, targets, index_c, index_u, lam, mu, ntp_weight=1.0, num_supervised=None, num_mixed=None
):
    """L = L_NTP + μ L_Mixup as the paper writes it, for reading and as the oracle of `sftmix_loss` (same arguments).

    Two products with `lm_head` and one-hot targets: it holds [S, V] and [M, V] several times over.
    """
    num_supervised, num_mixed = _denominators(targets, index_c, num_supervised, num_mixed)
    z_mixed, y_mixed = mixup(
        hidden[index_c], hidden[index_u], targets[index_c], targets[index_u], lam, vocab_size=len(weight)
    )
    ntp = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / num_supervised  # L_NTP
    mix = F.cross_entropy(z_mixed @ weight.T, y_mixed, reduction="sum") / num_mixed  # L_Mixup: mean of H(ỹ, p)
    return ntp_weight * ntp + mu * mix, ntp.detach(), mix.detach()  # L


def _denominators(targets, index_c, num_supervised, num_mixed):
    """The counts the two means divide by; at least 1, since a sum over nothing is 0 and so must its mean be."""
    num_supervised = len(targets) if num_supervised is None else num_supervised
    num_mixed = len(index_c) if num_mixed is None else num_mixed
    return max(num_supervised, 1), max(num_mixed, 1)


# --- Who meets whom ---------------------------------------------------------------------------------------------------


def pair_positions(targets, cu_seqlens, pairs):
    """Which supervised positions meet: the n-th of a pair's one example and the n-th of its other, n ≤ min(N^c, N^u).

    targets int64 [N] with IGNORE_INDEX, cu_seqlens int32 [B+1], pairs int64 [P, 2] (examples of the row, confident then
    unconfident) -> (index_c [M], index_u [M], pair [M]): positions numbered among the S supervised ones, in order, and
    whose pair each belongs to. `lam_of_pair[pair]` is then λ at every mixed position.

    Two examples in the row, supervised 2 of 4 and 3 of 5; the first two of each meet:

    >>> targets = torch.tensor([-100, -100, 11, 12, -100, -100, 21, 22, 23])
    >>> [x.tolist() for x in pair_positions(targets, torch.tensor([0, 4, 9]), torch.tensor([[0, 1]]))]
    [[0, 1], [2, 3], [0, 0]]
    """
    supervised_before = F.pad((targets != IGNORE_INDEX).cumsum(0), (1, 0))  # [N+1]
    # Example b has the supervised positions numbered bounds[b] to bounds[b+1].
    bounds = supervised_before[cu_seqlens.long()]  # [B+1]
    first, count = bounds[:-1], bounds.diff()  # [B]
    confident, unconfident = pairs.unbind(1)  # [P]
    meet = torch.minimum(count[confident], count[unconfident])  # [P]: min(N^c, N^u)
    pair = torch.repeat_interleave(meet)  # [M]: 0 meet_0 times, 1 meet_1 times, …
    n = torch.arange(len(pair), device=pair.device) - (meet.cumsum(0) - meet)[pair]  # [M]: 0 … meet−1 in each pair
    return first[confident][pair] + n, first[unconfident][pair] + n, pair


# --- The same loss at the price of one --------------------------------------------------------------------------------


def sftmix_loss(
    hidden,
    weight,
    targets,
    index_c,
    index_u,
    lam,
    mu,
    ntp_weight=1.0,
    num_supervised=None,
    num_mixed=None,
    log_p=None,
):
    """L = ntp_weight · L_NTP + μ L_Mixup in one pass over `lm_head`: value and gradients of `sftmix_loss_literal`.

    hidden [S, D] at the supervised positions, weight [V, D], targets int64 [S] without IGNORE_INDEX, index_c and
    index_u int64 [M] rows of hidden (from `pair_positions`), lam [M], mu and ntp_weight numbers. num_supervised and
    num_mixed are the denominators of the two means, S and M where left out; under gradient accumulation and data
    parallelism give the counts of the **global** batch, so that the parts add up to its mean, not to a mean of means.
    -> (loss, ntp, mix): loss carries gradients to hidden and weight, none to lam; ntp and mix are detached means. A
    float32 `log_p` [S], where given, is filled with log p(y), which is known on the way.

    Three facts make it cheap:
      1. Cross-entropy is linear in its target, so no one-hot row is needed: H(ỹ, p) = λ CE(y^c) + (1−λ) CE(y^u).
      2. `lm_head` has no bias, so the mixed logits are made of logits that NTP needs anyway:
         W z̃ = λ W z^c + (1−λ) W z^u. One product serves both terms.
      3. The gradient of both terms by the logits is softmax minus target, known as soon as the logits are. So rows go
         through in chunks, each leaving its gradients behind, and the logits [S, V] never exist at once.

    Which rows make up a chunk is settled on the CPU. With hidden on a GPU and index_c and index_u on the CPU, as
    `pair_positions` makes them there, no step of this waits for the GPU.
    """
    num_supervised, num_mixed = _denominators(targets, index_c, num_supervised, num_mixed)
    if len(index_c) != len(index_u):
        raise ValueError(f"index_c and index_u must pair up, but are {len(index_c)} and {len(index_u)} long")
    lam = torch.as_tensor(lam, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    lam = lam.expand(len(index_c))
    loss, ntp_sum, mix_sum = _ChunkedLoss.apply(
        hidden, weight, targets, index_c, index_u, lam, ntp_weight / num_supervised, mu / num_mixed, log_p
    )
    return loss, ntp_sum / num_supervised, mix_sum / num_mixed


def chunk_rows(vocab_size: int, device_type: str = "cpu") -> int:
    """How many rows of logits `sftmix_loss` holds at once.

    Fewer, and a chunk spends its time on reading W and adding to W's gradient. More only takes memory: on a GPU 2²⁶
    logits are 128 MB in bf16, and on a CPU 2²² are 16 MB in float32, which the allocator need not ask the system for.
    """
    elements, fewest = (2**26, 512) if device_type == "cuda" else (2**22, 256)
    return max(fewest, elements // vocab_size)


class _ChunkedLoss(torch.autograd.Function):
    """a Σ_s −log p(y_s) + b Σ_m H(ỹ_m, p̃_m), with both gradients computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, index_c, index_u, lam, a, b, log_p_out):
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        product_dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype  # of matrix products alone
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # of everything that is summed or exponentiated
        # On a CPU the product itself adds to W's gradient, in float32; on a GPU a bf16 product is worth the sum apart.
        grad_dtype = product_dtype if device.type == "cuda" else sum_dtype
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=sum_dtype) if want_hidden else None  # [S, D]
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if want_weight else None  # [V, D]
        ntp_sum = mix_sum = torch.zeros((), dtype=sum_dtype, device=device)
        gradient_by_logits = _fused() if device.type == "cuda" else _gradient_by_logits

        order, uses, chunks = _chunks(len(hidden), index_c.cpu(), index_u.cpu(), chunk_rows(len(weight), device.type))
        order, uses = (_without_waiting(x, device) for x in (order, uses))
        share = 1 / uses.to(sum_dtype)[:, None]  # [S, 1]
        # Tensors, since numbers would be compiled in, and they are others in every step.
        scale, scale_mixed = a * share, torch.full((), b, dtype=sum_dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            W = weight.to(product_dtype)
            for of_rows, of_mixed in chunks:
                # The chunk's rows: k confident ones and the k unconfident ones they meet, or (k = 0) loners.
                rows, lam_m = order[of_rows], lam[of_mixed, None]  # [R], [k, 1]
                z, y = hidden[rows].to(product_dtype), targets[rows, None]  # [R, D], [R, 1]
                logits = z @ W.T  # [R, V]: the one lm_head product
                grad, log_p, ce_mixed = gradient_by_logits(logits, y, lam_m, scale[rows], scale_mixed, grad_dtype)
                ntp_sum = ntp_sum - (share[rows] * log_p).sum()  # Σ −log p(y_s)
                mix_sum = mix_sum + ce_mixed.sum()  # Σ H(ỹ_m, p̃_m)
                if log_p_out is not None:
                    log_p_out[rows] = log_p[:, 0].to(log_p_out.dtype)
                if want_hidden:
                    grad_hidden.index_add_(0, rows, (grad.to(product_dtype) @ W).to(sum_dtype))
                if want_weight:
                    _add_product_(grad_weight, grad.T, z.to(grad_dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(ntp_sum, mix_sum)
        return a * ntp_sum + b * mix_sum, ntp_sum, mix_sum

    @staticmethod
    def backward(ctx, grad_loss, _ntp, _mix):
        grads = [
            None if grad is None else (grad_loss * grad).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None, None, None, None


def _gradient_by_logits(logits, y, lam, scale, scale_mixed, grad_dtype):
    """Everything about a chunk that is no matrix product, in place where it can be; on a GPU fused into a few kernels.

    logits [R, V], y int64 [R, 1], lam [k, 1], and what a position counts for: scale [R, 1], scale_mixed [] ->
    (gradient of the loss by the logits [R, V] in grad_dtype, log p(y) [R, 1], H(ỹ, p̃) [k, 1]). Of the rows, k are
    confident and the next k unconfident.
    """
    k = len(lam)
    y_c, y_u = y[:k], y[k : 2 * k]
    logits = logits.to(scale.dtype)
    mixed = torch.lerp(logits[k : 2 * k], logits[:k], lam)  # [k, V]: λ W z^c + (1−λ) W z^u = W z̃, fact 2
    total, (log_p,) = _exponentiate_(logits, y)
    total_mixed, (log_p_c, log_p_u) = _exponentiate_(mixed, y_c, y_u)
    ce_mixed = -(lam * log_p_c + (1 - lam) * log_p_u)  # H(ỹ, p̃), fact 1

    # Fact 3. ∂/∂logits of −log p(y) is p − e_y; of H(ỹ, p̃) by the mixed logits it is p̃ − ỹ, and by fact 2 λ of that
    # flows to the confident row and 1−λ to the unconfident one.
    grad = _subtract_at_(logits.mul_(scale / total), y, scale)
    grad_mixed = _subtract_at_(mixed.mul_(scale_mixed / total_mixed), y_c, scale_mixed * lam)
    grad_mixed = _subtract_at_(grad_mixed, y_u, scale_mixed * (1 - lam))
    grad[:k].addcmul_(lam, grad_mixed)
    grad[k : 2 * k].addcmul_(1 - lam, grad_mixed)
    return grad.to(grad_dtype), log_p, ce_mixed


def _exponentiate_(logits, *gold):
    """Turn logits [R, V] into exp(logits − max), in place: -> (their sums [R, 1], log p of each gold token [R, 1])."""
    top = logits.amax(-1, keepdim=True)
    below_top = [logits.gather(1, y) - top for y in gold]
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return total, [x - total.log() for x in below_top]


def _subtract_at_(grad, y, amount):
    """Take `amount` [R, 1] from the entries y [R, 1] of grad [R, V], in place."""
    if torch.compiler.is_compiling():  # a look at every entry fuses with what is done to it anyway; a scatter does not
        return grad.sub_(amount * (torch.arange(grad.shape[1], device=grad.device) == y))
    return grad.scatter_add_(1, y, -amount)


@functools.cache
def _fused():
    """`_gradient_by_logits`, compiled for chunks of any size; as it is where there is no C compiler to do it with."""
    compilers = [os.environ.get("CC"), "cc", "gcc", "clang"]
    if not any(shutil.which(name) for name in compilers if name):
        return _gradient_by_logits
    return torch.compile(_gradient_by_logits, dynamic=True)


def _without_waiting(tensor, device):
    """A tensor in main memory, copied to the device in its turn, from where it can be copied without the CPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _add_product_(total, a, b):
    """total += a @ b, without a copy of the product where the dtypes allow."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(num_rows: int, index_c, index_u, size: int):
    """Cut rows into chunks of at most `size`, pairs together: -> (order of the rows, uses [S], chunks).

    A chunk is a slice of that order and a slice of the mixed positions. A row that k mixed positions use comes by k
    times, and each time brings 1/k of its own −log p.
    """
    seen = torch.bincount(torch.cat([index_c, index_u]), minlength=num_rows)  # [S]
    order, chunks, start = [], [], 0
    for m in range(0, len(index_c), size // 2):
        mixed = slice(m, min(m + size // 2, len(index_c)))
        order += [index_c[mixed], index_u[mixed]]
        chunks.append((slice(start, start + 2 * (mixed.stop - m)), mixed))
        start = chunks[-1][0].stop
    order.append((seen == 0).nonzero()[:, 0])  # who meets nobody
    order = torch.cat(order)
    chunks += [(slice(s, min(s + size, len(order))), slice(0, 0)) for s in range(start, len(order), size)]
    return order, seen.clamp(min=1), chunks
