"""The formats of data sets: what the keys of a record mean, and the messages in it.

`to_messages` reads a record to train on, `to_prompt` one to answer. Where records are is in infra/records.py.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizer import INPUT_HEADING


class Format(NamedTuple):
    """The keys by which a record of a format is known and read."""

    prompt: str
    response: str | None = None  # None: all turns are under the first key, or (PROMPT_FORMATS) no response is read


FORMATS = (  # the first one whose keys a record has is taken
    Format("messages"),  # OpenAI, UltraChat 200K, Tulu 3
    Format("conversations"),  # ShareGPT, LIMA
    Format("conversation"),  # Capybara, XTuner
    Format("instruction", "output"),  # Alpaca, MedAlpaca
    Format("instruction", "response"),  # Dolly
    Format("prompt", "completion"),  # TRL; texts, or lists of turns
    Format("prompt", "response"),
    Format("query", "response"),  # MetaMathQA
    Format("question", "response"),  # OpenOrca
    Format("question", "answer"),  # GSM8K
    Format("problem", "solution"),
    Format("data"),  # UltraChat
    Format("text"),  # a document, all of it supervised
)
# All but `text` may have `system` (or `system_prompt`), a text, and `history`, (prompt, response) pairs that precede.
# A prompt that is a text may have `input` or `context`, which follows it under a heading.
PROMPT_FORMATS = tuple(map(Format, dict.fromkeys(["turns", *(prompt for prompt, _ in FORMATS if prompt != "text")])))
OPTIONAL_KEYS = ("system", "system_prompt", "history", "input", "context")
RESPONSE_KEYS = {response for _, response in FORMATS if response}
TURN_KEYS = ("messages", "conversations", "conversation", "data")  # these hold a list of turns
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model"),
}
# Of an assistant turn: 0 or false if it is not to be learned.
LOSS_KEYS = ("weight", "train", "loss_mask", "loss", "output_with_loss")
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_NO_INPUT = ("nan", "<noinput>", "<no input>")  # what data sets write where there is no input
_SPELLED_OUT_TOKENS = re.compile(
    r"<\|(im_start|start_header_id|user|endoftext)\|>|<start_of_turn>|\[INST\]|</s>|^### (Human|Instruction):",
    re.MULTILINE,
)


def to_messages(record: dict) -> tuple[list[dict], list[str]]:
    """Read a record of any format. -> (messages, notes on what is left out of it)

    ValueError names the key at fault.

    >>> to_messages({"question": "Who?", "answer": "R. Moll.", "topic": "books"})
    ([{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'R. Moll.'}], ['ignored key topic'])
    """
    record = drop_missing(record)
    form, notes = _find_format(record, FORMATS), []
    if form.prompt == "text":
        if tree := record.keys() & {"role", "parent_id"}:
            raise ValueError(f"text with {min(tree)} is a turn of a conversation; join the turns of each into messages")
        messages = [{"role": "text", "content": require_text(record.pop("text"), "text")}]
    else:
        for key in ("label", "kto_tag"):  # of TRL's, ms-swift's and LLaMA-Factory's unpaired preferences
            if record.get(key) is False:
                raise ValueError(f"{key} is false: the answer is not to be learned; leave out the record, or the key")
        messages = _conversation(record, form, notes)
    if any(_SPELLED_OUT_TOKENS.search(message["content"]) for message in messages):
        notes.append("tokens of a chat template spelled out in a text, taken as plain text")
    notes += ignored_keys(record)  # those that are not yet read
    return messages, list(dict.fromkeys(notes))


def to_prompt(record: dict) -> tuple[list[dict], list[str], list[str]]:
    """Read what a record asks: the prompt that `to_messages` reads, or one without a response.

    -> (the messages before, the user turns to be answered one after the other, notes as those of `to_messages`)

    Only MT-Bench's `turns` or `prompt`, a list of texts, has several user turns to answer. ValueError names the key at
    fault.
    """
    record, notes = drop_missing(record), []
    form = _match_format(_filled_keys(record), FORMATS)
    if isinstance(record.get("turns"), list) or form is None or form.prompt == "text":
        form = _find_format(record, PROMPT_FORMATS)
    if form.prompt == "turns" or (form.prompt == "prompt" and _is_texts(record["prompt"])):
        turns = record.pop(form.prompt)
        if not isinstance(turns, list) or not turns:
            raise ValueError("turns must be a list of texts")
        turns = [require_text(turn, f"{form.prompt}[{number}]") for number, turn in enumerate(turns)]
        before = _take_system(record) + _take_history(record)
    else:
        *before, last = _conversation(record, Format(form.prompt), notes, last="user")
        turns = [last["content"]]
    notes += ignored_keys(record, known={*RESPONSE_KEYS, "id"})
    return before, turns, list(dict.fromkeys(notes))


def drop_missing(record: dict) -> dict:
    """The keys of a record or a turn that have a value. Merged data sets have null in the columns of the others."""
    return {key: value for key, value in record.items() if value is not None and value == value}  # NaN differs


def _is_empty(value) -> bool:
    return value in ([], {}) or (isinstance(value, str) and not value.strip())


def ignored_keys(record: dict, known=()) -> list[str]:
    """A note for each key of a record that has a value and is not one of the `known` ones."""
    return [f"ignored key {key}" for key, value in record.items() if key not in known and not _is_empty(value)]


def _is_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _filled_keys(record: dict) -> set[str]:
    return {key for key, value in record.items() if not _is_empty(value)}


def _match_format(keys, formats: Sequence[Format]) -> Format | None:
    return next((form for form in formats if all(key is None or key in keys for key in form)), None)


def _find_format(record: dict, formats: Sequence[Format]) -> Format:
    # Merged data sets may have "" or [] in the columns of the others. Where no format is filled, an empty key is named.
    filled = _filled_keys(record)
    form = _match_format(filled, formats)
    if form is None or form.prompt == "text":  # Alpaca has a column `text`, and some empty outputs
        form = next((other for other in formats if other.prompt in filled and other.response in record), form)
    if form := form or _match_format(record.keys(), formats):
        return form
    known = sorted({key for form in formats for key in form if key})
    unknown = [key for key in record if key not in (*known, *OPTIONAL_KEYS)]
    near = {key: difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8) for key in unknown}
    hints = [f"{key!r} (did you mean {names[0]!r}?)" for key, names in near.items() if names]
    has = "; ".join(" and ".join(filter(None, form)) for form in formats)
    keys = f"{list(record)[:8]}{' …' * (len(record) > 8)}"
    found = f"unknown key {', '.join(hints)}" if hints else f"keys {keys} are no known format"
    raise ValueError(f"{found}; a record has one of: {has}")


def _conversation(record: dict, form: Format, notes: list[str], last: str = "assistant") -> list[dict]:
    """The messages of a record up to the last turn of the role `last`. What is left out of them is added to `notes`.

    Keys that are read are taken out of the record.
    """
    messages = _read_turns(_take_turns(record, form), form.prompt, notes, last)
    num_system = int(messages[0]["role"] == "system")
    system = _take_system(record)
    if num_system and system:
        raise ValueError("system is given twice, as a key and as a turn")
    return system + messages[:num_system] + _take_history(record) + messages[num_system:]


def _take_system(record: dict) -> list[dict]:
    """The system turn under the key `system` or `system_prompt`, if there is one."""
    given = [key for key in ("system", "system_prompt") if not _is_empty(record.get(key, ""))]
    return [{"role": "system", "content": require_text(record.pop(key), key)} for key in given[:1]]


def _take_history(record: dict) -> list[dict]:
    """The earlier turns under the key `history`."""
    history, messages = record.pop("history", []), []
    if _is_empty(history):
        return []
    if not isinstance(history, (list, tuple)):
        raise ValueError(f"history must be a list of prompts and their responses, not {type(history).__name__}")
    for number, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history[{number}] must be a prompt and its response")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": require_text(text, f"history[{number}]")})
    return messages


def _take_input(record: dict) -> str:
    """What follows a prompt, with its heading: the text under the key `input` or `context`, or "" if there is none."""
    for key in ("input", "context"):
        value = record.pop(key, "")
        if not _is_empty(value) and not (isinstance(value, str) and value.strip().lower() in _NO_INPUT):
            return INPUT_HEADING + require_text(value, key)
    return ""


def _take_turns(record: dict, form: Format) -> list:
    """The turns of a record: the list under its first key, or a prompt and its response."""
    turns, response = record.pop(form.prompt), record.pop(form.response, None)
    if isinstance(turns, list) and form.response is None:
        return turns
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        turns = [{"weight": 0, **drop_missing(turn)} for turn in turns]  # of a prompt, nothing is learned
        return turns + (response if isinstance(response, list) else [{"role": "assistant", "content": response}])
    if form.prompt in TURN_KEYS:
        raise ValueError(f"{form.prompt} must be a list of turns, not {type(turns).__name__}")
    prompt = require_text(turns, form.prompt) + _take_input(record)
    turns = [{"role": "user", "content": prompt}]
    if form.response:
        turns.append({"role": "assistant", "content": require_text(response, form.response)})
    return turns


def _read_turns(turns: list, name: str, notes: list[str], last: str) -> list[dict]:
    """Messages of a list of turns: an optional system turn, then user and assistant in turn, ending with `last`."""
    turns = [drop_missing(turn) if isinstance(turn, dict) else turn for turn in turns]
    if all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    elif all(isinstance(turn, dict) and {"input", "output"} <= turn.keys() for turn in turns):
        turns = [turn for number, pair in enumerate(turns) for turn in _turns_of_pair(pair, is_first=number == 0)]
    roles = [_role(turn, f"{name}[{n}]") for n, turn in enumerate(turns)]
    start = roles.index("user") if "user" in roles else len(roles)
    end = max((n + 1 for n, role in enumerate(roles) if role == last), default=0)
    if end <= start:
        raise ValueError(f"{name} has no {last}'s turn" + (" after a user's turn" if last == "assistant" else ""))
    if "assistant" in roles[:start]:
        notes.append("first turn left out, which is the assistant's")
    for role in ("user", "system"):
        if role in roles[end:]:
            notes.append(f"last turn left out, which is the {role}'s")
    messages = []
    for n in [*(n for n in range(start) if roles[n] == "system"), *range(start, end)]:
        expected = ("user", "assistant")[sum(message["role"] != "system" for message in messages) % 2]
        if roles[n] != expected and not (roles[n] == "system" and n == 0):
            due = f"where the {expected}'s turn is due; join turns of one role, or remove the record"
            raise ValueError(f"{name}[{n}]: the role is {roles[n]} {due}")
        if roles[n] == "system" and _is_empty(turns[n].get(_content_key(turns[n]), "")):
            notes.append("empty system turn left out")
        else:
            messages.append(_message(turns[n], roles[n], f"{name}[{n}]", notes))
    return messages


def _turns_of_pair(pair: dict, is_first: bool) -> list[dict]:
    """The turns of {"input", "output"}. The first pair may have a system turn; what else there is is the answer's."""
    pair = dict(pair)
    system = [{"role": "system", "content": pair.pop("system")}] if is_first and "system" in pair else []
    user = {"role": "user", "content": pair.pop("input")}
    answer = pair.pop("output")
    return [*system, user, {**pair, "role": "assistant", "content": answer}]


