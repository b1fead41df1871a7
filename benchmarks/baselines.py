"""Baselines of SFTMix, as losses or models that take the place of a part of train.py. Each cites its paper.

Letters: S supervised positions of a packed row, B examples in it, V vocabulary size, D hidden size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import train
from model import Transformer

# --- Losses -----------------------------------------------------------------------------------------------------------
# Each takes log p of the vocabulary [S, V], the target tokens [S] and the example of each position [S], and returns the
# loss of the batch.


def smoothed_loss(log_p, targets, segment_ids, epsilon: float, towards=None):
    """Cross-entropy with the target (1−ε) e_y + ε u (Szegedy et al. 2016); u is `towards` [V], by default uniform.

    >>> log_p = torch.tensor([[0.5, 0.5]]).log()
    >>> round(float(smoothed_loss(log_p, torch.tensor([0]), torch.tensor([0]), epsilon=0.1)), 4)
    0.6931
    """
    gold = log_p.gather(1, targets[:, None])[:, 0]
    other = log_p.mean(1) if towards is None else log_p @ towards
    return -((1 - epsilon) * gold + epsilon * other).mean()


def ir_dro_loss(log_p, targets, segment_ids, kl_weight: float = 1.0):
    """IR-DRO, instance-reweighted distributionally robust optimization (Chen et al., arXiv 2402.14270).

    Σ_i w_i ℓ_i: ℓ_i is the mean −log p of example i, and the weights w = softmax(ℓ / kl_weight) carry no gradient.
    They maximize the loss less `kl_weight` times their KL divergence from uniform weights.
    """
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    num_supervised = torch.bincount(segment_ids)
    losses = nll.new_zeros(len(num_supervised)).index_add(0, segment_ids, nll) / num_supervised
    return ((losses.detach() / kl_weight).softmax(0) * losses).sum()


def dft_loss(log_p, targets, segment_ids):
    """Dynamic fine-tuning (Wu et al., arXiv 2508.05629): each token's −log p is weighted by p, without gradient."""
    gold = log_p.gather(1, targets[:, None])[:, 0]
    return -(gold.detach().exp() * gold).mean()


def eaft_loss(log_p, targets, segment_ids, k: int = 20):
    """Entropy-adaptive fine-tuning (Diao et al., arXiv 2601.02151): each −log p is weighted by H / ln k, no gradient.

    H is the entropy of the k likeliest tokens, their probabilities scaled to sum to 1.
    """
    log_q = log_p.detach().topk(k).values.log_softmax(-1)
    weights = -(log_q.exp() * log_q).sum(-1) / math.log(k)
    return -(weights * log_p.gather(1, targets[:, None])[:, 0]).mean()


def unigram_frequencies(targets, vocab_size: int):
    """How often each token is a target: float32 [V], summing to 1."""
    return torch.bincount(targets, minlength=vocab_size).float() / len(targets)


# --- In place of parts of train.py ------------------------------------------------------------------------------------


def with_loss(loss_function: Callable) -> Callable:
    """A replacement of `train.compute_loss` that trains on another loss. A batch must be one micro-batch.

    Losses such as `ir_dro_loss` weigh the examples of a batch against each other, so they must be in one pass.
    """

    def compute_loss(model: Transformer, micro_batch, batch, mu, ntp_weight, accumulator=None):
        if len(batch.micro_batches) != 1:
            raise ValueError("this loss needs the whole batch in one micro-batch: give a higher --micro_batch_tokens")
        row, supervised = micro_batch.row, micro_batch.supervised

        def head(hidden):
            targets = row.targets[supervised]
            log_p = model.logits(hidden[supervised]).float().log_softmax(-1)
            loss = loss_function(log_p, targets, row.segment_ids[supervised])
            return loss, F.nll_loss(log_p, targets).detach(), torch.zeros(())

        return model(row.tokens, row.positions, row.cu_seqlens, head=head)

    return compute_loss


def with_embedding_noise(alpha: float = 5.0) -> Callable:
    """A replacement of `train.load_trainable` (NEFTune, Jain et al., arXiv 2310.05914): noise on the input embeddings.

    In training, each element gets uniform noise from ±α / √(T D), where T is the length of its example.
    """
    load_trainable = train.load_trainable

    def load(config, device) -> Transformer:
        model, generator = load_trainable(config, device), torch.Generator().manual_seed(config.seed)
        lengths = None  # of the example of each token

        def note_lengths(module, arguments):
            nonlocal lengths
            counts = arguments[2].diff().long()
            lengths = counts.repeat_interleave(counts)

        def add_noise(module, inputs, embedded):
            if not model.training:
                return embedded
            bound = alpha / torch.sqrt(lengths * embedded.shape[1])  # [N]
            noise = torch.empty(embedded.shape).uniform_(-1, 1, generator=generator)
            return embedded + bound[:, None] * noise

        model.register_forward_pre_hook(note_lengths)
        model.model.embed_tokens.register_forward_hook(add_noise)
        return model

    return load
