"""Evaluation: held-out loss, exact match, multiple choice, each with a 95 % interval, and answers for whoever judges.

Alone: torchrun eval.py {perplexity,match,choice,generate} --model DIR --data FILE, results as JSON on stdout;
python eval.py chat --model DIR, to talk with a model.

Letters: B sequences generated together, N examples, D hidden size, V vocabulary.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from confidence import score_examples
from data import IGNORE_INDEX, Dataset, Example, filled, load_examples, pack, read_records, sizes
from infra.cache import load_dataset
from infra.cli import CommandLine, add_data_flags, add_model_flags, refuse_existing
from infra.distributed import autocast, barrier, fastest_dtype, processes, rank, say, sum_over_processes, world_size
from infra.files import written_aside
from infra.hf import check_models, choose_template, load_tokenizer, open_model, usable_length
from infra.judges import MT_BENCH_TEMPERATURE, Asked, answered_before, in_format, progress_file, to_asked, write_answers
from model import KVCache, Transformer
from tokenizer import TEMPLATES, Tokenizer

Z_95 = 1.959964  # of a normal distribution, 95 % lies within ± this many standard deviations


# --- Held-out loss ----------------------------------------------------------------------------------------------------


def held_out_loss(model: Transformer, encoded, micro_batch_tokens: int = 8192, dtype: str = "fp32") -> dict:
    """Mean −log p over all supervised tokens, in nats: {"loss", "loss_interval", "examples", "tokens"}.

    Every token weighs the same, so the figure does not depend on how examples are batched. The interval is that of a
    ratio of sums with examples as the independent units (delta method), since tokens of one example are not.
    """
    total, count = nats(model, encoded, micro_batch_tokens, dtype)
    loss, n, interval = total.sum() / count.sum(), len(count), None
    if n > 1:  # one example says nothing about the spread
        error = math.sqrt(((total - loss * count) ** 2).sum() * n / (n - 1)) / count.sum()
        interval = [float(loss - Z_95 * error), float(loss + Z_95 * error)]
    return {"loss": float(loss), "loss_interval": interval, "examples": n, "tokens": int(count.sum())}


def nats(model: Transformer, encoded, micro_batch_tokens: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What each example costs: -> (Σ −log p over its supervised tokens [N], how many these are [N])"""
    _, perplexity = score_examples(model, encoded, micro_batch_tokens, dtype)
    _, count = sizes(encoded)
    return count * np.log(perplexity), count


# --- Generation -------------------------------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """How the next token is chosen: the likeliest at temperature 0, else one drawn from the likeliest that make up
    `top_p` (nucleus sampling, Holtzman et al. 2020). The random numbers depend on the seed and the prompt, and not on
    what is generated beside it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def draws(self, prompt: list[int], count: int) -> np.ndarray:
        """Numbers in [0, 1), one for each token after a prompt: float64 [count]"""
        digest = hashlib.sha256(np.array(prompt, dtype="<i8")).digest()
        return np.random.default_rng([self.seed, *np.frombuffer(digest, dtype="<u4")]).random(count)

    def choose(self, logits, draws):
        """logits [B, V], draws [B] -> the next tokens [B]

        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4, 3)
        >>> Sampling(temperature=1.0, top_p=0.7).choose(logits, torch.tensor([0.0, 0.6, 0.65, 0.99])).tolist()
        [0, 0, 1, 1]
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        below_top = logits.double() - logits.amax(-1, keepdim=True)
        p, tokens = (below_top / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        reached = p.cumsum(-1)
        kept = reached - p < self.top_p  # up to and with the token that reaches top_p
        drawn = draws[:, None] * reached.masked_fill(~kept, 0).amax(-1, keepdim=True)
        return tokens.gather(-1, (kept & (reached < drawn)).sum(-1, keepdim=True))[:, 0]


GREEDY = Sampling()


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids=(),
    dtype: str = "fp32",
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continue each prompt: -> the new ids of each.

    It goes on up to and with one of `stop_ids`, for `max_new_tokens`, or until the model has no more positions.
    Under `torchrun` the processes share the prompts out, each taking as many steps as the others, and all get all ids.
    """
    device = model.head_weight.device
    max_new_tokens = min(max_new_tokens, model.config.max_length)
    results = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)  # 1 + id, and 0 after the end
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of a batch are about equally long
    mine = by_length[rank() :: world_size()]
    for start in range(0, math.ceil(len(prompts) / world_size()), batch_size):
        chosen = mine[start : start + batch_size]
        batch = [prompts[i] for i in chosen]
        rows = torch.tensor(chosen, dtype=torch.int64, device=device)
        with torch.inference_mode(world_size() == 1):  # cheaper yet than no_grad, but not where weights are gathered
            for step, new in enumerate(continue_together(model, batch, max_new_tokens, stop_ids, dtype, sampling)):
                results[rows, step] = new + 1
    sum_over_processes(results)
    return [[token - 1 for token in row if token] for row in results.tolist()]


