"""The command line: an argument parser with one-line errors, dataclass fields as flags, checks of output paths."""

import argparse
import contextlib
import difflib
import math
import operator
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path

from data import MICRO_BATCH_TOKENS
from infra.device import DEVICE_TYPES, local_rank
from tokenizer import TEMPLATES

# --- The parser -------------------------------------------------------------------------------------------------------


FLAGS_OF_PEERS = {  # of transformers, TRL and LLaMA-Factory, and what they are called here
    "--model_name_or_path": "--model",
    "--dataset": "--data",
    "--dataset_name": "--data",
    "--train_data": "--data",
    "--train_dataset": "--data",
    "--train_file": "--data",
    "--validation_file": "--eval_data",
    "--output_dir": "--output",
    "--learning_rate": "--lr",
    "--num_train_epochs": "--epochs",
    "--per_device_train_batch_size": "--batch_size (over all processes)",
    "--max_seq_length": "--max_length",
    "--cutoff_len": "--max_length",
    "--bf16": "--dtype bf16",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--gradient_accumulation_steps": "--micro_batch_tokens (accumulation follows from it)",
    "--packing": "--micro_batch_tokens (rows are always packed)",
    "--use_lora": "--lora_rank",
    "--lora_r": "--lora_rank",
    "--warmup_steps": "--warmup_ratio",
    "--resume_from_checkpoint": "--resume",
    "--logging_steps": "--log_every",
    "--save_steps": "--save_every",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns, or of the width of a narrower terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The description: its lines stay as they are if they fit."""
        return "\n".join(textwrap.fill(line, width, subsequent_indent=indent) for line in text.splitlines()) + "\n"


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line on stderr; for an unknown flag the line suggests a known one."""

    def __init__(self, usage: str | None = None, **kwargs):
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.words: list[str] = []

    def parse_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else args
        return super().parse_args(args, namespace)

    def group(self, title: str):
        """The group of flags with this title, to which flags can be added."""
        groups = (group for group in self._action_groups if group.title == title)
        return next(groups, None) or self.add_argument_group(title)

    def format_help(self) -> str:
        """The help; without a `usage`, its first line names what is required."""
        if self.usage is None:
            required = [word for a in self._actions if a.required for word in (*a.option_strings, a.metavar)]
            self.usage = " ".join(["%(prog)s", *required, "[flags]"])
        return super().format_help()

    @staticmethod
    def positive(text: str) -> int:
        """An argument type: a positive integer."""
        if not (text.isdecimal() and int(text) > 0):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    @staticmethod
    def number(low: float, high: float, kind: type = float) -> Callable:
        """An argument type: a number from `low` to `high`."""

        def parse(text: str):
            with contextlib.suppress(ValueError):
                if low <= kind(text) <= high:
                    return kind(text)
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")

        return parse

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = (message.split()[2:] or ["''"])[0].split("=")[0]
            commands = self._subparsers._group_actions[0].choices if self._subparsers else {}
            parsers = [self, *(parser for name, parser in commands.items() if name in self.words)]
            flags = {flag for parser in parsers for flag in parser._option_string_actions}
            near = [FLAGS_OF_PEERS[word]] if word in FLAGS_OF_PEERS else []
            near += difflib.get_close_matches(word, flags, n=1, cutoff=0.75)
            message = f"unknown flag {word}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")
        self.exit(2, f"{self.prog}: error: {message}\n" if local_rank() == 0 else None)


