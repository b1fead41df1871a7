"""Tokenizer: text to ids and back, chat templates, and training a tokenizer.

A chat template cuts a conversation into **segments**: special tokens and texts, each inside the loss or outside it.
Special tokens are inserted as ids and never parsed out of text, so "<s>" in a user's text stays three characters.
Text inside the loss is encoded apart from the text before it. The prompt therefore has the same ids in training, where
an answer follows, as in generation, where it stands alone.

In order: chat templates, `Tokenizer`. `infra/tokenizer_files.py` reads the two file formats.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from infra.files import parse_json_object
from infra.tokenizer_files import (
    JsonModel,
    NotSentencePieceError,
    SentencePieceModel,
    added_tokens,
    adds_bos,
    prefix_rules,
)

# --- Chat templates ---------------------------------------------------------------------------------------------------


class Template(NamedTuple):
    """The text of each kind of turn. {bos}, {eos} and `special_tokens` in it are inserted as ids.

    {system}, {user} and {assistant} stand for the contents of messages. Surrounding white space is stripped, because
    `transformers` encodes a conversation as one text, and could merge it with white space of the template.
    """

    first_user: str  # the start of the conversation and the first user turn
    first_user_with_system: str  # the same, with a system message
    user: str  # any later user turn
    generation_prompt: str  # what follows a user turn, before the assistant turn
    assistant: str  # an assistant turn; all of it is in the loss
    first_user_with_input: str | None = None  # `first_user` for an Alpaca record that has an input
    last_generation_prompt: str | None = None  # `generation_prompt` after the last user turn
    special_tokens: tuple[str, ...] = ()

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Cut a text at its special tokens. -> (part, whether it is a special token), without empty parts"""
        tokens = ("{bos}", "{eos}", *self.special_tokens)
        parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        return [(part, part in tokens) for part in parts if part]


