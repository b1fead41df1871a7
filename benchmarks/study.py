"""Does SFTMix beat plain SFT: where, by how much, is it the confidence? Runs, a line of JSON each, and what they say.

    python benchmarks/study.py run --work DIR           on the demo's corpus
    python benchmarks/study.py run --work DIR --corpus NAME --model DIR --weaker DIR --data FILE      on real data
    python benchmarks/study.py report                   the tables and the picture of docs/study.md

A run that is in docs/study.jsonl already is not run again, so that a study which was stopped goes on. Each is compared
with others of the same seed, which have the same base and data. Nothing is tuned: arms have the same settings but for
what their names say, and all are reported, on held-out examples that no arm has seen.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from confidence import TrainingDynamics, roc_auc, score_examples, split_by_confidence
from data import MICRO_BATCH_TOKENS, Dataset, load_examples, make_micro_batches, pack, paired_order, sample_lambda
from eval import exact_match
from infra.cache import load_dataset
from infra.demo import demo_corpus
from infra.files import sha256_of
from infra.hf import choose_template, load_model, load_tokenizer
from model import Transformer

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "docs" / "study.jsonl", ROOT / "docs" / "study.md"

# --- What is not the paper's: a rival, and other uses of confidence ---------------------------------------------------


def smoothed(epsilon: float):
    """In place of `train.sftmix_loss`: NTP with the target (1−ε) e_y + ε/V."""

    def loss(hidden, weight, targets, index_c, index_u, lam, *, num_supervised, log_p=None, **_):
        log_probabilities = (hidden @ weight.T).float().log_softmax(-1)
        gold = log_probabilities.gather(1, targets[:, None]).sum()
        total = -((1 - epsilon) * gold + epsilon * log_probabilities.mean(1).sum()) / num_supervised
        return total, (-gold / num_supervised).detach(), torch.zeros(())

    return loss


def by_variance(scores: TrainingDynamics, config, epoch: int) -> np.ndarray:
    """In place of `train.paired_epoch_order`: the examples whose probability changed least are the confident half."""
    return paired_order(*split_by_confidence(-scores.variance), config.seed, epoch)


def by_rank(scores: TrainingDynamics, config, epoch: int, mirrored: bool = False) -> np.ndarray:
    """Likewise: the surest of the confident half always meets the surest of the unconfident one, and so on down.

    `mirrored`, the surest of all meets the least sure of all.
    """
    confident, unconfident = (half.numpy() for half in split_by_confidence(scores.confidence))
    n = len(confident)
    partners = unconfident[::-1] if mirrored else unconfident
    order = np.random.default_rng([config.seed, epoch]).permutation(n)
    return np.concatenate([np.stack([confident, partners[:n]], axis=1)[order].reshape(-1), partners[n:]])


def leaning(num_pairs: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """In place of `train.sample_lambda`: never less than half of the confident example."""
    lam = sample_lambda(num_pairs, alpha, seed, step)
    return torch.maximum(lam, 1 - lam)


# --- What is compared -------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A way of training, told from the others by its flags of train.py, its data, or what it has in place of a part."""

    flags: str = "--stage sftmix"
    checkpoints: tuple[int, ...] | None = None  # that its scores are the mean of, by number; None: all
    weaker: bool = False  # its scores are of the weaker model
    half: int | None = None  # train on the confident half (0) or the unconfident one (1) alone, as many tokens in all
    parts: dict = {}  # of train.py, by name  # noqa: RUF012


def smoothing(epsilon: float) -> Arm:
    """NTP with label smoothing."""
    return Arm("--stage reference", parts={"sftmix_loss": smoothed(epsilon)})


