"""Model folders in Hugging Face layout: reading, writing, LoRA adapters, and checks before a model is loaded."""

import contextlib
import gc
import math
import re
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from infra.device import local_rank, memory_bytes
from infra.distributed import on_rank0, rank, temporary_folder, wait_for_rank0, world_size
from infra.files import (
    MANIFEST,
    atomic_write,
    check_no_pointer,
    checksums,
    fsync,
    is_run_config,
    read_json,
    set_mode,
    utf8_folder,
    verify_manifest,
    write_json,
)
from infra.fsdp import apply_fsdp, full_tensor, local_row_range, local_shard, reshard
from model import LoRALinear, ModelConfig, RMSNorm, Transformer, add_lora
from tokenizer import Tokenizer

# --- Reading ----------------------------------------------------------------------------------------------------------

INDEX_FILE = "model.safetensors.index.json"  # lists the file of each weight, if a model has several files ("shards")


def load_config(path) -> ModelConfig:
    """Read the configuration of a model folder. FileNotFoundError or ValueError name the file and what is wrong."""
    file = Path(path) / "config.json"
    if not file.is_file():
        found = [f for name in ("step-*", "checkpoint-*") for f in sorted(Path(path).glob(f"{name}/config.json"))]
        hint = f"; there is one in {found[0].parent}" if found else ""
        if (Path(path) / "adapter_config.json").is_file():
            hint = "; this is an adapter, to be merged into its base first"
        raise FileNotFoundError(f"{file}: not found; a model is a folder with config.json and model.safetensors{hint}")
    for entry in filter(Path.is_file, Path(path).iterdir()):
        check_no_pointer(entry)
    values = read_json(file)
    if is_run_config(values):
        raise ValueError(f"{path}: the output of a run; its models are in the folders reference and sftmix below")
    try:
        return ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_model(
    path, dtype=torch.float32, device="cpu", *, compute_dtype=None, lora_rank=None, lora_alpha=16.0, seed=0, shard=True
) -> Transformer:
    """Load a model folder, with weights in `dtype`. With `shard`, the model is sharded over all processes.

    `compute_dtype` is the dtype of matmuls (None: `dtype`). If it is given, the weights of norms are float32, as under
    autocast. With `lora_rank`, the weights are frozen, and float32 adapters initialized from `seed` are trained
    instead. Raises FileNotFoundError or ValueError with the file and what is wrong: the folder must contain exactly the
    weights that its configuration calls for.
    """
    model = meta_model(path, dtype, lora_rank, lora_alpha)
    model.compute_dtype = compute_dtype
    if compute_dtype is not None:
        for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
            norm.float()
    if world_size() > 1:
        gc.collect()  # frees the previous model: FSDP models contain reference cycles
        if shard:
            apply_fsdp(model, device)
    load_weights(model, map_weights(model, path), device)
    if lora_rank:
        reset_lora(model, seed)
    return model.eval()


def load_for_inference(path, compute_dtype, device) -> Transformer:
    """Load a model that is not trained, with weights in the dtype of matmuls, so that none is cast when it is used.

    Each of several processes holds all of it, if that takes at most half of its memory. Otherwise it is sharded, and
    its weights are gathered in each forward pass, so for each token that is generated.
    """
    shard = False
    if world_size() > 1:
        size = sum(p.numel() for p in meta_model(path).parameters()) * compute_dtype.itemsize
        shard = 2 * size > on_rank0(memory_bytes, device)
    return load_model(path, compute_dtype, device, compute_dtype=compute_dtype, shard=shard)


def load_models(folders, device, compute_dtype) -> Iterator[Transformer]:
    """Load checkpoints one after the other, each checked against its manifest.

    While one is in use, a thread reads the next one's files into the page cache. It then loads as fast as from memory,
    and this process never holds two models.
    """
    for folder, following in zip(folders, [*folders[1:], None], strict=True):
        if following is not None:
            threading.Thread(target=warm_page_cache, args=(following,), daemon=True).start()  # Ctrl-C ends it too
        verify_weights(folder)
        yield load_for_inference(folder, compute_dtype, device)


