"""What is saved lays out what was trained on, whatever files the model folder had: for us and for `transformers`."""

import json
from dataclasses import replace

import pytest
from conftest import tiny_model, write_files
from test_tokenizer import assistant, user

import train
from data import encode_examples, load_examples
from infra.cache import load_dataset
from infra.chat_templates import resolve_template
from infra.hf import save_model
from infra.inputs import check_saved_tokenizer, fixed_conversations
from tokenizer import TEMPLATES, Tokenizer

CONFIG = "tokenizer_config.json"
TEXTS = ["the quick  brown fox", " Dog", "  it's\n\n1234567 ", "é 漢字\t🎉", "\n"]


@pytest.fixture(scope="module")
def peers():
    """The test module that makes tokenizers of every kind. It needs `transformers`; without it, tests are skipped."""
    import test_tokenizer_peers

    return test_tokenizer_peers


@pytest.fixture(scope="module")
def kinds(peers, tmp_path_factory) -> dict[str, tuple[str, dict[str, bytes], str]]:
    """Name -> model_type, files, a template. Those with a tokenizer.model have a tokenizer.json too."""
    prepending = peers.mistral_files(tmp_path_factory.mktemp("seed"))
    metaspace = peers.metaspace_files(tmp_path_factory.mktemp("seed"))
    gemma = write_files(tmp_path_factory.mktemp("seed"), peers.gemma_files())
    (gemma / "config.json").write_text('{"model_type": "gemma"}')
    gemma_json = peers.transformers.AutoTokenizer.from_pretrained(gemma).backend_tokenizer.to_str().encode()
    return {
        "llama-prepending": ("llama", prepending, "alpaca"),
        "llama-metaspace": ("llama", metaspace, "llama2"),
        "mistral-prepending": ("mistral", prepending, "mistral"),
        "mistral-metaspace": ("mistral", metaspace, "zephyr"),
        "mistral-v3": ("mistral", peers.mistral_v3_files(tmp_path_factory.mktemp("seed")), "mistral-v3"),
        "gemma": ("gemma", peers.gemma_files() | {"tokenizer.json": gemma_json}, "gemma"),
        "llama3": ("llama", peers.llama3_files(), "llama3"),
        "tekken": ("mistral", peers.tekken_files(), "mistral-v3-tekken"),
        "qwen": ("qwen2", peers.qwen_files(), "chatml"),
        "qwen3": ("qwen3", peers.qwen3_files(), "qwen3"),
    }


def folder_files(files: dict[str, bytes], model_type: str, vocabulary: str, named: str) -> dict[str, bytes]:
    """Keep some of a folder's files, and name its bos and eos in one place."""
    kept = {"model": {"tokenizer.model"}, "json": {"tokenizer.json"}, "both": {"tokenizer.model", "tokenizer.json"}}
    config, model_config = json.loads(files[CONFIG]), {"model_type": model_type}
    tokens = {key: config.pop(key) for key in ("bos_token", "eos_token")}
    made = {name: files[name] for name in kept[vocabulary] if name in files}
    ids = {f"{key}_id": Tokenizer(files).token_to_id(token) for key, token in tokens.items()}
    if named == "configuration without a class":
        config = {key: value for key, value in config.items() if key != "tokenizer_class"}
    if named in ("configuration", "configuration without a class"):
        config |= tokens
    elif named == "special_tokens_map":
        made["special_tokens_map.json"] = json.dumps({k: t and {"content": t} for k, t in tokens.items()}).encode()
    elif named == "ids in config.json":
        model_config |= ids
    elif named == "ids in generation_config.json":
        made["generation_config.json"] = json.dumps(ids | {"eos_token_id": [ids["eos_token_id"]]}).encode()
    if "no configuration" not in named:
        made[CONFIG] = json.dumps(config).encode()
    return made | {"config.json": json.dumps(model_config).encode()}


