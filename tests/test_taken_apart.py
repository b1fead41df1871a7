"""What can be copied into another project and works there: mixup.py with its tests, and parts of confidence.py."""

import ast
import os
import shutil
import subprocess
import sys

from conftest import ROOT

NEEDS_NO_MODEL = ("TrainingDynamics", "split_by_confidence", "roc_auc")  # of confidence.py
THEIR_IMPORTS = """
import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from files import check_file, write_json_lines
"""
THEIR_TEST = """
import numpy as np
from scores import TrainingDynamics, split_by_confidence


def test_scores_survive_the_file_and_are_split(tmp_path):
    scores = TrainingDynamics(["a", "b", "c"], np.array([[0.1, 0.9, 0.5]]), np.array([[9.0, 1.1, 2.0]]))
    scores.save(tmp_path / "scores.jsonl")
    again = TrainingDynamics.load(tmp_path / "scores.jsonl").select(["b", "a", "c"])
    assert [half.tolist() for half in split_by_confidence(again.confidence)] == [[0], [2, 1]]
"""


def definitions(source: str, names) -> str:
    """These classes and functions of a file, as they stand there."""
    lines, parts = source.splitlines(keepends=True), []
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            parts.append("".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(parts)


def test_mixup_with_its_tests_and_the_scores_without_a_model_work_in_an_empty_folder(tmp_path):
    for file in ("mixup.py", "tests/test_mixup.py", "infra/files.py"):
        shutil.copy(ROOT / file, tmp_path)
    scores = definitions((ROOT / "confidence.py").read_text(encoding="utf-8"), NEEDS_NO_MODEL)
    (tmp_path / "scores.py").write_text(THEIR_IMPORTS + scores, encoding="utf-8")
    (tmp_path / "test_scores.py").write_text(THEIR_TEST, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--doctest-modules", "--verbose", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", "."], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = done.stdout.count(" PASSED")
    for test in ("test_mixup.py::test_loss_by_hand", "test_scores.py", *(f"scores.{name}" for name in NEEDS_NO_MODEL)):
        assert test in done.stdout
    assert f" {passed} passed in " in done.stdout.splitlines()[-1] and passed > 40
