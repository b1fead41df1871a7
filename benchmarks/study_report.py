"""What the runs of the study say: paired differences, the tables of its documents, and the picture.

python benchmarks/study.py report
"""

import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.study import (
    ARMS,
    BEYOND,
    COMPARED,
    COMPARED_ON_REAL_DATA,
    DEMOS,
    DOCUMENTS,
    EARLY_STOPPING,
    LONG,
    REALS,
    ROOT,
    SCORES,
    SHARES,
    STRENGTHS,
    draw_examples,
    read_lines,
    read_results,
)
from confidence import roc_auc, split_by_confidence

# --- What they say ----------------------------------------------------------------------------------------------------


def t_tail(t: float, degrees: float) -> float:
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


def t_quantile(tail: float, degrees: float) -> float:
    """The t beyond ± which lies `tail` of the distribution, by bisection."""
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > tail else (low, middle)
    return high


class Difference(NamedTuple):
    """Of paired values: their mean difference and, of three pairs or more, its interval and its test."""

    mean: float
    half: float | None = None  # half the width of the 95 % interval
    p: float | None = None
    detectable: float | None = None  # the smallest true difference found with 80 % power at a level of 5 %
    wider_half: float | None = None  # half the width of the 97.5 % interval

    @property
    def detectable_of_two(self) -> float:
        """As `detectable`, at a level of 2.5 %, which keeps two tests together at 5 %."""
        return self.detectable - self.half + self.wider_half


