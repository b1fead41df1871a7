"""Run every command of the README, the guide and docs/paper.md as it stands there, on a small model and little data.

    python tests/readme.py --demo runs/demo        after torchrun train.py, whose base and data stand in for real ones

The files that these documents take for granted are made of these; eight processes become two or one, and two nodes
become two on this machine. The README and the guide, which build on each other, run beside docs/paper.md. The caller
runs the commands that install, the tests and the demo. The study is left out, because it takes hours. A command that
fails ends the script.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {("README.md", "docs/guide.md"): 2, ("docs/paper.md",): 1}  # how many processes stand for eight
MODELS = ("stories3M-hf", "Llama-3.1-8B", "Mistral-7B-v0.1", "Qwen2.5-14B", "gemma-2b")
DATA = ("data.jsonl", "alpaca_train.jsonl", "alpaca_test.jsonl", "ultrachat.jsonl", "tulu3.jsonl")
LISTS = ("alpaca.json", "medalpaca.json")
LEFT_OUT = ("pip install", "python benchmarks/study.py")  # how lines begin that are not run here


def commands(text: str) -> list[str]:
    """The command lines of a document's code blocks, in order: after a $, or all lines of a block without any.

    >>> commands("```\\npython a \\\\\\n  b\\n```\\n```\\n$ c\\nwhat it prints\\n```")
    ['python a   b', 'c']
    """
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", "").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        programs = ("python ", "torchrun ", "pip ", "head ")
        found += prompted or [line for line in lines if line.startswith(programs)]
    return found


def made_small(command: str, number: int, processes: int) -> str:
    """The command with folders, files and numbers of processes that are at hand."""
    command = command.replace(" …", " --model DIR --data FILE --output DIR").replace("DIR…", "DIR")
    command = command.replace("--nproc_per_node 8", f"--nproc_per_node {processes}")
    command = re.sub(r"(--output(?:_dir)?) DIR\b", rf"\1 runs/readme-{number}", command)
    return re.sub(r"\bFILE\b", DATA[0], re.sub(r"\bDIR\b", MODELS[0], command))


def prepare(folder: Path, demo: Path) -> None:
    """The project, and under the documents' names the demo's model and some of its data."""
    for name in MODELS:
        shutil.copytree(demo / "base", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    lines = (demo / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name in DATA:
        (folder / name).write_text("".join(lines[:48]), encoding="utf-8")
    for name in LISTS:
        (folder / name).write_text(json.dumps([json.loads(line) for line in lines[:48]]), encoding="utf-8")
    question = {"question": "Is snow white?", "options": {"A": "yes", "B": "no"}, "answer_idx": "A"}
    (folder / "medqa_test.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    asked = [{"dataset": "helpful_base", "instruction": "Name the capital of Peru."}]
    (folder / "alpaca_eval.json").write_text(json.dumps(asked))
    asked = {"question_id": 81, "category": "writing", "turns": ["Name the capital of Peru.", "And of Japan?"]}
    (folder / "question.jsonl").write_text(json.dumps(asked) + "\n")
    (folder / "runs").mkdir()
    for name in ("demo", "gemma"):
        (folder / "runs" / name).symlink_to(demo)
    for path in ROOT.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


def run(command: str, folder: Path) -> None:
    """Run it, on two nodes where it says so. SystemExit with what it said where it fails."""
    copies = 2 if "--nnodes 2" in command else 1
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = command.replace("HOST:29500", f"localhost:{port}")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PET_MASTER_PORT"] = str(port)  # torchrun's --master_port
    settings = {"cwd": folder, "env": environment, "text": True, "shell": True}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    begun = [subprocess.Popen(command, **settings, **pipes) for _ in range(copies)]
    said = [process.communicate("What is the capital of Peru?\n", timeout=600)[0] for process in begun]
    if any(process.returncode for process in begun):
        raise SystemExit(f"{command}\n{''.join(said)[-3000:]}")


def run_documents(names: tuple[str, ...], processes: int, demo: Path) -> None:
    """Run the commands of these documents one after another, each once, and print how long each takes."""
    lines = [line for name in names for line in commands((ROOT / name).read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), demo)
        for number, line in enumerate(dict.fromkeys(line for line in lines if not line.startswith(LEFT_OUT))):
            began = time.perf_counter()
            run(made_small(line, number, processes), Path(folder))
            print(f"{time.perf_counter() - began:5.0f} s  {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="output folder of the demo")
    args = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(run_documents, DOCUMENTS, DOCUMENTS.values(), itertools.repeat(args.demo.resolve())):
            pass  # raises what a command raised


if __name__ == "__main__":
    main()
