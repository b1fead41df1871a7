"""Text and ids, and what the templates make of conversations."""

import json
import sys

import pytest
from conftest import write_files

from tokenizer import INPUT_HEADING, Tokenizer

TEXTS = [
    "",
    "a dog",
    "two  spaces  ",
    "\n\nnew lines\n",
    "emoji 🎉, עברית, 漢字",
    "ﬁne x² Ⅷ",
    "tab\tand \\ and ▁",
    "x" * 300,
]
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tokenizer, text):
    if "▁" not in text:  # SentencePiece's own sign for a space
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(text))


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a <s> b </s>", "<0x0A>"])
def test_special_tokens_spelt_out_in_text_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids)
    assert tokenizer.decode(ids) == text
    template_ids, _ = tokenizer.render_conversation([user(text), assistant(text)], "alpaca")
    assert template_ids.count(tokenizer.bos_id) == 1 and template_ids.count(tokenizer.eos_id) == 1


def test_a_text_that_goes_on_gets_no_space_of_its_own(tokenizer):
    start, rest = tokenizer.encode("the"), tokenizer.encode("dog", add_prefix=False)
    assert tokenizer.decode(start + rest) == "thedog"
    assert tokenizer.decode(start + tokenizer.encode(" dog", add_prefix=False)) == "the dog"


def test_pieces_equal_the_whole_where_they_meet_at_a_new_line(tokenizer):
    """The Alpaca prompt ends in a new line, so cutting there costs nothing: the ids are the whole text's."""
    messages = [user("What is it?"), assistant("It is a dog.")]
    ids, _ = tokenizer.render_conversation(messages, "alpaca")
    text = f"{PREAMBLE}\n\n### Instruction:\nWhat is it?\n\n### Response:\nIt is a dog."
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_alpaca_prompt_word_for_word(tokenizer):
    ids, _ = tokenizer.render_conversation([user("Sum up." + INPUT_HEADING + "A dog."), assistant("Dog.")], "alpaca")
    assert tokenizer.decode(ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nA dog.\n\n### Response:\nDog."
    )


def test_the_prompt_for_generation_is_a_prefix_of_the_training_ids(tokenizer):
    conversation = [user("the dog"), assistant("1 2 3"), user("and the fox?"), assistant(" 4 5")]
    ids, loss_mask = tokenizer.render_conversation(conversation, "alpaca")
    for turns in (1, 3):
        prompt, prompt_mask = tokenizer.render_conversation(conversation[:turns], "alpaca")
        assert ids[: len(prompt)] == prompt and prompt_mask == loss_mask[: len(prompt)]
        assert not prompt_mask[-1] and loss_mask[len(prompt)]


def test_every_assistant_turn_and_its_end_token_are_in_the_loss(tokenizer):
    messages = [user("a"), assistant("the fox"), user("b"), assistant("it is")]
    ids, loss_mask = tokenizer.render_conversation(messages, "alpaca")
    in_loss = [token_id for token_id, mask in zip(ids, loss_mask, strict=True) if mask]
    assert in_loss.count(tokenizer.eos_id) == 2 and in_loss[-1] == tokenizer.eos_id
    first, second = in_loss[: in_loss.index(tokenizer.eos_id)], in_loss[in_loss.index(tokenizer.eos_id) + 1 : -1]
    assert (tokenizer.decode(first), tokenizer.decode(second)) == ("the fox", "it is")


def test_a_system_turn_takes_the_place_of_the_preamble(tokenizer):
    ids, _ = tokenizer.render_conversation(
        [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")], "alpaca"
    )
    assert tokenizer.decode(ids) == "Be brief.\n\n### Instruction:\na\n\n### Response:\nb"


def test_exactly_one_beginning(tokenizer):
    ids, _ = tokenizer.render_conversation([user("a"), assistant("b"), user("c"), assistant("d")], "alpaca")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


def test_all_of_a_plain_text_is_in_the_loss(tokenizer):
    ids, loss_mask = tokenizer.render_conversation([{"role": "text", "content": "the dog"}], "alpaca")
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the dog"), tokenizer.eos_id]
    assert loss_mask == [False] + [True] * (len(ids) - 1)


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer):
    """An embedding may have more rows than the tokenizer has pieces, and a model may pick one of them."""
    assert tokenizer.decode([*tokenizer.encode("the dog"), tokenizer.vocab_size + 5]) == "the dog"


def test_training_is_deterministic():
    texts = ["the dog and the fox", "one two three"] * 10
    assert Tokenizer.train(texts, 300).files == Tokenizer.train(texts, 300).files


def test_saved_and_opened_again(tokenizer, tmp_path):
    write_files(tmp_path, tokenizer.files)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        again = Tokenizer.from_pretrained(path)
        assert again.encode("the lazy dog") == tokenizer.encode("the lazy dog")
        assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, tokenizer.vocab_size)
    assert Tokenizer.from_pretrained(tmp_path).files == tokenizer.files


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not found there: tokenizer.model or tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer.model: not a SentencePiece model"):
        Tokenizer.from_pretrained(tmp_path)


