"""docs/transformers_trainer.py against the loop and scores of this project, and on families model.py does not have."""

import importlib.util
import json
import runpy
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, random_encoded, tiny_model, write_model_and_records

from confidence import TrainingDynamics, score_examples, split_by_confidence
from data import IGNORE_INDEX, Dataset, build_batch, paired_order, sample_lambda
from infra.hf import save_model
from mixup import sftmix_loss_literal
from train import forward_backward

hf = pytest.importorskip("transformers", reason="its Trainer is tested, and transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")

SCRIPT = ROOT / "docs" / "transformers_trainer.py"
LENGTHS = [9, 4, 17, 6, 12, 3, 8, 5, 14, 7, 10]  # an odd number of examples: the last one has no partner
SCORES = np.random.default_rng(0).random(len(LENGTHS))


@pytest.fixture(scope="module")
def example():
    """The example code as a module."""
    spec = importlib.util.spec_from_file_location("transformers_trainer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def items(encoded) -> list[dict]:
    """Examples as the Trainer takes them: labels are the tokens themselves."""
    return [{"input_ids": [*x.tolist(), max(int(y[-1]), 0)], "labels": [IGNORE_INDEX, *y.tolist()]} for x, y in encoded]


def pad(features: list[dict]) -> dict:
    """A padded batch, as DataCollatorForSeq2Seq makes it with a tokenizer."""
    width = max(len(f["labels"]) for f in features)
    padded = {
        name: torch.tensor([f[name] + [value] * (width - len(f[name])) for f in features])
        for name, value in (("input_ids", 0), ("labels", IGNORE_INDEX))
    }
    mask = torch.tensor([[n < len(f["labels"]) for n in range(width)] for f in features]).long()
    return {**padded, "attention_mask": mask}


class GradientsOfSteps(hf.TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def make_trainer(example, model, folder, encoded, collator=pad, halves=None, **settings):
    """A trainer that never changes the weights, so that every step is that of the same model."""
    defaults = {"learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "seed": 3}
    args = hf.TrainingArguments(str(folder), **{**defaults, **quiet, **settings})
    halves = halves or split_by_confidence(SCORES[: len(encoded)])
    gradients = GradientsOfSteps()
    collate = partial(example.collate, collator)
    trainer = example.SFTMixTrainer(model, args, collate, items(encoded), halves=halves, callbacks=[gradients])
    return trainer, gradients.steps


@pytest.mark.parametrize("collator", [pad, hf.DataCollatorWithFlattening()], ids=["padded", "packed"])
def test_the_transformers_trainer_has_the_losses_and_gradients_of_the_own_loop(example, tmp_path, collator):
    """Two epochs of two steps each, of micro-batches with unequal numbers of supervised positions."""
    own, encoded = tiny_model(), random_encoded(LENGTHS)
    save_model(own, tmp_path / "m")
    settings = {"gradient_accumulation_steps": 3, "num_train_epochs": 2}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    model.accepts_loss_kwargs = False  # as of models for which the Trainer takes means over micro-batches
    trainer, steps = make_trainer(example, model, tmp_path / "out", encoded, collator, **settings)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    dataset, halves = Dataset.from_encoded(encoded), split_by_confidence(SCORES)
    assert len(steps) == 4 == len(losses)
    for step, (loss, gradients) in enumerate(zip(losses, steps, strict=True)):
        indices = paired_order(*halves, 3, epoch=step // 2)[step % 2 * 6 :][:6]
        batch = build_batch(dataset, indices, sample_lambda(len(indices) // 2, 0.5, 3, step), 10**6)
        own.zero_grad()
        expected = forward_backward(own, batch, mu=0.2, ntp_weight=1.0)
        assert loss == pytest.approx(expected[0].item(), rel=1e-4)
        for name, p in own.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def random_model(config, **changes):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config(**TINY, **changes))


@pytest.mark.parametrize(
    "config, changes",
    [(hf.Phi3Config, {}), (hf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": None})],
    ids=["phi3", "gemma2"],
)
def test_the_transformers_trainer_takes_a_step_on_families_of_others(example, tmp_path, config, changes):
    """The loss is the literal one of the states and the lm_head of that model."""
    encoded = random_encoded(LENGTHS[:2])
    model = random_model(config, **changes)
    lam = sample_lambda(1, 0.5, 3, 0)
    states, targets = [], []
    c, u = (int(half[0]) for half in split_by_confidence(SCORES[:2]))
    with torch.no_grad():
        for tokens, y in (encoded[c], encoded[u]):
            hidden = model.model(tokens[None].long()).last_hidden_state[0]
            states.append(hidden[y != IGNORE_INDEX])
            targets.append(y[y != IGNORE_INDEX].long())
        n = min(map(len, targets))
        index_c, index_u = torch.arange(n), torch.arange(n) + len(targets[0])
        arguments = torch.cat(states), model.lm_head.weight, torch.cat(targets), index_c, index_u
        expected, _, _ = sftmix_loss_literal(*arguments, lam.expand(n), 0.2)
    before = model.lm_head.weight.clone()
    trainer, steps = make_trainer(example, model, tmp_path, encoded, learning_rate=1e-3, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in steps[0].values())
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    "config, changes",
    [
        (hf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 5.0}),  # capped
        (hf.GraniteConfig, {"logits_scaling": 8.0}),  # scaled
        (hf.PhiConfig, {}),  # with a bias
    ],
    ids=["gemma2", "granite", "phi"],
)
def test_the_transformers_trainer_refuses_logits_that_are_not_linear(example, tmp_path, config, changes):
    model = random_model(config, **changes)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    trainer, _ = make_trainer(example, model, tmp_path, random_encoded(LENGTHS))
    with pytest.raises(ValueError, match="the logits are not W z"):
        trainer.train()


def test_the_transformers_trainer_computes_no_logits_but_the_last_and_evaluates_as_usual(example, tmp_path):
    model, seen = random_model(hf.Phi3Config), []
    encoded = random_encoded(LENGTHS)
    trainer, _ = make_trainer(example, model, tmp_path, encoded, max_steps=1)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(tuple(logits.shape)))
    trainer.train()
    assert seen == [(2, 1, 300)]
    loss = trainer.evaluate(items(encoded[:2]))["eval_loss"]
    with torch.no_grad():
        expected = model(**pad(items(encoded[:2]))).loss
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_the_transformers_trainer_keeps_pairs_together(example, tmp_path):
    with pytest.raises(ValueError, match="must be even"):
        make_trainer(example, random_model(hf.Phi3Config), tmp_path, random_encoded(LENGTHS), **{
            "per_device_train_batch_size": 3
        })  # fmt: skip


def test_the_transformers_script_scores_as_this_project_does(example, tmp_path):
    own, encoded = tiny_model(), random_encoded(LENGTHS)
    save_model(own, tmp_path / "m")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    scores = np.array([example.score(model, item) for item in items(encoded)])  # [N, 2]
    np.testing.assert_allclose(scores.T, score_examples(own, encoded), rtol=1e-4)


def test_the_transformers_script_runs_from_end_to_end(tmp_path, tokenizer, monkeypatch):
    records = write_model_and_records(tmp_path, tokenizer)[:9]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path / "out"]
    more = [
        "--num_train_epochs",
        "2",
        "--save_steps",
        "0.5",
        "--per_device_train_batch_size",
        "4",
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags), *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    dynamics = TrainingDynamics.load(tmp_path / "out" / "confidence.jsonl")
    assert dynamics.probability.shape == (2, 9) and (dynamics.variance > 0).any()
    for folder in (tmp_path / "out", tmp_path / "out" / "sftmix"):
        assert len([f for f in folder.glob("checkpoint-*") if (f / "model.safetensors").exists()]) == 2
        saved = hf.AutoTokenizer.from_pretrained(next(folder.glob("checkpoint-*")))
        prompt = saved.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
        expected, _ = tokenizer.render_conversation([{"role": "user", "content": "Why?"}], "alpaca")
        assert list(prompt["input_ids"]) == expected
        generation = hf.GenerationConfig.from_pretrained(next(folder.glob("checkpoint-*")))
        assert generation.eos_token_id == tokenizer.stop_ids("alpaca")
    monkeypatch.setattr(
        sys, "argv", [*sys.argv, "--output_dir", str(tmp_path / "o"), "--label_smoothing_factor", "0.1"]
    )
    with pytest.raises(SystemExit, match="--label_smoothing_factor: "):
        runpy.run_path(str(SCRIPT), run_name="__main__")