class Once(argparse.Action):
    """Store the values of a flag that takes several; giving it twice is an error, and not the last of them alone."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string}: given twice; all that it takes goes behind one {option_string}")
        setattr(namespace, self.dest, values)


SEVERAL = {"nargs": "+", "action": Once}  # how flags that take several values are added


TEMPLATE_DEFAULT = "(default: what the folder's resembles; alpaca if it has none)"
MAX_LENGTH_HELP = "truncate longer examples (default: the model's, at most 1024)"


def add_model_flags(parser: ArgumentParser, templates=TEMPLATES) -> None:
    """Add the flags of each script that opens a model."""
    help = f"chat template: {', '.join(templates)} {TEMPLATE_DEFAULT}"
    parser.group("data").add_argument("--template", choices=templates, metavar="NAME", help=help)
    hardware = parser.group("hardware")
    hardware.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype of matmuls (default: the faster one here)")
    hardware.add_argument("--device", choices=DEVICE_TYPES, help="what to run on (default: the best there is)")


DATA_HELP = "files (.jsonl, .json, also as .gz; .parquet), folders or patterns of them"


def add_data_flag(parser: ArgumentParser, what: str, required: bool) -> None:
    """Add --data, for a script that reads `what` from data files."""
    help = f"{what}: {DATA_HELP}"
    parser.group("data").add_argument("--data", **SEVERAL, required=required, metavar="FILE", help=help)


def add_encoding_flags(parser: ArgumentParser) -> None:
    """Add the flags that say how examples are read, encoded and packed, with the defaults of training."""
    data = parser.group("data")
    data.add_argument("--skip_bad_records", action="store_true", help="leave out records that cannot be read")
    data.add_argument("--max_length", type=parser.positive, metavar="N", help=MAX_LENGTH_HELP)
    data.add_argument("--cache", metavar="DIR", help="where encoded data is kept (default: ~/.cache/sftmix)")
    add_micro_batch_flag(parser)


def add_micro_batch_flag(parser: ArgumentParser) -> None:
    """Add --micro_batch_tokens, for a script that packs examples."""
    help = f"most tokens in a forward pass; fewer take less memory (default {MICRO_BATCH_TOKENS})"
    settings = {"type": parser.positive, "default": MICRO_BATCH_TOKENS, "metavar": "N"}
    parser.group("hardware").add_argument("--micro_batch_tokens", **settings, help=help)


# --- A configuration whose fields are flags ---------------------------------------------------------------------------


def flag(default, help: str, choices=None, group=None, const=None, **bounds):
    """A field of a configuration dataclass that is a command-line flag too.

    `choices`, or the bounds `above`, `at_least` and `below`, say which values are allowed. `group` is the title of a
    group of flags in the help, which this field and those after it are in. `const` is the value of a flag given without
    one.
    """
    metadata = {"help": help, "choices": choices, "group": group, "const": const, "bounds": bounds}
    return field(default=default, metadata=metadata)


def add_flags(parser: ArgumentParser, config_class: type) -> None:
    """Add a flag for each field of a configuration class. A flag that is not given parses to None."""
    group = parser
    for field_ in fields(config_class):
        if field_.metadata["group"]:
            group = parser.group(field_.metadata["group"])
        name, text, choices = f"--{field_.name}", field_.metadata["help"], field_.metadata["choices"]
        if field_.type in (bool, bool | None):
            group.add_argument(name, action="store_const", const=True, help=text)
            if field_.type == bool | None:  # its default depends on the machine
                off = {"dest": field_.name, "action": "store_const", "const": False}
                group.add_argument(f"--no_{field_.name}", **off, help=f"turn {name} off")
            continue
        if choices:
            text += f"; one of {', '.join(choices)}"
        text += "" if field_.default is None else f" (default {field_.default})"
        kind = {int: int, int | None: int, float: float}.get(field_.type, str)
        values = SEVERAL if field_.type == str | tuple[str, ...] | None else {}
        if (const := field_.metadata["const"]) is not None:
            values = {"nargs": "?", "const": const}
        metavar = "NAME" if choices else {int: "N", float: "X", str: "PATH"}[kind]
        group.add_argument(name, type=kind, **values, metavar=metavar, help=text)


def check_values(config) -> None:
    """Raise ValueError for the first field of a configuration whose value is not allowed, with what is allowed."""
    for field_ in fields(config):
        name, value, choices = field_.name, getattr(config, field_.name), field_.metadata["choices"]
        if choices and value not in (*choices, field_.default):
            raise ValueError(f"--{name} {value}: must be one of {', '.join(choices)}")
        if value in ("", ()) or (isinstance(value, tuple) and "" in value):
            raise ValueError(f"--{name}: must not be empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"--{name}: a number of {len(str(value))} digits; must be below 2**63")
        for relation, holds in (("above", operator.gt), ("at_least", operator.ge), ("below", operator.lt)):
            bound = field_.metadata["bounds"].get(relation)
            if None not in (bound, value) and not holds(value, bound):
                raise ValueError(f"--{name} {value}: must be {relation.replace('_', ' ')} {bound}")


# --- Output paths -----------------------------------------------------------------------------------------------------


def check_output_path(file: str) -> None:
    """Raise FileExistsError if something is at `file` already, or what `check_output_folder` raises."""
    if not file:
        raise FileNotFoundError("--output '': names no file")
    if Path(file).exists():
        raise FileExistsError(f"{file}: already there; remove it or choose another name")
    check_output_folder(file)


def check_output_folder(file: str) -> None:
    """Raise OSError if the folder of `file` does not exist or is not writable."""
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{file}: its folder does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{file}: its folder is not to be written to")
