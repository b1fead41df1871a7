"""Does SFTMix beat plain SFT: where, by how much, is it the confidence? Runs, a line of JSON each, and what they say.

    python benchmarks/study.py run --work DIR           on the demo's corpus
    python benchmarks/study.py run --work DIR --corpus NAME --model DIR --data FILE [--weaker DIR]    on real data
    python benchmarks/study.py report                   the tables and the picture of its documents
    python benchmarks/study.py lengths --corpus NAME --data FILE     confidence beside the length of answers

A run that is in docs/study.jsonl already is not run again, so that a study which was stopped can be resumed. Each is
compared with others of the same seed, which have the same base and data. Nothing is tuned: arms have the same settings
but for what their names say, and all are reported, on held-out examples that no arm has seen.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from benchmarks import baselines
from benchmarks.measures import fit_temperature, measure, supervised_states
from confidence import TrainingDynamics, roc_auc, score_examples, split_by_confidence
from data import IGNORE_INDEX, Dataset, load_examples, sample_lambda
from eval import MAX_MATCH_TOKENS, exact_match, held_out_loss
from infra.cache import load_dataset
from infra.chat_templates import resolve_template
from infra.demo import demo_corpus
from infra.device import DTYPES, resolve_dtype
from infra.files import file_sha256, model_sha256
from infra.hf import load_config, load_model, load_tokenizer
from model import Transformer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "study.jsonl"
DOCUMENTS = ROOT / "docs" / "study.md", ROOT / "docs" / "study_tables.md"
SCORES = ROOT / "docs" / "study_scores.jsonl"  # mean probability and perplexity of each training example

# --- Other uses of confidence -----------------------------------------------------------------------------------------


def by_variance(config, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `train.load_halves`: the examples whose probability changed least are the confident half."""
    return split_by_confidence(-TrainingDynamics.load(config.confidence).select(dataset.ids).variance)


def by_rank(confident, unconfident, seed: int, epoch: int, mirrored: bool = False) -> np.ndarray:
    """In place of `train.paired_order`: the surest of each half are a pair, and so on down.

    `mirrored`, the surest of all meets the least sure of all. Both halves are sorted, the surest first.
    """
    confident, unconfident = confident.numpy(), unconfident.numpy()
    n = len(confident)
    partners = unconfident[::-1] if mirrored else unconfident
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return np.concatenate([np.stack([confident, partners[:n]], axis=1)[order].reshape(-1), partners[n:]])


