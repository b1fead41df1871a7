"""What is printed to a terminal: progress lines that replace one another, and colours. Elsewhere, lines are plain."""

import os
import unicodedata

ERASE = "\r\x1b[K"  # go to the start of the line and erase it
STYLES = {"dim": 2, "red": 31, "yellow": 33}  # numbers of the escape sequence that sets them


def is_terminal(stream) -> bool:
    """Whether a stream (None if it is closed) is a terminal that has escape sequences."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def columns(stream) -> int:
    """The width of a terminal, or 80 if it does not know its width."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def style(text: str, name: str, stream) -> str:
    """`text` in a style, if the stream is a terminal and NO_COLOR (https://no-color.org) is not set."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{STYLES[name]}m{text}\x1b[m"


def printable(text: str) -> str:
    """`text` with control characters other than line ends escaped, so that none of them reaches a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def fit(text: str, width: int) -> str:
    """Remove fields, which two spaces separate, from the end of a line until it takes at most `width` columns.

    >>> fit("step 3/9  8 s left  loss 1.25", 25)
    'step 3/9  8 s left'
    """
    while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) > width:
        text = text.rpartition("  ")[0] or text[:-1]
    return text


def render(text: str, stream, progress: float | None = None) -> str:
    """What to write to a stream to print a line of text: `infra.distributed.print0` describes `progress`."""
    if not is_terminal(stream):
        return text + "\n"
    if progress is not None:
        text = fit(text, columns(stream) - 1)  # a wider line would wrap, and ERASE would leave a part of it
        if progress < 1:
            return ERASE + style(text, "dim", stream)
    elif text.startswith("warning:"):
        text = style("warning:", "yellow", stream) + text.removeprefix("warning:")
    return ERASE + text + "\n"  # takes the place of a progress line; the next one is printed below


def below_progress(stream) -> str:
    """What to write to a stream so that the next line starts below a progress line, if there is one."""
    # From the first column, so many spaces stay on the line. From behind a progress line, they reach the next one.
    return " " * (columns(stream) - 1) + "\r" if is_terminal(stream) else ""
