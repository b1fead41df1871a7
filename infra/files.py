"""Files that are whole or not there: JSON, atomic writing, checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def read_json(file: Path) -> dict:
    """The object in a JSON file; FileNotFoundError or ValueError name the file and what is wrong with it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: an object with keys is expected, not {type(values).__name__}")
    return values


def write_json(file: Path, values) -> None:
    """Write a JSON file for people to read too; what was there before is replaced at once and as a whole."""
    with written_aside(file) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_aside(path: Path):
    """Yield where to write a file or a folder, which becomes `path` once all of it is on the disk.

    A crash at any moment leaves whole what is at `path`: the old, or the new. An error leaves nothing of the new.
    """
    aside = path.with_name(path.name + ".partial")
    _remove(aside)
    try:
        yield aside
        for part in [*aside.rglob("*"), aside]:
            flush(part)
        aside.replace(path)
        flush(path.parent)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # which a full disk does not tell
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or the list of what is in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MANIFEST = "manifest.json"  # the sizes and checksums of a folder's files, as they were written


def checksums(files: Iterable[Path]) -> dict[str, dict]:
    """The size and the SHA-256 of files, by name."""
    files = list(files)
    with ThreadPoolExecutor(min(8, len(files) or 1)) as threads:
        return {file.name: checksum for file, checksum in zip(files, threads.map(_checksum, files), strict=True)}


def _checksum(file: Path) -> dict:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def content_of(path) -> list[str]:
    """The SHA-256 of a file, or of each of a model folder's weight files: the same for the same content."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [checksum["sha256"] for checksum in checksums(files).values()]


def check_manifest(folder: Path) -> None:
    """Raise ValueError, naming the file, where one is no longer what the folder's manifest, if it has one, says."""
    if not (folder / MANIFEST).is_file():
        return
    expected = read_json(folder / MANIFEST)
    for name in expected:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found, but {MANIFEST} says that it is there")
    found = checksums(folder / name for name in expected)
    for name in expected:
        if found[name] != expected[name]:
            raise ValueError(
                f"{folder / name}: damaged, it is not what was written; bring back a copy of it (or, if you have "
                f"changed it, remove {MANIFEST})"
            )
