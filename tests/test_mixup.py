"""The loss against its literal form, and both against numbers worked by hand."""

import importlib.util
import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mixup as mixup_module
from mixup import IGNORE_INDEX, mixup, pair_positions, sftmix_loss, sftmix_loss_literal

if importlib.util.find_spec("conftest") is None:  # this file was copied, with mixup.py alone

    @pytest.fixture
    def device():
        return torch.device("cpu")


RELATIVE, ABSOLUTE = ({torch.float64: a, torch.float32: b} for a, b in ((1e-9, 1e-4), (1e-12, 1e-5)))


def case(device="cpu", seed=0, S=23, M=8, D=6, V=11, dtype=torch.float64, repeats=False):
    """Random arguments of the loss; with `repeats`, rows that several mixed positions share.

    The indices stay in CPU memory. MPS has no float64, so the dtype there is float32.
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, D, generator=g, dtype=dtype)
    weight = torch.randn(V, D, generator=g, dtype=dtype)
    targets = torch.randint(V, (S,), generator=g)
    distinct, any_rows = torch.randperm(S, generator=g)[: 2 * M], torch.randint(max(S // 3, 1), (2, M), generator=g)
    index = any_rows if repeats else distinct.view(2, M)
    lam = torch.rand(M, generator=g, dtype=dtype)
    dtype = torch.float32 if torch.device(device).type == "mps" else dtype
    hidden, weight, lam = (x.to(dtype).to(device) for x in (hidden, weight, lam))
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device), index[0], index[1], lam


def literal_loss(
    hidden, weight, targets, index_c, index_u, lam, mu, ntp_weight=1.0, num_supervised=None, num_mixed=None
):
    """`sftmix_loss_literal` with the remaining arguments of `sftmix_loss`: other weights and denominators."""
    loss, ntp, mix = sftmix_loss_literal(hidden, weight, targets, index_c, index_u, lam, mu)
    assert torch.equal(loss, ntp + mu * mix)
    ntp = ntp * (len(targets) / (num_supervised or len(targets) or 1))
    mix = mix * (len(index_c) / (num_mixed or len(index_c) or 1))
    return ntp_weight * ntp + mu * mix, ntp.detach(), mix.detach()


def value_and_gradients(loss_function, arguments, *rest, **named):
    loss, ntp, mix = loss_function(*arguments, *rest, **named)
    return torch.stack([loss.detach(), ntp, mix]), *torch.autograd.grad(loss, arguments[:2])


def assert_equal_to_literal(arguments, *rest, **named):
    rtol, atol = RELATIVE[arguments[0].dtype], ABSOLUTE[arguments[0].dtype]
    fast = value_and_gradients(sftmix_loss, arguments, *rest, **named)
    literal = value_and_gradients(literal_loss, arguments, *rest, **named)
    for name, one, other in zip(("loss, ntp, mix", "grad hidden", "grad weight"), fast, literal, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_mixup_by_hand():
    z, y = mixup(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]]), torch.tensor([1]), torch.tensor([1]), 0.25, 3)
    assert z.tolist() == [[2.5, -1.0]]
    assert y.tolist() == [[0.0, 1.0, 0.0]]  # the same token on both sides: its shares add up


def test_mixup_takes_one_lambda_a_position():
    z, y = mixup(
        torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0.0, 0.9]), 2
    )
    torch.testing.assert_close(z, torch.tensor([[0.0], [0.9]]))
    torch.testing.assert_close(y, torch.tensor([[0.0, 1.0], [0.9, 0.1]]))


@pytest.mark.parametrize("loss_function", [sftmix_loss, sftmix_loss_literal])
def test_loss_by_hand(loss_function, device):
    """Two rows, W = 1: logits (ln 3, 0) and (0, 0), so p = (3/4, 1/4) and (1/2, 1/2); gold tokens 0, 1, λ = 1/2."""
    hidden, targets = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]).to(device), torch.tensor([0, 1]).to(device)
    index_c, index_u, lam = torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]).to(device)
    loss, ntp, mix = loss_function(hidden, torch.eye(2).to(device), targets, index_c, index_u, lam, mu=0.2)
    expected_ntp = (math.log(4 / 3) + math.log(2)) / 2
    root = math.sqrt(3.0)  # mixed logits (ln √3, 0): p̃ = (√3, 1) / (1 + √3)
    expected_mix = 0.5 * math.log((1 + root) / root) + 0.5 * math.log(1 + root)
    assert ntp.item() == pytest.approx(expected_ntp, rel=1e-6)
    assert mix.item() == pytest.approx(expected_mix, rel=1e-6)
    assert loss.item() == pytest.approx(expected_ntp + 0.2 * expected_mix, rel=1e-6)


def test_pair_positions_by_hand():
    """Three examples with 3, 1 and 2 supervised tokens; (2, 0) meets in 2 positions, (1, 2) in 1."""
    i = IGNORE_INDEX
    targets = torch.tensor([i, 5, i, 5, 5, i, i, 6, i, 7, 7])
    cu_seqlens = torch.tensor([0, 5, 8, 11], dtype=torch.int32)
    index_c, index_u, pair = pair_positions(targets, cu_seqlens, torch.tensor([[2, 0], [1, 2]]))
    assert index_c.tolist() == [4, 5, 3]
    assert index_u.tolist() == [0, 1, 4]
    assert pair.tolist() == [0, 0, 1]


def test_pair_positions_equals_a_loop():
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (10,), generator=g)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    targets = torch.where(torch.rand(int(lengths.sum()), generator=g) < 0.5, 3, IGNORE_INDEX)
    pairs = torch.randperm(10, generator=g).view(5, 2)
    number = {int(n): i for i, n in enumerate((targets != IGNORE_INDEX).nonzero())}  # position -> its supervised number
    expected = []
    for p, (c, u) in enumerate(pairs.tolist()):
        own = [[number[n] for n in range(cu_seqlens[b], cu_seqlens[b + 1]) if n in number] for b in (c, u)]
        expected += [(one, other, p) for one, other in zip(*own, strict=False)]
    assert list(zip(*(x.tolist() for x in pair_positions(targets, cu_seqlens, pairs)), strict=True)) == expected


def test_pair_positions_without_pairs_or_without_supervision():
    targets, cu_seqlens = torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 4]), torch.tensor([0, 2, 3])
    for pairs in (torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[0, 1]])):
        assert [len(x) for x in pair_positions(targets, cu_seqlens, pairs)] == [0, 0, 0]


# --- Fast against literal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("ntp_weight", [0.0, 1.0])
def test_fast_equals_literal(mu, ntp_weight, device):
    assert_equal_to_literal(case(device), mu, ntp_weight)


@pytest.mark.parametrize("rows", [2, 3, 4, 7, 10**6])
@pytest.mark.parametrize("repeats", [False, True])
def test_fast_equals_literal_for_any_chunk(monkeypatch, rows, repeats, device):
    monkeypatch.setattr(mixup_module, "chunk_size", lambda *_: rows)
    assert_equal_to_literal(case(device, repeats=repeats), 0.7)


@pytest.mark.parametrize("S, M", [(5, 0), (6, 3), (1, 0)])
def test_fast_equals_literal_at_the_edges(S, M, device):
    assert_equal_to_literal(case(device, S=S, M=M), 0.5)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_fast_equals_literal_at_the_ends_of_lambda(lam, device):
    hidden, weight, targets, index_c, index_u, ones = case(device)
    assert_equal_to_literal((hidden, weight, targets, index_c, index_u, torch.full_like(ones, lam)), 0.5)


def test_global_denominators(device):
    assert_equal_to_literal(case(device), 0.3, num_supervised=100, num_mixed=40)


def test_parts_of_a_batch_add_up_to_the_whole(device):
    """Two micro-batches with the global counts give the loss and the gradients of one, whatever their sizes."""
    hidden, weight, targets, index_c, index_u, lam = case(device, S=12, M=4)
    index_c, index_u = torch.tensor([0, 1, 5, 6]), torch.tensor([2, 3, 7, 8])
    whole = value_and_gradients(sftmix_loss, (hidden, weight, targets, index_c, index_u, lam), 0.4)
    halves = [
        value_and_gradients(
            sftmix_loss,
            (hidden[a:b], weight, targets[a:b], index_c[m] - a, index_u[m] - a, lam[m]),
            0.4,
            num_supervised=12,
            num_mixed=4,
        )
        for a, b, m in ((0, 4, slice(0, 2)), (4, 12, slice(2, 4)))
    ]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    torch.testing.assert_close(whole[1], torch.cat([halves[0][1], halves[1][1]]))
    torch.testing.assert_close(whole[2], halves[0][2] + halves[1][2])


def test_gradients_by_finite_differences():
    hidden, weight, *rest = case(S=5, M=2, D=3, V=4)
    assert torch.autograd.gradcheck(lambda h, w: sftmix_loss(h, w, *rest, 0.6, 0.9)[0], (hidden, weight))


def test_frozen_head_still_gives_hidden_gradients(device):
    hidden, weight, *rest = case(device)
    expected = value_and_gradients(sftmix_loss, (hidden, weight, *rest), 0.2)[1]
    loss, _, _ = sftmix_loss(hidden, weight.detach(), *rest, 0.2)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_nobody_can_ask_for_are_not_computed(mode):
    hidden, weight, *rest = case()
    expected, shapes = sftmix_loss(hidden, weight, *rest, 0.2), []
    with mode(), Operations(lambda f, arguments, result: shapes.append(result.shape) if "mm" in str(f) else None):
        values = sftmix_loss(hidden, weight, *rest, 0.2)
    assert sum(rows for rows, _ in shapes) == len(hidden) and {width for _, width in shapes} == {len(weight)}  # logits
    torch.testing.assert_close(values, tuple(x.detach() for x in expected))


def test_upstream_gradient_scales(device):
    """Also in a second backward pass through a graph that is kept, which leaves the first one's gradients alone."""
    hidden, weight, *rest = case(device)
    loss, _, _ = sftmix_loss(hidden, weight, *rest, 0.2)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    copies = [x.clone() for x in once]
    twice = torch.autograd.grad(3 * loss, (hidden, weight))
    for first, copy, second in zip(once, copies, twice, strict=True):
        assert torch.equal(first, copy)
        torch.testing.assert_close(second, 3 * copy)


