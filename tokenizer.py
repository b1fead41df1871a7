"""Text to ids and back, chat templates, and the training of a tokenizer.

A conversation becomes ids **piece by piece**: the template gives texts and special ids in order, each with a mark that
says whether the model is to learn it. Because the prompt's pieces come first and are encoded on their own, the ids
trained on begin with exactly the ids that generation feeds, and a "<s>" in somebody's text stays four letters.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

# The files of a model folder that make up its tokenizer; whichever are there travel with the weights.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# SentencePiece puts a space before the first word of a text, which must not happen again where a text goes on in the
# next piece, and offers no switch for it. But its model is a protocol buffer, and those are merged by concatenation,
# the last value winning: these four bytes say normalizer_spec (field 3, 2 bytes) { add_dummy_prefix (field 3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece tokenizer. `bos_id` and `eos_id` are None where the model has no such token.

    Special tokens are inserted as ids and never parsed out of text.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        model = files["tokenizer.model"]
        self._start = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._continue = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self.vocab_size: int = self._start.vocab_size()
        self.bos_id, self.eos_id = (None if i < 0 else i for i in (self._start.bos_id(), self._start.eos_id()))

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Open a model folder's `tokenizer.model`, or that file. FileNotFoundError or ValueError name it."""
        path = Path(path)
        if path.is_dir():
            found = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
        else:
            found = {"tokenizer.model": path}
        model = found.get("tokenizer.model", path / "tokenizer.model")
        if not model.is_file():
            raise FileNotFoundError(f"{model}: not found; a SentencePiece model is needed")
        try:
            return cls({name: file.read_bytes() for name, file in found.items()})
        except RuntimeError:
            raise ValueError(f"{model}: not a SentencePiece model") from None

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
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
        return cls(
            {"tokenizer.model": model.getvalue(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}
        )

    def save(self, folder) -> None:
        """Write the tokenizer's files into `folder`."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text, without special tokens; `continues` where other text comes right before it."""
        return (self._continue if continues else self._start).encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens, and rows of an embedding that is larger than the tokenizer, have none."""
        return self._start.decode([i for i in ids if i < self.vocab_size])

    def apply_template(self, messages: list[dict], template: str) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is supervised: assistant turns and the end token closing each.

        `messages` are {"role", "content"} with roles system (first), user and assistant; ending with a user turn they
        give the prompt that generation starts from. A single message of role `text` is supervised as a whole.
        """
        ids, supervised = [], []
        for piece, learn in (_text if messages[0]["role"] == "text" else TEMPLATES[template])(messages, self):
            if isinstance(piece, str):
                new = self.encode(piece, continues=bool(ids) and ids[-1] != self.bos_id)
            else:
                new = [] if piece is None else [piece]
            ids += new
            supervised += [learn] * len(new)
        return ids, supervised


# --- Templates: pieces of text and special ids, each with whether the model is to learn it ----------------------------

Pieces = Iterator[tuple[str | int | None, bool]]

# The prompt of Stanford Alpaca (Taori et al. 2023), with a new line after its last heading: no piece of a tokenizer
# joins what stands on both sides of it, so prompt and response have the same ids together and apart.
# A user turn that carries an input has it under this heading.
INPUT_HEADING = "\n\n### Input:\n"
_WRITE = "Write a response that appropriately completes the request."
ALPACA_PREAMBLE = f"Below is an instruction that describes a task. {_WRITE}"
ALPACA_TURN = "\n\n### Instruction:\n{}\n\n### Response:\n"
_ALPACA_PREAMBLE_WITH_INPUT = (
    f"Below is an instruction that describes a task, paired with an input that provides further context. {_WRITE}"
)


def _alpaca(messages: list[dict], tokenizer: Tokenizer) -> Pieces:
    """The Alpaca prompt; further turns repeat its headings, and a system turn takes the place of its preamble."""
    if messages[0]["role"] == "system":
        preamble, messages = messages[0]["content"], messages[1:]
    else:
        with_input = INPUT_HEADING in messages[0]["content"]
        preamble = _ALPACA_PREAMBLE_WITH_INPUT if with_input else ALPACA_PREAMBLE
    yield tokenizer.bos_id, False
    yield preamble, False
    for message in messages:
        if message["role"] == "user":
            yield ALPACA_TURN.format(message["content"]), False
        else:
            yield message["content"], True
            yield tokenizer.eos_id, True


def _text(messages: list[dict], tokenizer: Tokenizer) -> Pieces:
    """A plain document, all of it supervised."""
    yield tokenizer.bos_id, False
    yield messages[0]["content"], True
    yield tokenizer.eos_id, True


TEMPLATES = {"alpaca": _alpaca}
