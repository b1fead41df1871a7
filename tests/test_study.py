"""The tables of the study's documents, computed again from its runs, by scipy and none of the study's functions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {  # heading -> key in a run, decimals, factor
    "raw loss": ("loss", 4, 1),
    "exact match, %": ("accuracy", 1, 100),
    "temperature-scaled loss": ("loss_at_temperature", 4, 1),
    "token accuracy, %": ("token_accuracy", 2, 100),
    "ECE": ("calibration_error", 3, 1),
    "SD of probability": ("confidence_spread", 3, 1),
    "validation, − NTP": ("validation_at_temperature", 4, 1),
    "held out, − NTP": ("loss_at_temperature", 4, 1),
}
CORPORA = {"all shares": [f"demo {share}" for share in (0, 10, 20, 30, 40)], "strengths": ["3M Alpaca"]}
LONG = "demo 30, 10 epochs"

MAIN_CELL, PLANNED_SEEDS = "135M Alpaca", 10


@pytest.fixture(scope="module")
def runs():
    """The runs by corpus, arm and seed."""
    found = {}
    for line in (ROOT / "docs" / "study.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if "validation" in run:
            run["validation_at_temperature"] = run["validation"]["loss_at_temperature"]
        found[run["corpus"], run["arm"], run["seed"]] = run
        if "early_stopping" in run:
            found[run["corpus"], "NTP, early stopping", run["seed"]] = run["early_stopping"]
    return found


def tables():
    """(section, header, rows) of the tables between the marks of the documents."""
    document = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("study.md", "study_tables.md"))
    for section, body in re.findall(r"<!-- ([^>]*) -->\n(.*?)<!-- end of \1 -->", document, flags=re.DOTALL):
        for table in body.split("\n\n"):
            rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()]
            yield section, rows[0], rows[2:]


def rows_of(section, first_heading):
    (rows,) = [rows for name, header, rows in tables() if (name, header[0]) == (section, first_heading)]
    return rows


def values(runs, section, arm, key):
    """[seeds]: the arm's values on a section's corpus, or their means over all shares of wrong answers."""
    corpora = CORPORA.get(section, [section])
    rows = [[runs.get((corpus, arm, seed), {}).get(key) for corpus in corpora] for seed in range(10)]
    return np.array(rows, dtype=float).mean(axis=1)  # without a run, NaN


def seeds_of(runs, arm):
    """The seeds of the main cell that an arm was run with."""
    return {seed for corpus, name, seed in runs if (corpus, name) == (MAIN_CELL, arm)}


def paired(one, other, decimals, level=0.05):
    """The difference with its interval, the p-value, the minimum detectable effect, and the 97.5 % interval.

    `level` is that of the effect to detect.
    """
    stats = pytest.importorskip("scipy.stats")
    both = ~np.isnan(one - other)
    mean = f"{np.mean(one[both] - other[both]):+.{decimals}f}"
    if both.sum() < 3:
        return mean, None, "–", "–"
    result, degrees = stats.ttest_rel(one[both], other[both]), both.sum() - 1
    half, wider_half = (np.ptp(result.confidence_interval(share)) / 2 for share in (0.95, 0.975))
    detectable = half * stats.t.ppf([1 - level / 2, 0.8], degrees).sum() / stats.t.ppf(0.975, degrees)
    half, wider_half, detectable = (f"{value:.{decimals}f}" for value in (half, wider_half, detectable))
    return f"{mean} ± {half}", result.pvalue, detectable, f"± {wider_half}"


def holm(p_values):
    order, m = np.argsort(p_values), len(p_values)
    corrected = np.empty(m)
    corrected[order] = np.maximum.accumulate(np.minimum(np.sort(p_values) * (m - np.arange(m)), 1))
    return [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in corrected]


def test_tables_recomputed_with_scipy(runs):
    pytest.importorskip("scipy")
    seen = set()  # section and first heading of what is recomputed
    arms = ("NTP", "random pairs", "SFTMix, by perplexity")
    is_complete = len(set.intersection(*(seeds_of(runs, arm) for arm in arms))) == PLANNED_SEEDS
    for section, header, rows in tables():
        for column, heading in enumerate(header):
            if header[0] not in ("arm", "one − other", "contrast") or heading not in COLUMNS:
                continue
            seen.add((section, header[0]))
            key, decimals, factor = COLUMNS[heading]
            value = {arm: factor * values(runs, section, arm, key) for _, arm, _ in runs}
            tests = []  # what the table shows of a test, and the test
            for row in rows:
                one, other = (row[0], "NTP") if header[0] == "arm" else row[0].split(" − ")
                shown = row[column:][: 4 if header[0] == "contrast" else 3]  # difference, p-value, MDE, 97.5 % interval
                if "seeds" in header:
                    both = value[one] if header[0] == "arm" else value[one] - value[other]
                    if heading in ("raw loss", "temperature-scaled loss"):  # all arms have it
                        assert row[header.index("seeds")] == str(np.isfinite(both).sum()), (section, row)
                if header[0] == "arm":
                    # Otherwise the column has differences from NTP.
                    has_means = "− NTP" not in heading and (one == "NTP" or "− NTP" in header)
                    mean_or_difference = f"{np.nanmean(value[one]):.{decimals}f}"
                    if not has_means:
                        mean_or_difference = paired(value[one], value[other], decimals)[0]
                    assert row[column] == mean_or_difference, (section, heading, row)
                    shown = row[column + 1 :][:2] if "− NTP" in header[column + 1 :][:1] else [""]
                if "±" in shown[0]:
                    level = 0.025 if header[0] == "contrast" else 0.05
                    tests.append((shown, paired(value[one], value[other], decimals, level)))
            for (shown, test), p in zip(tests, holm([test[1] for _, test in tests]), strict=True):
                if header[0] == "contrast" and not is_complete:
                    p = "–"  # the test is made at the end
                assert shown == [test[0], p, *test[2:]][: len(shown)], (section, heading, shown)
    others = {("overfitting", "arm"), (MAIN_CELL, "contrast, by dtype"), ("135M grid", "learning rate")}
    others |= {("beyond the paper", "− random pairs, μ = 1"), ("wrong answers found", "corpus")}  # tests of their own
    assert seen | others == {(section, header[0]) for section, header, _ in tables()} and not seen & others


def test_what_overfitting_changes_recomputed_with_scipy(runs):
    pytest.importorskip("scipy")
    rows, tests = rows_of("overfitting", "arm"), []
    for arm, *gains, shown, _ in rows:
        losses = ([values(runs, corpus, name, "loss") for name in (arm, "NTP")] for corpus in ("demo 30", LONG))
        found = [one - ntp for one, ntp in losses]
        assert gains == [f"{gain.mean():+.4f}" for gain in found]
        tests.append(paired(found[1], found[0], 4))
        assert shown == tests[-1][0]
    assert [row[-1] for row in rows] == holm([test[1] for test in tests])


def test_other_uses_of_confidence_recomputed_with_scipy(runs):
    pytest.importorskip("scipy")
    rows = rows_of("beyond the paper", "− random pairs, μ = 1")
    for column, (key, decimals, factor) in enumerate([("eval_accuracy", 1, 100), ("accuracy", 1, 100), ("loss", 4, 1)]):
        value = {arm: factor * values(runs, LONG, arm, key) for corpus, arm, _ in runs if corpus == LONG}
        tests = [paired(value[row[0]], value["random pairs, μ = 1"], decimals) for row in rows]
        assert [row[2 * column + 1] for row in rows] == [test[0] for test in tests]
        assert [row[2 * column + 2] for row in rows] == holm([test[1] for test in tests])


def test_areas_under_the_roc_curve_recomputed_with_scipy(runs):
    pytest.importorskip("scipy")
    for corpus, *shown in rows_of("wrong answers found", "corpus"):
        areas = [run["roc_area"] for (name, arm, _), run in runs.items() if (name, arm) == (corpus, "NTP")]
        columns = [np.array([area[by] for area in areas]) for by in ("probability", "perplexity")]
        assert shown == [paired(column, 0 * column, 3)[0].lstrip("+") for column in columns]


def test_the_grid_shows_its_runs(runs):
    for rate, *shown in rows_of("135M grid", "learning rate"):
        validation = runs[f"135M grid, lr {float(rate):g}", "NTP", 0]["validation"]
        assert shown == [f"{validation[key]:.4f}" for key in ("loss", "loss_at_temperature")]


README_ROWS = {  # how a row of its table begins -> section, key in a run, decimals, factor, the ε of label smoothing
    "demo, 30 %": ("demo 30", "accuracy", 1, 100, 0.013),
    "the mean over": ("all shares", "accuracy", 1, 100, 0.013),
    "3M base, Alpaca": ("3M Alpaca", "loss_at_temperature", 3, 1, 0.04),
    "3M base, MedQuAD": ("3M MedQuAD", "loss_at_temperature", 3, 1, 0.04),
    "**SmolLM2-135M-Instruct, Alpaca": (MAIN_CELL, "loss_at_temperature", 4, 1, 0.04),
    "the same base, MedQuAD": ("135M MedQuAD", "loss_at_temperature", 4, 1, 0.04),
    "the same base, GSM8K": ("135M GSM8K mistakes", "loss_at_temperature", 4, 1, 0.04),
}


def test_the_table_of_the_readme_recomputed_with_scipy(runs):
    pytest.importorskip("scipy")
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| corpus | seeds | measure |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == len(README_ROWS)
    for (start, (section, key, decimals, factor, epsilon)), (name, seeds, _, *shown) in zip(
        README_ROWS.items(), rows, strict=True
    ):
        arms = ["SFTMix, by perplexity", "SFTMix", "random pairs", f"label smoothing, ε = {epsilon}"]
        value = {arm: factor * values(runs, section, arm, key) for arm in ["NTP", *arms]}
        assert name.startswith(start) and seeds == str(np.isfinite(value["NTP"]).sum())
        for arm, cell in zip(arms, shown, strict=True):
            has_run = np.isfinite(value[arm] - value["NTP"]).any()
            expected = paired(value[arm], value["NTP"], decimals)[0].replace("-", "−") if has_run else "not run"
            assert cell == expected, (name, arm)


def test_contrasts_by_dtype_recomputed_with_scipy(runs):
    stats = pytest.importorskip("scipy.stats")
    key, expected = "loss_at_temperature", []
    for other in ("NTP", "random pairs"):
        differences = {"fp32": [], "bf16": []}
        for seed in sorted(seeds_of(runs, "SFTMix, by perplexity") & seeds_of(runs, other)):
            one, two = (runs[MAIN_CELL, arm, seed] for arm in ("SFTMix, by perplexity", other))
            assert one["dtype"] == two["dtype"], (seed, other)  # what is compared computes in one dtype
            differences[one["dtype"]].append(one[key] - two[key])
        cells = [f"SFTMix, by perplexity − {other}"]
        for values in map(np.array, differences.values()):
            cells.append(f"{paired(values, 0 * values, 4)[0]} ({len(values)})" if len(values) else None)
        cells.append(f"{np.mean(differences['bf16'] or np.nan) - np.mean(differences['fp32']):+.4f}")
        if len(differences["bf16"]) > 1:
            test = stats.ttest_ind(differences["bf16"], differences["fp32"], equal_var=False)
            cells[-1] += f" ± {np.ptp(test.confidence_interval()) / 2:.4f}"
        expected.append(cells)
    shown = rows_of(MAIN_CELL, "contrast, by dtype")
    assert shown == (expected if all(None not in cells for cells in expected) else [])
