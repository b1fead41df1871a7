"""LoRA: what it adds, what it trains, and what is saved of it."""

import json

import pytest
import torch
from conftest import random_encoded, tiny_model
from safetensors.torch import load_file

from data import pack
from infra.hf import load_model, save_adapter, save_model
from model import LoRALinear, add_lora
from train import TrainConfig, make_optimizer


def with_adapters(folder, rank=3, dtype=torch.float32, **changes):
    """A saved tiny model, and the same opened with adapters that have been given something to say."""
    base = tiny_model(**changes)
    save_model(base, folder / "base", dtype=dtype)
    model = load_model(folder / "base", dtype, compute_dtype=dtype, lora_rank=rank, lora_alpha=5.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model):
    tokens = torch.arange(3, 60)
    with torch.no_grad():
        return model.logits(model(tokens))


def test_an_adapter_by_hand():
    """W = [[1, 2]], A = [[1, 1]], B = [[3]], α = 4, r = 1: (W + 4 · 3 · [1, 1]) x."""
    linear = torch.nn.Linear(2, 1, bias=True)
    layer = LoRALinear(linear, rank=1, alpha=4.0)
    with torch.no_grad():
        for parameter, values in zip(layer.parameters(), ([[1, 2]], [5], [[1, 1]], [[3]]), strict=True):
            parameter.copy_(torch.tensor(values))
    assert layer(torch.tensor([[10.0, 1.0]])).tolist() == [[13 * 10 + 14 * 1 + 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_equals_its_formula(device, dtype):
    """W x + b + (α/r) B A x and its gradients, from one matmul that adds to the output of another."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(24, 40).requires_grad_(False), rank=3, alpha=5.0)
    for parameter in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(parameter, std=0.3)
    x, weights = torch.randn(17, 24), torch.randn(17, 40)
    merged = layer.weight + 5 / 3 * layer.lora_B @ layer.lora_A
    expected = torch.nn.functional.linear(x, merged, layer.bias)
    (expected * weights).sum().backward()
    wanted = [expected, layer.lora_A.grad, layer.lora_B.grad]

    layer = layer.to(device)
    layer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(x.to(device))
    assert out.dtype == dtype
    (out.float() * weights.to(device)).sum().backward()
    for actual, value in zip([out, layer.lora_A.grad, layer.lora_B.grad], wanted, strict=True):
        bound = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert (actual.float().cpu() - value).norm() < bound * value.norm()


def test_training_starts_from_the_model_as_it_was(tmp_path):
    base = tiny_model()
    save_model(base, tmp_path / "base")
    model = load_model(tmp_path / "base", lora_rank=4)
    assert torch.equal(logits(model), logits(base))
    drawn = [p for name, p in model.named_parameters() if name.endswith("lora_A")]
    assert all(0 < p.abs().max() <= p.shape[1] ** -0.5 for p in drawn)
    again = dict(load_model(tmp_path / "base", lora_rank=4).named_parameters())
    other = dict(load_model(tmp_path / "base", lora_rank=4, seed=1).named_parameters())
    name = "model.layers.1.mlp.up_proj.lora_A"
    assert torch.equal(dict(model.named_parameters())[name], again[name])
    assert not torch.equal(again[name], other[name])


def test_adapters_are_beside_every_linear_layer_of_the_blocks_and_alone_are_trained(tmp_path):
    model = with_adapters(tmp_path, tie_word_embeddings=False, model_type="qwen2")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert trained == {f"model.layers.{i}.{layer}.lora_{x}" for i in range(2) for layer in layers for x in "AB"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(lr=1e-2))
    batch = pack(random_encoded([20, 9]))
    model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state) == len(trained)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in trained)
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_merged_weights_give_the_same_logits(tmp_path, model_type):
    model = with_adapters(tmp_path, model_type=model_type)
    save_model(model, tmp_path / "merged", max_shard_bytes=20_000)
    merged = load_model(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_model(tmp_path / "base")), atol=1e-2)


def test_frozen_weights_stay_as_the_folder_keeps_them_where_matmuls_are_in_bf16(tmp_path):
    model = with_adapters(tmp_path, dtype=torch.bfloat16)
    dtypes = {(p.requires_grad, p.dim(), p.dtype) for p in model.parameters()}
    assert dtypes == {(True, 2, torch.float32), (False, 2, torch.bfloat16), (False, 1, torch.float32)}  # 1: norms
    save_model(model, tmp_path / "merged", dtype=torch.float32)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    expected = base[f"{name}.weight"].float() + 5 / 3 * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    batch = pack(random_encoded([20, 9]))
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)
    model.logits(hidden).float().square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma"])
def test_the_adapter_folder_gives_the_same_logits_in_peft_and_transformers(tmp_path, model_type):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
    model = with_adapters(tmp_path, model_type=model_type)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.arange(3, 60)[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 5.0


def test_adding_adapters_leaves_embedding_head_and_norms_alone():
    model = tiny_model(tie_word_embeddings=False)
    add_lora(model, 2, 4.0)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 2 * 7
