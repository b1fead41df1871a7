"""The transformer: a Llama-style decoder on packed rows, opened from and written to Hugging Face folders.

A batch is one **packed** row: the examples laid end to end, with no padding. `cu_seqlens` says where each begins and
ends, `positions` where each token stands in its own example, and attention never crosses a boundary. Parameters carry
the names Hugging Face gives them, so that opening a folder is reading tensors, not translating them.

In order: the configuration and the families it tells apart, the transformer, LoRA, sharding over processes, the folders
a model is read from and written to, and at the end what runs around a model: the command line, processes, devices.

Letters: N tokens in the packed row, B examples in it, S supervised tokens, V vocabulary, D hidden size, L layers,
H query heads, K key/value heads (each shared by H/K query heads), d size of a head.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# A CPU's bf16 kernels are made anew for each length of row, and no two packed rows are equally long; kept by the
# thousand, as is the default, they fill gigabytes. A few are enough for what does repeat: the steps of generation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

# --- Configuration ----------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How the models of one `model_type` differ from Llama."""

    architecture: str  # the class of `transformers` that opens their folders
    hidden_act: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normed before it turns
    norm_offset: float = 0.0  # what norms add to their stored weight
    scaled_embeddings: bool = False  # by √D
    defaults: dict = {}  # of keys that a config.json may leave out  # noqa: RUF012


_QWEN_DEFAULTS = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 32768}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, defaults=_QWEN_DEFAULTS),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, defaults={"head_dim": 128, **_QWEN_DEFAULTS}),
    "gemma": Family(
        "GemmaForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        norm_offset=1.0,
        scaled_embeddings=True,
        defaults={
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    ),
}

