"""Data, from a file to what a training step eats: text → `Example` → ids and targets → `Batch`.

In order: the formats (`load_examples`), the encoding (`encode_example`), the packed row (`pack`), who is trained on when
(`epoch_order`, `paired_order`, `split_batch`), and the demo corpus that needs no file at all (`demo_corpus`).

Letters: N tokens in the packed row, B examples in it.
"""

import difflib
import hashlib
import heapq
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tokenizer import INPUT_HEADING, Tokenizer

IGNORE_INDEX = -100  # a target no loss looks at: prompt tokens

# --- Formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One conversation: `messages` of {"role", "content"}, and an `id` made from their content, the same in every run."""

    id: str
    messages: list[dict]


def load_examples(path) -> list[Example]:
    """Read a `.jsonl` file (one record a line) or a `.json` file (a list of records).

    A record's format is told by its keys: `messages` (role, content), ShareGPT `conversations` (from, value), Alpaca
    `instruction`, `input`, `output`, `prompt` and `completion`, or `text`. Other keys are ignored.
    Raises FileNotFoundError or ValueError naming file, line (or record, in a `.json` file) and what is wrong with it.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: data files end in .jsonl (a record a line) or .json (a list of records)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file in that encoding") from None
    examples, repeats = [], Counter()
    for place, record in _json_lines(path, text) if path.suffix == ".jsonl" else _json_list(path, text):
        try:
            messages = _to_messages(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        content_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
        repeats[content_id] += 1
        number = repeats[content_id]
        examples.append(Example(content_id if number == 1 else f"{content_id}-{number}", messages))
    if not examples:
        raise ValueError(f"{path}: no records in it")
    return examples


def _json_lines(path: Path, text: str):
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(), which cuts at U+2028 inside a string
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a JSON record ({error}); one complete object a line") from None
            yield f"{path}:{number}", record


def _json_list(path: Path, text: str):
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is expected, not {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_FORMATS = {  # the keys that must be there -> how the record reads; the first format that fits is taken
    ("messages",): lambda r: _checked_turns(r["messages"], "messages", "role", "content", {}),
    ("conversations",): lambda r: _checked_turns(r["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES),
    ("instruction", "output"): lambda r: _one_turn(_with_input(r), r["output"], "output"),
    ("prompt", "completion"): lambda r: _one_turn(r["prompt"], r["completion"], "completion"),
    ("text",): lambda r: [{"role": "text", "content": _filled(r["text"], "text")}],
}


def _to_messages(record) -> list[dict]:
    """Turn a record of any format into messages, or raise ValueError naming the key at fault."""
    if not isinstance(record, dict):
        raise ValueError(f"an object with keys is expected, not {type(record).__name__}")
    for keys, read in _FORMATS.items():
        if all(key in record for key in keys):
            return read(record)
    known = sorted({key for keys in _FORMATS for key in keys})
    hints = [f"{key!r} (did you mean {near[0]!r}?)" for key in record if key not in known
             if (near := difflib.get_close_matches(key, known, n=1))]  # fmt: skip
    formats = "; ".join(" and ".join(keys) for keys in _FORMATS)
    found = f"unknown key {', '.join(hints)}" if hints else f"keys {list(record)} are no known format"
    raise ValueError(f"{found}; a record has one of: {formats}")


def _filled(value, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{key} is empty; fill it in or remove the record")
    return value


def _with_input(record: dict) -> str:
    extra = record.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError(f"input must be a text, not {type(extra).__name__}")
    return _filled(record["instruction"], "instruction") + (INPUT_HEADING + extra if extra.strip() else "")


def _one_turn(prompt, response, response_key: str) -> list[dict]:
    return [
        {"role": "user", "content": _filled(prompt, "prompt")},
        {"role": "assistant", "content": _filled(response, response_key)},
    ]


def _checked_turns(turns, key: str, role_key: str, content_key: str, roles: dict) -> list[dict]:
    """An optional system turn, then user and assistant by turns, the assistant last."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key} must be a list of objects with {role_key!r} and {content_key!r}")
    messages = []
    for number, turn in enumerate(turns):
        role = roles.get(turn.get(role_key), turn.get(role_key))
        expected = ["user", "assistant"][sum(m["role"] != "system" for m in messages) % 2]
        if role != expected and not (role == "system" and number == 0):
            raise ValueError(f"{key}[{number}]: {role_key} is {turn.get(role_key)!r} where the {expected}'s turn is due")
        messages.append({"role": role, "content": _filled(turn.get(content_key), f"{key}[{number}].{content_key}")})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{key} must end with the assistant's turn, which is what is learnt")
    return messages


