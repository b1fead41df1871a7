"""The file formats of a tokenizer: a SentencePiece model (`tokenizer.model`) and a `tokenizer.json`.

SentencePiece puts a space before the first word of a text, the "dummy prefix". A text that follows another text must
not get one. Each class therefore holds its model twice: as it is in the file, and without the dummy prefix.
"""

import json
import re
from itertools import groupby
from typing import NamedTuple

import sentencepiece

# A SentencePiece model is a protocol buffer. A field that is appended to one replaces the earlier value of that field.
# These bytes are normalizer_spec (field 3, 2 bytes long) { add_dummy_prefix (field 3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# What `transformers` 5 writes, beside Metaspace, so that a text that starts with a space gets a dummy prefix too.
_DOUBLES_SPACE = "\\A▁"


class NotSentencePieceError(ValueError):
    """A `tokenizer.model` has another format."""


class SentencePieceModel:
    """A `tokenizer.model`, and the tokens that the other files add to it."""

    spaces = (" ", "▁")  # SentencePiece writes a space as "▁"

    def __init__(self, proto: bytes, added: dict[str, tuple[int, bool]], special_tokens: set[str]):
        try:
            proto = _make_control_pieces(proto, special_tokens)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._processor_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        except RuntimeError:
            raise NotSentencePieceError("tokenizer.model: not a SentencePiece model") from None
        self._size = self._processor.vocab_size()
        self._added = {token: token_id for token, (token_id, _) in added.items() if token_id >= self._size}
        in_text = [token for token in self._added if not added[token][1] and token not in special_tokens]
        self._in_text = {self._added[token]: token for token in sorted(in_text, key=len, reverse=True)}
        self._in_text_pattern = re.compile(f"({'|'.join(map(re.escape, self._in_text.values()))})")
        self.vocab_size = max([self._size - 1, *self._added.values()]) + 1
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()  # -1 if the model has no such piece
        self.bos_id, self.eos_id = (None if token_id < 0 else token_id for token_id in (bos_id, eos_id))
        self.adds_dummy_prefix = self._processor.encode("a") != self._processor_no_prefix.encode("a")

    def token_to_id(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)  # the id of <unk> if there is no such piece
        return token_id if self._processor.id_to_piece(token_id) == token else self._added.get(token)

    def id_to_token(self, token_id: int) -> str:
        if token_id < self._size:
            return self._processor.id_to_piece(token_id)
        return next(token for token, added_id in self._added.items() if added_id == token_id)

    def encode(self, text: str, dummy_prefix: bool) -> list[int]:
        return (self._processor if dummy_prefix else self._processor_no_prefix).encode(text)

    def split_added_tokens(self, text: str) -> list[tuple[str, int | None]]:
        """Cut a text at the added tokens in it, which the model does not know. -> each part, and its id if it is one"""
        if not self._in_text:
            return [(text, None)]
        parts = self._in_text_pattern.split(text)  # every second part is a token
        return [(part, self._added.get(part) if n % 2 else None) for n, part in enumerate(parts)]

    def decode(self, ids: list[int]) -> str:
        texts, processor = [], self._processor  # it leaves out the dummy prefix, which only the first text has
        for is_added, group in groupby(ids, key=self._in_text.__contains__):
            if is_added:
                texts += [self._in_text[token_id] for token_id in group]
            else:
                texts.append(processor.decode([token_id for token_id in group if token_id < self._size]))
            processor = self._processor_no_prefix
        return "".join(texts)


def _make_control_pieces(proto: bytes, names: set[str]) -> bytes:
    """Make the USER_DEFINED (type 4) pieces with these names CONTROL (type 3) pieces of the SentencePiece model.

    SentencePiece finds USER_DEFINED pieces in any text, but never CONTROL pieces. Gemma's <start_of_turn>, for example,
    is USER_DEFINED. A piece is stored as its name (field 1: length, bytes), score (field 2: 4 bytes), type (field 3).
    """
    encoded = [name.encode() for name in names if len(name.encode()) < 128]  # the length is stored in one byte
    fields = (b"\x0a" + bytes([len(name)]) + re.escape(name) for name in encoded)
    user_defined = b"((?:" + b"|".join(fields) + rb")\x15.{4}\x18)\x04"
    return re.sub(user_defined, lambda piece: piece[1] + b"\x03", proto, flags=re.DOTALL)


