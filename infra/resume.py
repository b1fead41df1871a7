"""Whether a run that is resumed, or goes on stage by stage, is still the same run: config.json in the output folder.

Below, `config` is a `train.TrainConfig`.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

from infra.distributed import rank
from infra.files import read_json, sha256_of, write_json
from infra.output import load_results
from infra.records import data_checksums

# What a resumed run may change: results depend on it up to rounding at most. Of files, the content is compared.
RESUME_MAY_CHANGE = frozenset(
    """model data eval_data output stage micro_batch_tokens zero_stage activation_checkpointing device compile
    deterministic cache log_every save_every keep_last resume max_skipped dry_run""".split()
)
# Stages of a run that are started one by one may also differ in these, each of which counts in a single stage.
STAGE_MAY_CHANGE = frozenset("confidence confidence_by pairing mu alpha ntp_weight num_checkpoints".split())

RESOLVED = ("max_length", "template", "dtype")  # flags whose defaults depend on the model folder and the device


def continue_config(config):
    """Compare a configuration with that of the run in its output folder, if there is one. -> config, completed from it

    What no flag sets but the earlier run has resolved is taken from it. Raises ValueError for the first flag that has
    another value, if results depend on it.
    """
    before = _config_before(config)
    if not before:
        return config
    resolved = {name: before.get(name) for name in RESOLVED if getattr(config, name) is None}
    try:
        config = replace(config, **resolved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.output}/config.json: changed since it was written ({error})") from None
    may_change = RESUME_MAY_CHANGE | _stage_may_change(config)
    for field in fields(config):
        value = getattr(config, field.name)
        is_open = field.name in RESOLVED and before.get(field.name) is None  # the demo resolves them after its base
        if field.name not in may_change and value != before.get(field.name) and not is_open:
            raise ValueError(
                f"--{field.name} {value}: the run in {config.output} was begun with {before.get(field.name)}, and "
                "would become another one; give it as it was, or choose another --output"
            )
    return config


def record_config(config) -> None:
    """Write config.json, with checksums of the files that the run reads.

    Raises ValueError for the first of them whose content is not what it was when the run began.
    """
    if rank() != 0:
        return
    before = _config_before(config).get("content")
    before = before if isinstance(before, dict) else {}
    checksums = input_checksums(config)
    for name, checksum in checksums.items():
        if checksum != before.get(name, checksum) and name not in _stage_may_change(config):
            raise ValueError(
                f"--{name} {getattr(config, name)}: is not what it was when the run in {config.output} began; "
                "bring its content back, or choose another --output"
            )
    write_json(Path(config.output) / "config.json", asdict(config) | {"content": before | checksums})


def _config_before(config) -> dict:
    """What config.json says of the run that goes on: resumed, or by another of its stages. Empty for a new run."""
    file = Path(config.output) / "config.json"
    goes_on = file.is_file() and (config.resume or load_results(Path(config.output)))
    return read_json(file) if goes_on else {}


def _stage_may_change(config) -> frozenset:
    """The flags that may differ without --resume, because the run goes on with another stage than they count in."""
    return frozenset() if config.resume else STAGE_MAY_CHANGE


def check_model_unchanged(config) -> None:
    """ValueError if the base is not what it was when the run began: two models that are compared start from one."""
    if rank() == 0:
        checksums = read_json(Path(config.output) / "config.json")["content"]
        if sha256_of(config.model) != checksums["model"]:
            raise ValueError(
                f"{config.model}: is not what it was when the run began; bring its content back, and --resume"
            )


def input_checksums(config) -> dict:
    """Checksums of the files that a run reads."""
    checksums = {"model": sha256_of, "data": data_checksums, "eval_data": data_checksums}
    if not config.online:
        checksums["confidence"] = sha256_of
    return {name: of(getattr(config, name)) for name, of in checksums.items() if getattr(config, name) is not None}