NAMED = (
    "configuration",
    "configuration without a class",
    "special_tokens_map",
    "ids in config.json",
    "ids in generation_config.json",
    "nowhere",
    "no configuration",
)


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("vocabulary", ["model", "json", "both"])
def test_the_saved_folder_gives_the_ids_trained_on_in_transformers(peers, kinds, tmp_path, vocabulary, named):
    for kind, (model_type, files, template) in kinds.items():
        if vocabulary != "json" and "tokenizer.model" not in files:
            continue
        given = folder_files(files, model_type, vocabulary, named)
        folder, saved = write_files(tmp_path / kind, given), tmp_path / f"{kind}-saved"
        ours = Tokenizer.from_pretrained(folder)
        if vocabulary == "json" and named in ("nowhere", "no configuration"):
            assert ours.eos_id is None
            if "{eos}" in TEMPLATES[template].assistant:
                with pytest.raises(ValueError, match="name no eos_token"):
                    ours.choose_template(template)
                continue
        write_files(saved, {**ours.files_for(template), "config.json": given["config.json"]})
        again, theirs = Tokenizer.from_pretrained(saved), peers.transformers.AutoTokenizer.from_pretrained(saved)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (again.bos_id, again.eos_id)
        for messages in peers.CONVERSATIONS[:8]:
            ids, loss_mask = ours.render_conversation(messages, template)
            assert again.render_conversation(messages, template) == (ids, loss_mask)
            assert theirs.apply_chat_template(messages, return_dict=False) == ids, kind
        for text in TEXTS:
            ids = ours.encode(text)
            assert ids == again.encode(text)
            assert ids == theirs(text, add_special_tokens=False).input_ids, kind
            if vocabulary == "model":  # a tokenizer.json says itself whether it adds bos
                document, _ = ours.render_conversation([{"role": "text", "content": text}], template)
                assert theirs(text).input_ids == document[:-1], kind


@pytest.mark.parametrize("place", ["configuration", "jinja file", "list with default", "jinja file over a list"])
def test_the_default_chat_template_is_found_as_in_transformers(peers, kinds, tmp_path, place, capsys):
    model_type, files, _ = kinds["llama-metaspace"]
    jinja, other = Tokenizer(files).chat_template("llama2"), "{{ '<|im_start|>' }}"
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": jinja}]
    if place.startswith("jinja file"):
        files = files | {"chat_template.jinja": jinja.encode()}
    config = json.loads(files[CONFIG])
    if "list" in place:
        config["chat_template"] = [{**entry, "template": other} for entry in named] if "file" in place else named
    elif place == "configuration":
        config["chat_template"] = jinja
    files = files | {
        CONFIG: json.dumps(config).encode(),
        "config.json": json.dumps({"model_type": model_type}).encode(),
    }
    folder = write_files(tmp_path / "given", files)
    ours, theirs = Tokenizer.from_pretrained(folder), peers.transformers.AutoTokenizer.from_pretrained(folder)
    assert resolve_template(ours, None) == "llama2" and capsys.readouterr().out == ""
    saved = write_files(tmp_path / "saved", {**ours.files_for("llama2"), "config.json": files["config.json"]})
    again = peers.transformers.AutoTokenizer.from_pretrained(saved)
    for messages in peers.CONVERSATIONS[:3]:
        ids, _ = ours.render_conversation(messages, "llama2")
        for peer in (theirs, again):
            assert peer.apply_chat_template(messages, return_dict=False) == ids


@pytest.mark.parametrize("lists_tokens", [False, True])
def test_files_that_contradict_each_other_are_read_as_in_transformers(peers, kinds, tmp_path, lists_tokens):
    model_type, files, template = kinds["mistral-metaspace"]
    config = json.loads(files[CONFIG])
    if lists_tokens:
        config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    given = {"special_tokens_map.json": b'{"bos_token": "</s>"}', CONFIG: json.dumps(config).encode()}
    given = files | given | {"config.json": json.dumps({"model_type": model_type}).encode()}
    ours = Tokenizer.from_pretrained(write_files(tmp_path / "given", given))
    saved = write_files(tmp_path / "saved", given | ours.files_for(template))
    for folder in (tmp_path / "given", saved):
        theirs = peers.transformers.AutoTokenizer.from_pretrained(folder)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1 if lists_tokens else 2, 2)