def difference(one: list[float], other: list[float]) -> Difference:
    """Paired t-test of `one` minus `other`."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    if n < 3:
        return Difference(mean)
    error = statistics.stdev(differences) / math.sqrt(n)
    t = t_quantile(0.05, n - 1)
    p = t_tail(mean / error, n - 1) if error else float(mean == 0)
    return Difference(mean, t * error, p, (t + t_quantile(0.4, n - 1)) * error, t_quantile(0.025, n - 1) * error)


def unpaired_difference(one: list[float], other: list[float]) -> Difference:
    """Welch's t-test of `one` minus `other`, of unequal variances and sizes. Without two of each there is no interval.

    >>> welch = unpaired_difference([1, 2, 3, 4], [2, 4, 9])
    >>> f"{welch.mean:.1f} ± {welch.half:.2f}"
    '-2.5 ± 8.06'
    """
    mean = statistics.mean(one) - statistics.mean(other)
    if min(len(one), len(other)) < 2:
        return Difference(mean)
    errors = [statistics.variance(values) / len(values) for values in (one, other)]
    degrees = sum(errors) ** 2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, (one, other), strict=True))
    return Difference(mean, t_quantile(0.05, degrees) * math.sqrt(sum(errors)))


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
        for (corpus, _, seed), note in list(self.notes.items()):
            if "validation" in note:
                note["validation_at_temperature"] = note["validation"]["loss_at_temperature"]
            if "early_stopping" in note:  # the checkpoint of the NTP run that is best on validation
                self.notes[corpus, EARLY_STOPPING, seed] = note["early_stopping"]

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
        """The difference of two arms over the seeds that both have; None without any."""
        a, b = self.of(corpora, one, measure), self.of(corpora, other, measure)
        seeds = sorted(a.keys() & b.keys())
        return difference([a[s] for s in seeds], [b[s] for s in seeds]) if seeds else None


PARTS = {demo: [demo] for demo in DEMOS} | {"all shares": SHARES}
MEASURES = {"loss": (".4f", 1), "accuracy": (".1f", 100)}  # held-out loss, and exact match in per cent
SCALED = {"loss_at_temperature": (".4f", 1)}
HEADINGS = {"loss": "raw loss", "accuracy": "exact match, %", "loss_at_temperature": "temperature-scaled loss"}


def report() -> None:
    """Write the tables into the documents, between their marks, and draw docs/study.png."""
    results = Results()
    corpora = {corpus for corpus, _, _ in results.notes}
    tables = {n: arms_table(results, p) + others_table(results, p, COMPARED, MEASURES) for n, p in PARTS.items()}
    real = [corpus for corpus in REALS if corpus in corpora]
    for corpus in [corpus for corpus in real if "grid" not in corpus]:
        others = others_table(results, [corpus], COMPARED_ON_REAL_DATA, SCALED)
        if corpus == MAIN_CELL:
            others = contrasts_table(results) + dtypes_table(results)
        tables[corpus] = real_table(results, corpus) + others
    if grid := [corpus for corpus in real if "grid" in corpus]:
        tables["135M grid"] = grid_table(results, grid)
    if "3M Alpaca" in real:
        tables["strengths"] = strengths_table(results, "3M Alpaca")
    tables["wrong answers found"] = areas_table(results)
    tables["beyond the paper"] = beyond_table(results)
    tables["overfitting"] = overfit_table(results)
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        (document,) = [document for document, text in texts.items() if begin in text]
        before, rest = texts[document].split(begin)
        texts[document] = before + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    for document, text in texts.items():
        document.write_text(text, encoding="utf-8")
    picture(results)


def signed(d: Difference | None, p: float | None, form: str, factor: float) -> list[str]:
    """A difference, with its interval if it has one, and its corrected p-value."""
    if d is None:
        return ["–", "–"]
    interval = "" if d.half is None else f" ± {factor * d.half:{form}}"
    return [f"{factor * d.mean:+{form}}{interval}", "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"]


def compared(results: Results, corpora: list[str], pairs: list[tuple[str, str]], measure: str) -> list[tuple]:
    """(difference, p-value corrected for their number) of each pair of arms; None for what there is not."""
    found = [results.difference(corpora, one, other, measure) for one, other in pairs]
    corrected = iter(holm([d.p for d in found if d and d.p is not None]))
    return [(d, next(corrected) if d and d.p is not None else None) for d in found]


def arms_table(results: Results, corpora: list[str]) -> list[str]:
    """A row for each arm, with its paired difference to NTP."""
    arms = results.arms(corpora)
    pairs = [(arm, "NTP") for arm in arms if arm != "NTP"]
    lines = ["| arm | seeds | raw loss | − NTP | p | exact match, % | − NTP | p | ECE | SD of probability |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    tests = {m: dict(zip(pairs, compared(results, corpora, pairs, m), strict=True)) for m in MEASURES}
    for arm in arms:
        row = [arm, str(len(results.of(corpora, arm, "loss")))]
        for measure, (form, factor) in MEASURES.items():
            values = [factor * v for v in results.of(corpora, arm, measure).values()]
            row.append(f"{statistics.mean(values):{form}}" if values else "–")
            row += ["", ""] if arm == "NTP" else signed(*tests[measure][arm, "NTP"], form, factor)
        for measure in ("calibration_error", "confidence_spread"):
            values = results.of(corpora, arm, measure).values()
            row.append(f"{statistics.mean(values):.3f}" if values else "–")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def others_table(results: Results, corpora: list[str], pairs: list[tuple[str, str]], measures: dict) -> list[str]:
    """Other comparisons of arms that have all seeds, each with its minimum detectable effect."""
    pairs = [pair for pair in pairs if {*pair} <= {*results.arms(corpora), EARLY_STOPPING}]
    if not pairs:
        return []
    lines = ["", f"| one − other | {' | '.join(f'{HEADINGS[measure]} | p | MDE' for measure in measures)} |"]
    lines.append("|---|" + "---|---|---|" * len(measures))
    tests = {measure: compared(results, corpora, pairs, measure) for measure in measures}
    for n, (one, other) in enumerate(pairs):
        row = [f"{one} − {other}"]
        for measure, (form, factor) in measures.items():
            d, p = tests[measure][n]
            row += [*signed(d, p, form, factor), f"{factor * d.detectable:{form}}" if d else "–"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


REAL_MEASURES = {  # heading -> key, format, factor
    "temperature-scaled loss": ("loss_at_temperature", ".4f", 1),
    "raw loss": ("loss", ".4f", 1),
    "token accuracy, %": ("token_accuracy", ".2f", 100),
    "ECE": ("calibration_error", ".3f", 1),
}
MAIN_CELL = "135M Alpaca"
CONTRASTS = [("SFTMix, by perplexity", "NTP"), ("SFTMix, by perplexity", "random pairs")]  # pre-specified
MARGIN = 0.01  # nats of temperature-scaled loss below which a difference is too small to matter, pre-specified


def real_table(results: Results, corpus: str) -> list[str]:
    """A row for NTP with means over its seeds, and one for each arm that was run, with its differences from NTP."""
    lines = [f"| arm | seeds | {' | '.join(REAL_MEASURES)} |", "|---|---|" + "---|" * len(REAL_MEASURES)]
    for arm in dict.fromkeys(["NTP", EARLY_STOPPING, *REALS[corpus].arms]):
        row = [arm, str(len(results.of([corpus], arm, "loss")))]
        for key, form, factor in REAL_MEASURES.values():
            if arm == "NTP":
                values = results.of([corpus], arm, key).values()
                row.append(f"{factor * statistics.mean(values):{form}}" if values else "–")
            else:
                row.append(signed(results.difference([corpus], arm, "NTP", key), None, form, factor)[0])
        if row[1] != "0":
            lines.append(f"| {' | '.join(row)} |")
    return lines


def contrasts_table(results: Results) -> list[str]:
    """The two contrasts that are pre-specified for the main cell. Their p-values wait for the last seed."""
    lines = [
        "",
        "| contrast | seeds | temperature-scaled loss | p (Holm) | MDE | 97.5 % interval | margin |",
        "|---|---|---|---|---|---|---|",
    ]
    key = "loss_at_temperature"
    for (one, other), (d, p) in zip(CONTRASTS, compared(results, [MAIN_CELL], CONTRASTS, key), strict=True):
        seeds = len(results.of([MAIN_CELL], one, key).keys() & results.of([MAIN_CELL], other, key).keys())
        cells = signed(d, p if seeds == REALS[MAIN_CELL].seeds else None, ".4f", 1)
        cells += ["–", "–"] if d is None or d.half is None else [f"{d.detectable_of_two:.4f}", f"± {d.wider_half:.4f}"]
        lines.append(f"| {one} − {other} | {seeds} | {' | '.join(cells)} | {MARGIN} |")
    return lines


def dtypes_table(results: Results) -> list[str]:
    """The contrasts over the seeds of each dtype alone, and the difference of the two means."""
    lines = ["", "| contrast, by dtype | float32 (seeds) | bf16 (seeds) | bf16 − float32 |", "|---|---|---|---|"]
    for one, other in CONTRASTS:
        by_dtype = {"fp32": [], "bf16": []}
        a, b = (results.of([MAIN_CELL], arm, "loss_at_temperature") for arm in (one, other))
        for seed in a.keys() & b.keys():
            by_dtype[results.notes[MAIN_CELL, one, seed]["dtype"]].append(a[seed] - b[seed])
        if not all(by_dtype.values()):
            return []
        found = [difference(values, [0.0] * len(values)) for values in by_dtype.values()]
        found.append(unpaired_difference(by_dtype["bf16"], by_dtype["fp32"]))
        cells = [signed(d, None, ".4f", 1)[0] for d in found]
        counts = [f" ({len(values)})" for values in by_dtype.values()]
        lines.append(f"| {one} − {other} | {cells[0]}{counts[0]} | {cells[1]}{counts[1]} | {cells[2]} |")
    return lines


def grid_table(results: Results, corpora: list[str]) -> list[str]:
    """NTP's validation loss by learning rate."""
    lines = ["| learning rate | raw loss, validation | temperature-scaled loss, validation |", "|---|---|---|"]
    for corpus in sorted(corpora, key=lambda corpus: REALS[corpus].lr):
        note = results.notes[corpus, "NTP", 0]
        cells = [f"{note['validation'][key]:.4f}" for key in ("loss", "loss_at_temperature")]
        lines.append(f"| {REALS[corpus].lr:g} | {' | '.join(cells)} |")
    return lines


