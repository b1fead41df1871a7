"""The transformer: a Llama-style decoder on packed rows, opened from and written to Hugging Face folders.

A batch is one **packed** row: the examples laid end to end, with no padding. `cu_seqlens` says where each begins and
ends, `positions` where each token stands in its own example, and attention never crosses a boundary. Parameters carry
the names Hugging Face gives them, so that opening a folder is reading tensors, not translating them.

Letters: N tokens in the packed row, B examples in it, S supervised tokens, V vocabulary, D hidden size, L layers,
H query heads, K key/value heads (each shared by H/K query heads), d size of a head.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# A CPU's bf16 kernels are made anew for each length of row, and no two packed rows are equally long; kept by the
# thousand, as is the default, they fill gigabytes. A few are enough for what does repeat: the steps of generation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

# --- Configuration ----------------------------------------------------------------------------------------------------

# What this file computes; a config.json that asks for anything else would load and then be silently wrong.
_SUPPORTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "quantization_config": None,
}


def _refuse_unsupported(values: dict) -> None:
    for name, supported in _SUPPORTED.items():
        if values.get(name) not in (None, supported):
            raise ValueError(f"{name}: {values[name]!r} is not supported, only {supported!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under the names of Hugging Face's `config.json`.

    Raises ValueError, naming field and value, for what `Transformer` does not compute.

    >>> ModelConfig(vocab_size=512, hidden_size=64, num_attention_heads=8, num_key_value_heads=4).head_dim
    8
    >>> ModelConfig(hidden_act="gelu")
    Traceback (most recent call last):
    ValueError: hidden_act: 'gelu' is not supported, only 'silu'
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        _refuse_unsupported(asdict(self))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r} is not a positive number")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings: {self.tie_word_embeddings!r} is neither true nor false")
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
            self._check_positive_integer(name)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "head_dim", "max_position_embeddings"):
            self._check_positive_integer(name)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd, and rotary embedding turns pairs")

    def _check_positive_integer(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or not 0 < value < 2**24:
            raise ValueError(f"{name}: {value!r} is not a positive integer below {2**24:,}")

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Read the dictionary of a `config.json`, old (`rope_theta`) or new (`rope_parameters`) in its spelling.

        Raises ValueError, naming key and value, for an architecture `Transformer` does not compute.
        """
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling: {rope!r} is not supported")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope_type: {rope_type!r} is not supported, only 'default'")
        values = {**values, **rope, "rope_scaling": None}
        _refuse_unsupported(values)
        return cls(**{field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None})


