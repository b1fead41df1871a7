"""Does SFTMix beat plain SFT: where, by how much, is it the confidence? Runs, a line of JSON each, and what they say.

    python benchmarks/study.py run --work DIR                       the demo's corpus
    python benchmarks/study.py run --work DIR --model DIR --data FILE --name NAME     a real model, on real data
    python benchmarks/study.py report                               the tables and the picture of docs/study.md

A run that is in docs/study.jsonl already is not run again, so that a study which was stopped goes on. Each is compared
with others of the same seed, which have the same base, data and order. Nothing is tuned: arms have the same settings
but for what their names say, and all are reported, on held-out examples that no arm has seen.
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
from confidence import Dynamics, load_dataset, load_tokenizer, score_examples, split_by_confidence
from data import Dataset, demo_corpus, load_examples, pack, split_batch
from model import Transformer, load_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "docs" / "study.jsonl", ROOT / "docs" / "study.md"

# --- What is compared -------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A way of training, told from NTP by its flags of train.py, its data, or its loss."""

    flags: str = "--stage sftmix"
    checkpoints: tuple[int, ...] | None = None  # that its scores are the mean of, by number; None: all
    half: int | None = None  # train on the confident half (0) or the unconfident one (1) alone, as many tokens in all
    smoothing: float = 0.0  # of labels: ε spread over the whole vocabulary


# With μ = 0.2 and a mean λ of ½, Mixup moves μ/2 of 1 + μ of all the targets' weight off the gold token.
MATCHED = 0.1 / 1.2
ARMS = {
    "NTP": Arm("--stage reference"),
    "SFTMix": Arm(),
    "random pairs": Arm("--stage sftmix --pairing random"),
    "label smoothing": Arm("--stage reference", smoothing=MATCHED),
    "SFTMix, μ = 1": Arm("--stage sftmix --mu 1"),
    "random pairs, μ = 1": Arm("--stage sftmix --mu 1 --pairing random"),
    "label smoothing as of μ = 1": Arm("--stage reference", smoothing=0.25),
    "SFTMix, by perplexity": Arm("--stage sftmix --confidence_by perplexity"),
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
}
CORE = list(ARMS)[:7]
COMPARED = [("SFTMix", "random pairs"), ("SFTMix", "label smoothing"), ("SFTMix, μ = 1", "random pairs, μ = 1")]
COMPARED += [("SFTMix, μ = 1", "label smoothing as of μ = 1"), ("LoRA, SFTMix", "LoRA, NTP")]
NOISE = (0.3, 0.0, 0.4, 0.2, 0.1)  # shares of wrong answers in the demo's corpus
SETTINGS = {
    "demo": {"lr": 1e-3, "batch_size": 16, "max_length": 256, "dtype": "fp32", "epochs": 3, "num_checkpoints": 5},
    "real": {"lr": 1e-3, "batch_size": 32, "max_length": 512, "dtype": "fp32", "epochs": 5, "num_checkpoints": 5},
}

# --- One run ----------------------------------------------------------------------------------------------------------


def smoothed(epsilon: float):
    """A loss for train.py: NTP with the target (1−ε) e_y + ε/V, in place of `mixup.sftmix_loss`."""

    def loss(hidden, weight, targets, index_c, index_u, lam, *, num_supervised, log_p=None, **_):
        log_probabilities = (hidden @ weight.T).float().log_softmax(-1)
        gold = log_probabilities.gather(1, targets[:, None]).sum()
        total = -((1 - epsilon) * gold + epsilon * log_probabilities.mean(1).sum()) / num_supervised
        return total, (-gold / num_supervised).detach(), torch.zeros(())

    return loss


