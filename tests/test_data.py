"""Formats, encoding, packing, who is trained on when, and the demo corpus."""

import gzip
import json
import multiprocessing
import os
import select
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import random_encoded

import infra.cache
import infra.records
from data import (
    IGNORE_INDEX,
    Dataset,
    Example,
    balanced_partitions,
    build_batch,
    encode_example,
    encode_examples,
    epoch_order,
    load_examples,
    pack,
    paired_order,
    sample_lambda,
    to_example,
)
from infra.cache import _init_worker, cache_path, encode_files, load_cache, load_dataset
from infra.demo import demo_corpus
from infra.distributed import prefetch
from infra.formats import to_prompt
from tokenizer import TEMPLATES, Tokenizer, _segments

TURN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
FORMATS = {
    "alpaca": {"instruction": "Why?", "input": "", "output": "So."},
    "alpaca without input": {"instruction": "Why?", "output": "So.", "text": "ignored"},
    "alpaca merged with others": {
        "messages": None,
        "instruction": "Why?",
        "input": None,
        "output": "So.",
        "text": None,
    },
    "dolly": {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
    "prompt": {"prompt": "Why?", "completion": "So."},
    "trl": {"prompt": TURN[:1], "completion": TURN[1:]},
    "prompt and response": {"prompt": "Why?", "response": "So."},
    "query": {"query": "Why?", "response": "So.", "history": []},
    "question": {"question": "Why?", "answer": "So."},
    "messages": {"messages": TURN, "prompt": "ignored", "prompt_id": 3},
    "messages of from and value": {"messages": [{"from": "human", "value": "Why?"}, {"from": "bard", "value": "So."}]},
    "nanochat": TURN,
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURN]},
    "sharegpt": {"id": "x", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "conversations of roles": {"conversations": TURN},
    "conversation": {"conversation": TURN},
    "lima": {"conversations": ["Why?", "So."], "source": "x"},
    "ultrachat": {"id": "0", "data": ["Why?", "So."]},
    "first turn the assistant's": {"messages": [{"role": "assistant", "content": "Hi."}, *TURN]},
    "turns merged with others": {
        "messages": [{**{"from": None, "value": None, "weight": None, "tool_calls": None}, **turn} for turn in TURN],
    },
    "turns of another merger": {
        "conversations": [
            {"role": None, "content": None, "from": "human", "value": "Why?"},
            {"role": None, "content": None, "from": "gpt", "value": "So."},
        ],
    },
    "turns with columns of pairs": {
        "messages": [{**{"input": None, "output": None}, **turn} for turn in TURN],
    },
    "last turn the user's": {"messages": [*TURN, {"role": "user", "content": "Thanks."}]},
    "system empty": {"messages": [{"role": "system", "content": ""}, *TURN]},
}