# The prompt of Stanford Alpaca (Taori et al. 2023), with a new line after its last heading.
INPUT_HEADING = "\n\n### Input:\n"  # stands between the instruction and the input in a user message
_ALPACA_PREAMBLE = (
    "{{bos}}Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = ", paired with an input that provides further context"
_ALPACA_USER = "\n\n### Instruction:\n{user}"
_ZEPHYR_USER = "<|user|>\n{user}{eos}\n"
_CHATML_USER = "<|im_start|>user\n{user}<|im_end|>\n"
_LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{{{}}}<|eot_id|>"
_LLAMA3_USER = _LLAMA3_TURN.format("user", "user")


def _mistral_template(user: str, assistant: str, special_tokens: tuple[str, ...] = ()) -> Template:
    """A template of Mistral's. From v0.3 on, theirs puts the system turn into the last user turn, not the first."""
    user, with_system = user.format("{user}"), user.format("{system}\n\n{user}")
    return Template("{bos}" + user, "{bos}" + with_system, user, "", assistant, special_tokens=special_tokens)


TEMPLATES = {
    "alpaca": Template(
        first_user=_ALPACA_PREAMBLE.format("") + _ALPACA_USER,
        first_user_with_system="{bos}{system}" + _ALPACA_USER,
        user=_ALPACA_USER,
        generation_prompt="\n\n### Response:\n",
        assistant="{assistant}{eos}",
        first_user_with_input=_ALPACA_PREAMBLE.format(_ALPACA_WITH_INPUT) + _ALPACA_USER,
    ),
    "llama2": Template(
        first_user="{bos}[INST] {user} [/INST]",
        first_user_with_system="{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
        user="{bos}[INST] {user} [/INST]",
        generation_prompt="",
        assistant=" {assistant} {eos}",
    ),
    "mistral": _mistral_template("[INST] {} [/INST]", " {assistant}{eos}"),  # Mistral 7B v0.1 and v0.2
    "mistral-v3": _mistral_template("[INST] {}[/INST]", " {assistant}{eos}", ("[INST]", "[/INST]")),  # v0.3
    "mistral-v3-tekken": _mistral_template("[INST]{}[/INST]", "{assistant}{eos}", ("[INST]", "[/INST]")),  # Nemo
    "zephyr": Template(  # Zephyr 7B and TinyLlama-Chat; its marks are text, and it has no bos
        first_user=_ZEPHYR_USER,
        first_user_with_system="<|system|>\n{system}{eos}\n" + _ZEPHYR_USER,
        user="\n" + _ZEPHYR_USER,
        generation_prompt="<|assistant|>\n",
        assistant="{assistant}{eos}",
    ),
    "llama3": Template(
        first_user="{bos}" + _LLAMA3_USER,
        first_user_with_system="{bos}" + _LLAMA3_TURN.format("system", "system") + _LLAMA3_USER,
        user=_LLAMA3_USER,
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{assistant}<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": Template(
        first_user=_CHATML_USER,
        first_user_with_system="<|im_start|>system\n{system}<|im_end|>\n" + _CHATML_USER,
        user="\n" + _CHATML_USER,
        generation_prompt="<|im_start|>assistant\n",
        assistant="{assistant}<|im_end|>",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "gemma": Template(
        first_user="{bos}<start_of_turn>user\n{user}<end_of_turn>\n",
        first_user_with_system="{bos}<start_of_turn>user\n{system}\n\n{user}<end_of_turn>\n",
        user="\n<start_of_turn>user\n{user}<end_of_turn>\n",
        generation_prompt="<start_of_turn>model\n",
        assistant="{assistant}<end_of_turn>",
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
}
# Qwen3 without thinking: an empty thought stands before the last answer. It is part of the prompt, outside the loss.
_QWEN3_PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
TEMPLATES["qwen3"] = TEMPLATES["chatml"]._replace(last_generation_prompt=_QWEN3_PROMPT)
_TEMPLATE_TOKENS = {token for template in TEMPLATES.values() for token in template.special_tokens}

# `Tokenizer.choose_template` takes the first of these whose marker is in the model's chat_template, but prefers those
# whose special tokens the tokenizer has.
TEMPLATE_MARKERS = {
    "llama3": "<|start_header_id|>",
    "qwen3": r"<think>\n\n</think>\n\n",
    "chatml": "<|im_start|>",
    "gemma": "<start_of_turn>",
    "zephyr": "<|user|>",
    "llama2": "<<SYS>>",
    "mistral-v3": "[INST] ",
    "mistral-v3-tekken": "[INST]",
    "mistral": "[INST]",
    "alpaca": "### Response:",
}


def check_conversation(messages: list[dict], template: Template) -> None:
    """Raise ValueError if the last answer begins with the <think> that the template itself writes before it."""
    is_answer, content = messages[-1]["role"] == "assistant", messages[-1]["content"].lstrip()
    if template.last_generation_prompt and is_answer and content.startswith("<think>"):
        raise ValueError("an answer begins with <think>, as does the template's; choose --template chatml")


def _render_turns(messages: list[dict], template: Template) -> Iterable[tuple[str, dict[str, str], int | None]]:
    """For each turn, yield the template's text, the contents that belong in it, and its weight in the loss.

    The weight is 0 or 1 for an assistant turn and None for a prompt. So an answer of weight 0, which is not learned, is
    encoded apart from its prompt too.
    """
    check_conversation(messages, template)
    if messages[0]["role"] == "text":  # a plain document
        yield "{assistant}{eos}", {"assistant": messages[0]["content"]}, 1
        return
    contents = {}
    for number, message in enumerate(messages):
        content = message["content"].strip()
        contents = {**contents, message["role"]: content}
        if message["role"] == "assistant":
            yield template.assistant, contents, int(message.get("weight", 1) != 0)
        elif message["role"] == "user":
            if "system" in contents and number == 1:
                text = template.first_user_with_system
            elif number > 0:
                text = template.user
            elif template.first_user_with_input and INPUT_HEADING in content:
                text = template.first_user_with_input
            else:
                text = template.first_user
            yield text, contents, None
            is_last = number >= len(messages) - 2  # at most an answer follows
            yield (is_last and template.last_generation_prompt) or template.generation_prompt, contents, None


class _Segment(NamedTuple):
    text: str  # ordinary text, or the name of a special token
    is_special: bool
    weight: int | None  # in the loss, of an answer; None for a prompt


def _segments(messages: list[dict], template: Template) -> Iterable[_Segment]:
    """Cut a conversation into segments, at every special token and wherever the weight changes.

    Contents are filled in after the cut, so that nothing in them is taken for a special token.

    >>> messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    >>> [(segment.text, segment.weight) for segment in _segments(messages, TEMPLATES["mistral"])]
    [('{bos}', None), ('[INST] Hi! [/INST]', None), (' Hello.', 1), ('{eos}', 1)]
    """
    text, text_weight = "", None
    for turn, contents, weight in _render_turns(messages, template):
        for part, is_special in template.split(turn):
            if text and (is_special or weight != text_weight):
                yield _Segment(text, False, text_weight)
                text = ""
            if is_special:
                yield _Segment(part, True, weight)
            else:
                text, text_weight = text + part.format(**contents), weight
    if text:
        yield _Segment(text, False, text_weight)


def _to_jinja(template: Template, space_after_bos: bool) -> str:
    """A template in Jinja, the language of `transformers`' chat templates."""
    expressions = {"{bos}": "bos_token", "{eos}": "eos_token", "{system}": "system"}
    expressions |= dict.fromkeys(("{user}", "{assistant}"), "message['content'] | trim")

    def output(text: str) -> str:
        parts = template.split(text)
        texts = [part for whole, _ in parts for part in re.split(r"(\{\w+\})", whole) if part]
        terms = [f"({expressions[part]})" if part in expressions else json.dumps(part) for part in texts]
        if space_after_bos and parts[:1] == [("{bos}", True)] and not parts[1][1]:
            terms.insert(1, '" "')
        return "{{ " + " ~ ".join(terms) + " }}" if terms else ""

    branches = [
        ("message['role'] == 'assistant'", template.assistant),
        ("loop.first and system is not none", template.first_user_with_system),
        (f"loop.first and {json.dumps(INPUT_HEADING)} in (message['content'] | trim)", template.first_user_with_input),
        ("loop.first", template.first_user),
        ("true", template.user),
    ]
    branches = [f"if {condition} %}}{output(text)}" for condition, text in branches if text is not None]
    prompt, last_prompt = output(template.generation_prompt), template.last_generation_prompt
    if last_prompt:
        prompt = f"{{% if loop.revindex > 2 %}}{prompt}{{% else %}}{output(last_prompt)}{{% endif %}}"
    return (
        "{% set system = none %}{% set turns = messages %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}{% endif %}"
        "{% for message in turns %}{% "
        + "{% el".join(branches)
        + "{% endif %}{% if message['role'] == 'user' and (not loop.last or add_generation_prompt) %}"
        + prompt
        + "{% endif %}{% endfor %}"
    )


# --- The tokenizer ----------------------------------------------------------------------------------------------------

# The files of a tokenizer, and generation_config.json. They are copied from the model folder to every saved model.
FILES = tuple(
    """tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja generation_config.json""".split()
)


class Tokenizer:
    """The tokenizer of a model folder. Its ids equal those of `transformers`.

    `files` maps file names to contents; `model_config` is the folder's config.json.
    `vocab_size` is the largest id plus one. `bos_id` and `eos_id` are None if the tokenizer has no such token.
    `adds_bos` says whether a plain text begins with bos. Chat templates say it themselves.
    """

    def __init__(self, files: dict[str, bytes], model_config: dict | None = None):
        self.files, self._model_config = files, model_config or {}
        tokenizer_json, self._config = self._parse("tokenizer.json"), self._merge_configs()
        added = added_tokens(self._config, tokenizer_json, self._parse("added_tokens.json"))
        self._special_tokens = _TEMPLATE_TOKENS | {token for token, (_, is_special) in added.items() if is_special}
        if "tokenizer.model" in files:
            self._model = SentencePieceModel(files["tokenizer.model"], added, self._special_tokens)
        else:
            self._model = JsonModel(tokenizer_json, _TEMPLATE_TOKENS)
        rules = prefix_rules(self._config, tokenizer_json, self._model_config.get("model_type"))
        self._prefix_rules = rules._replace(adds_any=rules.adds_any and self._model.adds_dummy_prefix)
        self.vocab_size: int = self._model.vocab_size
        self.bos_id = self._special_token_id("bos_token", self._model.bos_id)
        self.eos_id = self._special_token_id("eos_token", self._model.eos_id)
        has_bos = self.bos_id is not None
        self.adds_bos = has_bos and adds_bos(self._config, tokenizer_json, self.id_to_token(self.bos_id))

    def _parse(self, name: str) -> dict:
        """The object in one of the JSON files; empty if there is no such file."""
        return parse_json_object(self.files.get(name, b"{}"), name)

    def _merge_configs(self) -> dict:
        """tokenizer_config.json and special_tokens_map.json in one, with the class that `transformers` would choose."""
        config, special_tokens = self._parse("tokenizer_config.json"), self._parse("special_tokens_map.json")
        # In `transformers`, special_tokens_map.json counts only if tokenizer_config.json does not list all tokens.
        config = special_tokens | config if "added_tokens_decoder" in config else config | special_tokens
        default = "GemmaTokenizer" if self._model_config.get("model_type") == "gemma" else "PreTrainedTokenizerFast"
        return config | {"tokenizer_class": config.get("tokenizer_class") or default}

    def _special_token_id(self, key: str, default: int | None) -> int | None:
        """The id of a token: the configuration's, else `default`, else one in config.json or generation_config.json."""
        if key in self._config:
            token = self._config[key].get("content") if isinstance(self._config[key], dict) else self._config[key]
            if token is not None and not (isinstance(token, str) and self.token_to_id(token) is not None):
                raise ValueError(f"tokenizer_config.json: {key} {token!r} is not in the vocabulary")
            return self.token_to_id(token)
        # Qwen's models have a bos_token_id that their tokenizers never insert.
        if default is not None or (key == "bos_token" and "qwen" in str(self._model_config.get("model_type"))):
            return default
        ids = [values.get(f"{key}_id") for values in (self._model_config, self._parse("generation_config.json"))]
        ids = [token_id for entry in ids for token_id in (entry if isinstance(entry, list) else [entry])]
        return next((i for i in ids if isinstance(i, int) and 0 <= i < self.vocab_size), None)

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Open the tokenizer of a model folder, or a single `tokenizer.model` or `tokenizer.json` file.

        Raises FileNotFoundError or ValueError naming the file and what is wrong with it, or the package to install.
        """
        path = Path(path)
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        else:
            name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
            files = {name: path.read_bytes()} if path.is_file() else {}
        if not files.keys() & {"tokenizer.model", "tokenizer.json"}:
            raise FileNotFoundError(f"{path}: not found there: tokenizer.model or tokenizer.json")
        try:
            content = (path / "config.json").read_bytes() if (path / "config.json").is_file() else b"{}"
            model_config = parse_json_object(content, "config.json")
            try:
                tokenizer = cls(files, model_config)
            except NotSentencePieceError:  # in some folders, tokenizer.model has another format
                if "tokenizer.json" not in files:
                    raise
                files = {name: content for name, content in files.items() if name != "tokenizer.model"}
                tokenizer = cls(files, model_config)
            _ = tokenizer.hf_chat_templates  # raises if it cannot be read
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: a tokenizer file holds something of the wrong kind ({error!r})") from None
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a BPE tokenizer with Llama's settings: byte fallback, no normalization, all white space kept."""
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
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        return cls({"tokenizer.model": model.getvalue(), "tokenizer_config.json": _to_json(config)})

    @property
    def fingerprint(self) -> bytes:
        """Bytes that are equal for two tokenizers only if both give every conversation the same ids."""
        return repr((self._prefix_rules, self.bos_id, self.eos_id, sorted(self.files.items()))).encode()

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token, or None if the vocabulary does not have it."""
        return None if token is None else self._model.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id, as the vocabulary writes it."""
        return self._model.id_to_token(token_id)

    def encode(self, text: str, add_prefix: bool = True) -> list[int]:
        """The ids of a text, without special tokens; `add_prefix` allows SentencePiece's space before it."""
        ids, rules = [], self._prefix_rules
        for part, added_id in self._model.split_added_tokens(text):
            if added_id is None:
                may_add_prefix = rules.before_space or not part.startswith(self._model.spaces)
                ids += self._model.encode(part, rules.adds_any and add_prefix and may_add_prefix)
            else:
                ids.append(added_id)
                add_prefix = rules.after_special
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens are skipped, and so are the ids of embedding rows beyond the vocabulary."""
        return self._model.decode(ids)

    def render_conversation(self, messages: list[dict], template: str) -> tuple[list[int], list[bool]]:
        """The ids of a conversation and its loss mask: True for assistant turns and the special tokens that end them.

        `messages` are {"role", "content"} with the roles system (first only), user and assistant. If the last one is a
        user turn, the ids are the prompt for generation. An assistant message with "weight": 0 has a mask of False. A
        single message of role `text` is a plain document, and the mask is True for all of it but a bos token.
        Raises ValueError if the tokenizer lacks a special token of the template.
        """
        is_document = messages[0]["role"] == "text"
        ids = [self.bos_id] if is_document and self.adds_bos else []
        loss_mask, follows_text = [False] * len(ids), False
        for segment in _segments(messages, TEMPLATES[template]):
            if segment.is_special:
                new_ids = self._template_token_ids(segment.text, template)
            else:
                may_add_prefix = not ids or ids[-1] == self.bos_id or self._prefix_rules.after_special
                new_ids = self.encode(segment.text, add_prefix=may_add_prefix and not follows_text)
            follows_text = not segment.is_special
            ids += new_ids
            loss_mask += [segment.weight == 1] * len(new_ids)
        return ids, loss_mask

    def _template_token_ids(self, token: str, template: str) -> list[int]:
        """The id of a special token in a template, as a list; empty for a {bos} that the tokenizer does not have."""
        placeholders = {"{bos}": self.bos_id, "{eos}": self.eos_id}
        token_id = placeholders[token] if token in placeholders else self.token_to_id(token)
        if token_id is not None:
            return [token_id]
        if token == "{bos}":  # Qwen's tokenizers have none
            return []
        if token == "{eos}":
            raise ValueError("the tokenizer's files name no eos_token, without which no answer would learn to end")
        raise ValueError(f"template {template}: the tokenizer has no token {token}; choose another --template")

    def stop_ids(self, template: str) -> list[int]:
        """The ids at which generation stops: the folder's `eos_token_id`, and those that end an assistant turn."""
        ids = self._parse("generation_config.json").get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        parts = TEMPLATES[template].split(TEMPLATES[template].assistant)
        ids += [i for part, is_special in parts if is_special for i in self._template_token_ids(part, template)]
        return list(dict.fromkeys(ids))

    @property
    def hf_chat_templates(self) -> dict[str, str]:
        """The chat templates in the tokenizer's files, in Jinja, by name. A single one is called "default"."""
        file = self.files.get("chat_template.jinja", b"").decode("utf-8", "replace")
        jinja = file or self._config.get("chat_template")
        if isinstance(jinja, list):
            return {entry["name"]: entry["template"] for entry in jinja}
        return {"default": jinja} if jinja else {}

    def choose_template(self, name: str | None) -> str:
        """Return `name` or, if that is None, what the folder's default chat template resembles (`alpaca` without one).

        Raises ValueError if it resembles none of `TEMPLATES`, or if the tokenizer cannot be used with the template.
        """
        jinja = self.hf_chat_templates.get("default")
        if name is None and jinja:
            known = [name for name in TEMPLATES if jinja == self.chat_template(name)]
            known += [name for name, marker in TEMPLATE_MARKERS.items() if marker in str(jinja)]
            if not known:
                raise ValueError(f"the model's chat_template is not known; choose --template: {', '.join(TEMPLATES)}")
            name = min(known, key=lambda name: None in map(self.token_to_id, TEMPLATES[name].special_tokens))
        name = name or "alpaca"
        self._check_template(name)
        return name

    def _check_template(self, name: str) -> None:
        """Raise ValueError if the tokenizer lacks a special token of the template, or has one for a text in it."""
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        self.render_conversation(conversation, name)  # raises for a special token that is missing
        parts = TEMPLATES[name].split(" ".join(text for text in TEMPLATES[name] if isinstance(text, str)))
        text = "".join(part for part, is_special in parts if not is_special)
        for token in sorted(self._special_tokens, reverse=True):
            if token in text and self.token_to_id(token) is not None:
                raise ValueError(
                    f"template {name} spells {token} out, and the tokenizer has a token for it; try another --template"
                )

    def chat_template(self, template: str) -> str:
        """The template in Jinja, with which `transformers` gives the ids of `render_conversation`."""
        # We add a dummy prefix after bos. `transformers` may add none after a special token, so Jinja writes the space.
        space_after_bos = self._prefix_rules.adds_any and not self._prefix_rules.after_special
        return _to_jinja(TEMPLATES[template], space_after_bos)

    def files_for(self, template: str) -> dict[str, bytes]:
        """The files to save with a model trained on `template`, including its chat template and its stop ids.

        tokenizer_config.json says what has been used, also where that was a default or came from another file.
        """
        config = self._parse("tokenizer_config.json") | {"tokenizer_class": self._config["tokenizer_class"]}
        for key, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            config.setdefault(key, None if token_id is None else self.id_to_token(token_id))
        if "tokenizer.model" in self.files:
            config.setdefault("legacy", self._prefix_rules.after_special)
        config |= {"add_bos_token": self.adds_bos, "chat_template": self.chat_template(template)}
        generation = self._parse("generation_config.json")
        generation |= {"eos_token_id": self.stop_ids(template) or None, "bos_token_id": self.bos_id}
        files = {name: content for name, content in self.files.items() if name != "chat_template.jinja"}
        files["tokenizer_config.json"] = _to_json(config)
        files["generation_config.json"] = _to_json(generation)
        return files


def _to_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
