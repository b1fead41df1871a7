"""Generation: the same tokens for any batch, drawn as often as their probability says."""

import pytest
import torch
from conftest import tiny_model

from infra.generation import Sampling, generate
from infra.hf import save_model


@torch.no_grad()
def test_generation_is_greedy_and_independent_of_the_batch(device):
    model = tiny_model(initializer_range=0.5).to(device)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.logits(model(torch.tensor(ids, device=device))[-1]).argmax()))
        expected.append(ids[len(prompt) :])
    for batch_size in (1, 3, 64):
        assert generate(model, prompts, 12, batch_size=batch_size) == expected
    stop = expected[0][5]
    assert generate(model, prompts, 12, [stop])[0] == expected[0][: expected[0].index(stop) + 1]
    assert generate(model, prompts, 0) == [[], [], [], []] and generate(model, [], 5) == []


def test_sequences_that_end_leave_the_others_as_they_are():
    model, stop = tiny_model(initializer_range=0.5), range(0, 300, 5)
    prompts = [list(range(3 + 7 * n, 5 + 9 * n)) for n in range(12)]
    alone = [generate(model, [prompt], 30, stop)[0] for prompt in prompts]
    assert generate(model, prompts, 30, stop) == alone
    assert len({len(answer) for answer in alone}) > 4


@pytest.mark.parametrize("limit", [{"max_position_embeddings": 20}, {"model_type": "mistral", "sliding_window": 20}])
def test_generation_ends_where_the_model_does(limit, capsys):
    """Tokens 0 to 19 have positions: 20 tokens, and one more that the last of them predicts."""
    model = tiny_model(**limit)
    prompts = [list(range(3, 3 + n)) for n in (5, 18, 21, 20)]
    assert [len(answer) for answer in generate(model, prompts, 30)] == [16, 3, 0, 1]
    assert [len(answer) for answer in generate(model, prompts, 30, batch_size=1)] == [16, 3, 0, 1]
    assert "warning: 1 prompts are too long for the model: no answer" in capsys.readouterr().err


def test_generation_takes_no_kernel_that_plans_for_each_length(monkeypatch):
    model, enabled = tiny_model(), []
    forward = model.forward

    def recorded(*args, **kwargs):
        sdp = torch.backends.cuda
        enabled.append((sdp.cudnn_sdp_enabled(), sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    generate(model, [[5, 6, 7]], 3)
    assert enabled == [(False, True, True)] * 3 and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_draws_are_a_function_of_seed_and_prompt_alone(device):
    model = tiny_model(initializer_range=0.5).to(device)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    expected = generate(model, prompts, 12, sampling=sampling)
    for batch_size in (1, 3):
        assert generate(model, prompts[::-1], 12, batch_size=batch_size, sampling=sampling) == expected[::-1]
    assert generate(model, prompts, 12, sampling=sampling._replace(seed=4)) != expected
    one, same, other = (sampling.uniform(prompt, 5).tolist() for prompt in ([1], [1], [2]))
    assert one == same != other and all(0 <= draw < 1 for draw in one)
    again = generate(model, [[8]] * 3, 12, sampling=sampling, repeats=[0, 1, 2])
    assert again[0] == expected[1] and again[0] != again[1] != again[2] != again[0]
    cold = sampling._replace(temperature=1e-4)
    assert generate(model, prompts, 12, sampling=cold) == generate(model, prompts, 12) != expected


def test_tokens_are_drawn_as_often_as_the_nucleus_says():
    p = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = p.log().expand(20_000, 5)
    for top_p, expected in ((1.0, p), (0.8, torch.tensor([0, 0.4, 0.15, 0.3, 0]) / 0.85), (1e-6, torch.eye(5)[1])):
        drawn = Sampling(1.0, top_p).next_tokens(logits, draws).bincount(minlength=5) / 20_000
        torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)
    flatter = p.sqrt() / p.sqrt().sum()
    assert Sampling(1e-310).next_tokens(logits[:3], draws[:3]).tolist() == [1, 1, 1]
    drawn = Sampling(2.0).next_tokens(logits, draws).bincount(minlength=5) / 20_000
    torch.testing.assert_close(drawn, flatter, atol=0.015, rtol=0)


def test_greedy_text_equals_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    model = tiny_model(initializer_range=0.5)
    save_model(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    prompt = [1, 5, 6, 7]
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60, eos_token_id=None)
    assert generate(model, [prompt], 60)[0] == expected[0, 4:].tolist()
