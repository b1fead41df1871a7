"""Text and ids, and what the templates make of conversations."""

import pytest

from data import INPUT_HEADING
from tokenizer import ALPACA_PREAMBLE, Tokenizer

TEXTS = ["", "a dog", "  two  spaces ", "\n\nnew lines\n", "emoji 🎉, עברית, 漢字", "tab\tand \\ and ▁", "x" * 300]


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
    template_ids, _ = tokenizer.apply_template([user(text), assistant(text)], "alpaca")
    assert template_ids.count(tokenizer.bos_id) == 1 and template_ids.count(tokenizer.eos_id) == 1


def test_a_text_that_goes_on_gets_no_space_of_its_own(tokenizer):
    start, rest = tokenizer.encode("the"), tokenizer.encode("dog", continues=True)
    assert tokenizer.decode(start + rest) == "thedog"
    assert tokenizer.decode(start + tokenizer.encode(" dog", continues=True)) == "the dog"


def test_pieces_equal_the_whole_where_they_meet_at_a_new_line(tokenizer):
    """The Alpaca prompt ends in a new line, so cutting there costs nothing: the ids are the whole text's."""
    messages = [user("What is it?"), assistant("It is a dog.")]
    ids, _ = tokenizer.apply_template(messages, "alpaca")
    text = f"{ALPACA_PREAMBLE}\n\n### Instruction:\nWhat is it?\n\n### Response:\nIt is a dog."
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_alpaca_prompt_word_for_word(tokenizer):
    ids, _ = tokenizer.apply_template([user("Sum up." + INPUT_HEADING + "A dog."), assistant("Dog.")], "alpaca")
    assert tokenizer.decode(ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nA dog.\n\n### Response:\nDog."
    )


def test_the_prompt_for_generation_is_a_prefix_of_what_is_trained_on(tokenizer):
    conversation = [user("the dog"), assistant("1 2 3"), user("and the fox?"), assistant(" 4 5")]
    ids, supervised = tokenizer.apply_template(conversation, "alpaca")
    for turns in (1, 3):
        prompt, learn = tokenizer.apply_template(conversation[:turns], "alpaca")
        assert ids[: len(prompt)] == prompt and learn == supervised[: len(prompt)]
        assert not learn[-1] and supervised[len(prompt)]


def test_every_assistant_turn_and_its_end_is_supervised(tokenizer):
    ids, supervised = tokenizer.apply_template(
        [user("a"), assistant("the fox"), user("b"), assistant("it is")], "alpaca"
    )
    learnt = [i for i, learn in zip(ids, supervised, strict=True) if learn]
    assert learnt.count(tokenizer.eos_id) == 2 and learnt[-1] == tokenizer.eos_id
    first, second = learnt[: learnt.index(tokenizer.eos_id)], learnt[learnt.index(tokenizer.eos_id) + 1 : -1]
    assert (tokenizer.decode(first), tokenizer.decode(second)) == ("the fox", "it is")


def test_a_system_turn_takes_the_place_of_the_preamble(tokenizer):
    ids, _ = tokenizer.apply_template([{"role": "system", "content": "Be brief."}, user("a"), assistant("b")], "alpaca")
    assert tokenizer.decode(ids) == "Be brief.\n\n### Instruction:\na\n\n### Response:\nb"


def test_exactly_one_beginning(tokenizer):
    ids, _ = tokenizer.apply_template([user("a"), assistant("b"), user("c"), assistant("d")], "alpaca")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


def test_plain_text_is_supervised_as_a_whole(tokenizer):
    ids, supervised = tokenizer.apply_template([{"role": "text", "content": "the dog"}], "alpaca")
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the dog"), tokenizer.eos_id]
    assert supervised == [False] + [True] * (len(ids) - 1)


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer):
    """An embedding may have more rows than the tokenizer has pieces, and a model may pick one of them."""
    assert tokenizer.decode([*tokenizer.encode("the dog"), tokenizer.vocab_size + 5]) == "the dog"


def test_training_is_deterministic():
    texts = ["the dog and the fox", "one two three"] * 10
    assert Tokenizer.train(texts, 300).files == Tokenizer.train(texts, 300).files


def test_saved_and_opened_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        again = Tokenizer.from_pretrained(path)
        assert again.encode("the lazy dog") == tokenizer.encode("the lazy dog")
        assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, tokenizer.vocab_size)
    assert Tokenizer.from_pretrained(tmp_path).files == tokenizer.files


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model: not found"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer.model: not a SentencePiece model"):
        Tokenizer.from_pretrained(tmp_path)


def test_ids_equal_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [text.lstrip(" ") for text in TEXTS]:  # before a space, transformers leaves SentencePiece's own one out
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text
    assert theirs.encode("the dog") == [tokenizer.bos_id, *tokenizer.encode("the dog")]