def test_qwen_has_no_bos_though_its_config_names_one_as_in_transformers(peers, kinds, tmp_path):
    model_type, files, _ = kinds["qwen3"]
    model_config = {"model_type": model_type, "bos_token_id": 3, "eos_token_id": 4}
    given = {name: content for name, content in files.items() if name != CONFIG}
    folder = write_files(tmp_path, given | {"config.json": json.dumps(model_config).encode()})
    ours, theirs = Tokenizer.from_pretrained(folder), peers.transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.bos_id is None and theirs.bos_token_id is None and ours.eos_id == 4


def test_add_prefix_space_is_obeyed_as_in_transformers(peers, kinds, tmp_path):
    _, files, _ = kinds["llama-metaspace"]
    config = json.dumps(json.loads(files[CONFIG]) | {"add_prefix_space": False}).encode()
    for names in ({"tokenizer.model"}, {"tokenizer.json"}, {"tokenizer.model", "tokenizer.json"}):
        given = {name: files[name] for name in names} | {CONFIG: config, "config.json": b'{"model_type": "llama"}'}
        ours = Tokenizer.from_pretrained(write_files(tmp_path / "-".join(sorted(names)), given))
        saved = write_files(tmp_path / f"{len(given)}-{min(names)}", {**given, **ours.files_for("llama2")})
        theirs = peers.transformers.AutoTokenizer.from_pretrained(saved)
        for text in TEXTS:
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        for messages in peers.CONVERSATIONS[:4]:
            ids, _ = ours.render_conversation(messages, "llama2")
            assert theirs.apply_chat_template(messages, return_dict=False) == ids


def test_several_chat_templates_without_a_default_are_said(tokenizer, capsys):
    named = [{"name": "rag", "template": "<|im_start|>"}, {"name": "tool_use", "template": "[INST]"}]
    config = json.dumps(json.loads(tokenizer.files[CONFIG]) | {"chat_template": named}).encode()
    several = Tokenizer({**tokenizer.files, CONFIG: config})
    assert resolve_template(several, None) == "alpaca"
    said = (
        "template alpaca: the model has chat templates named rag, tool_use, and none named default; --template chooses"
    )
    assert capsys.readouterr().out.startswith(said)
    assert resolve_template(several, "mistral") == "mistral" and capsys.readouterr().out == ""


def test_an_example_or_a_conversation_that_would_change_ends_the_run(tokenizer, tmp_path, monkeypatch):
    """Each difference that the saved files could have, found before training."""
    save_model(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer.files_for("alpaca"))
    records = [{"instruction": "the dog", "output": f"{n} foxes"} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = {name: str(tmp_path / file) for name, file in (("model", "model"), ("data", "data.jsonl"), ("output", "o"))}
    config = train.TrainConfig(**paths, template="alpaca", max_length=100)
    dataset = encode_examples(load_examples(config.data), tokenizer, "alpaca", 100)
    check_saved_tokenizer(tokenizer, dataset, config)

    changed = dataset.token_ids.copy()
    changed[-2] += 1
    with pytest.raises(
        ValueError, match=r"other ids to example 3 of .*data.jsonl; give .*model a tokenizer_config.json"
    ):
        check_saved_tokenizer(tokenizer, replace(dataset, token_ids=changed), config)
    masked = dataset.loss_mask.copy()
    masked[-2] = False
    with pytest.raises(ValueError, match="other ids to example 3"):
        check_saved_tokenizer(tokenizer, replace(dataset, loss_mask=masked), config)

    files_for = Tokenizer.files_for

    def change(**changes):
        def changed_files(self, template):
            files = files_for(self, template)
            return files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | changes).encode()}

        monkeypatch.setattr(Tokenizer, "files_for", changed_files)

    change(bos_token="</s>")
    with pytest.raises(ValueError, match="other ids to a conversation of user; give"):
        check_saved_tokenizer(tokenizer, dataset, config)
    change(legacy=True)
    with pytest.raises(ValueError, match="other ids to a conversation of user, assistant, user; give"):
        check_saved_tokenizer(tokenizer, dataset, config)
    with pytest.raises(ValueError, match="other ids to a conversation"):
        train.load_inputs(config, tokenizer)
    change(chat_template=tokenizer.chat_template("mistral"))
    with pytest.raises(ValueError, match="chat_template would be taken for mistral; give"):
        check_saved_tokenizer(tokenizer, dataset, config)