def strengths_table(results: Results, corpus: str) -> list[str]:
    """Temperature-scaled loss minus NTP's: on the examples to choose a strength by, and on those that are reported."""
    lines = ["| arm | seeds | validation, − NTP | held out, − NTP |", "|---|---|---|---|"]
    for arm in STRENGTHS:
        row = [arm, str(len(results.of([corpus], arm, "loss")))]
        for measure in ("validation_at_temperature", "loss_at_temperature"):
            row.append(signed(results.difference([corpus], arm, "NTP", measure), None, ".4f", 1)[0])
        lines.append(f"| {' | '.join(row)} |")
    return lines


def overfit_table(results: Results) -> list[str]:
    """Whether an arm gains more on NTP after 10 epochs, where NTP overfits: the difference to its gain after 3."""
    lines = ["| arm | 3 epochs: − NTP | 10 epochs: − NTP | difference of the two | p |", "|---|---|---|---|---|"]
    gains = {}
    for arm in results.arms(["demo 30"]):
        if arm != "NTP" and arm in results.arms([LONG]):
            losses = [[results.of([c], a, "loss") for a in (arm, "NTP")] for c in ("demo 30", LONG)]
            seeds = sorted(set.intersection(*(set(values) for pair in losses for values in pair)))
            gains[arm] = [[one[seed] - ntp[seed] for seed in seeds] for one, ntp in losses]
    tests = {arm: difference(after_10, after_3) for arm, (after_3, after_10) in gains.items()}
    corrected = dict(zip(tests, holm([d.p for d in tests.values()]), strict=True))
    for arm, (after_3, after_10) in gains.items():
        cells = [f"{statistics.mean(gain):+.4f}" for gain in (after_3, after_10)]
        lines.append(f"| {arm} | {' | '.join(cells + signed(tests[arm], corrected[arm], '.4f', 1))} |")
    return lines


