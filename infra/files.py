"""Files: JSON, atomic writing, checksums, manifests."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(content: bytes):
    """The JSON value of a text. ValueError says why it is none."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save the file in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None


def parse_json_object(content: bytes, name) -> dict:
    """The object in the content of a JSON file. ValueError names the file and what is wrong with it."""
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: an object with keys is expected, not {type(values).__name__}")
    return values


def read_json(file: Path) -> dict:
    """The object in a JSON file. FileNotFoundError or ValueError name the file and what is wrong with it."""
    return parse_json_object(file.read_bytes(), file)


def is_run_config(values: dict) -> bool:
    """Whether the values of a config.json are those of a run, and not of a model."""
    return "num_checkpoints" in values  # a flag of train.py


def write_json(file: Path, values) -> None:
    """Write an indented JSON file atomically."""
    with atomic_write(file) as tmp:
        tmp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_json_lines(file: Path, values: Iterable) -> None:
    """Write a JSON line for each value, atomically."""
    with atomic_write(file) as tmp, open(tmp, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(value) + "\n" for value in values)


# --- Writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def name_errors(path: Path):
    """Name `path` in an OSError that names no file: a full disk is reported so."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yield a temporary path to write a file or a folder to, which is renamed to `path` once it is on the disk.

    A crash at any moment leaves either the old content of `path` or the new one. An error leaves the old one.
    """
    tmp = path.with_name(path.name + ".partial")
    _remove(tmp)
    try:
        with name_errors(path):
            yield tmp
            for part in [*tmp.rglob("*"), tmp]:
                fsync(part)
            tmp.replace(path)
            fsync(path.parent)
    finally:
        _remove(tmp)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# How file systems refuse to flush a folder, or to open it for that. Some of them write its list of files at once.
FLUSH_REFUSED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR}


def fsync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk itself. For a folder this may be refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (error.errno in FLUSH_REFUSED and path.is_dir()):
            raise


# --- Paths ------------------------------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raise FileNotFoundError if there is nothing at `path`, ValueError if it is a folder, a pipe or a device."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a pipe or a device, which can be read only once; write it to a file first")
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found")


def check_no_pointer(file: Path) -> None:
    """ValueError if a file is only a pointer to what git-lfs has not downloaded."""
    with open(file, "rb") as content:
        if content.read(30).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file}: a pointer of git-lfs, not the file itself; run: git lfs pull")


def set_mode(path: Path, mode: int) -> None:
    """Change permissions where the file system has them: CIFS and buckets mounted as folders may refuse."""
    with contextlib.suppress(OSError):
        path.chmod(mode)


@contextlib.contextmanager
def utf8_folder(folder: Path):
    """Yield `folder`, or a link to it if its name is not UTF-8: safetensors opens only files with such names."""
    name = str(folder)
    if name.encode(errors="replace") == os.fsencode(name):
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        link = Path(links) / "folder"
        link.symlink_to(folder.absolute())
        yield link


# --- Checksums --------------------------------------------------------------------------------------------------------

MANIFEST = "manifest.json"  # sizes and checksums of a folder's files as they were written


def checksums(files: Iterable[Path]) -> dict[str, dict]:
    """Size and SHA-256 of each file, by name."""
    files = list(files)
    with ThreadPoolExecutor(min(8, len(files) or 1)) as threads:
        return {file.name: checksum for file, checksum in zip(files, threads.map(_checksum, files), strict=True)}


def _checksum(file: Path) -> dict:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def file_sha256(file) -> str:
    """The SHA-256 of a file."""
    return _checksum(Path(file))["sha256"]


def model_sha256(folder) -> dict[str, str]:
    """The SHA-256 of each file of a model folder, by name: its weights, configuration and tokenizer."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(file for file in Path(folder).iterdir() if file.suffix in kinds and file.name != MANIFEST)
    return {name: entry["sha256"] for name, entry in checksums(files).items()}


def verify_manifest(folder: Path, required: bool = False) -> None:
    """Compare a folder's files with its manifest. ValueError names the first file that differs.

    A folder without a manifest, or with a file of that name from elsewhere, is accepted unless one is `required`.
    """
    file = folder / MANIFEST
    expected = read_json(file) if file.is_file() else {}
    entries = expected.values()
    if not entries or not all(isinstance(entry, dict) and entry.keys() == {"size", "sha256"} for entry in entries):
        if required:
            raise ValueError(f"{file}: not found, or not one of ours")
        return
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
