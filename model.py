"""The model: a Llama-style transformer on packed rows, with its configuration, its KV cache and LoRA.

A batch is one **packed** row: its examples one after another, without padding. `cu_seqlens` holds the offsets at which
examples begin and end, `positions` holds each token's position in its own example, and attention never crosses the
boundary between two examples. Parameters have Hugging Face's names, so checkpoints load without renaming.

In order: the configuration and the model families, the transformer with its attention and KV cache, LoRA.

Letters: T tokens in the packed row, B examples in it, L tokens of one example, V vocabulary size, D hidden size,
H query heads, K key/value heads (each shared by H/K query heads), d size of a head, r rank of LoRA. In the KV cache,
B is the number of sequences and L the number of tokens that it can hold for each of them.
"""

import contextlib
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

# On a CPU, oneDNN compiles bf16 kernels for each row length and caches 1,024 of them by default. They fill gigabytes,
# and few are used again, because packed rows differ in length. 16 are enough for generation, where lengths repeat.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

# --- Configuration ----------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How the models of one `model_type` differ from Llama."""

    architecture: str  # the class in `transformers`
    hidden_act: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False  # whether each head of q and k is normed before it is rotated
    norm_offset: float = 0.0  # what norms add to their stored weight
    scaled_embeddings: bool = False  # whether embeddings are multiplied by √D
    defaults: dict = {}  # values of keys that the family's config.json may omit  # noqa: RUF012


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