def areas_table(results: Results) -> list[str]:
    """How well low confidence finds the wrong answers, where it is known which are wrong."""
    lines = ["| corpus | by probability | by perplexity |", "|---|---|---|"]
    for corpus in (*SHARES, "135M GSM8K mistakes"):
        areas = [
            n["roc_area"] for (c, arm, _), n in results.notes.items() if (c, arm) == (corpus, "NTP") and "roc_area" in n
        ]
        if len(areas) > 2:
            columns = [[area[by] for area in areas] for by in ("probability", "perplexity")]
            cells = [mean_and_half(values) for values in columns]
            lines.append(f"| {corpus} | {' | '.join(cells)} |")
    return lines


def mean_and_half(values: list[float]) -> str:
    """A mean, and half the width of its 95 % interval."""
    d = difference(values, [0.0] * len(values))
    return f"{d.mean:.3f} ± {d.half:.3f}"


def print_lengths(corpus: str, data: Path) -> None:
    """Print how long the answers of each half are, and how well length finds wrong answers, beside confidence.

    By the seeds whose scores were kept. Lengths are in characters.
    """
    halves, areas = [], []
    for line in [line for line in read_lines(SCORES) if line["corpus"] == corpus]:
        records, *_ = draw_examples(line["seed"], REALS[corpus], data)
        answer, question = (np.array([len(record[key]) for record in records]) for key in ("output", "instruction"))
        perplexity = np.array(line["perplexity"])
        halves.append([answer[half].mean() for half in split_by_confidence(-perplexity)])
        if "correct" in records[0]:
            wrong = [not record["correct"] for record in records]
            signals = {"low probability": -np.array(line["probability"]), "high perplexity": perplexity}
            signals |= {"long answer": answer, "long question": question}
            signals["high perplexity and long answer (sum of ranks)"] = ranks(perplexity) + ranks(answer)
            areas.append({name: roc_auc(signal, wrong) for name, signal in signals.items()})
    if not halves:
        sys.exit(f"{corpus}: no scores in {SCORES}")
    confident, unconfident = np.mean(halves, axis=0)
    print(f"{len(halves)} seeds; mean length of answers: confident half {confident:.0f}, unconfident {unconfident:.0f}")
    by_signal = {name: [area[name] for area in areas] for name in (areas[0] if areas else ())}
    for name, values in by_signal.items():
        d = difference(values, by_signal["high perplexity"])
        compared = "" if name == "high perplexity" else f"; minus that of high perplexity: {d.mean:+.3f} ± {d.half:.3f}"
        print(f"{name}: area {mean_and_half(values)}{compared}")