@torch.no_grad()
def calibration_error(model: Transformer, dataset: Dataset, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) of the likeliest token where supervised: Σ |acc − conf| n/N"""
    sure, right = [], []
    for chosen in split_batch(dataset.lengths.tolist(), 8192):
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


def flags_of(settings: dict) -> list[str]:
    """Values by flag, as train.py's command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run_arm(arm: Arm, cell: Path, settings: dict, output: Path) -> dict:
    """Train an arm on a cell's base, data and scores, and measure what came of it."""
    data, scores, more = cell / "train.jsonl", cell / "confidence.jsonl", []
    if arm.checkpoints is not None:
        dynamics, chosen = Dynamics.load(scores), list(arm.checkpoints)
        scores = output.with_suffix(".scores")
        Dynamics(dynamics.ids, dynamics.probability[chosen], dynamics.perplexity[chosen]).save(scores)
    if arm.half is not None:
        dynamics = Dynamics.load(scores)
        kept = {dynamics.ids[i] for i in split_by_confidence(dynamics.confidence)[arm.half].tolist()}
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
        chosen = [line for example, line in zip(load_examples(data), lines, strict=True) if example.id in kept]
        data = output.with_suffix(".jsonl")
        data.write_text("".join(chosen), encoding="utf-8")
        more = ["--epochs", str(2 * settings["epochs"])]
    if arm.smoothing:
        train.sftmix_loss = smoothed(arm.smoothing)
    if "sftmix" in arm.flags and "online" not in arm.flags and "random" not in arm.flags:
        more += ["--confidence", str(scores)]
    paths = {"model": cell / "base", "data": data, "eval_data": cell / "test.jsonl", "output": output}
    train.main([*flags_of(paths | {"log_every": 100} | settings), *arm.flags.split(), *more])
    stage = "ntp" if "reference" in arm.flags else "sftmix"
    result = json.loads((output / "results.json").read_text())[stage]
    model = load_model(output / ("reference" if stage == "ntp" else "sftmix")).eval()
    tokenizer = load_tokenizer(cell / "base")
    held_out, trained = (
        load_dataset(file, tokenizer, "alpaca", settings["max_length"], None, sys.stderr)
        for file in (cell / "test.jsonl", cell / "train.jsonl")
    )
    probability, _ = score_examples(model, trained)
    return {
        "loss": result["loss"],
        "accuracy": result["accuracy"],
        "calibration_error": calibration_error(model, held_out),
        "confidence_spread": float(probability.std()),
        "seconds": result["seconds"],
    }