def leaning(num_pairs: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """In place of `train.sample_lambda`: never less than half of the confident example."""
    lam = sample_lambda(num_pairs, alpha, seed, step)
    return torch.maximum(lam, 1 - lam)


# --- What is compared -------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A way of training, told from the others by its flags of train.py, its data, or what it has in place of a part.

    An arm without flags is not trained.
    """

    flags: str = "--stage sftmix"
    checkpoints: tuple[int, ...] | None = None  # that its scores are the mean of, by number; None: all
    weaker: bool = False  # its scores are of the weaker model
    half: int | None = None  # train on the confident half (0) or the unconfident one (1) alone, as many examples in all
    loss: Callable | None = None  # (target tokens of the training data, vocabulary size) -> a loss of baselines.py
    parts: dict = {}  # of train.py, by name  # noqa: RUF012

    @property
    def needs_scores(self) -> bool:
        """Whether it is split by the scores of NTP's checkpoints."""
        return self.half is not None or ("sftmix" in self.flags and not {"online", "random"} & {*self.flags.split()})


def matching(mu: float, alpha: float = 0.5) -> float:
    """The ε of label smoothing that moves as much of the targets' weight as Mixup where all tokens that meet differ.

    Mixup moves μ/(1+μ) · E[2λ(1−λ)] = μ/(1+μ) · α/(2α+1). The tokens that meet differ at nearly all mixed positions of
    real data, and at 31 % in the demo, whose answers have fixed words: there, ε = 0.013 is as strong as μ = 0.2, and
    ε = 0.04 as μ = 1.
    """
    return mu / (1 + mu) * alpha / (2 * alpha + 1)


def smoothing(epsilon: float) -> Arm:
    """NTP with label smoothing."""
    return Arm("--stage reference", loss=lambda targets, vocab_size: partial(baselines.smoothed_loss, epsilon=epsilon))


def unigram_smoothing(targets, vocab_size: int):
    """A loss with label smoothing towards the frequencies of the training targets."""
    towards = baselines.unigram_frequencies(targets, vocab_size)
    return partial(baselines.smoothed_loss, epsilon=0.04, towards=towards)


ARMS = {
    "NTP": Arm("--stage reference"),
    "SFTMix": Arm(),
    "random pairs": Arm("--stage sftmix --pairing random"),
    "label smoothing, ε = 0.013": smoothing(0.013),
    "SFTMix, μ = 1": Arm("--stage sftmix --mu 1"),
    "random pairs, μ = 1": Arm("--stage sftmix --mu 1 --pairing random"),
    "label smoothing, ε = 0.04": smoothing(0.04),
    "SFTMix, by perplexity": Arm("--stage sftmix --confidence_by perplexity"),
    "SFTMix, by perplexity, μ = 1": Arm("--stage sftmix --mu 1 --confidence_by perplexity"),
    "NTP in SFTMix's order": Arm("--stage sftmix --mu 0"),
    "NTP in SFTMix's order, by perplexity": Arm("--stage sftmix --mu 0 --confidence_by perplexity"),
    "label smoothing, ε = 0.083": smoothing(matching(0.5)),
    "label smoothing, ε = 0.25": smoothing(0.25),
    "SFTMix, by a weaker model": Arm(weaker=True),
    "Mixup alone": Arm("--stage sftmix --ntp_weight 0"),
    "SFTMix, μ = 0.1": Arm("--stage sftmix --mu 0.1"),
    "SFTMix, μ = 0.5": Arm("--stage sftmix --mu 0.5"),
    "SFTMix, α = 0.1": Arm("--stage sftmix --alpha 0.1"),
    "SFTMix, α = 2": Arm("--stage sftmix --alpha 2"),
    "SFTMix, of the last checkpoint": Arm(checkpoints=(4,)),
    "SFTMix, of three checkpoints": Arm(checkpoints=(0, 2, 4)),
    "SFTMix, online": Arm("--stage sftmix --confidence online"),
    "NTP, confident half": Arm("--stage reference", half=0),
    "NTP, unconfident half": Arm("--stage reference", half=1),
    "LoRA, NTP": Arm("--stage reference --lora_rank 8 --lr 5e-3"),
    "LoRA, SFTMix": Arm("--stage sftmix --lora_rank 8 --lr 5e-3"),
    "IR-DRO": Arm("--stage reference", loss=lambda *_: baselines.ir_dro_loss),
    "DFT": Arm("--stage reference", loss=lambda *_: baselines.dft_loss),
    "EAFT": Arm("--stage reference", loss=lambda *_: baselines.eaft_loss),
    "NEFTune": Arm("--stage reference", parts={"load_trainable": baselines.with_embedding_noise()}),
    "unigram smoothing, ε = 0.04": Arm("--stage reference", loss=unigram_smoothing),
    "beyond: split by variance": Arm("--stage sftmix --mu 1", parts={"load_halves": by_variance}),
    "beyond: pairs by rank": Arm("--stage sftmix --mu 1", parts={"paired_order": by_rank}),
    "beyond: surest with least sure": Arm(
        "--stage sftmix --mu 1", parts={"paired_order": partial(by_rank, mirrored=True)}
    ),
    "beyond: λ leaning to the confident": Arm("--stage sftmix --mu 1", parts={"sample_lambda": leaning}),
    "base": Arm(flags=""),
}
BEYOND = [name for name in ARMS if name.startswith("beyond")]
COMPARED = [
    ("SFTMix", "random pairs"),
    ("SFTMix, by perplexity", "random pairs"),
    ("SFTMix", "NTP in SFTMix's order"),
    ("SFTMix", "label smoothing, ε = 0.013"),
    ("SFTMix, μ = 1", "random pairs, μ = 1"),
    ("SFTMix, by perplexity, μ = 1", "random pairs, μ = 1"),
    ("SFTMix, μ = 1", "label smoothing, ε = 0.04"),
    ("SFTMix", "label smoothing, ε = 0.04"),
    ("SFTMix, by a weaker model", "SFTMix"),
    ("LoRA, SFTMix", "LoRA, NTP"),
]
EARLY_STOPPING = "NTP, early stopping"  # of NTP's checkpoints the one with the lowest validation loss
COMPARED_ON_REAL_DATA = [
    *((arm, other) for other in ("NTP", EARLY_STOPPING) for arm in ("SFTMix, by perplexity", "SFTMix", "random pairs")),
    ("SFTMix, by perplexity", "random pairs"),
    ("SFTMix", "random pairs"),
    ("SFTMix", "SFTMix, by perplexity"),
    ("SFTMix, by a weaker model", "SFTMix"),
    *(("unigram smoothing, ε = 0.04", arm) for arm in ("SFTMix, by perplexity", "SFTMix", "random pairs")),
    *((f"SFTMix, μ = {mu}", arm) for mu in (0.5, 1) for arm in (EARLY_STOPPING, "unigram smoothing, ε = 0.04")),
    ("NEFTune", "SFTMix"),
]


class Real(NamedTuple):
    """Real data and a real base. Each seed draws its own examples to train on, to validate on and to report."""

    arms: list[str]
    num_train: int
    epochs: int
    lr: float
    seeds: int = 10
    num_held_out: int = 500
    num_validation: int = 200
    max_length: int = 512
    max_question: int | None = None  # characters; longer ones are left out


BASELINES = ["unigram smoothing, ε = 0.04", "IR-DRO", "NEFTune", "DFT", "EAFT"]
CONTRAST_ARMS = ["NTP", "random pairs", "SFTMix, by perplexity"]  # random pairs can run beside NTP, needing no scores
PLANNED = [*CONTRAST_ARMS, "base", "NTP in SFTMix's order, by perplexity"]  # docs/study.md specifies them
LR_135M = 3e-5  # NTP's best by validation loss, of the grid
REALS = {
    "135M Alpaca": Real(
        [*PLANNED, "SFTMix", "label smoothing, ε = 0.04", *BASELINES], num_train=1000, epochs=3, lr=LR_135M
    ),
    "135M MedQuAD": Real(PLANNED, num_train=256, epochs=2, lr=LR_135M, num_held_out=300),
    "135M GSM8K mistakes": Real(PLANNED, num_train=256, epochs=2, lr=LR_135M, seeds=5, num_held_out=300),
    **{
        f"135M grid, lr {lr:g}": Real(["NTP"], num_train=256, epochs=3, lr=lr, seeds=1, num_held_out=0)
        for lr in (1e-5, 3e-5, 1e-4, 3e-4)
    },
}
FIRST_3M = [*CONTRAST_ARMS, "base", "label smoothing, ε = 0.04"]
STRENGTHS = [  # of smoothing and of Mixup
    *(f"label smoothing, ε = {epsilon}" for epsilon in (0.013, 0.04, 0.083, 0.25)),
    *("SFTMix, μ = 0.1", "SFTMix", "SFTMix, μ = 0.5", "SFTMix, μ = 1"),
]
_SMALL = {"epochs": 5, "lr": 1e-3, "seeds": 5, "num_held_out": 200, "max_length": 256, "max_question": 200}
REALS |= {
    "3M Alpaca": Real([*FIRST_3M, *STRENGTHS, *BASELINES, "SFTMix, by a weaker model"], num_train=300, **_SMALL),
    "3M MedQuAD": Real(FIRST_3M, num_train=200, **_SMALL),
}


class Demo(NamedTuple):
    """The demo's corpus and base, in a variation."""

    noise: float  # the share of wrong answers among those trained on
    epochs: int = 3


DEMOS = {f"demo {share}": Demo(share / 100) for share in (0, 10, 20, 30, 40)}
SHARES = list(DEMOS)
LONG = "demo 30, 10 epochs"
DEMOS[LONG] = Demo(0.3, epochs=10)
MAIN = ["NTP", "SFTMix", "random pairs"]
CORE = [
    *MAIN,
    *("SFTMix, μ = 1", "random pairs, μ = 1", "SFTMix, by perplexity"),
    *("label smoothing, ε = 0.013", "label smoothing, ε = 0.04"),
]
OFTEN = [*CORE, "SFTMix, by perplexity, μ = 1", "NTP in SFTMix's order"]
REST = [
    *("Mixup alone", "SFTMix, μ = 0.1", "SFTMix, μ = 0.5", "SFTMix, α = 0.1", "SFTMix, α = 2"),
    *("SFTMix, of the last checkpoint", "SFTMix, of three checkpoints", "SFTMix, online"),
    *("NTP, confident half", "NTP, unconfident half", "LoRA, NTP", "LoRA, SFTMix"),
]
PLAN = [  # corpus and arms; what matters most first
    (LONG, [name for name in OFTEN if name not in ("label smoothing, ε = 0.013", "SFTMix, by perplexity")]),
    ("demo 30", OFTEN),
    ("demo 0", CORE),
    ("demo 40", CORE),
    ("demo 20", MAIN),
    ("demo 10", MAIN),
    (LONG, BEYOND),
    ("demo 30", REST),
]
SETTINGS = {"batch_size": 16, "num_checkpoints": 5}
DEMO_SETTINGS = SETTINGS | {"lr": 1e-3, "max_length": 256, "dtype": "fp32"}

# --- One run ----------------------------------------------------------------------------------------------------------


def run_train(flags: dict, *words: str) -> None:
    """train.py, with values by flag; a run that was stopped is resumed."""
    flags = {"save_every": 25, "keep_last": 1, **flags}
    train.main([*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *words, "--resume"])


def score(model: Path, data: Path, output: Path, settings: dict) -> None:
    """Score the data with the checkpoints that an NTP run has left in `output`."""
    run_train({"model": model, "data": data, "output": output, **settings}, "--stage", "confidence")


def scores_for(arm: Arm, cell: Path, settings: dict) -> Path:
    """The file of the scores by which an arm splits the data."""
    scores = cell / "confidence.jsonl"
    if arm.weaker:
        weaker = cell / "of-weaker"
        if not (weaker / "confidence.jsonl").exists():
            shutil.rmtree(weaker, ignore_errors=True)
            model, data = cell / "weaker", cell / "train.jsonl"
            settings = settings | {"max_length": 512}  # with fewer pieces, texts have more tokens
            run_train({"model": model, "data": data, "output": weaker, **settings}, "--stage", "reference")
            score(model, data, weaker, settings)
        scores = weaker / "confidence.jsonl"
    if arm.checkpoints is not None:
        dynamics, chosen = TrainingDynamics.load(scores), list(arm.checkpoints)
        scores = cell / f"of-{'-'.join(map(str, chosen))}.jsonl"
        TrainingDynamics(dynamics.ids, dynamics.probability[chosen], dynamics.perplexity[chosen]).save(scores)
    return scores


def write_half(cell: Path, half: int) -> Path:
    """The confident (0) or the unconfident (1) half of the data, as a file."""
    dynamics, data = TrainingDynamics.load(cell / "confidence.jsonl"), cell / "train.jsonl"
    kept = {dynamics.ids[i] for i in split_by_confidence(dynamics.confidence)[half].tolist()}
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for example, line in zip(load_examples(data), lines, strict=True) if example.id in kept]
    (path := cell / f"half-{half}.jsonl").write_text("".join(chosen), encoding="utf-8")
    return path