def ranks(values) -> np.ndarray:
    """0 for the smallest value, 1 for the next, …"""
    return np.argsort(np.argsort(values, kind="stable"))


def beyond_table(results: Results) -> list[str]:
    """Other uses of confidence minus random pairs: on the examples to choose by, and on the others."""
    arms = {"SFTMix, μ = 1", "SFTMix, by perplexity, μ = 1", *BEYOND}
    pairs = [(arm, "random pairs, μ = 1") for arm in results.arms([LONG]) if arm in arms]
    measures = {"eval_accuracy": (".1f", 100), "accuracy": (".1f", 100), "loss": (".4f", 1)}
    columns = [[signed(*test, *measures[m]) for test in compared(results, [LONG], pairs, m)] for m in measures]
    headings = "exact match, validation, points | p | exact match, held out, points | p | raw loss, held out | p"
    lines = [f"| − random pairs, μ = 1 | {headings} |", "|---|---|---|---|---|---|---|"]
    for (arm, _), *cells in zip(pairs, *columns, strict=True):
        lines.append(f"| {arm} | {' | '.join(text for cell in cells for text in cell)} |")
    return lines


COLOURS = ("#2a6f97", "#d1495b")


def effects(results: Results, axes, cells: list[str], sftmix: str, split: str, measure: str, factor: float) -> None:
    """For each cell a row, and in it the differences of SFTMix and of random pairs from NTP, with 95 % intervals."""
    arms = {sftmix: f"SFTMix, by {split}", "random pairs": "random pairs"}
    for (arm, label), colour, shift in zip(arms.items(), COLOURS, (-0.12, 0.12), strict=True):
        found = [results.difference([cell], arm, "NTP", measure) for cell in cells]
        means, halves = ([factor * value for value in values] for values in zip(*(d[:2] for d in found), strict=True))
        places = [row + shift for row in range(len(cells))]
        axes.errorbar(means, places, xerr=halves, fmt="o", ms=4, color=colour, capsize=2, label=label)
    axes.axvline(0, color="black", lw=1)
    seeds = [len(results.of([cell], sftmix, measure)) for cell in cells]
    axes.set_yticks(range(len(cells)), [f"{cell}\n{n} seeds" for cell, n in zip(cells, seeds, strict=True)])
    empty = max(6 - len(cells), 0) / 2  # rows are as high in a panel of few
    axes.set_ylim(len(cells) - 0.5 + empty, -0.5 - empty)  # the first on top
    axes.legend(frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def picture(results: Results) -> None:
    """Draw differences from NTP of SFTMix and random pairs: real data with three seeds or more, and the demo."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    arms, key = ["SFTMix, by perplexity", "random pairs"], "loss_at_temperature"
    cells = [cell for cell in REALS if min(len(results.of([cell], arm, key)) for arm in ["NTP", *arms]) > 2]
    panels = 1 + bool(cells)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.3), layout="constrained", squeeze=False)
    if cells:
        effects(results, axes[0, 0], cells, arms[0], "perplexity", key, 1)
        axes[0, 0].axvspan(-MARGIN, MARGIN, color="black", alpha=0.08, lw=0)
        axes[0, 0].set(xlabel="nats, lower is better; grey: too small to matter", title="Temperature-scaled loss − NTP")
    effects(results, axes[0, -1], list(DEMOS), "SFTMix", "probability", "accuracy", 100)
    axes[0, -1].set(xlabel="points, higher is better; by % of wrong answers", title="Exact match − NTP")
    figure.savefig(ROOT / "docs" / "study.png", dpi=150)
