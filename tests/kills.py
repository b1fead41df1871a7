"""Kill a two-stage run again and again, at seeded random moments, and see whether it ends at the same weights.

    python tests/kills.py --kills 20 --processes 2 --seed 0

SIGKILL goes to one process of the run, whichever; torchrun then ends the others. Then the run is resumed. A last line
of JSON says how many kills there were, how many of them while something was being saved, and whether the weights are
those of an uninterrupted run, bit for bit. Exit code 1 where they are not.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file

from infra.hf import save_model
from tokenizer import Tokenizer


def make_inputs(folder: Path) -> list[str]:
    """A tiny model and 60 examples: -> the flags of a run of 120 steps that saves after every second."""
    words = "the quick brown fox jumps over a lazy dog sleeps on".split()
    tokenizer = Tokenizer.train([" ".join(words), "Below is an instruction ### Response:"] * 9, 330)
    model = tiny_model(tokenizer.vocab_size, max_position_embeddings=512)
    save_model(model, folder / "model", tokenizer.files_for("alpaca"))
    records = [{"instruction": f"{w} {v}", "output": f"{v} {w}."} for w in words for v in words if w != v][:60]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    small = "--epochs 6 --batch_size 6 --lr 1e-2 --num_checkpoints 3 --dtype fp32 --save_every 2 --log_every 5".split()
    return ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *small]


def start(flags: list[str], output: Path, processes: int, stderr=subprocess.DEVNULL) -> subprocess.Popen:
    """Begin the run, or go on with it."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "train.py"), "--output", str(output), "--resume", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


def workers(process: subprocess.Popen, processes: int) -> list[int]:
    """The processes of the run: this one, or those that torchrun has started."""
    if processes == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def same_outcome(one: Path, other: Path) -> bool:
    """Whether two runs ended at the same weights and scores."""
    weights = [
        (load_file(folder / name / "model.safetensors") for name in ("reference", "sftmix")) for folder in (one, other)
    ]
    equal = all(torch.equal(a[key], b[key]) for a, b in zip(*weights, strict=True) for key in a)
    return equal and (one / "confidence.jsonl").read_text() == (other / "confidence.jsonl").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("processes", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = make_inputs(folder)
        started = time.perf_counter()
        assert start(flags, folder / "whole", args.processes).wait() == 0
        whole_seconds = time.perf_counter() - started

        kills = saving = rounds = 0
        longest, same = 0.0, True
        while kills < args.kills:  # a run that has ended in spite of it all is compared, and another one begun
            rounds += 1
            output = folder / f"killed-{rounds}"
            while (process := start(flags, output, args.processes)).poll() is None:
                moment = time.perf_counter() + (0.4 + 0.6 * rng.random()) * whole_seconds
                while process.poll() is None and time.perf_counter() < moment:
                    time.sleep(0.005)
                if rng.random() < 0.5:  # every second time wait for a save to be under way
                    while process.poll() is None and not list(output.rglob("*partial")):
                        time.sleep(0.0005)
                alive = workers(process, args.processes)
                if process.poll() is None and alive and kills < args.kills:
                    under_way = bool(list(output.rglob("*partial")))
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(rng.choice(alive), signal.SIGKILL)
                        kills, saving, killed_at = kills + 1, saving + under_way, time.perf_counter()
                        process.wait()
                        longest = max(longest, time.perf_counter() - killed_at)
                if process.wait() == 0:
                    break
            same &= same_outcome(folder / "whole", output)
    report = {"processes": args.processes, "seed": args.seed, "kills": kills, "while_saving": saving, "runs": rounds}
    report |= {"same": same, "slowest_end": round(longest, 1), "seconds": round(time.perf_counter() - began)}
    print(json.dumps(report))
    sys.exit(not same)


if __name__ == "__main__":
    main()
