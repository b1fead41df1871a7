"""The files of `eval.py generate`: records to answer, answers as AlpacaEval and MT-Bench read them, unfinished answers.

Below, `args` are the parsed arguments of `eval.py generate`.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from infra.cli import ArgumentParser, check_output_path
from infra.distributed import barrier, print0, print_result, rank, wait_for_rank0, world_size
from infra.files import atomic_write, model_sha256
from infra.formats import to_prompt
from infra.locks import file_lock
from infra.records import data_checksums, describe, read_records, summarize_notes, to_text

# --- Flags ------------------------------------------------------------------------------------------------------------


def add_answer_flags(parser: ArgumentParser) -> None:
    """Add the flags that say where answers go, and in which format."""
    saving = parser.group("saving")
    saving.add_argument("--output", metavar="FILE", help="where answers go (default: stdout); needed to resume")
    help = "what to write (default jsonl)"
    saving.add_argument("--format", choices=("jsonl", "alpaca_eval", "mt_bench"), default="jsonl", help=help)
    saving.add_argument("--name", help="name of the model, for a judge (default: its folder's)")
    help = "records a process answers at once (default 32)"
    parser.group("hardware").add_argument("--batch_size", type=parser.positive, default=32, metavar="N", help=help)


# The most tokens of an answer: FastChat's default, and what AlpacaEval's configurations of models have.
MAX_NEW_TOKENS = {"jsonl": 512, "alpaca_eval": 2048, "mt_bench": 1024}


def resolve_answer_flags(args) -> None:
    """Fill in what --format decides. Raises ValueError for flags that do not go together, or for --output."""
    if args.max_new_tokens is None:
        args.max_new_tokens = MAX_NEW_TOKENS[args.format]
    if args.temperature is None and args.format != "mt_bench":
        args.temperature = 0.0
    check_sampling_flags(args)
    if args.format != "jsonl" and args.output is None:
        raise ValueError(f"--format {args.format}: needs --output")
    if args.output is not None:
        check_output_path(args.output)


def check_sampling_flags(args) -> None:
    """Raise ValueError if flags of sampling would have no effect."""
    if args.temperature == 0 and (args.top_p != 1 or args.seed != 0):
        raise ValueError("--top_p and --seed: are for sampling, which needs a --temperature above 0")


# --- Records to answer ------------------------------------------------------------------------------------------------

# The temperature that FastChat takes for the questions of a category. For any other category it is 0.7.
MT_BENCH_TEMPERATURE = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


class Prompt(NamedTuple):
    """A record of a data file whose user turns are to be answered, one after the other."""

    record: dict  # as it stands in the file
    history: list[dict]  # the messages before the turns
    turns: list[str]
    notes: list[str]  # what of the record is not asked
    repeat: int = 0  # how many records before it ask the same


class Answers(NamedTuple):
    """The answers to a record, one for each of its turns."""

    texts: list[str]
    num_truncated: int  # how many of them ended before their end token


def read_prompt(record: dict, output_format: str) -> Prompt:
    """Read what a record asks, as `to_prompt` does. ValueError if it lacks a key that the judge needs."""
    key = {"alpaca_eval": "instruction", "mt_bench": "question_id"}.get(output_format)
    if key and key not in record:
        raise ValueError(f"--format {output_format} needs {key}")
    return Prompt(record, *to_prompt(record))


def load_prompts(args) -> list[Prompt]:
    """Read the records in --data. ValueError if two questions of MT-Bench have the same id."""
    prompts, asked = read_records(args.data, partial(read_prompt, output_format=args.format)), Counter()
    for i, prompt in enumerate(prompts):
        question = json.dumps([prompt.history, prompt.turns])
        prompts[i] = prompt._replace(repeat=asked[question])
        asked[question] += 1
    if args.format == "jsonl":  # a judge knows the other keys of its own file
        for line in summarize_notes(args.data, prompts):
            print0(line, sys.stderr)
    if args.format == "mt_bench":
        counts = Counter(str(prompt.record["question_id"]) for prompt in prompts)
        repeated = [question_id for question_id, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"{describe(args.data)}: question_id {repeated[0]} stands there more than once")
    return prompts


def temperature_of(prompt: Prompt, args) -> float:
    """--temperature, or by default, for a question of MT-Bench, what FastChat takes for its category."""
    if args.temperature is not None:
        return args.temperature
    return MT_BENCH_TEMPERATURE.get(str(prompt.record.get("category")), 0.7)


def unanswered_batches(args, prompts: list[Prompt], answers: dict[int, Answers]) -> Iterator[tuple[float, list[int]]]:
    """Divide the records without answers into batches of one temperature and similar lengths.

    Yields the temperature of each batch and the indices of its records. A batch has --batch_size records a process.
    """
    temperatures = [temperature_of(prompt, args) for prompt in prompts]
    unanswered = [i for i in range(len(prompts)) if i not in answers]
    unanswered.sort(key=lambda i: (temperatures[i], len(prompts[i].turns[0])))
    batch_size = args.batch_size * world_size()
    for temperature, group in groupby(unanswered, key=lambda i: temperatures[i]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield temperature, indices[start : start + batch_size]


# --- Answered records -------------------------------------------------------------------------------------------------


def to_judge_format(prompt: Prompt, texts: list[str], output_format: str, model_name: str) -> dict:
    """An answered record as the judge reads it; for `jsonl`, as messages."""
    if output_format == "alpaca_eval":
        dataset = {"dataset": prompt.record["dataset"]} if "dataset" in prompt.record else {}
        return {**dataset, "instruction": prompt.turns[-1], "output": texts[-1], "generator": model_name}
    if output_format == "mt_bench":
        question_id = prompt.record["question_id"]
        answer_id = hashlib.sha256(_to_json([question_id, model_name, texts]).encode()).hexdigest()[:22]
        return {
            "question_id": question_id,
            "answer_id": answer_id,
            "model_id": model_name,
            "choices": [{"index": 0, "turns": texts}],
            "tstamp": time.time(),
        }
    messages = list(prompt.history)
    record_id = {"id": prompt.record["id"]} if "id" in prompt.record else {}
    for turn, answer in zip(prompt.turns, texts, strict=True):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return record_id | {"messages": messages}


_to_json = partial(json.dumps, default=to_text)  # ids of parquet files may be bytes or dates


def write_answers(args, prompts: list[Prompt], answers: dict[int, Answers]) -> None:
    """Write all records with their answers to --output, or to stdout without it. Only rank 0 writes."""
    if rank() != 0:
        return
    model_name = args.name or Path(args.model).resolve().name
    answered = [to_judge_format(prompt, answers[i].texts, args.format, model_name) for i, prompt in enumerate(prompts)]
    lines = "".join(_to_json(record) + "\n" for record in answered)
    if not args.output:
        print_result(lines, end="")
        return
    with atomic_write(Path(args.output)) as tmp:
        tmp.write_text(_to_json(answered, indent=1) if args.format == "alpaca_eval" else lines, encoding="utf-8")
    print_result(json.dumps({"output": args.output, "format": args.format, "records": len(answered)}))


# --- Answers of an unfinished run -------------------------------------------------------------------------------------
# The progress file has a JSON line with the settings of the run, then for each answered record a line with "number",
# "answers" and "truncated".


@contextlib.contextmanager
def progress_file(args, prompts: list[Prompt], template: str, dtype: str):
    """Yield the file beside --output that keeps the answers of an unfinished run; None without --output.

    The file is locked inside the `with` block, and removed if the block ends without an error.
    Raises FileExistsError if another run holds the lock, ValueError if the file was started with other settings.
    """
    if args.output is None:
        yield None
        return
    file = Path(f"{args.output}.answered")
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            message = f"{file}: another run is at work on it; wait, or choose another --output"
            stack.enter_context(file_lock(file, message))
            settings = {key: getattr(args, key) for key in ("format", "max_new_tokens", "temperature", "top_p", "seed")}
            settings |= {"template": template, "dtype": dtype, "turns": [len(prompt.turns) for prompt in prompts]}
            settings |= {"data": data_checksums(args.data), "model": model_sha256(args.model)}
            start_or_resume(file, settings)
        wait_for_rank0()  # hashing the model and the data may take long
        yield file
        if rank() == 0:
            file.unlink()


def start_or_resume(file: Path, settings: dict) -> None:
    """Write the settings into a progress file without answers; otherwise compare them, and cut an incomplete last line.

    Raises ValueError if the answers were made with other settings.
    """
    content = file.read_bytes()
    has_answers = content.count(b"\n") > 1
    with wrap_errors(file):
        previous = json.loads(content.partition(b"\n")[0]) if content else settings
        changed = [key for key in settings if previous.get(key) != settings[key]]
    if changed and (has_answers or previous.keys() != settings.keys()):
        old, new = previous.get(changed[0]), settings[changed[0]]
        difference = f" {old!r}, not {new!r}" if len(str((old, new))) < 100 else " of other content"
        raise ValueError(
            f"{file}: begun with {changed[0]}{difference}; give what it was begun with, or remove the file"
        )
    if has_answers:
        os.truncate(file, content.rfind(b"\n") + 1)
    else:
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def load_answers(file: Path | None, prompts: list[Prompt]) -> dict[int, Answers]:
    """The answers in a progress file, by the index of their record.

    Raises ValueError if they do not fit the records.
    """
    if file is None:
        return {}
    answers = {}
    with wrap_errors(file):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()[1:]):
            index, texts = line["number"], line["answers"]
            if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                raise ValueError("an answer is not a list of texts")
            if len(texts) != len(prompts[index].turns):
                raise ValueError(f"record {index} has other turns")
            answers[index] = Answers(texts, int(line["truncated"]))
    barrier()  # all processes have read the file before rank 0 appends to it
    return answers


def append_answers(file: Path | None, answers: dict[int, Answers]) -> None:
    """Append answers, as of `load_answers`, to a progress file. Only rank 0 writes."""
    if file is None or rank() != 0:
        return
    with open(file, "a", encoding="utf-8") as stream:
        for index, (texts, num_truncated) in answers.items():
            stream.write(json.dumps({"number": index, "answers": texts, "truncated": num_truncated}) + "\n")


@contextlib.contextmanager
def wrap_errors(file: Path):
    """Replace errors in the `with` block, which reads the content of `file`, by a ValueError that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and all records are answered again") from None