def run_arm(name: str, cell: Path, settings: dict) -> dict:
    """Train an arm on a cell's base, data and scores, and measure the result on the cell's held-out examples."""
    arm, output, more = ARMS[name], run_folder(cell, name), []
    flags = {"model": cell / "base", "data": cell / "train.jsonl", "output": output, "log_every": 100, **settings}
    if arm.needs_scores and arm.half is None:
        more = ["--confidence", str(scores_for(arm, cell, settings))]
    if arm.half is not None:
        flags |= {"data": write_half(cell, arm.half), "epochs": 2 * settings["epochs"]}
    tokenizer = load_tokenizer(cell / "base")
    template = resolve_template(tokenizer, None, sys.stderr)
    encoded = {
        part: load_dataset(cell / f"{part}.jsonl", tokenizer, template, settings["max_length"], file=sys.stderr)
        for part in ("train", "validation", "held-out")
        if (cell / f"{part}.jsonl").stat().st_size
    }
    load = partial(load_model, compute_dtype=DTYPES[settings["dtype"]])
    if not arm.flags:
        return measure_on(load(cell / "base"), encoded)
    parts = dict(arm.parts)
    if arm.loss is not None:
        targets = torch.cat([targets[targets != IGNORE_INDEX].long() for _, targets in encoded["train"]])
        parts["compute_loss"] = baselines.with_loss(arm.loss(targets, load_config(cell / "base").vocab_size))
    for part, replacement in parts.items():
        setattr(train, part, replacement)
    run_train(flags, *arm.flags.split(), *more)

    stage, folder = ("ntp", "reference") if "reference" in arm.flags else ("sftmix", "sftmix")
    model = load(output / folder)
    last = measure_on(model, encoded)
    measured = dict(last)
    measured["seconds"] = json.loads((output / "results.json").read_text())[stage]["seconds"]
    if encoded["validation"].num_supervised.max() <= MAX_MATCH_TOKENS:  # short answers: the demo's
        measured["confidence_spread"] = float(score_examples(model, encoded["train"])[0].std())
        for part, key in (("held-out", "accuracy"), ("validation", "eval_accuracy")):
            measured[key] = exact_match(model, encoded[part], tokenizer, template)["accuracy"]
    if name == "NTP" and "held-out" in encoded:  # without, a cell is only there to choose the learning rate
        measured["early_stopping"] = early_stopping(output, encoded, load, last)
        score(cell / "base", cell / "train.jsonl", output, settings)
        measured["roc_area"] = wrong_answers_found(cell, TrainingDynamics.load(output / "confidence.jsonl"))
    return measured


