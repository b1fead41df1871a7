"""Every kind of tokenizer against `transformers`: the same ids for texts, and for chats by the templates we save."""

import inspect
import io
import json
import random
import unicodedata

import pytest
import sentencepiece
from conftest import write_files
from test_tokenizer import assistant, user

from tokenizer import INPUT_HEADING, Tokenizer

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="reads tokenizer.json files, for which it is not installed")
pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")

FRAGMENTS = [
    "the quick brown fox", "Dog", "jumps over", "it's", "I'LL", "1234567", "3.14", "?!", "...", "{}[]", "http://x.y/z?q",
    " ", "  ", "       ", "\n", "\n\n", "\r\n", "\t", "def f(x):\n    return x", "é", "a\u0301", "Zürich", "ﬁ", "ß",
    "Ａ", "漢字", "עברית", "العربية", "🎉", "👩\u200d👩\u200d👧", "\u200b", "▁", "\x00",
    "§tool§", "<0x0A>", "<s>", "</s>", "<unk>", "<bos>", "<|im_start|>",
    "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "{bos}",
]  # fmt: skip
PLAIN = [text for text in FRAGMENTS if not text.startswith(("<", "[", "{"))]  # transformers parses chats for tokens
DRAW = random.Random(0)
TEXTS = ["".join(DRAW.choices(FRAGMENTS, k=DRAW.randint(1, 9))) for _ in range(1500)]
CORPUS = [" ".join(DRAW.choices(FRAGMENTS[:11], k=12)) + "\n" for _ in range(200)]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def llama2_files() -> dict[str, bytes]:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": json.dumps(config).encode()}


def add_token(files: dict[str, bytes]) -> dict[str, bytes]:
    """Add a token that is not special and not in the SentencePiece model, but found in texts."""
    token = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    size = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size()
    names = {0: "<unk>", 1: "<s>", 2: "</s>"}
    decoder = {str(i): {"content": name, **token, "special": True} for i, name in names.items()}
    decoder[str(size)] = {"content": "§tool§", **token}
    config = json.loads(files["tokenizer_config.json"]) | {"added_tokens_decoder": decoder}
    return files | {"tokenizer_config.json": json.dumps(config).encode()}


