"""Hand mutated inputs to the tools: each must work, or end with one line and exit code 1 or 2, and change nothing.

    python tests/fuzz.py --cases 10000 --first 0

Case number n is a pure function of n: `--first n --cases 1` runs it again. Every kind of input takes its turn. A last
line of JSON counts the outcomes by kind; what is neither "works" nor "told" is printed as it happens, with its number.
Each group of cases runs in a process of its own, so that a crash or a hang is an outcome too.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import tiny_model

import confidence
import eval as eval_tool
import train
from infra.hf import save_model
from tokenizer import Tokenizer

PATIENCE = 30  # seconds for one case
WORDS = "the quick brown fox jumps over a lazy dog".split()
RECORDS = [
    {"instruction": "a fox", "input": "", "output": "the dog"},
    {"instruction": "a fox", "input": "lazy", "output": "jumps"},
    {"prompt": "brown", "completion": "quick fox"},
    {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]},
    {"conversations": [{"from": "human", "value": "over"}, {"from": "gpt", "value": "a lazy dog"}]},
    {"text": "the quick brown fox"},
    {"instruction": "a fox", "context": "lazy", "response": "the dog", "system": "over", "weight": 1},
    {"prompt": [{"role": "user", "content": "fox"}], "completion": [{"role": "assistant", "content": "dog"}]},
    {"query": "brown", "response": "fox", "history": [["over", "dog"]]},
    {"conversations": ["quick", "brown"]},
    {"conversation": [{"input": "a fox", "output": "jumps"}]},
    [{"from": "system", "value": ""}, {"from": "human", "value": 3}, {"from": "bard", "value": "dog", "weight": 0}],
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": "b"}]},
]
QUESTIONS = [
    {"question": "a fox?", "options": {"A": "the dog", "B": "lazy"}, "answer_idx": "B", "meta_info": "x"},
    {"question": "brown?", "choices": ["quick", "the fox", "dog"], "answer": 1, "subject": "y"},
    {"question": "over?", "choices": {"text": ["a", "dog"], "label": ["A", "B"]}, "answerKey": "A"},
]
PROMPTS = [*RECORDS[:5], {"turns": ["a fox?", "and a dog?"]}, {"messages": [{"role": "user", "content": "the fox?"}]}]


def make_inputs(folder: Path) -> None:
    """What the cases are mutations of."""
    tokenizer = Tokenizer.train([" ".join(WORDS), "Below is an instruction ### Response:"] * 9, 320)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny_model(tokenizer.vocab_size, max_position_embeddings=256, num_key_value_heads=1, **shape)
    save_model(model, folder / "one", tokenizer.files_for("alpaca"))
    save_model(model, folder / "many", tokenizer.files_for("alpaca"), max_shard_bytes=4000)
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "d.jsonl").write_text("".join(lines))
    (folder / "d.json").write_text(json.dumps(RECORDS))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:4] * 5), folder / "d.parquet")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    data, output = str(folder / "d.jsonl"), folder / "o"
    quiet(
        lambda: confidence.main(
            ["--checkpoints", str(folder / "one"), "--data", data, "--output", str(folder / "scores.jsonl")]
        )
    )
    real, count = train.forward_backward, []

    def stopped(*arguments, **named):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    train.forward_backward = stopped
    quiet(lambda: train.main(train_flags(folder, folder / "one", data, output)))
    train.forward_backward = real


def train_flags(folder: Path, model, data, output, *more) -> list[str]:
    flags = f"--model {model} --data {data} --output {output} --epochs 2 --batch_size 2 --save_every 1 --dtype fp32"
    return [*flags.split(), "--lr", "1e-3", "--num_checkpoints", "1", *map(str, more)]


# --- Mutations --------------------------------------------------------------------------------------------------------

HUGE = [10**400, -1, 0, 2**31, 2**63, 10**15, 1e308, -0.5]
VALUES = [None, True, "", "x", "\x00", "\ud800", [], {}, [[]], {"a": 1}, "../../etc/passwd", *HUGE]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat, reorder, or put something strange in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        if rng.random() < 0.3:
            at = min(at, 200)  # headers
        kind = rng.randrange(8)
        if kind == 0:
            del content[at:]
        elif kind == 1 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at:at] = content[at:end][:1000]
        elif kind == 3:
            content = content[end:] + content[at:end] + content[:at]
        elif kind == 4:
            del content[at : at + rng.randrange(1, 9)]
        elif kind == 5:
            strange = [b"\xff", b"\x00", b"\r\n", b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 3000, b"\xed\xa0\x80"]
            content[at:at] = rng.choice(
                [*strange, b"9" * 400, b"NaN", b"-", b'"', b"\xe2\x80\xa8", b"\x1b[2J", b"1e999"]
            )
        elif kind == 6:
            content = content.replace(b"\n", b"\r\n")
        else:
            content[at : at + 8] = rng.randbytes(8)
    return bytes(content)


def mutate_json(value, rng: random.Random):
    """The same value with something in it replaced, dropped, repeated, renamed or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.randrange(6)
        if action == 0:
            del changed[key]
        elif action == 1:
            changed[key + "x"] = changed.pop(key)
        elif action == 2:
            changed[key] = rng.choice(VALUES)
        else:
            changed[key] = mutate_json(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, changed = rng.randrange(len(value)), list(value)
        action = rng.randrange(5)
        if action == 0:
            del changed[at]
        elif action == 1:
            changed.insert(at, changed[at])
        elif action == 2:
            rng.shuffle(changed)
        else:
            changed[at] = mutate_json(value[at], rng)
        return changed
    if isinstance(value, str) and rng.random() < 0.5:
        return mutate_bytes(value.encode(), rng).decode("utf-8", "replace")
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice([*HUGE, -value, value * 2, value + 1, str(value), [value]])
    return rng.choice(VALUES)


def mutate(file: Path, rng: random.Random) -> None:
    """Mutate a file as bytes, or where it is JSON half the time as what that means."""
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        lines = content.splitlines(keepends=True) if file.suffix == ".jsonl" else [content]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(mutate_json(json.loads(lines[at]), rng)).encode() + b"\n"
        file.write_bytes(b"".join(lines))
    else:
        file.write_bytes(mutate_bytes(content, rng))


# --- Kinds of input: each mutates something in the folder and returns what to run -------------------------------------


def perplexity(folder: Path, model: str, data: str = "d.jsonl"):
    return lambda: eval_tool.main(["perplexity", "--model", str(folder / model), "--data", str(folder / data)])


def data_lines(folder, rng):
    mutate(folder / "d.jsonl", rng)
    return perplexity(folder, "one")


def data_folder(folder, rng):
    """Several files of several kinds, bad records skipped."""
    (folder / "data").mkdir()
    files = [shutil.copy(file, folder / "data") for file in sorted(folder.glob("d.*"))]
    for file in rng.sample(files, 2):
        mutate(Path(file), rng)
    flags = ["--model", str(folder / "one"), "--data", str(folder / "data"), "--skip_bad_records"]
    return lambda: eval_tool.main(["perplexity", *flags])


def data_list(folder, rng):
    mutate(folder / "d.json", rng)
    return perplexity(folder, "one", "d.json")


def model_config(folder, rng):
    mutate(folder / "one" / "config.json", rng)
    return perplexity(folder, "one")


def weights(folder, rng):
    if rng.random() < 0.7:
        (folder / "one" / "manifest.json").unlink()
    mutate(folder / "one" / "model.safetensors", rng)
    return perplexity(folder, "one")


def shards(folder, rng):
    if rng.random() < 0.7:
        (folder / "many" / "manifest.json").unlink()
    files = sorted((folder / "many").glob("model*"))
    mutate(rng.choice([folder / "many" / "model.safetensors.index.json", *files]), rng)
    return perplexity(folder, "many")


def sentencepiece_model(folder, rng):
    mutate(folder / "one" / "tokenizer.model", rng)
    return perplexity(folder, "one")


def tokenizer_files(folder, rng):
    mutate(folder / "one" / rng.choice(("tokenizer_config.json", "generation_config.json")), rng)
    return lambda: train.main(train_flags(folder, folder / "one", folder / "d.jsonl", folder / "p", "--dry_run"))


def scores(folder, rng):
    mutate(folder / "scores.jsonl", rng)
    more = ("--dry_run", "--stage", "sftmix", "--confidence", folder / "scores.jsonl")
    return lambda: train.main(train_flags(folder, folder / "one", folder / "d.jsonl", folder / "p", *more))


def savepoint(folder, rng):
    files = sorted(file for file in (folder / "o").rglob("*") if file.is_file())
    mutate(rng.choice(files), rng)
    more = ("--resume", "--stage", "reference")
    return lambda: train.main(train_flags(folder, folder / "one", folder / "d.jsonl", folder / "o", *more))


def command_line(folder, rng):
    flags = train_flags(folder, folder / "one", folder / "d.jsonl", folder / "p", "--mu", 0.1, "--alpha", 1)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(flags))
        strange = [
            str(rng.choice(HUGE)),
            "nan",
            "inf",
            "",
            "-",
            "--",
            "é",
            "x" * 9999,
            "１",
            "1_0",
            "0x1",
            " ",
            "online",
        ]
        flags[at] = rng.choice([*strange, mutate_bytes(flags[at].encode(), rng).decode("utf-8", "replace")[:99]])
    return lambda: train.parse_config([flag.replace("\x00", "") for flag in flags])


