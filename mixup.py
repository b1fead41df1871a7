"""SFTMix's loss (Xiao et al., arXiv 2410.05248): next-token prediction plus Mixup between two halves of the data.

Training examples are sorted by how confidently a reference model predicts them, and cut at the median into a confident
and an unconfident half. Example i has the supervised tokens y_1 … y_N; z_n is the output of the last layer, after the
final norm, at the position that predicts y_n, and W is `lm_head`, so p(y_n) = softmax(W z_n)[y_n]. A pair is a
confident example c and an unconfident example u:

    L_NTP   = mean over all supervised positions of −log p(y_n)
    z̃_n     = λ z^c_n + (1−λ) z^u_n                            for n ≤ min(N^c, N^u), one λ ~ Beta(α, α) per pair
    ỹ_n     = λ y^c_n + (1−λ) y^u_n                            with y^c_n and y^u_n one-hot
    p̃_n     = softmax(W z̃_n)
    L_Mixup = mean over all mixed positions of H(ỹ_n, p̃_n),    H(ỹ, p) = −Σ_v ỹ_v log p_v
    L       = L_NTP + μ L_Mixup

`mixup` and `sftmix_loss_literal` compute the equations as they are written, `pair_positions` says which positions are
mixed, and `sftmix_loss` computes the same value and gradients at about the cost of L_NTP alone. All of them take and
return tensors. This file imports only torch, so that it can be copied into any trainer.

Letters: B examples are concatenated without padding into a packed row of T tokens with S supervised positions; N^c and
N^u supervised tokens of the two examples of a pair, P pairs, M mixed positions, D hidden size, V vocabulary size, R
positions in a chunk.
"""

import functools
import os
import sys

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # the target of positions that are not supervised, such as those of the prompt
VOCAB_MULTIPLE = {"cuda": 8}  # V is padded to it: tensor cores need 16 bytes, which are 8 numbers in bf16


# --- The equations as written -----------------------------------------------------------------------------------------


def mixup(z_c, z_u, y_c, y_u, lam, vocab_size: int):
    """z̃ = λ z^c + (1−λ) z^u and ỹ = λ y^c + (1−λ) y^u: the literal interpolation of states and one-hot targets.

    z_c and z_u [M, D], y_c and y_u int64 [M], lam a number or [M] -> (z_mixed [M, D], y_mixed [M, V]).

    >>> z_c, z_u = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    >>> z, y = mixup(z_c, z_u, torch.tensor([0]), torch.tensor([2]), lam=0.75, vocab_size=3)
    >>> z.tolist(), y.tolist()
    ([[3.0, 2.0]], [[0.75, 0.0, 0.25]])
    """
    lam = torch.as_tensor(lam, dtype=z_c.dtype, device=z_c.device).reshape(-1, 1)  # [M, 1], or [1, 1]
    y_c, y_u = (F.one_hot(y, vocab_size).to(z_c.dtype) for y in (y_c, y_u))  # [M, V]
    z_mixed = lam * z_c + (1 - lam) * z_u
    y_mixed = lam * y_c + (1 - lam) * y_u
    return z_mixed, y_mixed


def sftmix_loss_literal(hidden, weight, targets, index_c, index_u, lam, mu):
    """L = L_NTP + μ L_Mixup as the paper writes it, for reading and for tests; `sftmix_loss` explains the arguments.

    It multiplies by `lm_head` twice and keeps several tensors of [S, V] and [M, V].
    """
    z_mixed, y_mixed = mixup(
        hidden[index_c], hidden[index_u], targets[index_c], targets[index_u], lam, vocab_size=len(weight)
    )
    ntp = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / max(len(targets), 1)  # L_NTP
    mix = F.cross_entropy(z_mixed @ weight.T, y_mixed, reduction="sum") / max(len(z_mixed), 1)  # L_Mixup: H(ỹ, p̃)
    return ntp + mu * mix, ntp, mix  # L


# --- Pairing positions ------------------------------------------------------------------------------------------------


