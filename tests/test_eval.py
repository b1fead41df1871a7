"""Held-out loss, exact match, multiple choice, their intervals, and the commands of eval.py."""

import fcntl
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_encoded, tiny_model

import eval as eval_module
from data import IGNORE_INDEX, Example, encode_example, encode_examples
from eval import (
    PLAIN,
    choice_report,
    encode_choice,
    evaluate,
    exact_match,
    format_question,
    held_out_loss,
    main,
    score_choices,
    split_last_turn,
    wilson_interval,
)
from infra.answers import read_prompt
from infra.generation import Sampling
from infra.hf import save_model
from infra.output import results_table
from infra.questions import Question, to_question


@torch.no_grad()
def test_every_token_weighs_the_same():
    """Two examples of 1 and 30 supervised tokens: the mean over 31 tokens, not the mean of two means."""
    model, encoded = tiny_model(), random_encoded([1, 30])
    encoded[1] = (encoded[1][0], torch.randint(0, 300, (30,)).int())
    nll = []
    for tokens, targets in encoded:
        log_p = model.logits(model(tokens.long())).log_softmax(-1)
        nll += [-float(log_p[n, y]) for n, y in enumerate(targets.tolist()) if y != IGNORE_INDEX]
    result = held_out_loss(model, encoded)
    assert (result["examples"], result["tokens"], len(nll)) == (2, 31, 31)
    assert result["loss"] == pytest.approx(np.mean(nll), rel=1e-5)


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


