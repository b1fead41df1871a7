"""Locks: one run at a time works in an output folder, or appends to a file."""

import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from infra.distributed import exit_on_signals, print0
from infra.files import read_json


@contextlib.contextmanager
def file_lock(path: Path, message: str):
    """Hold the system's lock on a file, which is created where it is missing. FileExistsError(message) if it is taken.

    The lock ends with the process, however that ends. On a file system without locks, `owner_file` replaces it.
    """
    with open(path, "a") as file, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # the last holder has just removed it
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise FileExistsError(message) from None
        except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP, …: Lustre without flock, some NFS
            owner = path.with_name(f"{path.name}.owner")
            stack.enter_context(owner_file(owner, message))
            print0(f"the file system refuses locks ({error.strerror}); {owner} replaces them", sys.stderr)
        yield


@contextlib.contextmanager
def owner_file(path: Path, message: str):
    """Hold a lock by creating a file that names this process; FileExistsError(message), with the holder, if it exists.

    A file is replaced if it names a process of this host that no longer exists. The file is removed when the `with`
    block ends, also by SIGTERM or SIGHUP.
    """
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"host": os.uname().nodename, "pid": pid, "since": since, "started": _process_start(pid)}
    with exit_on_signals():
        while not _create(path, owner):
            holder = _read_owner(path)
            if not _has_ended(holder):
                raise FileExistsError(f"{message} ({_describe(holder, path)})")
            _remove_if_of(path, holder)
            note = f"{path}: is of process {holder['pid']}, since {holder['since']}, which has ended; it is replaced"
            print0(note, sys.stderr)
        try:
            yield
        finally:
            _remove_if_of(path, owner)


def _create(path: Path, owner: dict) -> bool:
    """Create an owner file, unless it exists. -> whether it was created"""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(owner))
        return True
    except FileExistsError:
        return False
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        raise


def _read_owner(path: Path) -> dict:
    """What an owner file says; {} if that is not complete."""
    with contextlib.suppress(OSError, ValueError):
        owner = read_json(path)
        if isinstance(owner.get("pid"), int) and {"host", "since", "started"} <= owner.keys():
            return owner
    return {}


def _remove_if_of(path: Path, owner: dict) -> None:
    """Remove an owner file, but not one that another run has created in its place meanwhile."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read_owner(aside) == owner:
            aside.unlink()
        else:
            aside.rename(path)


def _has_ended(owner: dict) -> bool:
    """Whether an owner file is of a process of this host that no longer exists."""
    if owner.get("host") != os.uname().nodename:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process exists, but is another user's
        pass
    return _process_start(owner["pid"]) != owner["started"]  # another process may have the same number by now


def _process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended, or where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state == b"Z" else int(fields[18])


def _describe(owner: dict, path: Path) -> str:
    """Who holds an owner file, and what to do if that process cannot be looked up from here."""
    if not owner:
        return f"if no run is, remove {path}"
    holder = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    return holder if owner["host"] == os.uname().nodename else f"{holder}; if it has ended, remove {path}"
