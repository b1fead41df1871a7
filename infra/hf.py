"""Folders in Hugging Face layout, in and out."""

import contextlib
import gc
import math
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra.distributed import (
    _speaks_for_its_machine,
    drop_gathered,
    folder_aside,
    own_rows,
    rank,
    row_range,
    say,
    shard,
    whole,
    world_size,
)
from infra.files import MANIFEST, check_manifest, checksums, flush, read_json, write_json, written_aside
from model import LoRALinear, ModelConfig, Transformer, add_lora
from tokenizer import Tokenizer

# --- Reading ----------------------------------------------------------------------------------------------------------


INDEX_FILE = "model.safetensors.index.json"


def load_config(path) -> ModelConfig:
    """The configuration of the model folder `path`; ValueError or FileNotFoundError name the file and what is wrong."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a model is a folder with config.json and model.safetensors")
    values = read_json(file)
    try:
        return ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_model(path, dtype=torch.float32, device="cpu") -> Transformer:
    """Open a Hugging Face folder. The weights must be exactly those the configuration calls for.

    Raises FileNotFoundError or ValueError with the file's name; for weights, with the missing and the left-over names.
    """
    model = empty_model(path).to(dtype)
    read_weights(model, path, device)
    return model


def open_model(path, dtype: str, device, lora_rank: int | None = None, lora_alpha: float = 16, seed: int = 0):
    """The model of a folder, to be computed with in `dtype`; where there are several processes, sharded over them.

    Its weights are float32, since bf16 would swallow small updates. With adapters of `lora_rank`, drawn from `seed`,
    nothing else is trained, and where products are in bf16 the frozen weights stay as the folder keeps them.
    """
    model = empty_model(path, dtype, lora_rank, lora_alpha)
    if world_size() > 1:
        gc.collect()  # a sharded model refers to itself, and is not gone with its last name
        shard(model, dtype, device)
    if _speaks_for_its_machine():
        check_manifest(Path(path))
    read_weights(model, path, device)
    if lora_rank:
        reset_lora(model, seed)
    return model.eval()


def empty_model(path, dtype: str = "fp32", lora_rank: int | None = None, lora_alpha: float = 16) -> Transformer:
    """What `open_model` opens, before it has weights: shapes that take no memory."""
    config = load_config(path)
    with torch.device("meta"):
        model = Transformer(config)
        if lora_rank:
            model.to(stored_dtype(path) if dtype == "bf16" else torch.float32)
            add_lora(model, lora_rank, lora_alpha)
    return model


def _folder_parameters(model: Transformer):
    """The names and parameters that a model's folder holds: all but adapters."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" not in name]


def find_weights(model: Transformer, path) -> dict[str, Path]:
    """The file that holds each of an `empty_model`'s weights; nothing is read but the files' headers.

    Raises FileNotFoundError or ValueError, with the missing and the left-over names, or with the shape that is wrong.
    """
    wanted = {name: list(parameter.shape) for name, parameter in _folder_parameters(model)}
    found: dict[str, Path] = {}
    for file in _weight_files(Path(path)):
        with _opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
                if shape != wanted.get(name, shape):
                    raise ValueError(f"{file}: {name} has shape {shape}, where config.json calls for {wanted[name]}")
                if name in wanted and dtype not in ("F32", "BF16", "F16"):
                    raise ValueError(f"{file}: {name} is stored as {dtype}; only F32, BF16 and F16 are read")
                found[name] = file
    if model.config.tie_word_embeddings and "lm_head.weight" in found:  # some writers store a tied head a second time
        head = found.pop("lm_head.weight")
        with _opened(head) as one, _opened(found.get("model.embed_tokens.weight", head)) as other:
            if not torch.equal(one.get_tensor("lm_head.weight"), other.get_tensor("model.embed_tokens.weight")):
                raise ValueError(f"{head}: lm_head.weight is not the embedding, though tie_word_embeddings says so")
    found = {name: file for name, file in found.items() if not name.endswith("rotary_emb.inv_freq")}  # are computed
    if found.keys() != wanted.keys():
        raise ValueError(
            f"{path}: missing weights: {sorted(wanted.keys() - found.keys()) or 'none'}; "
            f"weights left over: {sorted(found.keys() - wanted.keys()) or 'none'}"
        )
    return found