def measure_on(model: Transformer, encoded: dict[str, Dataset]) -> dict:
    """The measures of the held-out and of the validation examples, at the temperature fitted on the latter."""
    states = supervised_states(model, encoded["validation"])
    temperature = fit_temperature(model, *states)
    measured = {"temperature": temperature, "validation": measure(model, *states, temperature)}
    if "held-out" in encoded:
        measured |= measure(model, *supervised_states(model, encoded["held-out"]), temperature)
    return measured


def early_stopping(output: Path, encoded: dict[str, Dataset], load, last: dict) -> dict:
    """The measures of the NTP run's checkpoint with the lowest validation loss; those of its last one are `last`."""
    folders = sorted((output / "reference" / "checkpoints").iterdir(), key=lambda f: int(f.name.removeprefix("step-")))
    losses = [held_out_loss(load(folder), encoded["validation"])["loss"] for folder in folders[:-1]]
    losses.append(last["validation"]["loss"])
    best = int(np.argmin(losses))
    measures = last if best == len(folders) - 1 else measure_on(load(folders[best]), encoded)
    return {"validation losses": losses, "checkpoint": best + 1, **measures}


def wrong_answers_found(cell: Path, dynamics: TrainingDynamics) -> dict | None:
    """The area under the ROC curve with which low confidence finds wrong answers, where it is known which are wrong."""
    if not (cell / "wrong.json").exists() or not any(wrong := json.loads((cell / "wrong.json").read_text())):
        return None
    examples = load_examples(cell / "train.jsonl")
    wrong_ids = [example.id for example, is_wrong in zip(examples, wrong, strict=True) if is_wrong]
    wrong = np.isin(dynamics.ids, wrong_ids)  # examples too long to be trained on have no scores
    return {by: roc_auc(-dynamics.score(by), wrong) for by in ("probability", "perplexity")}


