"""Measures of a model's predictions: loss, the same after temperature scaling, token accuracy, calibration error.

A model that is too sure of itself has a high loss although it ranks tokens well. Temperature scaling (Guo et al. 2017)
divides all logits by one number, fitted on examples that are neither trained on nor reported on. It takes away what a
global rescaling of confidence can change.

Letters: S supervised positions of a dataset, D hidden size, V vocabulary size, R positions in a chunk.
"""

from collections.abc import Iterator

import numpy as np
import torch

from data import MICRO_BATCH_TOKENS, Dataset, balanced_partitions, build_micro_batch
from model import Transformer

CHUNK = 256  # positions whose logits are held at once


@torch.no_grad()
def supervised_states(model: Transformer, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states and the target tokens of all supervised positions: float32 [S, D], int64 [S]"""
    hidden, targets = [], []
    for examples in balanced_partitions(dataset.lengths.tolist(), MICRO_BATCH_TOKENS):
        micro_batch = build_micro_batch(dataset, np.array(examples), lam=torch.zeros(0))
        row, supervised = micro_batch.row, micro_batch.supervised
        hidden.append(model(row.tokens, row.positions, row.cu_seqlens)[supervised].float())
        targets.append(row.targets[supervised])
    return torch.cat(hidden), torch.cat(targets)


@torch.no_grad()
def logit_chunks(model: Transformer, hidden, targets) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and target tokens, a chunk at a time: [R, V], [R]"""
    for z, y in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        yield model.logits(z).float(), y


def fit_temperature(model: Transformer, hidden, targets) -> float:
    """The temperature T at which softmax(logits / T) gives the targets the lowest mean −log p.

    In β = 1/T that mean is convex: its derivative is E_p[z] − z_y and its second derivative Var_p[z], where z are the
    logits and p = softmax(βz). So Newton's method finds the minimum.
    """
    beta = 1.0
    for _ in range(30):
        slope = curvature = 0.0
        for logits, y in logit_chunks(model, hidden, targets):
            p = (beta * logits).softmax(-1)
            mean = (p * logits).sum(-1)  # E_p[z]
            slope += float((mean - logits.gather(-1, y[:, None])[:, 0]).sum())
            curvature += float(((p * logits.square()).sum(-1) - mean.square()).sum())  # Var_p[z]
        step = slope / max(curvature, 1e-12)
        beta = max(beta - step, beta / 4)  # never past zero
        if abs(step) < 1e-5 * beta:
            break
    return 1 / beta


def measure(model: Transformer, hidden, targets, temperature: float, bins: int = 15) -> dict[str, float]:
    """How well a model predicts the targets.

    -> {"loss": mean −log p in nats, "loss_at_temperature": the same for softmax(logits / temperature),
    "token_accuracy": how often the most likely token is the target, "calibration_error": expected calibration error of
    the most likely token over `bins` bins (Guo et al. 2017)}
    """
    loss = scaled_loss = 0.0
    confidence, correct = [], []
    for logits, y in logit_chunks(model, hidden, targets):
        log_p = logits.log_softmax(-1)
        loss -= float(log_p.gather(-1, y[:, None]).sum())
        scaled_loss -= float((logits / temperature).log_softmax(-1).gather(-1, y[:, None]).sum())
        top_log_p, token = log_p.max(-1)
        confidence.append(top_log_p.exp())
        correct.append(token == y)
    confidence, correct = torch.cat(confidence).double(), torch.cat(correct).double()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, correct - confidence)
    return {
        "loss": loss / len(targets),
        "loss_at_temperature": scaled_loss / len(targets),
        "token_accuracy": float(correct.mean()),
        "calibration_error": float(gaps.abs().sum() / len(targets)),
    }