@torch.no_grad()
def read_weights(model: Transformer, path, device) -> None:
    """Give an `empty_model` its memory and its weights, each process reading the rows it holds and no others."""
    found = find_weights(model, path)
    model.to_empty(device=device)
    for file, names in groupby(sorted(found, key=found.get), key=found.get):
        with _opened(file) as weights:
            for name in names:
                parameter = model.get_parameter(name)
                first, end = row_range(parameter)
                if first < end:
                    rows = own_rows(parameter).copy_(weights.get_slice(name)[first:end])
                    if not all(map(math.isfinite, rows.aminmax())):  # which makes no copy
                        raise ValueError(f"{file}: {name} holds numbers that are not finite")


def read_ahead(path) -> None:
    """Read a folder's weights (None: nothing) into the system's cache, so that opening them soon need not wait."""
    for file in _weight_files(Path(path)) if path and _speaks_for_its_machine() else []:
        with open(file, "rb") as weights:
            while weights.read(2**24):
                pass


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: the one, or the shards that its index names."""
    file, index = path / "model.safetensors", path / INDEX_FILE
    if file.is_file():
        return [file]
    if not index.is_file():
        others = sorted(other.name for other in path.glob("*.bin")) + sorted(other.name for other in path.glob("*.pth"))
        why = f"{others[0]} is not read, only safetensors" if others else "there is a configuration but no weights"
        raise FileNotFoundError(f"{file}: not found; {why}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map must name a file for each weight")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{index}: {name!r} is not a file of this folder")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: not found, but {INDEX_FILE} says that weights are there")
    return [path / name for name in sorted(set(weight_map.values()))]


@contextlib.contextmanager
def _opened(file: Path):
    """A safetensors file, whose errors say which it is."""
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def stored_dtype(path) -> torch.dtype:
    """The dtype in which the weights of a folder are kept (of its first weight, where they differ)."""
    with _opened(_weight_files(Path(path))[0]) as weights:
        return next(weights.get_slice(name)[:1].dtype for name in weights.keys())  # noqa: SIM118


# --- Writing ----------------------------------------------------------------------------------------------------------


def save_model(
    model: Transformer, path, files: dict[str, bytes] | None = None, dtype=None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM` opens and that gives the same logits.

    Weights are kept in `dtype` (None: as they are), adapters merged into them, in shards of at most `max_shard_bytes`.
    The `files`, by name, go along. Of a sharded model all processes must take part; process 0 writes, and never holds
    more of it than one shard. All is written aside and moved in when it is on the disk, config.json last: a folder that
    has one is whole. Raises FileExistsError where `path` has one already: nothing is written over.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)  # torch.compile wraps
    if (path / "config.json").exists():
        raise FileExistsError(f"{path}: already holds a model; remove it or choose another folder")
    drop_gathered(model)
    with folder_aside(path / "partial") as aside:
        _write_model(model, aside, files or {}, dtype, max_shard_bytes)
        if rank() == 0:
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
                flush(file)
                file.rename(path / file.name)
            flush(path)


def _write_model(model: Transformer, folder: Path, files: dict[str, bytes], dtype, max_shard_bytes: int) -> None:
    sizes = {
        name: parameter.numel() * (dtype or parameter.dtype).itemsize for name, parameter in _folder_parameters(model)
    }
    shards = _fill(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {}
        for name in names:
            tensor = _merged(model, name)
            if rank() == 0:
                weights[name] = tensor.detach().to("cpu", dtype or model.get_parameter(name).dtype).contiguous()
        if rank() == 0:
            _write_weights(weights, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if rank() != 0:
        return

    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(folder / MANIFEST, checksums(sorted(folder.glob("*.safetensors"))))
    write_json(folder / "config.json", model.config.to_dict() | {"torch_dtype": stored})
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_weights(weights: dict, file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: not written ({error})") from None
    file.chmod(mode)  # which safetensors keeps to the owner alone


def _fill(sizes: dict[str, int], capacity: int) -> list[list[str]]:
    """Names in order, as many together as `capacity` takes, and at least one.

    >>> _fill({"a": 3, "b": 2, "c": 9, "d": 1}, capacity=5)
    [['a', 'b'], ['c'], ['d']]
    """
    bins, free = [], 0
    for name, size in sizes.items():
        if not bins or size > free:
            bins.append([])
            free = capacity
        bins[-1].append(name)
        free -= size
    return bins


@torch.no_grad()
def _merged(model: Transformer, name: str):
    """A parameter as it is saved, whole; of a layer with an adapter, W + (α/r) B A."""
    layer, _, part = name.rpartition(".")
    module, tensor = model.get_submodule(layer), whole(model.get_parameter(name))
    if isinstance(module, LoRALinear) and part == "weight":
        return tensor + module.scale * (whole(module.lora_B) @ whole(module.lora_A))
    return tensor


# --- Adapters ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reset_lora(model: Transformer, seed: int) -> None:
    """A ~ U(−1/√in, 1/√in) and B = 0, the same for any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1 / math.sqrt(module.lora_A.shape[1])
            values = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
            own_rows(module.lora_A).copy_(values[slice(*row_range(module.lora_A))])
            own_rows(module.lora_B).zero_()