# What no family here has; a config.json that asks for anything else would load and then be silently wrong.
_SUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "num_experts": None,
    "num_local_experts": None,
    "quantization_config": None,
}
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _family_of(model_type) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type: {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _refuse_unsupported(values: dict, supported: dict) -> None:
    for name, value in supported.items():
        if values.get(name) not in (None, value):
            raise ValueError(f"{name}: {values[name]!r} is not supported, only {value!r}")


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

    model_type: str = "llama"
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
    rope_scaling: dict | None = None  # Llama 3's, see `rotary_frequencies`
    sliding_window: int | None = None  # attention reaches no further back, so no example may be longer
    tie_word_embeddings: bool = False
    hidden_act: str | None = None  # None: the family's
    attention_bias: bool = False  # other than Qwen2's, which is the family's
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        hidden_act = self.family.hidden_act
        if self.hidden_act is None:
            object.__setattr__(self, "hidden_act", hidden_act)
        _refuse_unsupported(asdict(self), {"hidden_act": hidden_act, **_SUPPORTED})
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        if self.rope_scaling is not None:
            if self.rope_scaling.get("rope_type") != "llama3":
                raise ValueError(f"rope_scaling: {self.rope_scaling!r} is not supported, only rope_type 'llama3'")
            for name in _LLAMA3_SCALING:
                _check_positive(f"rope_scaling: {name}", self.rope_scaling.get(name))
            if self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
                raise ValueError(f"rope_scaling: {self.rope_scaling!r}: low_freq_factor must be below high_freq_factor")
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
        if self.sliding_window is not None:
            self._check_positive_integer("sliding_window")
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

    @property
    def family(self) -> Family:
        """What sets the models of this `model_type` apart."""
        return _family_of(self.model_type)

    @property
    def max_length(self) -> int:
        """How long an example may be: as many tokens as there are positions, or as the attention window is wide."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Read the dictionary of a `config.json`, old (`rope_theta`) or new (`rope_parameters`) in its spelling.

        Raises ValueError, naming key and value, for an architecture `Transformer` does not compute.
        """
        model_type = values.get("model_type", "llama")
        defaults = _family_of(model_type).defaults
        _refuse_unsupported(values, _SUPPORTED)
        values = {**defaults, **values}

        parameters, scaling = (values.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
        for rope in (parameters, scaling):
            if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
                raise ValueError(f"rope_scaling: {rope!r} is not supported")
        rope = scaling or parameters
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope_type: {rope_type!r} is not supported, only 'default' and 'llama3'")
        _refuse_unsupported(rope, _SUPPORTED)
        values["rope_theta"] = rope.get("rope_theta") or parameters.get("rope_theta") or values.get("rope_theta")
        values["rope_scaling"] = None
        if rope_type == "llama3":
            values["rope_scaling"] = {"rope_type": "llama3", **{name: rope.get(name) for name in _LLAMA3_SCALING}}

        if model_type != "mistral":  # where others name a window, `use_sliding_window` is what switches it on
            values["sliding_window"] = None
        layer_types = values.get("layer_types") or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"layer_types: {layer_types!r} is not supported, only full_attention")

        if model_type == "gemma":  # the first files said "gelu" and meant its approximation by tanh, as later ones say
            act = values.get("hidden_activation") or values.get("hidden_act")
            values["hidden_act"] = "gelu_pytorch_tanh" if act == "gelu" else act
        names = [field.name for field in fields(cls)]
        return cls(
            **{
                name: values[name]
                for name in names
                if values.get(name) is not None or (name.endswith("_token_id") and name in values)
            }
        )

    def to_dict(self) -> dict:
        """The dictionary of a `config.json`."""
        return {"architectures": [self.family.architecture], **asdict(self)}


def _check_positive(name: str, value) -> None:
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{name}: {value!r} is not a positive number")


# --- The transformer --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · w, computed in float32 (Zhang & Sennrich 2019). [.., D] -> [.., D]

    What is stored is w less an `offset`, Gemma's being 1.
    """

    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        # What comes out enters products, so under autocast it has their dtype: cast once, not by each product anew.
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
        weight = self.weight.float()
        if self.offset:
            weight = weight + self.offset
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(dtype)


def make_norm(config: ModelConfig, size: int) -> RMSNorm:
    """A norm over `size` elements, of the family's kind."""
    return RMSNorm(size, config.rms_norm_eps, config.family.norm_offset)


def rotary_frequencies(config: ModelConfig, device=None):
    """By how much each pair of a head turns per position, θ^(−2i/d): float32 [d/2].

    Llama 3 stretches a model trained on `original_max_position_embeddings` positions: pairs that turn less than
    `low_freq_factor` times over those are slowed down by `factor`, pairs that turn more than `high_freq_factor` times
    are left alone, and what is between goes over smoothly.
    """
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-i / config.head_dim)
    if config.rope_scaling is None:
        return frequency
    factor, low, high, original = (config.rope_scaling[name] for name in _LLAMA3_SCALING)
    turns = original * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: left alone
    return kept * frequency + (1 - kept) * frequency / factor