# --- All runs ---------------------------------------------------------------------------------------------------------


def make_demo_cell(cell: Path, seed: int, demo: Demo) -> None:
    """The demo's base of this seed, and its corpus with another share of wrong answers."""
    base = cell.parent / f"base-{seed}"
    if not (base / "base" / "config.json").exists():
        shutil.rmtree(base, ignore_errors=True)
        command = [sys.executable, ROOT / "train.py", "--stage", "base", "--seed", str(seed), "--output", base]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    corpus = demo_corpus(seed, wrong_share=demo.noise)
    write_cell(cell, {"train": corpus.train, "validation": corpus.eval, "held-out": corpus.test}, corpus.wrong)
    link(cell / "base", base / "base")


def make_real_cell(cell: Path, seed: int, real: Real, args) -> None:
    """A real base and real examples."""
    parts = draw_examples(seed, real, args.data)
    wrong = [not record.get("correct", True) for record in parts[0]]
    write_cell(cell, dict(zip(("train", "held-out", "validation"), parts, strict=True)), wrong)
    link(cell / "base", args.model)
    if args.weaker:
        link(cell / "weaker", args.weaker)


def draw_examples(seed: int, real: Real, data: Path) -> list[list[dict]]:
    """Examples drawn by the seed: to train on, to report and to validate on."""
    records = [json.loads(line) for line in dict.fromkeys(data.read_text(encoding="utf-8").split("\n")) if line]
    rng, sizes = np.random.default_rng(seed), (real.num_train, real.num_held_out, real.num_validation)
    if "correct" in records[0]:
        return draw_solutions(records, rng, sizes)
    limit = real.max_question or math.inf
    records = [r for r in records if 0 < len(r.get("instruction", "") + r.get("input", "")) <= limit]
    if len(records) < sum(sizes):
        sys.exit(f"{data}: {len(records)} records that can be used are fewer than {sum(sizes)}")
    order = rng.permutation(len(records))
    return [[records[i] for i in part] for part in np.split(order, np.cumsum(sizes))[:3]]


