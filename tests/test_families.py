"""Each family against `transformers`: the same logits, from its folders and from ours."""

import pytest
import torch
from conftest import TINY
from test_model import LLAMA3_SCALING, packed

from infra.hf import load_model, save_model
from model import KVCache, ModelConfig

# name -> (the family's configuration class, what is particular to it)
FAMILIES = {
    "llama2": ("LlamaConfig", {}),
    "llama2, multi-query": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama2, 6 heads on 2, own head size": (
        "LlamaConfig",
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    ),
    "llama3.1": ("LlamaConfig", {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}),
    "llama3.2, tied": (
        "LlamaConfig",
        {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": 4096}),
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied, 8 heads on 2": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma, grouped": ("GemmaConfig", {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3}),
}


@pytest.fixture(params=FAMILIES)
def theirs(request):
    """A tiny model of a family, made by `transformers`, with every weight and bias drawn at random."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    config_class, particular = FAMILIES[request.param]
    config = getattr(transformers, config_class)(
        vocab_size=300, **{**TINY, "max_position_embeddings": 1024, **particular}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.data.mean(), std=0.2)  # norms around their 1, or Gemma's 0
    return model


def logits_of(theirs, tokens):
    return theirs(tokens[None]).logits[0]


@torch.no_grad()
def test_logits_equal_those_of_transformers_both_ways(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    lengths = [600, 37, 1]
    tokens, positions, cu_seqlens = packed(lengths)
    ours = model.logits(model(tokens, positions, cu_seqlens))
    expected = torch.cat([logits_of(theirs, example) for example in tokens.split(lengths)])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)

    save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(theirs)
    torch.testing.assert_close(logits_of(again, tokens[:600]), expected[:600], rtol=0, atol=1e-5)
    assert load_model(tmp_path / "ours").config == model.config


@torch.no_grad()
def test_cached_steps_equal_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    tokens, _, _ = packed([30])
    cache = KVCache(model.config, 1, 30)
    model(tokens[:20], cu_seqlens=torch.tensor([0, 20]).int(), cache=cache)
    for t in range(20, 30):
        hidden = model(tokens[t : t + 1], torch.tensor([t]), cache=cache)
    torch.testing.assert_close(model.logits(hidden)[0], logits_of(theirs, tokens)[-1], rtol=0, atol=2e-4)


# The configurations of models on the Hub, as their config.json gives them: what a family leaves out must be filled in.
HUB = {
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "pretraining_tp": 1,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "hidden_act": "silu",
        "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16", "use_cache": True,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen2.5-14B": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 131072,
        "max_window_layers": 48, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072,
        "use_sliding_window": False, "tie_word_embeddings": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "bos_token_id": 151643, "eos_token_id": 151643, "use_mrope": False,
    },
    "gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "rope_scaling": None,
        "hidden_act": "gelu", "hidden_activation": None, "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
}  # fmt: skip
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-14B": 14_770_033_664,
    "gemma-2b": 2_506_172_416,
}


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_have_the_parameters_they_are_known_for(name):
    from model import Transformer

    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(HUB[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.config.tie_word_embeddings == (name == "gemma-2b")
    assert model.config.max_length == {"Mistral-7B-v0.1": 4096}.get(name, model.config.max_position_embeddings)
