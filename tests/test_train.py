"""Configuration, schedule, the step, the loop and the stages, in one process and in two."""

import contextlib
import importlib
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_encoded, run_script, tiny_model, tolerance, write_model_and_records
from safetensors.torch import load_file

import model as model_module
import train as train_module
from benchmarks.scaling import peak_of
from confidence import ScoreAccumulator, TrainingDynamics, score_examples, split_by_confidence
from confidence import main as confidence_main
from data import Dataset, build_batch, epoch_order, load_examples, paired_order, sample_lambda
from infra.cache import load_dataset
from infra.demo import DEMO_BASE_FLAGS, DEMO_FLAGS
from infra.device import DTYPES
from infra.files import model_sha256
from infra.hf import load_model, meta_model, save_model
from infra.plan import (
    LargestMicroBatch,
    activation_bytes,
    estimate_communication,
    estimate_cpu_memory,
    estimate_memory,
    largest_micro_batch,
)
from infra.savepoints import Savepoints
from mixup import sftmix_loss_literal
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from train import (
    STAGES,
    Sampler,
    TrainConfig,
    forward_backward,
    learning_rate,
    load_trainable,
    main,
    make_optimizer,
    optimizer_step,
    parse_config,
    prepare_batch,
    record_dynamics,
    train,
    warn_about_batch_size,
    weights_dtype,
)

# --- Configuration ----------------------------------------------------------------------------------------------------

REAL = ["--model", "m", "--data", "d.jsonl", "--output", "o"]


def test_defaults_are_the_papers_and_the_demos():
    real, demo = parse_config(REAL), parse_config([])
    paper = {
        "mu": 0.2,
        "alpha": 0.5,
        "lr": 2e-6,
        "weight_decay": 0.1,
        "warmup_ratio": 0.1,
        "batch_size": 32,
        "epochs": 3,
    }
    assert {name: getattr(real, name) for name in paper} == paper
    assert demo == TrainConfig(**DEMO_FLAGS) and demo.output == "runs/demo" and demo.model is None


@pytest.mark.parametrize("more", [[], ["--confidence", "online"], ["--confidence", "scores.jsonl"]])
def test_the_demos_base_is_pretrained_by_plain_ntp(more):
    config = replace(parse_config(more), **DEMO_BASE_FLAGS)
    assert config.confidence is None and config.epochs == 1


@pytest.mark.parametrize(
    ("stage", "batch_size", "expected"),
    [
        ("reference", 5, "5 is odd"),
        ("all", 6, "6 is less than a pair for each of 4"),
        ("confidence", 5, ""),
        ("all", 8, ""),
    ],
)
def test_batch_sizes_that_do_not_fit_are_warned_about(capsys, stage, batch_size, expected):
    warn_about_batch_size(TrainConfig(stage=stage, batch_size=batch_size), world_size=4 if stage == "all" else 1)
    out = capsys.readouterr().out
    assert expected in out and bool(out) == bool(expected)