def draw_solutions(records: list[dict], rng: np.random.Generator, sizes: tuple[int, int, int]) -> list[list[dict]]:
    """Answers marked right or wrong. To report and to validate: a right answer to each of other questions."""
    by_question: dict[str, list[dict]] = {}
    for record in records:
        by_question.setdefault(record["instruction"], []).append(record)
    questions = list(by_question)
    questions = [questions[i] for i in rng.permutation(len(questions))]
    right = {q: next((r for r in by_question[q] if r["correct"]), None) for q in questions}
    num_train, num_held_out, num_validation = sizes
    others = [q for q in questions if right[q]][: num_held_out + num_validation]
    taken = set(others)
    rest = [record for q in questions if q not in taken for record in by_question[q]]
    train_records = [rest[i] for i in rng.permutation(len(rest))[:num_train]]
    if len(train_records) < num_train or len(others) < num_held_out + num_validation:
        sys.exit("too few answered questions for so many examples")
    return [train_records, [right[q] for q in others[:num_held_out]], [right[q] for q in others[num_held_out:]]]


def write_cell(cell: Path, parts: dict[str, list[dict]], wrong: list[bool]) -> None:
    """Write the data of a cell, and which of its training examples have a wrong answer."""
    cell.mkdir(exist_ok=True)
    for name, records in parts.items():
        lines = [json.dumps({key: r[key] for key in ("instruction", "input", "output") if key in r}) for r in records]
        file, text = cell / f"{name}.jsonl", "".join(line + "\n" for line in lines)
        if file.exists() and file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file}: made from other data; choose another --work")
        file.write_text(text, encoding="utf-8")
    (cell / "wrong.json").write_text(json.dumps(wrong))


def link(path: Path, target: Path) -> None:
    """Make `path` another name of a folder."""
    if path.exists() and path.resolve() != target.resolve():
        sys.exit(f"{path}: is {path.resolve()}, and not {target}; choose another --work")
    if not path.exists():
        path.symlink_to(target.resolve())


def read_results() -> list[dict]:
    """All runs so far."""
    return read_lines(RESULTS)


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file, which need not exist."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def run_folder(cell: Path, arm: str) -> Path:
    """Where an arm's run is kept until it is measured."""
    return cell / re.sub(r"\W+", "-", f"run-{arm}")


class Cell(NamedTuple):
    """A corpus and a seed: the folder of their base and data, and the settings of their runs."""

    corpus: str
    seed: int
    folder: Path
    settings: dict


