"""The study's measures, against numbers worked by hand and against plain formulas; the order of its runs."""

import math
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_encoded, tiny_model

from benchmarks.measures import fit_temperature, measure, supervised_states
from benchmarks.study import Task, run_tasks
from data import Dataset


class Logits(torch.nn.Module):
    """A model whose hidden states are its logits."""

    def logits(self, hidden):
        return hidden


def test_measures_by_hand():
    """Two positions with logits (ln 3, 0): p = (3/4, 1/4); the first target is the likely token, the second is not."""
    hidden, targets = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    found = measure(Logits(), hidden, targets, temperature=0.5)  # logits (ln 9, 0): p = (9/10, 1/10)
    assert found["loss"] == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    assert found["loss_at_temperature"] == pytest.approx(-(math.log(9 / 10) + math.log(1 / 10)) / 2)
    assert found["token_accuracy"] == 0.5
    assert found["calibration_error"] == pytest.approx(0.75 - 0.5)  # sure by 3/4, right half of the time


def test_the_temperature_by_hand():
    """The likely token is right 9 times in 10, so p should be 9/10: logits (ln 3, 0) must be doubled, T = 1/2."""
    hidden, targets = torch.tensor([[math.log(3), 0.0]] * 10), torch.tensor([0] * 9 + [1])
    assert fit_temperature(Logits(), hidden, targets) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
def test_no_other_temperature_has_a_lower_loss(scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 7, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    hidden = (scale * logits).float()
    temperature = fit_temperature(Logits(), hidden, targets)
    best = measure(Logits(), hidden, targets, temperature)["loss_at_temperature"]
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert best < measure(Logits(), hidden, targets, factor * temperature)["loss_at_temperature"]


def test_states_are_those_of_each_example_alone():
    model, encoded = tiny_model(), random_encoded([9, 30, 17])
    hidden, targets = supervised_states(model, Dataset.from_encoded(encoded))
    loss, count = 0.0, 0
    for tokens, target in encoded:
        keep = target != -100
        logits = model.logits(model(tokens.long())[keep]).detach()
        loss += float(torch.nn.functional.cross_entropy(logits, target[keep].long(), reduction="sum"))
        count += int(keep.sum())
    assert len(hidden) == len(targets) == count
    assert measure(model, hidden, targets, 1.0)["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert np.isfinite(fit_temperature(model, hidden, targets))


def test_no_core_idles_while_an_arm_waits_for_ntp():
    """The NTP of the next seed is run before an arm that waits for the NTP of this one."""
    order, next_ntp_has_run = [], threading.Event()

    def first_ntp():
        assert next_ntp_has_run.wait(timeout=60)
        order.append("NTP 0")

    def next_ntp():
        order.append("NTP 1")
        next_ntp_has_run.set()

    tasks = {
        "NTP 0": Task(first_ntp, None),
        "SFTMix 0": Task(partial(order.append, "SFTMix 0"), "NTP 0"),
        "NTP 1": Task(next_ntp, None),
    }
    run_tasks(tasks, jobs=2)
    assert order == ["NTP 1", "NTP 0", "SFTMix 0"]


def test_an_arm_that_fails_ends_the_study():
    tasks = {"NTP": Task(partial(sys.exit, "it failed"), None), "SFTMix": Task(pytest.fail, "NTP")}
    with pytest.raises(SystemExit, match="it failed"):
        run_tasks(tasks, jobs=2)