def test_a_tokenizer_without_eos_is_checked_without_a_plain_text(tokenizer, tmp_path):
    config = json.loads(tokenizer.files[CONFIG]) | {"eos_token": None}
    added = {"added_tokens.json": b'{"<|im_start|>": 401, "<|im_end|>": 400}', CONFIG: json.dumps(config).encode()}
    endless = Tokenizer(tokenizer.files | added)
    save_model(tiny_model(vocab_size=402), tmp_path / "model", endless.files_for("chatml"))
    (tmp_path / "data.jsonl").write_text('{"prompt": "the dog", "completion": "foxes"}')
    paths = {name: str(tmp_path / file) for name, file in (("model", "model"), ("data", "data.jsonl"), ("output", "o"))}
    config = train.TrainConfig(**paths, template="chatml", max_length=100)
    check_saved_tokenizer(endless, encode_examples(load_examples(config.data), endless, "chatml", 100), config)


def test_fixed_conversations_have_every_number_of_turns():
    roles = [[message["role"] for message in messages] for messages in fixed_conversations()]
    assert ["text"] in roles and ["user"] in roles and ["system", *["user", "assistant"] * 3] in roles
    assert len(roles) == len({tuple(r) for r in roles}) == 13


def test_answers_with_thoughts_are_refused_where_the_prompt_has_an_empty_one(tokenizer, tmp_path):
    added = {"added_tokens.json": b'{"<|im_start|>": 401, "<|im_end|>": 400}'}
    qwen3 = Tokenizer({**tokenizer.files, **added})
    thought = [user("2 + 3?"), assistant("<think>\nadd\n</think>\n\n5")]
    with pytest.raises(ValueError, match=r"begins with <think>.*--template chatml"):
        qwen3.render_conversation(thought, "qwen3")
    qwen3.render_conversation(thought, "chatml")
    qwen3.render_conversation([*thought, user("so?")], "qwen3")  # a thought in an earlier turn is no prompt's
    records = [{"messages": thought}, *[{"messages": [user(f"{n}?"), assistant("5")]} for n in range(3)]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"d.jsonl:1: an answer begins with <think>"):
        load_dataset(tmp_path / "d.jsonl", qwen3, "qwen3", 90, tmp_path)
    assert len(load_dataset(tmp_path / "d.jsonl", qwen3, "qwen3", 90, tmp_path, skip_bad_records=True)) == 3


def test_tokenizers_that_differ_in_a_special_token_have_other_fingerprints(kinds):
    """So one does not take the other's encoded data from the cache."""
    files = {"tokenizer.json": kinds["llama3"][1]["tokenizer.json"]}
    one, other = (Tokenizer(files, {"model_type": "llama", "eos_token_id": token_id}) for token_id in (3, 4))
    assert (one.eos_id, other.eos_id) == (3, 4) and one.fingerprint != other.fingerprint
    assert one.fingerprint == Tokenizer(files, {"model_type": "llama", "eos_token_id": [3]}).fingerprint
