"""How fast this project is, side by side with what users would otherwise take; all of it is in docs/benchmarks.md.

    python benchmarks/speed.py training --tokenizer FILE --data FILE --peers PYTHON    against TRL and `transformers`
    python benchmarks/speed.py loss                                                    the loss alone
    python benchmarks/speed.py recipe --tokenizer FILE --data FILE                     three epochs of NTP, and SFTMix
    python benchmarks/speed.py data --tokenizer FILE --data FILE                       encoding, and growth with size
    python benchmarks/speed.py report                                                  the tables and the picture

FILE is a SentencePiece model of 32,000 pieces (Llama 2's) and a file of Alpaca's records. Each measurement is a line in
docs/benchmarks.jsonl. What is compared is measured by turns, `--rounds` times (5), after one round that does not count.
How to make the peers' environment is said in benchmarks/peers.py.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from confidence import score_examples
from data import Dataset, epoch_order, load_examples, pack
from infra.cache import encode_files, load_dataset
from infra.device import DTYPES
from infra.hf import load_model, load_tokenizer, save_model
from mixup import sftmix_loss, sftmix_loss_literal
from model import ModelConfig, Transformer, VarlenMetadata, varlen_attention
from tokenizer import Tokenizer
from train import Sampler, TrainConfig, ntp_sampler, train
from train import main as train_main

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks.jsonl"
LLAMA_15M = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
             "num_attention_heads": 6, "max_position_embeddings": 2048, "tie_word_embeddings": True}  # fmt: skip
BATCH_SIZE = 32


def note(what: str, **values) -> None:
    """Keep a measurement, and show it."""
    line = json.dumps({"what": what, **values})
    print(line, flush=True)
    with open(RESULTS, "a") as file:
        file.write(line + "\n")


def make_model(folder: Path, tokenizer: str) -> None:
    """A Llama of 15 million random parameters."""
    torch.manual_seed(0)
    files = Tokenizer.from_pretrained(tokenizer).files_for("alpaca")
    save_model(Transformer(ModelConfig(**LLAMA_15M)), folder / "model", files)


# --- Training steps ---------------------------------------------------------------------------------------------------


class Contender:
    """A process that measures on request; it waits while the others are at work."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request) -> dict:
        """Have it do what `request` says: -> {"tokens", "seconds"}"""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def ours(folder: Path) -> None:
    """Answer requests as benchmarks/peers.py does."""
    rows = [json.loads(row) for row in (folder / "examples.jsonl").read_text().splitlines()]
    encoded = []
    for row in rows:
        ids, loss_mask = torch.tensor(row["input_ids"]).int(), torch.tensor(row["completion_mask"]).bool()
        encoded.append((ids[:-1], ids[1:].masked_fill(~loss_mask[1:], -100)))
    models = {}
    for line in sys.stdin:
        request = json.loads(line)
        what, dtype, steps = request["what"], request["dtype"], request["steps"]
        dataset = Dataset.from_encoded(encoded[: steps * BATCH_SIZE])
        key = dtype, "compiled" in what
        if key not in models:
            models[key] = load_model(folder / "model", compute_dtype=DTYPES[dtype])
            if "compiled" in what:
                models[key].compile_blocks()
        tokens = int(dataset.lengths.sum())
        if what == "scoring":
            began = time.perf_counter()
            score_examples(models[key], dataset)
            seconds = time.perf_counter() - began
        else:
            config = TrainConfig(batch_size=BATCH_SIZE, epochs=1, lr=1e-4, dtype=dtype, log_every=1000)
            order, mix = np.arange(len(dataset)), "sftmix" in what  # the order of the peers
            sampler = Sampler(lambda epoch, order=order: order, num_ntp_epochs=0 if mix else 1)
            seconds = train(models[key], dataset, config, sampler, lambda record: None)["seconds"]
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


# who measures, what, with which settings
CONTENDERS = {
    "NTP": ("ours", "ntp", {}),
    "SFTMix": ("ours", "sftmix", {}),
    "SFTMix, --compile": ("ours", "sftmix compiled", {}),
    "scoring": ("ours", "scoring", {}),
    "TRL": ("peers", "trl", {}),
    "TRL, packing": ("peers", "trl", {"packing": True, "per_device_train_batch_size": 4}),
    "transformers loop": ("peers", "bare", {}),
    "literal SFTMix": ("peers", "literal", {}),
}


