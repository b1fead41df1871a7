"""Evaluation: held-out loss, exact match and multiple choice, each with a 95 % interval, and generation.

As a script: torchrun eval.py {perplexity,match,choice,generate} --model DIR --data FILE   (results: JSON on stdout)
             python eval.py chat --model DIR

N is the number of examples.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from confidence import score_examples
from data import IGNORE_INDEX, MICRO_BATCH_TOKENS, Dataset, count_tokens
from infra.answers import (
    Answers,
    Prompt,
    add_answer_flags,
    append_answers,
    check_sampling_flags,
    load_answers,
    load_prompts,
    progress_file,
    resolve_answer_flags,
    unanswered_batches,
    write_answers,
)
from infra.cache import load_dataset, resolve_cache
from infra.chat_templates import resolve_template
from infra.cli import (
    ArgumentParser,
    add_data_flag,
    add_encoding_flags,
    add_micro_batch_flag,
    add_model_flags,
    check_output_path,
)
from infra.device import DTYPES, resolve_dtype
from infra.distributed import init_distributed, print0, print_result, rank, set_up_process, world_size
from infra.files import write_json_lines
from infra.formats import require_text
from infra.generation import Sampling, decode_batch, generate
from infra.hf import (
    check_models,
    load_for_inference,
    load_tokenizer,
    resolve_max_length,
    verify_weights,
)
from infra.questions import LETTERS, Question, load_questions
from model import Transformer
from tokenizer import TEMPLATES, Tokenizer

# --- 95 % intervals ---------------------------------------------------------------------------------------------------

Z_95 = 1.959964  # 95 % of a normal distribution lies within ± this many standard deviations


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float] | None:
    """95 % interval of Σ numerators / Σ denominators over independent examples (delta method): [N], [N] -> [low, high]

    None for a single example, from which no spread can be estimated.

    >>> [round(x, 4) for x in ratio_interval(np.array([1.0, 3.0]), np.array([1, 1]))]
    [0.04, 3.96]
    """
    n, ratio = len(numerators), numerators.sum() / denominators.sum()
    if n < 2:
        return None
    error = math.sqrt(((numerators - ratio * denominators) ** 2).sum() * n / (n - 1)) / denominators.sum()
    return [float(ratio - Z_95 * error), float(ratio + Z_95 * error)]


def wilson_interval(successes: int, trials: int) -> list[float]:
    """95 % interval of a proportion (Wilson 1927), which is valid near 0 and 1 too.

    >>> [round(x, 4) for x in wilson_interval(0, 10)]
    [0.0, 0.2775]
    """
    share, z2 = successes / trials, Z_95**2 / trials
    center = (share + z2 / 2) / (1 + z2)
    half_width = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / trials / 4) / (1 + z2)
    return [max(0.0, center - half_width), min(1.0, center + half_width)]


# --- Held-out loss ----------------------------------------------------------------------------------------------------


def held_out_loss(model: Transformer, encoded: Sequence, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> dict:
    """Mean −log p over all supervised tokens, in nats: {"loss", "loss_interval", "examples", "tokens"}.

    All tokens have the same weight, so the loss does not depend on how examples are batched. The interval assumes that
    examples are independent, but not the tokens of an example.
    """
    nll, num_supervised = nll_per_example(model, encoded, micro_batch_tokens)
    return {
        "loss": float(nll.sum() / num_supervised.sum()),
        "loss_interval": ratio_interval(nll, num_supervised),
        "examples": len(nll),
        "tokens": int(num_supervised.sum()),
    }


def nll_per_example(model: Transformer, encoded: Sequence, micro_batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each example: -> (Σ −log p over its supervised tokens [N], their number [N])"""
    _, perplexity = score_examples(model, encoded, micro_batch_tokens)
    _, num_supervised = count_tokens(encoded)
    return num_supervised * np.log(perplexity), num_supervised  # perplexity is exp(nll / num_supervised)


# --- Exact match ------------------------------------------------------------------------------------------------------


