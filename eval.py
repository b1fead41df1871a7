"""Evaluation: held-out loss, and exact match by greedy generation, each with a 95 % interval.

Alone: torchrun eval.py {perplexity,match} --model DIR --data FILE, results as JSON on stdout.

Letters: B sequences generated together, N examples, D hidden size, V vocabulary.
"""

import json
import math

import numpy as np
import torch

from confidence import score_examples
from data import IGNORE_INDEX, Example, encode_examples, load_examples
from model import (
    CommandLine,
    KVCache,
    Transformer,
    autocast,
    load_model,
    processes,
    rank,
    say,
    sum_over_processes,
    world_size,
)
from tokenizer import TEMPLATES, Tokenizer

Z_95 = 1.959964  # of a normal distribution, 95 % lies within ± this many standard deviations


# --- Held-out loss ----------------------------------------------------------------------------------------------------


def held_out_loss(model: Transformer, encoded, micro_batch_tokens: int = 8192, dtype: str = "fp32") -> dict:
    """Mean −log p over all supervised tokens, in nats: {"loss", "loss_interval", "examples", "tokens"}.

    Every token weighs the same, so the figure does not depend on how examples are batched. The interval is that of a
    ratio of sums with examples as the independent units (delta method), since tokens of one example are not.
    """
    _, perplexity = score_examples(model, encoded, micro_batch_tokens, dtype)
    count = np.array([int((targets != IGNORE_INDEX).sum()) for _, targets in encoded])  # [N] tokens of each example
    total = count * np.log(perplexity)  # [N] nats of each example
    loss = total.sum() / count.sum()
    n = len(count)
    error = math.sqrt(((total - loss * count) ** 2).sum() * n / max(n - 1, 1)) / count.sum()
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
    """Continue each prompt greedily until one of `stop_ids` (not returned) or `max_new_tokens`. -> new ids of each"""
    device = model.head_weight.device
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    results: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of a batch are about equally long
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        lengths = torch.tensor([len(prompts[i]) for i in chosen], device=device)  # [B]
        cache = KVCache(model.config, len(chosen), int(lengths.max()) + max_new_tokens, model.head_weight.dtype, device)
        tokens = torch.tensor([token for i in chosen for token in prompts[i]], device=device)  # [N], packed
        ends = lengths.cumsum(0)
        positions = torch.arange(len(tokens), device=device) - torch.repeat_interleave(ends - lengths, lengths)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
        running = torch.ones(len(chosen), dtype=torch.bool, device=device)
        with autocast(device, dtype):
            hidden = model(tokens, positions, cu_seqlens, cache)[ends - 1]  # [B, D]
            for step in range(max_new_tokens):
                new = model.logits(hidden).argmax(-1)  # [B]
                running &= ~torch.isin(new, stop)
                if not running.any():
                    break
                for i, token, on in zip(chosen, new.tolist(), running.tolist(), strict=True):
                    if on:
                        results[i].append(token)
                if step + 1 < max_new_tokens:
                    hidden = model(new, lengths + step, cache=cache)
    return results


def exact_match(
    model: Transformer, examples: list[Example], tokenizer: Tokenizer, template: str, dtype: str = "fp32"
) -> dict:
    """The share of examples whose last assistant turn is generated word for word: {"accuracy", "accuracy_interval"}.

    Greedy, from the same prompt ids that training uses; surrounding white space does not count. Under `torchrun` the
    processes share the examples out.
    """
    mine = range(rank(), len(examples), world_size())
    prompts = [tokenizer.apply_template(examples[i].messages[:-1], template)[0] for i in mine]
    expected = [examples[i].messages[-1]["content"].strip() for i in mine]
    longest = max((len(tokenizer.encode(text)) for text in expected), default=0)
    stop_ids = [i for i in (tokenizer.eos_id,) if i is not None]
    answers = generate(model, prompts, longest + 4, stop_ids, dtype)  # whoever writes on after that is wrong anyway
    right = sum(tokenizer.decode(ids).strip() == text for ids, text in zip(answers, expected, strict=True))
    total = sum_over_processes(torch.tensor(float(right), device=model.head_weight.device))
    return {"accuracy": float(total) / len(examples), "accuracy_interval": wilson_interval(int(total), len(examples))}


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
    examples: list[Example],
    encoded: list[tuple],
    tokenizer: Tokenizer,
    template: str,
    micro_batch_tokens: int,
    dtype: str,
) -> dict:
    """Held-out loss and, where all responses are short, exact match (else None)."""
    result = held_out_loss(model, encoded, micro_batch_tokens, dtype) | {"accuracy": None, "accuracy_interval": None}
    if max(int((targets != IGNORE_INDEX).sum()) for _, targets in encoded) <= MATCH_TOKENS:
        result |= exact_match(model, examples, tokenizer, template, dtype)
    return result


def table(results: dict[str, dict]) -> str:
    """Models side by side, as text: a row for each name, of what `evaluate` returned and the `seconds` of training."""

    def cell(entry: dict, name: str, form: str) -> str:
        if entry.get(name) is None:
            return "–"
        low, high = entry[f"{name}_interval"]
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
    parser.add_argument("--template", default="alpaca", choices=TEMPLATES)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    args = parser.parse_args(argv)
    with processes() as device:
        tokenizer = Tokenizer.from_pretrained(args.model)
        model = load_model(args.model, device=device)
        examples = load_examples(args.data)
        if args.measure == "perplexity":
            dataset = encode_examples(examples, tokenizer, args.template, args.max_length)
            result = held_out_loss(model, dataset.encoded, args.micro_batch_tokens, args.dtype)
            result |= {
                "perplexity": math.exp(result["loss"]),
                "truncated": dataset.truncated,
                "dropped": dataset.dropped,
            }
        else:
            result = exact_match(model, examples, tokenizer, args.template, args.dtype) | {"examples": len(examples)}
        say(json.dumps(result))


if __name__ == "__main__":
    main()