def test_exact_match_asks_for_the_whole_answer_and_its_end(tokenizer, monkeypatch):
    """Five answers to a prompt whose response is "the dog": right; right but for a new line; unended; longer; wrong."""
    the_dog, end = tokenizer.encode("the dog", add_prefix=False), [tokenizer.eos_id]
    new_line = tokenizer.encode("\n", add_prefix=False)
    answers = [the_dog + end, the_dog + new_line + end, the_dog, the_dog + the_dog + end, end]
    example = Example("x", [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the dog"}])
    asked = []

    def generate(model, prompts, max_new_tokens, stop_ids, batch_size):
        asked.append((prompts, max_new_tokens, stop_ids))
        return answers

    monkeypatch.setattr("eval.generate", generate)
    result = exact_match(tiny_model(), encode_examples([example] * 5, tokenizer, "alpaca", 1000), tokenizer, "alpaca")
    assert result == {"accuracy": 0.4, "accuracy_interval": wilson_interval(2, 5)}
    ((prompts, max_new_tokens, stop_ids),) = asked
    trained_on, _ = encode_example(example, tokenizer, "alpaca", 1000)
    assert prompts == [trained_on[: len(prompts[0])]] * 5 and tokenizer.decode(prompts[0]).endswith("### Response:\n")
    assert max_new_tokens > len(the_dog) and stop_ids == end


def test_the_prompts_of_a_batch_have_at_most_as_many_tokens_as_a_micro_batch(tokenizer, monkeypatch):
    example = Example("x", [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the dog"}])
    dataset = encode_examples([example] * 100, tokenizer, "alpaca", 1000)
    length = len(split_last_turn(*dataset[0])[0])
    sizes = []
    monkeypatch.setattr("eval.generate", lambda *args, batch_size: sizes.append(batch_size) or [[]] * 100)
    for tokens in (100 * length, 9 * length, length - 1):
        exact_match(tiny_model(), dataset, tokenizer, "alpaca", micro_batch_tokens=tokens)
    assert sizes == [64, 9, 1]


def test_exact_match_of_plain_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="plain texts among the examples"):
        text = encode_examples([Example("x", [{"role": "text", "content": "a"}])], tokenizer, "alpaca", 1000)
        exact_match(tiny_model(), text, tokenizer, "alpaca")


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
    result = evaluate(model, held_out, tokenizer, "alpaca", 1000)
    assert (result["accuracy"] is not None) == applies and result["loss"] > 0


# --- Multiple choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Q?", "options": {"A": "yes", "B": "no"}, "answer_idx": "B", "meta_info": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answer": 1, "subject": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answer": "B", "subject": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answer": "B", "answer_index": 1, "subject": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answerKey": "B", "answer": "because", "subject": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answer": "no", "answer_index": 1, "subject": "s"},
        {"question": "Q?", "choices": ["yes", "no"], "answer": "no", "category": "s"},
        {"question": "Q?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "B", "subject": "s"},
        {"question": "Q?", "choices": {"text": ["yes", "no"], "label": ["1", "2"]}, "answerKey": "2", "subject": "s"},
        {"question": "Q?", "options": {"1": "yes ", "2": "no"}, "answer": 2, "subject": "s"},
        {"question": "Q?", "choices": {"text": ["yes", "no"], "label": [1, 2]}, "answerKey": 2, "subject": "s"},
        {"question": "Q?", "options": {"A": "yes", "B": "no", "C": None}, "answer_idx": "B", "meta_info": "s"},
        {
            "question": "Q?",
            "options": None,
            "choices": ["yes", "no"],
            "answer_idx": None,
            "answer": "B",
            "subject": "s",
        },
    ],
)
def test_questions_are_read_however_they_tell_the_answer(record):
    assert to_question(record) == Question("Q?", ["yes", "no"], 1, "s")


@pytest.mark.parametrize(
    "choices, answer",
    [
        *((["A. yes", "B. no"], answer) for answer in ("B. no", "no", "B", 1)),
        *((["(A) yes", "(B) no"], "B"), (["A) yes", "B) no"], 1), ({"A": "A: yes", "B": "B: no"}, "B")),
    ],
)
def test_letters_before_choices_are_no_part_of_them(choices, answer):
    record = {"question": "Q?", "choices": choices, "answer": answer}
    assert to_question(record) == Question("Q?", ["yes", "no"], 1, None)
    record["choices"] = ["A. yes", "no"]
    assert to_question(record | {"answer": 1}).choices == ["A. yes", "no"]


def test_questions_are_read_by_index_where_choices_are_numbers_as_texts():
    """As in MMLU and MMLU-Pro."""
    for answer in ({"answer": 2}, {"answer": "C", "answer_index": 2}):
        assert to_question({"question": "1+2?", "choices": ["1", "2", "3", "4"], **answer}).answer == 2


@pytest.mark.parametrize(
    "record, message",
    [
        ({"question": "Q?"}, "question and options"),
        (
            {"question": "Q?", "choices": {"1": "yes", "2": "no"}, "answer": 1},
            "answer 1 may be a label, an index or the text",
        ),
        ({"question": "Q?", "choices": ["yes"], "answer": 0}, "2 to 10 texts"),
        ({"question": "Q?", "choices": ["yes", ""], "answer": 0}, "choice B is empty"),
        ({"question": "Q?", "choices": ["yes", "no"], "answer": 2}, "answer 2 is none of the choices"),
        ({"question": "1+1?", "choices": [1, 2, 3], "answer": 2}, "answer 2 may be a label, an index or the text"),
        (
            {"question": "Q?", "options": {"A": "yes", "B": "no"}, "answer_idx": "A", "answer": "no"},
            "the answer is both 'yes' and 'no'",
        ),
        (
            {"question": "Q?", "choices": ["yes", "no"], "answer": "A", "answer_index": 1},
            "the answer is both 'yes' and 'no'",
        ),
        ({"question": "Q?", "choices": ["yes", "no"], "answer": True}, "answer True is none"),
        (
            {"question": "Q?", "choices": ["yes", "no"]},
            "one of answer_idx, answer_index, answer, answerKey is expected",
        ),
    ],
)
def test_questions_that_are_none_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        to_question(record)


QUESTIONS = [
    Question("What is it?", ["the quick dog", "a fox"], 1, "one"),
    Question("What sleeps on?", ["the lazy dog", "dog", "the fox jumps over it"], 0, "two"),
]


@torch.no_grad()
@pytest.mark.parametrize("by", ["letter", "text"])
@pytest.mark.parametrize("template", [PLAIN, "alpaca"])
def test_scores_of_choices_equal_the_formulas_written_out(tokenizer, by, template):
    """Σ log p of an answer's tokens, its end left out; by text, divided by its number of characters."""
    model = tiny_model(tokenizer.vocab_size, max_position_embeddings=512)
    scores, cut = score_choices(model, QUESTIONS, tokenizer, template, by, micro_batch_tokens=100)
    for question, score in zip(QUESTIONS, scores, strict=True):
        listed = "".join(f"{'ABC'[i]}. {choice}\n" for i, choice in enumerate(question.choices))
        asked = f"Question: {question.text}\n{listed if by == 'letter' else ''}Answer:"
        for number, choice in enumerate(question.choices):
            answer = "ABC"[number] if by == "letter" else choice
            prompt, ids = encode_choice(tokenizer, template, asked, answer)
            log_p = model.logits(model(torch.tensor(prompt + ids))).log_softmax(-1)
            total = sum(float(log_p[len(prompt) - 1 + n, token]) for n, token in enumerate(ids))
            assert score[number] == pytest.approx(total / (1 if by == "letter" else len(choice)), rel=1e-4)
            whole = tokenizer.decode(prompt + ids)
            assert whole.endswith(f"{asked} {answer}" if template == PLAIN else f"{asked}\n\n### Response:\n{answer}")
            assert prompt.count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in prompt + ids
    assert cut == 0


@torch.no_grad()
def test_of_a_long_prompt_the_beginning_is_cut_off(tokenizer):
    short = tiny_model(tokenizer.vocab_size, max_position_embeddings=20)
    scores, cut = score_choices(short, QUESTIONS, tokenizer, PLAIN)
    assert cut == 2
    with pytest.raises(ValueError, match=r"question 1: an answer of \d+ tokens is longer than the model's 20"):
        score_choices(short, [Question("?", ["the dog " * 30, "a"], 0, None)], tokenizer, PLAIN, "text")
    prompt, (letter,) = encode_choice(tokenizer, PLAIN, format_question(QUESTIONS[0], "letter")[0], "B")
    last = short.logits(short(torch.tensor(prompt[-20:]))[-1]).log_softmax(-1)
    assert scores[0][1] == pytest.approx(float(last[letter]), rel=1e-4)


def test_a_report_of_choices_by_hand():
    questions = [Question("?", ["x", "y", "z"], answer, subject) for answer, subject in ((0, "p"), (1, "p"), (1, "q"))]
    report = choice_report(questions, [0, 0, 1])
    assert report["accuracy"] == 2 / 3 and report["accuracy_interval"] == wilson_interval(2, 3)
    assert {name: entry["accuracy"] for name, entry in report["subjects"].items()} == {"p": 0.5, "q": 1.0}
    assert report["positions"] == {
        "A": {"correct": 1, "chosen": 2, "accuracy": 1.0},
        "B": {"correct": 2, "chosen": 1, "accuracy": 0.5},
        "C": {"correct": 0, "chosen": 0, "accuracy": None},
    }


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, initializer_range=0.4)
    save_model(model, tmp_path / "m", tokenizer.files_for("alpaca"))
    return tmp_path / "m"


def printed(capsys, *arguments):
    main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_choice_prints_a_report_and_writes_a_line_a_question(model_folder, tmp_path, capsys):
    records = [{"question": q.text, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    (tmp_path / "q.json").write_text(json.dumps(records))
    given = ["choice", "--model", model_folder, "--data", tmp_path / "q.json", "--by", "text", "--dtype", "fp32"]
    report = json.loads(printed(capsys, *given, "--template", "plain", "--output", tmp_path / "o"))
    lines = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["B", "A"] and [len(line["scores"]) for line in lines] == [2, 3]
    assert report["accuracy"] == np.mean([line["choice"] == line["answer"] for line in lines])
    assert (report["questions"], report["by"], report["template"]) == (2, "text", "plain")


def test_a_label_that_is_the_text_of_another_choice_is_noted():
    question = to_question({"question": "Q?", "choices": ["O", "A", "B"], "answer": "A", "id": ""})
    assert question.answer == 0
    assert question.notes == ("answer taken for a label, though it is the text of another choice",)


def test_a_label_that_is_the_text_of_another_choice_is_told_by_another_key():
    """As in MedQA, whose choices may be letters in a figure."""
    choices = {"A": "B", "B": "C", "C": "D", "D": "E"}
    question = to_question({"question": "Q?", "options": choices, "answer_idx": "A", "answer": "B"})
    assert question == Question("Q?", ["B", "C", "D", "E"], 0, None)


@pytest.mark.parametrize("command, more", [("choice", {"choices": ["a", "b"], "answer": 0}), ("generate", {})])
def test_keys_that_are_not_asked_are_named(model_folder, tmp_path, capsys, command, more):
    (tmp_path / "q.json").write_text(json.dumps([{"question": "the dog?", "article": "a fox", **more}] * 2))
    flags = ["--max_new_tokens", 1] if command == "generate" else []
    eval_module.main([str(word) for word in [command, "--model", model_folder, "--data", tmp_path / "q.json", *flags]])
    assert "q.json: ignored keys: article (in 2) of 2 records" in capsys.readouterr().err


ASKED = {
    "jsonl": [{"prompt": "the dog"}, {"turns": ["what is it", "and then?"]}, {"instruction": "a", "input": "fox"}],
    "alpaca_eval": [{"dataset": "d", "instruction": f"the {word}"} for word in ("dog", "fox", "lazy")],
    "mt_bench": [
        {"question_id": 80 + n, "category": category, "turns": ["the fox", "and the dog?"]}
        for n, category in enumerate(("math", "writing", "stem"))
    ],
}


def test_flags_of_sampling_without_sampling_are_refused(tmp_path, capsys):
    given = ["generate", "--model", tmp_path, "--data", tmp_path / "q.json"]
    for more in (["--seed", 1], ["--top_p", 0.9], ["--top_p", 0.9, "--temperature", 0]):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in (*given, *more)])
        assert "--top_p and --seed: are for sampling" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat", "--model", str(tmp_path), "--temperature", "0", "--seed", "1"])
    assert "--top_p and --seed: are for sampling" in capsys.readouterr().err


@pytest.mark.parametrize("form", ASKED)
def test_answers_are_written_in_each_format_and_gone_on_with_when_stopped(
    model_folder, tmp_path, capsys, form, monkeypatch
):
    """Stopped twice after a batch, with half a line of the next, it ends with the same answers."""
    (tmp_path / "q.json").write_text(json.dumps(ASKED[form]))
    given = ["generate", "--model", model_folder, "--data", tmp_path / "q.json", "--format", form, "--batch_size", 1]
    given += ["--max_new_tokens", 6, "--dtype", "fp32", "--output"]

    def read_output(capsys):
        out, err = capsys.readouterr()
        return json.loads(out), [line for line in err.splitlines() if "truncated" in line]

    main([str(argument) for argument in (*given, tmp_path / "whole")])
    summary, (truncated,) = read_output(capsys)
    assert summary["records"] == 3 and not (tmp_path / "whole.answered").exists()

    def read(path):
        text = path.read_text()
        records = json.loads(text) if form == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]
        return [{key: value for key, value in record.items() if key != "tstamp"} for record in records]

    real, calls = eval_module.answer_turns, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    for _ in range(2):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(eval_module, "answer_turns", stopped)
            printed(capsys, *given, tmp_path / "o")
        with open(tmp_path / "o.answered", "a") as file:
            file.write('{"number": 2, "ans')
    with pytest.raises(SystemExit):
        printed(capsys, *given, tmp_path / "o", "--max_new_tokens", 5)
    assert "o.answered: begun with max_new_tokens 6, not 5" in capsys.readouterr().err
    (tmp_path / "q.json").write_text(json.dumps(ASKED[form][::-1]))
    with pytest.raises(SystemExit):
        printed(capsys, *given, tmp_path / "o")
    assert "o.answered: begun with data of other content" in capsys.readouterr().err
    (tmp_path / "q.json").write_text(json.dumps(ASKED[form]))
    main([str(argument) for argument in (*given, tmp_path / "o")])
    assert read(tmp_path / "o") == read(tmp_path / "whole") and read_output(capsys)[1] == [truncated]
    first = read(tmp_path / "whole")[0]
    if form == "alpaca_eval":
        assert list(first) == ["dataset", "instruction", "output", "generator"] and first["generator"] == "m"
    elif form == "mt_bench":
        assert list(first) == ["question_id", "answer_id", "model_id", "choices"]
        assert len(first["choices"][0]["turns"]) == 2 and first["question_id"] == 80
    else:
        assert [m["role"] for m in read(tmp_path / "whole")[1]["messages"]] == ["user", "assistant"] * 2
    with pytest.raises(SystemExit):
        printed(capsys, *given, tmp_path / "o")
    assert "already there" in capsys.readouterr().err


