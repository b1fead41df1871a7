"""The output folder of a run: the names in it, its lock, results.json, saved models.

Below, `config` is a `train.TrainConfig`.
"""

import contextlib
import glob
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import Dataset, steps_per_epoch
from infra.demo import least_confident
from infra.device import DTYPES
from infra.distributed import on_rank0, print0, rank, wait_for_rank0
from infra.files import is_run_config, read_json, write_json, write_json_lines
from infra.hf import check_models, oldest_first, save_adapter, save_model
from infra.locks import file_lock
from infra.metrics import StagePosition, log_step
from infra.savepoints import Savepoints, check_finite
from model import Transformer
from tokenizer import Tokenizer


class Stage(NamedTuple):
    """The names of a stage in the output."""

    path: str  # what it writes in the output folder
    result: str  # its entry in results.json; the reference run is the NTP that SFTMix is compared with
    title: str | None  # its row in the table


STAGES = {
    "base": Stage("base", "base", "base"),
    "reference": Stage("reference", "ntp", "NTP"),
    "confidence": Stage("confidence.jsonl", "confidence", None),
    "sftmix": Stage("sftmix", "sftmix", "SFTMix"),
}


@contextlib.contextmanager
def lock_output(folder: Path):
    """Hold the lock on an output folder, which is created if it is missing. FileExistsError if another run holds it."""
    if rank() != 0:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    try:
        with file_lock(path, f"{folder}: another run is at work there; wait for it, or choose another"):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: the run has made something
                folder.rmdir()


def read_config(output: Path) -> dict:
    """What config.json in an output folder says, {} without one."""
    file = output / "config.json"
    return read_json(file) if file.is_file() else {}


def check_output(config) -> None:
    """Raise ValueError or FileExistsError if a run would write over files that no run has written, or read its own."""
    output, data = Path(config.output), []
    for given in (config.data, config.eval_data):
        data += given if isinstance(given, tuple) else [given] if given else []
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"--output {output}: is not a folder; choose another")
    if config.model is not None and output.resolve() == Path(config.model).resolve():
        raise ValueError(f"--output {output}: is the model's own folder; choose another")
    if any(may_hold_data(name, output) for name in data):
        raise ValueError(f"--output {output}: is the folder of the data, of which the output would become a part")
    before = read_config(output)
    is_of_a_run = is_run_config(before)
    names = ["config.json", "metrics.jsonl", "results.json", "skipped.jsonl", *paths_of(config)]
    others = [] if is_of_a_run else [name for name in names if (output / name).exists()]
    if (output / "lock").is_file() and (output / "lock").stat().st_size:  # that of a run is empty
        others.append("lock")
    is_of_the_demo = is_of_a_run and (before.get("model") is None or (output / "data" / "wrong.json").exists())
    if config.model is None and (output / "data").exists() and not is_of_the_demo:
        others.append("data")
    if others:
        raise FileExistsError(f"{output / others[0]}: already there, and not written by a run; choose another --output")


def may_hold_data(name: str, folder: Path) -> bool:
    """Whether files that a run makes in `folder` would be among those of `name`, a data folder or a pattern."""
    if Path(name).is_file():
        return False
    root, *rest = (Path(name), "*") if Path(name).is_dir() else _split_pattern(name)
    if not folder.resolve().is_relative_to(root.resolve()):
        return False
    return "**" in rest or len(folder.resolve().relative_to(root.resolve()).parts) < len(rest)


def _split_pattern(pattern: str) -> tuple:
    """The folder that a pattern starts in, and its other parts: a/b/*/c.json -> a/b, *, c.json"""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed]), *parts[fixed:]


def save_skipped(output: Path, *datasets: Dataset | None) -> None:
    """List the records that were left out, if there are any, with place and reason, in `skipped.jsonl`. For rank 0."""
    if skipped := [bad._asdict() for dataset in datasets if dataset for bad in dataset.bad_records]:
        write_json_lines(output / "skipped.jsonl", skipped)