def test_flags_override_the_demos_settings():
    config = parse_config(["--lr", "0.5", "--mu", "1", "--output", "x"])
    assert (config.lr, config.mu, config.output, config.dtype) == (0.5, 1.0, "x", DEMO_FLAGS["dtype"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--alpha", "0"], "--alpha 0.0: must be above 0"),
        (["--mu", "nan"], "--mu nan: must be a finite number"),
        (["--mu", "-1"], "--mu -1.0: must be at least 0"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["--warmup_ratio", "1"], "--warmup_ratio 1.0: must be below 1"),
        (["--batch_size", "7"], "--batch_size 7: must be even"),
        (["--stage", "all_of_it"], "--stage all_of_it: must be one of all, base"),
        (["--template", "chat"], "--template chat: must be one of alpaca"),
        (["--dtype", "fp16"], "--dtype fp16: must be one of bf16, fp32"),
        (["--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
        (["--lora_rank", "-4"], "--lora_rank -4: must be at least 1"),
        (["--dry_run"], "--dry_run 0: needs --model too"),
        (
            ["--model", "m", "--data", "a", "--data", "b"],
            "--data: given twice; all that it takes goes behind one --data",
        ),
        (["--batchsize", "8"], "unknown flag --batchsize; did you mean --batch_size?"),
        (["--learning_rate", "1e-5"], "unknown flag --learning_rate; did you mean --lr?"),
        (["--max_steps", "5"], "unknown flag --max_steps; --help lists the flags"),
        (["--lam=3"], "unknown flag --lam; "),
        (["--model", "m"], "--model m: needs --data too"),
        (["--model", "m", "--data", "d"], "--model m: needs --output too"),
        (["--data", "d"], "--data d: needs --model too"),
        (["--eval_data", "d"], "--eval_data d: needs --model too"),
        (["--output", ""], "--output: must not be empty"),
        (["--stage", "confidence", "--confidence", "c"], "--confidence c: leaves nothing to do for --stage confidence"),
        (["--confidence", "online", "--pairing", "random"], "--pairing random: makes no use of --confidence and"),
        (["--confidence", "scores.jsonl", "--pairing", "random"], "--pairing random: makes no use of --confidence and"),
        (
            ["--confidence_by", "perplexity", "--pairing", "random"],
            "--pairing random: makes no use of --confidence and",
        ),
        (["--lora_alpha", "32"], "--lora_alpha 32.0: is for LoRA, which needs --lora_rank"),
        (["--model", "m", "--data", "d", "--dry_run", "2", "--stage", "confidence"], "--dry_run: plans training, and"),
        (["--confidence", "online", "--epochs", "1"], "--epochs 1: --confidence online needs 2 or more"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1 and error.endswith("\n")


def test_the_demos_length_is_checked_before_anything_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--max_length", "512", "--output", str(tmp_path / "o")])
    assert "--max_length 512: the demo's model has 256 positions" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"--{name}" in text for name in vars(TrainConfig()))


# --- The schedule and the optimizer -----------------------------------------------------------------------------------


def test_schedule_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert [learning_rate(step, 2, 1.0, 0.0) for step in (0, 1)] == [1.0, 0.5]
    assert learning_rate(0, 1, 1.0, 0.9) == 1.0


def test_matrices_decay_and_norms_do_not():
    model = tiny_model()
    decayed, spared = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


# --- The step ---------------------------------------------------------------------------------------------------------


def dataset_of(lengths, seed=0):
    return Dataset.from_encoded(random_encoded(lengths, seed=seed))


def literal_gradients(model, dataset, indices, lam, mu):
    """The loss of a global batch written out: every example alone, every position in a loop, one-hot targets."""
    device = model.head_weight.device
    model.zero_grad()
    hidden, targets, rows = [], [], []
    for i in indices:
        tokens, target = (x.long().to(device) for x in dataset[i])
        keep = target != -100
        rows.append(range(len(targets), len(targets) + int(keep.sum())))
        hidden.append(model(tokens)[keep])
        targets += target[keep].tolist()
    met = [(c, u, p) for p in range(len(lam)) for c, u in zip(rows[2 * p], rows[2 * p + 1], strict=False)]
    index_c, index_u, pair = torch.tensor(met, dtype=torch.int64).reshape(-1, 3).unbind(1)
    targets, lam = torch.tensor(targets, device=device), lam[pair].to(device)
    loss, ntp, mix = sftmix_loss_literal(torch.cat(hidden), model.head_weight, targets, index_c, index_u, lam, mu)
    loss.backward()
    return torch.stack([loss, ntp, mix]).detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mixing", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 10_000])
def test_gradients_are_those_of_the_global_batch_for_any_micro_batches(mixing, micro_batch_tokens, device):
    model, dataset = tiny_model().to(device), dataset_of([40, 3, 17, 8, 25, 30, 5, 11, 9])
    indices = np.array([4, 1, 0, 7, 2, 8, 3, 5, 6])
    lam = sample_lambda(4 if mixing else 0, 0.5, 0, 0)
    expected_losses, expected = literal_gradients(model, dataset, indices, lam, mu=0.7)
    model.zero_grad()
    batch = build_batch(dataset, indices, lam if mixing else lam[:0], micro_batch_tokens).to(device)
    losses = forward_backward(model, batch, 0.7, 1.0)
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance(device, 1e-5, 1e-4), atol=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=tolerance(device, 1e-4, 1e-3), atol=tolerance(device, 1e-6, 1e-5)
        )


def test_training_passes_score_as_scoring_does(device):
    model, dataset = tiny_model().to(device), dataset_of([40, 3, 17, 8, 25])
    scores = ScoreAccumulator(dataset.num_supervised, device)
    for num_pairs in (0, 2):
        batch = build_batch(dataset, np.array([3, 1, 4, 0, 2]), torch.full((num_pairs,), 0.3), 50).to(device)
        forward_backward(model, batch, 0.5, 1.0, scores)
        for one, other in zip(scores.pop_scores(), score_examples(model, dataset, 1000), strict=True):
            np.testing.assert_allclose(one, other, rtol=tolerance(device, 1e-5, 1e-4))


def test_a_step_never_looks_at_what_is_on_the_device(monkeypatch):
    """On the meta device, reading a value, or making a shape that depends on one, fails. On a GPU it would wait.

    Reading a loss at the end shows that this test can fail.
    """
    importlib.import_module("torch._dynamo")  # knows functions by their identity, so it has to see the real ones
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    dataset, meta = dataset_of([40, 30, 20, 25]), torch.device("meta")
    model = tiny_model().to(meta)
    scores, values = ScoreAccumulator(dataset.num_supervised, meta), []
    for lam in (torch.zeros(0), torch.rand(2)):
        batch = build_batch(dataset, np.arange(4), lam, 60).to(meta)
        losses = forward_backward(model, batch, 0.2, 1.0, scores)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        values.append(torch.cat([losses, norm.reshape(1)]))
    with pytest.raises(NotImplementedError, match="no data"):
        values[0].tolist()


def test_the_steps_of_an_epoch_take_every_example_once_in_its_order():
    dataset, config, order = dataset_of([9] * 11), TrainConfig(batch_size=4), epoch_order(11, 0, 1)
    batches = [prepare_batch(dataset, config, order, True, "cpu", step) for step in (3, 4, 5)]  # of the second epoch
    assert np.concatenate([batch.example_indices for batch in batches]).tolist() == order.tolist()
    lam = [float(batch.micro_batches[0].lam[0]) for batch in batches]
    assert lam == [float(sample_lambda(1, config.alpha, 0, step)[0]) for step in (3, 4, 5)]


def test_a_pair_shares_a_micro_batch_and_no_example_is_lost():
    dataset = dataset_of(list(range(3, 14)))
    batch = build_batch(dataset, np.arange(11), torch.arange(5) / 10, micro_batch_tokens=30)
    assert len(batch.micro_batches) > 2 and batch.num_tokens == sum(range(3, 14))
    seen, lam_of_pair = [], {}
    for micro_batch in batch.micro_batches:
        lengths = micro_batch.row.cu_seqlens.diff().tolist()
        seen += [length - 3 for length in lengths]
        examples = [micro_batch.example_index[index].tolist() for index in (micro_batch.index_c, micro_batch.index_u)]
        lam_of_pair |= dict(zip(zip(*examples, strict=True), micro_batch.lam.tolist(), strict=True))
    assert sorted(seen) == list(range(11))
    assert lam_of_pair == pytest.approx({(2 * p, 2 * p + 1): p / 10 for p in range(5)})


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(device, broken):
    """Neither weights nor moments nor AdamW's count; a step before it and a step after it change all of them."""
    model, dataset = tiny_model().to(device), dataset_of([20, 9, 14, 30])
    optimizer = make_optimizer(model, TrainConfig())
    batch = build_batch(dataset, np.arange(4), torch.full((2,), 0.3), 1000).to(device)

    def state():
        return [*model.parameters(), *(tensor for p in optimizer.state.values() for tensor in p.values())]

    for is_broken in (False, True, False):
        before = [tensor.detach().clone() for tensor in state()]
        losses = forward_backward(model, batch, 0.2, 1.0)
        if is_broken and broken == "loss":
            losses[0] = torch.nan
        elif is_broken:
            model.head_weight.grad[3, 2] = torch.inf
        grad_norm = optimizer_step(model, optimizer, 1e-2, losses[0])
        assert bool(losses[0].isfinite() & grad_norm.isfinite()) != is_broken
        assert [torch.equal(*pair) for pair in zip(before, state(), strict=True)] == [is_broken] * len(before)


def test_small_learning_rates_move_float32_masters_under_bf16(device):
    model, dataset = tiny_model().to(device), dataset_of([20] * 4)
    model.compute_dtype = torch.bfloat16
    before = [p.clone() for p in model.parameters()]
    config = TrainConfig(lr=2e-6, epochs=1, batch_size=4, warmup_ratio=0.0)
    train(model, dataset, config, sampler(lambda epoch: np.arange(4), mix=False), lambda record: None)
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.dtype == torch.float32 and not torch.equal(old, new)
        assert (old.detach().to(torch.bfloat16) != new.detach().to(torch.bfloat16)).float().mean() < 0.5


# --- The loop ---------------------------------------------------------------------------------------------------------


def sampler(order, mix):
    return Sampler(order, num_ntp_epochs=0 if mix else 10)


def trained(device, config, order, mixing):
    model, records = tiny_model().to(device), []
    dataset = dataset_of([12, 30, 7, 22, 9, 15, 28])
    train(model, dataset, config, sampler(order, mixing), records.append)
    return model, records


def test_ntp_is_the_same_loop_without_mixing(device):
    """A plain loop over padded-free single examples and cross-entropy, step by step, ends at the same weights."""
    config = TrainConfig(lr=1e-3, epochs=2, batch_size=4, dtype="fp32", log_every=1, mu=0.2)
    model, records = trained(device, config, lambda epoch: epoch_order(7, 0, epoch), mixing=False)
    other, dataset = tiny_model().to(device), dataset_of([12, 30, 7, 22, 9, 15, 28])
    optimizer = make_optimizer(other, config)
    for step in range(4):
        indices = epoch_order(7, 0, step // 2)[:4] if step % 2 == 0 else epoch_order(7, 0, step // 2)[4:]
        losses, _ = literal_gradients(other, dataset, indices, torch.zeros(0), mu=0.0)
        assert records[step]["loss"] == pytest.approx(records[step]["ntp"]) == pytest.approx(float(losses[1]), rel=1e-4)
        assert records[step]["mix"] == 0
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, 1e-3, 0.1)
        optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=tolerance(device, 1e-5, 1e-3))


def test_training_lowers_the_loss_and_logs_means_over_the_window(device):
    config = TrainConfig(lr=1e-2, epochs=20, batch_size=4, dtype="fp32", log_every=3, alpha=0.5)
    order = partial(paired_order, [0, 1, 2], [3, 4, 5, 6], 0)
    _, records = trained(device, config, order, mixing=True)
    assert [record["step"] for record in records] == [*range(3, 40, 3), 40]
    assert records[-1]["ntp"] < 0.5 * records[0]["ntp"] and all(record["mix"] > 0 for record in records)
    assert records[-1]["loss"] == pytest.approx(records[-1]["ntp"] + 0.2 * records[-1]["mix"], rel=1e-4)
    _, every = trained(device, replace(config, log_every=1), order, mixing=True)
    mean = np.mean([record["ntp"] for record in every[:3]])
    assert records[0]["ntp"] == pytest.approx(mean, rel=tolerance(device, 1e-5, 1e-3))


def test_a_diverged_run_ends_with_what_to_do(device):
    config = TrainConfig(lr=1e38, epochs=3, batch_size=4, dtype="fp32", max_skipped=3)
    with pytest.raises(ValueError, match=r"step 4: the run has diverged \(3 steps in a row .* lower --lr than 1e\+38"):
        trained(device, config, lambda epoch: np.arange(7), mixing=False)


def test_compiled_blocks_train_to_the_same_weights_and_are_compiled_but_once(monkeypatch, device):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model_module._compiled_block.cache_clear()
    torch._dynamo.reset()  # what other tests have compiled
    weights = []
    for compiling in (False, True):
        model = tiny_model().to(device)
        if compiling:
            model.compile_blocks()
        dataset = dataset_of([12, 30, 7, 22, 9, 15, 28, 40, 33, 18])
        config, counts = TrainConfig(lr=1e-3, epochs=3, batch_size=4, dtype="fp32", log_every=1), []
        train(
            model,
            dataset,
            config,
            sampler(lambda epoch: epoch_order(10, 0, epoch), mix=True),
            lambda record, counts=counts: counts.append(len(graphs)),
        )
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=tolerance(device, 1e-5, 1e-3), atol=tolerance(device, 1e-6, 1e-3))
    assert 0 < counts[1] == counts[-1] <= 4  # the parts between which attention, a loop, is left out


def test_the_same_seed_gives_the_same_weights(device):
    """Bit for bit on a CPU; on other devices only with --deterministic, which is a mode of the whole process."""
    config = TrainConfig(lr=1e-3, epochs=2, batch_size=4, dtype="fp32")
    models = [trained(device, replace(config, seed=seed), lambda epoch: np.arange(7), True)[0] for seed in (0, 0, 1)]
    one, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    torch.testing.assert_close(one, same, rtol=0, atol=tolerance(device, 0, 1e-3))
    assert not torch.equal(one, other)


def test_a_stopped_loop_ends_where_an_uninterrupted_one_does(device, tmp_path):
    """Weights and the scores of an online run, from a savepoint in the middle of an epoch."""
    config = TrainConfig(lr=1e-3, epochs=2, batch_size=2, dtype="fp32")
    dataset = dataset_of([12, 30, 7, 22, 9, 15, 28])

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    def run(name, after_step=None):
        model, scores = tiny_model().to(device), ScoreAccumulator(dataset.num_supervised, device, max_epochs=2)
        savepoints = Savepoints(tmp_path / name, "sftmix", every=3, keep=2)
        order = Sampler(partial(epoch_order, 7, 0), num_ntp_epochs=1, accumulator=scores)
        train(model, dataset, config, order, lambda record: None, after_step, savepoints)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), np.stack(scores.epoch_scores())

    with pytest.raises(Stopped):
        run("stopped", {7: stop})  # of 8 steps, 4 an epoch; the last savepoint is that of step 6
    ends = [run("stopped"), run("whole")]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=tolerance(device, 0, 1e-3))
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=tolerance(device, 0, 1e-2))