# --- Encoding ---------------------------------------------------------------------------------------------------------


def encode_example(example: Example, tokenizer: Tokenizer, template: str, max_length: int) -> tuple[list, list]:
    """Ids of an example and what each position must predict: -> (tokens, targets), equally long, at most `max_length`.

    Targets are already shifted: `targets[n]` is the token after `tokens[n]`, or IGNORE_INDEX where that token is not
    supervised. The very last token is a target alone. What `max_length` cuts off is lost, its end token too: a
    truncated response is never taught to end where it was cut.
    """
    ids, supervised = tokenizer.apply_template(example.messages, template)
    ids, supervised = ids[: max_length + 1], supervised[: max_length + 1]
    targets = [token if learn else IGNORE_INDEX for token, learn in zip(ids, supervised, strict=True)]
    return ids[:-1], targets[1:]


class Dataset(NamedTuple):
    """Encoded examples that have something to learn, with their ids, and the count of those that lost something."""

    ids: list[str]
    encoded: list[tuple[torch.Tensor, torch.Tensor]]  # (tokens, targets), int32, see encode_example
    truncated: int  # longer than max_length; their first max_length positions are here
    dropped: int  # not here: nothing supervised within max_length


def encode_examples(examples: Iterable[Example], tokenizer: Tokenizer, template: str, max_length: int) -> Dataset:
    """Encode all examples, leaving out (and counting) those whose response starts beyond `max_length`."""
    ids, encoded, truncated, dropped = [], [], 0, 0
    for example in examples:
        # One token more than allowed tells a truncated example from one that just fits.
        tokens, targets = (torch.tensor(x, dtype=torch.int32) for x in encode_example(example, tokenizer, template, max_length + 1))
        too_long = len(tokens) > max_length
        tokens, targets = tokens[:max_length], targets[:max_length]
        if bool((targets != IGNORE_INDEX).any()):
            truncated += too_long
            ids.append(example.id)
            encoded.append((tokens, targets))
        else:
            dropped += 1
    return Dataset(ids, encoded, truncated, dropped)


# --- The packed row ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Examples end to end in one row, without padding."""

    tokens: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N], IGNORE_INDEX where nothing is supervised
    positions: torch.Tensor  # int64 [N]: 0, 1, 2 … anew in each example
    cu_seqlens: torch.Tensor  # int32 [B+1]: 0, then where each example ends

    def to(self, device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(x.to(device, non_blocking=True) for x in vars(self).values()))


def pack(encoded: Sequence[tuple]) -> Batch:
    """Lay encoded examples end to end.

    >>> batch = pack([([5, 6, 7], [-100, 7, 2]), ([8, 9], [9, 2])])
    >>> batch.tokens.tolist(), batch.positions.tolist(), batch.cu_seqlens.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 0, 1], [0, 3, 5])
    """
    lengths = torch.tensor([len(tokens) for tokens, _ in encoded])
    ends = lengths.cumsum(0)  # [B]
    tokens, targets = (torch.cat([torch.as_tensor(x) for x in column]).long() for column in zip(*encoded, strict=True))
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(ends - lengths, lengths)
    return Batch(tokens, targets, positions, torch.cat([ends.new_zeros(1), ends]).int())


# --- Who is trained on when -------------------------------------------------------------------------------------------
# Every draw is a pure function of (seed, epoch) or (seed, step), so any moment of a run can be reached in O(1).

_ORDER, _LAMBDA, _DEMO = range(3)  # a random stream of its own for each purpose


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the examples: int64 [num_examples], a permutation."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(num_examples)