def test_a_second_turn_is_asked_after_the_first_answer(tokenizer, monkeypatch):
    asked = []

    def generate(model, prompts, *args, **kwargs):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [[*tokenizer.encode("it sleeps", add_prefix=False), tokenizer.eos_id] for _ in prompts]

    monkeypatch.setattr(eval_module, "generate", generate)
    two = read_prompt({"turns": ["the dog?", "and the fox?"]}, "jsonl")
    answers = eval_module.answer_turns(tiny_model(), [two], tokenizer, "alpaca", 9, Sampling())
    assert answers == [(["it sleeps", "it sleeps"], 0)]
    assert asked[1] == asked[0] + "it sleeps" + "\n\n### Instruction:\nand the fox?\n\n### Response:\n"


def test_a_conversation_too_long_for_the_model_is_told(tokenizer, capsys):
    asked = [read_prompt({"prompt": text}, "jsonl") for text in ("the dog", "the dog " * 300)]
    model = tiny_model(tokenizer.vocab_size, max_position_embeddings=512)
    answers = eval_module.answer_turns(model, asked, tokenizer, "alpaca", 3, Sampling())
    assert (
        answers[1] == ([""], 0)
        and answers[0].num_truncated == 1
        and "1 prompts are too long for the model" in capsys.readouterr().err
    )