def rotary_angles(positions, frequencies):
    """Cosine and sine of the angle by which each pair of a head turns (Su et al. 2021): [N], [d/2] -> two of [N, 1, d].

    The **half-split** layout of Hugging Face pairs element i with i + d/2, so the d/2 angles are laid out twice; the
    first of a pair takes the sine with a minus.
    """
    angle = positions[:, None, None].float() * frequencies  # [N, 1, d/2], float32: bf16 can't tell 257 from 258
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+d/2}) of every head by its angle. x [N, heads, d], cos, sin [N, 1, d] -> like x."""
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


class Row(NamedTuple):
    """How a packed row is laid out: what attention needs to know beside q, k and v."""

    cos: torch.Tensor  # [N, 1, d], as sin: the angles of `rotary_angles`
    sin: torch.Tensor
    positions: torch.Tensor  # int64 [N]
    cu_seqlens: torch.Tensor  # int32 [B+1], in main memory, since it decides which kernels run on what
    cu_seqlens_on_device: torch.Tensor
    longest: int  # no example has more tokens; rounded up to a power of two, so that it takes few values


def packed_attention(q, k, v, row: Row):
    """Causal attention inside each example of a packed row and nowhere else.

    q [N, H, d], k and v [N, K, d] -> [N, H, d]. No padded token is ever computed on, and no mask has to keep examples
    apart: a GPU has a kernel that knows the boundaries (FlashAttention's, Dao 2023, which takes 16-bit numbers);
    elsewhere there is one call an example.
    """
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn  # which a CPU need not have

        bounds, longest = row.cu_seqlens_on_device, row.longest
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return _attention_by_example(q, k, v, row.cu_seqlens)


@torch.compiler.disable  # a loop over a number of examples that is never the same
def _attention_by_example(q, k, v, cu_seqlens):
    lengths, out = cu_seqlens.diff().tolist(), []
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

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int):
        if config.sliding_window is not None and max_length > config.sliding_window:
            raise ValueError(f"{max_length} tokens are more than sliding_window {config.sliding_window} allows")
        self.shape = (2, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.layers: list = [None] * config.num_hidden_layers  # of each, once known, [key or value, B, T, K, d]

    def keep(self, order) -> None:
        """Go on with these sequences alone, int64 [B'], numbered anew; one that keeps its number is not copied."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        for layer in self.layers:
            layer[:, moved] = layer[:, order[moved]]
        self.layers = [layer[:, : len(order)] for layer in self.layers]

    def begin(self, row: Row) -> None:
        """Work out what is the same in all layers: whose each token is, and what of its sequence a new one sees."""
        device, lengths = row.positions.device, row.cu_seqlens.diff()
        self.place = torch.repeat_interleave(lengths).to(device) * self.shape[2] + row.positions  # [N], of B x T
        self.seen = None  # of prompts, which nothing comes before
        if (lengths == 1).all():
            reach = int(row.positions.max()) + 1
            unseen = torch.arange(reach, device=device) > row.positions[:, None]  # [B, reach]
            self.seen = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)[:, None, None]

    def attend(self, layer: int, q, k, v, row: Row):
        """Store k and v [N, K, d] at their positions and attend to all that is stored so far. -> [N, H, d]"""
        if self.layers[layer] is None:
            self.layers[layer] = k.new_zeros(self.shape)
        keys, values = self.layers[layer]  # [B, T, K, d] each
        keys.flatten(0, 1).index_copy_(0, self.place, k)
        values.flatten(0, 1).index_copy_(0, self.place, v)
        if self.seen is None:
            return packed_attention(q, k, v, row)
        reach = self.seen.shape[-1]
        # The query heads that share a key head are to it as so many tokens: each key is read once.
        q_shared = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, d]
        keys, values = (x[:, :reach].transpose(1, 2) for x in (keys, values))  # [B, K, reach, d]
        return F.scaled_dot_product_attention(q_shared, keys, values, self.seen.to(q.dtype)).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions. x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.family.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.family.qk_norm:
            self.q_norm = make_norm(config, config.head_dim)
            self.k_norm = make_norm(config, config.head_dim)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, row: Row, cache: KVCache | None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        heads = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)  # [N, H + K, d]
        q, k = rotate(heads, row.cos, row.sin).split([q.shape[1], k.shape[1]], dim=1)  # [N, H, d], [N, K, d] as v
        if x.device.type == "cpu":  # the backward pass of attention in bf16 is 5 times slower than in float32 there
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            out = packed_attention(q, k, v, row) if cache is None else cache.attend(self.layer, q, k, v, row)
        return self.o_proj(out.flatten(-2).to(x.dtype))


_ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """A gated linear unit (Shazeer 2020): down(act(gate(x)) · up(x)). x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = _ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normed stream and added back to it. x [N, D] -> [N, D]"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)

        self.compiled = False

    def forward(self, x, row: Row, cache: KVCache | None):
        compute = _compiled_block() if self.compiled and cache is None else _compute_block
        return compute(self, x, row, cache)


def _compute_block(block: Block, x, row: Row, cache: KVCache | None):
    x = x + block.self_attn(block.input_layernorm(x), row, cache)
    return x + block.mlp(block.post_attention_layernorm(x))


@functools.cache
def _compiled_block():
    """The same, compiled once for all blocks and for rows of any length."""
    return torch.compile(_compute_block, dynamic=True)


class Transformer(nn.Module):
    """A decoder-only language model: a packed row of tokens in, the last hidden states out.

    It stops before `lm_head` because that is where Mixup happens: `mixup.py` takes the hidden states and
    `head_weight`, and never needs the logits of a whole row at once.

    Set `activation_checkpointing` to keep only each block's input for the backward pass and compute the rest again:
    a third more work for a fraction of the memory (Chen et al. 2016). `compile_blocks()` has PyTorch fuse what lies
    between the products.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": make_norm(config, config.hidden_size),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def head_weight(self):
        """W of `logits = W z`, [V, D]: the embedding itself where the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def compile_blocks(self) -> None:
        """Compile the blocks at their first use, with `torch.compile`; names stay, and results but for rounding."""
        for block in self.model.layers:
            block.compiled = True

    def forward(
        self, tokens, positions=None, cu_seqlens=None, cache: KVCache | None = None, head: Callable | None = None
    ):
        """Hidden states after the final norm, as they enter `lm_head`.

        tokens and positions int64 [N], cu_seqlens int32 [B+1] (0, then where each example ends) -> [N, D].
        Positions and cu_seqlens may be left out for a single sequence. With a filled `cache`, each token continues its
        own sequence at the position given. A GPU is not waited for where cu_seqlens is in main memory.

        With `head`, what that makes of the hidden states is returned in their place. Whatever needs `head_weight` goes
        there: of a model sharded over processes, a weight is whole only while its part of the model is at work.
        """
        device = tokens.device
        if positions is None:
            positions = torch.arange(len(tokens), device=device)
        if cu_seqlens is None:  # one sequence, or one token of each
            cu_seqlens = torch.arange(0, len(tokens) + 1, len(tokens) if cache is None else 1, dtype=torch.int32)
        bounds = cu_seqlens.cpu(), cu_seqlens.to(device, non_blocking=True)
        longest = int(bounds[0].diff().max())
        window = self.config.sliding_window
        if window is not None and longest > window:
            raise ValueError(f"an example of {longest} tokens is longer than sliding_window {window}")
        angles = rotary_angles(positions, rotary_frequencies(self.config, device))
        row = Row(*angles, positions, *bounds, longest=1 << (longest - 1).bit_length())
        if cache is not None:
            cache.begin(row)
        x = self.model.embed_tokens(tokens)  # [N, D]
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # products are in bf16 then; what they are added to stays precise, however weights are kept
        if self.config.family.scaled_embeddings:
            x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)
        for block in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, row, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, row, cache)
        hidden = self.model.norm(x)
        return hidden if head is None else head(hidden)

    def logits(self, hidden):
        """W z: scores of the next token. [.., D] -> [.., V]"""
        return F.linear(hidden, self.head_weight)

    @torch.no_grad()
    def gold_log_probs(self, hidden, targets, chunk: int = 256):
        """log p(y_n) of the gold tokens, float32: hidden [S, D], targets [S] -> [S], by `chunk` rows of logits."""
        scores = [hidden.new_zeros(0, dtype=torch.float32)]
        for z, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = self.logits(z).float()  # [chunk, V]
            top = logits.amax(-1)
            gold = logits.gather(-1, y[:, None])[:, 0] - top
            scores.append(gold - logits.sub_(top[:, None]).exp_().sum(-1).log())
        return torch.cat(scores)


# --- LoRA -------------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """W x + (α/r) B A x: a frozen linear layer and what is learnt beside it (Hu et al. 2021). [.., in] -> [.., out]

    A [r, in] begins random and B [out, r] at zero, so that training starts from the layer as it was.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # under the names they had
        out_features, in_features = linear.weight.shape
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32, device=device))
        self.rank, self.alpha = rank, alpha

    @property
    def scale(self) -> float:
        """α/r"""
        return self.alpha / self.rank

    def forward(self, x):
        change = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * change


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Freeze `model` and put an adapter, yet without values, beside every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LoRALinear(linear, rank, alpha))


# --- One model over several processes ---------------------------------------------------------------------------------


# --- Folders in Hugging Face layout -----------------------------------------------------------------------------------


# --- What is written is whole, or it is not there ---------------------------------------------------------------------


# --- Where a model runs: command line, processes, devices -------------------------------------------------------------