def write_lines(path, *records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


# --- Formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_told_apart_by_their_keys(tmp_path, name):
    lines = write_lines(tmp_path / "d.jsonl", FORMATS[name])
    (tmp_path / "d.json").write_text(json.dumps([FORMATS[name]]))
    (one,), (other,) = load_examples(lines), load_examples(tmp_path / "d.json")
    assert one.messages == other.messages == TURN and one.id == other.id


def test_text_and_input(tmp_path):
    text, with_input = load_examples(
        write_lines(tmp_path / "d.jsonl", {"text": "Once."}, {"instruction": "Sum.", "input": "It.", "output": "I."})
    )
    assert text.messages == [{"role": "text", "content": "Once."}]
    assert with_input.messages[0]["content"] == "Sum.\n\n### Input:\nIt."


def test_multi_turn_with_system(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, *TURN, *TURN]
    (example,) = load_examples(write_lines(tmp_path / "d.jsonl", {"messages": messages}))
    assert example.messages == messages


def test_ids_come_from_the_content_and_repeats_are_counted(tmp_path):
    a, b = FORMATS["alpaca"], {"text": "Once."}
    one = [e.id for e in load_examples(write_lines(tmp_path / "one.jsonl", a, b, a, a))]
    other = [e.id for e in load_examples(write_lines(tmp_path / "two.jsonl", b, a))]
    assert one == [other[1], other[0], f"{other[1]}-2", f"{other[1]}-3"]


def test_bom_crlf_blank_lines_and_line_separators_are_fine(tmp_path):
    record = json.dumps({"text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{record}\r\n\r\n{record}".encode())
    assert [e.messages[0]["content"] for e in load_examples(tmp_path / "d.jsonl")] == ["one\u2028two"] * 2


@pytest.mark.parametrize("empty", ["nan", "<noinput>", " ", None, float("nan"), []])
def test_what_stands_for_no_input_is_none(empty):
    record = {"instruction": "Why?", "input": empty, "output": "So."}
    assert to_example(record).messages == TURN and to_example(record).notes == ()
    example = to_example(record | {"context": "Facts."})
    assert example.messages[0]["content"] == "Why?\n\n### Input:\nFacts." and example.notes == ()


@pytest.mark.parametrize("empty", ["", " ", [], {}])
def test_an_empty_column_of_merged_data_is_passed_over(empty):
    record = {"instruction": "Why?", "output": "So.", "input": empty, "context": empty, "history": empty}
    example = to_example(record | {"system": empty, "topic": empty})
    assert example.messages == TURN and example.notes == ()


def test_system_and_history_of_any_format_come_first():
    system = {"role": "system", "content": "Be brief."}
    earlier = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    for name in ("alpaca", "sharegpt", "query", "lima"):
        record = FORMATS[name] | {"system": "Be brief.", "history": [["a", "b"], ["c", "d"]]}
        assert to_example(record).messages == [system, *earlier, *TURN]
    assert to_example({"messages": [{"role": "developer", "content": "Be brief."}, *TURN]}).messages == [system, *TURN]
    with_turn = {"messages": [system, *TURN], "history": [["a", "b"], ["c", "d"]]}
    assert to_example(with_turn).messages == [system, *earlier, *TURN]
    with pytest.raises(ValueError, match="system is given twice"):
        to_example({"system": "x", "messages": [system, *TURN]})
    asked = {"turns": ["Why?", "And?"], "system": "Be brief.", "history": [["a", "b"], ["c", "d"]]}
    assert to_prompt(asked) == ([system, *earlier], ["Why?", "And?"], [])


@pytest.mark.parametrize(
    "record, prompt, ignored",
    [
        ({"instruction": "Answer it.", "question": "Who?", "answer": "Me."}, "Who?", ["instruction"]),
        ({"instruction": "Answer it.", "prompt": "Who?", "completion": "Me."}, "Who?", ["instruction"]),
        ({"messages": TURN, "id": 3}, "Why?", []),
        ({"prompt": TURN[:1], "completion": TURN[1:]}, "Why?", []),
    ],
)
def test_the_prompt_to_answer_is_the_one_that_is_trained_on(record, prompt, ignored):
    assert to_prompt(record) == ([], [prompt], [f"ignored key {key}" for key in ignored])
    assert to_example(record).messages[0]["content"] == prompt


def test_a_prompt_needs_no_response():
    asked = {"question": "Who?", "answer": "", "passage": "Long ago"}
    assert to_prompt(asked) == ([], ["Who?"], ["ignored key passage"])
    assert to_prompt({"instruction": "Answer it.", "prompt": "Who?"}) == ([], ["Answer it."], ["ignored key prompt"])


def test_pairs_of_input_and_output_keep_their_marks():
    first = {
        "system": "Be brief.",
        "input": "Why?",
        "output": "So.",
        "output_with_loss": False,
        "content": "x",
        "tone": "dry",
    }
    example = to_example({"conversation": [first, {"input": "And?", "output": "No.", "system": "Late."}]})
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    assert example.notes == ("ignored key conversation[].tone", "ignored key conversation[].system")


def test_template_tokens_and_white_space_before_an_answer_are_noted():
    record = {"prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "completion": "So."}
    assert to_example(record).notes == ("tokens of a chat template spelled out in a text, taken as plain text",)
    for before, notes in (("    ", 1), ("\n    ", 1), ("\u3000", 1), ("\n\n", 0)):
        code = {"prompt": " def f():", "completion": f"{before}return 1\n"}
        assert to_example(code).notes == ("white space before an answer left out",) * notes


def test_of_lists_of_parts_only_texts_are_joined():
    parts = [{"type": "text", "text": "S"}, {"type": "output_text", "text": "o."}]
    assert to_example({"prompt": "Why?", "completion": parts}).messages == TURN
    for part in ({"text": "So."}, {"type": None, "text": "So."}):
        assert to_example({"prompt": "Why?", "completion": [part]}).messages == TURN
    for part in ({"type": "reasoning", "text": "hm"}, {"type": "image", "text": ""}, {"text": "another answer"}):
        with pytest.raises(ValueError, match=f"completion has a part of type {part.get('type')!r}; only texts"):
            to_example({"prompt": "Why?", "completion": [part, parts[1]]})


def test_turns_of_a_prompt_are_not_learned():
    """As TRL has it: of a prompt and its completion, the completion is learned."""
    for weight in ({}, {"weight": None}):  # a parquet file has a null for each turn
        prompt = [turn | weight for turn in (*TURN, TURN[0])]
        messages = to_example({"prompt": prompt, "completion": [TURN[1]]}).messages
        assert [message.get("weight", 1) for message in messages if message["role"] == "assistant"] == [0, 1]


def test_what_a_second_name_of_a_turn_says_is_noted():
    asked = {"from": "human", "value": "Why?", "content": "Why?"}
    assert to_example({"conversations": [asked, TURN[1]]}).notes == ()
    assert to_example({"conversations": [asked | {"value": "How?"}, TURN[1]]}).notes == (
        "ignored key conversations[].value",
    )


def test_several_user_turns_to_answer():
    for key in ("turns", "prompt"):
        assert to_prompt({key: ["Why?", "And?", "So?"], "category": ""}) == ([], ["Why?", "And?", "So?"], [])
    for key in ("data", "conversations", "messages"):  # the second text is the assistant's
        assert to_prompt({key: ["Why?", "So."]}) == ([], ["Why?"], [])
        assert to_prompt({key: ["Why?", "So."], "turns": 1}) == ([], ["Why?"], ["ignored key turns"])


@pytest.mark.parametrize(
    "empty",
    [
        {"messages": []},
        {"prompt": "", "completion": " "},
        {"input": "", "response": "", "system": " ", "system_prompt": "\n"},
        {"instruction": "Why?", "output": "", "response": "So."},
    ],
)
def test_an_empty_column_of_merged_data_is_no_value(empty):
    assert to_example({"instruction": "Why?", "output": "So."} | empty).messages == TURN
    assert to_example({"messages": [{"role": "system", "content": " "}, *TURN]}).messages == TURN


def test_context_is_read_beside_an_empty_input():
    record = {"instruction": "Why?", "input": "", "output": "", "context": "It rains.", "response": "So."}
    assert to_example(record).messages[0]["content"] == "Why?\n\n### Input:\nIt rains."


def test_numbers_are_texts():
    messages = to_example({"instruction": 2, "input": 0.5, "output": True}).messages
    assert [message["content"] for message in messages] == ["2\n\n### Input:\n0.5", "true"]


@pytest.mark.parametrize("key, marks", [("weight", (0, 1)), ("train", (False, True)), ("loss_mask", (0.0, None))])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_turn_marked_as_not_to_be_learned_is_context_only(tokenizer, name, key, marks):
    turns = [TURN[0], TURN[1] | {key: marks[0]}, TURN[0], TURN[1] | {key: marks[1]}]
    example = to_example({name: turns})
    ids, mask = tokenizer.render_conversation(example.messages, "alpaca")
    all_ids, all_mask = tokenizer.render_conversation([*TURN, *TURN], "alpaca")
    assert ids == all_ids and sum(mask) == sum(all_mask) / 2 and mask[-2:] == all_mask[-2:]
    assert example.id != to_example({name: [*TURN, *TURN]}).id
    cuts, all_cuts = ([s.text for s in _segments(m, TEMPLATES["alpaca"])] for m in (example.messages, [*TURN, *TURN]))
    assert cuts == all_cuts


@pytest.mark.parametrize(
    "name, notes",
    [
        ("dolly", ("ignored key category",)),
        ("messages", ("ignored key prompt", "ignored key prompt_id")),
        ("first turn the assistant's", ("first turn left out, which is the assistant's",)),
        ("last turn the user's", ("last turn left out, which is the user's",)),
        ("system empty", ("empty system turn left out",)),
        ("alpaca", ()),
    ],
)
def test_what_is_left_out_is_noted(name, notes):
    assert to_example(FORMATS[name]).notes == notes


def test_ignored_keys_of_turns_and_template_tokens_in_texts_are_noted():
    turns = [TURN[0] | {"weight": 1}, TURN[1] | {"reasoning_content": "hm", "tool_calls": []}]
    assert to_example({"messages": turns, "tools": [], "images": ["x"]}).notes == (
        "ignored key messages[].weight of a turn that is not the assistant's",
        "ignored key messages[].reasoning_content",
        "ignored key images",
    )
    assert to_example({"text": "<s>[INST] Why? [/INST] So."}).notes == (
        "tokens of a chat template spelled out in a text, taken as plain text",
    )


GOOD = FORMATS["alpaca"]


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"instruction": "x", \n', "not valid JSON"),
        ("[1, 2]\n", "an object with keys is expected, not list"),
        ({"instrution": "x", "output": "y"}, "unknown key 'instrution'.*did you mean 'instruction'"),
        ({"foo": 1}, r"keys \['foo'\] are no known format"),
        ({"instruction": "x", "output": "  "}, "output is empty"),
        ({"instruction": "x", "input": "", "output": "", "text": "### Instruction: x"}, "output is empty"),  # Alpaca
        ({str(n): {"question": "x"} for n in range(999)}, r"keys \['0', .* '7'\] … are no known format"),
        ({"instruction": "", "output": "y"}, "instruction is empty"),
        ({"instruction": "x", "output": None}, r"keys \['instruction'\] are no known format"),
        ({"instruction": "x", "input": {"a": 1}, "output": "y"}, "input must be a text, not dict"),
        ({"question": "x", "context": {"a": 1}, "answer": "y"}, "context must be a text, not dict"),
        (
            {"query": "x", "response": "y", "history": 5},
            "history must be a list of prompts and their responses, not int",
        ),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": "y", "label": False}, "label is false: the answer is not to be learned"),
        ({"messages": TURN, "label": False}, "label is false: the answer is not to be learned"),
        ({"instruction": "x", "output": "y", "kto_tag": False}, "kto_tag is false: the answer is not to be learned"),
        ({"input": "x", "target": "y"}, r"keys \['input', 'target'\] are no known format"),
        ({"messages": [TURN[0], TURN[1] | {"tool_calls": [{"id": 1}]}]}, r"messages\[1\].tool_calls: calls of tools"),
        ({"messages": [TURN[0], {"role": "assistant", "function_call": {"a": 1}}]}, r".*\[1\].function_call: calls"),
        ({"text": "x", "role": "prompter"}, "text with role is a turn of a conversation"),
        ({"text": "a\ud800"}, "text holds half a character"),
        ("[" * 100_000 + "\n", "not valid JSON"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\]: the role \['user'\] is not supported"),
        ({"messages": [7, TURN]}, r"messages\[0\]: a turn must be an object with role and content, not int"),
        ({"text": float("nan"), "prompt": 1, "completion": [float("nan")]}, "completion must be a text, not a list"),
        ({"text": ["x"]}, "text must be a text, not a list"),
        ({"instruction": "x", "output": float("inf")}, "output must be a text, not float"),
        ({"instruction": ["a", "b"], "output": ["c", "d"]}, "instruction must be a text, not a list"),
        ({"prompt": "a", "completion": [TURN[1]]}, "completion must be a text, not a list"),
        (
            {"messages": [TURN[0], TURN[1] | {"content": [{"type": "image_url"}]}]},
            ".* of type 'image_url'; only te",
        ),
        ({"messages": "x"}, "messages must be a list of turns, not str"),
        ({"messages": []}, "messages has no assistant's turn"),
        ({"messages": TURN[:1]}, "messages has no assistant's turn after a user's turn"),
        ({"messages": TURN[1:]}, "messages has no assistant's turn after a user's turn"),
        ({"messages": [*TURN, *TURN[1:]]}, r"messages\[2\]: the role is assistant where the user's turn is due"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: the role 'tool' is not supported"),
        ({"messages": [TURN[0], {"role": "assistant", "content": ""}]}, r"messages\[1\].content is empty"),
        ({"messages": [*TURN, {"role": "system", "content": "x"}, *TURN]}, r"messages\[2\]: the role is system where"),
        (
            {"messages": [TURN[0], TURN[1] | {"weight": 0.5}]},
            r"messages\[1\].weight is 0.5; only 0 and 1",
        ),
        ({"query": "x", "response": "y", "history": ["x"]}, r"history\[0\] must be a prompt and its response"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\]: the role 'bot' is not supported"),
    ],
)
def test_whatever_is_wrong_is_named_with_file_and_line(tmp_path, record, message):
    path = write_lines(tmp_path / "d.jsonl", *[GOOD] * 6, record, GOOD)
    with pytest.raises(ValueError, match=rf"d.jsonl:7: {message}"):
        load_examples(path)


# --- Encoding ---------------------------------------------------------------------------------------------------------

DOG = Example("dog", [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a dog."}])


def test_targets_are_shifted_and_supervise_the_response_and_its_end(tokenizer):
    tokens, targets = encode_example(DOG, tokenizer, "alpaca", 1000)
    prompt, _ = tokenizer.render_conversation(DOG.messages[:1], "alpaca")
    response = tokenizer.encode("It is a dog.", add_prefix=False)
    assert tokens == prompt + response
    assert targets == [IGNORE_INDEX] * (len(prompt) - 1) + response + [tokenizer.eos_id]


def test_truncation_keeps_the_beginning_and_teaches_no_false_end(tokenizer):
    tokens, targets = encode_example(DOG, tokenizer, "alpaca", 1000)
    length = len(tokens) - 2
    cut_tokens, cut_targets = encode_example(DOG, tokenizer, "alpaca", length)
    assert (cut_tokens, cut_targets) == (tokens[:length], targets[:length])
    assert tokenizer.eos_id not in cut_targets


WORDS = ["the quick brown fox", "a lazy dog sleeps on", "what is it?", "1 2 3 4 5!", "fox and dog and fox"]


@pytest.fixture
def data_file(tmp_path):
    """60 records, of which 20 are repeats, some too long, and one that has nothing to learn within 150 tokens."""
    records = [{"instruction": WORDS[i % 5] * (1 + i % 4), "output": WORDS[i % 3] * (1 + i % 20)} for i in range(40)]
    records += [{"prompt": "a " * 200, "completion": "b"}, *records[:20]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("part_bytes", [300, 10**6])
def test_an_encoded_file_holds_what_its_examples_encode_to(monkeypatch, data_file, tokenizer, tmp_path, part_bytes):
    """In several processes, a few records each, and in one; from the disk as from memory."""
    monkeypatch.setattr(infra.records, "CHUNK_BYTES", part_bytes)
    encode_files(data_file, tokenizer, "alpaca", 150, tmp_path / "encoded")
    (dataset, _), examples = load_cache(tmp_path / "encoded", [data_file]), load_examples(data_file)
    expected = {example.id: encode_example(example, tokenizer, "alpaca", 150) for example in examples}
    expected = {i: pair for i, pair in expected.items() if set(pair[1]) != {IGNORE_INDEX}}
    assert dataset.ids == list(expected) and len(dataset) == 60 and dataset.num_dropped == 1
    assert isinstance(dataset.token_ids, np.memmap)
    for (tokens, targets), (ids, loss_mask), length, count in zip(
        dataset, expected.values(), dataset.lengths, dataset.num_supervised, strict=True
    ):
        assert (tokens.tolist(), targets.tolist()) == (ids, loss_mask)
        assert (length, count) == (len(ids), sum(t != IGNORE_INDEX for t in loss_mask))
    in_memory = encode_examples(examples, tokenizer, "alpaca", 150)
    assert in_memory.num_truncated == dataset.num_truncated > 0
    again = Dataset.from_encoded(list(in_memory), in_memory.ids)
    for one, two, three in zip(dataset, in_memory, again, strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))
    assert again.ids == dataset.ids


def test_data_that_changes_while_it_is_encoded_is_not_kept(monkeypatch, data_file, tokenizer, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(data_file.read_bytes())
    real = infra.cache.encode_files

    def encode_files(*arguments):
        data.write_bytes(2 * data_file.read_bytes())
        real(*arguments)

    monkeypatch.setattr(infra.cache, "encode_files", encode_files)
    with pytest.raises(ValueError, match=r"data\.jsonl: has changed while it was read"):
        load_dataset(data, tokenizer, "alpaca", 150, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_encoded_file_is_known_by_all_that_makes_it(data_file, tokenizer, tmp_path):
    def key(path=data_file, tokenizer=tokenizer, template="alpaca", max_length=90):
        return cache_path(path, tokenizer, template, max_length, tmp_path)

    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data_file.read_bytes())
    assert key() == key(copy)
    copy.write_bytes(data_file.read_bytes() + b"\n")
    other = Tokenizer.train(WORDS * 5, 300)
    assert len({key(), key(copy), key(tokenizer=other), key(template="mistral"), key(max_length=91)}) == 5


def test_a_turn_without_content_is_named_by_the_key_that_it_lacks(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    with pytest.raises(ValueError, match=r"messages\[1\]\.content must be a text"):
        to_example({"messages": turns})
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]
    with pytest.raises(ValueError, match=r"conversations\[1\]\.value must be a text"):
        to_example({"conversations": turns})


def test_a_bad_record_may_be_nested_deeply(data_file, tokenizer, tmp_path):
    """Where files are read in several processes, what was found is pickled, which takes more stack than parsing."""
    deep = tmp_path / "deep.jsonl"
    deep.write_text(data_file.read_text() + '{"instruction": "x", "z": ' + "[" * 600 + "]" * 600 + "}\n")
    dataset = load_dataset([data_file, deep], tokenizer, "alpaca", 90, tmp_path / "cache", skip_bad_records=True)
    assert [bad.place.rpartition(":")[2] for bad in dataset.bad_records] == ["62"]
    assert dataset.bad_records[0].record.endswith("]" * 600 + "}")


def test_bad_records_are_named_or_skipped_in_several_processes(monkeypatch, data_file, tokenizer, tmp_path, capsys):
    """Each record is bad at the same place as in one process; the good ones get the same ids as without the bad."""
    monkeypatch.setattr(infra.records, "CHUNK_BYTES", 300)
    data_file.write_text(data_file.read_text().replace('{"instruction"', '{"topic": "x", "instruction"'))
    lines = data_file.read_text().splitlines()
    expected = load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache")
    data_file.write_text("\n".join([*lines[:45], "{broken", *lines[45:], '{"text": " "}']))
    with pytest.raises(ValueError, match=r"2 of 63 records are bad.*\n.*data\.jsonl:46: not valid.*\n.*:63: text"):
        load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache")
    dataset = load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache", skip_bad_records=True)
    assert dataset.ids == expected.ids and np.array_equal(dataset.token_ids, expected.token_ids)
    assert [bad.place.rpartition(":")[2] for bad in dataset.bad_records] == ["46", "63"]
    assert dataset.bad_records[0].record == "{broken" and dataset.bad_records[1].record == '{"text": " "}'
    data_file = data_file.rename(tmp_path / "renamed.jsonl")
    with pytest.raises(ValueError, match=r"renamed\.jsonl: 2 of 63 .*\n.*renamed\.jsonl:46: not valid"):
        load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache")
    out = capsys.readouterr().out
    assert "1 of 63 records skipped: text is empty" in out and "ignored keys: topic (in 60) of 63 records" in out


def test_a_disk_that_is_full_while_data_is_encoded_is_named(monkeypatch, data_file, tokenizer, tmp_path):
    def full_folder(prefix, dir):
        for name in infra.cache.ARRAY_DTYPES:
            (tmp_path / name).symlink_to("/dev/full")
        return tmp_path

    monkeypatch.setattr(infra.cache.tempfile, "mkdtemp", full_folder)
    with pytest.raises(OSError, match=r"No space left on device: .*cache/x"):
        encode_files(data_file, tokenizer, "alpaca", 90, tmp_path / "cache" / "x")


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n", "no records in it"),
        ('{"prompt": "a", "completion": "b"}\n', "no response to learn starts within --max_length 3, or all have"),
    ],
)
def test_a_file_without_a_usable_example_is_refused(tokenizer, tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"d\.jsonl: {message}"):
        load_dataset(tmp_path / "d.jsonl", tokenizer, "alpaca", 3, tmp_path / "cache")


def test_a_process_that_is_killed_while_it_encodes_is_told(monkeypatch, data_file, tokenizer, tmp_path):
    monkeypatch.setattr(infra.records, "CHUNK_BYTES", 300)
    monkeypatch.setattr(infra.cache, "_encode_chunk", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match=r"data\.jsonl: a process that was encoding it has been killed"):
        encode_files(data_file, tokenizer, "alpaca", 90, tmp_path / "encoded")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_processes_that_encode_go_with_the_one_that_needs_them():
    context = multiprocessing.get_context("fork")
    read, write = context.Pipe()

    def child():
        _init_worker(None)
        time.sleep(60)

    def parent():
        process = context.Process(target=child)
        process.start()
        write.send(process.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    context.Process(target=parent).start()
    descriptor = os.pidfd_open(read.recv())
    assert select.select([descriptor], [], [], 20)[0]  # it has ended


def test_a_damaged_cache_is_told(data_file, tokenizer, tmp_path):
    encode_files(data_file, tokenizer, "alpaca", 90, tmp_path / "encoded")
    (tmp_path / "encoded" / "loss_mask").write_bytes(b"123")
    with pytest.raises(ValueError, match="encoded: damaged; remove that folder"):
        load_cache(tmp_path / "encoded", [data_file])


def test_an_id_that_was_changed_in_the_cache_is_told(data_file, tokenizer, tmp_path):
    load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache")
    (ids,) = (tmp_path / "cache").glob("*/token_ids")
    content = bytearray(ids.read_bytes())
    content[-9] ^= 1
    ids.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{ids.parent}: damaged; remove that folder"):
            load_dataset(data_file, tokenizer, "alpaca", 90, tmp_path / "cache")
        (ids.parent / "manifest.json").unlink(missing_ok=True)  # without it, nothing says what was written


def test_the_same_bytes_under_a_name_that_is_read_otherwise_are_encoded_again(tokenizer, tmp_path):
    files = [tmp_path / "a" / "x.json.gz", tmp_path / "b" / "x.gz"]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(gzip.compress(json.dumps(FORMATS["alpaca"]).encode()))
    assert len({cache_path(file, tokenizer, "alpaca", 90, tmp_path) for file in files}) == 2


def test_what_is_made_ahead_is_one_item_and_errors_come_through():
    made = []

    def make(i):
        made.append(i)
        return 1 // (3 - i)

    with pytest.raises(ZeroDivisionError):
        for number, _ in enumerate(prefetch(make, range(5), "cpu")):
            time.sleep(0.05)
            assert made == list(range(min(number + 2, 5)))
    assert made[-1] <= 4


def test_no_second_thread_uses_an_apple_gpu():
    here = threading.get_ident()
    threads = {device: [*prefetch(lambda _: threading.get_ident(), range(3), device)] for device in ("mps", "cpu")}
    assert threads["mps"] == [here] * 3 and here not in threads["cpu"]


def test_truncated_and_dropped_examples_are_counted(tokenizer):
    long = Example("long", [DOG.messages[0], {"role": "assistant", "content": "dog " * 100}])
    late = Example("late", [{"role": "user", "content": "dog " * 100}, DOG.messages[1]])
    length = len(encode_example(DOG, tokenizer, "alpaca", 1000)[0])
    dataset = encode_examples([DOG, long, late], tokenizer, "alpaca", length)
    assert (dataset.ids, dataset.num_truncated, dataset.num_dropped) == (["dog", "long"], 1, 1)
    assert dataset[0][1][-1] == tokenizer.eos_id  # fits exactly: not truncated
    assert all(len(tokens) == len(targets) == length for tokens, targets in dataset)
    for example, (tokens, targets) in zip((DOG, long), dataset, strict=True):
        assert (tokens.tolist(), targets.tolist()) == encode_example(example, tokenizer, "alpaca", length)


# --- Packing and order ------------------------------------------------------------------------------------------------


def test_pack_lays_examples_end_to_end():
    batch = pack([(torch.tensor([5, 6]).int(), torch.tensor([6, 2]).int()), ([8], [9]), ([1, 2, 3], [-100, 3, 4])])
    assert batch.tokens.tolist() == [5, 6, 8, 1, 2, 3] and batch.targets.tolist() == [6, 2, 9, -100, 3, 4]
    assert batch.positions.tolist() == [0, 1, 0, 0, 1, 2] and batch.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert [batch.tokens.dtype, batch.positions.dtype, batch.cu_seqlens.dtype] == [
        torch.int64,
        torch.int64,
        torch.int32,
    ]


def test_a_row_of_no_examples_is_one_token_that_predicts_nothing():
    batch = pack([])
    assert [x.tolist() for x in (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens)] == [
        [0],
        [IGNORE_INDEX],
        [0],
        [0, 1],
    ]


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("sizes", [(5, 5), (5, 6), (6, 5), (0, 1)])
def test_pairs_cross_the_halves_and_everyone_comes_once(sizes):
    confident, unconfident = np.arange(sizes[0]), 100 + np.arange(sizes[1])
    order = paired_order(confident, unconfident, seed=3, epoch=2)
    assert sorted(order) == [*confident, *unconfident]
    pairs = order[: 2 * min(sizes)].reshape(-1, 2)
    assert (pairs[:, 0] < 100).all() and (pairs[:, 1] >= 100).all()


def test_partners_change_from_epoch_to_epoch():
    first, second = (paired_order(range(20), range(20, 40), 0, epoch).reshape(-1, 2) for epoch in (0, 1))
    assert {tuple(pair) for pair in first} != {tuple(pair) for pair in second}


def test_lambda_is_beta_distributed_and_a_function_of_the_step():
    lam = sample_lambda(20000, 0.5, seed=0, step=7)
    assert torch.equal(lam, sample_lambda(20000, 0.5, seed=0, step=7))
    assert not torch.equal(lam, sample_lambda(20000, 0.5, seed=0, step=8))
    assert lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 0.01
    assert abs(lam.var() - 1 / 8) < 0.005  # Var Beta(α, α) = 1 / (4 (2α + 1))


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_micro_batches_hold_every_unit_once_within_the_limit(multiple):
    sizes = np.random.default_rng(0).integers(1, 60, 40).tolist()
    bins = balanced_partitions(sizes, max_tokens=100, multiple=multiple)
    assert sorted(unit for bin in bins for unit in bin) == list(range(40))
    assert len(bins) % multiple == 0 and max(sum(sizes[u] for u in bin) for bin in bins) <= 100


def test_a_unit_beyond_the_limit_has_a_micro_batch_to_itself():
    bins = balanced_partitions([500, 10, 10], max_tokens=100)
    assert [0] in bins and sorted(u for bin in bins for u in bin) == [0, 1, 2]
    assert balanced_partitions([7], max_tokens=100, multiple=3).count([]) == 2


def test_batches_made_ahead_arrive_on_the_device_unchanged(device):
    dataset, lam = Dataset.from_encoded(random_encoded([40, 3, 17, 8, 25])), torch.tensor([0.25, 0.75])
    orders = [np.array(order) for order in ([3, 1, 4, 0, 2], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0])]

    def tensors(micro_batch):
        row = micro_batch.row
        moved = row.tokens, row.targets, row.positions, micro_batch.supervised, micro_batch.example_index
        return *moved, micro_batch.lam

    moved = list(prefetch(lambda order: build_batch(dataset, order, lam, 50).to(device), orders, device))
    for order, batch in zip(orders, moved, strict=True):
        expected = build_batch(dataset, order, lam, 50)
        for here, there in zip(batch.micro_batches, expected.micro_batches, strict=True):
            for one, other in zip(tensors(here), tensors(there), strict=True):
                assert one.device.type == device.type and one.dtype == other.dtype and torch.equal(one.cpu(), other)
            for one, other in ((here.index_c, there.index_c), (here.index_u, there.index_u)):
                assert torch.equal(one, other)  # they stay in CPU memory


# --- The demo corpus --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    return demo_corpus(seed=0, num_documents=4000)


def test_demo_splits_are_disjoint_by_prompt(corpus):
    prompts = [{record["instruction"] for record in split} for split in (corpus.train, corpus.eval, corpus.test)]
    assert [len(p) for p in prompts] == [len(corpus.train), len(corpus.eval), len(corpus.test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    text = "\n".join(record["text"] for record in corpus.base)
    assert not [prompt for prompt in prompts[1] | prompts[2] if f"{prompt}\n" in text or f"{prompt} The" in text]


def test_demo_is_a_function_of_its_seed(corpus):
    assert demo_corpus(seed=0, num_documents=4000) == corpus
    assert demo_corpus(seed=1, num_documents=4000).train != corpus.train


def test_demo_has_ten_families_and_its_share_of_wrong_answers_in_training_alone(corpus):
    from infra.demo import _TASK_KINDS

    assert len(_TASK_KINDS) >= 10
    assert 0.2 < np.mean(corpus.wrong) < 0.3 and len(corpus.wrong) == len(corpus.train)
    clean = demo_corpus(seed=0, wrong_share=0.0, num_documents=1000)
    assert not any(clean.wrong) and (clean.eval, clean.test) == (corpus.eval, corpus.test)
    for record, true, wrong in zip(corpus.train, clean.train, corpus.wrong, strict=True):
        assert record["instruction"] == true["instruction"] and (record["output"] != true["output"]) == wrong


def test_demo_answers_are_right(corpus):
    clean = demo_corpus(seed=0, wrong_share=0.0, num_documents=1000)
    answers = {r["instruction"]: r["output"] for r in clean.train + corpus.eval + corpus.test}
    checked = 0
    for prompt, answer in answers.items():
        if prompt.startswith("Add ") and " and " in prompt:
            a, b = prompt.removeprefix("Add ").rstrip(".").split(" and ")
            assert answer == f"The answer is {int(a) + int(b)}."
            checked += 1
        if prompt.startswith("Give the larger number: "):
            a, b = prompt.removeprefix("Give the larger number: ").rstrip(".").split(", ")
            assert answer == f"The answer is {max(int(a), int(b))}."
            checked += 1
        if prompt.startswith("Give the last word: "):
            assert answer == f"The answer is {prompt.rstrip('.').split(', ')[-1]}."
            checked += 1
    assert checked > 100
