"""Run the parts of a script one by one, each in a process of its own, and print what they found as a table."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """A row of the table."""

    what: str
    result: str
    ok: bool = True


def run_parts(parts: dict[str, Callable[[], Iterator[Row]]], seconds: float, part_seconds: float) -> list[Row]:
    """Run the parts, by name, and print their rows on stderr as they come. -> all rows

    A part that raises an exception, dies, or takes more than `part_seconds` gives a row that says so, and the next one
    runs; all together may take `seconds`. This process must not have initialised CUDA, since the parts are forked.
    """
    rows, end = [], time.monotonic() + seconds
    for name, part in parts.items():
        for row in _run_part(name, part, min(part_seconds, end - time.monotonic())):
            print(f"{row.what}: {row.result}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _run_part(name: str, part: Callable[[], Iterator[Row]], limit: float) -> Iterator[Row]:
    context, end = multiprocessing.get_context("fork"), time.monotonic() + limit
    read, write = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(name, part, write))
    process.start()
    write.close()
    try:
        while read.poll(max(0, end - time.monotonic())):
            if (row := read.recv()) is None:
                return
            yield row
        yield Row(name, f"took more than {limit:.0f} s", ok=False)
    except EOFError:
        process.join()
        yield Row(name, f"its process ended with exit code {process.exitcode}", ok=False)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.join()


def _send_rows(name: str, part: Callable[[], Iterator[Row]], connection) -> None:
    """Send the rows of a part, and None after the last one."""
    os.setsid()  # a process group of its own
    try:
        for row in part():
            connection.send(row)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        connection.send(Row(name, f"{type(error).__name__}: {reason}", ok=False))
    connection.send(None)


def print_table(rows: list[Row]) -> None:
    """Print the rows; those that are not ok begin with FAILED."""
    print("| what | result |\n|---|---|")
    for row in rows:
        print(f"| {row.what} | {'' if row.ok else 'FAILED: '}{row.result.replace('|', '/')} |")
