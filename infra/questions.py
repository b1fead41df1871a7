"""Multiple-choice questions and the formats of their records."""

import sys
from typing import NamedTuple

from infra.distributed import print0
from infra.formats import drop_missing, ignored_keys, require_text
from infra.records import read_records, summarize_notes

LETTERS = "ABCDEFGHIJ"  # of the choices
ANSWER_KEYS = ("answer_idx", "answer_index", "answer", "answerKey")  # the first one that a record has is read
SUBJECT_KEYS = ("subject", "category", "meta_info")  # likewise
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
    choices = [require_text(choice, f"choice {LETTERS[i]}").strip() for i, choice in enumerate(choices)]

    answer = next((record[key] for key in ANSWER_KEYS if key in record), None)
    if answer is None:
        raise ValueError(f"keys {list(record)}: one of {', '.join(ANSWER_KEYS)} is expected")
    labels = labels if isinstance(labels, list) else []
    if type(answer) is int and choices[answer : answer + 1] != [str(answer)] and str(answer) in choices:
        raise ValueError(f"answer {answer} may be an index or the text of another choice; write a text as a text")
    if type(answer) is int and str(answer) in labels:  # labels are texts, so this may be an index
        if answer != labels.index(str(answer)) and answer < len(choices):
            raise ValueError(f"answer {answer} may be a label or an index; write a label as a text")
        answer = str(answer)
    notes = ignored_keys(record, known=READ_KEYS)
    if answer in labels and answer in choices and labels.index(answer) != choices.index(answer):
        notes.append("answer taken for a label, though it is the text of another choice")
    if type(answer) in (str, int) and answer in labels:
        answer = labels.index(answer)
    elif isinstance(answer, str) and answer.strip() in choices:
        answer = choices.index(answer.strip())
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} is none of the choices")
    texts = [record[key].strip() for key in ANSWER_KEYS if isinstance(record.get(key), str)]
    if other := [text for text in texts if text in choices and text not in labels and text != choices[answer]]:
        raise ValueError(f"the answer is both {choices[answer]!r} and {other[0]!r}")

    subject = next((record[key] for key in SUBJECT_KEYS if key in record), None)
    subject = None if subject is None else str(subject)
    return Question(require_text(record["question"], "question"), choices, answer, subject, tuple(notes))


def load_questions(path) -> list[Question]:
    """Read the questions of data files, and print which keys are not part of them. Raises what `read_records` does."""
    questions = read_records(path, to_question)
    for line in summarize_notes(path, questions):
        print0(line, sys.stderr)
    return questions