def find_cell(args, corpus: str, seed: int, dtype: str) -> Cell:
    """Where a cell is, and its settings."""
    if corpus in REALS:
        real = REALS[corpus]
        settings = SETTINGS | {"lr": real.lr, "max_length": real.max_length, "dtype": dtype, "epochs": real.epochs}
    else:
        settings = DEMO_SETTINGS | {"epochs": DEMOS[corpus].epochs}
    folder = args.work / f"{corpus.replace(', ', '-').replace(' ', '-')}-{seed}"
    return Cell(corpus, seed, folder, settings | {"seed": seed})


def make_cell(args, cell: Cell) -> None:
    """Write the base and the data of a cell."""
    corpus, seed, folder, settings = cell
    if corpus in REALS:
        make_real_cell(folder, seed, REALS[corpus], args)
    else:
        make_demo_cell(folder, seed, DEMOS[corpus])
    base = [f"{name} {sha256}" for name, sha256 in model_sha256(folder / "base").items()]
    made_with = json.dumps({**settings, "data": [file_sha256(folder / "train.jsonl")], "model": base})
    if not (folder / "made-with.json").exists():
        (folder / "made-with.json").write_text(made_with)
    if (folder / "made-with.json").read_text() != made_with:
        sys.exit(f"{folder}: made with other settings, data or model; choose another --work")


class Task(NamedTuple):
    """Something to do, once the task of another name is done."""

    call: Callable[[], None]
    after: tuple | None


def tasks_of_seed(args, corpus: str, arms: Iterable[str], seed: int) -> dict[tuple, Task]:
    """The arms that have not been run, by name. Those that need the scores that NTP leaves wait for it."""
    dtypes = {n["arm"]: n.get("dtype") for n in read_results() if (n["corpus"], n["seed"]) == (corpus, seed)}
    waiting = [arm for arm in arms if arm not in dtypes]
    if not waiting:
        return {}
    dtype = next(filter(None, dtypes.values()), args.dtype)  # runs that are compared compute in one dtype
    cell, start, ntp = find_cell(args, corpus, seed, dtype), (corpus, seed), (corpus, seed, "NTP")
    tasks = {start: Task(partial(make_cell, args, cell), None)}
    if "NTP" in waiting or any(ARMS[arm].needs_scores for arm in waiting):
        tasks[ntp] = Task(partial(run_one, cell, "NTP", "NTP" in waiting), start)
    for arm in waiting:
        if arm != "NTP":
            tasks[(corpus, seed, arm)] = Task(partial(run_one, cell, arm), ntp if ARMS[arm].needs_scores else start)
    return tasks


def run_tasks(tasks: dict[tuple, Task], jobs: int) -> None:
    """Run `jobs` tasks at once, always the first of those that wait for nothing."""
    waiting, running, done = dict(tasks), {}, {None}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [name for name, task in waiting.items() if task.after in done]
            for name in ready[: jobs - len(running)]:
                running[pool.submit(waiting.pop(name).call)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future))
                future.result()


def run_one(cell: Cell, arm: str, record: bool = True) -> None:
    """Run an arm of a cell in a process of its own, and record what it says."""
    corpus, seed, folder, settings = cell
    output, scores = run_folder(folder, arm), folder / "confidence.jsonl"
    if arm == "NTP" and not record and (scores.exists() or restore_scores(corpus, seed, folder)):
        keep_scores(corpus, seed, folder)
        return
    request = {"name": arm, "cell": str(folder), "settings": settings}
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, __file__, "one", json.dumps(request)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        sys.exit(f"{request}:\n{process.stdout[-2000:]}{process.stderr[-3000:]}")
    if arm == "NTP" and (output / scores.name).exists():
        shutil.copy(output / scores.name, scores)
        keep_scores(corpus, seed, folder)
    if output.exists():  # an arm that is not trained has none
        shutil.rmtree(output)
    if record:
        note = {"corpus": corpus, "seed": seed, "arm": arm, "dtype": settings["dtype"], "commit": commit()}
        note |= json.loads(process.stdout.splitlines()[-1])
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(note, ensure_ascii=False) + "\n")
    print(f"{corpus}, seed {seed}, {arm}: {time.perf_counter() - began:.0f} s", flush=True)


