"""One model over several processes: the same updates, scores and answers as in one, at a fraction of the memory.

Each number of processes runs `in_processes` once; the tests then compare what it left behind.
"""

import json
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import random_encoded, run_script, tiny_model

import infra.hf
import infra.savepoints
from confidence import score_examples
from data import Dataset, build_batch, sample_lambda
from infra.device import DTYPES
from infra.distributed import gather_objects, init_distributed, rank, world_size
from infra.files import verify_manifest
from infra.fsdp import apply_fsdp, full_tensor, is_sharded, local_shard
from infra.generation import generate
from infra.hf import load_for_inference, load_model, save_model
from infra.metrics import StepMetrics
from infra.plan import estimate_communication
from infra.savepoints import Savepoints
from model import RMSNorm, add_lora
from train import TrainConfig, forward_backward, make_optimizer

LENGTHS = [40, 3, 17, 8, 25, 60, 2]  # three pairs and an odd one out
MODELS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "model_type": "qwen2", "vocab_size": 301},  # an odd number of rows
}
CASES = {  # name -> settings; 70 tokens make two micro-batches of a process or more
    "full": {},
    "accumulated": {"micro_batch_tokens": 70},
    "lora, accumulated": {"micro_batch_tokens": 70, "lora_rank": 4},
    "recomputed": {"micro_batch_tokens": 70, "activation_checkpointing": True},
    "accumulated, weights whole": {"micro_batch_tokens": 70, "zero_stage": 2},
    "accumulated, whole": {"micro_batch_tokens": 70, "zero_stage": 1},
    "lora, accumulated, whole": {"micro_batch_tokens": 70, "lora_rank": 4, "zero_stage": 1},
    "recomputed, whole": {"micro_batch_tokens": 70, "activation_checkpointing": True, "zero_stage": 1},
    "compiled": {"micro_batch_tokens": 70, "compile": True},
    "compiled, recomputed": {"micro_batch_tokens": 70, "compile": True, "activation_checkpointing": True},
    "compiled, lora, recomputed": {
        "micro_batch_tokens": 70,
        "compile": True,
        "activation_checkpointing": True,
        "lora_rank": 4,
    },
    "bf16": {"micro_batch_tokens": 70, "dtype": "bf16"},
    "bf16, whole": {"micro_batch_tokens": 70, "dtype": "bf16", "zero_stage": 1},
}
CASES_OF = {  # by number of processes
    1: list(CASES),
    2: list(CASES),
    4: ["full", "lora, accumulated"],
}


class Traffic:
    """Counts the bytes that a process sends in all-gathers and reduce-scatters while it is entered."""

    def __enter__(self):
        self.sent, self.real = 0, {name: getattr(dist, name) for name in ("all_gather_single", "reduce_scatter_single")}
        for name, function in self.real.items():
            setattr(dist, name, partial(self.count, function))
        return self

    def count(self, function, *arguments, **named):
        whole = max(x.nbytes for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor))
        self.sent += whole * (world_size() - 1) // world_size()
        return function(*arguments, **named)

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(dist, name, function)


def train_two_steps(folder: Path, **settings):
    """Train. -> the changes of the weights, the last gradients, bytes of this process

    The bytes are those of its weights and optimizer state, and those that it sends in the first step by the plan and as
    counted.
    """
    config = TrainConfig(**{"lr": 1e-3, "dtype": "fp32", "micro_batch_tokens": 1000, **settings})
    model = load_model(folder, compute_dtype=DTYPES[config.dtype], lora_rank=config.lora_rank)
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        model.compile_blocks()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:  # with 1e-8, an update whose gradient is rounding noise is noise too
        group["eps"] = 1e-5
    dataset = Dataset.from_encoded(random_encoded(LENGTHS))
    before = {name: full_tensor(p).detach().clone() for name, p in model.named_parameters()}
    for number, chosen in enumerate((np.arange(7), np.arange(2))):  # of the second, some processes get nothing
        optimizer.zero_grad()
        lam = sample_lambda(len(chosen) // 2, 0.5, 0, number)
        batch = build_batch(dataset, chosen, lam, config.micro_batch_tokens, rank(), world_size())
        with Traffic() as traffic:
            forward_backward(model, batch, 0.7, 1.0, None, config.zero_stage)
        if number == 0:
            planned = estimate_communication(model, config, world_size(), len(batch.micro_batches))
            sent = [planned, traffic.sent]
        gathered = [p for p in model.parameters() if world_size() > 1 and not is_sharded(p)]
        assert not gathered  # after a step, all is in shards
        optimizer.step()
    changed = {name: full_tensor(p).detach() - before[name] for name, p in model.named_parameters()}
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    state = [value for values in optimizer.state.values() for value in values.values() if value.numel() > 1]
    local_bytes = sum(local_shard(t).numel() * t.element_size() for t in [*model.parameters(), *state])
    return changed, gradients, [local_bytes, *sent]


def save_savepoint(model, folder: Path) -> None:
    """Write a savepoint in small parts, and which files each process has hashed."""
    optimizer, metrics = make_optimizer(model, TrainConfig()), StepMetrics(10, torch.device("cpu"))
    infra.savepoints.MAX_FILE_BYTES, hashed, real = 20_000, [], infra.savepoints.checksums

    def checksums(files):
        hashed.append(real(files))
        return hashed[-1]

    infra.savepoints.checksums = checksums
    Savepoints(folder, "reference", every=1, keep=1).save(5, model, optimizer, metrics)
    names = gather_objects([name for entries in hashed for name in entries])
    if rank() == 0:
        (folder / "hashed.json").write_text(json.dumps(names))


def seen_in_forward(model_type: str, lora_rank: int | None = None) -> dict:
    """What a sharded model that computes in bf16 sees: the dtypes of its weights by kind, and cu_seqlens."""
    model, seen = tiny_model(model_type=model_type), {}
    model.compute_dtype = torch.bfloat16
    if lora_rank:
        add_lora(model, lora_rank, 4.0)
    apply_fsdp(model, "cpu")

    def record(module, args):
        for name, parameter in module.named_parameters(recurse=False):
            seen.setdefault("norm" if isinstance(module, RMSNorm) else name, set()).add(parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(record)
    metadata = model._varlen_metadata

    def recorded(positions, cu_seqlens):
        seen["cu_seqlens"] = cu_seqlens
        return metadata(positions, cu_seqlens)

    model._varlen_metadata = recorded
    tokens, positions, cu_seqlens = torch.arange(5), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 2, 5]).int()
    model(tokens, positions, cu_seqlens=cu_seqlens, head=lambda hidden: model.logits(hidden).sum()).backward()
    return seen