def _role(turn, place: str) -> str:
    if not isinstance(turn, dict):
        raise ValueError(f"{place}: a turn must be an object with role and content, not {type(turn).__name__}")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name.lower() not in _ROLE_OF:
        known = ", ".join(_ROLE_OF)
        raise ValueError(f"{place}: the role {name!r} is not supported (tools are not); known are {known}")
    return _ROLE_OF[name.lower()]


def _content_key(turn: dict) -> str:
    return "value" if "content" not in turn and ("value" in turn or "from" in turn) else "content"


def _message(turn: dict, role: str, place: str, notes: list[str]) -> dict:
    """The message of a turn, with "weight": 0 if it is marked as not to be learned."""
    for key in ("tool_calls", "function_call"):
        if not _is_empty(turn.get(key, "")):
            raise ValueError(f"{place}.{key}: calls of tools are not supported")
    content_key = _content_key(turn)
    message = {"role": role, "content": require_text(turn.get(content_key), f"{place}.{content_key}")}
    list_name = place.partition("[")[0]
    content = message["content"]
    if role == "assistant" and content[: -len(content.lstrip())].strip("\r\n"):  # in code, it may be the indentation
        notes.append("white space before an answer left out")
    for key, value in turn.items():
        if key in LOSS_KEYS:
            if value not in (0, 1):
                raise ValueError(f"{place}.{key} is {value!r}; only 0 and 1 are supported")
            if role == "assistant" and not value:
                message["weight"] = 0
            elif role != "assistant" and value:
                notes.append(f"ignored key {list_name}[].{key} of a turn that is not the assistant's")
        elif key not in ("role", "from", "content") and not _is_empty(value) and value != turn[content_key]:
            notes.append(f"ignored key {list_name}[].{key}")
    return message


def require_text(value, key: str) -> str:
    """Return `value` as a text with something in it; ValueError says what is wrong with it.

    A number becomes its digits, true and false become these words, and a list of {"type": "text", "text"} is joined.
    """
    if isinstance(value, (int, float)) and math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, list) and value:
        value = "".join(_text_of_part(part, key, is_only=len(value) == 1) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{key} is empty; fill it in or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a character (a lone surrogate); write it whole or remove it") from None
    return value


def _text_of_part(part, key: str, is_only: bool) -> str:
    """The text of {"type": "text", "text"}; a part that is the only one needs no type."""
    if not isinstance(part, dict) or "role" in part:
        raise ValueError(f"{key} must be a text, not a list")
    kind = part.get("type") or ("text" if is_only else None)
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ValueError(f"{key} has a part of type {kind!r}; only texts are supported")
    return part["text"]
