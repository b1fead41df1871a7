"""The study's baselines, against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import random_encoded, tiny_model

import train
from benchmarks import baselines
from data import Dataset, build_batch
from train import TrainConfig, forward_backward

ONE = torch.tensor([0])


def log_probs(*rows):
    return torch.tensor(rows).log()


def test_smoothing_by_hand():
    """p = (3/4, 1/4), y = 0, ε = 1/2: towards uniform and towards (0, 1)."""
    log_p = log_probs((0.75, 0.25))
    expected = -(0.5 * math.log(0.75) + 0.25 * (math.log(0.75) + math.log(0.25)))
    assert float(baselines.smoothed_loss(log_p, ONE, ONE, 0.5)) == pytest.approx(expected)
    expected = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    assert float(baselines.smoothed_loss(log_p, ONE, ONE, 0.5, torch.tensor([0.0, 1.0]))) == pytest.approx(expected)


def test_ir_dro_by_hand():
    """Mean losses ln 2 (of two positions, ln 4 and 0) and ln 6, so the weights are 2 : 6."""
    log_p = log_probs((0.25, 0.75), (1.0, 1e-9), (1 / 6, 5 / 6)).requires_grad_()
    loss = baselines.ir_dro_loss(log_p, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(0.25 * math.log(2) + 0.75 * math.log(6), rel=1e-5)
    loss.backward()
    assert log_p.grad[:, 0].tolist() == pytest.approx([-0.125, -0.125, -0.75])  # the weights carry no gradient


def test_dft_by_hand():
    log_p = log_probs((0.5, 0.5), (0.25, 0.75)).requires_grad_()
    loss = baselines.dft_loss(log_p, torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(4)) / 2)
    loss.backward()
    assert log_p.grad[:, 0].tolist() == pytest.approx([-0.25, -0.125])


def test_eaft_by_hand():
    """k = 2: the likeliest are (1/2, 1/2) with entropy ln 2, weight 1; then (64/84, 20/84)."""
    log_p = log_probs((0.4, 0.2, 0.4), (0.64, 0.16, 0.2)).requires_grad_()
    loss = baselines.eaft_loss(log_p, torch.tensor([0, 1]), torch.tensor([0, 0]), k=2)
    weight = -(0.64 / 0.84 * math.log(0.64 / 0.84) + 0.2 / 0.84 * math.log(0.2 / 0.84)) / math.log(2)
    assert loss.item() == pytest.approx(-(math.log(0.4) + weight * math.log(0.16)) / 2)
    loss.backward()
    assert log_p.grad[:, :2].flatten().tolist() == pytest.approx([-0.5, 0, 0, -weight / 2])


def test_unigram_frequencies_by_hand():
    assert baselines.unigram_frequencies(torch.tensor([2, 0, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]


def test_without_smoothing_the_gradient_is_that_of_ntp(monkeypatch):
    dataset = Dataset.from_encoded(random_encoded([9, 20, 14]))
    batch, gradients = build_batch(dataset, np.arange(3), torch.zeros(0), 1000), []
    for replace in (False, True):
        model = tiny_model()
        if replace:
            loss = lambda log_p, y, segments: baselines.smoothed_loss(log_p, y, segments, 0.0)  # noqa: E731
            monkeypatch.setattr(train, "compute_loss", baselines.with_loss(loss))
        losses = forward_backward(model, batch, 0.0, 1.0)
        gradients.append((losses[:2], torch.cat([p.grad.flatten() for p in model.parameters()])))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_of_several_micro_batches_is_refused():
    dataset = Dataset.from_encoded(random_encoded([9, 20, 14]))
    batch = build_batch(dataset, np.arange(3), torch.zeros(0), micro_batch_tokens=20)
    with pytest.raises(ValueError, match="one micro-batch"):
        baselines.with_loss(baselines.dft_loss)(tiny_model(), batch.micro_batches[0], batch, 0.0, 1.0)


def test_noise_is_bounded_by_the_length_and_absent_in_evaluation(monkeypatch):
    plain, noisy = tiny_model(), tiny_model()
    monkeypatch.setattr(train, "load_trainable", lambda config, device: noisy)
    model = baselines.with_embedding_noise(alpha=5.0)(TrainConfig(), "cpu").train()
    tokens, cu_seqlens = torch.arange(3, 13), torch.tensor([0, 2, 10], dtype=torch.int32)
    embedded = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    positions = torch.tensor([0, 1, *range(8)])
    model(tokens, positions, cu_seqlens)
    noise = embedded[0] - plain.model.embed_tokens(tokens)
    bound = 5 / torch.sqrt(torch.tensor([2] * 2 + [8] * 8) * 32)[:, None]  # hidden size 32
    assert (noise.abs() <= bound + 1e-6).all() and (noise.abs().amax(1) > 0.8 * bound[:, 0]).all()
    model.eval()
    model(tokens, positions, cu_seqlens)
    assert torch.equal(embedded[1], plain.model.embed_tokens(tokens))