def training(args, folder: Path) -> None:
    """Steps of 32 examples: ours, and the peers'."""
    make_model(folder, args.tokenizer)
    tokenizer = load_tokenizer(folder / "model")
    with open(folder / "examples.jsonl", "w") as file:
        for example in load_examples(args.data)[: 2 * BATCH_SIZE]:
            ids, loss_mask = tokenizer.render_conversation(example.messages, "alpaca")
            file.write(json.dumps({"input_ids": ids, "completion_mask": list(map(int, loss_mask))}) + "\n")
    processes = {"ours": Contender(sys.executable, __file__, "ours", folder)}
    if args.peers:
        processes["peers"] = Contender(args.peers, ROOT / "benchmarks" / "peers.py", folder)
    for number in range(args.rounds + 1):
        for dtype in ("fp32", "bf16"):
            for name, (who, what, settings) in CONTENDERS.items():
                if who not in processes or (dtype == "bf16" and name in ("TRL, packing", "literal SFTMix")):
                    continue
                answer = processes[who].ask(what=what, dtype=dtype, steps=2, settings=settings)
                if number > 0:
                    note("training", name=name, dtype=dtype, round=number, rate=answer["tokens"] / answer["seconds"])


# --- The loss alone ---------------------------------------------------------------------------------------------------


def loss(args, folder: Path) -> None:
    """Forward and backward of the loss, fast and literal; and at a large vocabulary its peak memory."""
    from benchmarks.scaling import peak_of

    torch.manual_seed(0)
    for S, D, V, dtypes in ((2048, 288, 32000, ("fp32", "bf16")), (4096, 64, 128256, ("fp32",))):
        hidden, weight = torch.randn(S, D).requires_grad_(), (torch.randn(V, D) / 20).requires_grad_()
        targets, rows, M = torch.randint(V, (S,)), torch.randperm(S), int(0.35 * S)
        given = hidden, weight, targets, rows[:M], rows[M : 2 * M], torch.rand(M), 0.2

        def once(form, dtype, given=given):
            given[0].grad = given[1].grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                value = form(*given)[0]
            value.backward()

        for dtype in dtypes:
            forms = {"fast": sftmix_loss, "literal": sftmix_loss_literal}
            if V > 100_000:
                for name, form in forms.items():
                    note("loss memory", name=name, S=S, V=V, bytes=peak_of(partial(once, form, dtype)))
                continue
            for number in range(args.rounds + 1):
                for name, form in forms.items():
                    began = time.perf_counter()
                    once(form, dtype)
                    if number > 0:
                        note("loss", name=name, dtype=dtype, round=number, seconds=time.perf_counter() - began)


# --- The whole recipe -------------------------------------------------------------------------------------------------


def recipe(args, folder: Path) -> None:
    """Three epochs over 192 examples: NTP alone, the whole recipe, SFTMix in one run."""
    make_model(folder, args.tokenizer)
    with open(args.data, encoding="utf-8") as file:
        (folder / "data.jsonl").write_text("".join(next(file) for _ in range(192)))
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--max_length", "1024"]
    given += ["--lr", "1e-4", "--cache", str(folder / "cache"), "--log_every", "1000"]
    runs = {
        "NTP": ["--stage", "reference"],
        "recipe": ["--stage", "all"],
        "online": ["--confidence", "online"],
    }
    for number in range(args.rounds + 1):
        for name, flags in runs.items():
            if number == 0 and name != "NTP":  # warm-up
                continue
            output = folder / "run"
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                train_main([*given, *flags, "--output", str(output)])
            if number > 0:
                note("recipe", name=name, round=number, seconds=time.perf_counter() - began)
            shutil.rmtree(output)


# --- Data, and growth -------------------------------------------------------------------------------------------------