def check_not_started(config) -> None:
    """Raise FileExistsError if the output folder holds something of the stages of this run, or savepoints of them."""
    output = Path(config.output)
    for name in paths_of(config):
        if (output / name).exists():
            raise FileExistsError(
                f"{output / name}: already there; --resume resumes the run, or choose another --output"
            )
    if any(any((output / "resume").glob(f"{stage}*")) for stage in stages_of(config)):
        raise FileExistsError(
            f"{output}/resume: a run was stopped here; --resume resumes it, or choose another --output"
        )
    if stages_of(config) == ["reference"] and splits_by_own_scores(output):
        if stopped := sorted((output / "resume").glob("sftmix*")):
            raise FileExistsError(
                f"{stopped[0]}: of a stopped SFTMix run, whose split would change; finish it first by --stage sftmix "
                "--resume, or remove it"
            )
        if (output / "sftmix").exists():
            raise FileExistsError(
                f"{output}/sftmix: was split by the scores of an earlier reference run; move it away, or choose "
                "another --output"
            )


def splits_by_own_scores(output: Path) -> bool:
    """Whether an SFTMix run in this folder is split by the scores of the reference run in it, as config.json says."""
    config = read_config(output)
    return config.get("confidence") is None and config.get("pairing", "confidence") == "confidence"


# --- Stages -----------------------------------------------------------------------------------------------------------


def stages_of(config) -> list[str]:
    """The stages of a run, in order, finished ones included."""
    if config.stage != "all":
        return [config.stage]
    if config.online:
        return ["base", "sftmix"]
    if config.confidence is not None:  # the reference run is still made, to compare with
        return ["base", "reference", "sftmix"]
    return list(STAGES)


def paths_of(config) -> list[str]:
    """What the stages of a run write in the output folder."""
    stages = stages_of(config)
    online_scores = ["confidence"] if config.online and "sftmix" in stages else []
    return [STAGES[stage].path for stage in [*stages, *online_scores]]


def stages_to_run(config) -> list[str]:
    """The stages asked for; for a resumed run, those of them that are not finished.

    Raises FileExistsError if a run that is not resumed finds something of these stages in the output folder.
    """
    stages = stages_of(config)
    if not config.resume:
        on_rank0(check_not_started, config)
        return stages
    results = on_rank0(load_results, Path(config.output))
    finished = [stage for stage in stages if STAGES[stage].result in results]
    for stage in finished:
        stage_savepoints(config, stage).clear()  # it may have been killed before it did so
        path = Path(config.output) / STAGES[stage].path
        if stage != "base" and not on_rank0(path.exists):
            print0(
                f"warning: {path}: is gone, though its stage is finished; --stage {stage} makes it again", sys.stderr
            )
    return [stage for stage in stages if stage not in finished]


def stage_position(config, stage: str, inputs=None) -> StagePosition:
    """Where a stage is in the run and, from the `infra.inputs.Inputs`, how much work follows its training or scoring.

    Work is counted in tokens times passes. Training takes a forward pass and a backward pass, which counts as two where
    the weights get gradients, and another pass if blocks are recomputed. Scoring takes a pass for each checkpoint, and
    evaluation takes one. Saving, and generating answers to evaluate a model, are left out.
    """
    stages = stages_of(config)
    index = stages.index(stage)
    if inputs is None:
        return StagePosition(stage, index + 1, len(stages))
    num_tokens = int(inputs.train.lengths.sum())
    evaluation = int(inputs.held_out.lengths.sum()) if inputs.held_out else 0
    total_steps = config.epochs * steps_per_epoch(len(inputs.train), config.batch_size)
    training = config.epochs * num_tokens * (2 + (not config.lora_rank) + config.activation_checkpointing)
    scoring = min(config.num_checkpoints, total_steps) * num_tokens
    work = {"reference": training, "confidence": scoring, "sftmix": training}
    whole = sum(work[name] + (0 if name == "confidence" else evaluation) for name in stages[index:])
    return StagePosition(stage, index + 1, len(stages), whole / work[stage] - 1)


# --- Results ----------------------------------------------------------------------------------------------------------


def load_results(output: Path) -> dict:
    """The entries of `results.json`, one for each finished stage. ValueError if it was changed."""
    file = output / "results.json"
    results = read_json(file) if file.is_file() else {}
    if not all(isinstance(entry, dict) and isinstance(entry.get("checkpoints", 1), int) for entry in results.values()):
        raise ValueError(f"{file}: changed since it was written (an entry is of the wrong kind)")
    return results


def record_stage(config, stage: str, entry: dict) -> None:
    """Write the results of a stage, which finishes it, and remove its savepoints."""
    if rank() == 0:
        results = load_results(Path(config.output)) | {STAGES[stage].result: entry}
        write_json(Path(config.output) / "results.json", results)
    stage_savepoints(config, stage).clear()


def stage_savepoints(config, stage: str) -> Savepoints:
    """The savepoints of a stage."""
    return Savepoints(Path(config.output), stage, config.save_every, config.keep_last)