def make_demo_cell(cell: Path, seed: int, noise: float) -> None:
    """The demo's base of this seed, and its corpus with another share of wrong answers."""
    base = cell.parent / f"base-{seed}"
    if not (base / "base" / "config.json").exists():
        shutil.rmtree(base, ignore_errors=True)
        command = [sys.executable, ROOT / "train.py", "--stage", "base", "--seed", str(seed), "--output", base]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    corpus = demo_corpus(seed, wrong_share=noise)
    cell.mkdir(exist_ok=True)
    for name in ("train", "test"):
        text = "".join(json.dumps(record) + "\n" for record in getattr(corpus, name))
        (cell / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if not (cell / "base").exists():
        (cell / "base").symlink_to((base / "base").resolve())


def make_real_cell(cell: Path, seed: int, model: Path, data: Path, examples: int) -> None:
    """A real model, and of the data so many examples to train on and a tenth of that, held out, drawn by the seed."""
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    order = np.random.default_rng(seed).permutation(len(lines))
    cell.mkdir(exist_ok=True)
    parts = {"train": order[:examples], "test": order[examples : examples + max(200, examples // 10)]}
    for name, numbers in parts.items():
        (cell / f"{name}.jsonl").write_text("".join(lines[i] for i in numbers), encoding="utf-8")
    if not (cell / "base").exists():
        (cell / "base").symlink_to(model.resolve())


# --- All runs ---------------------------------------------------------------------------------------------------------


def planned(args) -> list[tuple[dict, list[str]]]:
    """Which arms are run with every seed, in which corpus and with what noise; what matters most first."""
    if args.model:
        return [({"corpus": args.name, "noise": None}, CORE)]
    return [({"corpus": "demo", "noise": noise}, arms) for noise, arms in (*((n, CORE) for n in NOISE), (0.3, ARMS))]


def run_cell(args, where: dict, arms: Iterable[str]) -> None:
    """Run the arms of a cell that have not been run, NTP first, whose checkpoints give the others their scores."""
    done = {(n["corpus"], n["noise"], n["seed"], n["arm"]) for n in map(json.loads, RESULTS.read_text().splitlines())}
    waiting = [arm for arm in arms if (*where.values(), arm) not in done]
    cell = args.work / "-".join(str(value) for value in where.values() if value is not None)
    if not waiting:
        return
    if args.model:
        make_real_cell(cell, where["seed"], args.model, args.data, args.examples)
    else:
        make_demo_cell(cell, where["seed"], where["noise"])
    if not (cell / "confidence.jsonl").exists() and "NTP" not in waiting:
        waiting.insert(0, "NTP")
    for name in waiting:
        output = cell / "run"
        shutil.rmtree(output, ignore_errors=True)
        settings = SETTINGS["real" if args.model else "demo"] | {"seed": where["seed"]}
        request = {"arm": name, "cell": str(cell), "settings": settings}
        command = [sys.executable, __file__, "one", json.dumps(request)]
        began = time.perf_counter()
        process = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            sys.exit(f"{request}:\n{process.stdout[-2000:]}{process.stderr[-3000:]}")
        if name == "NTP":
            shutil.copy(output / "confidence.jsonl", cell / "confidence.jsonl")
        if (*where.values(), name) not in done:
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**where, "arm": name, **json.loads(process.stdout.splitlines()[-1])}) + "\n")
        print(f"{where} {name}: {time.perf_counter() - began:.0f} s", flush=True)


def one(request: dict) -> None:
    """A single run, in a process of its own."""
    cell, settings, output = Path(request["cell"]), request["settings"], Path(request["cell"]) / "run"
    result = run_arm(ARMS[request["arm"]], cell, settings, output)
    if request["arm"] == "NTP":
        paths = {"model": cell / "base", "data": cell / "train.jsonl", "output": output}
        train.main([*flags_of(paths | settings), "--stage", "confidence"])
    print(json.dumps(result))


def run(args) -> None:
    """Run all that is planned and not yet done, `jobs` at once."""
    args.work.mkdir(parents=True, exist_ok=True)
    RESULTS.touch()
    for where, arms in planned(args):
        with ThreadPoolExecutor(args.jobs) as pool:  # seeds have nothing in common
            cells = [partial(run_cell, args, {**where, "seed": seed}, arms) for seed in range(args.seeds)]
            list(pool.map(lambda cell: cell(), cells))


# --- What they say ----------------------------------------------------------------------------------------------------


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
    pairs: int


def difference(one: list[float], other: list[float]) -> Difference:
    """Paired t-test of `one` minus `other`."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    t = t_quantile(0.05, n - 1)
    p = t_tail(mean / error, n - 1) if error else 1.0
    return Difference(mean, t * error, p, (t + t_quantile(0.4, n - 1)) * error, n)


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


MEASURES = {"loss": ("held-out loss", ".4f", 1), "accuracy": ("exact match, %", ".1f", 100)}


def report(args) -> None:
    """Write the tables into docs/study.md, between their marks, and draw docs/study.png."""
    notes = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]

    def of(cell: tuple, arm: str, measure: str) -> dict[int, float]:
        """The values of a measure by seed."""
        return {
            n["seed"]: n[measure]
            for n in notes
            if (n["corpus"], n["noise"], n["arm"]) == (*cell, arm) and n[measure] is not None
        }

    cells = sorted({(n["corpus"], n["noise"]) for n in notes}, key=str)
    cells = [cell for cell in cells if len(of(cell, "NTP", "loss")) > 2]
    text = DOCUMENT.read_text(encoding="utf-8")
    for corpus, noise in cells:
        name = corpus if noise is None else f"{corpus} {round(100 * noise)}"
        tables = cell_table((corpus, noise), of)
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text:
            text += f"\n## {name}\n\n{begin}{end}\n"
        before, rest = text.split(begin)
        text = before + begin + tables + end + rest.split(end, 1)[1]
    DOCUMENT.write_text(text, encoding="utf-8")
    picture(of, cells)


def cell_table(cell: tuple, of) -> str:
    """A row for each arm, with its paired difference to NTP; then the other comparisons."""
    arms = [arm for arm in ARMS if len(of(cell, arm, "loss")) > 2]
    lines = [
        "| arm | seeds | held-out loss | − NTP | p | exact match, % | − NTP | p | calibration error | spread | s |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    pairs = {arm: ("NTP", arm) for arm in arms if arm != "NTP"}
    tests = {}
    for measure in MEASURES:
        found = {arm: paired(cell, arm, "NTP", measure, of) for arm in pairs}
        found = {arm: d for arm, d in found.items() if d}
        corrected = holm([d.p for d in found.values()])
        tests[measure] = {arm: (d, p) for (arm, d), p in zip(found.items(), corrected, strict=True)}
    for arm in arms:
        row = [arm, str(len(of(cell, arm, "loss")))]
        for measure, (_, form, factor) in MEASURES.items():
            values = [factor * v for v in of(cell, arm, measure).values()]
            row.append(f"{statistics.mean(values):{form}}" if values else "–")
            row += signed(tests[measure].get(arm), form, factor)
        for measure, form in (("calibration_error", ".3f"), ("confidence_spread", ".3f"), ("seconds", ".0f")):
            row.append(f"{statistics.mean(of(cell, arm, measure).values()):{form}}")
        lines.append(f"| {' | '.join(row)} |")
    others = [(one, other) for one, other in COMPARED if one in arms and other in arms]
    lines += ["", "| one − other | held-out loss | p | detectable | exact match, % | p | detectable |"]
    lines.append("|---|---|---|---|---|---|---|")
    columns = []
    for measure, (_, form, factor) in MEASURES.items():
        found = [paired(cell, one, other, measure, of) for one, other in others]
        corrected = iter(holm([d.p for d in found if d]))
        column = []
        for d in found:
            detectable = f"{factor * d.detectable:{form}}" if d else "–"
            column.append([*signed((d, next(corrected)) if d else None, form, factor), detectable])
        columns.append(column)
    for (one, other), *cells_of in zip(others, *columns, strict=True):
        lines.append(f"| {one} − {other} | {' | '.join(c for column in cells_of for c in column)} |")
    return "\n".join(lines) + "\n"


def paired(cell: tuple, one: str, other: str, measure: str, of) -> Difference | None:
    """The difference of two arms over the seeds that both have; None with fewer than three."""
    a, b = of(cell, one, measure), of(cell, other, measure)
    seeds = sorted(a.keys() & b.keys())
    return difference([a[s] for s in seeds], [b[s] for s in seeds]) if len(seeds) > 2 else None


def signed(tested: tuple[Difference, float] | None, form: str, factor: float) -> list[str]:
    """A difference with its interval, and its corrected p-value."""
    if tested is None:
        return ["", ""]
    d, p = tested
    return [f"{factor * d.mean:+{form}} ± {factor * d.half:{form}}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]


def picture(of, cells: list[tuple]) -> None:
    """Draw each arm's difference to NTP, and how that grows with the share of wrong answers."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shares = sorted(noise for corpus, noise in cells if corpus == "demo")
    several = len(shares) > 1
    widths, ratios = ((11, 3.8), (3, 2)) if several else ((6.5, 3.2), (1,))
    figure, panels = plt.subplots(
        1, len(ratios), figsize=widths, layout="constrained", width_ratios=ratios, squeeze=False
    )
    panels = panels[0]
    main_cell = ("demo", 0.3)
    arms = [arm for arm in ARMS if arm != "NTP" and "LoRA" not in arm and paired(main_cell, arm, "NTP", "accuracy", of)]
    found = [paired(main_cell, arm, "NTP", "accuracy", of) for arm in arms]
    panels[0].errorbar(
        [100 * d.mean for d in found], arms, xerr=[100 * d.half for d in found], fmt="o", color="#2a6f97", capsize=2
    )
    panels[0].axvline(0, color="black", lw=1)
    panels[0].invert_yaxis()
    panels[0].set(xlabel="exact match over NTP, points", title="Demo corpus, 30 % wrong answers")
    if several:
        by_noise(panels[1], shares, of)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "study.png", dpi=150)