def questions(folder, rng):
    mutate(folder / "questions.jsonl", rng)
    flags = ["--model", str(folder / "one"), "--data", str(folder / "questions.jsonl")]
    return lambda: eval_tool.main(["choice", *flags])


def prompts(folder, rng):
    mutate(folder / "prompts.jsonl", rng)
    flags = ["--model", str(folder / "one"), "--data", str(folder / "prompts.jsonl"), "--max_new_tokens", "3"]
    return lambda: eval_tool.main(["generate", *flags])


KINDS = [
    data_lines, data_list, data_folder, model_config, weights, shards, sentencepiece_model, tokenizer_files, scores,
    savepoint, command_line, questions, prompts,
]  # fmt: skip


# --- Running ----------------------------------------------------------------------------------------------------------


def quiet(run):
    """Run, and -> (exit code or None, what it wrote on stderr)."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            run()
        except SystemExit as exit:
            return exit.code, error.getvalue()
    return None, error.getvalue()


def contents(folder: Path) -> dict:
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.rglob("*") if file.is_file()}


def run_case(number: int, inputs: Path) -> tuple[str, str, str]:
    """-> (kind, outcome, what there is to say of it)"""
    rng, kind = random.Random(number), KINDS[number % len(KINDS)]
    folder = Path(tempfile.mkdtemp(dir=inputs.parent))
    try:
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        run = kind(folder, rng)
        before = contents(folder)
        try:
            code, error = quiet(run)
        except BaseException:
            return kind.__name__, "traceback", traceback.format_exc()[-1500:]
        after = contents(folder)
        changed = [file for file in before if after.get(file) != before[file] and file.parts[-2] != "o"]
        if kind is not savepoint and changed:
            return kind.__name__, "damage", str(changed)
        if code in (None, 0):
            return kind.__name__, "works", ""
        errors = [line for line in error.splitlines() if "error: " in line]
        others = [line for line in error.splitlines() if "error: " not in line and "warning: " not in line]
        others = [line for line in others if str(folder) not in line]  # what a file holds
        if code in (1, 2) and len(errors) == 1 and not others and len(errors[0]) < 12000:
            return kind.__name__, "told", ""
        return kind.__name__, "unclear", f"exit code {code}: {error[-1500:]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_group(numbers: list[int], inputs: Path) -> list[tuple]:
    """Run cases in a process of their own: -> [(number, kind, outcome, words)], up to one that does not return."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
        with open(write, "w") as pipe:
            for number in numbers:
                pipe.write(json.dumps([number, *run_case(number, inputs)]) + "\n")
                pipe.flush()
        os._exit(0)
    os.close(write)
    results, buffer = [], b""
    while len(results) < len(numbers):
        ready = select.select([read], [], [], PATIENCE)[0]
        chunk = os.read(read, 2**20) if ready else b""
        if not chunk:
            os.kill(pid, signal.SIGKILL)
            number = numbers[len(results)]
            outcome = "crash" if ready else "hang"
            results.append((number, KINDS[number % len(KINDS)].__name__, outcome, ""))
            break
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        results += [tuple(json.loads(line)) for line in lines]
    os.waitpid(pid, 0)
    os.close(read)
    return results


def fuzz(first: int, cases: int) -> dict[str, Counter]:
    """Run the cases: -> how many of each kind had which outcome."""
    torch.set_num_threads(1)
    counts: dict[str, Counter] = {kind.__name__: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        number, end = first, first + cases
        while number < end:
            for done, kind, outcome, words in run_group(list(range(number, min(number + 50, end))), inputs):
                counts[kind][outcome] += 1
                if outcome not in ("works", "told"):
                    print(f"case {done}, {kind}: {outcome}\n{words}", flush=True)
                number = done + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    counts = fuzz(args.first, args.cases)
    print(json.dumps({kind: dict(outcomes) for kind, outcomes in counts.items()}))
    sys.exit(any(set(outcomes) - {"works", "told"} for outcomes in counts.values()))


if __name__ == "__main__":
    main()
