"""Held-out loss, generation, exact match and their intervals."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import random_encoded, tiny_model

from data import IGNORE_INDEX, Example, encode_example, encode_examples
from eval import evaluate, exact_match, generate, held_out_loss, main, table, wilson_interval
from model import save_model


@torch.no_grad()
def test_every_token_weighs_the_same():
    """Two examples of 1 and 30 supervised tokens: the mean over 31 tokens, not the mean of two means."""
    model, encoded = tiny_model(), random_encoded([1, 30])
    encoded[1] = (encoded[1][0], torch.randint(0, 300, (30,)).int())
    nats = []
    for tokens, targets in encoded:
        log_p = model.logits(model(tokens.long())).log_softmax(-1)
        nats += [-float(log_p[n, y]) for n, y in enumerate(targets.tolist()) if y != IGNORE_INDEX]
    result = held_out_loss(model, encoded)
    assert (result["examples"], result["tokens"], len(nats)) == (2, 31, 31)
    assert result["loss"] == pytest.approx(np.mean(nats), rel=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 33, 1000])
def test_loss_does_not_depend_on_batches(micro_batch_tokens):
    model, encoded = tiny_model(), random_encoded([3, 30, 12, 7, 22])
    assert held_out_loss(model, encoded, micro_batch_tokens)["loss"] == pytest.approx(
        held_out_loss(model, encoded)["loss"], rel=1e-6
    )


def test_the_loss_interval_covers_as_often_as_it_says():
    """Half of the examples drawn again and again: about 95 % of the intervals hold the mean of all."""
    model, encoded = tiny_model(), random_encoded(np.random.default_rng(0).integers(2, 12, 400).tolist())
    whole = held_out_loss(model, encoded)["loss"]
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        low, high = held_out_loss(model, [encoded[i] for i in rng.integers(0, 400, 60)])["loss_interval"]
        hits += low <= whole <= high
    assert hits >= 50


def test_wilson_interval_by_hand():
    low, high = wilson_interval(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1


@torch.no_grad()
def test_generation_is_greedy_and_independent_of_the_batch():
    model = tiny_model(initializer_range=0.5)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.logits(model(torch.tensor(ids))[-1]).argmax()))
        expected.append(ids[len(prompt) :])
    for batch_size in (1, 3, 64):
        assert generate(model, prompts, 12, batch_size=batch_size) == expected
    stop = expected[0][5]
    assert generate(model, prompts, 12, [stop])[0] == expected[0][: expected[0].index(stop) + 1]
    assert generate(model, prompts, 0) == [[], [], [], []] and generate(model, [], 5) == []


@pytest.mark.parametrize("limit", [{"max_position_embeddings": 20}, {"model_type": "mistral", "sliding_window": 20}])
def test_generation_ends_where_the_model_does(limit):
    """Tokens 0 to 19 have positions: 20 tokens, and one more that the last of them predicts."""
    model = tiny_model(**limit)
    prompts = [list(range(3, 3 + n)) for n in (5, 18, 20)]
    assert [len(answer) for answer in generate(model, prompts, 30)] == [16, 3, 1]
    assert [len(answer) for answer in generate(model, prompts, 30, batch_size=1)] == [16, 3, 1]


def test_exact_match_asks_for_the_whole_answer_and_its_end(tokenizer, monkeypatch):
    """Five answers to a prompt whose response is "the dog": right; right but for a new line; unended; longer; wrong."""
    the_dog, end = tokenizer.encode("the dog", continues=True), [tokenizer.eos_id]
    new_line = tokenizer.encode("\n", continues=True)
    answers = [the_dog + end, the_dog + new_line + end, the_dog, the_dog + the_dog + end, end]
    example = Example("x", [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the dog"}])
    asked = []

    def generate(model, prompts, max_new_tokens, stop_ids, dtype):
        asked.append((prompts, max_new_tokens, stop_ids))
        return answers

    monkeypatch.setattr("eval.generate", generate)
    result = exact_match(tiny_model(), [example] * 5, tokenizer, "alpaca")
    assert result == {"accuracy": 0.4, "accuracy_interval": wilson_interval(2, 5)}
    ((prompts, max_new_tokens, stop_ids),) = asked
    trained_on, _ = encode_example(example, tokenizer, "alpaca", 1000)
    assert prompts == [trained_on[: len(prompts[0])]] * 5 and tokenizer.decode(prompts[0]).endswith("### Response:\n")
    assert max_new_tokens > len(the_dog) and stop_ids == end


def test_exact_match_of_plain_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="plain texts among the examples"):
        exact_match(tiny_model(), [Example("x", [{"role": "text", "content": "a"}])], tokenizer, "alpaca")


@pytest.mark.parametrize(
    "examples, max_length, applies",
    [
        ([("who?", "the dog")], 300, True),
        ([("who?", "the dog"), ("who?", "the dog " * 40)], 300, False),  # too long to be asked for word for word
        ([("who?", "the dog is a dog")], -2, False),  # cut short
        ([(None, "the dog")], 300, False),  # plain text
    ],
)
def test_exact_match_is_asked_where_it_applies(tokenizer, examples, max_length, applies):
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        if prompt
        else [{"role": "text", "content": response}]
        for prompt, response in examples
    ]
    examples = [Example(str(i), turns) for i, turns in enumerate(messages)]
    if max_length < 0:
        max_length += len(encode_example(examples[0], tokenizer, "alpaca", 1000)[0])
    held_out = encode_examples(examples, tokenizer, "alpaca", max_length)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    result = evaluate(model, held_out, lambda: examples, tokenizer, "alpaca", 1000, "fp32")
    assert (result["accuracy"] is not None) == applies and result["loss"] > 0


def test_one_example_has_no_interval():
    assert held_out_loss(tiny_model(), random_encoded([9]))["loss_interval"] is None


def test_table_sets_models_side_by_side():
    base = {"loss": 2.0, "loss_interval": [1.5, 2.5], "accuracy": None, "accuracy_interval": None, "seconds": None}
    ntp = {"loss": 1.0, "loss_interval": [0.5, 1.5], "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "seconds": 12.3}
    head, one, other = table({"base": base, "NTP": ntp}).splitlines()
    assert "held-out loss" in head and "exact match" in head
    assert one.split() == ["base", "2.0000", "[1.5000,", "2.5000]", "–", "–"]
    assert other.split() == ["NTP", "1.0000", "[0.5000,", "1.5000]", "50.0%", "[40.0%,", "60.0%]", "12", "s"]


def test_the_command_line_prints_json(tmp_path, tokenizer, capsys):
    save_model(
        tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512),
        tmp_path / "m",
        tokenizer.files_for("alpaca"),
    )
    (tmp_path / "d.jsonl").write_text(
        '{"instruction": "a", "output": "the dog"}\n{"instruction": "b", "output": "fox"}\n'
    )
    main(["perplexity", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl")])
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"])) and result["examples"] == 2
    main(["match", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0


def test_greedy_text_equals_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    model = tiny_model(initializer_range=0.5)
    save_model(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    prompt = [1, 5, 6, 7]
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60, eos_token_id=None)
    assert generate(model, [prompt], 60)[0] == expected[0, 4:].tolist()