def meta_model(path, dtype=torch.float32, lora_rank: int | None = None, lora_alpha=16.0) -> Transformer:
    """Make the model of a folder on the meta device, where weights have shapes and dtypes but take no memory."""
    config = load_config(path)
    with torch.device("meta"), _SkipNormal():
        model = Transformer(config).to(dtype)
        if lora_rank:
            add_lora(model, lora_rank, lora_alpha)
    return model


class _SkipNormal(TorchFunctionMode):
    """Draws no normal numbers. For a weight without memory, PyTorch would first load its compiler, for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def _named_weights(model: Transformer):
    """Names and parameters of the weights in a model's folder: of all parameters but adapters."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" not in name]


def map_weights(model: Transformer, path) -> dict[str, Path]:
    """Find the file that holds each weight of a model, which may be on the meta device.

    Raises FileNotFoundError or ValueError with the missing and the left-over weights, or with the one that has a wrong
    shape or dtype.
    """
    expected = {name: list(parameter.shape) for name, parameter in _named_weights(model)}
    found: dict[str, Path] = {}
    for file in _weight_files(Path(path)):
        with open_safetensors(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
                if shape != expected.get(name, shape):
                    raise ValueError(f"{file}: {name} has shape {shape}, where config.json calls for {expected[name]}")
                if name in expected and dtype not in ("F32", "BF16", "F16"):
                    raise ValueError(f"{file}: {name} is stored as {dtype}; only F32, BF16 and F16 are read")
                found[name] = file
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    if model.config.tie_word_embeddings and found.keys() >= {*tied}:  # some folders store the tied weight twice
        file = found.pop("lm_head.weight")
        with open_safetensors(file) as one, open_safetensors(found["model.embed_tokens.weight"]) as other:
            if not torch.equal(one.get_tensor("lm_head.weight"), other.get_tensor("model.embed_tokens.weight")):
                raise ValueError(f"{file}: lm_head.weight is not the embedding, though tie_word_embeddings says so")
    # Old folders store the frequencies of the rotary embedding. They follow from the configuration.
    found = {name: file for name, file in found.items() if not name.endswith("rotary_emb.inv_freq")}
    if found.keys() != expected.keys():
        raise ValueError(
            f"{path}: missing weights: {sorted(expected.keys() - found.keys()) or 'none'}; "
            f"weights left over: {sorted(found.keys() - expected.keys()) or 'none'}"
        )
    return found


@torch.no_grad()
def load_weights(model: Transformer, files: dict[str, Path], device) -> None:
    """Allocate a model's memory and load each weight from its file. A process reads only the rows that it holds."""
    model.to_empty(device=device)
    for file, names in groupby(sorted(files, key=files.get), key=files.get):
        with open_safetensors(file) as weights:
            for name in names:
                parameter = model.get_parameter(name)
                first, end = local_row_range(parameter)
                if first < end:
                    shard = local_shard(parameter)
                    # To the device first, so that a GPU converts the dtype and not the CPU.
                    shard.copy_(weights.get_slice(name)[first:end].to(device))
                    if not all(map(math.isfinite, shard.aminmax())):  # unlike isfinite, this makes no copy
                        raise ValueError(f"{file}: {name} holds numbers that are not finite")


def warm_page_cache(path) -> None:
    """Read a folder's weights into the page cache of this machine, so that they load faster soon afterwards."""
    if local_rank() != 0:
        return
    with contextlib.suppress(OSError, ValueError):  # which loading raises again
        for file in _weight_files(Path(path)):
            with open(file, "rb") as weights:
                while weights.read(2**24):
                    pass


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: a single one, or the shards that its index names."""
    file, index = path / "model.safetensors", path / INDEX_FILE
    if (path / "adapter_config.json").is_file():  # transformers would apply it
        raise ValueError(f"{path}: holds an adapter (adapter_config.json); merge it into its base, or move it away")
    if file.is_file():
        return [file]
    if not index.is_file():
        others = [other.name for kind in ("safetensors", "bin", "pth") for other in sorted(path.glob(f"*.{kind}"))]
        why = f"{others[0]} is not read, only safetensors" if others else "there is a configuration but no weights"
        if others and others[0].endswith(".safetensors"):
            why = f"nor {INDEX_FILE}, which says what is in {others[0]}"
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
def open_safetensors(file: Path):
    """Open a safetensors file for reading. Its errors name the file."""
    try:
        with utf8_folder(file.parent) as folder, safe_open(folder / file.name, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def stored_dtype(path) -> torch.dtype:
    """The dtype in which a folder stores its weights (if they differ, that of the first one)."""
    with open_safetensors(_weight_files(Path(path))[0]) as weights:
        return next(weights.get_slice(name)[:1].dtype for name in weights.keys())  # noqa: SIM118


# --- Writing ----------------------------------------------------------------------------------------------------------

MAX_SHARD_BYTES = 5 * 10**9  # of a file of weights


def save_model(
    model: Transformer, path, files: dict[str, bytes] | None = None, dtype=None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a model folder that `transformers.AutoModelForCausalLM` opens and that gives the same logits there.

    Weights are stored in `dtype` (None: as they are), with adapters merged into them, in files of at most
    `max_shard_bytes`. `files` (name -> content) are written too. If the model is sharded, all processes must call this
    together; rank 0 writes, and holds the weights of one file at a time.
    Everything is written to a temporary folder and moved to `path` when it is on the disk, config.json last: a folder
    that has a config.json is complete. Raises FileExistsError if `path` has one already; nothing is overwritten.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    if rank() == 0 and (path / "config.json").exists():
        raise FileExistsError(f"{path}: already holds a model; remove it or choose another folder")
    reshard(model)
    with temporary_folder(path / "partial") as tmp:
        _write_model(model, tmp, files or {}, dtype, max_shard_bytes)
        if rank() == 0:
            for file in sorted(tmp.iterdir(), key=lambda file: file.name == "config.json"):
                fsync(file)
                file.rename(path / file.name)
                fsync(path)  # or a crash could leave a config.json without the weights


def _write_model(model: Transformer, folder: Path, files: dict[str, bytes], dtype, max_shard_bytes: int) -> None:
    sizes = {name: parameter.numel() * (dtype or parameter.dtype).itemsize for name, parameter in _named_weights(model)}
    shards = split_into_shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {}
        for name in names:
            tensor = _merged_weight(model, name)
            if rank() == 0:
                weights[name] = tensor.detach().to("cpu", dtype or model.get_parameter(name).dtype).contiguous()
        if rank() == 0:
            _write_weights(weights, folder / file)
        wait_for_rank0()  # or the others would wait for the next file's weights, and not for so long
        weight_map |= dict.fromkeys(names, file)
    if rank() != 0:
        return

    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    torch_dtype = str(dtype or model.head_weight.dtype).removeprefix("torch.")
    write_json(folder / MANIFEST, checksums(sorted(folder.glob("*.safetensors"))))
    write_json(folder / "config.json", model.config.to_dict() | {"torch_dtype": torch_dtype})
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_weights(weights: dict, file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    try:
        with utf8_folder(file.parent) as folder:
            save_file(weights, folder / file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: not written ({error})") from None
    set_mode(file, mode)  # safetensors lets only the owner read it


def split_into_shards(sizes: dict[str, int], capacity: int) -> list[list[str]]:
    """Group names in order. The sizes of a group add up to at most `capacity`, or it has a single name.

    >>> split_into_shards({"a": 3, "b": 2, "c": 9, "d": 1}, capacity=5)
    [['a', 'b'], ['c'], ['d']]
    """
    shards, free = [], 0
    for name, size in sizes.items():
        if not shards or size > free:
            shards.append([])
            free = capacity
        shards[-1].append(name)
        free -= size
    return shards


@torch.no_grad()
def _merged_weight(model: Transformer, name: str):
    """All rows of a weight. If its layer has an adapter, W + (α/r) B A."""
    module_name, _, parameter_name = name.rpartition(".")
    module, weight = model.get_submodule(module_name), full_tensor(model.get_parameter(name))
    if isinstance(module, LoRALinear) and parameter_name == "weight":
        return weight + module.scale * (full_tensor(module.lora_B) @ full_tensor(module.lora_A))
    return weight


# --- Adapters ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reset_lora(model: Transformer, seed: int) -> None:
    """Initialize adapters: A ~ U(−1/√in, 1/√in) and B = 0, the same values for any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1 / math.sqrt(module.lora_A.shape[1])
            values = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
            local_shard(module.lora_A).copy_(values[slice(*local_row_range(module.lora_A))])
            local_shard(module.lora_B).zero_()


def save_adapter(model: Transformer, path, base) -> None:
    """Write a model's adapters as a folder that `peft` opens, on top of the model folder `base`.

    If the model is sharded, all processes must call this together.
    """
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    weights = {
        f"base_model.model.{name}.{part}.weight": full_tensor(getattr(module, part)).detach().cpu()
        for name, module in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    if rank() != 0:
        return
    path, first = Path(path), next(iter(adapters.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
        "inference_mode": True,
    }
    with atomic_write(path) as tmp:
        tmp.mkdir()
        _write_weights(weights, tmp / "adapter_model.safetensors")
        write_json(tmp / "adapter_config.json", adapter_config)


# --- Checks before a model is loaded ----------------------------------------------------------------------------------


def load_tokenizer(path) -> Tokenizer:
    """Load the tokenizer of a model folder. ValueError if the model's embedding has too few rows for its ids."""
    config, tokenizer = load_config(path), Tokenizer.from_pretrained(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} ids, the embedding only {config.vocab_size:,} rows; "
            f"remove {tokenizer.id_to_token(tokenizer.vocab_size - 1)!r} and others without a row from its files, or "
            "resize the embedding"
        )
    return tokenizer


def check_models(folders) -> None:
    """Raise ValueError or FileNotFoundError unless all these folders can be loaded and used on the same token ids."""
    first = load_config(folders[0])
    for folder in folders:
        model = meta_model(folder)
        map_weights(model, folder)
        if (model.config.vocab_size, model.config.max_length) != (first.vocab_size, first.max_length):
            raise ValueError(
                f"{folder}: has {model.config.vocab_size:,} rows and {model.config.max_length:,} positions, "
                f"where {folders[0]} has {first.vocab_size:,} and {first.max_length:,}"
            )


def oldest_first(folders: list) -> list:
    """Sort folders that are all called step-N or checkpoint-N by N, which a shell's pattern does not; others stay.

    >>> oldest_first(["run/step-10", "run/step-2"])
    ['run/step-2', 'run/step-10']
    """
    steps = [re.fullmatch(r"(?:step|checkpoint)-(\d+)", Path(folder).name) for folder in folders]
    return sorted(folders, key=lambda folder: int(Path(folder).name.rpartition("-")[2])) if all(steps) else folders


def verify_weights(path) -> None:
    """Compare a model folder with its manifest, on one process of each machine. ValueError names a damaged file."""
    if local_rank() == 0:
        verify_manifest(Path(path))


def resolve_max_length(path, max_length: int | None) -> int:
    """Check `max_length` against what the model in `path` can do. None: as many tokens as it can, at most 1024."""
    config = load_config(path)
    if max_length is not None and max_length > config.max_length:
        limit = "positions" if config.max_length == config.max_position_embeddings else "tokens in its sliding_window"
        raise ValueError(f"--max_length {max_length}: {path} has only {config.max_length} {limit}")
    return max_length or min(1024, config.max_length)
