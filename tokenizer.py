"""Text to ids and back, chat templates, and the training of a tokenizer.

A conversation becomes ids **section by section**: the template gives texts and special tokens in order, each with a
mark that says whether the model is to learn it. What is learnt is encoded apart from what comes before it, so the ids
trained on begin with exactly the ids that generation feeds; and special tokens are inserted as ids, never parsed out of
text, so a "<s>" in somebody's text stays four letters.

In order: `Tokenizer`, the two kinds of file it reads (a SentencePiece model, or a `tokenizer.json`), the templates.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

# The files of a model folder that make up its tokenizer, and one that says how to generate: they travel with a model.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# What `transformers` needs to be told of a SentencePiece model that comes alone.
_LLAMA_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


class Tokenizer:
    """The tokenizer of a model folder; its ids are those `transformers` gives.

    `vocab_size` is the largest id plus one; `bos_id` and `eos_id` are None where there is no such token.
    """

    def __init__(self, files: dict[str, bytes], model_type: str | None = None):
        self.files = files
        special_tokens_map, spec = _json_file(files, "special_tokens_map.json"), _json_file(files, "tokenizer.json")
        self._config = special_tokens_map | _json_file(files, "tokenizer_config.json")
        added = _added_tokens(self._config, spec, _json_file(files, "added_tokens.json"))
        if "tokenizer.model" in files:
            self._model = _SentencePieceModel(files["tokenizer.model"], added)
        else:
            self._model = _JsonModel(spec)
        self._space_after_special, self._space_before_space = _space_rule(self._config, spec, model_type)
        self.vocab_size: int = self._model.vocab_size
        self._special_names = {name for name, (_, is_special) in added.items() if is_special}
        self.bos_id = self._end("bos_token", self._model.bos_id)
        self.eos_id = self._end("eos_token", self._model.eos_id)

    def _end(self, key: str, default: int | None) -> int | None:
        """The id of the token that the files name so, or where they do not the model's own."""
        if key not in self._config:
            return default
        name = self._config[key].get("content") if isinstance(self._config[key], dict) else self._config[key]
        if name is not None and not (isinstance(name, str) and self.id_of(name) is not None):
            raise ValueError(f"tokenizer_config.json: {key} {name!r} is not in the vocabulary")
        return self.id_of(name)

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Open a model folder's tokenizer, or a `tokenizer.model` or `tokenizer.json` alone.

        Raises FileNotFoundError or ValueError naming file and fault; where only a `tokenizer.json` is there and the
        package that reads it is not, what to install.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in FILES if (path / name).is_file()]
            files = {file.name: file.read_bytes() for file in found}
        else:
            name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
            files = {name: path.read_bytes()} if path.is_file() else {}
        if not files.keys() & {"tokenizer.model", "tokenizer.json"}:
            raise FileNotFoundError(f"{path}: not found there: tokenizer.model or tokenizer.json")
        try:
            config = {"config.json": (path / "config.json").read_bytes()} if (path / "config.json").is_file() else {}
            model_type = _json_file(config, "config.json").get("model_type")
            try:
                tokenizer = cls(files, model_type)
            except _NotSentencePieceError:  # some folders keep a model of another kind under that name
                if "tokenizer.json" not in files:
                    raise
                files = {name: content for name, content in files.items() if name != "tokenizer.model"}
                tokenizer = cls(files, model_type)
            _ = tokenizer.own_template
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: a tokenizer file holds something of the wrong kind ({error!r})") from None
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-pair tokenizer: as in Llama's, every byte can be spelt, no text is normalized, no space lost."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            num_threads=1,  # the same tokenizer on every machine
            minloglevel=2,
        )
        return cls({"tokenizer.model": model.getvalue(), "tokenizer_config.json": _to_json(_LLAMA_CONFIG)})

    @property
    def fingerprint(self) -> bytes:
        """What the ids of a text depend on, as bytes: where these are the same, so are the ids."""
        rules = (self._space_after_special, self._space_before_space, sorted(self.files.items()))
        return repr(rules).encode()

    def id_of(self, token: str | None) -> int | None:
        """The id of a special token, by its name; None where there is none."""
        return None if token is None else self._model.id_of(token)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text, without special tokens; `continues` where other text comes right before it."""
        opens = not continues and (self._space_before_space or not text.startswith((" ", "▁")))
        return self._model.encode(text, opens)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens, and rows of an embedding that is larger than the tokenizer, have none."""
        return self._model.decode(ids)

    def piece(self, token_id: int) -> str:
        """An id as the vocabulary spells it."""
        return self._model.piece(token_id)

    def apply_template(self, messages: list[dict], template: str) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is supervised: assistant turns and the end token closing each.

        `messages` are {"role", "content"} with roles system (first), user and assistant; ending with a user turn they
        give the prompt that generation starts from. A single message of role `text` is supervised as a whole.
        Raises ValueError where the tokenizer lacks a token of the template.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        continues = False
        for section in _sections(_lay_out(messages, template)):
            if section.is_token:
                new = self._special(section.text, template)
            else:
                opens = not ids or ids[-1] == self.bos_id or self._space_after_special
                new = self._model.encode(section.text, opens and not continues)
            continues = not section.is_token
            ids += new
            supervised += [section.learnt] * len(new)
        return ids, supervised

    def _special(self, token: str, template: str) -> list[int]:
        ends = {"{bos}": self.bos_id, "{eos}": self.eos_id}
        special_id = ends[token] if token in ends else self.id_of(token)
        if special_id is not None:
            return [special_id]
        if token == "{bos}":  # some families have none
            return []
        if token == "{eos}":
            raise ValueError("the tokenizer's files name no eos_token, without which no answer would learn to end")
        raise ValueError(f"template {template}: the tokenizer has no token {token}; choose another --template")

    def stop_ids(self, template: str) -> list[int]:
        """The ids that close an assistant's turn, where generation ends."""
        tokens = _TOKEN.findall(TEMPLATES[template].assistant)
        return [i for token in tokens for i in self._special(token, template)]

    @property
    def own_template(self) -> str | None:
        """The folder's own `chat_template`, in Jinja."""
        jinja = self.files.get("chat_template.jinja", b"").decode("utf-8", "replace")
        jinja = jinja or self._config.get("chat_template")
        if isinstance(jinja, list):  # several, each with its name
            jinja = next((entry["template"] for entry in jinja if entry.get("name") == "default"), None)
        return jinja

    def choose_template(self, name: str | None) -> str:
        """`name`, or where that is None the template that the folder's `chat_template` is or resembles, or `alpaca`.

        Raises ValueError where it resembles none of `TEMPLATES`, or the tokenizer does not go with the template.
        """
        jinja = self.own_template
        if name is None and jinja:
            ours = [known for known in TEMPLATES if jinja == self.chat_template(known)]
            similar = [known for known, mark in _MARKS.items() if mark in str(jinja)]
            if not ours + similar:
                raise ValueError(f"the model's chat_template is not known; choose --template: {', '.join(TEMPLATES)}")
            name = (ours + similar)[0]
        name = name or "alpaca"
        self.apply_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], name)
        text = _TOKEN.sub("", " ".join(filter(None, TEMPLATES[name])))
        tokens = [token for token in sorted({"[INST]", *self._special_names}) if token in text and self.id_of(token)]
        if tokens:
            raise ValueError(f"template {name} spells {tokens[0]} out, and the tokenizer has a token for it")
        return name

    def chat_template(self, template: str) -> str:
        """The template in Jinja: `transformers`' `apply_chat_template` then gives the ids of `apply_template`."""
        # Where a text opens with a space of its own only at the very start, the one after the first token is spelt out.
        spelt_out = self._model.opens_with_space and not self._space_after_special
        return _to_jinja(TEMPLATES[template], spelt_out)

    def files_for(self, template: str) -> dict[str, bytes]:
        """The files to go with a model trained on `template`: they lay a chat out as it was, and stop where it did."""
        bare = _LLAMA_CONFIG if "tokenizer.model" in self.files else {"tokenizer_class": "PreTrainedTokenizerFast"}
        config = _json_file(self.files, "tokenizer_config.json") or bare
        generation = _json_file(self.files, "generation_config.json")
        stop = generation.get("eos_token_id")
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        stop += [i for i in self.stop_ids(template) if i not in stop]
        files = {name: content for name, content in self.files.items() if name != "chat_template.jinja"}
        files["tokenizer_config.json"] = _to_json(config | {"chat_template": self.chat_template(template)})
        files["generation_config.json"] = _to_json(
            generation | {"eos_token_id": stop or None, "bos_token_id": self.bos_id}
        )
        return files