# Mixup moves μ/(1+μ) · E[2λ(1−λ)] = μ/(1+μ) · α/(2α+1) of the targets' weight to another token, where the two tokens
# that meet differ: at 31 % of mixed positions in the demo, whose answers have fixed words; at nearly all in real data.
# So smoothing is as strong with ε = 0.013 (μ = 0.2) and 0.04 (μ = 1) in the demo, with 0.04 (μ = 0.2) on real data.
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
    "label smoothing, ε = 0.083": smoothing(0.1 / 1.2),
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
    "beyond: split by variance": Arm("--stage sftmix --mu 1", parts={"paired_epoch_order": by_variance}),
    "beyond: pairs by rank": Arm("--stage sftmix --mu 1", parts={"paired_epoch_order": by_rank}),
    "beyond: surest with least sure": Arm(
        "--stage sftmix --mu 1", parts={"paired_epoch_order": partial(by_rank, mirrored=True)}
    ),
    "beyond: λ leaning to the confident": Arm("--stage sftmix --mu 1", parts={"sample_lambda": leaning}),
}
NAMES = list(ARMS)
MAIN, CORE, OFTEN = NAMES[:3], NAMES[:8], NAMES[:10]
BEYOND = [name for name in NAMES if name.startswith("beyond")]
REST = NAMES[NAMES.index("Mixup alone") : NAMES.index(BEYOND[0])]
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


class Demo(NamedTuple):
    """The demo's corpus and base, in a variation."""

    noise: float  # the share of wrong answers among those trained on
    epochs: int = 3


DEMOS = {f"demo {share}": Demo(share / 100) for share in (0, 10, 20, 30, 40)}
SHARES = list(DEMOS)
LONG = "demo 30, 10 epochs"
DEMOS[LONG] = Demo(0.3, epochs=10)
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
REAL = [*MAIN, "label smoothing, ε = 0.04", "SFTMix, by a weaker model"]
SETTINGS = {"lr": 1e-3, "batch_size": 16, "max_length": 256, "dtype": "fp32", "num_checkpoints": 5, "epochs": 5}
HELD_OUT = 200  # examples of real data

# --- One run ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def calibration_error(model: Transformer, dataset: Dataset, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) of the likeliest token where supervised: Σ |acc − conf| n/N"""
    sure, right = [], []
    for chosen in make_micro_batches(dataset.lengths.tolist(), MICRO_BATCH_TOKENS):
        batch = pack([dataset[i] for i in chosen])
        rows = batch.supervised
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)[rows]
        for z, y in zip(hidden.split(256), batch.targets[rows].split(256), strict=True):
            p, token = model.logits(z).softmax(-1).max(-1)
            sure.append(p)
            right.append(token == y)
    sure, right = torch.cat(sure).double(), torch.cat(right).double()
    which = (sure * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, right - sure)
    return float(gaps.abs().sum() / len(sure))


def run_train(flags: dict, *words: str) -> None:
    """train.py, with values by flag."""
    train.main([*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *words])


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
        scores = cell / "of-some.jsonl"
        TrainingDynamics(dynamics.ids, dynamics.probability[chosen], dynamics.perplexity[chosen]).save(scores)
    return scores


def write_half(cell: Path, half: int) -> Path:
    """The confident (0) or the unconfident (1) half of the data, as a file."""
    dynamics, data = TrainingDynamics.load(cell / "confidence.jsonl"), cell / "train.jsonl"
    kept = {dynamics.ids[i] for i in split_by_confidence(dynamics.confidence)[half].tolist()}
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for example, line in zip(load_examples(data), lines, strict=True) if example.id in kept]
    (cell / "half.jsonl").write_text("".join(chosen), encoding="utf-8")
    return cell / "half.jsonl"