def save_adapter(model: Transformer, path, base) -> None:
    """Write the adapters of a model as a folder that `peft` opens over the model folder `base`.

    Of a sharded model all processes must take part.
    """
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    weights = {
        f"base_model.model.{name}.{part}.weight": whole(getattr(module, part)).detach().cpu()
        for name, module in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    if rank() != 0:
        return
    path, any_of_them = Path(path), next(iter(adapters.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()),
        "r": any_of_them.rank,
        "lora_alpha": any_of_them.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
        "inference_mode": True,
    }
    with written_aside(path) as aside:
        aside.mkdir()
        _write_weights(weights, aside / "adapter_model.safetensors")
        write_json(aside / "adapter_config.json", description)


# --- What every tool checks before it opens a model -------------------------------------------------------------------


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of a model folder; ValueError where the model's embedding has too few rows for its ids."""
    config, tokenizer = load_config(path), Tokenizer.from_pretrained(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} ids, the embedding only {config.vocab_size:,} rows; "
            "they do not belong together"
        )
    return tokenizer


def choose_template(tokenizer: Tokenizer, name: str | None, file=None) -> str:
    """`Tokenizer.choose_template`, and a line on `file` where the folder's own template is only resembled."""
    template = tokenizer.choose_template(name)
    if name is None and tokenizer.own_template not in (None, tokenizer.chat_template(template)):
        say(f"template {template}: the model's chat_template is like it, but may differ in details", file)
    return template


def check_models(folders) -> None:
    """Find what is wrong with model folders, which are to be used on the same ids, before any of them is used."""
    first = load_config(folders[0])
    for folder in folders:
        model = empty_model(folder)
        find_weights(model, folder)
        if (model.config.vocab_size, model.config.max_length) != (first.vocab_size, first.max_length):
            raise ValueError(
                f"{folder}: has {model.config.vocab_size:,} rows and {model.config.max_length:,} positions, "
                f"where {folders[0]} has {first.vocab_size:,} and {first.max_length:,}"
            )


def usable_length(path, max_length: int | None) -> int:
    """`max_length`, checked against the positions of the model in `path`; None: as many as it has, at most 1024."""
    config = load_config(path)
    if max_length is not None and max_length > config.max_length:
        limit = "positions" if config.max_length == config.max_position_embeddings else "tokens in its sliding_window"
        raise ValueError(f"--max_length {max_length}: {path} has only {config.max_length} {limit}")
    return max_length or min(1024, config.max_length)