def pair_positions(targets, cu_seqlens, pairs):
    """Pair the n-th supervised position of a confident example with the n-th of its partner, for n ≤ min(N^c, N^u).

    targets int64 [T]: the next token at each position of a packed row, or IGNORE_INDEX; cu_seqlens int32 [B+1]: where
    each example starts, and T; pairs int64 [P, 2]: index in the row of a confident and of an unconfident example.
    -> (index_c [M], index_u [M], pair [M]): the paired positions, as indices into the S supervised ones, and the pair
    that each belongs to, so that λ at each mixed position is lam[pair].

    In a row of two examples with 2 and 3 supervised positions, the first two of each are mixed:

    >>> targets = torch.tensor([-100, -100, 11, 12, -100, -100, 21, 22, 23])
    >>> [x.tolist() for x in pair_positions(targets, torch.tensor([0, 4, 9]), torch.tensor([[0, 1]]))]
    [[0, 1], [2, 3], [0, 0]]
    """
    supervised_before = F.pad((targets != IGNORE_INDEX).cumsum(0), (1, 0))  # [T+1]
    # Example b has the supervised positions numbered bounds[b] to bounds[b+1].
    bounds = supervised_before[cu_seqlens.long()]  # [B+1]
    first, count = bounds[:-1], bounds.diff()  # [B]
    confident, unconfident = pairs.unbind(1)  # [P]
    length = torch.minimum(count[confident], count[unconfident])  # [P]: min(N^c, N^u)
    pair = torch.repeat_interleave(length)  # [M]: [0] * length[0] + [1] * length[1] + …
    start = length.cumsum(0) - length  # [P]: the first mixed position of each pair
    n = torch.arange(len(pair), device=pair.device) - start[pair]  # [M]: 0 … length−1 in each pair
    return first[confident][pair] + n, first[unconfident][pair] + n, pair


# --- The fast loss ----------------------------------------------------------------------------------------------------


