"""Fill the disk under a run, or make it read-only: each time it must say so in one line, and go on when that is mended.

    python tests/disks.py --disks 20

The run writes to a small tmpfs of its own, in a namespace of its own (Linux, `unshare` and `mount` from util-linux; no
root needed). When it has ended there for want of space, the disk is made larger, or writable again, and --resume must
end at the weights of a run that had space enough, bit for bit. A last line of JSON counts; exit code 1: not all did so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import make_inputs, same_outcome, start


def mount(folder: Path, options: str) -> None:
    """Put a small disk at `folder`, or change the one that is there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def run(flags: list[str], output: Path, processes: int) -> tuple[int, list[str]]:
    """-> (exit code, the lines on stderr that are not torchrun's)"""
    process = start(flags, output, processes, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=300)
    lines = error.decode().splitlines()
    if processes > 1:
        lines = [line for line in lines if line.startswith("train.py: ")]
    return process.returncode, lines


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def try_disks(number: int, processes: int, folder: Path) -> dict:
    """Run on disks that are ever less too small, then on one that becomes read-only. -> counts"""
    flags = make_inputs(folder)
    assert start(flags, folder / "whole", processes).wait() == 0
    needed = sum(len(content) for content in contents(folder / "whole").values())
    counts = {"full": 0, "large enough": 0, "read-only": 0, "not as it should be": 0}
    disk, output = folder / "disk", folder / "disk" / "output"
    disk.mkdir()
    flags += ["--cache", str(disk / "cache")]

    def check(right: bool, what: str, said) -> None:
        if not right:
            counts["not as it should be"] += 1
            print(f"{what}: {said}", flush=True)

    for n in range(number):
        size = int(needed * 1.3 * (n + 1) / number)  # savepoints take some more on the way
        mount(disk, f"size={size}")
        code, lines = run(flags, output, processes)
        if code == 0:
            counts["large enough"] += 1
        else:
            counts["full"] += 1
            told = code == 1 and len(lines) == 1 and "No space left" in lines[0]
            check(told, f"a disk of {size} bytes", (code, lines))
            subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
            code, lines = run(flags, output, processes)
            check(code == 0 and same_outcome(folder / "whole", output), f"resumed after {size} bytes", (code, lines))
        subprocess.run(["umount", disk], check=True)

    mount(disk, "size=1G")
    assert start([*flags, "--stage", "reference"], output, processes).wait() == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    before = contents(disk)
    for more in (["--resume"], ["--output", str(disk / "another")]):
        counts["read-only"] += 1
        code, lines = run([*flags, *more], output, processes)
        check(code == 1 and len(lines) == 1 and "Read-only" in lines[0], "a read-only disk", (code, lines))
        check(contents(disk) == before, "a read-only disk", "is another")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    code, lines = run(flags, output, processes)
    check(code == 0 and same_outcome(folder / "whole", output), "resumed when writable", (code, lines))
    subprocess.run(["umount", disk], check=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if "IN_NAMESPACE" not in os.environ:
        command = ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, "IN_NAMESPACE": "1"})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = try_disks(args.disks, args.processes, Path(folder))
    print(json.dumps({"processes": args.processes, **counts, "seconds": round(time.perf_counter() - began)}))
    sys.exit(counts["not as it should be"] > 0)


if __name__ == "__main__":
    main()
