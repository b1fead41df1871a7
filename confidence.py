"""Training dynamics: how confidently the checkpoints of a reference run predict each example, and the split it gives.

For example i with supervised tokens y_1 … y_N, and checkpoints c = 1 … C of a plain NTP run:

    p_c(i)  = (1/N) Σ_n p_c(y_n)                                 gold-token probability
    confidence(i), variance(i) = mean and population variance of p_c(i) over c
                                                                 the axes of a data map (Swayamdipta et al. 2020)
    Conf(i) = −(1/C) Σ_c exp(−(1/N) Σ_n log p_c(y_n))            the paper's: negative mean perplexity

The data is sorted by confidence and cut at the median into the confident half D^c and the unconfident half D^u.

As a script: torchrun confidence.py --checkpoints DIR… --data FILE --output confidence.jsonl [--plot map.png]
             python confidence.py --scores confidence.jsonl --data FILE --show 20
             python confidence.py --scores confidence.jsonl --data FILE --keep 0.9 --output kept.jsonl

Letters: N examples (in arrays) or supervised tokens of one (above), C checkpoints, S supervised positions of a row,
R those of a chunk, V vocabulary.
"""

import hashlib
import json
import math
import shutil
import sys
import time
import zipfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import MICRO_BATCH_TOKENS, Dataset, MicroBatch, balanced_partitions, build_micro_batch, count_tokens
from infra.cache import load_dataset, resolve_cache
from infra.chat_templates import resolve_template
from infra.cli import (
    SEVERAL,
    ArgumentParser,
    add_data_flag,
    add_encoding_flags,
    add_model_flags,
    check_output_path,
)
from infra.data_map import check_plot_path, plot_data_map
from infra.device import DTYPES, resolve_dtype
from infra.distributed import (
    all_reduce_sum,
    barrier,
    init_distributed,
    on_rank0,
    prefetch,
    print0,
    rank,
    set_up_process,
    world_size,
)
from infra.files import atomic_write, check_file, write_json_lines
from infra.hf import check_models, load_models, load_tokenizer, oldest_first, resolve_max_length
from infra.metrics import log_checkpoint
from infra.selection import add_selection_flags, check_flags, keep_records, label_records, match_scores, show_records
from mixup import chunk_size, exp_and_log_p_
from model import Transformer

# --- One checkpoint ---------------------------------------------------------------------------------------------------


def gold_log_probs(model: Transformer, micro_batch: MicroBatch):
    """log p(y_n) at the supervised positions of a packed row, from the logits of a chunk at once. -> float32 [S]"""
    row = micro_batch.row

    def head(hidden):
        log_p = []
        for positions in micro_batch.supervised.split(chunk_size(len(model.head_weight), hidden.device.type)):
            logits = model.logits(hidden[positions]).float()  # [R, V]
            # In place, without a copy, and with a smaller error at a large V than F.cross_entropy's on a CPU.
            _, (log_p_y,) = exp_and_log_p_(logits, row.targets[positions, None])
            log_p.append(log_p_y[:, 0])
        return torch.cat(log_p)

    return model(row.tokens, row.positions, row.cu_seqlens, head=head)


MIN_LOG_PROB = -690.0  # a lower log p of a gold token, or one that is not finite, counts as this: p = 10⁻³⁰⁰