def generate_where_it_fits(model: Transformer, prompts: list[list[int]], *settings) -> list[list[int]]:
    """`generate`, with no answer, and a warning, where a prompt alone is longer than the model allows."""
    fitting = {i: prompt for i, prompt in enumerate(prompts) if len(prompt) <= model.config.max_length}
    if len(fitting) < len(prompts):
        say(f"warning: {len(prompts) - len(fitting)} prompts are too long for the model: no answer", sys.stderr)
    new = dict(zip(fitting, generate(model, list(fitting.values()), *settings), strict=True))
    return [new.get(i, []) for i in range(len(prompts))]


@torch.no_grad()
def continue_together(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop_ids, dtype: str, sampling: Sampling
) -> Iterator:
    """Continue prompts, token by token: yields the new ids of all, int64 [B], −1 for those that have ended.

    It goes on while any does, in any process. Without prompts it keeps step with the other processes.
    """
    device = model.head_weight.device
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    draws = np.array([sampling.draws(prompt, max_new_tokens) for prompt in prompts or [[]]])
    draws = torch.from_numpy(draws).to(device)  # [B, max_new_tokens]
    batch = pack([(prompt, prompt) for prompt in prompts]).to(device)  # any targets
    lengths = batch.cu_seqlens.diff().long().to(device)  # [B]
    longest = int(lengths.max())
    longest = max(longest, min(longest + max_new_tokens, model.config.max_length))
    cache = KVCache(model.config, len(lengths), longest)
    rows = torch.arange(len(lengths), device=device)  # who is computed on
    running = torch.full((len(lengths),), len(prompts) > 0, device=device)
    tokens, positions, cu_seqlens = batch.tokens, batch.positions, batch.cu_seqlens
    for step in range(max_new_tokens):
        last = slice(None) if cu_seqlens is None else cu_seqlens[1:].long() - 1
        with autocast(device, dtype):
            logits = model(tokens, positions, cu_seqlens, cache, head=lambda z, last=last: model.logits(z[last]))
        new = sampling.choose(logits, draws[rows, step])
        said = torch.full((len(prompts),), -1, device=device)
        said[rows[running]] = new[running]
        yield said
        running &= ~torch.isin(new, stop) & (lengths[rows] + step < longest)
        if not sum_over_processes(running.sum()):
            break
        if not running.all():
            order = close_ranks(running)
            cache.keep(order)
            rows, new, running = rows[order], new[order], running[order]
        tokens, positions, cu_seqlens = new, (lengths[rows] + step).clamp(max=longest - 1), None