def commit() -> str:
    """The commit of the code that runs, with "+changed" if code has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+changed" * bool(git("status", "--porcelain", "--", "*.py"))


def keep_scores(corpus: str, seed: int, folder: Path) -> None:
    """Keep the scores by which a cell of real data is split, so that its arms can be run on another machine."""
    kept = {(line["corpus"], line["seed"]) for line in read_lines(SCORES)}
    if corpus in REALS and (corpus, seed) not in kept:
        scores = TrainingDynamics.load(folder / "confidence.jsonl")
        means = {"probability": scores.confidence, "perplexity": scores.mean_perplexity}
        rounded = {name: [float(f"{value:.6g}") for value in values] for name, values in means.items()}
        with open(SCORES, "a", encoding="utf-8") as file:
            file.write(json.dumps({"corpus": corpus, "seed": seed, **rounded}) + "\n")


def restore_scores(corpus: str, seed: int, folder: Path) -> bool:
    """Write a cell's confidence.jsonl from the scores that were kept. -> whether there are any"""
    for line in read_lines(SCORES):
        if (line["corpus"], line["seed"]) == (corpus, seed):
            ids = [example.id for example in load_examples(folder / "train.jsonl")]
            means = (np.array([line[name]]) for name in ("probability", "perplexity"))
            TrainingDynamics(ids, *means).save(folder / "confidence.jsonl")
            return True
    return False


def one(request: dict) -> None:
    """A single run, in a process of its own."""
    print(json.dumps(run_arm(request["name"], Path(request["cell"]), request["settings"])))


def run(args) -> None:
    """Run all that is planned and not yet done, `jobs` at once."""
    args.work.mkdir(parents=True, exist_ok=True)
    if args.corpus in REALS:
        real = REALS[args.corpus]
        arms = list(dict.fromkeys(arm for arm in real.arms if args.weaker or not ARMS[arm].weaker))
        arms = [arm for arm in arms if args.arm in (None, arm)]
        first = [arm for arm in arms if arm in CONTRAST_ARMS]
        plan, seeds = [(args.corpus, first), (args.corpus, arms)], real.seeds
    else:
        plan, seeds = [(corpus, arms) for corpus, arms in PLAN if args.corpus in (None, corpus)], 10
    for corpus, arms in plan:
        tasks = {}
        for seed in args.seeds or range(seeds):
            tasks |= tasks_of_seed(args, corpus, arms, seed)
        run_tasks(tasks, args.jobs)


# --- Command line -----------------------------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "lengths"))
    parser.add_argument("--work", type=Path, help="a folder for bases, scores and the run at hand")
    parser.add_argument("--corpus", choices=(*DEMOS, *REALS), metavar="NAME", help=", ".join((*DEMOS, *REALS)))
    parser.add_argument("--model", type=Path, help="the base of a cell of real data")
    parser.add_argument("--arm", choices=ARMS, metavar="NAME", help="run this arm of a cell of real data alone")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="run these seeds alone")
    parser.add_argument("--weaker", type=Path, help="a smaller base, for an arm whose split is its")
    parser.add_argument("--data", type=Path, help="the data of such a cell in Alpaca's format, .jsonl")
    parser.add_argument("--dtype", choices=DTYPES, default=resolve_dtype(None, "cpu"), help="of matmuls on real data")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "run" and args.work is None:
        parser.error("run needs --work")
    if args.what == "lengths" and (args.corpus not in REALS or args.data is None):
        parser.error("lengths needs the --corpus of a cell of real data, and --data")
    if args.arm and (args.corpus not in REALS or args.arm not in REALS[args.corpus].arms):
        parser.error(f"--arm {args.arm}: is no arm of a cell of real data that --corpus names")
    if args.what == "run" and (args.corpus in REALS) != (None not in (args.model, args.data)):
        parser.error("a cell of real data needs --model and --data, and the demo's take neither")
    if args.what == "run":
        return run(args)
    from benchmarks.study_report import print_lengths, report

    if args.what == "lengths":
        return print_lengths(args.corpus, args.data)
    report()


if __name__ == "__main__":
    main()
