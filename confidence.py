"""Training dynamics: how confidently the checkpoints of a reference run predict each example, and the split it gives.

For example i with supervised tokens y_1 … y_N, and checkpoints c = 1 … C of a plain NTP run:

    p_c(i)  = (1/N) Σ_n p_c(y_n)                                 gold-token probability
    confidence(i), variance(i) = mean and population variance of p_c(i) over c
                                                                 the axes of a data map (Swayamdipta et al. 2020)
    Conf(i) = −(1/C) Σ_c exp(−(1/N) Σ_n log p_c(y_n))            the paper's: negative mean perplexity

Sorted by confidence and cut at the median, the data falls into the confident half D^c and the unconfident half D^u.

Alone: torchrun confidence.py --checkpoints DIR… --data FILE --output confidence.jsonl [--plot map.png]

Letters: N examples (in arrays) or supervised tokens of one (above), C checkpoints, S supervised positions of a row.
"""

import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from data import Batch, Dataset, pack, sizes, split_batch
from infra.cache import load_dataset
from infra.cli import CommandLine, add_data_flags, add_model_flags, check_folder_of, refuse_existing
from infra.distributed import (
    ahead,
    autocast,
    barrier,
    fastest_dtype,
    processes,
    rank,
    say,
    sum_over_processes,
    to_device,
    world_size,
)
from infra.files import written_aside
from infra.hf import check_models, choose_template, load_tokenizer, open_model, read_ahead, usable_length
from model import Transformer

# --- One checkpoint ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_examples(
    model: Transformer, encoded: Sequence[tuple], micro_batch_tokens: int = 8192, dtype: str = "fp32"
) -> tuple[np.ndarray, np.ndarray]:
    """How well one checkpoint predicts each example: -> (probability [N], perplexity [N]), float64, in the order given.

    probability is p_c(i) = (1/N) Σ_n p(y_n), perplexity exp(−(1/N) Σ_n log p(y_n)), over the N supervised tokens of i.
    Under `torchrun` the processes share the examples out, each computing as many rows as the others: every example is
    scored exactly once, and all get all scores.
    """
    device = model.head_weight.device
    lengths, counts = sizes(encoded)
    tally = Tally(counts, device)
    batches = split_batch(lengths.tolist(), micro_batch_tokens, world_size())

    def prepare(examples: list[int]):
        batch = pack([encoded[i] for i in examples])
        rows = batch.supervised  # [S]
        owner = torch.tensor(examples, dtype=torch.int64)[batch.example[rows]]  # [S]
        return batch.to(device), to_device(rows, device), to_device(owner, device)

    for batch, rows, owner in ahead(prepare, batches[rank() :: world_size()]):
        tally.add(owner, gold_log_probs(model, batch, rows, dtype))
    return tally.scores()


IMPOSSIBLE = -690.0  # log p of a gold token that a model gives no number, or less than this: p = 10⁻³⁰⁰