def run_arm(name: str, cell: Path, settings: dict) -> dict:
    """Train an arm on a cell's base, data and scores, and measure what came of it."""
    arm, output, more = ARMS[name], cell / "run", []
    flags = {"model": cell / "base", "data": cell / "train.jsonl", "output": output}
    flags |= {"eval_data": cell / "held-out.jsonl", "log_every": 100, **settings}
    if "sftmix" in arm.flags and "online" not in arm.flags and "random" not in arm.flags:
        more = ["--confidence", str(scores_for(arm, cell, settings))]
    if arm.half is not None:
        flags |= {"data": write_half(cell, arm.half), "epochs": 2 * settings["epochs"]}
    for part, replacement in arm.parts.items():
        setattr(train, part, replacement)
    run_train(flags, *arm.flags.split(), *more)

    stage, folder = ("ntp", "reference") if "reference" in arm.flags else ("sftmix", "sftmix")
    result = json.loads((output / "results.json").read_text())[stage]
    model, tokenizer = load_model(output / folder), load_tokenizer(cell / "base")
    template = choose_template(tokenizer, None, sys.stderr)
    encoded = {
        part: load_dataset(cell / f"{part}.jsonl", tokenizer, template, settings["max_length"], None, sys.stderr)
        for part in ("held-out", "train", "eval")
        if (cell / f"{part}.jsonl").exists()
    }
    probability, _ = score_examples(model, encoded["train"])
    measured = {
        "loss": result["loss"],
        "accuracy": result["accuracy"],
        "calibration_error": calibration_error(model, encoded["held-out"]),
        "confidence_spread": float(probability.std()),
        "seconds": result["seconds"],
    }
    if "eval" in encoded:  # to choose by
        examples = load_examples(cell / "eval.jsonl")
        measured["eval_accuracy"] = exact_match(model, examples, tokenizer, template)["accuracy"]
    if name == "NTP":
        score(cell / "base", cell / "train.jsonl", output, settings)
        if (cell / "wrong.json").exists():
            dynamics, wrong = (
                TrainingDynamics.load(output / "confidence.jsonl"),
                json.loads((cell / "wrong.json").read_text()),
            )
            if any(wrong):
                areas = {by: roc_auc(-dynamics.score(by), wrong) for by in ("probability", "perplexity")}
                measured["roc_area"] = areas
    return measured


# --- All runs ---------------------------------------------------------------------------------------------------------


