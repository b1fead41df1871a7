"""The command line: flags and checks of paths."""

import argparse
import contextlib
import difflib
import os
from collections.abc import Callable
from pathlib import Path

from infra.distributed import _speaks_for_its_machine
from tokenizer import TEMPLATES


class CommandLine(argparse.ArgumentParser):
    """Flags whose errors are one line on stderr, with the flag that was probably meant, and exit code 2."""

    def __init__(self, **named):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **named)

    @staticmethod
    def positive(text: str) -> int:
        """The type of a flag that counts something."""
        if not (text.isdecimal() and int(text) > 0):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    @staticmethod
    def number(low: float, high: float, kind: type = float) -> Callable:
        """The type of a flag whose value lies from `low` to `high`."""

        def read(text: str):
            with contextlib.suppress(ValueError):
                if low <= kind(text) <= high:
                    return kind(text)
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")

        return read

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = (message.split()[2:] or ["''"])[0].split("=")[0]
            parsers = [self, *(self._subparsers._group_actions[0].choices.values() if self._subparsers else ())]
            flags = {flag for parser in parsers for flag in parser._option_string_actions}
            near = difflib.get_close_matches(word, flags, n=1)
            message = f"unknown flag {word}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")
        self.exit(2, f"{self.prog}: error: {message}\n" if _speaks_for_its_machine() else None)


def refuse_existing(file: str) -> None:
    """Raise FileExistsError where something is at `file` already, and what `check_folder_of` raises."""
    if not file:
        raise FileNotFoundError("--output '': names no file")
    if Path(file).exists():
        raise FileExistsError(f"{file}: already there; remove it or choose another name")
    check_folder_of(file)


def check_folder_of(file: str) -> None:
    """Raise OSError where the folder that `file` is to be in is not there, or not to be written to."""
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{file}: its folder does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{file}: its folder is not to be written to")


def add_model_flags(parser: CommandLine, templates=TEMPLATES) -> None:
    """The flags of whatever opens a model."""
    parser.add_argument("--template", choices=templates, help="(default: the model folder's, else alpaca)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="(default: the one with the faster products here)")


def add_data_flags(parser: CommandLine) -> None:
    """The flags of the tools that read examples; their defaults are those of training."""
    parser.add_argument("--max_length", type=parser.positive)
    parser.add_argument("--micro_batch_tokens", type=parser.positive, default=8192)
    parser.add_argument("--cache", metavar="DIR", help="where encoded data is kept (default: ~/.cache/sftmix)")