class Tally:
    """Adds up p and log p over the supervised tokens of each example, from packed rows in any order.

    It can be closed `epochs` times, each time keeping the scores and beginning anew.
    """

    def __init__(self, num_supervised: Sequence[int], device, epochs: int = 0):
        self.num_supervised = np.asarray(num_supervised)  # [N]
        # Σ p, Σ log p, and the number of tokens without a finite log p.
        self.sums = torch.zeros(3, len(num_supervised), dtype=torch.float64, device=device)
        self.closed = 0
        self.history = torch.zeros(epochs, 2, len(num_supervised), dtype=torch.float64)  # scores of closed epochs

    def add(self, owner, log_p) -> None:
        """Take note of log p(y) [S] at positions of the examples `owner` [S]."""
        log_p, broken = log_p.double(), ~log_p.isfinite()
        log_p = log_p.nan_to_num(nan=IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        self.sums.index_add_(1, owner, torch.stack([log_p.exp(), log_p, broken.double()]))

    def close(self) -> None:
        """Keep the scores of the epoch that ends here."""
        self.history[self.closed] = torch.from_numpy(np.stack(self.scores()))
        self.closed += 1

    def epochs(self) -> tuple[np.ndarray, np.ndarray]:
        """(probability [C, N], perplexity [C, N]) of the C epochs closed so far."""
        return tuple(self.history[: self.closed].transpose(0, 1).numpy())

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(probability [N], perplexity [N]) of what all processes have noted, each token once; it then begins anew."""
        sums = sum_over_processes(self.sums).cpu().numpy()
        probability, log_probability = sums[:2] / self.num_supervised
        broken = np.flatnonzero(sums[2])
        self.sums.zero_()
        if len(broken) == len(probability):
            raise ValueError(
                "a model's predictions are not finite numbers: are its weights? (a diverged run needs a lower --lr)"
            )
        if len(broken):
            say(
                f"warning: of {len(broken):,} examples some tokens get no finite probability, and count as impossible: "
                f"number {', '.join(str(i + 1) for i in broken[:8])}{' …' if len(broken) > 8 else ''} of those kept",
                sys.stderr,
            )
        # p_c(i) = (1/N) Σ_n p_c(y_n), and the perplexity exp(−(1/N) Σ_n log p_c(y_n))
        return probability, np.exp(-log_probability)


def gold_log_probs(model: Transformer, batch: Batch, rows, dtype: str):
    """log p(y_n) at the supervised positions `rows` [S] of a packed row: -> float32 [S]"""
    with autocast(batch.tokens.device, dtype):
        return model(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            head=lambda hidden: model.gold_log_probs(hidden[rows], batch.targets[rows]),
        )


def score_checkpoints(
    folders, dataset: Dataset, micro_batch_tokens: int, dtype: str, device, file=None, kept: Path | None = None
) -> "Dynamics":
    """Score all examples with each checkpoint, oldest first, with a line of progress on `file` for each.

    Scores in the folder `kept`, where one is given, are taken from there, and new ones left there, checkpoint by
    checkpoint: whoever is stopped on the way goes on with the next.
    While one is at work the next is read from the disk, into the system's cache: as fast to open from there as from
    this process's memory, which never holds two models.
    """
    scores = []
    with ThreadPoolExecutor(1) as background:
        for folder, following in zip(folders, [*folders[1:], None], strict=True):
            background.submit(read_ahead, following)
            known = kept and kept / f"{Path(folder).name}.safetensors"
            if known and known.is_file():
                scores.append(load_file(known)["scores"])
                continue
            scores.append(
                np.stack(score_examples(open_model(folder, dtype, device), dataset, micro_batch_tokens, dtype))
            )
            if known and rank() == 0:
                kept.mkdir(parents=True, exist_ok=True)
                with written_aside(known) as aside:
                    save_file({"scores": scores[-1]}, aside)
            barrier()
            say(f"confidence  {folder}: mean gold-token probability {scores[-1][0].mean():.4f}", file)
    return Dynamics(dataset.ids, *(np.stack(column) for column in zip(*scores, strict=True)))


# --- All checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dynamics:
    """Each example's scores at each checkpoint.

    >>> d = Dynamics(["a"], probability=np.array([[0.25], [0.75]]), perplexity=np.array([[4.0], [2.0]]))
    >>> float(d.confidence[0]), float(d.variance[0]), float(d.mean_perplexity[0])
    (0.5, 0.0625, 3.0)
    """

    ids: list[str]  # [N]
    probability: np.ndarray  # [C, N]: p_c(i)
    perplexity: np.ndarray  # [C, N]

    @property
    def confidence(self) -> np.ndarray:
        """Mean over the checkpoints of the gold-token probability: [N], from 0 to 1."""
        return self.probability.mean(axis=0)

    @property
    def variance(self) -> np.ndarray:
        """Population variance of the same: [N]."""
        return self.probability.var(axis=0)

    @property
    def mean_perplexity(self) -> np.ndarray:
        """Mean over the checkpoints of the perplexity: [N]; its negative is the paper's confidence."""
        return self.perplexity.mean(axis=0)

    def by(self, measure: str) -> np.ndarray:
        """The score to split by, higher for more confident: `probability`, or the paper's `perplexity`. -> [N]"""
        paper = -self.mean_perplexity  # Conf(i) = −(1/C) Σ_c exp(−(1/N) Σ_n log p_c(y_n))
        return {"probability": self.confidence, "perplexity": paper}[measure]

    def save(self, path) -> None:
        """Write one JSON object a line and example."""
        names = ("id", "confidence", "variance", "perplexity", "probabilities", "perplexities")
        means = self.confidence, self.variance, self.mean_perplexity
        columns = self.ids, *(scores.tolist() for scores in (*means, self.probability.T, self.perplexity.T))
        with written_aside(Path(path)) as aside, open(aside, "w", encoding="utf-8") as file:
            for row in zip(*columns, strict=True):
                file.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")

    @classmethod
    def load(cls, path) -> "Dynamics":
        """Read what `save` wrote. FileNotFoundError or ValueError name file, line and what is wrong."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; --stage confidence makes it")
        ids, probability, perplexity = [], [], []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row["id"], str):
                    raise TypeError("id is not a text")
                ids.append(row["id"])
                probability.append([float(p) for p in row["probabilities"]])
                perplexity.append([float(p) for p in row["perplexities"]])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not a line of confidence scores ({error!r})") from None
            scores = probability[-1] + perplexity[-1]
            if not scores or len(scores) != 2 * len(probability[0]) or not all(map(math.isfinite, scores)):
                raise ValueError(f"{path}:{number}: one finite probability and perplexity a checkpoint is expected")
        if not ids:
            raise ValueError(f"{path}: no scores in it")
        return cls(ids, np.array(probability).T, np.array(perplexity).T)

    def select(self, ids: list[str]) -> "Dynamics":
        """The scores of just these examples, in this order. ValueError counts the ids without any and shows three."""
        place = {example_id: i for i, example_id in enumerate(self.ids)}
        missing = [example_id for example_id in ids if example_id not in place]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(ids)} examples have no confidence score (ids {', '.join(missing[:3])}…): "
                "the scores must come from the same data"
            )
        order = [place[example_id] for example_id in ids]
        return Dynamics(ids, self.probability[:, order], self.perplexity[:, order])


def split_by_confidence(scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by confidence and cut at the median: scores [N] -> (confident [N // 2], unconfident [N - N // 2]), indices.

    Ties are broken by example order, the earlier one counting as more confident.

    >>> [half.tolist() for half in split_by_confidence([0.1, 0.9, 0.5, 0.9, 0.2])]
    [[1, 3], [2, 4, 0]]
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if scores.dim() != 1 or scores.isnan().any():
        raise ValueError(
            f"one number an example is expected, not scores of shape {list(scores.shape)} or not-a-numbers"
        )
    order = torch.argsort(scores, descending=True, stable=True)
    return order[: len(order) // 2], order[len(order) // 2 :]


def area_under_roc(scores, positive) -> float:
    """The chance that a positive example scores higher than a negative one, ties counting half (Mann-Whitney U).

    >>> area_under_roc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
    0.75
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]  # 1 … N, equal scores sharing the mean of their ranks
    num_positive, num_negative = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