def close_ranks(running):
    """Who is to be computed on next, when some have ended: the last of those that go on take the places of these.

    Where nobody goes on, the first does, to keep step with other processes. bool [B] -> int64 [B']

    >>> close_ranks(torch.tensor([True, False, True, False, True])).tolist(), close_ranks(torch.zeros(2) > 0).tolist()
    ([0, 4, 2], [0])
    """
    left = int(running.sum())
    if left == 0:
        return torch.zeros(1, dtype=torch.int64, device=running.device)
    order = torch.arange(left, device=running.device)
    order[~running[:left]] = left + running[left:].nonzero()[:, 0]
    return order


# --- Exact match ------------------------------------------------------------------------------------------------------


def exact_match(
    model: Transformer, examples: list[Example], tokenizer: Tokenizer, template: str, dtype: str = "fp32"
) -> dict:
    """The share of examples whose last assistant turn is generated word for word: {"accuracy", "accuracy_interval"}.

    Greedy, from the same prompt ids that training uses, and the answer must end by itself; surrounding white space does
    not count. ValueError for a plain text, which has no prompt.
    """
    if any(example.messages[-1]["role"] != "assistant" for example in examples):
        raise ValueError("exact match asks for prompts with responses, and there are plain texts among the examples")
    expected = [example.messages[-1]["content"].strip() for example in examples]
    longest = max(len(tokenizer.encode(text)) for text in expected)
    prompts = [tokenizer.apply_template(example.messages[:-1], template)[0] for example in examples]
    stop_ids = tokenizer.stop_ids(template)
    # A few tokens of grace, since a text may be spelt in more pieces than its encoding has.
    answers = generate_where_it_fits(model, prompts, longest + 4, stop_ids, dtype)
    right = sum(
        bool(ids) and ids[-1] in stop_ids and tokenizer.decode(ids).strip() == text
        for ids, text in zip(answers, expected, strict=True)
    )
    return {"accuracy": right / len(examples), "accuracy_interval": wilson_interval(right, len(examples))}


# --- Multiple choice --------------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJ"


class Question(NamedTuple):
    """A question and its choices, of which one is right."""

    text: str
    choices: list[str]
    answer: int  # the number of the right one
    subject: str | None


def to_question(record: dict) -> Question:
    """Read {"question", "options": {letter: text}, "answer_idx"} or {"question", "choices": [text], "answer"}.

    The answer is told by letter, by number, or as the right choice's text; a subject by `subject`, `category` or
    `meta_info`. Raises ValueError naming the key at fault.
    """
    if "question" not in record or not record.keys() & {"options", "choices"}:
        raise ValueError(f"keys {list(record)}: question and options (or choices) are expected")
    labels, choices = list(LETTERS), record.get("options", record.get("choices"))
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as in ARC
        labels, choices = choices.get("label", labels), choices["text"]
    elif isinstance(choices, dict):
        labels, choices = list(choices), list(choices.values())
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be 2 to {len(LETTERS)} texts")
    choices = [filled(choice, f"choice {letter}").strip() for choice, letter in zip(choices, LETTERS, strict=False)]
    answer = next((record[key] for key in ("answer_idx", "answer", "answerKey") if key in record), None)
    if type(answer) in (str, int) and isinstance(labels, list) and str(answer) in labels:
        answer = labels.index(str(answer))
    elif isinstance(answer, str) and answer.strip() in choices:
        answer = choices.index(answer.strip())
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} is none of the choices")
    subject = next((record[key] for key in ("subject", "category", "meta_info") if key in record), None)
    return Question(filled(record["question"], "question"), choices, answer, None if subject is None else str(subject))


def lay_out(question: Question, by: str) -> tuple[str, list[str]]:
    """What the model is asked and what it may answer: by "letter" the choices are listed, by "text" they are not.

    >>> print(*lay_out(Question("Is snow white?", ["yes", "no"], 0, None), by="letter"))
    Question: Is snow white?
    A. yes
    B. no
    Answer: ['A', 'B']
    """
    letters = LETTERS[: len(question.choices)]
    listed = [f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True)]
    asked = f"Question: {question.text}\n" + ("".join(listed) if by == "letter" else "") + "Answer:"
    return asked, list(letters) if by == "letter" else question.choices


