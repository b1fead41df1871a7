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
}

MAIN_CELL, PLANNED_SEEDS = "135M Alpaca", 10


@pytest.fixture(scope="module")
def runs():
    """The runs by corpus, arm and seed."""
    found = {}
    for line in (ROOT / "docs" / "study.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found[run["corpus"], run["arm"], run["seed"]] = run
        if "early_stopping" in run:
            found[run["corpus"], "NTP, early stopping", run["seed"]] = run["early_stopping"]
    return found


def tables(kinds=("arm", "one − other", "contrast")):
    """(section, header, rows) of the tables between the marks of the documents, those whose first heading is given."""
    document = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("study.md", "study_tables.md"))
    for section, body in re.findall(r"<!-- ([^>]*) -->\n(.*?)<!-- end of \1 -->", document, flags=re.DOTALL):
        for table in body.split("\n\n"):
            rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()]
            if rows and rows[0][0] in kinds:
                yield section, rows[0], rows[2:]


def values(runs, section, arm, key):
    """[seeds]: the arm's values on a section's corpus, or their means over all shares of wrong answers."""
    corpora = [f"demo {share}" for share in (0, 10, 20, 30, 40)] if section == "all shares" else [section]
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
    compared = 0
    arms = ("NTP", "random pairs", "SFTMix, by perplexity")
    is_complete = len(set.intersection(*(seeds_of(runs, arm) for arm in arms))) == PLANNED_SEEDS
    for section, header, rows in tables():
        for column, heading in enumerate(header):
            if heading not in COLUMNS:
                continue
            key, decimals, factor = COLUMNS[heading]
            value = {arm: factor * values(runs, section, arm, key) for _, arm, _ in runs}
            tests = []  # what the table shows of a test, and the test
            for row in rows:
                one, other = (row[0], "NTP") if header[0] == "arm" else row[0].split(" − ")
                shown = row[column:][: 4 if header[0] == "contrast" else 3]  # difference, p-value, MDE, 97.5 % interval
                if header[0] == "arm":
                    has_means = one == "NTP" or "− NTP" in header  # otherwise the column has differences from NTP
                    mean_or_difference = f"{np.nanmean(value[one]):.{decimals}f}"
                    if not has_means:
                        mean_or_difference = paired(value[one], value[other], decimals)[0]
                    assert row[column] == mean_or_difference, (section, heading, row)
                    compared += 1
                    shown = row[column + 1 :][:2] if "− NTP" in header[column + 1 :][:1] else [""]
                if "±" in shown[0]:
                    level = 0.025 if header[0] == "contrast" else 0.05
                    tests.append((shown, paired(value[one], value[other], decimals, level)))
            for (shown, test), p in zip(tests, holm([test[1] for _, test in tests]), strict=True):
                if header[0] == "contrast" and not is_complete:
                    p = "–"  # the test is made at the end
                assert shown == [test[0], p, *test[2:]][: len(shown)], (section, heading, shown)
                compared += 1
    assert compared > 100


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
    shown = [row for _, _, rows in tables(["contrast, by dtype"]) for row in rows]
    assert shown == (expected if all(None not in cells for cells in expected) else [])
