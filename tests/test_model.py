"""The transformer: packing, caching, configuration, checkpoints."""

import contextvars
import json
import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from safetensors.torch import load_file, save_file

import model as model_module
from benchmarks.scaling import peak_of
from infra.cli import ArgumentParser
from infra.hf import load_config, load_model, save_model, stored_dtype
from model import (
    KVCache,
    ModelConfig,
    Transformer,
    VarlenMetadata,
    _flash_attention,
    _sdpa_per_example,
    apply_rotary_emb,
    rope_cos_sin,
    rope_inv_freq,
    varlen_attention,
)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def packed(lengths, device="cpu"):
    """tokens, positions, cu_seqlens of examples of these lengths, the last of them always on the CPU."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(0, 300, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens.to(device), positions.to(device), torch.tensor([0, *lengths]).cumsum(0).int()


def assert_near(actual, expected):
    """Equal up to rounding in float32, of which the kernels of a GPU do more."""
    bound = 1e-5 if actual.device.type == "cpu" else 1e-4
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


# --- Attention and packing --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_packed_examples_equal_each_alone(heads, device):
    model = tiny_model(num_attention_heads=heads[0], num_key_value_heads=heads[1]).to(device)
    lengths = [7, 1, 30, 12]
    tokens, positions, cu_seqlens = packed(lengths, device)
    alone = torch.cat([model(example) for example in tokens.split(lengths)])
    assert_near(model(tokens, positions, cu_seqlens), alone)
    assert torch.equal(model(tokens, positions, cu_seqlens.tolist()), model(tokens, positions, cu_seqlens))
    model.compute_dtype = torch.bfloat16  # with CUDA, this takes another kernel
    hidden = model(tokens, positions, cu_seqlens)
    assert hidden.dtype == torch.bfloat16 and (hidden - alone).norm() < 0.03 * alone.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_example_does_not_see_another(device, dtype):
    model = tiny_model().to(device)
    model.compute_dtype = dtype
    tokens, positions, cu_seqlens = packed([5, 9], device)
    before = model(tokens, positions, cu_seqlens)
    changed = tokens.clone()
    changed[:5] = (changed[:5] + 1) % 300
    after = model(changed, positions, cu_seqlens)
    assert torch.equal(before[5:], after[5:])
    assert not torch.allclose(before[:5], after[:5])


@torch.no_grad()
def test_attention_is_causal(device):
    model = tiny_model().to(device)
    tokens, _, _ = packed([20], device)
    changed = tokens.clone()
    changed[12:] = (changed[12:] + 1) % 300
    assert_near(model(tokens)[:12], model(changed)[:12])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_varlen_attention_equals_softmax_written_out(device, dtype, bound):
    if dtype == torch.float64 and device.type == "mps":
        pytest.skip("MPS has no float64")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    q_device, k_device, v_device = (x.to(device) for x in (q, k, v))
    q, k, v = q.double(), k.double(), v.double()
    expected = torch.zeros_like(q)
    for start, end in ((0, 3), (3, 5)):
        for head in range(4):
            for t in range(start, end):
                scores = k[start : t + 1, head // 2] @ q[t, head] / math.sqrt(8)
                expected[t, head] = scores.softmax(0) @ v[start : t + 1, head // 2]
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    varlen = VarlenMetadata(None, None, None, cu_seqlens, cu_seqlens.to(device), max_seqlen=4)
    out = varlen_attention(q_device, k_device, v_device, varlen)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), expected, rtol=bound, atol=bound)


class OnGPU(torch.Tensor):
    """A tensor in CPU memory that says that it is on a GPU."""

    device = torch.device("mps")


def test_a_gpu_gets_a_key_head_for_each_query_head(monkeypatch):
    """Its kernels that share key heads keep the scores of all pairs of tokens."""
    q, k, v = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    cu_seqlens, shapes = torch.tensor([0, 4, 9]), []
    expected = _sdpa_per_example(q, k, v, cu_seqlens)
    attention = F.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        shapes.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    out = _sdpa_per_example(*(x.as_subclass(OnGPU) for x in (q, k, v)), cu_seqlens)
    assert shapes == [(4, 4, 4, False)] * 2
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)
    shapes.clear()
    _sdpa_per_example(q, k, v, cu_seqlens)
    assert shapes == [(4, 2, 2, True)] * 2


@pytest.mark.parametrize(
    "head_size, dtype, is_flash",
    [
        (64, "bfloat16", True),
        (256, "float16", True),
        (64, "float32", False),
        (12, "bfloat16", False),
        (264, "bfloat16", False),
    ],
)
def test_flash_attention_gets_no_head_size_that_it_refuses(monkeypatch, head_size, dtype, is_flash):
    class OnCUDA(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(model_module, "_flash_attention", lambda *arguments: "flash")
    monkeypatch.setattr(model_module, "_sdpa_per_example", lambda *arguments: "sdpa")
    q = torch.zeros(3, 2, head_size, dtype=getattr(torch, dtype)).as_subclass(OnCUDA)
    varlen = VarlenMetadata(None, None, None, None, None, max_seqlen=4)
    assert varlen_attention(q, q, q, varlen) == ("flash" if is_flash else "sdpa")


def test_calls_of_compiled_blocks_leave_nothing_in_memory(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model_module._compiled_block.cache_clear()
    model = tiny_model()
    model.compile_blocks()
    model(torch.arange(5))
    before = len(contextvars.copy_context())
    for _ in range(10):
        model(torch.arange(5))
    model_module._compiled_block.cache_clear()
    assert len(contextvars.copy_context()) == before


def test_blocks_are_compiled_four_times_at_most(monkeypatch):
    """With and without gradients, and each of these again for a row of one token, whatever the rows hold."""
    graphs = []

    def count(graph_module, inputs):  # instead of FlashAttention, which a CPU does not have: something of its shape
        for node in graph_module.graph.nodes:
            if "varlen_attn" in str(node.target):
                node.target = lambda q, *others: (q + 1, None, None)
                graphs.append(graph_module)
        graph_module.recompile()
        return graph_module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(model_module, "varlen_attention", _flash_attention)
    model_module._compiled_block.cache_clear()
    rng, model = random.Random(0), tiny_model()
    model.compile_blocks()
    for number in range(200):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 5))] if number % 20 else [1]
        with torch.set_grad_enabled(number % 3 > 0):
            model(*packed(lengths))
    model_module._compiled_block.cache_clear()
    assert 2 <= len(graphs) <= 4


def test_rotation_by_hand():
    """Head size 4, θ = 100: pair 0 rotates by the position, pair 1 by a tenth of it; pairs are (0, 2) and (1, 3)."""
    inv_freq = rope_inv_freq(ModelConfig(head_dim=4, rope_theta=100.0))
    cos, sin = rope_cos_sin(torch.tensor([3]), inv_freq)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    torch.testing.assert_close(apply_rotary_emb(x, cos, sin)[0, 0], torch.tensor(expected))


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 16)
    scores = []
    for shift in (0, 50):
        cos, sin = rope_cos_sin(torch.tensor([shift, shift + 3]), rope_inv_freq(ModelConfig(head_dim=16)))
        scores.append((apply_rotary_emb(q, cos[1:], sin[1:]) * apply_rotary_emb(k, cos[:1], sin[:1])).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_equals_the_whole_sequence(device):
    model = tiny_model().to(device)
    lengths, new = [6, 2, 9], 4
    rows = [torch.randint(0, 300, (n + new,), device=device) for n in lengths]
    tokens = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
    _, positions, cu_seqlens = packed(lengths, device)
    cache = KVCache(model.config, 3, max(lengths) + new)
    hidden = model(tokens, positions, cu_seqlens, cache)[cu_seqlens[1:].long() - 1]
    for step in range(new):
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            assert_near(hidden[b], model(row[: n + step])[-1])
        following = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])
        hidden = model(following, torch.tensor(lengths, device=device) + step, cache=cache)


@torch.no_grad()
def test_cache_of_a_single_token_prompt(device):
    model = tiny_model().to(device)
    row, positions = torch.tensor([5, 6, 7], device=device), torch.arange(3, device=device)
    cache = KVCache(model.config, 1, 3)
    model(row[:1], positions[:1], torch.tensor([0, 1]).int(), cache)
    hidden = [model(row[t : t + 1], positions[t : t + 1], cache=cache) for t in (1, 2)]
    assert_near(hidden[-1][0], model(row)[-1])


def test_gradients_in_bf16_are_those_in_float32_to_a_few_percent(device):
    model = tiny_model().to(device)
    tokens, positions, cu_seqlens = packed([9, 20], device)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        model.compute_dtype = dtype
        hidden = model(tokens, positions, cu_seqlens)
        assert hidden.dtype == dtype
        model.logits(hidden).float().square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert gradients[1].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


# --- Configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"model_type": "mamba"}, "model_type: 'mamba'"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act: 'silu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor: None"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "low_freq_factor must be below"),
        ({"sliding_window": 0}, "sliding_window: 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        ({"num_attention_heads": 5}, "hidden_size: 32"),
        ({"head_dim": 7}, "head_dim: 7"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: 2.5"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: 1000"),
        ({"rope_theta": "10000"}, "rope_theta: '10000'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: -1.0"),
        ({"rope_theta": 0.0}, "rope_theta: 0.0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ModelConfig(**{"hidden_size": 32, "num_attention_heads": 4, **change})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "mamba"}, "model_type: 'mamba'"),
        ({"model_type": ["llama"]}, "model_type: "),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
        ({"num_local_experts": 8}, "num_local_experts: 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier: 12.0 is not supported, only 1.0"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}}, "rope_type: 'linear'"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": [1]}, "rope_scaling: "),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window: True"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_scaling: {'full_attention'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"], "sliding_window": 64}, "sliding_attention"),
    ],
)
def test_unsupported_files_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({"hidden_size": 32, "num_attention_heads": 4, **values})


def test_a_window_counts_where_the_family_uses_it():
    def window(**values):
        return ModelConfig.from_dict({"sliding_window": 64, **values}).sliding_window

    assert window(model_type="mistral") == 64
    assert window(model_type="mistral", use_sliding_window=False) == 64
    assert ModelConfig.from_dict({"model_type": "mistral"}).sliding_window == 4096
    assert ModelConfig.from_dict({"model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert window(model_type="qwen2", use_sliding_window=False) is None
    assert window(model_type="llama") is None
    assert ModelConfig(sliding_window=64, max_position_embeddings=128).max_length == 64


@torch.no_grad()
def test_an_example_longer_than_the_window_is_refused():
    model = tiny_model(model_type="mistral", sliding_window=16)
    tokens, positions, cu_seqlens = packed([16, 5])
    assert model(tokens, positions, cu_seqlens).shape == (21, 32)
    with pytest.raises(ValueError, match="17 tokens is longer than sliding_window 16"):
        model(torch.arange(17))
    with pytest.raises(ValueError, match="17 tokens are more than sliding_window 16"):
        KVCache(model.config, 1, 17)


def test_llama3_scaling_by_hand():
    """Over 64 positions: pairs that rotate more than 4 times are unchanged, less than once slowed down by 8."""
    config = ModelConfig(
        head_dim=8, rope_theta=1e4, rope_scaling={**LLAMA3_SCALING, "original_max_position_embeddings": 64}
    )
    plain = rope_inv_freq(ModelConfig(head_dim=8, rope_theta=1e4))  # 1, 0.1, 0.01, 0.001
    rotations = 64 * 0.1 / (2 * math.pi)  # 1.0186, between 1 and 4
    smooth = (rotations - 1) / 3
    between = 0.1 * (smooth + (1 - smooth) / 8)
    torch.testing.assert_close(rope_inv_freq(config), torch.tensor([1.0, between, 0.01 / 8, 0.001 / 8]))
    assert torch.equal(plain[:1], rope_inv_freq(config)[:1])


def test_both_spellings_of_rope_theta():
    old = ModelConfig.from_dict({"rope_theta": 500.0})
    new = ModelConfig.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert old == new and new.rope_theta == 500.0
    with pytest.raises(ValueError, match="rope_type: 'yarn'"):
        ModelConfig.from_dict({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}})


@pytest.mark.parametrize("value", [{"rope_type": "default"}, {"type": "default"}, None])
def test_spellings_of_nothing_special_are_accepted(value):
    assert ModelConfig.from_dict({"rope_scaling": value, "attention_bias": None}) == ModelConfig()
    with pytest.raises(ValueError, match=r"partial_rotary_factor: 0.5"):
        ModelConfig.from_dict({"rope_parameters": {"partial_rotary_factor": 0.5}})


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_the_same(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tied)
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other)
    tokens = torch.arange(20)
    assert torch.equal(model.logits(model(tokens)), again.logits(again(tokens)))


def test_nothing_is_written_over(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a model"):
        save_model(tiny_model(seed=1), tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_saved_names_are_those_of_hugging_face(tmp_path):
    save_model(tiny_model(tie_word_embeddings=False), tmp_path / "m")
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_missing_and_left_over_weights_are_both_listed(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    weights["model.extra.weight"] = weights.pop("model.norm.weight")
    save_file(weights, file)
    with pytest.raises(
        ValueError, match=r"missing weights: \['model.norm.weight'\].*left over: \['model.extra.weight'\]"
    ):
        load_model(tmp_path / "m")


def test_stored_angles_and_a_second_copy_of_a_tied_head_are_passed_over(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(weights | {"lm_head.weight": model.head_weight.detach().clone()}, file)
    assert torch.equal(load_model(tmp_path / "m").head_weight, model.head_weight)
    save_file(weights | {"lm_head.weight": torch.zeros(300, 32)}, file)
    with pytest.raises(ValueError, match=r"lm_head.weight is not the embedding, though tie_word_embeddings says so"):
        load_model(tmp_path / "m")
    save_file({"lm_head.weight": weights.pop("model.embed_tokens.weight"), **weights}, file)
    with pytest.raises(
        ValueError, match=r"missing weights: \['model.embed_tokens.weight'\]; weights left over: \['lm_h"
    ):
        load_model(tmp_path / "m")


def test_weights_that_are_no_plain_floats_are_refused(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is stored as I8; only F32, BF16 and F16 are read"):
        load_model(tmp_path / "m")


def test_shards_and_one_file_hold_the_same(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for shard in shards:
        weights = load_file(tmp_path / "many" / shard)
        assert len(weights) == 1 or sum(4 * w.numel() for w in weights.values()) <= 20_000
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    for (name, a), (other, b) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)


def test_no_weight_is_held_twice(tmp_path):
    """Reading holds the model and the map of one shard; writing, one shard beside the model."""
    model = tiny_model(hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    size, largest = sum(4 * p.numel() for p in model.parameters()), 4 * 128 * 512
    save_model(model, tmp_path / "many", max_shard_bytes=size // 4)
    assert peak_of(lambda: load_model(tmp_path / "many")) <= size + size // 4 + largest
    written = peak_of(lambda: save_model(model, tmp_path / "half", dtype=torch.float64, max_shard_bytes=size // 2))
    assert written <= size // 2 + 2 * largest < size


@pytest.fixture
def shards(tmp_path):
    save_model(tiny_model(), tmp_path / "m", max_shard_bytes=20_000)
    return tmp_path / "m"


def change_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_a_missing_shard_is_named(shards):
    (shards / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00005.safetensors: not found"):
        load_model(shards)


@pytest.mark.parametrize("name", ["", "../model.safetensors", "/etc/passwd", "deep/model.safetensors", "..", "."])
def test_an_index_that_points_outside_its_folder_is_refused(shards, name):
    change_index(shards, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: .* is not a file of this folder"):
        load_model(shards)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_a_damaged_index_is_named(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: "):
        load_model(shards)


def test_a_shard_cut_short_is_named(shards):
    file = shards / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model-00003-of-00005.safetensors: not a whole safetensors file"):
        load_model(shards)


def test_weights_of_another_kind_are_said(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is not read, only safetensors"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model-00001-of-00002.safetensors").touch()  # of a download that was stopped
    with pytest.raises(FileNotFoundError, match=r"not found; nor model.safetensors.index.json, .* in model-00001"):
        load_model(tmp_path / "m")


def test_a_compiled_model_is_saved_under_plain_names(tmp_path):
    model = tiny_model()
    save_model(torch.compile(model, backend="eager"), tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m").head_weight, model.head_weight)


def test_saved_in_the_dtype_asked_for(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "m", dtype=torch.bfloat16)
    assert stored_dtype(tmp_path / "m") == torch.bfloat16
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(load_model(tmp_path / "m").head_weight, model.head_weight.bfloat16().float())
    assert model.head_weight.dtype == torch.float32


def test_wrong_shape_is_named(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[31\].*calls for \[32\]"):
        load_model(tmp_path / "m")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: not found"):
        load_model(tmp_path)
    save_model(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: not found"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: "):
        load_config(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: "):
        load_config(tmp_path / "m")


def test_weights_in_half_precision_load_as_float32_masters(tmp_path):
    model = tiny_model()
    save_model(model.to(torch.bfloat16), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(tmp_path / "m").parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path / "m", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_weights_opened_in_bf16_give_what_autocast_gives(tmp_path, device):
    """Weights of matmuls are rounded once and not at each use; those of norms are not rounded."""
    model = tiny_model(model_type="qwen3", head_dim=8, tie_word_embeddings=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(embedding.bfloat16())  # autocast does not round it
    save_model(model, tmp_path / "m")
    masters = load_model(tmp_path / "m", device=device, compute_dtype=torch.bfloat16)
    opened = load_model(tmp_path / "m", torch.bfloat16, device, compute_dtype=torch.bfloat16)
    assert {(p.dim(), p.dtype) for p in opened.parameters()} == {(1, torch.float32), (2, torch.bfloat16)}
    row = packed([9, 20], device)
    assert torch.equal(opened.logits(opened(*row)), masters.logits(masters(*row)))


@torch.no_grad()
def test_a_bf16_model_runs_without_autocast(device):
    model = tiny_model().to(device)
    tokens = torch.arange(30, device=device)
    expected = model.logits(model(tokens)).log_softmax(-1)
    half = model.to(torch.bfloat16)
    actual = half.logits(half(tokens)).float().log_softmax(-1)
    assert (expected - actual).abs().mean() < 0.1


# --- Command line -----------------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_one_line_with_the_one_that_was_meant(capsys):
    parser = ArgumentParser(prog="x.py")
    parser.add_argument("--batch_size", type=int)
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--batchsize", "3"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "x.py: error: unknown flag --batchsize; did you mean --batch_size?\n"


def test_initial_weights_are_a_function_of_the_seed():
    one, other, third = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert isinstance(third, Transformer) and not torch.equal(one.head_weight, third.head_weight)