def test_an_answer_ends_before_the_space_of_its_template(tokenizer):
    _, ids = encode_choice(tokenizer, "llama2", "the dog?", "A")
    assert tokenizer.decode(ids).strip() == "A" and tokenizer.decode(ids[-1:]).strip()


@pytest.mark.parametrize(
    "content", ["[]", "\xff", '{}\n{"number": 0, "answers": "ab"}', '{}\n{"number": 7, "answers": ["x"]}']
)
def test_damaged_answers_are_told(model_folder, tmp_path, capsys, content):
    (tmp_path / "q.json").write_text(json.dumps(ASKED["jsonl"]))
    (tmp_path / "o.answered").write_bytes(content.encode("latin-1") + b"\n")
    given = ["generate", "--model", model_folder, "--data", tmp_path / "q.json", "--output", tmp_path / "o"]
    with pytest.raises(SystemExit):
        printed(capsys, *given)
    assert "o.answered: " in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_file_that_is_no_progress_file_stays_as_it_is(model_folder, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps(ASKED["jsonl"]))
    (tmp_path / "o.answered").write_text('{"mine": 1}\n{"and": 2}')
    with pytest.raises(SystemExit):
        given = ["generate", "--model", model_folder, "--data", tmp_path / "q.json", "--output", tmp_path / "o"]
        printed(capsys, *given)
    assert (tmp_path / "o.answered").read_text() == '{"mine": 1}\n{"and": 2}'