# --- The data map -----------------------------------------------------------------------------------------------------


def require_matplotlib():
    """The pyplot module, or ValueError saying what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_data_map(dynamics: Dynamics, path) -> None:
    """Draw the data map: every example at its variance and confidence, and the line where a split by these cuts."""
    plt = require_matplotlib()
    confident, unconfident = (half.numpy() for half in split_by_confidence(dynamics.confidence))
    figure, axes = plt.subplots(figsize=(7, 5.5), layout="constrained")
    size = float(np.clip(20000 / len(dynamics.ids), 1, 25))
    for half, colour, name in ((confident, "#2a6f97", "confident"), (unconfident, "#d1495b", "unconfident")):
        label = f"{name} half, {len(half):,} examples"
        axes.scatter(dynamics.variance[half], dynamics.confidence[half], size, colour, alpha=0.35, lw=0, label=label)
    cut = np.median(dynamics.confidence)
    axes.axhline(cut, color="black", lw=1, ls="--", label=f"the cut, at the median {cut:.3f}")
    axes.set(xlabel="variance of the gold-token probability", ylabel="confidence (its mean)")
    axes.set_title(f"Data map over {len(dynamics.probability)} checkpoints")
    axes.spines[["top", "right"]].set_visible(False)
    for handle in axes.legend(loc="best", frameon=False).legend_handles:
        handle.set_alpha(1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- What every tool opens: model folders and data files --------------------------------------------------------------


# --- Command line -----------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    """Score the examples of a file with the checkpoints of a run, or draw the data map of scores already made."""
    parser = CommandLine(description="How confidently a run's checkpoints predict each example of a file.")
    parser.add_argument("--checkpoints", nargs="+", metavar="DIR", help="model folders, oldest first")
    parser.add_argument("--data", metavar="FILE", help="the examples, .jsonl or .json")
    parser.add_argument("--output", metavar="FILE", help="where the scores go, one JSON line an example")
    parser.add_argument("--scores", metavar="FILE", help="instead of these three: scores made before, to be drawn")
    parser.add_argument("--plot", metavar="PNG", help="draw the data map (needs matplotlib)")
    add_model_flags(parser)
    add_data_flags(parser)
    args = parser.parse_args(argv)
    if None in (args.checkpoints, args.data, args.output) and None in (args.scores, args.plot):
        parser.error("give --checkpoints, --data and --output, or --scores and --plot")
    with processes() as device:
        # Whatever can be wrong is found before hours of scoring.
        if args.output:
            refuse_existing(args.output)
        if args.plot:
            check_folder_of(args.plot)
            require_matplotlib()
        if args.scores:
            dynamics = Dynamics.load(args.scores)
        else:
            check_models(args.checkpoints)
            model = args.checkpoints[0]
            tokenizer, max_length = load_tokenizer(model), usable_length(model, args.max_length)
            template = choose_template(tokenizer, args.template, sys.stderr)
            dataset = load_dataset(args.data, tokenizer, template, max_length, args.cache, sys.stderr)
            dtype = args.dtype or fastest_dtype(device)
            dynamics = score_checkpoints(args.checkpoints, dataset, args.micro_batch_tokens, dtype, device, sys.stderr)
            if rank() == 0:
                dynamics.save(args.output)
        if args.plot and rank() == 0:
            plot_data_map(dynamics, args.plot)


if __name__ == "__main__":
    main()
