"""Records for judges, and the file that keeps answers."""

import contextlib
import fcntl
import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from data import to_prompt
from infra.distributed import barrier, rank
from infra.files import content_of, written_aside

# At what temperature FastChat has the questions of a category answered; of any other, at 0.7.
MT_BENCH_TEMPERATURE = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


class Asked(NamedTuple):
    """A record that is to be answered."""

    record: dict
    before: list[dict]  # messages
    turns: list[str]  # of the user, to be answered one after the other


def to_asked(record: dict, output_format: str) -> Asked:
    """Read a record of any format that `data.to_prompt` knows, with the keys that a judge needs."""
    needs = {"alpaca_eval": "instruction", "mt_bench": "question_id"}.get(output_format)
    if needs and needs not in record:
        raise ValueError(f"--format {output_format} needs {needs}")
    return Asked(record, *to_prompt(record))


def in_format(asked: Asked, answers: list[str], output_format: str, name: str) -> dict:
    """An answered record as a judge reads it, or ("jsonl") as messages."""
    if output_format == "alpaca_eval":
        kept = {"dataset": asked.record["dataset"]} if "dataset" in asked.record else {}
        return {**kept, "instruction": asked.turns[-1], "output": answers[-1], "generator": name}
    if output_format == "mt_bench":
        answer_id = hashlib.sha256(json.dumps([asked.record["question_id"], name, answers]).encode()).hexdigest()[:22]
        question = {"question_id": asked.record["question_id"], "answer_id": answer_id, "model_id": name}
        return {**question, "choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}
    messages = list(asked.before)
    for turn, answer in zip(asked.turns, answers, strict=True):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def write_answers(args, records: list[dict]) -> None:
    """Write the answered records to --output, or to stdout."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if not args.output:
        print(lines, end="")
        return
    with written_aside(Path(args.output)) as aside:
        aside.write_text(json.dumps(records, indent=1) if args.format == "alpaca_eval" else lines, encoding="utf-8")
    print(json.dumps({"output": args.output, "format": args.format, "records": len(records)}))


@contextlib.contextmanager
def progress_file(args, settings: dict):
    """Yield the file beside --output that keeps answers, begun or ready to go on with; None where there is no --output.

    Raises FileExistsError where another run is at work on it, ValueError where it was begun with other settings.
    """
    if args.output is None:
        yield None
        return
    path = Path(f"{args.output}.answered")
    with contextlib.ExitStack() as held:
        if rank() == 0:
            lock = held.enter_context(open(path, "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"{path}: another run is at work on it; wait, or choose another --output"
                ) from None
            contents = {"data": content_of(args.data), "model": content_of(args.model)}
            begin_or_go_on(path, settings | contents)
        barrier()  # it is there
        yield path


def begin_or_go_on(file: Path, settings: dict) -> None:
    """Begin the file that keeps answers, or make it ready to go on with: a last line that was cut short goes.

    Raises ValueError where it was begun with other settings.
    """
    if file.stat().st_size == 0:
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    content = file.read_bytes()
    with open(file, "rb+") as whole:
        whole.truncate(content.rfind(b"\n") + 1)
    with told_if_damaged(file):
        before = json.loads(content.splitlines()[0].decode())
        changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        was, now = before.get(changed[0]), settings[changed[0]]
        told = f" {was!r}, not {now!r}" if len(str((was, now))) < 100 else " of other content"
        raise ValueError(f"{file}: begun with {changed[0]}{told}; give what it was begun with, or remove the file")


def answered_before(file: Path, asked: list[Asked]) -> dict[int, list[str]]:
    """The answers that the file holds, by number. ValueError where they are not those to what is asked."""
    answers = {}
    with told_if_damaged(file):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()[1:]):
            said = line["answers"]
            if not (isinstance(said, list) and all(isinstance(text, str) for text in said)):
                raise ValueError("an answer is not a list of texts")
            if len(said) != len(asked[line["number"]].turns):
                raise ValueError(f"record {line['number']} has other turns")
            answers[line["number"]] = said
    return answers


@contextlib.contextmanager
def told_if_damaged(file: Path):
    """Whatever is wrong with what is read of the file inside becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and all is answered anew") from None
