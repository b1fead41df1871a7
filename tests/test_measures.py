"""The study's measures, against numbers worked by hand and against plain formulas; the order of its runs."""

import json
import math
import sys
import threading
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import random_encoded, tiny_model

from benchmarks.measures import fit_temperature, measure, supervised_states
from benchmarks.study import Real, Task, by_rank, draw_examples, leaning, measure_on, run_tasks
from data import Dataset, sample_lambda


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


def test_the_calibration_error_of_one_bin_does_not_cancel_that_of_another():
    """Sure by 3/4 and wrong, sure by 9/10 and right."""
    hidden, targets = torch.tensor([[math.log(3), 0.0], [math.log(9), 0.0]]), torch.tensor([1, 0])
    assert measure(Logits(), hidden, targets, 1.0)["calibration_error"] == pytest.approx((0.75 + 0.1) / 2)


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


def test_the_temperature_is_fitted_on_the_validation_examples_alone():
    model = tiny_model()
    validation, held_out = (Dataset.from_encoded(random_encoded([40, 30], seed=seed)) for seed in (0, 1))
    found = measure_on(model, {"validation": validation, "held-out": held_out})
    temperature, other = (fit_temperature(model, *supervised_states(model, part)) for part in (validation, held_out))
    assert found["temperature"] == temperature != other
    expected = measure(model, *supervised_states(model, held_out), temperature)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("marked", [False, True])
def test_no_question_is_in_two_parts_of_a_cell(tmp_path, marked):
    """Also where a question has several answers, marked right or wrong: only right ones are reported."""
    answers = [{"correct": True}, {"correct": False}] if marked else [{}]
    records = [{"instruction": f"q{i}", "output": f"a{i}{a}", **a} for i in range(60) for a in answers]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    real = Real(["NTP"], num_train=20, epochs=1, lr=1, num_held_out=10, num_validation=5)
    parts = draw_examples(3, real, tmp_path / "d.jsonl")
    assert [len(part) for part in parts] == [20, 10, 5]
    questions = [{record["instruction"] for record in part} for part in parts]
    assert all(one.isdisjoint(other) for one, other in combinations(questions, 2))
    assert all(record.get("correct", True) for part in parts[1:] for record in part)


@pytest.mark.parametrize("mirrored, pairs", [(False, {(0, 2), (1, 3)}), (True, {(0, 4), (1, 3)})])
def test_pairs_by_rank_by_hand(mirrored, pairs):
    """Two confident and three unconfident examples, each half sorted; one is left over."""
    order = by_rank(torch.tensor([0, 1]), torch.tensor([2, 3, 4]), seed=0, epoch=0, mirrored=mirrored).tolist()
    assert {tuple(order[:2]), tuple(order[2:4])} == pairs and sorted(order) == list(range(5))


def test_λ_that_leans_to_the_confident_is_never_below_a_half():
    plain, leans = (sample(1000, 0.5, seed=0, step=0) for sample in (sample_lambda, leaning))
    assert leans.min() >= 0.5 and torch.equal(leans, torch.where(plain < 0.5, 1 - plain, plain))


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
