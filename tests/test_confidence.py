"""Scores of a checkpoint, dynamics over checkpoints, the split, the area under the ROC curve, the picture."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import random_encoded, tiny_model, tolerance

from confidence import (
    ScoreAccumulator,
    TrainingDynamics,
    gold_log_probs,
    main,
    roc_auc,
    score_checkpoints,
    score_examples,
    split_by_confidence,
)
from data import IGNORE_INDEX, Dataset, build_micro_batch
from infra.hf import save_model

DYNAMICS = TrainingDynamics(
    ["a", "b", "c"], np.array([[0.1, 0.5, 0.9], [0.3, 0.5, 0.5]]), np.array([[8, 2, 1.5], [4, 2, 1.0]])
)


# --- Scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_equal_the_formulas_written_out(device):
    model, encoded = tiny_model().to(device), random_encoded([9, 1, 25, 4])
    probability, perplexity = score_examples(model, encoded)
    for i, (tokens, targets) in enumerate(encoded):
        log_p = model.logits(model(tokens.long().to(device))).log_softmax(-1)
        gold = [float(log_p[n, y]) for n, y in enumerate(targets.tolist()) if y != IGNORE_INDEX]
        rel = tolerance(device, 1e-4, 1e-3)
        assert probability[i] == pytest.approx(sum(map(math.exp, gold)) / len(gold), rel=rel)
        assert perplexity[i] == pytest.approx(math.exp(-sum(gold) / len(gold)), rel=rel)


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 60])
def test_scores_do_not_depend_on_micro_batches(micro_batch_tokens, device):
    model, encoded = tiny_model().to(device), random_encoded([9, 1, 25, 4, 17, 8])
    for one, other in zip(
        score_examples(model, encoded, micro_batch_tokens), score_examples(model, encoded), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=tolerance(device, 1e-5, 1e-4))


@torch.no_grad()
def test_gold_log_probs_equal_log_softmax_for_any_chunk(device, monkeypatch):
    model, encoded = tiny_model().to(device), random_encoded([40])
    tokens, targets = (x.to(device) for x in encoded[0])
    supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
    assert len(supervised) > 10
    log_p = model.logits(model(tokens.long())).log_softmax(-1)
    expected = log_p[supervised, targets[supervised].long()]
    micro_batch = build_micro_batch(encoded, np.arange(1), lam=torch.zeros(0)).to(device)
    for chunk in (1, 3, 10, 100):
        monkeypatch.setattr("confidence.chunk_size", lambda *_, chunk=chunk: chunk)
        log_p = gold_log_probs(model, micro_batch)
        torch.testing.assert_close(log_p, expected, rtol=tolerance(device, 1.3e-6, 1e-4), atol=1e-5)
    empty = build_micro_batch(encoded, np.arange(0), lam=torch.zeros(0)).to(device)
    assert gold_log_probs(model, empty).shape == (0,)
    assert [len(scores) for scores in score_examples(model, [])] == [0, 0]
    lists = [(tokens.tolist(), targets.tolist()) for tokens, targets in encoded]  # as of encode_example
    for one, other in zip(score_examples(model, lists), score_examples(model, encoded), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"example 1 .* has no supervised token to score"):
        score_examples(model, [*lists, ([1, 2], [IGNORE_INDEX] * 2)])


def test_accumulated_scores_by_hand(capsys, device):
    scores = ScoreAccumulator([2, 1], device)
    scores.add(torch.tensor([0, 1, 0], device=device), torch.tensor([0.5, 0.25, 0.125], device=device).log())
    probability, perplexity = scores.pop_scores()
    np.testing.assert_allclose(probability, [(0.5 + 0.125) / 2, 0.25], rtol=1e-6)
    np.testing.assert_allclose(perplexity, [(0.5 * 0.125) ** -0.5, 4], rtol=1e-6)
    log_p = torch.tensor([-2000, float("nan"), 0], device=device)
    scores.add(torch.tensor([1, 0, 0], device=device), log_p)  # the sums have started at zero again
    probability, perplexity = scores.pop_scores()
    np.testing.assert_allclose(probability, [0.5, 0], atol=1e-200)
    np.testing.assert_allclose(np.log(perplexity), [345, 690], rtol=1e-6)
    scores = ScoreAccumulator([1], device, max_epochs=3)
    for p in (0.25, 0.75):
        scores.add(torch.tensor([0], device=device), torch.tensor([p], device=device).log())
        scores.end_epoch()
    np.testing.assert_allclose(np.stack(scores.epoch_scores()), [[[0.25], [0.75]], [[4], [4 / 3]]], rtol=1e-6)
    assert "of 1 examples some tokens get no finite probability, and count as impossible: number 1 of those" in (
        capsys.readouterr().err
    )


def test_scores_are_summed_in_cpu_memory_for_an_apple_gpu_which_has_no_float64():
    sums = ScoreAccumulator([2], "mps").sums
    assert sums.device.type == "cpu" and sums.dtype == torch.float64


def test_a_restored_accumulator_continues_where_it_was(device):
    def add(scores, examples, p):
        scores.add(torch.tensor(examples, device=device), torch.tensor(p, device=device).log())

    one, other = (ScoreAccumulator([1, 2], device, max_epochs=2) for _ in range(2))
    add(one, [0, 1, 1], [0.5, 0.25, 0.125])
    one.end_epoch()
    add(one, [1], [0.75])
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for scores in (one, other):
        add(scores, [0, 1], [0.5, 0.125])
        scores.end_epoch()
    assert np.array_equal(one.epoch_scores(), other.epoch_scores()) and len(one.epoch_scores()[0]) == 2


def test_a_hopeless_example_has_a_finite_perplexity(device):
    model = tiny_model().to(device)
    with torch.no_grad():
        model.model.norm.weight.mul_(100)
    _, perplexity = score_examples(model, random_encoded([30]))
    assert np.isfinite(perplexity).all() and perplexity[0] > 1e20


def test_checkpoints_are_scored_in_the_order_given(tmp_path, device):
    encoded = random_encoded([5, 9])
    for seed in (0, 1):
        save_model(tiny_model(seed=seed), tmp_path / str(seed))
    dataset = Dataset.from_encoded(encoded, ["a", "b"])
    dynamics = score_checkpoints([tmp_path / "1", tmp_path / "0"], dataset, 1000, torch.float32, device)
    expected = [score_examples(tiny_model(seed=seed).to(device), encoded) for seed in (1, 0)]
    for scores, column in zip((dynamics.probability, dynamics.perplexity), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(scores, column, rtol=tolerance(device, 0, 1e-5))


def test_kept_scores_of_a_checkpoint_that_are_damaged_are_named(tmp_path):
    save_model(tiny_model(), tmp_path / "step-1")
    arguments = [tmp_path / "step-1"], Dataset.from_encoded(random_encoded([5]), ["a"]), 1000, torch.float32, "cpu"
    kept = score_checkpoints(*arguments, tmp_path / "kept")
    assert np.array_equal(score_checkpoints(*arguments, tmp_path / "kept").probability, kept.probability)
    content = (file := tmp_path / "kept" / "0-step-1.npz").read_bytes()
    start = content.index(scores := np.float64(kept.probability[0, 0]).tobytes())
    for damaged in (b"x", content[:start] + bytes(8) + content[start + len(scores) :]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step-1\.npz: damaged .*; remove it, and the checkpoint is scored again"):
            score_checkpoints(*arguments, tmp_path / "kept")


# --- Dynamics ---------------------------------------------------------------------------------------------------------


def test_dynamics_by_hand():
    np.testing.assert_allclose(DYNAMICS.confidence, [0.2, 0.5, 0.7])
    np.testing.assert_allclose(DYNAMICS.variance, [0.01, 0, 0.04])
    np.testing.assert_allclose(DYNAMICS.mean_perplexity, [6, 2, 1.25])
    np.testing.assert_allclose(DYNAMICS.score("probability"), [0.2, 0.5, 0.7])
    np.testing.assert_allclose(DYNAMICS.score("perplexity"), [-6, -2, -1.25])


def test_dynamics_survive_the_file(tmp_path):
    DYNAMICS.save(tmp_path / "c.jsonl")
    again = TrainingDynamics.load(tmp_path / "c.jsonl")
    assert again.ids == DYNAMICS.ids
    np.testing.assert_array_equal(again.probability, DYNAMICS.probability)
    np.testing.assert_array_equal(again.perplexity, DYNAMICS.perplexity)
    first = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    assert list(first) == ["id", "confidence", "variance", "perplexity", "probabilities", "perplexities"]
    assert first["id"] == "a" and first["probabilities"] == [0.1, 0.3] and first["perplexities"] == [8, 4]
    assert (first["confidence"], first["variance"], first["perplexity"]) == pytest.approx((0.2, 0.01, 6))


def test_loaded_scores_have_the_bits_of_saved_ones(tmp_path):
    """Their means too, or ties would be broken in another way: the order of a sum depends on the layout in memory."""
    p = np.random.default_rng(0).random((9, 50))
    dynamics = TrainingDynamics([f"{i}" for i in range(50)], p, 1 / p)
    dynamics.save(tmp_path / "c.jsonl")
    again = TrainingDynamics.load(tmp_path / "c.jsonl")
    assert again.confidence.tobytes() == dynamics.confidence.tobytes()
    assert again.mean_perplexity.tobytes() == dynamics.mean_perplexity.tobytes()


def test_select_orders_and_names_what_is_missing():
    assert DYNAMICS.select(["c", "a"]).confidence.tolist() == DYNAMICS.confidence[[2, 0]].tolist()
    assert DYNAMICS.select(["a", "a-2"]).probability[0, 1] == DYNAMICS.select(["a"]).probability[0, 0]  # a repeat
    with pytest.raises(ValueError, match=r"4 of 5 examples have no confidence score \(ids w, x, y…\)"):
        DYNAMICS.select(["a", "w", "x", "y", "z"])


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "x"}', '{"id": "x", "probabilities": [0.1], "perplexities": [2, 3]}',
     '{"id": "x", "probabilities": [NaN, 1], "perplexities": [2, 3]}',
     '{"id": "x", "probabilities": "no", "perplexities": [2, 3]}',
     '{"id": "x", "probabilities": [0.1], "perplexities": [2]}',
     '{"id": "x", "probabilities": [0.1, 0.2, 0.3], "perplexities": [2]}',
     '{"id": "x", "probabilities": [0.1, 0.2], "perplexities": [2, 3, 4]}',
     '{"id": 7, "probabilities": [0.1, 0.2], "perplexities": [2, 3]}'],
)  # fmt: skip
def test_bad_confidence_files_are_named_with_their_line(tmp_path, line):
    DYNAMICS.save(tmp_path / "c.jsonl")
    with open(tmp_path / "c.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"c.jsonl:4: "):
        TrainingDynamics.load(tmp_path / "c.jsonl")


# --- Split and ROC ----------------------------------------------------------------------------------------------------


def test_split_cuts_at_the_median_and_breaks_ties_by_order():
    assert [half.tolist() for half in split_by_confidence([0.5, 0.5, 0.5, 0.5])] == [[0, 1], [2, 3]]
    confident, unconfident = split_by_confidence(torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5]))
    assert confident.tolist() == [1, 3] and sorted(unconfident.tolist()) == [0, 2, 4]
    assert [len(half) for half in split_by_confidence([1.0])] == [0, 1]


@pytest.mark.parametrize("scores", [[[0.1, 0.2], [0.3, 0.4]], [float("nan"), 0.1]])
def test_scores_that_cannot_be_split_are_refused(scores):
    with pytest.raises(ValueError, match="one number an example is expected"):
        split_by_confidence(scores)


def test_a_model_of_no_numbers_is_not_scored(device):
    model = tiny_model().to(device)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite numbers"):
        score_examples(model, random_encoded([5]))


def test_area_under_roc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 10, 60), rng.random(60) < 0.4
    wins = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(wins))
    assert roc_auc([1, 2, 3], [False, False, True]) == 1 and roc_auc([5, 5], [True, False]) == 0.5


# --- Picture and command line -----------------------------------------------------------------------------------------


def test_the_data_map_is_drawn_from_scores(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    DYNAMICS.save(tmp_path / "c.jsonl")
    for name in ("", str(tmp_path / "map.xyz")):
        with pytest.raises(SystemExit):
            main(["--scores", str(tmp_path / "c.jsonl"), "--plot", name])
        assert f"--plot {name}: must end in one of ." in capsys.readouterr().err
    main(["--scores", str(tmp_path / "c.jsonl"), "--plot", str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    main(["--scores", str(tmp_path / "c.jsonl"), "--by", "perplexity", "--plot", str(tmp_path / "by.png")])
    assert (tmp_path / "by.png").read_bytes() != (tmp_path / "map.png").read_bytes()
    for file in ("c.jsonl", "c.png"):  # a file of scores may have any name
        DYNAMICS.save(tmp_path / file)
        with pytest.raises(SystemExit):
            main(["--scores", str(tmp_path / file), "--plot", str(tmp_path / file)])
        assert f"{file}: is another file of this command" in capsys.readouterr().err


def test_a_missing_matplotlib_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit:
        main(["--scores", str(tmp_path / "none.jsonl"), "--plot", str(tmp_path / "map.png")])
    assert exit.value.code == 1 and "pip install matplotlib" in capsys.readouterr().err


def test_the_command_line_scores_a_file(tmp_path, tokenizer, capsys):
    save_model(
        tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512),
        tmp_path / "m",
        tokenizer.files_for("alpaca"),
    )
    (tmp_path / "d.jsonl").write_text(
        '{"instruction": "a", "output": "the dog"}\n{"instruction": "b", "output": "fox"}\n'
    )
    folder, data, output = (str(tmp_path / name) for name in ("m", "d.jsonl", "c.jsonl"))
    main(["--checkpoints", folder, folder, "--data", data, "--output", output])
    dynamics = TrainingDynamics.load(output)
    assert dynamics.probability.shape == (2, 2) and (dynamics.variance == 0).all()
    assert "mean gold-token probability" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "runs" / "step-2")
    for changes, message in (
        (["--output", data], "already there"),
        (["--output", ""], "--output '': names no file"),
        (["--plot", "/none/x.png"], "its folder does not exist"),
        ([str(tmp_path / "runs")], f"; there is one in {tmp_path / 'runs' / 'step-2'}"),
    ):
        with pytest.raises(SystemExit):
            main(["--data", data, "--output", output + ".new", "--checkpoints", folder, *changes])
        assert message in capsys.readouterr().err
    assert "the dog" in (tmp_path / "d.jsonl").read_text()


def test_scoring_that_was_stopped_goes_on_with_the_next_checkpoint(tmp_path, tokenizer, monkeypatch):
    for seed in range(2):
        torch.manual_seed(seed)
        save_model(tiny_model(tokenizer.vocab_size), tmp_path / str(seed) / "m", tokenizer.files_for("alpaca"))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "the dog"}\n{"prompt": "b", "completion": "x"}\n')
    folders = [str(tmp_path / str(seed) / "m") for seed in range(2)]  # of the same name
    arguments = ["--data", str(tmp_path / "d.jsonl"), "--checkpoints", *folders, "--output"]
    main([*arguments, str(tmp_path / "whole.jsonl")])

    scored = []

    def score(model, *rest):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(model)
        return score_examples(model, *rest)

    monkeypatch.setattr("confidence.score_examples", score)
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "c.jsonl")])
    assert not (tmp_path / "c.jsonl").exists()
    scored.clear()
    main([*arguments, str(tmp_path / "c.jsonl")])
    assert len(scored) == 1 and (tmp_path / "c.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "c.jsonl", "d.jsonl", "whole.jsonl"]

    scored.clear()
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "other.jsonl")])
    os.utime(tmp_path / "1" / "m" / "model.safetensors")  # another model, perhaps: all are scored again
    scored.clear()
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "other.jsonl")])
    assert len(scored) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "x.jsonl"], "give --checkpoints, --data and --output"),
        (["--scores", "s", "--plot", "p", "--checkpoints", "c"], "--scores: takes the place of --checkpoints"),
    ],
)
def test_the_command_line_says_what_is_missing_or_too_much(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_every_checkpoint_is_looked_at_before_the_first_is_scored(tmp_path, tokenizer, capsys):
    save_model(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "m", tokenizer.files_for("alpaca"))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    folders = [str(tmp_path / "m"), str(tmp_path / "typo")]
    with pytest.raises(SystemExit):
        main(["--checkpoints", *folders, "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "o")])
    told = capsys.readouterr().err
    assert "typo/config.json: not found" in told and "mean gold-token probability" not in told


def test_checkpoints_of_different_vocabularies_are_refused(tmp_path, tokenizer, capsys):
    for name, size in (("m", tokenizer.vocab_size), ("other", 500)):
        save_model(tiny_model(vocab_size=size), tmp_path / name, tokenizer.files_for("alpaca"))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    folders = [str(tmp_path / name) for name in ("m", "other")]
    with pytest.raises(SystemExit):
        main(["--checkpoints", *folders, "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "o")])
    assert "other: has 500 rows and 128 positions, where" in capsys.readouterr().err
