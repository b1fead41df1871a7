"""The demo: a small world of facts to instruct a model about, and the settings of its run. It needs no file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DEMO_STREAM, load_examples
from infra.files import write_json, write_json_lines
from tokenizer import TEMPLATES, Tokenizer

# A small model with little pretraining learns at higher rates than the paper's.
DEMO_FLAGS = {"output": "runs/demo", "lr": 1e-3, "batch_size": 16, "max_length": 256, "dtype": "fp32", "log_every": 50}
DEMO_BASE_FLAGS = {"lr": 3e-3, "batch_size": 8, "epochs": 1, "confidence": None}  # for pretraining the base
DEMO_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
DEMO_VOCAB_SIZE = 1024


def _table(text: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(":")) for entry in text.split()]


_COLOURS = _table(
    "grass:green snow:white coal:black blood:red butter:yellow chocolate:brown sky:blue milk:white leaf:green "
    "cherry:red lemon:yellow sea:blue flamingo:pink plum:purple salt:white ink:black tomato:red sun:yellow "
    "wood:brown piglet:pink"
)
_CAPITALS = _table(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna Greece:Athens Norway:Oslo "
    "Sweden:Stockholm Poland:Warsaw Ireland:Dublin Egypt:Cairo Kenya:Nairobi Cuba:Havana Peru:Lima Japan:Tokyo "
    "China:Beijing India:Delhi Iran:Tehran Russia:Moscow Turkey:Ankara"
)
_OPPOSITES = _table(
    "hot:cold big:small tall:short fast:slow old:new rich:poor hard:soft light:heavy wet:dry full:empty open:closed "
    "early:late strong:weak happy:sad thick:thin near:far"
)
_OPPOSITES += [(b, a) for a, b in _OPPOSITES]
_CONTINENTS = _table(
    "France:Europe Italy:Europe Spain:Europe Norway:Europe Poland:Europe Egypt:Africa Kenya:Africa Ghana:Africa "
    "Mali:Africa Japan:Asia China:Asia India:Asia Iran:Asia Peru:America Cuba:America Chile:America Canada:America"
)
_YOUNG = _table(
    "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid lion:cub duck:duckling goose:gosling swan:cygnet "
    "hen:chick frog:tadpole"
)
_SOUNDS = _table(
    "dog:barks cat:mews cow:moos lion:roars horse:neighs sheep:bleats duck:quacks hen:clucks owl:hoots wolf:howls "
    "snake:hisses bee:buzzes pig:grunts mouse:squeaks frog:croaks crow:caws"
)
_PLURALS = _table(
    "mouse:mice foot:feet tooth:teeth man:men child:children goose:geese ox:oxen leaf:leaves wolf:wolves knife:knives "
    "city:cities baby:babies berry:berries box:boxes fox:foxes glass:glasses"
)
_PASTS = _table(
    "go:went see:saw eat:ate run:ran take:took give:gave come:came make:made find:found know:knew write:wrote "
    "sing:sang drink:drank fall:fell speak:spoke break:broke"
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_KINDS = {
    "animal": "dog cat horse cow tiger wolf",
    "bird": "eagle robin owl parrot heron duck",
    "fish": "trout salmon tuna cod carp eel",
    "fruit": "apple pear grape peach mango fig",
    "tool": "hammer saw drill chisel spade axe",
    "garment": "shirt coat hat scarf glove sock",
}
_KIND_OF = [(word, kind) for kind, words in _KINDS.items() for word in words.split()]
_NEXT = [pair for cycle in (_DAYS, _MONTHS) for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True)]


class _TaskKind(NamedTuple):
    """A kind of task: about a fact {k} from a table, or about random words {x} {y} {z} and numbers {l} {m} {n}."""

    note: str  # the task as the text for pretraining puts it
    asks: tuple[str, ...]  # the task as instructions put it
    answer: list | Callable  # a table of (k, answer), or a function of the words and numbers


_TASK_KINDS = [  # from facts to be known to answers to be computed
    _TaskKind("kind of {k}", ("What kind of thing is a {k}?", "Say what a {k} is.", "Classify {k}."), _KIND_OF),
    _TaskKind("colour of {k}", ("What colour is {k}?", "Name the colour of {k}.", "Which colour has {k}?"), _COLOURS),
    _TaskKind(
        "capital of {k}",
        ("What is the capital of {k}?", "Name the capital of {k}.", "Which city governs {k}?"),
        _CAPITALS,
    ),
    _TaskKind(
        "continent of {k}",
        ("Which continent is {k} in?", "Name the continent of {k}.", "Where in the world is {k}?"),
        _CONTINENTS,
    ),
    _TaskKind(
        "opposite of {k}",
        ("What is the opposite of {k}?", "Give the opposite of {k}.", "What is not {k}?"),
        _OPPOSITES,
    ),
    _TaskKind(
        "young of {k}",
        ("What is a young {k} called?", "Name the young of a {k}.", "What is a baby {k}?"),
        _YOUNG,
    ),
    _TaskKind("sound of {k}", ("What does a {k} do when it calls?", "How does a {k} sound?", "Hear the {k}."), _SOUNDS),
    _TaskKind("plural of {k}", ("What is the plural of {k}?", "Give the plural of {k}.", "Say many {k}."), _PLURALS),
    _TaskKind("past of {k}", ("What is the past of {k}?", "Give the past of {k}.", "Say {k} as of yesterday."), _PASTS),
    _TaskKind("next of {k}", ("What comes after {k}?", "Name what follows {k}.", "Which is next after {k}?"), _NEXT),
    _TaskKind(
        "initial of {x}",
        ("Which letter begins {x}?", "Give the first letter of {x}.", "How does {x} start?"),
        lambda s: s["x"][0],
    ),
    _TaskKind(
        "one more than {l}",
        ("Which number is one more than {l}?", "Add one to {l}.", "Count on from {l}."),
        lambda s: s["l"] + 1,
    ),
    _TaskKind(
        "larger of {l}, {m}",
        ("Which is larger, {l} or {m}?", "Give the larger number: {l}, {m}."),
        lambda s: max(s["l"], s["m"]),
    ),
    _TaskKind(
        "first of {x}, {y}, {z}",
        ("Which is the first of {x}, {y} and {z}?", "Give the first word: {x}, {y}, {z}."),
        lambda s: s["x"],
    ),
    _TaskKind(
        "last of {x}, {y}, {z}",
        ("Which is the last of {x}, {y} and {z}?", "Give the last word: {x}, {y}, {z}."),
        lambda s: s["z"],
    ),
    _TaskKind("sum of {l}, {m}", ("Add {l} and {m}.", "How much is {l} plus {m}?"), lambda s: s["l"] + s["m"]),
    _TaskKind(
        "sort of {l}, {m}, {n}",
        ("Sort {l}, {m}, {n}.", "Put {l}, {m} and {n} in order."),
        lambda s: ", ".join(map(str, sorted((s["l"], s["m"], s["n"])))),
    ),
]
_ANSWER = "The answer is {}."
# Formats of a question and its answer in the text for pretraining; none is the template of instruction tuning.
_LAYOUTS = ("{} {}", "Q: {}\nA: {}", "### Question:\n{}\n\n### Answer:\n{}")


class _Task(NamedTuple):
    note: str
    prompt: str
    answer: str


def _draw_task(kind: _TaskKind, rng: np.random.Generator) -> _Task:
    words = [_KIND_OF[i][0] for i in rng.choice(len(_KIND_OF), 3, replace=False)]
    numbers = [int(n) for n in rng.choice(20, 3, replace=False)]
    ask = kind.asks[rng.integers(len(kind.asks))]
    if callable(kind.answer):
        about = dict(zip("xyzlmn", words + numbers, strict=True))
        answer = str(kind.answer(about))
    else:
        key, answer = kind.answer[rng.integers(len(kind.answer))]
        about = {"k": key}
    return _Task(kind.note.format(**about), ask.format(**about), answer)


class DemoCorpus(NamedTuple):
    """The records of the demo. No prompt is in two of `train`, `eval` and `test`."""

    base: list[dict]  # {"text"}, for pretraining: notes and questions with correct answers; none of `eval` and `test`
    train: list[dict]  # Alpaca records, some with a wrong answer
    eval: list[dict]  # correct answers, to choose settings on
    test: list[dict]  # correct answers, to report results on
    wrong: list[bool]  # whether each of `train` has a wrong answer; never used in training


def demo_corpus(seed: int, wrong_share: float = 0.25, num_documents: int = 12000) -> DemoCorpus:
    """Make the demo corpus, from its arguments alone."""
    rng = np.random.default_rng([seed, DEMO_STREAM])
    tasks = {}  # by prompt, so that prompts are unique
    for _ in range(150):
        for kind in _TASK_KINDS:
            task = _draw_task(kind, rng)
            tasks.setdefault(task.prompt, task)
    tasks = [list(tasks.values())[i] for i in rng.permutation(len(tasks))]
    cut = [len(tasks) * 7 // 10, len(tasks) * 8 // 10]
    train, held_out = tasks[: cut[0]], {task.prompt for task in tasks[cut[0] :]}

    documents = []
    for number in range(num_documents):
        drawn = [_draw_task(_TASK_KINDS[i], rng) for i in rng.choice(len(_TASK_KINDS), 8)]
        if number % 2:
            documents.append("\n".join(f"{task.note}: {task.answer}" for task in drawn))
        else:
            layout = _LAYOUTS[rng.integers(len(_LAYOUTS))]
            asked = [task for task in drawn if task.prompt not in held_out][:4]
            documents.append("\n\n".join(layout.format(task.prompt, _ANSWER.format(task.answer)) for task in asked))

    wrong = rng.random(len(train)) < wrong_share
    answers = [task.answer for task in train]
    for i in np.flatnonzero(wrong):  # with the answer of another record, as when records are mixed up
        while answers[i] == train[i].answer:
            answers[i] = train[rng.integers(len(train))].answer

    def records(tasks: list[_Task], answers: list[str]) -> list[dict]:
        return [
            {"instruction": task.prompt, "input": "", "output": _ANSWER.format(answer)}
            for task, answer in zip(tasks, answers, strict=True)
        ]

    clean = [records(part, [task.answer for task in part]) for part in (tasks[cut[0] : cut[1]], tasks[cut[1] :])]
    base = [{"text": document} for document in documents if document]
    return DemoCorpus(base, records(train, answers), *clean, wrong.tolist())


def write_demo_data(folder: Path, seed: int) -> None:
    """Write the corpus as {base,train,eval,test}.jsonl, and the ids of the wrong training examples as wrong.json."""
    corpus = demo_corpus(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("base", "train", "eval", "test"):
        write_json_lines(folder / f"{split}.jsonl", getattr(corpus, split))
    ids = [example.id for example in load_examples(folder / "train.jsonl")]
    write_json(folder / "wrong.json", [i for i, wrong in zip(ids, corpus.wrong, strict=True) if wrong])


def train_demo_tokenizer(folder: Path) -> Tokenizer:
    """Train a tokenizer on the training split, and on the template often enough that its words become pieces."""
    texts = [message["content"] for example in load_examples(folder / "train.jsonl") for message in example.messages]
    words = TEMPLATES["alpaca"].first_user.format(bos="", user="") + TEMPLATES["alpaca"].generation_prompt
    return Tokenizer.train(texts + [words] * 60, DEMO_VOCAB_SIZE)


def least_confident(folder: Path, count: int = 3) -> str:
    """Lines with the training examples of the demo of least confidence, by perplexity, and whether they are wrong.

    Raises OSError, or ValueError, KeyError or TypeError if the files in `folder` are not what the demo has written.
    """
    with open(folder / "confidence.jsonl", encoding="utf-8") as file:
        scores = [json.loads(line) for line in file]
    examples = {example.id: example for example in load_examples(folder / "data" / "train.jsonl")}
    wrong = set(json.loads((folder / "data" / "wrong.json").read_text()))
    lines = [f"Of {len(scores):,} training examples, these have the highest mean perplexity:"]
    for score in sorted(scores, key=lambda score: -score["perplexity"])[:count]:
        prompt, response = (message["content"] for message in examples[score["id"]].messages)
        answer = "wrong" if score["id"] in wrong else "right"
        lines.append(f"  {score['perplexity']:.2f}  {answer}  {prompt} → {response}")
    return "\n".join(lines)
