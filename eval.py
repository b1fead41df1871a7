"""Evaluation: held-out loss, and exact match by greedy generation, each with a 95 % interval.

Alone: torchrun eval.py {perplexity,match} --model DIR --data FILE, results as JSON on stdout.

Letters: B sequences generated together, N examples, D hidden size, V vocabulary.
"""

import json
import math
import sys
from collections.abc import Callable

import numpy as np
import torch

from confidence import (
    add_data_flags,
    check_models,
    choose_template,
    load_dataset,
    load_tokenizer,
    score_examples,
    usable_length,
)
from data import Dataset, Example, load_examples, pack, sizes
from model import (
    CommandLine,
    KVCache,
    Transformer,
    autocast,
    fastest_dtype,
    open_model,
    processes,
    rank,
    say,
    sum_over_processes,
    world_size,
)
from tokenizer import Tokenizer

Z_95 = 1.959964  # of a normal distribution, 95 % lies within ± this many standard deviations


# --- Held-out loss ----------------------------------------------------------------------------------------------------


def held_out_loss(model: Transformer, encoded, micro_batch_tokens: int = 8192, dtype: str = "fp32") -> dict:
    """Mean −log p over all supervised tokens, in nats: {"loss", "loss_interval", "examples", "tokens"}.

    Every token weighs the same, so the figure does not depend on how examples are batched. The interval is that of a
    ratio of sums with examples as the independent units (delta method), since tokens of one example are not.
    """
    _, perplexity = score_examples(model, encoded, micro_batch_tokens, dtype)
    _, count = sizes(encoded)  # [N] tokens of each example
    total = count * np.log(perplexity)  # [N] nats of each example
    loss, n, interval = total.sum() / count.sum(), len(count), None
    if n > 1:  # one example says nothing about the spread
        error = math.sqrt(((total - loss * count) ** 2).sum() * n / (n - 1)) / count.sum()
        interval = [float(loss - Z_95 * error), float(loss + Z_95 * error)]
    return {"loss": float(loss), "loss_interval": interval, "examples": n, "tokens": int(count.sum())}


# --- Exact match ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids=(),
    dtype: str = "fp32",
    batch_size: int = 64,
) -> list[list[int]]:
    """Continue each prompt greedily: -> the new ids of each.

    It goes on up to and with one of `stop_ids`, for `max_new_tokens`, or until the model has no more positions.
    Under `torchrun` the processes share the prompts out, each taking as many steps as the others, and all get all ids.
    """
    device = model.head_weight.device
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    results = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)  # 1 + id, and 0 after the end
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of a batch are about equally long
    mine = by_length[rank() :: world_size()]
    for start in range(0, math.ceil(len(prompts) / world_size()), batch_size):
        chosen = torch.tensor(mine[start : start + batch_size], dtype=torch.int64, device=device)
        batch = pack([(prompts[i], prompts[i]) for i in chosen.tolist()]).to(device)  # any targets
        longest = int(batch.cu_seqlens.diff().max())
        longest = max(longest, min(longest + max_new_tokens, model.config.max_length))
        lengths = batch.cu_seqlens.diff().long().to(device)  # [B]
        cache = KVCache(model.config, len(lengths), longest)
        running = torch.full((len(lengths),), len(chosen) > 0, device=device)  # [B]; a row that idles has ended already
        tokens, positions, cu_seqlens = batch.tokens, batch.positions, batch.cu_seqlens
        for step in range(max_new_tokens):
            new = next_tokens(model, tokens, positions, cu_seqlens, cache, dtype)
            if len(chosen):
                results[chosen, step] = (new + 1) * running
            running &= ~torch.isin(new, stop) & (lengths + step < longest)
            if not sum_over_processes(running.sum()):
                break
            tokens, positions, cu_seqlens = new, (lengths + step).clamp(max=longest - 1), None
    sum_over_processes(results)
    return [[token - 1 for token in row if token] for row in results.tolist()]


def next_tokens(model: Transformer, tokens, positions, cu_seqlens, cache: KVCache, dtype: str):
    """The likeliest token after each of B sequences: prompts packed by `cu_seqlens`, or their newest tokens. -> [B]"""
    last = slice(None) if cu_seqlens is None else cu_seqlens[1:].long() - 1
    with autocast(tokens.device, dtype):
        return model(tokens, positions, cu_seqlens, cache, head=lambda hidden: model.logits(hidden[last]).argmax(-1))


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
    answers = generate(model, prompts, longest + 4, stop_ids, dtype)
    right = sum(
        ids[-1] in stop_ids and tokenizer.decode(ids).strip() == text
        for ids, text in zip(answers, expected, strict=True)
    )
    return {"accuracy": right / len(examples), "accuracy_interval": wilson_interval(right, len(examples))}


def wilson_interval(successes: int, trials: int) -> list[float]:
    """95 % interval of a share (Wilson 1927), honest at 0 and at 1 too.

    >>> [round(x, 4) for x in wilson_interval(0, 10)]
    [0.0, 0.2775]
    """
    share, z2 = successes / trials, Z_95**2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / trials / 4) / (1 + z2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


# --- Both, side by side -----------------------------------------------------------------------------------------------

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


def main(argv=None) -> None:
    """Evaluate a model folder on a data file; the figures are JSON on stdout."""
    parser = CommandLine(description="Evaluate a model on a data file: its loss, or its exact matches.")
    parser.add_argument("measure", choices=("perplexity", "match"))
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder in Hugging Face layout")
    parser.add_argument("--data", required=True, metavar="FILE", help="the examples, .jsonl or .json")
    add_data_flags(parser)
    args = parser.parse_args(argv)
    with processes() as device:
        check_models([args.model])
        tokenizer, max_length = load_tokenizer(args.model), usable_length(args.model, args.max_length)
        template = choose_template(tokenizer, args.template, sys.stderr)
        dataset = load_dataset(args.data, tokenizer, template, max_length, args.cache, sys.stderr)
        dtype = args.dtype or fastest_dtype(device)
        model = open_model(args.model, dtype, device)
        if args.measure == "perplexity":
            result = held_out_loss(model, dataset, args.micro_batch_tokens, dtype)
            result["perplexity"] = math.exp(result["loss"])
        else:
            kept = set(dataset.ids)
            examples = [example for example in load_examples(args.data) if example.id in kept]
            result = exact_match(model, examples, tokenizer, template, dtype)
            result["examples"] = len(dataset)
        say(json.dumps(result | {"truncated": dataset.truncated, "dropped": dataset.dropped}))


if __name__ == "__main__":
    main()