# --- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model, 20 training examples, one of them too long to keep, and 6 held-out ones."""
    path = tmp_path_factory.mktemp("run")
    records = write_model_and_records(path, tokenizer)
    (path / "train.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [*records[:20], {"prompt": "a " * 300, "completion": "b"}])
    )
    (path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[20:26]))
    return path


def flags(folder, output, *more):
    paths = {"--model": "model", "--data": "train.jsonl", "--eval_data": "eval.jsonl"}
    given = [x for flag, name in paths.items() if flag not in more for x in (flag, str(folder / name))]
    small = "--epochs 2 --batch_size 6 --lr 1e-2 --max_length 200 --num_checkpoints 3 --dtype fp32".split()
    return [*given, "--output", str(output), *small, *map(str, more)]


@pytest.fixture(scope="module")
def finished(folder):
    main(flags(folder, folder / "out"))
    return folder / "out"


def test_a_run_leaves_what_it_promises(finished, folder):
    made = sorted(str(p.relative_to(finished)) for p in finished.iterdir())
    assert made == ["confidence.jsonl", "config.json", "metrics.jsonl", "reference", "results.json", "sftmix"]
    assert sorted(p.name for p in (finished / "reference" / "checkpoints").iterdir()) == ["step-3", "step-6", "step-8"]
    config = json.loads((finished / "config.json").read_text())
    assert config["model"] == str(folder / "model") and config["mu"] == 0.2
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in metrics] == [("reference", 8), ("sftmix", 8)]
    assert {"loss", "ntp", "mix", "lr", "grad_norm", "tokens_per_second"} <= set(metrics[0])