class ScoreAccumulator:
    """Sums of p and log p over the supervised tokens of each example, from packed rows in any order.

    With `--confidence online`, each epoch of training acts as a checkpoint, and `end_epoch` stores its scores.
    """

    def __init__(self, num_supervised: Sequence[int], device, max_epochs: int = 0):
        self.num_supervised = np.asarray(num_supervised)  # [N]
        device = "cpu" if torch.device(device).type == "mps" else device  # Apple GPUs have no float64
        self.sums = torch.zeros(3, len(num_supervised), dtype=torch.float64, device=device)  # Σ p, Σ log p, not finite
        self.num_epochs = 0
        self.history = torch.zeros(max_epochs, 2, len(num_supervised), dtype=torch.float64)  # probability, perplexity

    def add(self, example_index, log_p) -> None:
        """Add log p(y) [S] at positions that belong to the examples `example_index` [S]."""
        log_p, example_index = log_p.to(self.sums.device), example_index.to(self.sums.device)
        log_p, broken = log_p.double(), ~log_p.isfinite()
        log_p = log_p.nan_to_num(nan=MIN_LOG_PROB).clamp(min=MIN_LOG_PROB)
        self.sums.index_add_(1, example_index, torch.stack([log_p.exp(), log_p, broken.double()]))

    def pop_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(probability, perplexity) [N] of what all processes have added; then the sums start again at zero.

        Raises ValueError if each example has a token without a finite probability; warns if some have.
        """
        sums = all_reduce_sum(self.sums).cpu().numpy()
        # p_c(i) = (1/N) Σ_n p_c(y_n), and exp(−(1/N) Σ_n log p_c(y_n))
        probability, perplexity = sums[0] / self.num_supervised, np.exp(-sums[1] / self.num_supervised)
        broken = np.flatnonzero(sums[2])
        self.sums.zero_()
        if 0 < len(broken) == len(probability):
            raise ValueError(
                "a model's predictions are not finite numbers: are its weights? (a diverged run needs a lower --lr)"
            )
        if len(broken):
            print0(
                f"warning: of {len(broken):,} examples some tokens get no finite probability, and count as impossible: "
                f"number {', '.join(str(i + 1) for i in broken[:8])}{' …' if len(broken) > 8 else ''} of those kept",
                sys.stderr,
            )
        return probability, perplexity

    def end_epoch(self) -> None:
        """Append the scores of the epoch that ends to the history."""
        self.history[self.num_epochs] = torch.from_numpy(np.stack(self.pop_scores()))
        self.num_epochs += 1

    def epoch_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(probability [C, N], perplexity [C, N]) of the C epochs that have ended."""
        return tuple(self.history[: self.num_epochs].transpose(0, 1).numpy())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of all processes together, the same on each of them."""
        num_epochs = torch.tensor([self.num_epochs])
        return {"sums": all_reduce_sum(self.sums.clone()), "history": self.history, "num_epochs": num_epochs}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a state; rank 0 takes the sums of all processes."""
        self.sums.copy_(state["sums"] if rank() == 0 else torch.zeros_like(self.sums))
        self.history.copy_(state["history"])
        self.num_epochs = int(state["num_epochs"])


