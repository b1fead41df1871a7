"""How long records take to be encoded as .jsonl, as .jsonl.gz and as .parquet in four shards, and in how much memory.

    python benchmarks/formats.py --tokenizer FILE --data FILE       Llama 2's tokenizer.model, Alpaca's records

The files hold the same records, 50,000 and 200,000 of them, no two alike. They are encoded by turns, `--rounds` times,
each time in a process of its own with a worker for each core. Memory is the largest resident set of the process that
reads, and of a worker.
"""

import argparse
import gzip
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.cache import encode_files
from tokenizer import Tokenizer

SIZES, SHARDS = (50_000, 200_000), 4


def write_files(folder: Path, records: list[dict]) -> dict[str, Path]:
    """The records in each format. -> folders by format"""
    import pyarrow
    from pyarrow import parquet

    folders = {name: folder / f"{name}-{len(records)}" for name in ("jsonl", "jsonl.gz", "parquet")}
    for path in folders.values():
        path.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folders["jsonl"] / "d.jsonl").write_bytes(lines)
    (folders["jsonl.gz"] / "d.jsonl.gz").write_bytes(gzip.compress(lines, compresslevel=1))
    for n in range(SHARDS):
        shard = records[n * len(records) // SHARDS : (n + 1) * len(records) // SHARDS]
        parquet.write_table(pyarrow.Table.from_pylist(shard), folders["parquet"] / f"train-{n}-of-{SHARDS}.parquet")
    return folders


def encode(tokenizer: str, data: str, output: str) -> None:
    """Encode a folder, and print seconds and megabytes."""
    tokenizer = Tokenizer.from_pretrained(tokenizer)
    began = time.perf_counter()
    encode_files(data, tokenizer, "alpaca", 1024, Path(output))
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([seconds, *peaks]))


def main() -> None:
    if sys.argv[1:2] == ["encode"]:
        return encode(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece model")
    parser.add_argument("--data", required=True, help="Alpaca's records, .jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").split("\n") if line]
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for size in SIZES:
            records = [found[i % len(found)] for i in range(size)]
            records = [record | {"instruction": f"{record['instruction']} ({i})"} for i, record in enumerate(records)]
            files[size] = write_files(Path(folder), records)
        for number in range(args.rounds):
            for size in SIZES:
                for name, data in files[size].items():
                    output = Path(folder) / f"out-{number}-{size}-{name}"
                    command = [sys.executable, __file__, "encode", args.tokenizer, data, output]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    measured.setdefault((size, name), []).append(json.loads(done.stdout))
    print("| records | format | seconds | over .jsonl | MB, reading | MB, a worker |\n|---|---|---|---|---|---|")
    for (size, name), rounds in measured.items():
        seconds, reading, worker = zip(*rounds, strict=True)
        ratios = [s / of_jsonl[0] for s, of_jsonl in zip(seconds, measured[size, "jsonl"], strict=True)]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {size:,} | {name} | {spread} | {ratio} | {max(reading):.0f} | {max(worker):.0f} |")


if __name__ == "__main__":
    main()