# The only supported values of these keys. With any other value a model would load, but compute wrong results.
_SUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "is_causal": True,
    "rope_interleaved": False,
    "use_sliding_window": False,
    "num_experts": None,
    "num_local_experts": None,
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
)
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _get_family(model_type) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type: {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _check_supported(values: dict, supported: dict) -> None:
    for name, value in supported.items():
        if values.get(name) not in (None, value):
            raise ValueError(f"{name}: {values[name]!r} is not supported, only {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model. Fields are named as in Hugging Face's `config.json`.

    Raises ValueError, with the field and its value, for what `Transformer` does not support.

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
    rope_scaling: dict | None = None  # only Llama 3's, see `rope_inv_freq`
    sliding_window: int | None = None  # how many tokens attention reaches back; longer examples are refused
    tie_word_embeddings: bool = False
    hidden_act: str | None = None  # None: the family's
    attention_bias: bool = False  # Qwen2's biases are not this, but its family's qkv_bias
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        hidden_act = self.family.hidden_act
        if self.hidden_act is None:
            object.__setattr__(self, "hidden_act", hidden_act)
        _check_supported(asdict(self), {"hidden_act": hidden_act, **_SUPPORTED})
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        if self.rope_scaling is not None:
            if (rope_type := self.rope_scaling.get("rope_type")) != "llama3":
                raise ValueError(f"rope_type: {rope_type!r} is not supported, only 'default' and 'llama3'")
            for name in _LLAMA3_SCALING:
                _check_positive(f"rope_scaling: {name}", self.rope_scaling.get(name))
            if self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
                raise ValueError(f"rope_scaling: {self.rope_scaling!r}: low_freq_factor must be below high_freq_factor")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings: {self.tie_word_embeddings!r} is neither true nor false")
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in ("head_dim", "sliding_window"):
                continue
            if type(value) is not int or not 0 < value < 2**24:
                raise ValueError(f"{name}: {value!r} is not a positive integer below {2**24:,}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd, and rotary embedding turns pairs")

    @property
    def family(self) -> Family:
        """How models of this `model_type` differ from Llama."""
        return _get_family(self.model_type)

    @property
    def max_length(self) -> int:
        """The most tokens an example may have: the number of positions, or the sliding window if that is smaller."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Read the dictionary of a `config.json`, as older or as newer versions of `transformers` write it.

        Raises ValueError, with the key and its value, for what `Transformer` does not support.
        """
        model_type = values.get("model_type", "llama")
        defaults = _get_family(model_type).defaults
        _check_supported(values, _SUPPORTED)
        values = {**defaults, **values}
        values["rope_theta"], values["rope_scaling"] = _read_rope(values)

        if model_type != "mistral":  # other families need use_sliding_window for it, which is refused above
            values["sliding_window"] = None
        layer_types = values.get("layer_types") or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"layer_types: {layer_types!r} is not supported, only full_attention")

        if model_type == "gemma":  # the first Gemma folders say "gelu" and mean its tanh approximation
            act = values.get("hidden_activation") or values.get("hidden_act")
            values["hidden_act"] = "gelu_pytorch_tanh" if act == "gelu" else act

        def is_given(name: str) -> bool:  # null stands for the default, but for a token id it means that there is none
            return values.get(name) is not None or (name.endswith("_token_id") and name in values)

        return cls(**{field.name: values[field.name] for field in fields(cls) if is_given(field.name)})

    def to_dict(self) -> dict:
        """Make the dictionary of a `config.json`."""
        return {"architectures": [self.family.architecture], **asdict(self)}


def _read_rope(values: dict) -> tuple[float | None, dict | None]:
    """Read rope_theta and rope_scaling, which newer versions of `transformers` write as rope_parameters."""
    parameters, scaling = (values.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    for rope in (parameters, scaling):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"rope_scaling: {rope!r} is not supported")
    rope = scaling or parameters
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _check_supported(rope, _SUPPORTED)
    rope_theta = rope.get("rope_theta") or parameters.get("rope_theta") or values.get("rope_theta")
    if rope_type == "default":
        return rope_theta, None
    return rope_theta, {"rope_type": rope_type, **{name: rope.get(name) for name in _LLAMA3_SCALING}}


def _check_positive(name: str, value) -> None:
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{name}: {value!r} is not a positive number")


# --- The transformer --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · (weight + offset), computed in float32 (Zhang & Sennrich 2019). [.., D] -> [.., D]

    The offset is 1 in Gemma and 0 in the other families.
    """

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.family.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def forward(self, x):
        # The output is the input of matmuls. Under autocast it is cast to their dtype here, once for all of them.
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
        weight = self.weight.float()
        if self.offset:
            weight = weight + self.offset
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(dtype)


def rope_inv_freq(config: ModelConfig, device=None):
    """The angle in radians by which each pair of a head rotates per position, θ^(−2i/d): float32 [d/2].

    Llama 3's `rope_scaling` extends a model trained on `original_max_position_embeddings` positions. A pair that makes
    fewer than `low_freq_factor` rotations over these positions rotates `factor` times more slowly, a pair that makes
    more than `high_freq_factor` rotations is unchanged, and pairs in between are interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim  # 2i/d
    inv_freq = config.rope_theta**-exponent
    if config.rope_scaling is None:
        return inv_freq
    factor, low, high, original = (config.rope_scaling[name] for name in _LLAMA3_SCALING)
    rotations = original * inv_freq / (2 * math.pi)
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: unchanged
    return smooth * inv_freq + (1 - smooth) * inv_freq / factor


def rope_cos_sin(positions, inv_freq):
    """Cosine and sine of each pair's rotation angle (Su et al. 2021). [T], [d/2] -> two of [T, 1, d]

    Hugging Face's **half-split** layout pairs element i with element i + d/2. So each of the d/2 cosines and sines
    appears twice, and the sines of the first half are negative, as `apply_rotary_emb` needs them.
    """
    angle = positions[:, None, None].float() * inv_freq  # [T, 1, d/2]; bf16 would round position 257 to 256
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary_emb(x, cos, sin):
    """Rotate each pair (x_i, x_{i+d/2}) of every head by its angle. x [T, heads, d], cos, sin [T, 1, d] -> like x."""
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


class VarlenMetadata(NamedTuple):
    """What all layers share about a packed row: rotary embedding and the boundaries of its examples."""

    cos: torch.Tensor  # [T, 1, d], from `rope_cos_sin`
    sin: torch.Tensor  # [T, 1, d]
    positions: torch.Tensor  # int64 [T]
    cu_seqlens: torch.Tensor  # int32 [B+1], on the CPU, where lengths are read without waiting for the GPU
    device_cu_seqlens: torch.Tensor  # int32 [B+1], the same on the model's device
    max_seqlen: int  # an upper bound on the lengths of the examples


def varlen_attention(q, k, v, varlen: VarlenMetadata):
    """Causal attention within each example of a packed row. q [T, H, d], k and v [T, K, d] -> [T, H, d]

    There is neither padding nor a mask. With CUDA, in 16-bit dtypes and for the usual head sizes, one kernel computes
    all examples (FlashAttention, Dao 2023). Otherwise each example is a call of its own.
    """
    fits_flash = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if q.is_cuda and fits_flash:
        return _flash_attention(q, k, v, varlen)
    return _sdpa_per_example(q, k, v, varlen.cu_seqlens)


def _flash_attention(q, k, v, varlen: VarlenMetadata):
    from torch.nn.attention.varlen import varlen_attn  # this import takes a second, and a CPU does not need it

    cu_seqlens, max_seqlen = varlen.device_cu_seqlens, varlen.max_seqlen
    causal, grouped = (-1, 0), q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=causal, enable_gqa=grouped)


