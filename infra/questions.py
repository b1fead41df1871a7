"""Multiple-choice questions and the formats of their records."""

import re
import sys
from typing import NamedTuple

from infra.distributed import print0
from infra.formats import drop_missing, ignored_keys, require_text
from infra.records import read_records, summarize_notes

LETTERS = "ABCDEFGHIJ"  # of the choices
ANSWER_KEYS = ("answer_idx", "answer_index", "answer", "answerKey")  # of several, all must mean one choice
SUBJECT_KEYS = ("subject", "category", "meta_info")  # the first one that a record has is read
READ_KEYS = {"question", "options", "choices", *ANSWER_KEYS, *SUBJECT_KEYS}


class Question(NamedTuple):
    """A question and its choices, one of which is correct."""

    text: str
    choices: list[str]
    answer: int  # the index of the correct choice
    subject: str | None
    notes: tuple[str, ...] = ()  # what of the record is not part of the question


def to_question(record: dict) -> Question:
    """Read {"question", "options": {letter: text}, "answer_idx"} or {"question", "choices": [text], "answer"}.

    The answer is the letter, the index or the text of the correct choice. The subject is the value of `subject`,
    `category` or `meta_info`. Raises ValueError, naming the key at fault.
    """
    record = drop_missing(record)
    if "question" not in record or not record.keys() & {"options", "choices"}:
        raise ValueError(f"keys {list(record)}: question and options (or choices) are expected")
    labels, choices = list(LETTERS), record.get("options", record.get("choices"))
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # ARC: {"text": [...], "label": [...]}
        labels, choices = choices.get("label", labels), choices["text"]
    elif isinstance(choices, dict):
        choices = drop_missing(choices)  # of questions with fewer choices than others
        labels, choices = list(choices), list(choices.values())
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be 2 to {len(LETTERS)} texts")
    has_numbers = any(type(choice) is int for choice in choices)
    choices = [require_text(choice, f"choice {LETTERS[i]}").strip() for i, choice in enumerate(choices)]
    labels = labels if isinstance(labels, list) else []

    answers = [record[key] for key in ANSWER_KEYS if key in record]
    bare = [re.sub(rf"^\(?{LETTERS[i]}[.):]\s+", "", choice) for i, choice in enumerate(choices)]
    if all(len(one) < len(other) for one, other in zip(bare, choices, strict=True)):  # each begins with its letter
        answers = [bare[choices.index(answer)] if answer in choices else answer for answer in answers]
        choices = bare
    if not answers:
        raise ValueError(f"keys {list(record)}: one of {', '.join(ANSWER_KEYS)} is expected")
    meant = [indices for answer in answers if (indices := _indices_of(answer, labels, choices, has_numbers))]
    if not meant:
        raise ValueError(f"answer {answers[0]!r} is none of the choices")
    common = [index for index in meant[0] if all(index in indices for indices in meant)]
    if not common:
        one, other, *_ = sorted({indices[0] for indices in meant})
        raise ValueError(f"the answer is both {choices[one]!r} and {choices[other]!r}")
    notes = ignored_keys(record, known=READ_KEYS)
    if len(common) > 1:
        notes.append("answer taken for a label, though it is the text of another choice")

    subject = next((record[key] for key in SUBJECT_KEYS if key in record), None)
    subject = None if subject is None else str(subject)
    return Question(require_text(record["question"], "question"), choices, common[0], subject, tuple(notes))


def _indices_of(answer, labels: list, choices: list[str], has_numbers: bool) -> list[int]:
    """The indices of the choices that an answer may name: by its label first, then by its text, or by an index."""
    if isinstance(answer, str):
        found = [labels.index(answer)] if answer in labels else []
        found += [choices.index(answer.strip())] if answer.strip() in choices else []
        return list(dict.fromkeys(found))
    if type(answer) is not int:
        return []
    if answer in labels:
        return [labels.index(answer)]
    by_label = labels.index(str(answer)) if str(answer) in labels else None
    by_text = choices.index(str(answer)) if has_numbers and str(answer) in choices else None
    by_index = answer if 0 <= answer < len(choices) else None
    meant = {by_label, by_text, by_index} - {None}
    if len(meant) > 1:
        raise ValueError(f"answer {answer} may be a label, an index or the text of a choice; write it as a text")
    return list(meant)


def load_questions(path) -> list[Question]:
    """Read the questions of data files, and print which keys are not part of them. Raises what `read_records` does."""
    questions = read_records(path, to_question)
    for line in summarize_notes(path, questions):
        print0(line, sys.stderr)
    return questions