def data(args, folder: Path) -> None:
    """Encoding from cold, opening a million encoded examples, and what size does to the time of a token."""
    make_model(folder, args.tokenizer)
    tokenizer = load_tokenizer(folder / "model")
    files = {size: folder / f"{size}.jsonl" for size in (1_000, 100_000, 1_000_000)}
    records = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").split("\n") if line]
    for size, path in files.items():  # no two records alike
        with open(path, "w", encoding="utf-8") as file:
            for i in range(size):
                record = records[i % len(records)]
                file.write(json.dumps(record | {"instruction": f"{record['instruction']} ({i})"}) + "\n")
    for number in range(1, args.rounds + 1):
        began = time.perf_counter()
        encode_files(files[100_000], tokenizer, "alpaca", 1024, folder / f"cold-{number}")
        note("encoding", round=number, examples_per_minute=6e6 / (time.perf_counter() - began))
    with contextlib.redirect_stdout(io.StringIO()):
        datasets = {s: load_dataset(files[s], tokenizer, "alpaca", 1024, folder / "cache") for s in files}
    for number in range(1, args.rounds + 1):
        done = subprocess.run([sys.executable, __file__, "warm", folder], stdout=subprocess.PIPE, text=True, check=True)
        note("warm start", round=number, **json.loads(done.stdout.splitlines()[-1]))

    model = load_model(folder / "model")
    config = TrainConfig(batch_size=BATCH_SIZE, epochs=1, lr=1e-4, dtype="fp32", log_every=1)
    for number in range(args.rounds + 1):
        for size in (1_000, 100_000):
            microseconds = []

            def log(record, microseconds=microseconds):
                microseconds.append(1e6 / record["tokens_per_second"])
                if len(microseconds) == 5:
                    raise StopIteration

            with contextlib.suppress(StopIteration, RuntimeError):
                train(model, datasets[size], config, ntp_sampler(datasets[size], config), log)
            if number > 0:
                note("growth, examples", examples=size, round=number, microseconds=statistics.median(microseconds))
        for length in (128, 2048):
            examples = 16384 // length
            ids = torch.randint(3, 32000, (examples, length + 1)).int()
            targets = ids[:, 1:].clone()
            targets[:, : length // 2] = -100
            dataset = Dataset.from_encoded(list(zip(ids[:, :-1], targets, strict=True)))
            settings = TrainConfig(batch_size=examples // 4, epochs=1, lr=1e-4, dtype="fp32", log_every=99)
            seconds = train(model, dataset, settings, ntp_sampler(dataset, settings), lambda record: None)["seconds"]
            attention = attention_seconds(model.config, length) * 16384 / length
            if number > 0:
                note("growth, length", length=length, round=number, microseconds=1e6 * seconds / 16384,
                     attention=1e6 * attention / 16384)  # fmt: skip


def attention_seconds(config: ModelConfig, length: int) -> float:
    """What attention takes for one example of so many tokens, forward and backward, in all layers."""
    q, k, v = (torch.randn(length, config.num_attention_heads, config.head_dim).requires_grad_() for _ in range(3))
    bounds = torch.tensor([0, length])
    row = VarlenMetadata(None, None, None, bounds, bounds, max_seqlen=length)
    began = time.perf_counter()
    for _ in range(config.num_hidden_layers):
        varlen_attention(q, k, v, row).sum().backward()
    return time.perf_counter() - began


def warm(folder: Path) -> None:
    """Open a million encoded examples, as a second run does, and fetch a batch."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(folder / "model")
    dataset = load_dataset(folder / "1000000.jsonl", tokenizer, "alpaca", 1024, folder / "cache")
    pack([dataset[i] for i in epoch_order(len(dataset), 0, 0)[:BATCH_SIZE]])
    seconds = time.perf_counter() - began
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "resident_megabytes": kilobytes * 1024 / 1e6}))


# --- Tables and picture -----------------------------------------------------------------------------------------------


def spread(values: list[float], form: str = ".2f") -> str:
    """A median, and between which values it lies."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(args, folder: Path) -> None:
    """Print the tables of docs/benchmarks.md from docs/benchmarks.jsonl, and draw docs/benchmarks.png."""
    notes = [json.loads(line) for line in RESULTS.read_text().splitlines()]

    def of(what: str, value: str, **fixed) -> list[float]:
        """Values of a measurement by round."""
        return [n[value] for n in notes if n["what"] == what and all(n.get(k) == v for k, v in fixed.items())]

    def ratios(one: list[float], other: list[float]) -> list[float]:
        return [a / b for a, b in zip(one, other, strict=True)]

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}\n")
    print("| tokens/s | fp32 | ours over it | bf16 | ours over it |\n|---|---|---|---|---|")
    for name, (who, _, _) in CONTENDERS.items():
        cells = []
        for dtype in ("fp32", "bf16"):
            rates = of("training", "rate", name=name, dtype=dtype)
            base = of("training", "rate", name="SFTMix" if name == "literal SFTMix" else "NTP", dtype=dtype)
            ratio = spread(ratios(base, rates)) if rates and who == "peers" else ""
            cells += [spread(rates, ",.0f") if rates else "not run", ratio]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| ratio, by rounds | fp32 | bf16 |\n|---|---|---|")
    for one, other in (("SFTMix", "NTP"), ("SFTMix, --compile", "SFTMix"), ("scoring", "NTP")):
        cells = [
            spread(ratios(*(of("training", "rate", name=name, dtype=dtype) for name in (one, other))))
            for dtype in ("fp32", "bf16")
        ]
        print(f"| {one} over {other} | {' | '.join(cells)} |")
    cells = [
        spread(ratios(*(of("loss", "seconds", name=name, dtype=dtype) for name in ("literal", "fast"))))
        for dtype in ("fp32", "bf16")
    ]
    print(f"| the loss, literal over fast, V = 32,000 | {' | '.join(cells)} |")
    peaks = [of("loss memory", "bytes", name=name)[-1] / 1e6 for name in ("fast", "literal")]
    print(f"\nThe loss at S = 4,096, V = 128,256: {peaks[0]:,.0f} MB fast, {peaks[1]:,.0f} MB literal, ", end="")
    print(f"{peaks[0] / peaks[1]:.3f} of it.\n")

    print("| seconds | | over NTP |\n|---|---|---|")
    for name in ("NTP", "recipe", "online"):
        seconds = of("recipe", "seconds", name=name)
        ratio = ratios(seconds, of("recipe", "seconds", name="NTP"))
        print(f"| {name} | {spread(seconds, '.1f')} | {spread(ratio)} |")
    print(f"\nEncoding, examples a minute: {spread(of('encoding', 'examples_per_minute'), ',.0f')}")
    print(f"Opening 1,000,000 encoded, without comparing checksums: {spread(of('warm start', 'seconds'))} s, ", end="")
    print(f"{spread(of('warm start', 'resident_megabytes'), '.0f')} MB")
    sizes = [of("growth, examples", "microseconds", examples=size) for size in (1_000, 100_000)]
    print(f"A token's time with 100,000 examples over that with 1,000: {spread(ratios(*sizes[::-1]))}")
    whole, attention = (
        [of("growth, length", key, length=n) for n in (128, 2048)] for key in ("microseconds", "attention")
    )
    print(f"With 2,048 tokens an example over that with 128: {spread(ratios(*whole[::-1]))}", end="")
    rest = [[a - b for a, b in zip(*both, strict=True)] for both in zip(whole, attention, strict=True)]
    print(f"; without attention {spread(ratios(*rest[::-1]))}")
    picture(of)


def picture(of) -> None:
    """Draw tokens a second, and what SFTMix costs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
    names = ["NTP", "SFTMix", "transformers loop", "literal SFTMix", "TRL, packing", "TRL"]
    rates = [of("training", "rate", name=name, dtype="fp32") for name in names]
    cost = ["NTP", "online", "recipe"]
    seconds = [of("recipe", "seconds", name=name) for name in cost]
    colours = ["#2a6f97", "#2a6f97", "#a0a0a0", "#a0a0a0", "#a0a0a0", "#a0a0a0"]
    labels = ["NTP (ours)", "SFTMix (ours)", *names[2:]]
    for axes, tags, values, tint in (
        (left, labels, rates, colours),
        (right, ["NTP, 3 epochs", "SFTMix online", "whole recipe"], seconds, ["#a0a0a0", "#2a6f97", "#2a6f97"]),
    ):
        medians = [statistics.median(v) for v in values]
        errors = [[m - min(v) for m, v in zip(medians, values)], [max(v) - m for m, v in zip(medians, values)]]  # noqa: B905
        axes.barh(tags, medians, xerr=errors, color=tint, error_kw={"lw": 1, "capsize": 2})
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="tokens a second", title="Training: 15M Llama, Alpaca, batch 32, float32, 2 CPU cores")
    right.set(xlabel="seconds", title="What SFTMix costs")
    figure.savefig(ROOT / "docs" / "benchmarks.png", dpi=150)


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["warm"]):
        {"ours": ours, "warm": warm}[sys.argv[1]](Path(sys.argv[2]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "loss", "recipe", "data", "report"))
    parser.add_argument("--tokenizer", help="a SentencePiece model")
    parser.add_argument("--data", help="Alpaca's records, .jsonl")
    parser.add_argument("--peers", help="the Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what in ("training", "recipe", "data") and None in (arguments.tokenizer, arguments.data):
        parser.error("--tokenizer and --data are needed")
    with tempfile.TemporaryDirectory() as temporary:
        {"training": training, "loss": loss, "recipe": recipe, "data": data, "report": report}[arguments.what](
            arguments, Path(temporary)
        )