@torch.no_grad()
def score_examples(
    model: Transformer, encoded: Sequence[tuple], micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> tuple[np.ndarray, np.ndarray]:
    """Score each example with one checkpoint. -> (probability, perplexity) of all examples, float64, in the given order

    probability is p_c(i) = (1/N) Σ_n p_c(y_n) and perplexity exp(−(1/N) Σ_n log p_c(y_n)), over the N supervised tokens
    of example i. Under `torchrun` each process scores a part of the examples, and all processes return all scores.
    """
    device = model.head_weight.device
    lengths, num_supervised = count_tokens(encoded)
    if not num_supervised.all():
        raise ValueError(f"example {int((num_supervised == 0).argmax())} (from 0) has no supervised token to score")
    accumulator = ScoreAccumulator(num_supervised, device)
    assignment = balanced_partitions(lengths.tolist(), micro_batch_tokens, world_size())  # as many for each process

    def prepare(examples: list[int]) -> MicroBatch:
        no_pairs = torch.zeros(0)
        return build_micro_batch(encoded, np.array(examples, dtype=np.int64), no_pairs).to(device)

    for micro_batch in prefetch(prepare, assignment[rank() :: world_size()], device):
        accumulator.add(micro_batch.example_index, gold_log_probs(model, micro_batch))
    return accumulator.pop_scores()


# --- Training dynamics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingDynamics:
    """The scores of each example at each checkpoint.

    >>> d = TrainingDynamics(["a"], probability=np.array([[0.25], [0.75]]), perplexity=np.array([[4.0], [2.0]]))
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
        """Population variance over the checkpoints of the gold-token probability: [N]."""
        return self.probability.var(axis=0)

    @property
    def mean_perplexity(self) -> np.ndarray:
        """Mean over the checkpoints of the perplexity: [N]. Its negative is the paper's confidence."""
        return self.perplexity.mean(axis=0)

    def score(self, measure: str) -> np.ndarray:
        """The score to split by, higher for more confident: `probability`, or the paper's `perplexity`. -> [N]"""
        if measure not in ("probability", "perplexity"):
            raise ValueError(f"{measure!r} is no measure of confidence: probability or perplexity")
        # Conf(i) = −(1/C) Σ_c exp(−(1/N) Σ_n log p_c(y_n))
        return self.confidence if measure == "probability" else -self.mean_perplexity

    def save(self, path) -> None:
        """Write JSON lines, one object for each example."""
        names = ("id", "confidence", "variance", "perplexity", "probabilities", "perplexities")
        scores = (self.confidence, self.variance, self.mean_perplexity, self.probability.T, self.perplexity.T)
        columns = self.ids, *(column.tolist() for column in scores)
        write_json_lines(Path(path), (dict(zip(names, record, strict=True)) for record in zip(*columns, strict=True)))

    @classmethod
    def load(cls, path) -> "TrainingDynamics":
        """Read what `save` wrote. FileNotFoundError or ValueError name the file, the line and what is wrong."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: not found; train.py --stage confidence makes it, or confidence.py --checkpoints"
            )
        check_file(path)
        ids, probability, perplexity = [], array("d"), array("d")  # lists would take ten times the memory
        try:
            with open(path, encoding="utf-8-sig") as file:
                for line in file:
                    example_id, probabilities, perplexities = cls._parse_scores(line)
                    if len(probability) != len(ids) * len(probabilities):
                        raise ValueError("not as many checkpoints as in the lines before it")
                    ids.append(example_id)
                    probability.extend(probabilities)
                    perplexity.extend(perplexities)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}:{len(ids) + 1}: not a line of confidence scores ({error!r})") from None
        if not ids:
            raise ValueError(f"{path}: no scores in it")
        # In memory as they were when they were saved: the order of a sum depends on it, and ties depend on the sum.
        columns = (np.array(scores).reshape(len(ids), -1).T for scores in (probability, perplexity))  # [C, N] each
        return cls(ids, *map(np.ascontiguousarray, columns))

    @staticmethod
    def _parse_scores(line: str) -> tuple[str, list[float], list[float]]:
        """(id, probabilities, perplexities) of a line of the file. ValueError, TypeError or KeyError if it is bad."""
        record = json.loads(line)
        probabilities, perplexities = ([float(x) for x in record[name]] for name in ("probabilities", "perplexities"))
        if not isinstance(record["id"], str):
            raise TypeError("id is not a text")
        if not 0 < len(probabilities) == len(perplexities) or not all(map(math.isfinite, probabilities + perplexities)):
            raise ValueError("one finite probability and perplexity a checkpoint is expected")
        return record["id"], probabilities, perplexities

    def select(self, ids: list[str]) -> "TrainingDynamics":
        """The scores of these examples, in this order. ValueError counts the ids without scores and names three."""
        index_of = {example_id: i for i, example_id in enumerate(self.ids)}
        # A repeat, such as a-2, that has no score of its own has that of the first one, a.
        index = [index_of.get(example_id, index_of.get(example_id.partition("-")[0])) for example_id in ids]
        missing = [example_id for example_id, i in zip(ids, index, strict=True) if i is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(ids)} examples have no confidence score (ids {', '.join(missing[:3])}…): "
                "the scores are of other data, or the model that made them had no room for these; "
                "confidence.py --keep 1 writes the records that have scores"
            )
        return TrainingDynamics(ids, self.probability[:, index], self.perplexity[:, index])


# --- The split --------------------------------------------------------------------------------------------------------


def split_by_confidence(scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by confidence and cut at the median: scores [N] -> indices (confident [N // 2], unconfident [N - N // 2]).

    Of examples with the same score, the earlier one counts as more confident.

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


def roc_auc(scores, positive) -> float:
    """Area under the ROC curve: the chance that a positive example scores higher than a negative one, ties count half.

    It is the Mann-Whitney U statistic, divided by the number of pairs.

    >>> roc_auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
    0.75
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    _, rank_of, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[rank_of]  # 1 … N; equal scores have the mean of their ranks
    num_positive, num_negative = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


# --- All checkpoints --------------------------------------------------------------------------------------------------


def score_checkpoints(
    folders,
    dataset: Dataset,
    micro_batch_tokens: int,
    compute_dtype,
    device,
    resume_dir: Path | None = None,
    log: Callable[[dict], None] = log_checkpoint,
) -> TrainingDynamics:
    """Score all examples with each checkpoint, oldest first. `log` receives a record for each one that is scored.

    With `resume_dir`, the scores of each checkpoint are written there, and read if they exist, so that a stopped run
    resumes with the next checkpoint.
    """
    paths = {}
    if resume_dir:
        paths = {folder: resume_dir / f"{n}-{Path(folder).name}.npz" for n, folder in enumerate(folders)}
    cached = on_rank0(lambda: {folder: read_scores(path) for folder, path in paths.items() if path.is_file()})
    models = load_models([folder for folder in folders if folder not in cached], device, compute_dtype)
    scores, start, num_scored = [], time.perf_counter(), 0
    for folder in folders:
        if folder in cached:
            scores.append(cached[folder])
            continue
        scores.append(np.stack(score_examples(next(models), dataset, micro_batch_tokens)))
        if paths and rank() == 0:
            resume_dir.mkdir(parents=True, exist_ok=True)
            with atomic_write(paths[folder]) as tmp, open(tmp, "wb") as file:
                np.savez(file, scores=scores[-1])
        barrier()
        num_scored += 1
        progress = {"done": num_scored, "total": len(folders) - len(cached), "seconds": time.perf_counter() - start}
        log({"checkpoint": str(folder), "probability": scores[-1][0].mean(), **progress})
    return TrainingDynamics(dataset.ids, *(np.stack(column) for column in zip(*scores, strict=True)))


def read_scores(path: Path) -> np.ndarray:
    """The scores of a checkpoint, which were written when it had been scored. ValueError if the file is damaged."""
    try:
        with np.load(path) as file:
            return file["scores"]
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:  # a zip archive has checksums
        raise ValueError(f"{path}: damaged ({error}); remove it, and the checkpoint is scored again") from None


# --- Command line -----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """Parse the command line. Flags that are missing or do not go together are one line on stderr and exit code 2."""
    usage = (
        "%(prog)s --checkpoints DIR ... --data FILE --output FILE [flags]\n"
        "       %(prog)s --scores FILE --data FILE --show N\n"
        "       %(prog)s --scores FILE --data FILE --keep SHARE --output FILE\n"
        "       %(prog)s --scores FILE --plot PNG"
    )
    about = "How confidently a run's checkpoints predict each example of a file."
    parser = ArgumentParser(usage, description=about)
    data, saving = parser.group("data"), parser.group("saving")
    help = "model folders, oldest first (step-N and checkpoint-N are sorted)"
    data.add_argument("--checkpoints", **SEVERAL, metavar="DIR", help=help)
    add_data_flag(parser, "the examples", required=False)
    data.add_argument("--scores", metavar="FILE", help="existing scores, instead of --checkpoints")
    saving.add_argument("--output", metavar="FILE", help="file for the scores, or with --keep for the records kept")
    help = "draw the data map (needs matplotlib); --data names its extremes"
    saving.add_argument("--plot", metavar="PNG", help=help)
    add_selection_flags(parser)
    add_model_flags(parser)
    add_encoding_flags(parser)
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def main(argv=None) -> None:
    """Score the examples of a file with the checkpoints of a run, or show, keep or draw what has scores."""
    args = parse_args(argv)
    with init_distributed(args.device) as device:
        # All that can be wrong with the arguments is found before hours of scoring.
        if args.output is not None:
            check_output_path(args.output)
        if args.plot is not None:
            check_plot_path(args.plot, [args.output, args.scores, *(args.data or ())])
        dynamics = TrainingDynamics.load(args.scores) if args.scores else score_files(args, device)
        if rank() == 0:
            if not args.scores:
                dynamics.save(args.output)
                shutil.rmtree(scores_so_far(args), ignore_errors=True)
            report(dynamics, args)


def score_files(args, device) -> TrainingDynamics:
    """Score the examples of --data with --checkpoints."""
    cache = resolve_cache(args.cache, Path(args.output).parent, sys.stderr)
    checkpoints = oldest_first(args.checkpoints)
    check_models(checkpoints)
    model = checkpoints[0]
    tokenizer, max_length = load_tokenizer(model), resolve_max_length(model, args.max_length)
    template = resolve_template(tokenizer, args.template, sys.stderr)
    dataset = load_dataset(
        args.data, tokenizer, template, max_length, cache, skip_bad_records=args.skip_bad_records, file=sys.stderr
    )
    dtype, log = resolve_dtype(args.dtype, device), partial(log_checkpoint, file=sys.stderr)
    resume_dir = scores_so_far(args) / on_rank0(scoring_digest, checkpoints, dataset, dtype)
    return score_checkpoints(
        checkpoints, dataset, args.micro_batch_tokens, DTYPES[dtype], device, resume_dir=resume_dir, log=log
    )


def scores_so_far(args) -> Path:
    """The folder that holds the scores of the checkpoints of an unfinished run, beside --output."""
    return Path(f"{args.output}.scored")


def scoring_digest(checkpoints: list, dataset: Dataset, dtype: str) -> str:
    """A name for what is scored, another one if a file of a checkpoint, an example or the dtype of matmuls changes."""
    files = [file for folder in checkpoints for file in sorted(Path(folder).iterdir())]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((stats, dtype)).encode())
    digest.update(np.ascontiguousarray(dataset.token_ids))
    digest.update(np.ascontiguousarray(dataset.loss_mask))
    return digest.hexdigest()[:32]


def report(dynamics: TrainingDynamics, args) -> None:
    """Show, keep and draw what is asked for."""
    records, by = None, args.by or "probability"
    if args.data and (args.scores or args.plot is not None):
        records = match_scores(args.data, dynamics.ids, args.skip_bad_records)
    if args.show is not None:
        for text in show_records(records, dynamics, by, args.show, args.most):
            print0(text)
    if args.keep is not None:
        keep_records(records, dynamics, by, args.keep, Path(args.output))
    if args.plot is not None:
        labels = label_records(records, dynamics, by) if records else {}
        plot_data_map(dynamics, split_by_confidence(dynamics.score(by)), by, args.plot, labels)
        print0(f"the data map is in {args.plot}", sys.stderr)


if __name__ == "__main__":
    set_up_process()
    main()