def exact_match(
    model: Transformer,
    dataset: Dataset,
    tokenizer: Tokenizer,
    template: str,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> dict:
    """The share of examples whose last supervised turn is generated word for word: {"accuracy", "accuracy_interval"}.

    Decoding is greedy, from the prompt ids of training, and the end token must be generated too, so that a truncated
    example never matches. White space around the answer does not count. Raises ValueError for a plain text.
    """
    if dataset.has_texts:
        raise ValueError("exact match asks for prompts with responses, and there are plain texts among the examples")
    prompts, expected = zip(*(split_last_turn(*example) for example in dataset), strict=True)
    stop_ids = tokenizer.stop_ids(template)
    batch_size = max(1, min(64, micro_batch_tokens // max(map(len, prompts))))
    # A few more tokens than the encoding has: the model may generate the same text in smaller pieces.
    max_new_tokens = max(map(len, expected)) + 4
    answers = generate(model, list(prompts), max_new_tokens, stop_ids, batch_size=batch_size)

    def text(ids: list[int]) -> str | None:
        return tokenizer.decode(ids).strip() if ids and ids[-1] in stop_ids else None

    pairs = [(text(answer), text(ids)) for answer, ids in zip(answers, expected, strict=True)]
    num_correct = sum(answer is not None and answer == right for answer, right in pairs)
    return {"accuracy": num_correct / len(dataset), "accuracy_interval": wilson_interval(num_correct, len(dataset))}


def split_last_turn(tokens, targets) -> tuple[list[int], list[int]]:
    """The ids before the last supervised turn of an encoded example, and those of the turn with its end token.

    >>> split_last_turn(torch.tensor([1, 5, 6, 2, 7, 8]), torch.tensor([-100, 6, 2, -100, 8, 2]))
    ([1, 5, 6, 2, 7], [8, 2])
    """
    supervised = targets != IGNORE_INDEX
    last = int(supervised.nonzero()[-1])
    before = (~supervised[:last]).nonzero()  # what is not supervised before the last turn's end
    start = int(before[-1]) + 1 if len(before) else 0
    return tokens[: start + 1].tolist(), targets[start : last + 1].tolist()


# --- Multiple choice --------------------------------------------------------------------------------------------------


def format_question(question: Question, by: str) -> tuple[str, list[str]]:
    """The prompt and the possible answers: by "letter", the prompt lists the choices; by "text", it does not.

    >>> print(*format_question(Question("Is snow white?", ["yes", "no"], 0, None), by="letter"))
    Question: Is snow white?
    A. yes
    B. no
    Answer: ['A', 'B']
    """
    if by == "text":
        return f"Question: {question.text}\nAnswer:", question.choices
    letters = list(LETTERS[: len(question.choices)])
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True))
    return f"Question: {question.text}\n{listed}Answer:", letters


PLAIN = "plain"  # instead of a template: the answer follows the prompt in plain text


def encode_choice(tokenizer: Tokenizer, template: str, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Encode a prompt and an answer, without the end of the answer's turn. -> (prompt ids, answer ids)"""
    if template == PLAIN:
        bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
        return bos + tokenizer.encode(prompt), tokenizer.encode(" " + answer, add_prefix=False)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids, loss_mask = tokenizer.render_conversation(messages, template)
    start = loss_mask.index(True)
    while len(ids) > start + 1 and not tokenizer.decode(ids[-1:]).strip():  # the end token, and Llama 2's space
        ids.pop()
    return ids[:start], ids[start:]


def score_choices(
    model: Transformer,
    questions: list[Question],
    tokenizer: Tokenizer,
    template: str,
    by: str = "letter",
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> tuple[list[np.ndarray], int]:
    """Score the choices of each question. -> (scores [choices] of each, number of questions with a truncated prompt)

    A score is log p(answer | prompt); by "text", it is divided by the number of characters of the answer. A prompt that
    is too long for the model loses its beginning.
    """
    encoded, truncated, limit = [], set(), model.config.max_length
    for number, question in enumerate(questions, start=1):
        prompt, answers = format_question(question, by)
        for answer in answers:
            prompt_ids, ids = encode_choice(tokenizer, template, prompt, answer)
            if len(ids) > limit:
                raise ValueError(
                    f"question {number}: an answer of {len(ids)} tokens is longer than the model's {limit}"
                )
            if len(prompt_ids) + len(ids) > limit + 1:
                truncated.add(number)
            sequence = torch.tensor([*prompt_ids, *ids][-limit - 1 :])
            targets = sequence[1:].clone()
            targets[: -len(ids)] = IGNORE_INDEX
            encoded.append((sequence[:-1], targets))
    nll, _ = nll_per_example(model, encoded, micro_batch_tokens)
    scores = np.split(-nll, np.cumsum([len(question.choices) for question in questions])[:-1])
    if by == "text":
        lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    return scores, len(truncated)


def choice_report(questions: list[Question], chosen: list[int]) -> dict:
    """{"accuracy", "accuracy_interval", "questions", "subjects", "positions"}: overall, by subject and by position.

    "positions" shows whether the model prefers a position: how often each letter is correct, how often it is chosen,
    and the accuracy on the questions where it is correct.
    """

    def accuracy(indices: Sequence[int]) -> dict:
        num_correct = sum(chosen[i] == questions[i].answer for i in indices)
        return {
            "accuracy": num_correct / len(indices) if indices else None,
            "accuracy_interval": wilson_interval(num_correct, len(indices)) if indices else None,
            "questions": len(indices),
        }

    every = range(len(questions))
    subjects = sorted({question.subject for question in questions if question.subject is not None})
    by_subject = {name: accuracy([i for i in every if questions[i].subject == name]) for name in subjects}
    by_position = {}
    for position in range(max(len(question.choices) for question in questions)):
        correct_here = accuracy([i for i in every if questions[i].answer == position])
        by_position[LETTERS[position]] = {
            "correct": correct_here["questions"],
            "chosen": sum(choice == position for choice in chosen),
            "accuracy": correct_here["accuracy"],
        }
    return {**accuracy(every), "subjects": by_subject, "positions": by_position}


# --- Answering records ------------------------------------------------------------------------------------------------


def answer_turns(
    model: Transformer,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    template: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answers]:
    """Answer the user turns of all prompts together.

    A prompt holds all earlier turns and their answers. If it is too long for the model, the answer is empty.
    """
    conversations = [list(prompt.history) for prompt in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    stop_ids, num_truncated = tokenizer.stop_ids(template), [0] * len(prompts)
    for turn in range(max((len(prompt.turns) for prompt in prompts), default=0)):
        indices = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in indices:
            conversations[i].append({"role": "user", "content": prompts[i].turns[turn]})
        prompt_ids = [tokenizer.render_conversation(conversations[i], template)[0] for i in indices]
        repeats = [prompts[i].repeat for i in indices]
        new_ids = generate(model, prompt_ids, max_new_tokens, stop_ids, len(prompts), sampling, repeats)  # in one batch
        for i, ids in zip(indices, new_ids, strict=True):
            answer = tokenizer.decode([token for token in ids if token not in stop_ids]).strip()
            texts[i].append(answer)
            conversations[i].append({"role": "assistant", "content": answer})
            num_truncated[i] += bool(ids) and ids[-1] not in stop_ids
    return list(map(Answers, texts, num_truncated))


# --- Evaluating the models of a run -----------------------------------------------------------------------------------

MAX_MATCH_TOKENS = 32  # exact match is for short answers: at most this many supervised tokens in each example


def evaluate(
    model: Transformer,
    held_out: Dataset,
    tokenizer: Tokenizer,
    template: str,
    micro_batch_tokens: int,
) -> dict:
    """Held-out loss, and exact match if all examples are complete, short and no plain texts (else None)."""
    result = held_out_loss(model, held_out, micro_batch_tokens)
    too_long = held_out.num_truncated or held_out.num_dropped or held_out.num_supervised.max() > MAX_MATCH_TOKENS
    if too_long or held_out.has_texts:
        return result | {"accuracy": None, "accuracy_interval": None}
    return result | exact_match(model, held_out, tokenizer, template, micro_batch_tokens)


# --- Commands ---------------------------------------------------------------------------------------------------------


def load_setup(args, device) -> tuple[Tokenizer, str, str]:
    """Check the model folder and read its tokenizer. -> (tokenizer, template, dtype of matmuls, a key of DTYPES)

    Raises FileNotFoundError or ValueError.
    """
    check_models([args.model])
    verify_weights(args.model)
    tokenizer = load_tokenizer(args.model)
    template = args.template if args.template == PLAIN else resolve_template(tokenizer, args.template, sys.stderr)
    return tokenizer, template, resolve_dtype(args.dtype, device)


def perplexity_or_match(args, device) -> None:
    """Print the held-out loss and perplexity, or the exact match, of the examples in a data file."""
    cache = resolve_cache(args.cache, file=sys.stderr)
    tokenizer, template, dtype = load_setup(args, device)
    max_length = resolve_max_length(args.model, args.max_length)
    dataset = load_dataset(
        args.data, tokenizer, template, max_length, cache, skip_bad_records=args.skip_bad_records, file=sys.stderr
    )
    model = load_for_inference(args.model, DTYPES[dtype], device)
    if args.command == "perplexity":
        result = held_out_loss(model, dataset, args.micro_batch_tokens)
        result["perplexity"] = math.exp(result["loss"])
    else:
        result = exact_match(model, dataset, tokenizer, template, args.micro_batch_tokens)
        result["examples"] = len(dataset)
    counts = {"truncated": dataset.num_truncated, "dropped": dataset.num_dropped}
    print_result(json.dumps({"template": template, **result, **counts}))


def multiple_choice(args, device) -> None:
    """Print the `choice_report` of the questions in a data file; with --output, write a line for each question."""
    if args.output is not None:
        check_output_path(args.output)
    tokenizer, template, dtype = load_setup(args, device)
    questions = load_questions(args.data)
    model = load_for_inference(args.model, DTYPES[dtype], device)
    scores, num_truncated = score_choices(model, questions, tokenizer, template, args.by, args.micro_batch_tokens)
    chosen = [int(score.argmax()) for score in scores]
    report = choice_report(questions, chosen)
    if args.output and rank() == 0:
        lines = [
            {"choice": LETTERS[i], "answer": LETTERS[question.answer], "scores": score.tolist()}
            for i, question, score in zip(chosen, questions, scores, strict=True)
        ]
        write_json_lines(Path(args.output), lines)
    if num_truncated:
        print0(f"warning: {num_truncated} prompts are too long for the model and lost their beginning", sys.stderr)
    print_result(json.dumps({"by": args.by, "template": template, **report, "prompts_truncated": num_truncated}))


def generate_answers(args, device) -> None:
    """Answer the records in a data file. A stopped run resumes from the answers that it has left beside --output."""
    resolve_answer_flags(args)
    tokenizer, template, dtype = load_setup(args, device)
    prompts = load_prompts(args)
    with progress_file(args, prompts, template, dtype) as file:
        answers = load_answers(file, prompts)
        model = load_for_inference(args.model, DTYPES[dtype], device)
        for temperature, indices in unanswered_batches(args, prompts, answers):
            batch, sampling = [prompts[i] for i in indices], Sampling(temperature, args.top_p, args.seed)
            new_answers = answer_turns(model, batch, tokenizer, template, args.max_new_tokens, sampling)
            new_answers = dict(zip(indices, new_answers, strict=True))
            append_answers(file, new_answers)
            answers |= new_answers
            print0(f"{len(answers)}/{len(prompts)} answered", sys.stderr, progress=len(answers) / len(prompts))
        if num_truncated := sum(answer.num_truncated for answer in answers.values()):
            limits = "--max_new_tokens or the model's last position"
            print0(f"warning: {num_truncated} answers were truncated at {limits}", sys.stderr)
        write_answers(args, prompts, answers)


def chat(args, device) -> None:
    """Talk with a model in the terminal, until the input ends."""
    if world_size() > 1:
        raise ValueError("chat: is for one process; start it without torchrun")
    check_sampling_flags(args)
    tokenizer, template, dtype = load_setup(args, device)
    model = load_for_inference(args.model, DTYPES[dtype], device)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    system = [{"role": "system", "content": require_text(args.system, "--system")}] if args.system else []
    messages, limit, stop_ids = list(system), model.config.max_length, tokenizer.stop_ids(template)
    num_asked = 0
    print0("An empty line starts a new conversation, Ctrl-D ends.", sys.stderr)
    while True:
        try:
            line = input("> ")
        except (EOFError, RuntimeError, BrokenPipeError):  # the input or the output has ended, or there is none
            return
        if not line.strip():
            messages = list(system)
            continue
        try:
            turn = {"role": "user", "content": require_text(line, "the line")}
        except ValueError as error:
            print0(str(error), sys.stderr)
            continue
        prompt, _ = tokenizer.render_conversation([*messages, turn], template)
        if len(prompt) > limit and messages != system:
            print0(f"a new conversation starts, since this one has reached the model's {limit} tokens", sys.stderr)
            messages = list(system)
            prompt, _ = tokenizer.render_conversation([*messages, turn], template)
        if len(prompt) > limit:
            print0(f"the line is longer than the model's {limit} tokens", sys.stderr)
            continue
        messages.append(turn)
        new_tokens = decode_batch(model, [prompt], min(args.max_new_tokens, limit), stop_ids, sampling, [num_asked])
        num_asked += 1
        answer = print_text(new_tokens, tokenizer, stop_ids)
        messages.append({"role": "assistant", "content": answer})


def print_text(new_tokens: Iterator[torch.Tensor], tokenizer: Tokenizer, stop_ids: Sequence[int]) -> str:
    """Print the text of a single sequence of `decode_batch` while it is generated. -> the whole text"""
    ids, printed = [], ""
    for new_ids in new_tokens:
        ids += [token for token in new_ids.tolist() if token not in stop_ids]
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the rest of this character is still to come
            print_result(text[len(printed) :], end="")
            printed = text
    text = tokenizer.decode(ids)
    print_result(text[len(printed) :])
    return text


# --- Command line -----------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    """Evaluate a model folder, or generate with it. Results go to stdout as JSON, progress goes to stderr."""
    parser = ArgumentParser(description="Evaluate a model, or let it answer; COMMAND --help lists the flags.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add_command(name: str, run: Callable, help: str, data: str | None, templates=TEMPLATES) -> ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        group = command.group("data")
        group.add_argument("--model", required=True, metavar="DIR", help="model folder in Hugging Face layout")
        if data:
            add_data_flag(command, data, required=True)
        add_model_flags(command, templates)
        return command

    def add_sampling_flags(command: ArgumentParser, max_new_tokens: tuple, temperature: tuple) -> None:
        for name, type, default, help in (
            ("--max_new_tokens", parser.positive, *max_new_tokens),
            ("--temperature", parser.number(0, 100), *temperature),
            ("--top_p", parser.number(1e-6, 1), 1.0, "sample from the most likely tokens of this total probability"),
            ("--seed", parser.number(0, 2**63 - 1, int), 0, "seed of sampling (default 0)"),
        ):
            command.group("generation").add_argument(name, type=type, default=default, metavar="X", help=help)

    for name, help in (("perplexity", "held-out loss and perplexity"), ("match", "exact match by greedy generation")):
        add_encoding_flags(add_command(name, perplexity_or_match, help, "the examples"))
    help, data = "multiple choice by log-likelihood", "questions with choices"
    command = add_command("choice", multiple_choice, help, data, (*TEMPLATES, PLAIN))
    group = command.group("data")
    group.add_argument("--by", choices=("letter", "text"), default="letter", help="what is scored (default letter)")
    add_micro_batch_flag(command)
    command.group("saving").add_argument("--output", metavar="FILE", help="where a line for each question goes")
    help, data = "answer the records of a file", "the records"
    command = add_command("generate", generate_answers, help, data)
    add_answer_flags(command)
    max_new_tokens = (None, "most tokens of an answer (default 512; for alpaca_eval 2048, for mt_bench 1024)")
    temperature = (None, "of sampling (default 0; for mt_bench by category, as in FastChat)")
    add_sampling_flags(command, max_new_tokens, temperature)
    command = add_command("chat", chat, "talk with a model", None)
    command.group("data").add_argument("--system", metavar="TEXT", help="system turn of each conversation")
    add_sampling_flags(command, (512, "most tokens of an answer (default 512)"), (0.7, "of sampling (default 0.7)"))
    args = parser.parse_args(argv)
    with init_distributed(args.device) as device:
        if sys.stdout is None:
            raise OSError("stdout: closed, and results are printed there")
        args.run(args, device)


if __name__ == "__main__":
    set_up_process()
    main()