class JsonModel:
    """A `tokenizer.json`, read by the `tokenizers` package."""

    bos_id = eos_id = None  # only tokenizer_config.json names them

    def __init__(self, tokenizer_json: dict, template_tokens: set[str]):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("there is only a tokenizer.json, which needs: pip install tokenizers") from None
        prepends = '"Prepend"' in json.dumps(tokenizer_json.get("normalizer"))
        for entry in tokenizer_json.get("added_tokens", []):
            entry["special"] = entry["special"] or entry["content"] in template_tokens
            if prepends and entry.get("normalized") and not entry["special"]:
                raise ValueError(
                    f"tokenizer.json: the added token {entry['content']!r} is found only after a space, since it is "
                    'normalized; set its "normalized" to false'
                )
        components = ("normalizer", "pre_tokenizer")
        no_prefix = tokenizer_json | {name: _without_prefix(tokenizer_json.get(name)) for name in components}
        self.adds_dummy_prefix = no_prefix != tokenizer_json
        self.spaces = (" ",) if '"ByteLevel"' in json.dumps(tokenizer_json.get("pre_tokenizer")) else (" ", "▁")
        try:
            self._tokenizer = self._tokenizer_no_prefix = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json))
            if self.adds_dummy_prefix:
                self._tokenizer_no_prefix = tokenizers.Tokenizer.from_str(json.dumps(no_prefix))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"tokenizer.json: {error}") from None
        for tokenizer in (self._tokenizer, self._tokenizer_no_prefix):
            tokenizer.encode_special_tokens = True  # their names in a text are ordinary text
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, dummy_prefix: bool) -> list[int]:
        tokenizer = self._tokenizer if dummy_prefix else self._tokenizer_no_prefix
        return tokenizer.encode(text, add_special_tokens=False).ids

    def split_added_tokens(self, text: str) -> list[tuple[str, int | None]]:
        return [(text, None)]  # `encode` finds them

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _without_prefix(component):
    """A normalizer or pre-tokenizer of a `tokenizer.json`, changed so that it adds no dummy prefix."""
    if isinstance(component, list):
        return [_without_prefix(entry) for entry in component]
    if not isinstance(component, dict):
        return component
    if component.get("type") == "Prepend" or component.get("pattern") == {"Regex": _DOUBLES_SPACE}:
        return {"type": "Sequence", "normalizers": []}
    if component.get("type") == "ByteLevel":
        return component | {"add_prefix_space": False}
    component = {key: _without_prefix(value) for key, value in component.items()}
    return component | {"prepend_scheme": "never"} if component.get("type") == "Metaspace" else component


# --- What the other files say -----------------------------------------------------------------------------------------


def added_tokens(config: dict, tokenizer_json: dict, added_tokens: dict) -> dict[str, tuple[int, bool]]:
    """The tokens that the other files add to the model: token -> (id, whether it is special). First entries win."""
    decoder = config.get("added_tokens_decoder")
    entries = [{**entry, "id": int(key)} for key, entry in decoder.items()] if isinstance(decoder, dict) else []
    entries += [{"content": token, "id": token_id} for token, token_id in added_tokens.items()]
    entries += tokenizer_json.get("added_tokens", [])
    return {entry["content"]: (entry["id"], entry.get("special", False)) for entry in reversed(entries)}


def adds_bos(config: dict, tokenizer_json: dict, bos: str) -> bool:
    """Whether the tokenizer puts `bos` before a text by itself, as a tokenizer.json or the configuration says."""
    if not tokenizer_json:
        return config.get("add_bos_token") is not False
    processor = tokenizer_json.get("post_processor") or {}
    pieces = [piece for part in processor.get("processors", [processor]) for piece in part.get("single", [])]
    return any(piece.get("SpecialToken", {}).get("id") == bos for piece in pieces)


class PrefixRules(NamedTuple):
    """Where a dummy prefix is added."""

    adds_any: bool  # whether a dummy prefix is added at the start of a conversation and after bos
    after_special: bool  # after every special token too
    before_space: bool  # also to a text that itself starts with a space


def prefix_rules(config: dict, tokenizer_json: dict, model_type: str | None) -> PrefixRules:
    """The rules that `transformers` 5 applies to the same files. There are several conventions."""
    if config["tokenizer_class"] in ("LlamaTokenizer", "LlamaTokenizerFast") and model_type != "mistral":
        return PrefixRules(config.get("add_prefix_space") is not False, bool(config.get("legacy")), False)
    normalizer = json.dumps(tokenizer_json.get("normalizer"), ensure_ascii=False)
    if "Prepend" in normalizer or _DOUBLES_SPACE in normalizer:
        return PrefixRules(True, True, True)
    if tokenizer_json:
        first_only = '"prepend_scheme": "first"' in json.dumps(tokenizer_json.get("pre_tokenizer"))
        return PrefixRules(True, not first_only, False)
    legacy = bool(config.get("legacy", True))
    return PrefixRules(True, legacy, legacy)