def _sdpa_per_example(q, k, v, cu_seqlens):
    lengths, out = cu_seqlens.diff().tolist(), []
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type != "cpu":  # with enable_gqa in float32, a GPU keeps the scores [H, L, L]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # [T, H, d]
    for example in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in example)  # heads first: [1, heads, L, d]
        out_b = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out.append(out_b[0].transpose(0, 1))
    return torch.cat(out)


class KVCache:
    """The keys and values of B growing sequences, so that generation computes each token once.

    The first call, `model(tokens, positions, cu_seqlens, cache)` on the packed prompts, fills it. Each later call,
    `model(tokens, positions, cache=cache)`, takes one new token per sequence: tokens, positions [B] -> hidden [B, D].
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int):
        if config.sliding_window is not None and max_length > config.sliding_window:
            raise ValueError(f"{max_length} tokens are more than sliding_window {config.sliding_window} allows")
        self.max_length = max_length
        self.shape = (2, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.layers: list = [None] * config.num_hidden_layers  # of each: None, then keys and values [2, B, L, K, d]

    def reorder(self, order) -> None:
        """Keep only the sequences `order`, int64 [B'], in that order. Sequences whose index stays are not copied."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        for layer in self.layers:
            layer[:, moved] = layer[:, order[moved]]
        self.layers = [layer[:, : len(order)] for layer in self.layers]

    def prepare(self, varlen: VarlenMetadata) -> None:
        """Compute what all layers share: the slots of the new keys and values, and the mask of a generation step."""
        device, lengths = varlen.positions.device, varlen.cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths).to(device)  # int64 [T]
        self.slots = sequence * self.max_length + varlen.positions  # [T] of B * L
        self.mask = None  # not needed for prompts, which are whole sequences
        if (lengths == 1).all():  # one new token per sequence
            kv_len = int(varlen.positions.max()) + 1
            is_seen = torch.arange(kv_len, device=device) <= varlen.positions[:, None]  # [B, kv_len]
            self.mask = is_seen[:, None, None]  # bool [B, 1, 1, kv_len]

    def attend(self, layer: int, q, k, v, varlen: VarlenMetadata):
        """Store k and v [T, K, d] and attend from q [T, H, d] to all stored keys of the same sequence. -> [T, H, d]"""
        if self.layers[layer] is None:
            self.layers[layer] = k.new_zeros(self.shape)
        keys, values = self.layers[layer]  # [B, L, K, d] each
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        if self.mask is None:
            return varlen_attention(q, k, v, varlen)
        kv_len = self.mask.shape[-1]
        # H/K query heads share a key head. Passing them as H/K query positions of one head reads each key only once.
        q_grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, d]
        keys, values = (x[:, :kv_len].transpose(1, 2) for x in (keys, values))  # [B, K, kv_len, d]
        return F.scaled_dot_product_attention(q_grouped, keys, values, self.mask).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary position embedding. x [T, D] -> [T, D]"""

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
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, varlen: VarlenMetadata, cache: KVCache | None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        heads = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)  # [T, H + K, d]
        heads = apply_rotary_emb(heads, varlen.cos, varlen.sin)
        q, k = heads.split([q.shape[1], k.shape[1]], dim=1)  # [T, H, d], [T, K, d]
        if x.device.type == "cpu":  # in bf16, the backward pass of attention is 5 times slower there than in float32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):  # autocast would cast back to bf16
            out = varlen_attention(q, k, v, varlen) if cache is None else cache.attend(self.layer, q, k, v, varlen)
        return self.o_proj(out.flatten(-2).to(x.dtype))


_ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """A gated linear unit (Shazeer 2020): down(act(gate(x)) · up(x)). x [T, D] -> [T, D]"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = _ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer: attention, then the MLP, each with a norm before it and a residual connection. x [T, D] -> [T, D]"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = MLP(config)
        self.compiled = False

    def forward(self, x, varlen: VarlenMetadata, cache: KVCache | None):
        compute = _compiled_block() if self.compiled and cache is None else Block.compute
        return compute(self, x, varlen, cache)

    def compute(self, x, varlen: VarlenMetadata, cache: KVCache | None):
        x = x + self.self_attn(self.input_layernorm(x), varlen, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@functools.cache
def _compiled_block():
    """`Block.compute`, compiled once for rows of any length; `block.compile()` would compile each block by itself."""
    global _sdpa_per_example  # not compiled: the number of its iterations differs from row to row
    _sdpa_per_example = torch.compiler.disable(_sdpa_per_example)  # loads the compiler, for a second: so not earlier
    compiled = torch.compile(Block.compute, dynamic=True)
    # By default, the head_dim of a sharded block would be taken for a size that changes (pytorch#194795). Made once,
    # because each patch that is entered stays in memory.
    skip_fsdp_guards = torch._dynamo.config.patch(skip_fsdp_guards=False)

    def compute(*arguments):
        with skip_fsdp_guards:
            return compiled(*arguments)

    return compute


class Transformer(nn.Module):
    """A decoder-only language model: from the tokens of a packed row to their last hidden states.

    `forward` returns hidden states, not logits. Training interpolates hidden states before `lm_head` (Mixup, see
    mixup.py), and the logits of a whole row would not fit in memory.

    Two attributes control how it computes:
    - `compute_dtype`: torch.bfloat16 turns autocast on, torch.float32 turns it off, None leaves it to the caller.
    - `activation_checkpointing`: keep only the inputs of the blocks for the backward pass and recompute the rest in it,
      a third more compute for a fraction of the memory (Chen et al. 2016).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config, config.hidden_size),
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
        """The weight W of `lm_head`, [V, D]: the embedding's weight if the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def compile_blocks(self) -> None:
        """Compile the blocks with `torch.compile` when they are first used. Results differ only by rounding."""
        for block in self.model.layers:
            block.compiled = True

    def forward(
        self, tokens, positions=None, cu_seqlens=None, cache: KVCache | None = None, head: Callable | None = None
    ):
        """Compute the hidden states after the final norm, the inputs of `lm_head`.

        tokens and positions int64 [T], cu_seqlens int32 [B+1] or a list (0, then the end of each example) -> [T, D].
        Without a cache, both positions and cu_seqlens may be left out for a single sequence, and the call does not wait
        for a GPU if cu_seqlens is on the CPU. With a `cache`, the first call needs both; each later one takes a token
        per sequence and its position.

        If `head` is given, `head(hidden)` is returned instead. Everything that uses `head_weight` belongs there: a
        weight that FSDP has sharded is whole only during the forward pass.
        """
        device = tokens.device
        if positions is None:
            positions = torch.arange(len(tokens), device=device)
        if cu_seqlens is None:  # a single sequence, or a new token for each sequence in the cache
            cu_seqlens = torch.arange(0, len(tokens) + 1, len(tokens) if cache is None else 1, dtype=torch.int32)
        with self._autocast(device):
            varlen = self._varlen_metadata(positions, cu_seqlens)
            if cache is not None:
                cache.prepare(varlen)
            x = self.model.embed_tokens(tokens)  # [T, D]
            if torch.is_autocast_enabled(device.type):
                x = x.float()  # the residual stream is float32 even where weights are bf16
            if self.config.family.scaled_embeddings:
                x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)
            for block in self.model.layers:
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, varlen, cache, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, varlen, cache)
            hidden = self.model.norm(x)
            return hidden if head is None else head(hidden)

    def _autocast(self, device):
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def _varlen_metadata(self, positions, cu_seqlens) -> VarlenMetadata:
        device, cu_seqlens = positions.device, torch.as_tensor(cu_seqlens, dtype=torch.int32, device="cpu")
        longest, window = int(cu_seqlens.diff().max()), self.config.sliding_window
        if window is not None and longest > window:
            raise ValueError(f"an example of {longest} tokens is longer than sliding_window {window}")
        cos, sin = rope_cos_sin(positions, rope_inv_freq(self.config, device))
        max_seqlen = 1 << (longest - 1).bit_length()  # the next power of two: few values, few compilations
        # From pinned memory, a copy to a GPU is not waited for.
        pinned = cu_seqlens.pin_memory() if device.type == "cuda" else cu_seqlens
        device_cu_seqlens = pinned.to(device, non_blocking=device.type == "cuda")
        return VarlenMetadata(cos, sin, positions, cu_seqlens, device_cu_seqlens, max_seqlen)

    def logits(self, hidden):
        """Compute W z, the unnormalized scores of the next token. [.., D] -> [.., V]"""
        with self._autocast(hidden.device):
            return F.linear(hidden, self.head_weight)


# --- LoRA -------------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """W x + (α/r) B A x: a frozen linear layer and a trainable low-rank update (Hu et al. 2021). [T, in] -> [T, out]

    A [r, in] and B [out, r] are float32 and not initialized here; `infra.hf.reset_lora` draws A at random and sets B to
    zero, so that training starts from the original layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # with the same parameter names
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
        out = F.linear(x, self.weight, self.bias)
        # The last matmul scales its result and adds it in place, so the sum takes no pass over [T, out] of its own.
        return out.addmm_(F.linear(x, self.lora_A), self.lora_B.to(out.dtype).T, alpha=self.scale)


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Freeze `model` and replace every linear layer of its blocks by a `LoRALinear`."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LoRALinear(child, rank, alpha))