# --- The transformer --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · w, in float32 whatever the dtype of x (Zhang & Sennrich 2019). [.., D] -> [.., D]"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_angles(positions, head_dim: int, theta: float):
    """Cosine and sine of the angle by which each pair of a head turns (Su et al. 2021): [N] -> two of [N, 1, d].

    Pair i turns by position · θ^(−2i/d). The **half-split** layout of Hugging Face pairs element i with i + d/2, so the
    d/2 angles are laid out twice.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[:, None].float() * frequency  # [N, d/2], float32: bf16 cannot tell position 257 from 258
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # [N, 1, d]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+d/2}) of every head by its angle. x [N, heads, d], cos, sin [N, 1, d] -> like x."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def packed_attention(q, k, v, lengths):
    """Causal attention inside each example of a packed row and nowhere else.

    q [N, H, d], k and v [N, K, d], `lengths` the B examples' lengths, which sum to N -> [N, H, d].
    One call an example: no padded token is ever computed on, and no mask has to keep examples apart.
    """
    out = []
    for example in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in example)  # heads first: [1, heads, T, d]
        out_b = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out.append(out_b[0].transpose(0, 1))
    return torch.cat(out)


class KVCache:
    """The keys and values of B growing sequences, so that generation computes each token once.

    `model(tokens, positions, cu_seqlens, cache)` with all prompts packed fills it; after that `model(tokens, positions,
    cache=cache)` takes one new token a sequence, `tokens` and `positions` [B], and returns hidden [B, D].
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype, device):
        shape = (config.num_hidden_layers, 2, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)  # [L, key or value, B, T, K, d]
        self.batch_size = batch_size

    def attend(self, layer: int, q, k, v, positions, lengths):
        """Store k and v [N, K, d] at their positions and attend to all that is stored so far. -> [N, H, d]"""
        keys, values = self.store[layer]  # [B, T, K, d] each
        sequence = torch.repeat_interleave(torch.tensor(lengths, device=q.device))  # [N]: whose token it is
        keys[sequence, positions], values[sequence, positions] = k.to(keys.dtype), v.to(values.dtype)
        if lengths != [1] * self.batch_size:  # the prompts: nothing comes before them
            return packed_attention(q, k, v, lengths)
        reach = int(positions.max()) + 1
        seen = torch.arange(reach, device=q.device) <= positions[:, None]  # [B, reach]
        q, keys, values = (x.transpose(1, 2) for x in (q[:, None], keys[:, :reach].to(q), values[:, :reach].to(q)))
        out = F.scaled_dot_product_attention(q, keys, values, seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1])
        return out[:, :, 0]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, positions, lengths, cache):
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)  # [N, H, d]
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)  # [N, K, d]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, K, d]
        if x.device.type == "cpu":  # the backward pass of attention in bf16 is 5 times slower than in float32 there
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            out = (
                packed_attention(q, k, v, lengths)
                if cache is None
                else cache.attend(self.layer, q, k, v, positions, lengths)
            )
        return self.o_proj(out.flatten(-2).to(x.dtype))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)). x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normed stream and added back to it. x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only language model: a packed row of tokens in, the last hidden states out.

    It stops before `lm_head` because that is where Mixup happens: `mixup.py` takes the hidden states and
    `head_weight`, and never needs the logits of a whole row at once.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def head_weight(self):
        """W of `logits = W z`, [V, D]: the embedding itself where the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(self, tokens, positions=None, cu_seqlens=None, cache: KVCache | None = None):
        """Hidden states after the final norm, as they enter `lm_head`.

        tokens and positions int64 [N], cu_seqlens int32 [B+1] (0, then where each example ends) -> [N, D].
        Both may be left out for a single sequence; with a filled `cache`, each token continues its own sequence.
        """
        if positions is None:
            positions = torch.arange(len(tokens), device=tokens.device)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        else:
            lengths = [len(tokens)] if cache is None else [1] * len(tokens)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)  # [N, D]
        for block in self.model.layers:
            x = block(x, cos, sin, positions, lengths, cache)
        return self.model.norm(x)

    def logits(self, hidden):
        """W z: scores of the next token. [.., D] -> [.., V]"""
        return F.linear(hidden, self.head_weight)

    @torch.no_grad()
    def gold_log_probs(self, hidden, targets, chunk: int = 1024):
        """log p(y_n) of the gold tokens, float32: hidden [S, D], targets [S] -> [S], by `chunk` rows of logits."""
        scores = []
        for z, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = self.logits(z).float()  # [chunk, V]
            scores.append(logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(scores) if scores else hidden.new_zeros(0, dtype=torch.float32)


# --- Checkpoints in Hugging Face layout -------------------------------------------------------------------------------


def load_config(path) -> ModelConfig:
    """The configuration of the model folder `path`; ValueError or FileNotFoundError name the file and what is wrong."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a model is a folder with config.json and model.safetensors")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"an object with keys is expected, not {type(values).__name__}")
        return ModelConfig.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def load_model(path, dtype=torch.float32, device="cpu") -> Transformer:
    """Open a Hugging Face folder. The weights must be exactly those the configuration calls for.

    Raises FileNotFoundError or ValueError with the file's name; for weights, with the missing and the left-over names.
    """
    config = load_config(path)
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        in_shards = (Path(path) / "model.safetensors.index.json").exists()
        why = "weights in shards are not read" if in_shards else "the folder has a configuration but no weights"
        raise FileNotFoundError(f"{file}: not found; {why}")
    with torch.device("meta"):  # shapes without memory: every tensor is then taken from the file
        model = Transformer(config)
    expected = model.state_dict()
    try:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            # Angles are computed, not read; and some writers store a tied head a second time.
            names = {name for name in weights.keys() if not name.endswith("rotary_emb.inv_freq")}  # noqa: SIM118
            if config.tie_word_embeddings:
                names.discard("lm_head.weight")
            if names != expected.keys():
                raise ValueError(
                    f"missing weights: {sorted(expected.keys() - names) or 'none'}; "
                    f"weights left over: {sorted(names - expected.keys()) or 'none'}"
                )
            state = {name: weights.get_tensor(name).to(dtype) for name in expected}
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{file}: {error}") from None
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {list(tensor.shape)}, "
                f"where config.json calls for {list(expected[name].shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model


def save_model(model: Transformer, path, tokenizer=None) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM` opens and that gives the same logits.

    With a `tokenizer`, its files go along. Files are written aside and moved in when all are there, config.json last: a
    folder that has one is whole. Raises FileExistsError where `path` has one already: nothing is written over.
    """
    path = Path(path)
    if (path / "config.json").exists():
        raise FileExistsError(f"{path}: already holds a model; remove it or choose another folder")
    aside = path / "partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    description = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    (aside / "config.json").write_text(json.dumps(description | asdict(model.config), indent=2) + "\n")
    (aside / "model.safetensors").chmod((aside / "config.json").stat().st_mode)  # safetensors keeps it to the owner
    if tokenizer is not None:
        tokenizer.save(aside)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(path / file.name)
    aside.rmdir()


# --- Where a model runs: command line, processes, devices -------------------------------------------------------------


class CommandLine(argparse.ArgumentParser):
    """Flags whose errors are one line on stderr, with the flag that was probably meant, and exit code 2."""

    def __init__(self, **named):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **named)

    @staticmethod
    def positive(text: str) -> int:
        """The type of a flag that counts something."""
        if not (text.isdecimal() and int(text) > 0):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message = f"unknown flag {word}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")
        self.exit(2, f"{self.prog}: error: {message}\n" if _speaks_for_its_machine() else None)


def _speaks_for_its_machine() -> bool:
    """Whether this is the one process on its machine that reports what all of them find wrong."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def processes():
    """Join the processes `torchrun` started (or be the only one) and yield this one's device.

    A ValueError or OSError inside is something the user can mend: it becomes one line on stderr and exit code 1.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    except (ValueError, OSError) as error:
        if _speaks_for_its_machine():
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes: what process 0 wrote before is there for everyone after."""
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(tensor):
    """Add up `tensor`, in place, over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def say(text: str, file=None) -> None:
    """Tell the reader, in one voice however many processes there are."""
    if rank() == 0:
        print(text, file=file, flush=True)


def peak_memory_bytes(device) -> int:
    """The most memory this process has held: on a GPU since the last reset, in main memory since it started."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(device, dtype: str):
    """The context in which a forward pass runs: matrix products in bf16, or ("fp32") everything in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")