def mistral_files(folder) -> dict[str, bytes]:
    """As Llama 2's, and a tokenizer.json that prepends a space to every segment, as Mistral-7B's does."""
    files = llama2_files()
    spec = json.loads(transformers.AutoTokenizer.from_pretrained(write_files(folder, files)).backend_tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    spec["pre_tokenizer"] = None
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "LlamaTokenizer"}
    return files | {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def prepending_files(folder) -> dict[str, bytes]:
    """The same without the SentencePiece model."""
    return {name: content for name, content in mistral_files(folder).items() if name != "tokenizer.model"}


def metaspace_files(folder, **options) -> dict[str, bytes]:
    """Llama 2's, and the tokenizer.json that `transformers` 5 makes of them: a prefix at the start alone."""
    files = llama2_files() | {"tokenizer.model": sentencepiece_model(**options)}
    theirs = transformers.AutoTokenizer.from_pretrained(write_files(folder, files))
    return files | {"tokenizer.json": theirs.backend_tokenizer.to_str().encode()}


def resaved_files(folder) -> dict[str, bytes]:
    """What `transformers` 5 writes of a Mistral folder that has a SentencePiece model alone."""
    write_files(folder, {**legacy_files(), "config.json": json.dumps({"model_type": "mistral"}).encode()})
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    return {name: (folder / "saved" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def mistral_v3_files(folder) -> dict[str, bytes]:
    """As Mistral-7B-v0.3's: [INST] and [/INST] are control pieces of the model."""
    files = metaspace_files(folder, control_symbols=["[INST]", "[/INST]"])
    spec = json.loads(files["tokenizer.json"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {name: spec["model"]["vocab"][name] for name in ("[INST]", "[/INST]")}
    spec["added_tokens"] += [{"id": token_id, "content": name, **token} for name, token_id in names.items()]
    return files | {"tokenizer.json": json.dumps(spec).encode()}


def legacy_files() -> dict[str, bytes]:
    """As Llama 2's first tokenizer: a text after a special token gets a dummy prefix too."""
    files = llama2_files()
    config = json.loads(files["tokenizer_config.json"]) | {"legacy": True}
    return files | {"tokenizer_config.json": json.dumps(config).encode()}


def gemma_files() -> dict[str, bytes]:
    """No dummy prefix, ids in another order, and turns marked by pieces that the model itself finds in any text."""
    marks = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
    model = sentencepiece_model(
        add_dummy_prefix=False, user_defined_symbols=marks, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    )  # fmt: skip
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *marks]
    config["added_tokens_decoder"] = {str(i): {"content": name, "special": True} for i, name in enumerate(names)}
    return {"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()}


def byte_level_files(split: str, special: list[str], config: dict, normalizer=None) -> dict[str, bytes]:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def llama3_files() -> dict[str, bytes]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    return byte_level_files(LLAMA3_SPLIT, special, config)


def qwen_files() -> dict[str, bytes]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": special[0]}
    return byte_level_files(QWEN_SPLIT, special, config, tokenizers.normalizers.NFC())


def tekken_files() -> dict[str, bytes]:
    """As Mistral Nemo's: [INST] and [/INST] are tokens, and texts are cut as Llama 3 cuts them."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[1], "eos_token": special[2]}
    return byte_level_files(LLAMA3_SPLIT, special, config)


def prefixed_files() -> dict[str, bytes]:
    """Byte-level, with a space before the first word of a text, as `tokenizers` makes them by default."""
    files = qwen_files()
    spec = json.loads(files["tokenizer.json"])
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>"}
    return {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def qwen3_files() -> dict[str, bytes]:
    """As Qwen 2's, with tokens for <think> and </think> that are not special."""
    files = qwen_files()
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    return files | {"tokenizer.json": tokenizer.to_str().encode()}


KINDS = {  # -> its files, the templates it has tokens for
    "llama2": ("llama", llama2_files, ("alpaca", "llama2", "mistral", "zephyr")),
    "added": ("llama", lambda: add_token(llama2_files()), ("alpaca", "llama2")),
    "added, legacy": ("llama", lambda: add_token(legacy_files()), ("alpaca", "llama2")),
    "prefixed": ("llama", prefixed_files, ("alpaca", "chatml")),
    "mistral": ("mistral", mistral_files, ("alpaca", "llama2", "mistral", "zephyr")),
    "prepending": ("mistral", prepending_files, ("alpaca", "llama2", "mistral")),
    "resaved": ("mistral", resaved_files, ("alpaca", "llama2", "mistral")),
    "mistral-v3": ("mistral", mistral_v3_files, ("alpaca", "mistral-v3")),
    "legacy": ("llama", legacy_files, ("alpaca", "llama2")),
    "gemma": ("gemma", gemma_files, ("alpaca", "gemma", "mistral")),
    "llama3": ("llama", llama3_files, ("alpaca", "llama3", "mistral", "zephyr")),
    "tekken": ("mistral", tekken_files, ("alpaca", "mistral-v3-tekken")),
    "qwen": ("qwen2", qwen_files, ("alpaca", "chatml")),
    "qwen3": ("qwen3", qwen3_files, ("alpaca", "chatml", "qwen3")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for kind, (model_type, make, _) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        files = make(tmp_path_factory.mktemp("seed")) if inspect.signature(make).parameters else make()
        write_files(folders[kind], {**files, "config.json": json.dumps({"model_type": model_type}).encode()})
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_texts_equal_those_of_transformers(folders, kind):
    ours, theirs = Tokenizer.from_pretrained(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    expected = theirs(TEXTS, add_special_tokens=False, split_special_tokens=True).input_ids
    for text, ids in zip(TEXTS, expected, strict=True):
        assert ours.encode(text) == ids, text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    special = set(theirs.all_special_ids) - {theirs.unk_token_id}
    assert not any(special & set(ours.encode(text)) for text in TEXTS)
    decoded = [text for text in TEXTS if ours.decode(ours.encode(text)).lstrip(" ") == text.lstrip(" ")]
    assert len(decoded) > len(TEXTS) / 2


CONVERSATIONS = [
    [user("the quick brown fox"), assistant("jumps over it")],
    [
        user("Dog?"),
        assistant("the fox"),
        user("1234567 3.14"),
        assistant("  it's\n\nI'LL  "),
        user("?"),
        assistant("Ａ🎉"),
    ],
    [{"role": "system", "content": "Be brief. "}, user("\n\nthe fox"), assistant("\n  def f(x):\n    return x\n")],
    [user("Sum up." + INPUT_HEADING + "the dog\n"), assistant("Dog.")],
    [{"role": "system", "content": "漢字"}, user("a"), assistant("b"), user("c"), assistant("d")],
    *[[user("".join(DRAW.choices(PLAIN, k=6))), assistant("".join(DRAW.choices(PLAIN, k=6)))] for _ in range(100)],
]


@pytest.mark.parametrize("kind, template", [(kind, template) for kind, entry in KINDS.items() for template in entry[2]])
def test_apply_chat_template_gives_the_ids_that_are_trained_on(folders, tmp_path, kind, template):
    ours = Tokenizer.from_pretrained(folders[kind])
    write_files(tmp_path, ours.files_for(template))
    write_files(tmp_path, {"config.json": (folders[kind] / "config.json").read_bytes()})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        ours.choose_template(None) == "alpaca" and Tokenizer.from_pretrained(tmp_path).choose_template(None) == template
    )
    for messages in CONVERSATIONS:
        ids, loss_mask = ours.render_conversation(messages, template)
        assert theirs.apply_chat_template(messages, return_dict=False) == ids
        prompt, _ = ours.render_conversation(messages[:-1], template)
        assert theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False) == prompt
        assert ids[: len(prompt)] == prompt and not loss_mask[len(prompt) - 1] and all(loss_mask[len(prompt) :])
        in_loss = [token_id for token_id, mask in zip(ids, loss_mask, strict=True) if mask]
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        assert ids[-1] in ours.stop_ids(template)
        assert sum(i in ours.stop_ids(template) for i in in_loss) == len(answers)
        assert letters(ours.decode(in_loss)) == letters("".join(answers))
        assert ids.count(ours.bos_id) == (0 if ours.bos_id is None else beginnings(template, messages))


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("vocabulary", ["model", "json"])
def test_a_plain_text_begins_as_in_transformers(tmp_path, vocabulary, adds_bos):
    files = {"model": llama2_files, "json": llama3_files}[vocabulary]()
    if vocabulary == "model":
        config = json.loads(files["tokenizer_config.json"]) | {"add_bos_token": adds_bos}
        files["tokenizer_config.json"] = json.dumps(config).encode()
    elif adds_bos:  # as Llama 3's
        spec = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        bos = "<|begin_of_text|>"
        adding = tokenizers.processors.TemplateProcessing(f"{bos} $A", None, [(bos, spec.token_to_id(bos))])
        byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
        spec.post_processor = tokenizers.processors.Sequence([byte_level, adding])
        files["tokenizer.json"] = spec.to_str().encode()
    folder = write_files(tmp_path / "given", {**files, "config.json": b'{"model_type": "llama"}'})
    ours = Tokenizer.from_pretrained(folder)
    ids, _ = ours.render_conversation([{"role": "text", "content": "the fox"}], "alpaca")
    assert (ids[0] == ours.bos_id) == adds_bos
    saved = write_files(tmp_path / "saved", {**ours.files_for("alpaca"), "config.json": b'{"model_type": "llama"}'})
    for path in (folder, saved):
        assert transformers.AutoTokenizer.from_pretrained(path)("the fox").input_ids == ids[:-1]


def letters(text: str) -> str:
    """What every tokenizer keeps of a text: not the form of its accents, nor SentencePiece's sign for a space."""
    return "".join(unicodedata.normalize("NFC", text).replace("▁", "").split())


def beginnings(template, messages) -> int:
    """How many bos tokens a template writes: in Llama 2's, one for each user turn."""
    return {"zephyr": 0, "llama2": sum(message["role"] == "user" for message in messages)}.get(template, 1)