def test_one_run_at_a_time_keeps_answers_in_a_file(model_folder, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps(ASKED["jsonl"]))
    given = ["generate", "--model", model_folder, "--data", tmp_path / "q.json", "--output", tmp_path / "o"]
    with open(tmp_path / "o.answered", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            printed(capsys, *given)
        assert "o.answered: another run is at work on it" in capsys.readouterr().err
    printed(capsys, *given, "--max_new_tokens", 3)


def test_other_settings_are_no_error_before_the_first_answer(model_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.json").write_text(json.dumps(ASKED["jsonl"]))
    given = ["generate", "--model", model_folder, "--data", tmp_path / "q.json", "--output", tmp_path / "o"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(eval_module, "answer_turns", lambda *_: sys.exit(1))
        printed(capsys, *given)
    assert (tmp_path / "o.answered").read_text().count("\n") == 1
    printed(capsys, *given, "--max_new_tokens", 3)


@pytest.mark.parametrize("command", ["choice", "generate"])
def test_an_output_without_a_name_is_told(model_folder, tmp_path, capsys, command):
    with pytest.raises(SystemExit):
        printed(capsys, command, "--model", model_folder, "--data", tmp_path / "q.json", "--output", "")
    assert "--output '': names no file" in capsys.readouterr().err


def test_a_question_asked_twice_of_a_judge_is_told(model_folder, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps([{"question_id": 81, "turns": ["the dog?"]}] * 2))
    given = ["--model", model_folder, "--data", tmp_path / "q.json", "--output", tmp_path / "o"]
    with pytest.raises(SystemExit):
        printed(capsys, "generate", *given, "--format", "mt_bench")
    assert "question_id 81 stands there more than once" in capsys.readouterr().err


@pytest.mark.parametrize("form, key", [("jsonl", "id"), ("alpaca_eval", "dataset"), ("mt_bench", "question_id")])
def test_ids_of_parquet_files_are_written(model_folder, tmp_path, capsys, form, key):
    pyarrow = pytest.importorskip("pyarrow", reason="reads parquet with pyarrow, which is not installed")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({key: [b"id"], "instruction": ["the dog?"]}), tmp_path / "q.parquet")
    given = ["--model", model_folder, "--data", tmp_path / "q.parquet", "--output", tmp_path / "o", "--format", form]
    printed(capsys, "generate", *given, "--max_new_tokens", 1)
    (record,) = json.loads(f"[{(tmp_path / 'o').read_text().strip().strip('[]')}]")
    assert record[key] == "aWQ="


def test_chat_remembers_until_an_empty_line(model_folder, capsys, monkeypatch, tokenizer):
    lines, prompts, real = iter(["the dog", "\udcff", "and then?", "", "the dog"]), [], eval_module.decode_batch

    def read_line(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def spied(model, given, *more):
        prompts.append(tokenizer.decode(given[0]))
        assert more[0] == model.config.max_length  # random numbers are drawn for so many tokens
        return real(model, given, 5, *more[1:])

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(eval_module, "decode_batch", spied)
    given = ("--model", model_folder, "--max_new_tokens", 10**13, "--dtype", "fp32")
    said = printed(capsys, "chat", *given).splitlines()
    assert prompts[1].startswith(prompts[0]) and "and then?" in prompts[1] and prompts[2] == prompts[0]
    assert len(said) >= 3 and said[-1].strip() != said[0].strip()  # another answer is sampled


def test_one_example_has_no_interval():
    assert held_out_loss(tiny_model(), random_encoded([9]))["loss_interval"] is None


def test_table_sets_models_side_by_side():
    base = {"loss": 2.0, "loss_interval": [1.5, 2.5], "accuracy": None, "accuracy_interval": None, "seconds": None}
    ntp = {"loss": 1.0, "loss_interval": [0.5, 1.5], "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "seconds": 12.3}
    head, one, other = results_table({"base": base, "NTP": ntp}).splitlines()
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


def test_an_evaluation_does_not_import_the_compiler(model_folder, tmp_path):
    """`torch._dynamo` takes a second to import, about half of the time that a script needs to start."""
    (data := tmp_path / "data.jsonl").write_text('{"prompt": "What is it?", "completion": "A dog."}\n')
    command = ["perplexity", "--model", str(model_folder), "--data", str(data), "--cache", str(tmp_path)]
    script = f"import sys, eval; eval.main({command}); print('torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[1:] == ["False"]


def test_a_flag_of_another_command_is_not_suggested(capsys):
    with pytest.raises(SystemExit):
        main(["choice", "--model", "m", "--data", "d", "--skip_bad_records"])
    assert capsys.readouterr().err.endswith("unknown flag --skip_bad_records; --help lists the flags\n")