def sftmix_loss(
    hidden, weight, targets, index_c, index_u, lam, mu, ntp_weight=1.0, num_supervised=None, num_mixed=None, log_p=None
):
    """L = ntp_weight · L_NTP + μ L_Mixup: value and gradients of `sftmix_loss_literal`, with a matmul by W for both.

    Args:
        hidden [S, D]: final hidden states at the supervised positions, float32 or bfloat16. Under autocast, matmuls
            are in autocast's dtype.
        weight [V, D]: the weight of `lm_head`
        targets int64 [S]: the target tokens, without IGNORE_INDEX
        index_c, index_u int64 [M]: the paired positions, rows of hidden, from `pair_positions`; on the CPU, even if
            hidden is on a GPU, or each call waits for the GPU. A position in several pairs still counts once in L_NTP.
        lam: λ, a number or [M]; gets no gradient
        mu, ntp_weight: the weights of L_Mixup and of L_NTP (1 in the paper)
        num_supervised, num_mixed: the denominators of the two means, by default S and M. Under gradient accumulation or
            data parallelism, pass the counts of the **global** batch and **sum** the gradients (DDP and FSDP average
            them by default): the result is the mean over the batch, not a mean of means.
        log_p float32 [S]: if given, it is filled with log p(y)
    Returns:
        (loss, ntp, mix): loss carries gradients to hidden and weight; ntp and mix are detached means.

    Three facts make it cheap:
      1. H is linear in its target: H(ỹ, p̃) = −λ log p̃(y^c) − (1−λ) log p̃(y^u). So no one-hot target is needed.
      2. `lm_head` is linear: W z̃ = λ W z^c + (1−λ) W z^u. So the logits that NTP needs give the mixed logits too.
      3. The gradient of cross-entropy with respect to logits is softmax minus target, known in the forward pass. So
         positions are processed in chunks, each adds to the gradients, and the logits [S, V] never exist at once. The
         gradients, [S, D] and [V, D] in float32, are kept until the backward pass.
    """
    # A mean over no positions is 0, so each denominator is at least 1.
    num_supervised = max(len(targets) if num_supervised is None else num_supervised, 1)
    num_mixed = max(len(index_c) if num_mixed is None else num_mixed, 1)
    if len(index_c) != len(index_u):
        raise ValueError(f"index_c and index_u must pair up, but are {len(index_c)} and {len(index_u)} long")
    lam = torch.as_tensor(lam, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    lam = lam.expand(len(index_c))
    if not torch.is_grad_enabled():  # a Function's needs_input_grad ignores no_grad: the gradients would be computed
        hidden, weight = hidden.detach(), weight.detach()
    loss, ntp_sum, mix_sum = _ChunkedLoss.apply(
        hidden, weight, targets, index_c, index_u, lam, ntp_weight / num_supervised, mu / num_mixed, log_p
    )
    return loss, ntp_sum / num_supervised, mix_sum / num_mixed


def chunk_size(vocab_size: int, device_type: str = "cpu") -> int:
    """The number of positions whose logits `sftmix_loss` holds at once. Fewer are slower, more are no faster."""
    if device_type != "cuda":
        return max(256, 2**22 // vocab_size)
    # Adding to an entry of W's gradient takes 2 FLOPs a position and 8 bytes a chunk; an H100 has time for 300 FLOPs
    # a byte, so for 1,200 positions. 2²⁸ logits are 2,048 at V = 128,256. Tiles of matmul kernels have up to 256 rows.
    # No more than 8,192, the rows of a usual micro-batch.
    return max(256, min(2**28 // vocab_size, 2**13) // 256 * 256)


class _ChunkedLoss(torch.autograd.Function):
    """ntp_scale Σ_s −log p(y_s) + mix_scale Σ_m H(ỹ_m, p̃_m). The forward pass computes both gradients, by chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, index_c, index_u, lam, ntp_scale, mix_scale, log_p_out):
        device, device_type = hidden.device, hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        if matmul_dtype == torch.float16:
            raise ValueError("float16: gradients of the loss would underflow; use bfloat16 or float32")
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # of sums, exponentials and gradients
        # W's gradient is a sum over chunks in float32. Only CUDA can add a matmul of bf16 inputs to it.
        grad_dtype = matmul_dtype if hidden.is_cuda else sum_dtype
        grad_hidden = torch.zeros_like(hidden, dtype=sum_dtype) if ctx.needs_input_grad[0] else None  # [S, D]
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if ctx.needs_input_grad[1] else None  # [V, D]
        ntp_sum = mix_sum = torch.zeros((), dtype=sum_dtype, device=device)

        V = len(weight)
        order, uses, chunks = _chunks(len(hidden), index_c.cpu(), index_u.cpu(), chunk_size(V, device_type))
        order, uses = to_device(order, device), to_device(uses, device)
        share = 1 / uses.to(sum_dtype)[:, None]  # [S, 1]: the weight of each appearance of a position in `order`
        # A tensor, because torch.compile would recompile for each new number.
        mix_scale = torch.full((), mix_scale, dtype=sum_dtype, device=device)
        with torch.autocast(device_type, enabled=False):  # the dtypes are chosen above
            W = weight.to(matmul_dtype)
            padded_V = V + (-V) % VOCAB_MULTIPLE.get(device_type, 1)  # the next multiple
            is_compiled = hidden.is_cuda and not torch.are_deterministic_algorithms_enabled()
            gradient = _compiled_logits_gradient(device, matmul_dtype, padded_V) if is_compiled else _logits_gradient
            for positions_slice, mixed_slice in chunks:
                # A chunk has k confident positions, then their k unconfident partners; or k = 0 and unmixed positions.
                s, lam_m = order[positions_slice], lam[mixed_slice, None].detach()  # [R], [k, 1]
                z, y = hidden[s].to(matmul_dtype), targets[s, None]  # [R, D], [R, 1]
                logits = W.new_empty(len(s), padded_V)  # [R, V], and padding of which softmax makes 0
                logits[:, V:] = torch.finfo(matmul_dtype).min
                torch.mm(z, W.T, out=logits[:, :V])  # the only lm_head matmul of the forward pass
                grad, log_p, ce_mixed = gradient(logits, y, lam_m, ntp_scale * share[s], mix_scale, grad_dtype)
                ntp_sum = ntp_sum - (share[s] * log_p).sum()  # Σ −log p(y_s)
                mix_sum = mix_sum + ce_mixed.sum()  # Σ H(ỹ_m, p̃_m)
                if log_p_out is not None:
                    log_p_out[s] = log_p[:, 0].to(log_p_out.dtype)
                if grad_hidden is not None:  # its inputs are in matmul_dtype, as in the backward pass of a linear layer
                    grad_z = torch.zeros_like(z, dtype=sum_dtype)
                    grad_hidden.index_add_(0, s, _add_matmul_(grad_z, grad[:, :V].to(matmul_dtype), W))
                if grad_weight is not None:
                    _add_matmul_(grad_weight, grad[:, :V].T, z.to(grad_dtype))
                del logits, grad  # before those of the next chunk are allocated
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(ntp_sum, mix_sum)
        return ntp_scale * ntp_sum + mix_scale * mix_sum, ntp_sum, mix_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _ntp, _mix):
        # In place, so that W's gradient exists once; but with retain_graph=True another backward pass needs it again.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else torch.Tensor.mul_
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if grad is None else scale(grad, grad_loss).to(dtype) for grad, dtype in grads]
        return *grads, None, None, None, None, None, None, None


def _logits_gradient(logits, y, lam, ntp_scale, mix_scale, grad_dtype):
    """Compute all of a chunk but its matmuls, in place where possible. On a GPU it is compiled into a few kernels.

    logits [R, V], y int64 [R, 1], lam [k, 1], and the weights in the loss of each position, ntp_scale [R, 1], and of
    each mixed position, mix_scale []. Rows 0 to k−1 are confident positions, rows k to 2k−1 their unconfident partners.
    -> (gradient of the loss with respect to logits [R, V] in grad_dtype, log p(y) [R, 1], H(ỹ, p̃) [k, 1])
    """
    k = len(lam)
    y_c, y_u = y[:k], y[k : 2 * k]
    logits = logits.to(ntp_scale.dtype)
    mixed = torch.lerp(logits[k : 2 * k], logits[:k], lam)  # [k, V]: λ W z^c + (1−λ) W z^u = W z̃, fact 2
    total, (log_p,) = exp_and_log_p_(logits, y)
    total_mixed, (log_p_c, log_p_u) = exp_and_log_p_(mixed, y_c, y_u)
    ce_mixed = -(lam * log_p_c + (1 - lam) * log_p_u)  # H(ỹ, p̃), fact 1

    # Fact 3: the gradient of −log p(y) is p − e_y, and that of H(ỹ, p̃) with respect to the mixed logits is p̃ − ỹ. By
    # fact 2, the confident row gets λ times the latter and the unconfident row 1−λ times.
    grad = _subtract_at_(logits.mul_(ntp_scale / total), y, ntp_scale)
    grad_mixed = _subtract_at_(mixed.mul_(mix_scale / total_mixed), y_c, mix_scale * lam)
    grad_mixed = _subtract_at_(grad_mixed, y_u, mix_scale * (1 - lam))
    grad[:k].addcmul_(lam, grad_mixed)
    grad[k : 2 * k].addcmul_(1 - lam, grad_mixed)
    return grad.to(grad_dtype), log_p, ce_mixed


def exp_and_log_p_(logits, *targets):
    """Replace logits [R, V] by exp(logits − max), in place. -> (their sums [R, 1], log p of each target [R, 1])"""
    top = logits.amax(-1, keepdim=True)
    below_top = [logits.gather(1, y) - top for y in targets]
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return total, [x - total.log() for x in below_top]


def _subtract_at_(grad, y, amount):
    """Subtract `amount` [R, 1] from the entries y [R, 1] of grad [R, V], in place."""
    if torch.compiler.is_compiling():  # a comparison with every entry fuses into the kernel, a scatter does not
        return grad.sub_(amount * (torch.arange(grad.shape[1], device=grad.device) == y))
    return grad.scatter_add_(1, y, -amount)


@functools.cache
def _compiled_logits_gradient(device, dtype, padded_V: int):
    """`_logits_gradient`, compiled for any number of rows of `padded_V` logits; uncompiled where that fails."""
    try:
        compiled = torch.compile(_logits_gradient, dynamic=True)
        rows = chunk_size(padded_V, device.type)  # kernels are chosen by the size of the first chunk
        logits = torch.zeros(rows, padded_V, dtype=dtype, device=device)
        scale = torch.zeros(rows, 1, dtype=torch.promote_types(dtype, torch.float32), device=device)
        torch._dynamo.mark_static(logits, 1)  # a kernel that knows padded_V knows that rows are aligned
        for pairs in (rows // 2, 0):  # two kernels: for chunks with pairs and without
            compiled(logits, scale.long(), scale[:pairs].detach(), scale, scale.sum(), dtype)
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler, no Python.h, or a GPU that Triton does not know
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine says it
            reason = getattr(error, "inner_exception", error)
            print(f"sftmix_loss is slower, because torch.compile fails here: {reason!r:.300}", file=sys.stderr)
        return _logits_gradient


def to_device(tensor, device):
    """Copy a tensor from CPU memory to `device`, a CUDA device without waiting for it."""
    device = torch.device(device)
    if device.type != "cuda":  # on MPS, the memory could be reused before a copy that is not waited for
        return tensor.to(device)
    with torch.cuda.device(device):  # the current device of a background thread is another one
        return tensor.pin_memory().to(device, non_blocking=True)  # from unpinned memory the copy would block


def _add_matmul_(total, a, b):
    """total += a @ b, by a matmul that adds to `total` where there is one."""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    try:  # from bf16 to float32 on NVIDIA GPUs, so nothing is rounded to bf16 and no temporary is allocated
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return total.add_(a @ b)


def _chunks(num_positions: int, index_c, index_u, size: int):
    """Divide positions into chunks of at most `size`, each pair in one chunk. -> (order, uses [S], chunks)

    A chunk is a slice of `order` (positions, mixed ones first) and a slice of the mixed pairs. A position in k pairs
    appears k times in `order`; uses is max(k, 1), so that each appearance counts for 1/uses in L_NTP.
    """
    uses = torch.bincount(torch.cat([index_c, index_u]), minlength=num_positions)  # [S]
    order, chunks = [], []
    for m in range(0, len(index_c), size // 2):
        mixed = slice(m, min(m + size // 2, len(index_c)))
        order += [index_c[mixed], index_u[mixed]]
        chunks.append((slice(2 * m, 2 * mixed.stop), mixed))
    order = torch.cat([*order, (uses == 0).nonzero()[:, 0]])  # last, the positions in no pair
    chunks += [(slice(s, min(s + size, len(order))), slice(0, 0)) for s in range(2 * len(index_c), len(order), size)]
    return order, uses.clamp(min=1), chunks