PLAIN = "plain"  # in place of a template: the text of the question goes on with the answer


def encode_choice(tokenizer: Tokenizer, template: str, asked: str, answer: str) -> tuple[list[int], list[int]]:
    """-> (ids of the prompt, ids of an answer to it), in a chat template or as plain text"""
    if template == PLAIN:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return begin + tokenizer.encode(asked), tokenizer.encode(" " + answer, continues=True)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    ids, learnt = tokenizer.apply_template(messages, template)
    begin = learnt.index(True)
    while len(ids) > begin + 1 and not tokenizer.decode(ids[-1:]).strip():  # the end, and Llama 2's space before it
        ids.pop()
    return ids[:begin], ids[begin:]


def answer_choices(
    model: Transformer,
    questions: list[Question],
    tokenizer: Tokenizer,
    template: str,
    by: str = "letter",
    micro_batch_tokens: int = 8192,
    dtype: str = "fp32",
) -> tuple[list[np.ndarray], int]:
    """How likely each answer to each question is: -> (scores [choices] of each, how many prompts were cut)

    A score is log p of the answer given the question; by "text", divided by the answer's number of characters. Of a
    prompt that is too long the beginning is cut off.
    """
    encoded, cut, limit = [], set(), model.config.max_length
    for number, question in enumerate(questions, start=1):
        asked, answers = lay_out(question, by)
        for answer in answers:
            prompt, ids = encode_choice(tokenizer, template, asked, answer)
            if len(ids) > limit:
                raise ValueError(
                    f"question {number}: an answer of {len(ids)} tokens is longer than the model's {limit}"
                )
            if len(prompt) + len(ids) > limit + 1:
                cut.add(number)
            sequence = torch.tensor([*prompt, *ids][-limit - 1 :])
            targets = sequence[1:].clone()
            targets[: -len(ids)] = IGNORE_INDEX
            encoded.append((sequence[:-1], targets))
    total, _ = nats(model, encoded, micro_batch_tokens, dtype)
    scores = np.split(-total, np.cumsum([len(question.choices) for question in questions])[:-1])
    if by == "text":
        lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    return scores, len(cut)


def choice_report(questions: list[Question], chosen: list[int]) -> dict:
    """{"accuracy", "accuracy_interval", "questions", "subjects", "positions"}: the whole, by subject, by position.

    "positions" shows whether a model prefers a place to an answer: of each letter how often it is right, how often it
    is chosen, and the accuracy where it is right.
    """

    def share(part: list[int]) -> dict:
        right = sum(chosen[i] == questions[i].answer for i in part)
        return {
            "accuracy": right / len(part) if part else None,
            "accuracy_interval": wilson_interval(right, len(part)) if part else None,
            "questions": len(part),
        }

    everything = range(len(questions))
    subjects = sorted({question.subject for question in questions if question.subject is not None})
    by_subject = {name: share([i for i in everything if questions[i].subject == name]) for name in subjects}
    positions = {}
    for number in range(max(len(question.choices) for question in questions)):
        of_these = share([i for i in everything if questions[i].answer == number])
        positions[LETTERS[number]] = {
            "right": of_these["questions"],
            "chosen": sum(choice == number for choice in chosen),
            "accuracy": of_these["accuracy"],
        }
    return {**share(everything), "subjects": by_subject, "positions": positions}


# --- Answers, for people and for judges -------------------------------------------------------------------------------