def test_results_hold_every_figure(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["base", "ntp", "confidence", "sftmix"]
    names = [
        "loss",
        "loss_interval",
        "examples",
        "tokens",
        "accuracy",
        "accuracy_interval",
        "seconds",
        "peak_memory_bytes",
        "skipped",
    ]
    for key in ("base", "ntp", "sftmix"):
        assert sorted(results[key]) == sorted(names + ["checkpoints"] * (key == "ntp"))
        low, high = results[key]["loss_interval"]
        assert low < results[key]["loss"] < high and results[key]["examples"] == 6
    assert results["ntp"]["loss"] < results["base"]["loss"] and results["sftmix"]["loss"] < results["base"]["loss"]
    assert results["base"]["seconds"] is None and results["ntp"]["seconds"] > 0


def test_confidence_has_every_kept_example_in_file_order(finished, folder):
    dynamics = TrainingDynamics.load(finished / "confidence.jsonl")
    assert dynamics.ids == [example.id for example in load_examples(folder / "train.jsonl")][:20]
    assert dynamics.probability.shape == (3, 20) and dynamics.variance.max() > 0


def test_the_last_checkpoint_is_the_reference(finished):
    last, final = (
        load_file(finished / "reference" / name)
        for name in ("checkpoints/step-8/model.safetensors", "model.safetensors")
    )
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_nothing_of_a_finished_run_is_written_over(finished, folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as exit:
        main(flags(folder, finished))
    error = capsys.readouterr().err
    assert exit.value.code == 1 and "reference: already there" in error and error.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_stages_one_by_one_equal_the_run_at_once(finished, folder):
    output = folder / "stages"
    for stage in STAGES:
        main(flags(folder, output, "--stage", stage))
    for name in ("reference", "sftmix"):
        one, other = (load_file(path / name / "model.safetensors") for path in (finished, output))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (output / "confidence.jsonl").read_text() == (finished / "confidence.jsonl").read_text()


def assert_trained_by(sampler, config, dataset, folder, output):
    """The saved SFTMix model is, bit for bit, what training with this sampler gives."""
    model = load_model(folder / "model")
    train(model, dataset, config, sampler, lambda record: None)
    saved = load_file(output / "sftmix" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


def test_the_sftmix_run_by_hand(finished, folder, tokenizer):
    """From the scores that the run left: pairs across the halves, mixed from the first epoch on."""
    config = parse_config(flags(folder, "none", "--template", "alpaca"))
    dataset = load_dataset(config.data, tokenizer, "alpaca", 200)
    halves = split_by_confidence(TrainingDynamics.load(finished / "confidence.jsonl").confidence)
    assert_trained_by(Sampler(partial(paired_order, *halves, 0)), config, dataset, folder, finished)


def test_random_pairs_are_neighbors_in_the_order_of_ntp(folder, tokenizer, tmp_path):
    choice = ("--template", "alpaca", "--pairing", "random")
    main(flags(folder, tmp_path / "o", "--stage", "sftmix", *choice))
    config = parse_config(flags(folder, "none", *choice))
    dataset = load_dataset(config.data, tokenizer, "alpaca", 200)
    ntp = train_module.ntp_sampler(dataset, config)
    assert ntp.num_ntp_epochs == config.epochs
    assert_trained_by(Sampler(ntp.order), config, dataset, folder, tmp_path / "o")


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma"])
def test_each_family_runs_the_whole_recipe(copied, tmp_path, tokenizer, model_type):
    shutil.rmtree(copied / "model")
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512, "model_type": model_type}
    save_model(tiny_model(**shape), copied / "model", tokenizer.files_for("alpaca"))
    main(flags(copied, tmp_path / "o"))
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["base"]["loss"] > results["ntp"]["loss"] != results["sftmix"]["loss"]
    assert load_model(tmp_path / "o" / "sftmix").config.model_type == model_type


@pytest.mark.parametrize(
    "choice", [("--pairing", "random"), ("--confidence_by", "perplexity"), ("--mu", 0), ("--ntp_weight", 0)]
)
def test_the_choices_change_the_result(finished, folder, choice, tmp_path):
    scores = () if "random" in choice else ("--confidence", finished / "confidence.jsonl")
    main(flags(folder, tmp_path / "o", "--stage", "sftmix", *scores, *choice))
    one, other = (load_file(path / "sftmix" / "model.safetensors") for path in (finished, tmp_path / "o"))
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_low_confidence_is_what_points_at_wrong_answers(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wrong.json").write_text('["a"]')
    dynamics = TrainingDynamics(["a", "b", "c"], np.array([[0.1, 0.5, 0.9]]), np.array([[9, 2, 1]]))
    config = TrainConfig(model="m", data="d", output=str(tmp_path))
    assert record_dynamics(dynamics, config)["roc_area"] == {"probability": 1.0, "perplexity": 1.0}


def test_mixup_alone_has_the_same_reference(finished, folder, tmp_path):
    main(flags(folder, tmp_path / "o", "--stage", "reference", "--ntp_weight", 0, "--mu", 0.7))
    one, other = (load_file(path / "reference" / "model.safetensors") for path in (finished, tmp_path / "o"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_given_scores_take_the_place_of_the_confidence_stage(finished, folder, tmp_path):
    main(flags(folder, tmp_path / "o", "--confidence", finished / "confidence.jsonl"))
    assert not (tmp_path / "o" / "confidence.jsonl").exists()
    one, other = (load_file(path / "sftmix" / "model.safetensors") for path in (finished, tmp_path / "o"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def online(folder):
    main(flags(folder, folder / "online", "--confidence", "online"))
    return folder / "online"


def test_online_is_one_run_that_splits_by_its_own_earlier_epochs(online, folder, tokenizer):
    """The run again, by hand, from the scores that it left: NTP, then Mixup by the mean over the epochs before."""
    assert sorted(p.name for p in online.iterdir()) == [
        "confidence.jsonl", "config.json", "metrics.jsonl", "results.json", "sftmix",
    ]  # fmt: skip
    dynamics = TrainingDynamics.load(online / "confidence.jsonl")
    assert dynamics.probability.shape == (2, 20)
    results = json.loads((online / "results.json").read_text())
    assert list(results) == ["base", "confidence", "sftmix"] and results["sftmix"]["loss"] < results["base"]["loss"]

    config = parse_config(flags(folder, "none", "--confidence", "online", "--template", "alpaca"))
    dataset = load_dataset(config.data, tokenizer, "alpaca", 200)
    halves = split_by_confidence(dynamics.probability[0])
    orders = [epoch_order(20, 0, 0), paired_order(*halves, 0, 1)]
    assert_trained_by(Sampler(orders.__getitem__, num_ntp_epochs=1), config, dataset, folder, online)


def test_two_processes_end_online_where_one_does(online, folder, tmp_path):
    done = run_script("train.py", *flags(folder, tmp_path / "o", "--confidence", "online"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (TrainingDynamics.load(path / "confidence.jsonl") for path in (online, tmp_path / "o"))
    np.testing.assert_allclose(one.probability, two.probability, rtol=1e-3)
    one, two = (load_file(path / "sftmix" / "model.safetensors") for path in (online, tmp_path / "o"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_data_is_encoded_once(folder, tmp_path, monkeypatch):
    arguments = flags(folder, tmp_path / "o", "--stage", "base", "--cache", tmp_path / "cache")
    main(arguments)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and held-out examples
    monkeypatch.setattr("infra.cache.encode_files", None)
    main([*arguments[: arguments.index("--output")], "--output", str(tmp_path / "p"), *arguments[8:]])


@pytest.fixture
def copied(folder, tmp_path):
    """The model and the data, which may be changed."""
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (shutil.copytree if name == "model" else shutil.copy)(folder / name, tmp_path / name)
    return tmp_path


def before_stage(monkeypatch, stage, change):
    """Call `change` before a stage of a run."""
    real = getattr(train_module, f"{stage}_stage")
    monkeypatch.setattr(train_module, f"{stage}_stage", lambda *arguments: (change(), real(*arguments))[1])


def test_data_that_is_removed_while_a_run_goes_on_changes_nothing(finished, copied, monkeypatch):
    before_stage(monkeypatch, "reference", lambda: [(copied / f"{name}.jsonl").unlink() for name in ("train", "eval")])
    main(flags(copied, copied / "o"))
    results = [json.loads((output / "results.json").read_text()) for output in (finished, copied / "o")]
    for stage in ("ntp", "sftmix"):
        one, other = ({k: v for k, v in r[stage].items() if k not in ("seconds", "peak_memory_bytes")} for r in results)
        assert one == other and one["accuracy"] is not None


def test_skipped_records_are_listed_in_the_output(copied):
    with open(copied / "train.jsonl", "a") as file:
        file.write('{"instruction": "x", "output": ""}\n{broken\n')
    main(flags(copied, copied / "o", "--stage", "base", "--skip_bad_records"))
    skipped = [json.loads(line) for line in (copied / "o" / "skipped.jsonl").read_text().splitlines()]
    assert [record["place"] for record in skipped] == [f"{copied}/train.jsonl:{line}" for line in (22, 23)]
    assert [record["record"] for record in skipped] == ['{"instruction": "x", "output": ""}', "{broken"]
    assert "output is empty" in skipped[0]["reason"] and "not valid JSON" in skipped[1]["reason"]


def test_scores_are_read_once(finished, copied, monkeypatch):
    scores = copied / "scores.jsonl"
    shutil.copy(finished / "confidence.jsonl", scores)
    before_stage(monkeypatch, "sftmix", scores.unlink)
    main(flags(copied, copied / "o", "--stage", "sftmix", "--confidence", scores))
    assert model_sha256(copied / "o" / "sftmix") == model_sha256(finished / "sftmix")


def test_a_base_that_changes_while_a_run_goes_on_is_told(copied, monkeypatch, capsys):
    other = copied / "o" / "reference" / "model.safetensors"
    before_stage(monkeypatch, "confidence", lambda: shutil.copy(other, copied / "model"))
    with pytest.raises(SystemExit):
        main(flags(copied, copied / "o"))
    assert "model: is not what it was when the run began" in capsys.readouterr().err


def test_without_held_out_data_the_figures_are_null(folder, tmp_path):
    arguments = flags(folder, tmp_path / "o", "--stage", "reference")
    at = arguments.index("--eval_data")
    main(arguments[:at] + arguments[at + 2 :])
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["ntp"]["loss"] is None and results["ntp"]["accuracy"] is None and results["ntp"]["seconds"] > 0


def test_truncated_dropped_and_leaked_examples_are_said(folder, tmp_path, capsys):
    arguments = flags(folder, tmp_path / "o", "--stage", "base", "--eval_data", folder / "train.jsonl")
    main(arguments)
    text = capsys.readouterr().out
    assert "20 examples" in text and "0 truncated to 200 tokens, 1 dropped" in text
    assert "20 held-out examples are training examples too" in text


def test_a_repeated_held_out_example_is_leaked_each_time(folder, tmp_path, capsys):
    first = (folder / "train.jsonl").read_text().splitlines(keepends=True)[0]
    record = json.loads(first)
    record["output"] = f" {record['output']}\n"  # white space is no part of an answer
    (tmp_path / "eval.jsonl").write_text(first * 2 + json.dumps(record))
    main(flags(folder, tmp_path / "o", "--stage", "base", "--eval_data", tmp_path / "eval.jsonl"))
    assert "3 held-out examples are training examples too" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["reference", "sftmix"])
def test_saved_folders_give_the_same_logits_in_transformers(finished, choice):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    model = load_model(finished / choice)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / choice, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (300,))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens[None]).logits[0], rtol=1e-4, atol=2e-4)


def test_a_folder_that_lays_out_its_chats_decides_the_template(folder, tokenizer, tmp_path, capsys):
    model = load_model(folder / "model")
    save_model(model, tmp_path / "m", tokenizer.files_for("mistral"))
    main(flags(folder, tmp_path / "o", "--model", tmp_path / "m", "--stage", "reference"))
    assert json.loads((tmp_path / "o" / "config.json").read_text())["template"] == "mistral"
    saved = Tokenizer.from_pretrained(tmp_path / "o" / "reference")
    assert saved.choose_template(None) == "mistral"
    main(flags(folder, tmp_path / "p", "--model", tmp_path / "m", "--stage", "reference", "--template", "alpaca"))
    assert Tokenizer.from_pretrained(tmp_path / "p" / "reference").choose_template(None) == "alpaca"


def test_lora_leaves_merged_models_and_adapters(folder, tmp_path):
    lora = ("--lora_rank", 4, "--activation_checkpointing", "--save_dtype", "bf16", "--dtype", "bf16")
    main(flags(folder, tmp_path / "o", *lora))
    base = load_file(folder / "model" / "model.safetensors")
    for name in ("reference", "sftmix"):
        saved = load_file(tmp_path / "o" / name / "model.safetensors")
        assert saved.keys() == base.keys() and {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
        adapter = load_file(tmp_path / "o" / name / "adapter" / "adapter_model.safetensors")
        layer = "model.layers.0.mlp.up_proj"
        a, b = (adapter[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        expected = base[f"{layer}.weight"] + 16 / 4 * b @ a
        torch.testing.assert_close(saved[f"{layer}.weight"].float(), expected, rtol=1e-2, atol=1e-3)
        assert torch.equal(saved["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16())
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["sftmix"]["loss"] < results["base"]["loss"]


@pytest.mark.parametrize("lora_rank, expected", [(4, torch.bfloat16), (None, torch.float32)])
def test_the_base_takes_as_much_memory_as_what_is_trained(tmp_path, monkeypatch, lora_rank, expected):
    """Weights that LoRA freezes stay in bf16, and so do those of the base that is evaluated before."""
    save_model(tiny_model(), tmp_path / "model", dtype=torch.bfloat16)
    evaluated = []
    monkeypatch.setattr(train_module, "evaluate_model", lambda model, *_: evaluated.append(model.head_weight.dtype))
    paths = {"model": str(tmp_path / "model"), "data": "d", "output": "o"}
    config = TrainConfig(**paths, lora_rank=lora_rank, dtype="bf16")
    train_module.base_stage(config, train_module.Inputs(None, None, held_out=[1]), "cpu")
    assert evaluated == [train_module.load_trainable(config, "cpu").head_weight.dtype] == [expected]


def test_scores_of_another_model_with_another_tokenizer_match_by_id(folder, tmp_path):
    """A weaker reference: its own vocabulary, its own length limit, the same file of examples."""
    other = Tokenizer.train(["some other words of the fox and the dog"] * 9, 290)
    weak = tiny_model(other.vocab_size, seed=5, max_position_embeddings=512)
    save_model(weak, tmp_path / "weak", other.files_for("alpaca"))
    scores = tmp_path / "scores.jsonl"
    confidence_main(
        ["--checkpoints", str(tmp_path / "weak"), "--data", str(folder / "train.jsonl"), "--output", str(scores)]
    )
    assert len(TrainingDynamics.load(scores).ids) == 20
    main(flags(folder, tmp_path / "o", "--stage", "sftmix", "--confidence", scores))
    assert (tmp_path / "o" / "sftmix" / "config.json").exists()


# --- What a run would take --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, expected", [("all", "5 models: checkpoints, reference, sftmix"), ("sftmix", "1 models: sftmix")]
)
def test_a_dry_run_counts_the_models_of_its_stages(folder, tmp_path, capsys, stage, expected):
    main(flags(folder, tmp_path / "o", "--stage", stage, "--dry_run"))
    assert f" for {expected}\n" in capsys.readouterr().out


def test_a_dry_run_reads_the_scores_that_the_run_would_read(folder, tmp_path, capsys):
    missing = ["--confidence", str(tmp_path / "none.jsonl"), "--dry_run"]
    main(flags(folder, tmp_path / "o", "--stage", "reference", *missing))
    with pytest.raises(SystemExit):
        main(flags(folder, tmp_path / "o", "--stage", "sftmix", *missing))
    assert "none.jsonl: not found" in capsys.readouterr().err


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = flags(folder, tmp_path / "o")
    at = arguments.index("--output")
    main([*arguments[:at], *arguments[at + 2 :], "--dry_run"])
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    model = load_model(folder / "model")
    parameters = sum(p.numel() for p in model.parameters())
    assert f"parameters     {parameters:,}, of which {parameters:,} are trained" in text
    assert "20 examples" in text and "1 dropped" in text and "8 a stage: 2 epochs of 4" in text
    assert f"weights {parameters * 4 / 1e6:.1f} MB" in " ".join(text.split())
    assert f"{5 * 4 * parameters / 1e6:.1f} MB for 5 models" in text
    shown = text[text.index("The first example") :]
    learnt = shown[shown.index("«", shown.index("\n")) : shown.rindex("»")]
    assert learnt.endswith("</s> ") and "Response" not in learnt.replace(" ", "")
    turns = [{"role": role, "content": "the dog"} for role in ("user", "assistant")] * 2
    unlearned = json.dumps({"messages": [*turns[:3], turns[3] | {"weight": 0}]}) + "\n"
    (tmp_path / "unlearned.jsonl").write_text(unlearned)
    main(flags(folder, tmp_path / "o", "--data", str(tmp_path / "unlearned.jsonl"), "--dry_run"))
    assert capsys.readouterr().out.count("«") == 2  # in its explanation, and before the answer that is learned
    main([*arguments, "--dry_run", "4", "--lora_rank", "2"])
    text = capsys.readouterr().out
    adapters = 2 * 2 * sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32))  # layers, rank
    assert f"{parameters + adapters:,}, of which {adapters:,} are trained" in text and "on 4 x cpu" in text
    sent = (4 * (parameters + adapters) + 4 * adapters) * 3 // 4  # gathered and reduced once, 3 of 4 shards to others
    assert f" {sent / 1e6:.1f} MB\n\nThe first example" in text and "CPU memory" in text


def test_what_stages_of_zero_take():
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4))
    parameters = sum(p.numel() for p in model.parameters())
    config, largest = TrainConfig(dtype="bf16"), LargestMicroBatch(tokens=100, supervised=50, num_micro_batches=3)
    stages = [replace(config, zero_stage=stage) for stage in (1, 2, 3)]
    memory = [estimate_memory(model, largest, stage, 8, "cuda") for stage in stages]
    weights, gradients = ([m[f"temporary {name}"] for m in memory] for name in ("weights", "gradients"))
    assert weights[0] == weights[1] > 2 * parameters > weights[2]
    assert gradients[0] - 4 * parameters == gradients[1] == gradients[2]
    assert memory[0]["total"] > memory[1]["total"] > memory[2]["total"]
    again = parameters - 2 * 1000 * 64  # lm_head stays for the backward pass, and the embedding is not used there
    gathered, reduced = (parameters, parameters, 3 * (parameters + again)), (parameters, 3 * parameters, 3 * parameters)
    assert [estimate_communication(model, stage, 8, 3) for stage in stages] == [
        (2 * g + 4 * r) * 7 // 8 for g, r in zip(gathered, reduced, strict=True)
    ]


def test_each_micro_batch_knows_the_stage_of_zero_and_whether_it_is_the_last(monkeypatch):
    calls = []
    monkeypatch.setattr(train_module, "set_zero_stage", lambda model, stage, is_last: calls.append((stage, is_last)))
    config = TrainConfig(dtype="fp32", batch_size=4, epochs=1, micro_batch_tokens=50, zero_stage=1)
    order = sampler(lambda epoch: np.arange(4), mix=False)
    train(tiny_model(), dataset_of([40, 30, 45, 35]), config, order, lambda record: None)
    assert calls == [(1, False)] * (len(calls) - 1) + [(1, True)] and len(calls) > 2


def test_attention_in_float32_on_a_gpu_keeps_keys_and_values_of_each_query_head():
    shapes = [ModelConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=heads) for heads in (2, 8)]
    kept = {dtype: [activation_bytes(s, TrainConfig(dtype=dtype), "cuda")[0] for s in shapes] for dtype in DTYPES}
    assert kept["fp32"][0] == kept["fp32"][1]
    assert kept["bf16"][1] - kept["bf16"][0] == 2 * 2 * (64 - 16)


def test_cpu_memory_is_that_of_a_part_of_a_savepoint_and_of_a_file_of_a_model():
    with torch.device("meta"):
        large = Transformer(ModelConfig(vocab_size=128256, hidden_size=4096, num_hidden_layers=4))
        small = Transformer(ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1))
    config, head, parameters = TrainConfig(dtype="bf16"), 128256 * 4096, sum(p.numel() for p in small.parameters())
    expected = {"loading": 4 * head, "savepoints": 3 * 4 * head, "saving models": 5 * 10**9}
    assert estimate_cpu_memory(large, config, 1, "cuda") == expected
    expected = {"loading": head // 2, "savepoints": 3 * 5 * 10**8, "saving models": 5 * 10**9}
    assert estimate_cpu_memory(large, config, 8, "cuda") == expected
    whole = {"savepoints": 2 * 12 * parameters, "saving models": 4 * parameters}
    assert estimate_cpu_memory(small, config, 1, "cpu").items() >= whole.items()


SHAPES = {
    "tiny": {"vocab_size": 2000, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4},
    "small": {
        "vocab_size": 8000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({}, torch.float32),
        ({"dtype": "bf16"}, torch.bfloat16),
        ({"activation_checkpointing": True}, torch.float32),
        ({"micro_batch_tokens": 300}, torch.float32),
        ({"dtype": "bf16", "lora_rank": 4}, torch.float32),
        ({"dtype": "bf16", "lora_rank": 4}, torch.bfloat16),
    ],
)
def test_the_memory_estimate_is_within_15_percent_of_what_a_run_takes(tmp_path, shape, settings, stored):
    save_model(tiny_model(**shape), tmp_path / "m", dtype=stored)
    fixed = {"model": str(tmp_path / "m"), "data": "-", "output": "-", "dtype": "fp32", "batch_size": 8, "epochs": 2}
    config = TrainConfig(**{**fixed, "log_every": 9, "seed": 1, **settings})
    dataset = dataset_of([120, 90, 100, 60, 150, 110, 80, 70])

    def run():
        model = load_trainable(config, "cpu")
        train(model, dataset, config, sampler(lambda epoch: epoch_order(8, 1, 0), mix=True), lambda record: None)

    peak = peak_of(run)
    work = largest_micro_batch(dataset, config, 1)
    model = meta_model(config.model, weights_dtype(config), config.lora_rank)
    estimate = estimate_memory(model, work, config, 1, "cpu")["total"]
    assert 0.85 < estimate / peak < 1.15


# --- Several processes ------------------------------------------------------------------------------------------------


def test_two_processes_end_where_one_does(finished, folder):
    output = folder / "two"
    done = run_script("train.py", *flags(folder, output), processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("reference", "sftmix"):
        one, two = (load_file(path / name / "model.safetensors") for path in (finished, output))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)
    one, two = (TrainingDynamics.load(path / "confidence.jsonl") for path in (finished, output))
    assert one.ids == two.ids
    np.testing.assert_allclose(one.probability, two.probability, rtol=1e-2)
    one, two = (json.loads((path / "results.json").read_text()) for path in (finished, output))
    assert one["sftmix"]["loss"] == pytest.approx(two["sftmix"]["loss"], rel=1e-3)
    assert one["sftmix"]["examples"] == two["sftmix"]["examples"]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2


# --- Errors as a user meets them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--data", "none.jsonl"], "none.jsonl: not found"),
        (["--data", "broken.jsonl"], "broken.jsonl:7: not valid JSON"),
        (["--data", "unknown.jsonl"], "unknown.jsonl:1: unknown key 'instrution' (did you mean 'instruction'?)"),
        (["--data", "empty.jsonl"], "empty.jsonl:2: output is empty"),
        (["--data", "bad.jsonl"], "2 of 3 records are bad (correct or remove them), such as\n  "),
        (["--model", "bare"], "model.safetensors: not found"),
        (["--model", "none"], "config.json: not found"),
        (["--model", "run"], "run: the output of a run; its models are in the folders reference and sftmix below"),
        (["--model", "small"], "the tokenizer has 400 ids, the embedding only 300 rows"),
        (["--model", "adapter"], "adapter: holds an adapter (adapter_config.json); merge it into its base"),
        (["--model", "holes"], "model-00002-of-00003.safetensors: not found"),
        (["--model", "pointer"], "tokenizer.model: a pointer of git-lfs, not the file itself; run: git lfs pull"),
        (["--model", "other"], "config.json: model_type: 'mamba' is not supported"),
        (["--model", "generation"], "generation_config.json: not valid JSON"),
        (["--model", "window"], "--max_length 200: window has only 64 tokens in its sliding_window"),
        (["--template", "chatml"], "template chatml: the tokenizer has no token <|im_start|>"),
        (["--max_length", "9999"], "has only 512 positions"),
        (["--max_length", "5"], "train.jsonl: no response to learn starts within --max_length 5"),
        (["--stage", "sftmix"], "confidence.jsonl: not found; train.py --stage confidence makes it"),
        (["--confidence", "none.jsonl"], "none.jsonl: not found"),
        (["--stage", "confidence"], "no finished reference run there; --stage reference makes one"),
        (["--confidence", "other.jsonl", "--stage", "sftmix"], "20 of 20 examples have no confidence score"),
        (["--output", "train.jsonl"], "--output train.jsonl: is not a folder; choose another"),
        (["--data", "train.jsonl"], "train.jsonl: SFTMix mixes two examples, and there is only one"),
    ],
)
def test_errors_are_one_line_on_stderr(folder, tmp_path, monkeypatch, changes, message, capsys):
    good = '{"instruction": "a", "output": "b"}\n'
    (tmp_path / "broken.jsonl").write_text(good * 6 + '{"instruction": "a", "outp\n' + good)
    (tmp_path / "unknown.jsonl").write_text('{"instrution": "a", "output": "b"}\n')
    (tmp_path / "empty.jsonl").write_text(good + '{"instruction": "a", "output": ""}\n')
    (tmp_path / "bad.jsonl").write_text(good + "{}\n[]\n")
    (tmp_path / "train.jsonl").write_text(good)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"num_checkpoints": 5}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "model" / "config.json").read_text())
    (tmp_path / "bare" / "tokenizer.model").write_bytes((folder / "model" / "tokenizer.model").read_bytes())
    files = Tokenizer.from_pretrained(folder / "model").files_for("alpaca")
    save_model(tiny_model(max_position_embeddings=512), tmp_path / "small", files)
    shutil.copytree(folder / "model", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_model(tiny_model(400), tmp_path / "holes", files, max_shard_bytes=40_000)
    (tmp_path / "holes" / "model-00002-of-00003.safetensors").unlink()
    save_model(tiny_model(400, model_type="mistral", sliding_window=64), tmp_path / "window", files)
    damaged = files | {"generation_config.json": b"{"}
    save_model(tiny_model(400, max_position_embeddings=512), tmp_path / "generation", damaged)
    shutil.copytree(tmp_path / "small", tmp_path / "pointer")
    (tmp_path / "pointer" / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    TrainingDynamics(["x"], np.array([[0.5]]), np.array([[2.0]])).save(tmp_path / "other.jsonl")
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(SystemExit) as exit:
        main(flags(folder, tmp_path / "o", *changes))
    error = capsys.readouterr().err
    lines = 1 + 2 * message.endswith("\n  ")  # a list of two
    assert exit.value.code == 1 and message in error and error.count("\n") == lines, error
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_process_that_fails_says_one_line_without_a_traceback(tmp_path):
    done = run_script("train.py", "--model", tmp_path, "--data", "d.jsonl", "--output", tmp_path / "o")
    assert done.returncode == 1 and done.stdout == ""
    told = f"{tmp_path}/config.json: not found; a model is a folder with config.json and model.safetensors"
    assert done.stderr == f"train.py: error: {told}\n"


def test_a_process_that_fails_alone_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from infra.distributed import init_distributed, rank, barrier\n"
        "with init_distributed():\n    if rank() == 1:\n        raise ValueError('my disk is full')\n    barrier()\n"
    )
    done = run_script(script, processes=2)
    assert done.returncode != 0 and "script.py: error: my disk is full\n" in done.stderr


def test_only_process_0_looks_for_files_and_all_know_what_it_found(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom infra.cache import load_dataset\nfrom infra.hf import load_tokenizer\n"
        "from infra.distributed import init_distributed, on_rank0, rank\n"
        "def look():\n    open(f'looked-{rank()}', 'w')\n    return rank()\n"
        "os.environ['XDG_CACHE_HOME'] = 'cache'\nwith init_distributed('cpu'):\n"
        f"    dataset = load_dataset('{folder}/train.jsonl', load_tokenizer('{folder}/model'), 'alpaca', 200)\n"
        "    open(f'{rank()}.txt', 'w').write(f'{on_rank0(look)} {len(dataset)}')\n"
    )
    done = run_script(script, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["0 20", "0 20"]
    assert [file.name for file in tmp_path.glob("looked-*")] == ["looked-0"]


def test_a_model_is_never_its_own_output(folder, capsys):
    before = (folder / "model" / "config.json").read_text()
    with pytest.raises(SystemExit):
        main(flags(folder, folder / "model"))
    assert "is the model's own folder" in capsys.readouterr().err
    assert (folder / "model" / "config.json").read_text() == before


def test_an_untied_model_trains_its_head(folder, tokenizer, tmp_path):
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, tie_word_embeddings=False)
    save_model(model, tmp_path / "m", tokenizer.files_for("alpaca"))
    main(flags(folder, tmp_path / "o", "--model", tmp_path / "m", "--stage", "reference"))
    trained_model = load_model(tmp_path / "o" / "reference")
    assert not torch.equal(trained_model.lm_head.weight, model.lm_head.weight)
    assert math.isfinite(float(trained_model.lm_head.weight.detach().sum()))
