"""Break each formula and guard, one at a time, and see whether the tests notice.

    python tests/mutation.py                   all of mutations.txt, as many at once as there are cores
    python tests/mutation.py --only mixup.py   those of one file
    python tests/mutation.py --only "λ for"    those whose title has this in it

Each edit is made in a copy of the project, where the tests that cover it are run: if they pass, the edit has survived,
and a test is missing. Survivors are printed, a last line of JSON counts them, and exit code 1 says that there are some.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("mutations.txt")
HANGS = 300  # seconds, after which the tests have noticed too, if they take far less without the edit


class Mutation(NamedTuple):
    """An edit of a file, and what pytest is given to cover it."""

    file: str
    tests: tuple[str, ...]
    title: str
    old: str  # stands in the file exactly once
    new: str


def read_mutations(text: str) -> list[Mutation]:
    """Read the list, whose form its first lines explain.

    >>> read_mutations("== a.py: tests/test_a.py -k sum\\n\\na sign\\n- x + y\\n+ x - y")
    [Mutation(file='a.py', tests=('tests/test_a.py', '-k', 'sum'), title='a sign', old='x + y', new='x - y')]
    """
    mutations, file, tests = [], "", ()
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        if lines and lines[0].startswith("== "):
            file, _, covering = lines.pop(0).removeprefix("== ").partition(": ")
            tests, _, chosen = covering.partition(" -k ")
            tests = (*tests.split(), *(("-k", chosen) if chosen else ()))
        if lines:
            old, new = ("\n".join(line[2:] for line in lines[1:] if line[0] == sign) for sign in "-+")
            mutations.append(Mutation(file, tests, lines[0], old, new))
    return mutations


def misfits(mutations: list[Mutation]) -> list[str]:
    """The titles of those whose old text does not stand in its file exactly once, and of those named twice."""
    contents = {m.file: (ROOT / m.file).read_text(encoding="utf-8") for m in mutations}
    titles = [(m.file, m.title) for m in mutations]
    return [
        f"{m.file}: {m.title}"
        for m in mutations
        if not m.old or m.old == m.new or contents[m.file].count(m.old) != 1 or titles.count((m.file, m.title)) != 1
    ]


def run_tests(project: Path, tests: tuple[str, ...]) -> str:
    """Run tests in a copy of the project, up to the first failure: -> "passed", "failed", "hung" or an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, timeout=HANGS)
    except subprocess.TimeoutExpired:
        return "hung"
    said = done.stdout.decode(errors="replace")  # a test prints names that are not UTF-8
    if done.returncode == 0 and " passed" not in said.splitlines()[-1]:
        return "no test was run"
    return {0: "passed", 1: "failed"}.get(done.returncode, said[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="of the file's name or the title")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at once")
    args = parser.parse_args()
    mutations = read_mutations(LIST.read_text(encoding="utf-8"))
    if names := misfits(mutations):
        sys.exit("the list does not fit the files any more:\n" + "\n".join(names))
    mutations = [m for m in mutations if args.only in f"{m.file}: {m.title}"]
    began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: Queue = Queue()
        for number in range(args.jobs):
            copy = Path(folder) / str(number)
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache"))
            copies.put(copy)

        def outcome(mutation: Mutation) -> str:
            """What the covering tests say to an edit; where it has no old text, to the file as it is."""
            project = copies.get()
            file = project / mutation.file
            whole = file.read_text(encoding="utf-8")
            try:
                file.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
                return run_tests(project, mutation.tests)
            finally:
                file.write_text(whole, encoding="utf-8")
                copies.put(project)

        as_it_is = [Mutation(m.file, m.tests, "nothing", "", "") for m in {m.tests: m for m in mutations}.values()]
        for mutation, said in zip(as_it_is, pool.map(outcome, as_it_is), strict=True):
            if said != "passed":
                sys.exit(f"{' '.join(mutation.tests)}: fails before anything is broken ({said})")
        survivors = []
        for mutation, said in zip(mutations, pool.map(outcome, mutations), strict=True):
            verdict = {"failed": "caught", "hung": "caught, by a test that hangs"}.get(said, "SURVIVED")
            print(f"{verdict}  {mutation.file}: {mutation.title}", flush=True)
            if verdict == "SURVIVED":
                survivors.append(mutation)
                if said != "passed":
                    print(said)
    seconds = round(time.perf_counter() - began)
    print(json.dumps({"mutations": len(mutations), "survivors": len(survivors), "seconds": seconds}))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
