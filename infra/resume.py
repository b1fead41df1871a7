"""config.json of a run: whether a resumed run, or its next stage, has the settings and files that it began with.

Below, `config` is a `train.TrainConfig`.
"""

import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

from infra.distributed import on_rank0
from infra.files import file_sha256, model_sha256, read_json, write_json
from infra.output import STAGES, load_results, read_config, stages_of
from infra.records import data_checksums

# What a resumed run may change: results depend on it up to rounding at most. Of files, the content is compared.
RESUME_MAY_CHANGE = frozenset(
    """model data eval_data output stage micro_batch_tokens zero_stage activation_checkpointing device compile
    deterministic cache log_every save_every keep_last resume max_skipped dry_run""".split()
)
# Flags that count in a single stage. If stages are started one by one, the others may be given other values.
STAGE_FLAGS = {
    "reference": ("num_checkpoints",),
    "sftmix": ("confidence", "confidence_by", "pairing", "mu", "alpha", "ntp_weight"),
}

RESOLVED = ("max_length", "template", "dtype")  # flags whose defaults depend on the model folder and the device


def continue_config(config):
    """Compare a configuration with that of the run in its output folder, if there is one. -> config, completed from it

    What no flag sets but the earlier run has resolved is taken from it. Raises ValueError for the first flag that has
    another value, if results depend on it.
    """
    before = on_rank0(_config_before, config)
    if not before:
        return config
    resolved = {name: before.get(name) for name in RESOLVED if getattr(config, name) is None}
    try:
        config = replace(config, **resolved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.output}/config.json: changed since it was written ({error})") from None
    may_change = RESUME_MAY_CHANGE | _stage_may_change(config)
    for name in [field.name for field in fields(config) if field.name not in may_change]:
        value, value_before = getattr(config, name), before.get(name)
        if name in RESOLVED and value_before is None:
            continue  # the demo resolves them after its base
        if name == "confidence" and {value, value_before}.isdisjoint((None, "online")):
            continue  # two files of scores, whose content is compared
        if value != value_before:
            raise ValueError(
                f"--{name} {value}: the run in {config.output} was begun with {value_before}, and would become "
                "another one; give it as it was, or choose another --output"
            )
    return config


def begin_run(config) -> None:
    """Write config.json, with checksums of the files that the run reads, and remove results of stages that begin again.

    For rank 0. Flags of other stages stay in config.json as they are. Raises ValueError for the first file whose
    content is not what it was when the run began.
    """
    before = _config_before(config)
    content = before.get("content") if isinstance(before.get("content"), dict) else {}
    checksums = input_checksums(config)
    evaluates = stages_of(config) != ["confidence"]
    # The demo has no data before its base.
    if "data" in content and evaluates and ("eval_data" in checksums) != ("eval_data" in content):
        how, now = ("with", "without") if "eval_data" in content else ("without", "with")
        raise ValueError(
            f"--eval_data: the run in {config.output} was begun {how} it, and models evaluated {now} it would not be "
            "compared; give it as it was, and evaluate others with eval.py"
        )
    for name, checksum in checksums.items():
        if checksum != content.get(name, checksum) and name not in _stage_may_change(config):
            raise ValueError(
                f"--{name} {getattr(config, name)}: is not what it was when the run in {config.output} began; "
                "bring its content back, or choose another --output"
            )
    others = [name for stage, names in STAGE_FLAGS.items() if stage not in stages_of(config) for name in names]
    kept = {name: before[name] for name in others if name in before}
    write_json(Path(config.output) / "config.json", asdict(config) | kept | {"content": content | checksums})
    forget_results(config)


def _config_before(config) -> dict:
    """The config.json that this run continues, resumed or by another stage; {} for a new run."""
    output = Path(config.output)
    return read_config(output) if config.resume or has_begun(output) else {}


def has_begun(output: Path) -> bool:
    """Whether a stage has left something in the folder: what it makes, a result or a savepoint."""
    made = any((output / stage.path).exists() for stage in STAGES.values())
    return made or bool(load_results(output)) or any((output / "resume").glob("*"))


def forget_results(config) -> None:
    """Remove the results of the stages that begin now, if the run is not resumed.

    The scores that a reference run or an online run has made are no longer those of the one that begins. The same
    holds for those of single checkpoints, which an unfinished confidence stage has kept.
    """
    if config.resume:
        return
    results = load_results(Path(config.output))
    begins = {STAGES[stage].result for stage in stages_of(config)}
    if "ntp" in begins:
        shutil.rmtree(Path(config.output) / "resume" / "confidence", ignore_errors=True)
    of_online_run = results.get("confidence", {}).get("online", False)
    if config.online or ("ntp" in begins and not of_online_run):
        begins.add("confidence")
    if begins & results.keys():
        kept = {name: entry for name, entry in results.items() if name not in begins}
        write_json(Path(config.output) / "results.json", kept)


def _stage_may_change(config) -> set:
    """The flags that may differ: those of other stages and, without --resume, those of all stages, which begin now."""
    resumed = stages_of(config) if config.resume else []
    return {name for stage, names in STAGE_FLAGS.items() if stage not in resumed for name in names}


def check_model_unchanged(config) -> None:
    """ValueError if the base is not what it was when the run began: two models that are compared start from one."""
    checksums = read_json(Path(config.output) / "config.json")["content"]
    if model_sha256(config.model) != checksums["model"]:
        raise ValueError(f"{config.model}: is not what it was when the run began; bring its content back, and --resume")


def check_scores(config) -> None:
    """ValueError if the scores in the output folder are not those that its confidence stage has written."""
    file = Path(config.output) / "confidence.jsonl"
    if not file.exists():
        return
    entry = load_results(Path(config.output)).get("confidence", {})
    if entry.get("online"):
        what = "holds the scores of a run with --confidence online"
    elif not entry:
        what = "is not recorded as made from this reference run"
    elif "sha256" in entry and file_sha256(file) != entry["sha256"]:
        what = "is not what the confidence stage has written"
    else:
        return
    raise ValueError(
        f"{file}: {what}; give it as --confidence {file} if it is meant, or remove it, and --stage confidence makes it"
    )


def input_checksums(config) -> dict:
    """Checksums of the files that a run reads."""
    checksums = {"model": model_sha256, "data": data_checksums, "eval_data": data_checksums}
    if not config.online and "sftmix" in stages_of(config):
        checksums["confidence"] = file_sha256
    return {name: of(getattr(config, name)) for name, of in checksums.items() if getattr(config, name) is not None}