def answer_turns(
    model: Transformer,
    asked: list[Asked],
    tokenizer: Tokenizer,
    template: str,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: str,
) -> tuple[list[list[str]], int]:
    """Answer the turns of each, every answer becoming part of what the next turn is asked after.

    -> (the answers of each, how many of all were cut). Of a conversation that has become too long for
    the model, the answer is empty.
    """
    talks, unended = [list(each.before) for each in asked], 0
    answers: list[list[str]] = [[] for _ in asked]
    stop_ids = tokenizer.stop_ids(template)
    for turn in range(max((len(each.turns) for each in asked), default=0)):
        still = [i for i, each in enumerate(asked) if turn < len(each.turns)]
        for i in still:
            talks[i].append({"role": "user", "content": asked[i].turns[turn]})
        prompts = [tokenizer.apply_template(talks[i], template)[0] for i in still]
        new = generate_where_it_fits(model, prompts, max_new_tokens, stop_ids, dtype, len(asked), sampling)
        for i, ids in zip(still, new, strict=True):
            said = tokenizer.decode([token for token in ids if token not in stop_ids]).strip()
            answers[i].append(said)
            talks[i].append({"role": "assistant", "content": said})
            unended += bool(ids) and ids[-1] not in stop_ids
    return answers, unended


# --- Shares and tables ------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int) -> list[float]:
    """95 % interval of a share (Wilson 1927), honest at 0 and at 1 too.

    >>> [round(x, 4) for x in wilson_interval(0, 10)]
    [0.0, 0.2775]
    """
    share, z2 = successes / trials, Z_95**2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / trials / 4) / (1 + z2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


MATCH_TOKENS = 32  # exact match is asked of short answers: every held-out response within so many tokens


def evaluate(
    model: Transformer,
    held_out: Dataset,
    read_examples: Callable[[], list[Example]],
    tokenizer: Tokenizer,
    template: str,
    micro_batch_tokens: int,
    dtype: str,
) -> dict:
    """Held-out loss and, where all responses are whole and short, exact match (else None), for which texts are read."""
    result = held_out_loss(model, held_out, micro_batch_tokens, dtype)
    if not (held_out.truncated or held_out.dropped or held_out.num_supervised.max() > MATCH_TOKENS):
        examples = read_examples()
        if all(example.messages[-1]["role"] == "assistant" for example in examples):
            return result | exact_match(model, examples, tokenizer, template, dtype)
    return result | {"accuracy": None, "accuracy_interval": None}


def table(results: dict[str, dict]) -> str:
    """Models side by side, as text: a row for each name, of what `evaluate` returned and the `seconds` of training."""

    def cell(entry: dict, name: str, form: str) -> str:
        if entry.get(name) is None:
            return "–"
        low, high = entry[f"{name}_interval"] or (-math.inf, math.inf)
        return f"{entry[name]:{form}} [{low:{form}}, {high:{form}}]"

    lines = [f"{'':8}{'held-out loss [95 %]':>26}{'exact match [95 %]':>26}{'training':>11}"]
    for name, entry in results.items():
        seconds = "–" if entry.get("seconds") is None else f"{entry['seconds']:,.0f} s"
        lines.append(f"{name:8}{cell(entry, 'loss', '.4f'):>26}{cell(entry, 'accuracy', '.1%'):>26}{seconds:>11}")
    return "\n".join(lines)


# --- Command line -----------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What every command needs to know of a model folder before it reads anything else."""

    tokenizer: Tokenizer
    template: str
    dtype: str


def setting_of(args, device) -> Setting:
    """Check the model folder and read its tokenizer. Raises FileNotFoundError or ValueError."""
    check_models([args.model])
    tokenizer = load_tokenizer(args.model)
    template = args.template if args.template == PLAIN else choose_template(tokenizer, args.template, sys.stderr)
    return Setting(tokenizer, template, args.dtype or fastest_dtype(device))


def perplexity_or_match(args, device) -> None:
    """Held-out loss and perplexity, or exact matches, of a data file's examples."""
    tokenizer, template, dtype = setting_of(args, device)
    max_length = usable_length(args.model, args.max_length)
    dataset = load_dataset(args.data, tokenizer, template, max_length, args.cache, sys.stderr)
    model = open_model(args.model, dtype, device)
    if args.command == "perplexity":
        result = held_out_loss(model, dataset, args.micro_batch_tokens, dtype)
        result["perplexity"] = math.exp(result["loss"])
    else:
        kept = set(dataset.ids)
        examples = [example for example in load_examples(args.data) if example.id in kept]
        result = exact_match(model, examples, tokenizer, template, dtype)
        result["examples"] = len(dataset)
    say(json.dumps(result | {"truncated": dataset.truncated, "dropped": dataset.dropped}))


def choice(args, device) -> None:
    """Multiple choice; with --output, a line for each question too."""
    if args.output is not None:
        refuse_existing(args.output)
    tokenizer, template, dtype = setting_of(args, device)
    questions = read_records(args.data, to_question)
    model = open_model(args.model, dtype, device)
    scores, cut = answer_choices(model, questions, tokenizer, template, args.by, args.micro_batch_tokens, dtype)
    chosen = [int(score.argmax()) for score in scores]
    say(json.dumps({"by": args.by, "template": template, **choice_report(questions, chosen), "prompts_cut": cut}))
    if args.output and rank() == 0:
        lines = [
            {"choice": LETTERS[i], "answer": LETTERS[question.answer], "scores": score.tolist()}
            for i, question, score in zip(chosen, questions, scores, strict=True)
        ]
        with written_aside(Path(args.output)) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def generate_answers(args, device) -> None:
    """Answer the records of a file. What is answered is kept beside --output: a run that was stopped goes on there."""
    if args.format != "jsonl" and args.output is None:
        raise ValueError(f"--format {args.format}: needs --output")
    if args.output is not None:
        refuse_existing(args.output)
    tokenizer, template, dtype = setting_of(args, device)
    asked = read_records(args.data, partial(to_asked, output_format=args.format))
    question_ids = Counter(str(each.record["question_id"]) for each in asked if args.format == "mt_bench")
    if twice := [name for name, count in question_ids.items() if count > 1]:
        raise ValueError(f"{args.data}: question_id {twice[0]} stands there more than once")
    settings = {key: getattr(args, key) for key in ("format", "max_new_tokens", "temperature", "top_p", "seed")}
    settings |= {"template": template, "dtype": dtype, "turns": [len(each.turns) for each in asked]}
    unended = 0
    with progress_file(args, settings) as progress:
        answers = answered_before(progress, asked) if progress else {}
        barrier()  # all have read it
        model = open_model(args.model, dtype, device)
        waiting = [i for i in range(len(asked)) if i not in answers]
        waiting.sort(key=lambda i: (sampling_of(args, asked[i]), len(asked[i].turns[0])))
        for alike, numbers in groupby(waiting, key=lambda i: sampling_of(args, asked[i])):
            for batch in in_batches(list(numbers), args.batch_size * world_size()):
                these = [asked[i] for i in batch]
                new, cut = answer_turns(model, these, tokenizer, template, args.max_new_tokens, alike, dtype)
                answers |= zip(batch, new, strict=True)
                unended += cut
                if progress and rank() == 0:
                    with open(progress, "a", encoding="utf-8") as file:
                        file.writelines(json.dumps({"number": i, "answers": answers[i]}) + "\n" for i in batch)
                say(f"{len(answers)}/{len(asked)} answered", sys.stderr)
        if unended:
            say(f"warning: {unended} answers were cut at --max_new_tokens or the model's last position", sys.stderr)
        if rank() == 0:
            name = args.name or Path(args.model).resolve().name
            write_answers(args, [in_format(each, answers[i], args.format, name) for i, each in enumerate(asked)])
            if progress:
                progress.unlink()


def sampling_of(args, asked: Asked) -> Sampling:
    """How a record is answered: as the flags say, or for MT-Bench, where they say nothing, by its category."""
    temperature = args.temperature
    if temperature is None:
        category = str(asked.record.get("category"))
        temperature = MT_BENCH_TEMPERATURE.get(category, 0.7) if args.format == "mt_bench" else 0.0
    return Sampling(temperature, args.top_p, args.seed)


def in_batches(items: list, size: int) -> Iterator[list]:
    """Consecutive items, `size` at a time.

    >>> list(in_batches([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def chat(args, device) -> None:
    """Talk with a model, line by line, until the input ends."""
    if world_size() > 1:
        raise ValueError("chat: is for one process; start it without torchrun")
    tokenizer, template, dtype = setting_of(args, device)
    model, stop_ids = open_model(args.model, dtype, device), tokenizer.stop_ids(template)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    opening = [{"role": "system", "content": filled(args.system, "--system")}] if args.system else []
    messages = list(opening)
    say("An empty line begins anew, Ctrl-D ends.", sys.stderr)
    while True:
        try:
            said = input("> ")
        except (EOFError, RuntimeError):  # the input has ended, or there is none
            return
        if not said.strip():
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": filled(said, "what you say")})
        prompt, _ = tokenizer.apply_template(messages, template)
        if len(prompt) > model.config.max_length:
            say(f"that is longer than the model's {model.config.max_length} tokens; begun anew", sys.stderr)
            messages = list(opening)
            continue
        ids, shown = [], ""
        for new in continue_together(model, [prompt], args.max_new_tokens, stop_ids, dtype, sampling):
            ids += [token for token in new.tolist() if token not in stop_ids]
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
        text = tokenizer.decode(ids)
        print(text[len(shown) :])
        messages.append({"role": "assistant", "content": text})


def main(argv=None) -> None:
    """Evaluate a model folder, or let it answer. Figures are JSON on stdout, progress goes to stderr."""
    parser = CommandLine(description="Evaluate a model, or let it answer; figures are JSON on stdout.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, data: str | None, templates=TEMPLATES) -> CommandLine:
        new = commands.add_parser(name, help=help, description=help)
        new.set_defaults(run=run)
        new.add_argument("--model", required=True, metavar="DIR", help="model folder in Hugging Face layout")
        if data:
            new.add_argument("--data", required=True, metavar="FILE", help=data)
        add_model_flags(new, templates)
        return new

    for name, help in (("perplexity", "held-out loss and perplexity"), ("match", "exact match by greedy generation")):
        add_data_flags(command(name, perplexity_or_match, help, "the examples, .jsonl or .json"))
    new = command("choice", choice, "multiple choice by log-likelihood", "questions with choices", (*TEMPLATES, PLAIN))
    new.add_argument("--by", choices=("letter", "text"), default="letter", help="what is scored (default letter)")
    new.add_argument("--output", metavar="FILE", help="where a line for each question goes")
    new.add_argument("--micro_batch_tokens", type=new.positive, default=8192)
    answering = command("generate", generate_answers, "answer the records of a file", "the records, .jsonl or .json")
    answering.add_argument("--output", metavar="FILE", help="where answers go (default: stdout); goes on if stopped")
    answering.add_argument("--format", choices=("jsonl", "alpaca_eval", "mt_bench"), default="jsonl")
    answering.add_argument("--name", help="of the model, for a judge (default: its folder's)")
    answering.add_argument("--batch_size", type=parser.positive, default=32, help="records a process answers at once")
    talking = command("chat", chat, "talk with a model", None)
    talking.add_argument("--system", metavar="TEXT", help="what it is told before all else")
    for new, temperature in ((answering, None), (talking, 0.7)):
        default = "0; for mt_bench by category, as FastChat has it" if temperature is None else temperature
        new.add_argument("--max_new_tokens", type=parser.positive, default=512)
        new.add_argument("--temperature", type=parser.number(0, 100), default=temperature, help=f"(default {default})")
        new.add_argument(
            "--top_p", type=parser.number(1e-6, 1), default=1.0, help="of the probability to draw from (default 1)"
        )
        new.add_argument("--seed", type=parser.number(0, 2**63 - 1, int), default=0)
    args = parser.parse_args(argv)
    with processes() as device:
        args.run(args, device)


if __name__ == "__main__":
    main()
