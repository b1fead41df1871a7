"""What may import what, and that README, mutations and study name what exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from mutation import LIST, misfits, read_mutations

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # beyond the standard library; `infra` stands for any file of it, and of itself any part may be named
    "mixup": {"torch"},
    "model": {"torch"},
    "tokenizer": {"sentencepiece", "infra.files", "infra.tokenizer_files"},
    "data": {"torch", "numpy", "tokenizer", "mixup", "infra.formats", "infra.records"},
    "confidence": {"torch", "numpy", "mixup", "model", "tokenizer", "data", "infra"},
    "eval": {"torch", "numpy", "model", "tokenizer", "data", "confidence", "infra"},
    "train": {"torch", "numpy", "model", "tokenizer", "data", "mixup", "confidence", "eval", "infra"},
    "infra": {"safetensors", "torch", "numpy", "matplotlib", "model", "tokenizer", "data", "mixup", "infra"},
    "infra.chat_templates": {"jinja2", "tokenizer", "infra.distributed"},
    "infra.device": {"torch"},
    "infra.distributed": {"torch", "infra.device", "infra.terminal"},
    "infra.files": set(),
    "infra.formats": {"tokenizer"},
    "infra.records": {"pyarrow", "infra.files", "infra.terminal"},
    "infra.terminal": set(),
    "infra.tokenizer_files": {"sentencepiece", "tokenizers"},
}
SEVEN = {"mixup", "model", "tokenizer", "data", "confidence", "eval", "train"}
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("infra/*.py"))]
]


def imported_by(module: str) -> set[str]:
    """The modules that a file names in its imports, wherever they stand in it."""
    names, file = set(), ROOT / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "infra" else {node.module}
            )
    return {name if name.startswith("infra.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_files_import_only_what_they_may(module):
    import sys

    may = MAY_IMPORT.get(module, MAY_IMPORT["infra"])
    beyond = imported_by(module) - set(sys.stdlib_module_names) - may
    assert not {name for name in beyond if "infra" not in may or not name.startswith("infra.")}


def test_no_file_imports_itself_by_a_detour():
    imports = {module: imported_by(module) & set(MODULES) for module in MODULES}
    while leaves := [module for module, needed in imports.items() if not needed & imports.keys()]:
        for module in leaves:
            del imports[module]
    assert not imports


def test_the_list_of_mutations_fits_the_files():
    mutations = read_mutations(LIST.read_text(encoding="utf-8"))
    edited = {m.file.removesuffix(".py").replace("/", ".") for m in mutations}
    assert misfits(mutations) == [] and edited <= set(MODULES) and edited >= SEVEN


def test_documents_name_only_functions_and_tests_that_exist():
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named_tests = set(re.findall(r"`(test_\w+)`", text))
    text = re.sub(r"`\w+\.(py|json|jsonl|model)`", "", text)
    named_functions = set(re.findall(rf"`({'|'.join(map(re.escape, MODULES))})\.([a-z]\w*|[A-Z]\w*)[`.(]", text))
    assert len(named_tests) >= 30 and len(named_functions) >= 20
    for test in named_tests:
        assert f"def {test}(" in tests, test
    for module, function in named_functions:
        assert hasattr(importlib.import_module(module), function), f"{module}.{function}"


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