def by_noise(axes, shares: list[float], of) -> None:
    """How the differences to NTP go with the share of wrong answers."""
    for arm, colour in (("SFTMix", "#2a6f97"), ("random pairs", "#d1495b"), ("label smoothing", "#888888")):
        kept = [share for share in shares if paired(("demo", share), arm, "NTP", "accuracy", of)]
        found = [paired(("demo", share), arm, "NTP", "accuracy", of) for share in kept]
        means, halves = ([100 * value for value in column] for column in zip(*((d.mean, d.half) for d in found)))  # noqa: B905
        axes.errorbar([100 * share for share in kept], means, halves, color=colour, capsize=2, label=arm)
    axes.axhline(0, color="black", lw=1)
    axes.set(xlabel="wrong answers in training, %", title="Exact match over NTP, points")
    axes.legend(frameon=False)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--work", type=Path, help="a folder for bases, scores and the run at hand")
    parser.add_argument("--model", type=Path, help="a real model, in place of the demo's")
    parser.add_argument("--data", type=Path, help="Alpaca's format, .jsonl")
    parser.add_argument("--name", help="of that corpus")
    parser.add_argument("--examples", type=int, default=2900, help="to train on")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "run" and (args.work is None or (args.model is None) != (args.data is None)):
        parser.error("--work is needed, and --model, --data and --name together")
    {"run": run, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