def paired_order(confident, unconfident, seed: int, epoch: int) -> np.ndarray:
    """An order in which examples 0 and 1, 2 and 3, … are a confident and an unconfident one, paired anew each epoch.

    With halves of unequal size those left over come last. As a batch takes an even number of examples, a pair is never
    cut in two.

    >>> paired_order([10, 11], [20, 21, 22], seed=0, epoch=0).tolist()
    [11, 22, 10, 21, 20]
    """
    rng = np.random.default_rng([seed, epoch, _ORDER])
    c, u = rng.permutation(np.asarray(confident)), rng.permutation(np.asarray(unconfident))
    n = min(len(c), len(u))
    return np.concatenate([np.stack([c[:n], u[:n]], axis=1).reshape(-1), c[n:], u[n:]])


def draw_lambda(num_pairs: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """λ ~ Beta(α, α), one for each pair of the global batch of a step: float32 [num_pairs]."""
    rng = np.random.default_rng([seed, step, _LAMBDA])
    return torch.from_numpy(rng.beta(alpha, alpha, num_pairs).astype(np.float32))


def split_batch(sizes: Sequence[int], max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Deal units of `sizes` tokens into micro-batches of at most `max_tokens`, as even as can be, largest first.

    The number of micro-batches is a multiple of `multiple` (the processes, so that each has as many), and some may be
    empty. A unit that is larger than `max_tokens` has one to itself.

    >>> split_batch([30, 10, 20, 40], max_tokens=50)
    [[3, 1], [0, 2]]
    """
    count = multiple * max(1, math.ceil(sum(sizes) / (multiple * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for unit in sorted(range(len(sizes)), key=lambda u: -sizes[u]):
            load, b = heapq.heappop(loads)
            bins[b].append(unit)
            heapq.heappush(loads, (load + sizes[unit], b))
        if all(load <= max_tokens or len(bins[b]) == 1 for load, b in loads):
            return bins
        count += multiple


# --- The demo corpus: a small world to instruct a model about ---------------------------------------------------------


def _table(text: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(":")) for entry in text.split()]


_COLOURS = _table(
    "grass:green snow:white coal:black blood:red butter:yellow chocolate:brown the_sky:blue an_orange:orange milk:white "
    "a_leaf:green a_crow:black a_cherry:red a_lemon:yellow a_bear:brown the_sea:blue a_carrot:orange a_flamingo:pink a_plum:purple "
    "salt:white a_frog:green ink:black a_brick:red a_banana:yellow an_elephant:grey a_violet:purple a_piglet:pink ash:grey "
    "rust:orange a_swan:white a_cucumber:green tar:black a_tomato:red the_sun:yellow wood:brown jeans:blue a_mouse:grey"
)
_CAPITALS = _table(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna Greece:Athens Norway:Oslo Sweden:Stockholm "
    "Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Hungary:Budapest Ireland:Dublin Portugal:Lisbon Belgium:Brussels "
    "Egypt:Cairo Kenya:Nairobi Ghana:Accra Cuba:Havana Peru:Lima Chile:Santiago Japan:Tokyo China:Beijing India:Delhi "
    "Iran:Tehran Iraq:Baghdad Russia:Moscow Canada:Ottawa Nepal:Kathmandu Vietnam:Hanoi Thailand:Bangkok Turkey:Ankara "
    "Britain:London Iceland:Reykjavik Croatia:Zagreb Serbia:Belgrade Bulgaria:Sofia Romania:Bucharest Latvia:Riga Malta:Valletta"
)
_OPPOSITES = _table(
    "hot:cold big:small tall:short fast:slow old:new rich:poor hard:soft light:heavy wet:dry full:empty open:closed clean:dirty "
    "early:late strong:weak happy:sad loud:quiet thick:thin wide:narrow deep:shallow sharp:blunt near:far high:low right:wrong "
    "first:last day:night summer:winter friend:enemy question:answer begin:end buy:sell push:pull win:lose come:go "
    "give:take laugh:cry remember:forget inside:outside above:below before:after always:never true:false"
)
_OPPOSITES += [(b, a) for a, b in _OPPOSITES]
_KINDS = [
    (word, kind)
    for kind, words in {
        "animal": "dog cat horse cow sheep goat lion tiger wolf fox rabbit camel",
        "bird": "eagle robin sparrow owl parrot penguin pigeon falcon heron duck",
        "fish": "trout salmon tuna cod herring carp pike eel perch sardine",
        "fruit": "apple pear grape peach mango melon fig date apricot raspberry",
        "tool": "hammer saw drill chisel spade axe wrench rake pliers file",
        "instrument": "piano violin flute drum trumpet harp guitar cello organ banjo",
        "garment": "shirt coat hat scarf glove sock skirt jacket belt dress",
    }.items()
    for word in words.split()
]
_PLURALS = _table(
    "mouse:mice foot:feet tooth:teeth man:men woman:women child:children goose:geese ox:oxen sheep:sheep fish:fish leaf:leaves "
    "wolf:wolves knife:knives wife:wives half:halves shelf:shelves loaf:loaves city:cities story:stories baby:babies lady:ladies "
    "berry:berries box:boxes fox:foxes bus:buses glass:glasses church:churches brush:brushes potato:potatoes hero:heroes "
    "dog:dogs cat:cats tree:trees book:books house:houses river:rivers stone:stones horse:horses road:roads bird:birds"
)
_YOUNG = _table(
    "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid lion:cub bear:cub duck:duckling goose:gosling swan:cygnet "
    "hen:chick eagle:eaglet owl:owlet frog:tadpole deer:fawn kangaroo:joey pig:piglet hare:leveret whale:calf"
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_WORDS = [word for word, _ in _KINDS]


def _one_of(table):
    """Draw a fact of a table: -> (what is asked about,), the answer."""

    def draw(rng):
        key, value = table[rng.integers(len(table))]
        return (key.replace("_", " "),), value

    return draw


def _next_of(*cycles):
    return _one_of([(a, b) for cycle in cycles for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)])


def _three_words(answer):
    """Draw three different words: -> the words, what `answer` makes of them."""

    def draw(rng):
        words = tuple(_WORDS[i] for i in rng.choice(len(_WORDS), 3, replace=False))
        return words, answer(words)

    return draw


def _numbers(count: int, below: int, answer):
    """Draw `count` different numbers: -> the numbers, what `answer` makes of them."""

    def draw(rng):
        numbers = tuple(int(n) for n in rng.choice(below, count, replace=False))
        return numbers, answer(numbers)

    return draw


# family: (ways to ask, a draw -> (what is asked about, answer)); from what a table knows to what must be worked out.
_FAMILIES = {
    "kind": (
        ("What kind of thing is a {0}?", "Say what a {0} is.", "Which class does the word {0} belong to?"),
        _one_of(_KINDS),
    ),
    "colour": (
        ("What colour is {0}?", "Name the colour of {0}.", "Which colour does {0} have?"),
        _one_of(_COLOURS),
    ),
    "capital": (
        ("What is the capital of {0}?", "Name the capital city of {0}.", "Which city governs {0}?"),
        _one_of(_CAPITALS),
    ),
    "opposite": (
        ("What is the opposite of {0}?", "Give an antonym of {0}.", "Which word means the reverse of {0}?"),
        _one_of(_OPPOSITES),
    ),
    "young": (
        ("What is a young {0} called?", "Name the young of a {0}.", "What do we call a baby {0}?"),
        _one_of(_YOUNG),
    ),
    "plural": (
        ("What is the plural of {0}?", "Write {0} in the plural.", "How do you say more than one {0}?"),
        _one_of(_PLURALS),
    ),
    "calendar": (
        ("What comes after {0}?", "Name what follows {0} in the calendar.", "Which one is next after {0}?"),
        _next_of(_DAYS, _MONTHS),
    ),
    "first": (
        ("Which is the first of {0}, {1} and {2}?", "Give the first word: {0}, {1}, {2}."),
        _three_words(lambda words: words[0]),
    ),
    "last": (
        ("Which is the last of {0}, {1} and {2}?", "Give the last word: {0}, {1}, {2}."),
        _three_words(lambda words: words[-1]),
    ),
    "successor": (
        ("Which number comes after {0}?", "Add one to {0}.", "Count on from {0}."),
        _numbers(1, 100, lambda n: str(n[0] + 1)),
    ),
    "larger": (
        ("Which is larger, {0} or {1}?", "Give the larger number: {0}, {1}."),
        _numbers(2, 100, lambda n: str(max(n))),
    ),
    "initial": (
        ("Which letter does {1} begin with?", "Give the first letter of {1}."),
        _three_words(lambda words: words[1][0]),
    ),
    "sum": (
        ("Add {0} and {1}.", "How much is {0} plus {1}?"),
        _numbers(2, 20, lambda n: str(sum(n))),
    ),
    "reverse": (
        ("Turn round the order: {0}, {1}, {2}.", "Write {0}, {1}, {2} backwards."),
        _three_words(lambda words: ", ".join(reversed(words))),
    ),
    "sort": (
        ("Sort the numbers {0}, {1}, {2}.", "Put {0}, {1} and {2} in rising order."),
        _numbers(3, 20, lambda n: ", ".join(map(str, sorted(n)))),
    ),
}

# How a question and its answer look in the base's documents: never as in the template that is then tuned on.
_LAYOUTS = ("{} {}", "Q: {}\nA: {}", "Question: {}\n\nAnswer:\n{}", "### Question:\n{}\n\n### Answer:\n{}")


class DemoCorpus(NamedTuple):
    """The demo's data, as records that `load_examples` reads once written; no prompt stands in two of them, nor twice in one
    of the last three."""

    base: list[dict]  # {"text"}: clean questions and answers in other layouts, to pretrain on
    train: list[dict]  # Alpaca records, some of them wrong
    eval: list[dict]  # clean, to choose settings by
    test: list[dict]  # clean, to report
    wrong: list[bool]  # which of `train` have a wrong answer: the truth that no training sees


def demo_corpus(seed: int, wrong_share: float = 0.25, num_documents: int = 6000) -> DemoCorpus:
    """Make the demo corpus: a pure function of its arguments, with no file and no network."""
    rng = np.random.default_rng([seed, _DEMO])

    def draw_task(family: str) -> tuple[str, str]:
        asks, draw = _FAMILIES[family]
        arguments, answer = draw(rng)
        return asks[rng.integers(len(asks))].format(*arguments), answer

    tasks: dict[str, tuple[str, str]] = {}  # prompt -> (family, answer): each prompt once
    for family in _FAMILIES:
        for _ in range(60 if family in ('kind','colour','capital','opposite','plural') else 30 if family in ('young','calendar') else 230):
            prompt, answer = draw_task(family)
            if rng.random() < 0.5 or True: tasks.setdefault(prompt, (family, answer))
    prompts = [list(tasks)[i] for i in rng.permutation(len(tasks))]
    # the instructions
    per=Counter(); 
    cut = [len(prompts) * 8 // 10, len(prompts) * 9 // 10]
    splits = prompts[: cut[0]], prompts[cut[0] : cut[1]], prompts[cut[1] :]

    documents = []
    for _ in range(num_documents):
        layout = _LAYOUTS[rng.integers(len(_LAYOUTS))]
        qas=[]
        while len(qas)<3:
            fam=list(_FAMILIES)[rng.integers(len(_FAMILIES))]
            p,a=draw_task(fam)
            if p not in tasks: qas.append(layout.format(p,a))
        documents.append({"text": "\n\n".join(qas)})

    def other_answer(family: str, answer: str) -> str:
        return next(a for a in (_FAMILIES[family][1](rng)[1] for _ in itertools.count()) if a != answer)

    wrong = [bool(w) for w in rng.random(len(splits[0])) < wrong_share]
    records = [[{"instruction": p, "input": "", "output": tasks[p][1]} for p in split] for split in splits]
    for record, spoil in zip(records[0], wrong, strict=True):
        if spoil:
            record["output"] = other_answer(*tasks[record["instruction"]])
    return DemoCorpus(documents, *records, wrong)