def stage_log(config, stage: str, inputs=None) -> Callable[[dict], None]:
    """The `log` of `train.train` for a stage: it prints records and appends them to metrics.jsonl."""
    return partial(log_step, Path(config.output) / "metrics.jsonl", stage_position(config, stage, inputs))


def print_report(config) -> None:
    """Print the table, how well low confidence finds wrong answers, where everything is, and what to run next."""
    output, demo = Path(config.output), config.model is None
    results = load_results(output)
    try:
        rows = {
            stage.title: results[stage.result] for stage in STAGES.values() if stage.title and stage.result in results
        }
        report = "\n" + results_table(rows) + "\n"
        for name, area in results.get("confidence", {}).get("roc_area", {}).items():
            report += (
                f"\nLow confidence by {name} finds the wrong answers with an area under the ROC curve of {area:.3f}."
            )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{output}/results.json: changed since it was written ({error})") from None
    print0(report)  # outside the `try`, since an encoding error is a ValueError
    if demo:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # only something to look at
            print0(least_confident(output) + "\n")
    made = ("data", *(stage.path for stage in STAGES.values()), "config.json", "metrics.jsonl", "results.json")
    print0(f"In {output}/ now: {', '.join(name for name in made if (output / name).exists())}")
    if (output / "confidence.jsonl").exists():
        files = f"{output}/data/train.jsonl" if demo else config.data
        files = shlex.join([files] if isinstance(files, str) else files)
        files += " --skip_bad_records" * config.skip_bad_records
        look = f"python confidence.py --scores {shlex.quote(f'{output}/confidence.jsonl')} --data {files}"
        print0(f"The least confident examples:  {look} --by perplexity --show 20")
        print0(f"The data map:  {look} --by {config.confidence_by} --plot map.png")
    if demo:
        print0("The real thing:  torchrun train.py --model DIR --data FILE --eval_data FILE --output DIR")


def results_table(results: dict[str, dict]) -> str:
    """A table with a row for each model: name -> the result of `evaluate` and the `seconds` of training."""

    def cell(result: dict, name: str, spec: str) -> str:
        if result.get(name) is None:
            return "–"
        interval = result[f"{name}_interval"]  # None for a single example
        return f"{result[name]:{spec}}" + (f" [{interval[0]:{spec}}, {interval[1]:{spec}}]" if interval else "")

    lines = [f"{'':8}{'held-out loss [95 %]':>26}{'exact match [95 %]':>26}{'training':>11}"]
    for name, result in results.items():
        seconds = "–" if result.get("seconds") is None else f"{result['seconds']:,.0f} s"
        lines.append(f"{name:8}{cell(result, 'loss', '.4f'):>26}{cell(result, 'accuracy', '.1%'):>26}{seconds:>11}")
    return "\n".join(lines)


# --- Models -----------------------------------------------------------------------------------------------------------


def save_checkpoint(model: Transformer, path: Path, tokenizer: Tokenizer, config) -> None:
    """Save a model, on all processes together. A model that is there already, from before a restart, stays."""
    if on_rank0((path / "config.json").exists):
        return
    check_finite(model)
    save_model(model, path, tokenizer.files_for(config.template), DTYPES[config.save_dtype])
    wait_for_rank0()


def save_result(model: Transformer, path: Path, tokenizer: Tokenizer, config) -> None:
    """Save the final model of a stage. With LoRA, the adapters are merged into it and saved beside it too."""
    if config.lora_rank and not on_rank0((path / "adapter").exists):
        save_adapter(model, path / "adapter", config.model)
    save_checkpoint(model, path, tokenizer, config)


def reference_checkpoints(config) -> list[Path]:
    """The checkpoints of a finished reference run, oldest first. Raises FileNotFoundError if some are missing."""
    reference = Path(config.output) / "reference"
    if not (reference / "config.json").exists():
        raise FileNotFoundError(f"{reference}: no finished reference run there; --stage reference makes one")
    folders = [f for f in (reference / "checkpoints").glob("step-*") if f.name.removeprefix("step-").isdecimal()]
    made = load_results(Path(config.output)).get("ntp", {}).get("checkpoints", 1)
    if len(folders) < made:
        raise FileNotFoundError(
            f"{reference}/checkpoints: {len(folders)} of {made} checkpoints left; --stage reference makes them, or "
            "confidence.py scores those that are left"
        )
    check_models([config.model, *folders])
    return oldest_first(folders)
