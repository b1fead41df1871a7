"""The files' promises to each other: who imports whom, what runs, and that the README names what exists."""

import ast
import re
from pathlib import Path

import pytest
from mutation import LIST, misfits, read_mutations

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # beyond the standard library
    "mixup": {"torch"},
    "model": {"torch", "safetensors"},
    "tokenizer": {"sentencepiece", "tokenizers"},
    "data": {"torch", "numpy", "tokenizer"},
    "confidence": {"safetensors", "torch", "numpy", "matplotlib", "model", "tokenizer", "data"},
    "eval": {"torch", "numpy", "model", "tokenizer", "data", "confidence"},
    "train": {"torch", "numpy", "model", "tokenizer", "data", "mixup", "confidence", "eval"},
}


def imported_by(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_files_import_only_what_they_may(name):
    import sys

    assert imported_by(ROOT / f"{name}.py") - set(sys.stdlib_module_names) <= MAY_IMPORT[name]


def test_the_list_of_mutations_fits_the_files():
    mutations = read_mutations(LIST.read_text(encoding="utf-8"))
    assert misfits(mutations) == [] and {m.file.removesuffix(".py") for m in mutations} == set(MAY_IMPORT)


def test_the_readme_names_only_functions_and_tests_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named_tests = set(re.findall(r"`(test_\w+)`", readme))
    readme = re.sub(r"`\w+\.(py|json|jsonl)`", "", readme)
    named_functions = set(re.findall(rf"`({'|'.join(MAY_IMPORT)})\.([a-z]\w*|[A-Z]\w*)[`.(]", readme))
    assert len(named_tests) >= 9 and len(named_functions) >= 9
    for test in named_tests:
        assert f"def {test}(" in tests, test
    for module, function in named_functions:
        assert hasattr(__import__(module), function), f"{module}.{function}"


def test_the_readme_holds_the_commands_that_are_run_for_it():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in re.findall(r"command_in_readme '([^']+)'", script):
        assert lines.count(f"pip install -r requirements.txt && {command}") == 1


def test_the_arms_of_the_study_set_flags_and_replace_parts_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study

    import train

    for arm in study.ARMS.values():
        train.parse_config(["--model", "m", "--data", "d", "--output", "o", *arm.flags.split()])
        assert all(callable(getattr(train, part)) for part in arm.parts)