def _json_file(files: dict[str, bytes], name: str) -> dict:
    try:
        values = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: an object with keys is expected, not {type(values).__name__}")
    return values


def _to_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _added_tokens(config: dict, spec: dict, added_tokens: dict) -> dict[str, tuple[int, bool]]:
    """The tokens that a folder's files add to its model: name -> (id, whether it is special)."""
    decoder = config.get("added_tokens_decoder")
    listed = [{**token, "id": int(i)} for i, token in decoder.items()] if isinstance(decoder, dict) else []
    listed += [{"content": content, "id": i} for content, i in added_tokens.items()]
    listed += spec.get("added_tokens", [])
    return {token["content"]: (token["id"], token.get("special", False)) for token in reversed(listed)}


# --- The two kinds of file --------------------------------------------------------------------------------------------
# A SentencePiece model puts a space before the first word of a text, its dummy prefix, which must not happen where a
# text goes on in the next section. So each kind comes twice: as it is, and without that prefix.

# A SentencePiece model is a protocol buffer, and those are merged by concatenation, the last value winning: these bytes
# say normalizer_spec (field 3, of 2 bytes) { add_dummy_prefix (field 3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class _NotSentencePieceError(ValueError):
    pass


class _SentencePieceModel:
    """A `tokenizer.model`, and the tokens that other files add to it."""

    def __init__(self, proto: bytes, added: dict[str, tuple[int, bool]]):
        special = {name for name, (_, is_special) in added.items() if is_special} | _TEMPLATE_TOKENS
        try:
            proto = _never_in_text(proto, special)
            self._start = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._continue = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        except RuntimeError:
            raise _NotSentencePieceError("tokenizer.model: not a SentencePiece model") from None
        self._size = self._start.vocab_size()
        self._added = {name: i for name, (i, _) in added.items() if i >= self._size}
        self.vocab_size = max([self._size - 1, *self._added.values()]) + 1
        self.bos_id, self.eos_id = (None if i < 0 else i for i in (self._start.bos_id(), self._start.eos_id()))
        self.opens_with_space = self._start.encode("a") != self._continue.encode("a")

    def id_of(self, token: str) -> int | None:
        piece = self._start.piece_to_id(token)
        return piece if self._start.id_to_piece(piece) == token else self._added.get(token)

    def piece(self, token_id: int) -> str:
        if token_id < self._size:
            return self._start.id_to_piece(token_id)
        return next(name for name, i in self._added.items() if i == token_id)

    def encode(self, text: str, opens: bool) -> list[int]:
        return (self._start if opens else self._continue).encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._start.decode([i for i in ids if i < self._size])


