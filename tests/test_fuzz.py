"""A sample of `python tests/fuzz.py`, whose cases go on from here."""

import json

from conftest import ROOT, run_script
from fuzz import KINDS


def test_mutated_inputs_work_or_end_with_one_line():
    done = run_script(ROOT / "tests" / "fuzz.py", "--cases", 10 * len(KINDS))
    assert done.returncode == 0, done.stdout
    counts = json.loads(done.stdout.splitlines()[-1])
    assert list(counts) == [kind.__name__ for kind in KINDS] and all(sum(c.values()) == 10 for c in counts.values())
    assert {outcome for c in counts.values() for outcome in c} == {"works", "told"}