def test_surrounding_white_space_is_not_part_of_a_turn(tokenizer):
    plain = tokenizer.render_conversation([user("a"), assistant("b")], "alpaca")
    assert tokenizer.render_conversation([user(" a\n"), assistant("\n\n b ")], "alpaca") == plain


def test_what_looks_like_a_token_in_a_turn_is_text(tokenizer):
    for text in ("{bos}", "{eos}", "{user}", "<|im_start|>", "<|eot_id|>"):
        ids, _ = tokenizer.render_conversation([user(text), assistant(text)], "alpaca")
        assert tokenizer.decode(ids).count(text) == 2
        assert ids.count(tokenizer.bos_id) == 1 and ids.count(tokenizer.eos_id) == 1
    messages = [user("the fox"), assistant("it is"), user("{assistant}"), assistant("{user}")]
    text = tokenizer.decode(tokenizer.render_conversation(messages, "alpaca")[0])
    assert all(text.count(message["content"]) == 1 for message in messages)


def test_a_template_whose_tokens_are_missing_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"template chatml: the tokenizer has no token <\|im_start\|>; choose another"):
        tokenizer.choose_template("chatml")


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"eos_token": None}
    endless = Tokenizer({**tokenizer.files, "tokenizer_config.json": json.dumps(config).encode()})
    assert endless.eos_id is None
    with pytest.raises(ValueError, match="name no eos_token"):
        endless.choose_template("alpaca")


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "x"}}'),
        ("tokenizer_config.json", b'{"chat_template": [1]}'),
        ("added_tokens.json", b'{"<x>": "y"}'),
        ("tokenizer.json", b'{"added_tokens": [1]}'),
    ],
)
def test_files_that_hold_something_of_the_wrong_kind_are_one_line(tokenizer, tmp_path, name, content):
    write_files(tmp_path, {**tokenizer.files, name: content})
    with pytest.raises(ValueError, match="a tokenizer file holds something of the wrong kind"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_template_that_spells_a_token_out_is_refused(tokenizer):
    later = Tokenizer({**tokenizer.files, "added_tokens.json": b'{"[INST]": 400, "[/INST]": 401}'})
    with pytest.raises(ValueError, match=r"template mistral spells \[INST\] out, and the tokenizer has a token for it"):
        later.choose_template("mistral")


def test_the_template_is_the_folders_own_or_alpaca(tokenizer):
    def chosen(jinja):
        config = tokenizer.files["tokenizer_config.json"].rstrip(b" }\n") + b', "chat_template": ' + jinja + b"}"
        return Tokenizer({**tokenizer.files, "tokenizer_config.json": config}).choose_template(None)

    assert tokenizer.choose_template(None) == "alpaca" and tokenizer.choose_template("mistral") == "mistral"
    assert chosen(b"\"{{ '[INST] ' + messages[0].content }}\"") == "mistral"
    assert chosen(b'"... <<SYS>> ... [INST]"') == "llama2"
    assert chosen(b'[{"name": "tools", "template": "?"}, {"name": "default", "template": "[INST]"}]') == "mistral"
    for template in ("alpaca", "llama2", "mistral"):
        assert Tokenizer(tokenizer.files_for(template)).choose_template(None) == template
    jinja_file = {**tokenizer.files, "chat_template.jinja": b"<<SYS>>"}
    assert Tokenizer(jinja_file).choose_template(None) == "llama2"
    with pytest.raises(ValueError, match="chat_template is not known; choose --template: alpaca, llama2"):
        chosen(b'"{{ messages }}"')


def test_generation_stops_where_training_did(tokenizer):
    config = {**tokenizer.files, "generation_config.json": b'{"eos_token_id": 7, "temperature": 0.5}'}
    files = Tokenizer(config).files_for("alpaca")
    generation = json.loads(files["generation_config.json"])
    assert generation == {"eos_token_id": [7, tokenizer.eos_id], "bos_token_id": tokenizer.bos_id, "temperature": 0.5}
    assert Tokenizer(config).stop_ids("alpaca") == [7, tokenizer.eos_id]


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("special_tokens_map.json", b"\xff"),
        ("added_tokens.json", b"3"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}'),
        ("tokenizer_config.json", b'{"bos_token": ["<s>"]}'),
    ],
)
def test_damaged_files_are_named(tokenizer, tmp_path, name, content):
    write_files(tmp_path, {**tokenizer.files, name: content})
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_pretrained(tmp_path)


def test_tokens_that_other_files_add(tokenizer, tmp_path):
    """One beyond the model, which a template may use and no text becomes; the largest id counts."""
    added = {"added_tokens.json": b'{"<|im_start|>": 401, "<|im_end|>": 400}'}
    write_files(tmp_path, {**tokenizer.files, **added})
    again = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, again.vocab_size) == (400, 402)
    ids, loss_mask = again.render_conversation([user("<|im_start|>"), assistant("<|im_end|>")], "chatml")
    assert (ids.count(401), ids.count(400)) == (2, 2) and ids[-1] == 400 and loss_mask[-1]
    assert again.stop_ids("chatml") == [400]
    assert again.decode(ids).count("<|im_start|>") == 1


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="pip install tokenizers"):
        Tokenizer.from_pretrained(tmp_path)