def in_processes(folder: Path) -> None:
    """What every number of processes does; rank 0 writes it down."""
    results, local_bytes = {}, {}
    with init_distributed(), pytest.MonkeyPatch.context() as patch:
        symbols = []  # of each graph, how many sizes it takes as arguments

        def backend(graph, examples):  # the graphs of a GPU, without its kernels
            symbols.append(sum(isinstance(x, torch.SymInt) for x in examples))
            return aot_eager(graph, examples)

        aot_eager = torch._dynamo.lookup_backend("aot_eager")
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        for model_name in MODELS:
            for case in CASES_OF[world_size()]:
                settings = CASES[case]
                torch._dynamo.reset()  # in a run, one model is compiled
                name = f"{model_name}, {case}"
                symbols.clear()
                *results[name], local_bytes[name] = train_two_steps(folder / model_name, **settings)
                results[f"{name}, symbols"] = list(symbols)
            encoded = random_encoded(LENGTHS)
            prompts = [tokens.tolist() for tokens, _ in encoded]
            size = 4 * sum(p.numel() for p in load_model(folder / model_name).parameters())
            for held, memory in {"whole": 2 * size, "sharded": 2 * size - 1}.items():
                patch.setattr(infra.hf, "memory_bytes", lambda device, memory=memory: memory)
                model = load_for_inference(folder / model_name, torch.float32, "cpu")
                assert is_sharded(model.head_weight) == (held == "sharded" and world_size() > 1)
                results[f"{model_name}, {held}, scores"] = [torch.tensor(np.stack(score_examples(model, encoded, 50)))]
                answers = generate(model, prompts, 12, stop_ids=range(0, 300, 7), batch_size=3)
                results[f"{model_name}, {held}, answers"] = answers
            before, model = weakref.ref(model), None
            load_model(folder / model_name, shard=False)
            assert before() is None  # of two models in turn, one at a time takes memory
            model = load_model(folder / model_name)
            save_model(model, folder / f"{model_name}-saved-by-{world_size()}", max_shard_bytes=20_000)
        if world_size() == 2:
            save_savepoint(load_model(folder / "tied"), folder)
            results["seen"] = [seen_in_forward("llama"), seen_in_forward("qwen3"), seen_in_forward("llama", 2)]
        if world_size() == 4:
            opened = load_model(folder / "tied-saved-by-2")
            results["opened"] = {name: full_tensor(p) for name, p in opened.named_parameters()}
        if rank() == 0:
            torch.save(results, folder / f"results-{world_size()}.pt")
            (folder / f"bytes-{world_size()}.json").write_text(json.dumps(local_bytes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for name, changes in MODELS.items():
        model = tiny_model(**changes)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)  # biases too
            if parameter.dim() == 2:  # with bf16, FSDP rounds the embedding, and autocast in one process does not
                parameter.data = parameter.data.bfloat16().float()
        save_model(model, folder / name)
    in_processes(folder)
    for number in (2, 4):
        done = run_script(__file__, folder, processes=number, timeout=200)
        assert done.returncode == 0, done.stderr
    return folder


def both(folder, several, name):
    return (torch.load(folder / f"results-{number}.pt")[name] for number in (1, several))


@pytest.mark.parametrize("several, case", [(number, case) for number in (2, 4) for case in CASES_OF[number]])
@pytest.mark.parametrize("model", MODELS)
def test_updates_equal_those_of_one_process(folder, several, model, case):
    for one, many in zip(*both(folder, several, f"{model}, {case}"), strict=True):  # updates, then gradients
        assert one.keys() == many.keys()
        trained = [name for name in one if ".lora_" in name or "lora" not in case]
        assert all(one[name].abs().max() > 0 for name in trained)
        assert all(one[name].abs().max() == 0 for name in one if name not in trained)
        one, many = (torch.cat([of[name].flatten() for name in trained]) for of in (one, many))
        assert (one - many).norm() <= (0.04 if "bf16" in case else 1e-5) * one.norm()


def test_compiled_blocks_that_are_sharded_take_no_more_sizes_as_arguments(folder):
    """By default, PyTorch takes the head_dim of a sharded block for a size that changes."""
    for model in MODELS:
        one, two = both(folder, 2, f"{model}, compiled, symbols")
        assert one == two and min(one) == 1


def test_in_bf16_the_weights_of_norms_are_float32_and_boundaries_no_tensor(folder):
    """FSDP moves tensors to its device, and waits for that."""
    for seen in torch.load(folder / "results-2.pt")["seen"]:
        assert seen.pop("cu_seqlens") == [0, 2, 5]
        assert seen.pop("norm") == {torch.float32} and len(seen) >= 1
        assert set.union(*seen.values()) == {torch.bfloat16}


@pytest.mark.parametrize("model", MODELS)
def test_gradients_in_bf16_are_accumulated_in_float32(folder, model):
    """So summing over micro-batches before processes, or after, makes no difference."""
    results = torch.load(folder / "results-2.pt")
    for sharded, whole in zip(results[f"{model}, bf16"], results[f"{model}, bf16, whole"], strict=True):
        assert any(gradient.abs().max() > 0 for gradient in sharded.values())
        for name in sharded:
            assert (sharded[name] - whole[name]).norm() <= 1e-5 * sharded[name].norm()


def test_recomputed_activations_give_the_same_gradients(folder):
    results = torch.load(folder / "results-1.pt")
    for one, again in zip(results["tied, accumulated"], results["tied, recomputed"], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], again[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("several", [2, 4])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("held", ["whole", "sharded"])
def test_scores_and_answers_equal_those_of_one_process(folder, several, model, held):
    one, many = both(folder, several, f"{model}, {held}, scores")
    torch.testing.assert_close(one, many, rtol=1e-5, atol=0)
    one, many = both(folder, several, f"{model}, {held}, answers")
    assert one == many
    assert len({len(answer) for answer in one}) > 2  # some stop early, at their own time


@pytest.mark.parametrize("several", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_weights_and_optimizer_state_fall_with_the_number_of_processes(folder, several, model):
    one, many = (json.loads((folder / f"bytes-{number}.json").read_text()) for number in (1, several))
    assert many[f"{model}, full"][0] == pytest.approx(one[f"{model}, full"][0] / several, rel=0.02)
    assert one[f"{model}, lora, accumulated"][0] < 0.7 * one[f"{model}, full"][0]  # adapters alone have optimizer state


@pytest.mark.parametrize("several, case", [(number, case) for number in (2, 4) for case in CASES_OF[number]])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_sends_the_bytes_that_the_plan_says(folder, several, model, case):
    _, planned, sent = json.loads((folder / f"bytes-{several}.json").read_text())[f"{model}, {case}"]
    assert sent == pytest.approx(planned, rel=0.02) and sent > 0  # shards of uneven size are padded


@pytest.mark.parametrize("several", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_what_several_save_opens_in_one(folder, several, model):
    saved = folder / f"{model}-saved-by-{several}"
    assert (saved / "model.safetensors.index.json").exists()
    original, again = load_model(folder / model), load_model(saved)
    assert all(map(torch.equal, original.parameters(), again.parameters()))


def test_what_two_save_opens_in_four(folder):
    opened = torch.load(folder / "results-4.pt")["opened"]
    for name, parameter in load_model(folder / "tied").named_parameters():
        assert torch.equal(opened[name], parameter)


def test_each_process_hashes_the_parts_of_a_savepoint_that_it_writes(folder):
    savepoint = folder / "resume" / "reference-step-5"
    verify_manifest(savepoint)
    files = {file.name for file in savepoint.iterdir()} - {"manifest.json"}
    assert set(json.loads((savepoint / "manifest.json").read_text())) == files
    of_first, of_second = map(set, json.loads((folder / "hashed.json").read_text()))
    assert of_second == {name for name in files if name.startswith("shard-00002-")} and len(of_second) > 3
    assert of_first == files - of_second
    original, again = load_model(folder / "tied"), load_model(folder / "tied")
    for parameter in again.parameters():
        parameter.data.zero_()
    optimizer, metrics = make_optimizer(again, TrainConfig()), StepMetrics(10, torch.device("cpu"))
    assert Savepoints(folder, "reference", every=1, keep=1).load(again, optimizer, metrics) == 5
    assert all(map(torch.equal, original.parameters(), again.parameters()))


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