def test_no_second_derivative():
    """It would lack a term, since the gradients that the forward pass computes are constants of the backward pass."""
    hidden, *rest = case()
    (gradient,) = torch.autograd.grad(sftmix_loss(hidden, *rest, 0.2)[0] ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Operations(TorchDispatchMode):
    """Calls `see(function, arguments, result)` for each operation."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.see(function, [*args, *(kwargs or {}).values()], out)
        return out


def test_the_gradient_of_the_head_exists_once():
    """From the first chunk to `weight.grad`, which takes over its memory."""
    hidden, weight, *rest = case(S=40, M=15, D=7, V=3000)
    memory = set()

    def see(_function, _arguments, out):
        if isinstance(out, torch.Tensor) and out.shape == weight.shape:
            memory.add(out.untyped_storage().data_ptr())

    with Operations(see):
        (3 * sftmix_loss(hidden, weight, *rest, 0.2)[0]).backward()
    assert memory - {weight.untyped_storage().data_ptr()} == {weight.grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_one_number_may_stand_for_every_lambda(lam, device):
    hidden, weight, targets, index_c, index_u, _ = case(device)
    assert_equal_to_literal((hidden, weight, targets, index_c, index_u, lam), 0.5)


def test_float16_is_refused_since_gradients_would_underflow():
    hidden, weight, *rest = case(dtype=torch.float32)
    with pytest.raises(ValueError, match="float16: gradients"):
        sftmix_loss(hidden.half(), weight.half(), *rest, 0.2)


def test_running_out_of_memory_is_no_reason_for_another_kernel(monkeypatch):
    def addmm(*arguments, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "addmm", addmm)
    a, b = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):
        mixup_module._add_matmul_(torch.zeros(2, 2), a, b)


def test_halves_that_do_not_pair_up_are_refused():
    hidden, weight, targets, index_c, index_u, lam = case()
    with pytest.raises(ValueError, match="index_c and index_u must pair up, but are 8 and 7 long"):
        sftmix_loss(hidden, weight, targets, index_c, index_u[1:], lam, 0.5)


def test_nothing_supervised_is_a_zero_that_can_be_backpropagated(device):
    hidden, weight, *rest = case(device, S=0, M=0)
    loss, ntp, mix = sftmix_loss(hidden, weight, *rest, 0.2)
    loss.backward()
    assert (loss.item(), ntp.item(), mix.item()) == (0, 0, 0)
    assert weight.grad.abs().max() == 0 and hidden.grad.shape == (0, 6)


def test_reported_means_carry_no_gradient():
    _, ntp, mix = sftmix_loss(*case(), 0.2)
    assert not ntp.requires_grad and not mix.requires_grad


def test_huge_logits_stay_finite(device):
    """−log p of 1,000 nats: a softmax would give 0 and its logarithm infinity."""
    hidden = torch.tensor([[1000.0], [1000.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], device=device, requires_grad=True)
    targets, zero, one = torch.tensor([1, 1], device=device), torch.tensor([0]), torch.tensor([1])
    loss, ntp, mix = sftmix_loss(hidden, weight, targets, zero, one, torch.tensor([0.5], device=device), 1.0)
    loss.backward()
    assert ntp.item() == mix.item() == 1000
    assert hidden.grad.isfinite().all()


def test_float32_is_close_and_bf16_autocast_keeps_float32_sums(device):
    double = case(S=64, M=20, D=16, V=50)
    single = case(device, S=64, M=20, D=16, V=50)
    single = tuple(x.detach().float().requires_grad_() if x.is_floating_point() else x for x in single)
    expected = value_and_gradients(literal_loss, double, 0.2)
    for one, other in zip(value_and_gradients(sftmix_loss, single, 0.2), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.float(), rtol=1e-4, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        fast = value_and_gradients(sftmix_loss, single, 0.2)
    for one, other in zip(fast, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.cpu(), other.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("repeats", [False, True])
def test_log_p_is_filled_with_that_of_the_gold_tokens(monkeypatch, repeats, device):
    monkeypatch.setattr(mixup_module, "chunk_size", lambda *_: 4)
    hidden, weight, targets, *rest = case(device, repeats=repeats)
    log_p = torch.full((len(targets),), float("nan"), device=device)
    loss = sftmix_loss(hidden, weight, targets, *rest, 0.7, log_p=log_p)[0]
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_p, expected.detach().float())
    torch.testing.assert_close(loss, sftmix_loss(hidden, weight, targets, *rest, 0.7)[0])


def test_the_element_wise_part_gives_the_same_compiled_whatever_the_size_and_the_numbers():
    """As it is on a GPU, where it is traced and fused; here it is traced alone, which counts how often."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mixup_module._logits_gradient, dynamic=True, backend=backend)
    for k, others, scale_mixed in ((5, 0, 0.1), (0, 7, 0.2), (6, 0, 0.3), (0, 9, 0.4), (9, 0, 0.5)):
        logits, y = torch.randn(2 * k + others, 30), torch.randint(30, (2 * k + others, 1))
        rest = y, torch.rand(k, 1), torch.rand(2 * k + others, 1), torch.tensor(scale_mixed), torch.float32
        expected = mixup_module._logits_gradient(logits.clone(), *rest)
        for one, other in zip(compiled(logits.clone(), *rest), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 2  # with pairs and without
    assert not any("scatter" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_where_torch_compile_fails_the_loss_goes_on_without_and_one_process_says_so(monkeypatch, capsys):
    """However it fails: here when the first graph is compiled, as without Triton or Python.h."""

    def backend(_graph, _examples):
        raise RuntimeError("no Triton here\nand a second line")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **named: real(function, **named, backend=backend))
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        mixup_module._compiled_logits_gradient.cache_clear()
        for _ in range(2):  # it is tried once
            chosen = mixup_module._compiled_logits_gradient(torch.device("cpu"), torch.float32, 16)
            assert chosen is mixup_module._logits_gradient
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert not lines or ("torch.compile fails here" in said and "no Triton here" in said)
    mixup_module._compiled_logits_gradient.cache_clear()


def test_the_graphs_of_the_trial_are_those_of_all_chunks_and_know_the_width(monkeypatch):
    symbols, sizes = [], []  # of each graph, how many sizes it takes as arguments, and which it is made for

    def backend(graph, examples):
        symbols.append(sum(not isinstance(x, torch.Tensor) for x in examples))
        sizes.append({x.node.hint for x in examples if isinstance(x, torch.SymInt)})
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **named: real(function, **named, backend=backend))
    torch._dynamo.reset()
    mixup_module._compiled_logits_gradient.cache_clear()
    for k, others in ((5, 0), (9, 0), (0, 7), (0, 9)):
        # Without gradients, as in the forward pass of an autograd.Function.
        with torch.no_grad():
            compiled = mixup_module._compiled_logits_gradient(torch.device("cpu"), torch.float32, 24)
            logits, y = torch.randn(2 * k + others, 24), torch.randint(24, (2 * k + others, 1))
            compiled(logits, y, torch.rand(k, 1), torch.rand(2 * k + others, 1), torch.tensor(0.1), torch.float32)
        assert symbols == [2, 1]  # rows and pairs; rows
    rows = mixup_module.chunk_size(24)
    assert sizes == [{rows, rows // 2}, {rows}]
    mixup_module._compiled_logits_gradient.cache_clear()


def test_no_argument_of_the_compiled_part_is_a_view(monkeypatch):
    """For a view, torch.compile also guards the sizes of what it is a view of, and recompiles for others."""
    real = mixup_module._logits_gradient

    def spy(*arguments):
        assert not any(x._is_view() for x in arguments if isinstance(x, torch.Tensor))
        return real(*arguments)

    monkeypatch.setattr(mixup_module, "_logits_gradient", spy)
    sftmix_loss(*case(), 0.2)


@pytest.mark.parametrize("rows", [4, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padded_rows_give_the_same_and_align_all_matmuls(monkeypatch, rows, dtype):
    """As on a GPU, with 11 logits in rows of 16; memory that nothing has written to is filled with NaN."""
    monkeypatch.setattr(mixup_module, "chunk_size", lambda *_: rows)
    monkeypatch.setattr(mixup_module, "VOCAB_MULTIPLE", {"cpu": 8})
    matrices = []

    def see(function, arguments, _out):
        if function in (torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            matrices.extend(x for x in arguments if isinstance(x, torch.Tensor))

    arguments = case(D=8, dtype=dtype)
    torch.use_deterministic_algorithms(True)  # which fills what `empty` returns
    try:
        assert_equal_to_literal(arguments, 0.7)
        with Operations(see):
            sftmix_loss(*arguments, 0.7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(matrices) > 9 and all(max(x.stride()) % 8 == 0 and min(x.stride()) == 1 for x in matrices)


def test_twice_the_same_bits_with_deterministic_algorithms(monkeypatch, device):
    """Where each operation has a deterministic form; else PyTorch raises an error that names it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    arguments = case(device, S=300, M=200, D=16, V=500, dtype=torch.float32, repeats=True)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (value_and_gradients(sftmix_loss, arguments, 0.7) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_chunks_of_a_gpu_are_whole_tiles_of_at_most_2_28_logits_and_2_13_rows():
    sizes = {V: mixup_module.chunk_size(V, "cuda") for V in (1024, 32000, 49152, 128256, 151936, 262144, 2**22)}
    assert sizes == {1024: 8192, 32000: 8192, 49152: 5376, 128256: 2048, 151936: 1536, 262144: 1024, 2**22: 256}


def test_bf16_matmuls_add_to_a_float32_sum(device):
    """On NVIDIA GPUs they do so themselves; elsewhere the product is rounded to bf16 before it is added."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=g).bfloat16() for _ in range(2))
    total = torch.randn(64, 64, generator=g)
    expected = (total.double() + a.double() @ b.double()).float()
    result = total.to(device)
    assert mixup_module._add_matmul_(result, a.to(device), b.to(device)) is result
    exact = device.type == "cuda" and torch.version.hip is None
    torch.testing.assert_close(result.cpu(), expected, **({} if exact else {"rtol": 0, "atol": 0.2}))


def test_bf16_matmuls_add_in_place_where_they_can(monkeypatch):
    def addmm(total, a, b, *, out_dtype, out):  # as on an NVIDIA GPU
        assert (total.dtype, a.dtype, b.dtype, out_dtype) == (
            torch.float32,
            torch.bfloat16,
            torch.bfloat16,
            total.dtype,
        )
        assert out is total
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    a, total = torch.full((1, 1), 1.0 + 2**-7).bfloat16(), torch.zeros(1, 1)
    assert mixup_module._add_matmul_(total, a, a).item() == (1 + 2**-7) ** 2  # more bits than bf16 has


def test_only_copies_to_cuda_go_on_in_the_background():
    class Recorder:
        def to(self, device, **named):
            return device.type, named

    for name in ("cpu", "mps"):
        assert mixup_module.to_device(Recorder(), name) == (name, {})


def test_peak_memory_does_not_grow_with_positions_times_vocabulary():
    """The largest tensor any operation makes stays at a chunk, where the literal form makes [S, V]."""

    def largest_of(function):
        sizes = [0]

        def see(_function, _arguments, out):
            outs = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(tensor.numel() for tensor in outs if isinstance(tensor, torch.Tensor))

        with Operations(see):
            function()
        return max(sizes)

    arguments = case(S=4096, M=1500, D=8, V=4096, dtype=torch.float32)
    fast = largest_of(lambda: sftmix_loss(*arguments, 0.2)[0].backward())
    literal = largest_of(lambda: sftmix_loss_literal(*arguments, 0.2))
    assert literal == 4096 * 4096
    assert fast <= mixup_module.chunk_size(4096) * 4096 < literal