def _never_in_text(proto: bytes, names: set[str]) -> bytes:
    """The SentencePiece model with the pieces of these names no longer USER_DEFINED (type 4) but CONTROL (type 3).

    Gemma's model, for one, would else take "<start_of_turn>" out of anybody's text. A piece is stored as its name
    (field 1: length and bytes), score (field 2: four bytes) and type (field 3).
    """
    names_stored = [name.encode() for name in names if len(name.encode()) < 128]  # lengths that are one byte
    stored = (b"\x0a" + bytes([len(name)]) + re.escape(name) for name in names_stored)
    user_defined = b"((?:" + b"|".join(stored) + rb")\x15.{4}\x18)\x04"
    return re.sub(user_defined, lambda piece: piece[1] + b"\x03", proto, flags=re.DOTALL)


class _JsonModel:
    """A `tokenizer.json`, read by the `tokenizers` package."""

    bos_id = eos_id = None  # named in tokenizer_config.json alone

    def __init__(self, spec: dict):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("there is only a tokenizer.json, which needs: pip install tokenizers") from None
        for token in spec.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in _TEMPLATE_TOKENS
        without_prefix = spec | {part: _without_prefix(spec.get(part)) for part in ("normalizer", "pre_tokenizer")}
        self.opens_with_space = without_prefix != spec
        try:
            self._start = self._continue = tokenizers.Tokenizer.from_str(json.dumps(spec))
            if self.opens_with_space:
                self._continue = tokenizers.Tokenizer.from_str(json.dumps(without_prefix))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"tokenizer.json: {error}") from None
        for form in (self._start, self._continue):
            form.encode_special_tokens = True  # spelt out in a text, they are text
            form.no_truncation()
            form.no_padding()
        self.vocab_size = max(self._start.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        return self._start.token_to_id(token)

    def piece(self, token_id: int) -> str:
        return self._start.id_to_token(token_id)

    def encode(self, text: str, opens: bool) -> list[int]:
        return (self._start if opens else self._continue).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._start.decode(ids, skip_special_tokens=True)


def _without_prefix(part):
    """A part of a `tokenizer.json` with what puts a space before a text taken out."""
    if isinstance(part, list):
        return [_without_prefix(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    part = {key: _without_prefix(value) for key, value in part.items()}
    return part | {"prepend_scheme": "never"} if part.get("type") == "Metaspace" else part


def _space_rule(config: dict, spec: dict, model_type: str | None) -> tuple[bool, bool]:
    """Where a text opens with a dummy prefix: -> (after every special token?, even before a text's own space?)

    At the very start it always does, if the tokenizer knows such a prefix at all. For the rest there are three customs,
    and a folder's files tell which `transformers` (5) follows.
    """
    if config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast") and model_type != "mistral":
        return bool(config.get("legacy")), False
    if "Prepend" in json.dumps(spec.get("normalizer")):
        return True, True
    if spec:
        return '"prepend_scheme": "first"' not in json.dumps(spec.get("pre_tokenizer")), False
    return False, True  # SentencePiece's own


# --- Templates --------------------------------------------------------------------------------------------------------


class Template(NamedTuple):
    """How a conversation is laid out: a text for each kind of turn, special tokens standing in it by name.

    {system}, {user} and {assistant} are what was said, stripped of white space around it: a tokenizer that joins a
    heading's new line with one that follows would otherwise see two other tokens than generation feeds.
    """

    first: str  # what opens it, up to and with the first user's turn
    first_with_system: str  # the same with a system turn
    user: str  # a later user's turn
    reply: str  # what comes before an assistant's turn
    assistant: str  # that turn; all of it is learnt
    first_with_input: str | None = None  # where the first user's turn has an Alpaca record's input in it


# The prompt of Stanford Alpaca (Taori et al. 2023), with a new line after its last heading.
# A user turn that carries an input has it under this heading.
INPUT_HEADING = "\n\n### Input:\n"
_WRITE = "Write a response that appropriately completes the request."
_ALPACA_PREAMBLE = f"Below is an instruction that describes a task. {_WRITE}"
_ALPACA_PREAMBLE_WITH_INPUT = (
    f"Below is an instruction that describes a task, paired with an input that provides further context. {_WRITE}"
)
_ALPACA_USER = "\n\n### Instruction:\n{user}"
_ALPACA_REPLY = "\n\n### Response:\n"
_CHATML_USER = "<|im_start|>user\n{user}<|im_end|>\n"
_LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{{{}}}<|eot_id|>"
_LLAMA3_USER = _LLAMA3_TURN.format("user", "user")

TEMPLATES = {
    "alpaca": Template(
        first="{bos}" + _ALPACA_PREAMBLE + _ALPACA_USER,
        first_with_system="{bos}{system}" + _ALPACA_USER,
        user=_ALPACA_USER,
        reply=_ALPACA_REPLY,
        assistant="{assistant}{eos}",
        first_with_input="{bos}" + _ALPACA_PREAMBLE_WITH_INPUT + _ALPACA_USER,
    ),
    "llama2": Template(
        first="{bos}[INST] {user} [/INST]",
        first_with_system="{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
        user="{bos}[INST] {user} [/INST]",
        reply="",
        assistant=" {assistant} {eos}",
    ),
    "mistral": Template(
        first="{bos}[INST] {user} [/INST]",
        first_with_system="{bos}[INST] {system}\n\n{user} [/INST]",
        user="[INST] {user} [/INST]",
        reply="",
        assistant=" {assistant}{eos}",
    ),
    "llama3": Template(
        first="{bos}" + _LLAMA3_USER,
        first_with_system="{bos}" + _LLAMA3_TURN.format("system", "system") + _LLAMA3_USER,
        user=_LLAMA3_USER,
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{assistant}<|eot_id|>",
    ),
    "chatml": Template(
        first=_CHATML_USER,
        first_with_system="<|im_start|>system\n{system}<|im_end|>\n" + _CHATML_USER,
        user="\n" + _CHATML_USER,
        reply="<|im_start|>assistant\n",
        assistant="{assistant}<|im_end|>",
    ),
    "gemma": Template(
        first="{bos}<start_of_turn>user\n{user}<end_of_turn>\n",
        first_with_system="{bos}<start_of_turn>user\n{system}\n\n{user}<end_of_turn>\n",
        user="\n<start_of_turn>user\n{user}<end_of_turn>\n",
        reply="<start_of_turn>model\n",
        assistant="{assistant}<end_of_turn>",
    ),
}

# By what a folder's own chat_template is recognised, the most particular first.
_MARKS = {
    "llama3": "<|start_header_id|>",
    "chatml": "<|im_start|>",
    "gemma": "<start_of_turn>",
    "llama2": "<<SYS>>",
    "mistral": "[INST]",
    "alpaca": "### Response:",
}

_TOKEN = re.compile(r"(\{bos\}|\{eos\}|<\|\w+\|>|<(?:start|end)_of_turn>)")  # a special token in a template
_SAID = re.compile(r"(\{system\}|\{user\}|\{assistant\})")  # what was said
_TEMPLATE_TOKENS = {part for t in TEMPLATES.values() for text in t if text for part in _TOKEN.findall(text)}


def _lay_out(messages: list[dict], name: str) -> Iterable[tuple[str, dict, bool]]:
    """The template's text of each turn, what was said in it, and whether it is learnt."""
    if messages[0]["role"] == "text":  # a plain document
        yield "{bos}", {}, False
        yield "{assistant}{eos}", {"{assistant}": messages[0]["content"]}, True
        return
    template, said = TEMPLATES[name], {}
    for number, message in enumerate(messages):
        content = message["content"].strip()
        said = {**said, f"{{{message['role']}}}": content}
        if message["role"] == "assistant":
            yield template.assistant, said, True
        elif message["role"] == "user":
            if "{system}" in said and number == 1:
                yield template.first_with_system, said, False
            elif number > 0:
                yield template.user, said, False
            elif template.first_with_input and INPUT_HEADING in content:
                yield template.first_with_input, said, False
            else:
                yield template.first, said, False
            yield template.reply, said, False


class _Section(NamedTuple):
    text: str
    is_token: bool  # the name of a special token; else text, whatever it looks like
    learnt: bool


def _sections(turns: Iterable[tuple[str, dict, bool]]) -> Iterable[_Section]:
    """Cut the turns where special tokens stand and where learning begins or ends."""
    text, text_learnt = "", False
    for turn, said, learnt in turns:
        for part in _TOKEN.split(turn):
            is_token = _TOKEN.fullmatch(part) is not None
            if text and (is_token or learnt != text_learnt):
                yield _Section(text, False, text_learnt)
                text = ""
            if is_token:
                yield _Section(part, True, learnt)
            else:
                text, text_learnt = text + _SAID.sub(lambda match, said=said: said[match[0]], part), learnt
    if text:
        yield _Section(text, False, text_learnt)


def _to_jinja(template: Template, space_after_bos: bool) -> str:
    """A template in the language of `transformers`' chat templates."""
    values = {"{bos}": "bos_token", "{eos}": "eos_token", "{system}": "system"}
    values |= dict.fromkeys(("{user}", "{assistant}"), "message['content'] | trim")

    def show(text: str | None) -> str:
        parts = [part for part in re.split(rf"{_TOKEN.pattern}|{_SAID.pattern}", text or "") if part]
        shown = [f"({values[part]})" if part in values else json.dumps(part) for part in parts]
        if parts[:1] == ["{bos}"] and space_after_bos:
            shown.insert(1, '" "')
        return "{{ " + " ~ ".join(shown) + " }}" if shown else ""

    branches = [
        ("message['role'] == 'assistant'", template.assistant),
        ("loop.first and system is not none", template.first_with_system),
        (f"loop.first and {json.dumps(INPUT_HEADING)} in (message['content'] | trim)", template.first_with_input),
        ("loop.first", template.first),
        ("true", template.user),
    ]
    chosen = [f"if {condition} %}}{show(text)}" for condition, text in branches if text is not None]
    return (
        "{% set system = none %}{% set turns = messages %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}{% endif %}"
        "{% for message in turns %}{% "
        + "{% el".join(chosen)
        + "{% endif %}{% if message['role'] == 'user' and (not loop.last or add_generation_prompt) %}"
        + show(template.reply)
        + "{% endif %}{% endfor %}"
    )