def make_demo_cell(cell: Path, seed: int, demo: Demo) -> None:
    """The demo's base of this seed, and its corpus with another share of wrong answers."""
    base = cell.parent / f"base-{seed}"
    if not (base / "base" / "config.json").exists():
        shutil.rmtree(base, ignore_errors=True)
        command = [sys.executable, ROOT / "train.py", "--stage", "base", "--seed", str(seed), "--output", base]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    corpus = demo_corpus(seed, wrong_share=demo.noise)
    cell.mkdir(exist_ok=True)
    for name, records in (("train", corpus.train), ("eval", corpus.eval), ("held-out", corpus.test)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (cell / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (cell / "wrong.json").write_text(json.dumps(corpus.wrong))
    link(cell / "base", base / "base")


def make_real_cell(cell: Path, seed: int, args) -> None:
    """A real model, and of the data so many examples to train on and others held out, drawn by the seed."""
    lines = [line for line in dict.fromkeys(args.data.read_text(encoding="utf-8").split("\n")) if short_enough(line)]
    order, n = np.random.default_rng(seed).permutation(len(lines)), args.examples
    if len(lines) < n + HELD_OUT:
        sys.exit(f"{args.data}: {len(lines)} records that can be used are fewer than {n + HELD_OUT}")
    cell.mkdir(exist_ok=True)
    for name, numbers in (("train", order[:n]), ("held-out", order[n : n + HELD_OUT])):
        (cell / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in numbers), encoding="utf-8")
    link(cell / "base", args.model)
    if args.weaker:
        link(cell / "weaker", args.weaker)


def short_enough(line: str) -> bool:
    """Whether a record's question leaves room for an answer, however few pieces a tokenizer has."""
    record = json.loads(line or "{}")
    return 0 < len(record.get("instruction", "") + record.get("input", "")) <= 200


def link(path: Path, target: Path) -> None:
    """Make `path` another name of a folder."""
    if not path.exists():
        path.symlink_to(target.resolve())


def run_cell(args, corpus: str, arms: Iterable[str], seed: int) -> None:
    """Run the arms that have not been run, NTP first, whose checkpoints give the others their scores."""
    done = {(note["corpus"], note["seed"], note["arm"]) for note in read_results()}
    waiting = [arm for arm in arms if (corpus, seed, arm) not in done]
    if not waiting:
        return
    cell = args.work / f"{corpus.replace(', ', '-').replace(' ', '-')}-{seed}"
    if args.data:
        make_real_cell(cell, seed, args)
        settings = SETTINGS | {"seed": seed}
    else:
        make_demo_cell(cell, seed, DEMOS[corpus])
        settings = SETTINGS | {"seed": seed, "epochs": DEMOS[corpus].epochs}
    made_with = json.dumps({**settings, "data": sha256_of(cell / "train.jsonl"), "model": sha256_of(cell / "base")})
    if not (cell / "made-with.json").exists():
        (cell / "made-with.json").write_text(made_with)
    if (cell / "made-with.json").read_text() != made_with:
        sys.exit(f"{cell}: made with other settings, data or model; choose another --work")
    if not (cell / "confidence.jsonl").exists() and "NTP" not in waiting:
        waiting.insert(0, "NTP")
    for arm in waiting:
        shutil.rmtree(cell / "run", ignore_errors=True)
        request = {"name": arm, "cell": str(cell), "settings": settings}
        began = time.perf_counter()
        process = subprocess.run(
            [sys.executable, __file__, "one", json.dumps(request)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            sys.exit(f"{request}:\n{process.stdout[-2000:]}{process.stderr[-3000:]}")
        if arm == "NTP":
            shutil.copy(cell / "run" / "confidence.jsonl", cell / "confidence.jsonl")
        if (corpus, seed, arm) not in done:
            note = {"corpus": corpus, "seed": seed, "arm": arm, **json.loads(process.stdout.splitlines()[-1])}
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(note, ensure_ascii=False) + "\n")
        print(f"{corpus}, seed {seed}, {arm}: {time.perf_counter() - began:.0f} s", flush=True)


def one(request: dict) -> None:
    """A single run, in a process of its own."""
    print(json.dumps(run_arm(request["name"], Path(request["cell"]), request["settings"])))


def run(args) -> None:
    """Run all that is planned and not yet done, `jobs` at once."""
    args.work.mkdir(parents=True, exist_ok=True)
    real = [arm for arm in REAL if args.weaker or not ARMS[arm].weaker]
    for corpus, arms in [(args.corpus, real)] if args.data else PLAN:
        if args.corpus in (None, corpus):
            with ThreadPoolExecutor(args.jobs) as pool:  # seeds have nothing in common
                list(pool.map(partial(run_cell, args, corpus, arms), range(5 if args.data else 10)))


# --- What they say ----------------------------------------------------------------------------------------------------


def read_results() -> list[dict]:
    """All runs so far."""
    RESULTS.touch()
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def t_tail(t: float, degrees: int) -> float:
    """The chance that Student's t lies beyond ±t: 1 − ∫ of its density from −t to t, by Simpson's rule.

    >>> round(t_tail(2.262157, 9), 4)
    0.05
    """
    x = np.linspace(0, min(abs(t), 200.0), 20001)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.where(np.arange(20001) % 2 == 1, 4.0, 2.0)
    weights[[0, -1]] = 1
    return max(0.0, 1 - 2 * float((density * weights).sum() * (x[1] - x[0])) / 3)


def t_quantile(tail: float, degrees: int) -> float:
    """The t beyond ± which lies `tail` of the distribution, by bisection."""
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > tail else (low, middle)
    return high


class Difference(NamedTuple):
    """Of paired values: their mean difference, its 95 % interval, the p-value, and what the design could detect."""

    mean: float
    half: float
    p: float
    detectable: float  # with 80 % power at a level of 5 %


def difference(one: list[float], other: list[float]) -> Difference:
    """Paired t-test of `one` minus `other`."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    t = t_quantile(0.05, n - 1)
    p = t_tail(mean / error, n - 1) if error else float(mean == 0)
    return Difference(mean, t * error, p, (t + t_quantile(0.4, n - 1)) * error)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order, corrected, highest = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - place)))
        corrected[i] = highest
    return corrected


class Results:
    """The runs' figures by corpus, arm and seed."""

    def __init__(self):
        self.notes = {(note["corpus"], note["arm"], note["seed"]): note for note in read_results()}

    def of(self, corpora: list[str], arm: str, measure: str) -> dict[int, float]:
        """A measure's values by seed; of several corpora their mean, where the seed was run on all of them."""
        seeds = sorted({seed for corpus, name, seed in self.notes if corpus in corpora and name == arm})
        found = {seed: [self.notes.get((corpus, arm, seed), {}).get(measure) for corpus in corpora] for seed in seeds}
        return {seed: statistics.mean(values) for seed, values in found.items() if None not in values}

    def arms(self, corpora: list[str]) -> list[str]:
        """The arms that were run with all seeds, which are those of NTP; none before there are three."""
        seeds = self.of(corpora, "NTP", "loss").keys()
        return [arm for arm in ARMS if len(seeds) > 2 and seeds <= self.of(corpora, arm, "loss").keys()]

    def difference(self, corpora: list[str], one: str, other: str, measure: str) -> Difference | None:
        """The difference of two arms over the seeds that both have; None with fewer than three."""
        a, b = self.of(corpora, one, measure), self.of(corpora, other, measure)
        seeds = sorted(a.keys() & b.keys())
        return difference([a[s] for s in seeds], [b[s] for s in seeds]) if len(seeds) > 2 else None


MEASURES = {"loss": (".4f", 1), "accuracy": (".1f", 100)}  # held-out loss, and exact match in per cent


def report(args) -> None:
    """Write the tables into docs/study.md, between their marks, and draw docs/study.png."""
    results, text = Results(), DOCUMENT.read_text(encoding="utf-8")
    corpora = sorted({corpus for corpus, _, _ in results.notes})
    parts = {corpus: [corpus] for corpus in corpora} | {"all shares": SHARES}
    tables = {name: arms_table(results, part) + others_table(results, part) for name, part in parts.items()}
    tables["wrong answers found"] = areas_table(results)
    tables["beyond the paper"] = beyond_table(results)
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text:
            text += f"\n### {name}\n\n{begin}{end}\n"
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    DOCUMENT.write_text(text, encoding="utf-8")
    picture(results)


def signed(d: Difference | None, p: float | None, form: str, factor: float) -> list[str]:
    """A difference with its interval, and its corrected p-value."""
    if d is None:
        return ["–", "–"]
    return [f"{factor * d.mean:+{form}} ± {factor * d.half:{form}}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]


def compared(results: Results, corpora: list[str], pairs: list[tuple[str, str]], measure: str) -> list[tuple]:
    """(difference, p-value corrected for their number) of each pair of arms; (None, None) where there is none."""
    found = [results.difference(corpora, one, other, measure) for one, other in pairs]
    corrected = iter(holm([d.p for d in found if d]))
    return [(d, next(corrected) if d else None) for d in found]


def arms_table(results: Results, corpora: list[str]) -> list[str]:
    """A row for each arm, with its paired difference to NTP."""
    arms = results.arms(corpora)
    pairs = [(arm, "NTP") for arm in arms if arm != "NTP"]
    lines = ["| arm | seeds | held-out loss | − NTP | p | exact match, % | − NTP | p | calibration error | spread |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    tests = {m: dict(zip(pairs, compared(results, corpora, pairs, m), strict=True)) for m in MEASURES}
    for arm in arms:
        row = [arm, str(len(results.of(corpora, arm, "loss")))]
        for measure, (form, factor) in MEASURES.items():
            values = [factor * v for v in results.of(corpora, arm, measure).values()]
            row.append(f"{statistics.mean(values):{form}}" if values else "–")
            row += ["", ""] if arm == "NTP" else signed(*tests[measure][arm, "NTP"], form, factor)
        for measure in ("calibration_error", "confidence_spread"):
            row.append(f"{statistics.mean(results.of(corpora, arm, measure).values()):.3f}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def others_table(results: Results, corpora: list[str]) -> list[str]:
    """The other comparisons, each with the smallest difference that would have been found."""
    pairs = [pair for pair in COMPARED if {*pair} <= {*results.arms(corpora)}]
    if not pairs:
        return []
    lines = ["", "| one − other | held-out loss | p | detectable | exact match, % | p | detectable |"]
    lines.append("|---|---|---|---|---|---|---|")
    tests = {measure: compared(results, corpora, pairs, measure) for measure in MEASURES}
    for n, (one, other) in enumerate(pairs):
        row = [f"{one} − {other}"]
        for measure, (form, factor) in MEASURES.items():
            d, p = tests[measure][n]
            row += [*signed(d, p, form, factor), f"{factor * d.detectable:{form}}" if d else "–"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def areas_table(results: Results) -> list[str]:
    """How well low confidence tells the wrong answers, by the share of them."""
    lines = ["| wrong answers, % | by probability | by perplexity |", "|---|---|---|"]
    for corpus in SHARES:
        areas = [
            n["roc_area"] for (c, arm, _), n in results.notes.items() if (c, arm) == (corpus, "NTP") and "roc_area" in n
        ]
        if len(areas) > 2:
            columns = [[area[by] for area in areas] for by in ("probability", "perplexity")]
            cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in columns]
            lines.append(f"| {corpus.split()[1]} | {' | '.join(cells)} |")
    return lines


def beyond_table(results: Results) -> list[str]:
    """What the other uses of confidence bring over random pairs: on the examples to choose by, and on the others."""
    arms = {"SFTMix, μ = 1", "SFTMix, by perplexity, μ = 1", *BEYOND}
    pairs = [(arm, "random pairs, μ = 1") for arm in results.arms([LONG]) if arm in arms]
    columns = [compared(results, [LONG], pairs, measure) for measure in ("eval_accuracy", "accuracy")]
    lines = ["| − random pairs, μ = 1 | exact match to choose by, points | p | exact match on test | p |"]
    lines.append("|---|---|---|---|---|")
    for (arm, _), *cells in zip(pairs, *columns, strict=True):
        lines.append(f"| {arm} | {' | '.join(x for cell in cells for x in signed(*cell, '.1f', 100))} |")
    return lines


COLOURS = ("#2a6f97", "#d1495b")


def over_ntp(results: Results, cells: list[tuple[str, str]]) -> tuple[list[float], list[float]]:
    """By how many points of exact match each (corpus, arm) is over NTP, and half of each interval."""
    found = [results.difference([corpus], arm, "NTP", "accuracy") for corpus, arm in cells]
    return [100 * d.mean for d in found], [100 * d.half for d in found]


def picture(results: Results) -> None:
    """Draw each arm's difference to NTP, and how that goes with the share of wrong answers."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(3, 2))
    whole = {corpus: results.arms([corpus]) for corpus in DEMOS}
    left_out = ("NTP", "NTP, unconfident half", "LoRA, NTP", "LoRA, SFTMix")  # far away, and LoRA has its own NTP
    arms = [arm for arm in ARMS if arm in (*whole["demo 30"], *whole[LONG]) and arm not in left_out]
    for corpus, label, colour, shift in (
        ("demo 30", "3 epochs", COLOURS[0], -0.12),
        (LONG, "10 epochs", COLOURS[1], 0.12),
    ):
        places = [n for n, arm in enumerate(arms) if arm in whole[corpus]]
        means, halves = over_ntp(results, [(corpus, arms[n]) for n in places])
        places = [n + shift for n in places]
        left.errorbar(means, places, xerr=halves, fmt="o", ms=4, color=colour, capsize=2, label=label)
    left.axvline(0, color="black", lw=1)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set(xlabel="exact match over NTP, points", title="Demo corpus, 30 % wrong answers")
    left.legend(frameon=False)
    for arm, colour, shift in (("SFTMix", COLOURS[0], -0.3), ("random pairs", COLOURS[1], 0.3)):
        corpora = [corpus for corpus in SHARES if arm in whole[corpus]]
        means, halves = over_ntp(results, [(corpus, arm) for corpus in corpora])
        places = [100 * DEMOS[corpus].noise + shift for corpus in corpora]
        right.errorbar(places, means, yerr=halves, color=colour, capsize=2, label=arm)
    right.axhline(0, color="black", lw=1)
    right.set(xlabel="wrong answers in training, %", title="Exact match over NTP, points")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "study.png", dpi=150)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--work", type=Path, help="a folder for bases, scores and the run at hand")
    parser.add_argument("--corpus", help="run this one alone; with real data, what to call it")
    parser.add_argument("--model", type=Path, help="a real model, in place of the demo's")
    parser.add_argument("--weaker", type=Path, help="a smaller one, for an arm whose split is its")
    parser.add_argument("--data", type=Path, help="Alpaca's format, .jsonl")
    parser.add_argument("--examples", type=int, default=500, help="to train on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "run" and args.work is None:
        parser.error("run needs --work")
    real = args.data is not None
    if real != (args.model is not None) or (real and args.corpus is None):
        parser.error("real data need --data, --model, and a name for --corpus")
    if args.corpus is not None and (args.corpus in DEMOS) == real:
        parser.error(f"--corpus {args.corpus}: the demo's are {', '.join(DEMOS)}; real data take another name")
    {"run": run, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
