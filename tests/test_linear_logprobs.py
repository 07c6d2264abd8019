"""kernels/linear_logprobs.py against its definition: values, gradients, chunks, extremes."""

import importlib
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from kernels import linear_logprobs, linear_paths, selective_log_softmax
from kernels.linear_logprobs import IGNORE_INDEX, reference_linear_logprobs

module = importlib.import_module("kernels.linear_logprobs")  # the package's name for it is the function

SHAPES = [(61, 40, 97, 16), (33, 64, 33, 128), (130, 64, 1000, 64), (0, 8, 16, 4)]


def make(T: int, D: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.3
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (T,), generator=generator)


def gradients(function, hidden, weight, targets, upstream):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = function(hidden, weight, targets)
    logp.backward(upstream.to(logp.dtype))
    return logp.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("T", "D", "V", "chunk"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_torch_in_fp32(T, D, V, chunk, dtype):
    """Log-probs are fp32-grade even from bf16 inputs; gradients as good as plain torch's in the inputs' dtype."""
    hidden, weight, targets = make(T, D, V, dtype)
    upstream = torch.randn(T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plain(h, w, y, exact=torch.float32):
        return (h.to(exact) @ w.to(exact).T).log_softmax(-1).gather(1, y[:, None])[:, 0]

    truth = gradients(reference_linear_logprobs, hidden.double(), weight.double(), targets, upstream)
    ours = gradients(lambda h, w, y: linear_logprobs(h, w, y, chunk_tokens=chunk), hidden, weight, targets, upstream)
    fp32 = gradients(plain, hidden.float(), weight.float(), targets, upstream)
    same = gradients(lambda h, w, y: plain(h, w, y, dtype).float(), hidden, weight, targets, upstream)
    if T == 0:
        assert ours[0].shape == (0,) and not ours[2].any()
        return
    assert ours[0].dtype == torch.float32
    # Of bf16 the sums may run in another order than torch's: half an ulp of each of a log-prob's two logits.
    largest = (hidden.double() @ weight.double().T).abs().max()
    ulp = torch.finfo(torch.float32).eps * largest if dtype is torch.bfloat16 else 0.0
    assert (ours[0] - truth[0]).abs().max() <= 2 * (fp32[0] - truth[0]).abs().max() + ulp
    for got, yardstick, exact in zip(ours[1:], same[1:], truth[1:], strict=True):
        assert (got.double() - exact).norm() <= 2 * (yardstick.double() - exact).norm()


@pytest.mark.parametrize("saved_bytes", [0, 2**30])
def test_gradcheck_in_fp64_with_kept_and_with_recomputed_probabilities(monkeypatch, saved_bytes):
    monkeypatch.setattr("kernels.linear_paths.SAVED_PROBS_BYTES", saved_bytes)
    hidden, weight, targets = make(7, 5, 11, torch.float64)
    targets[3] = IGNORE_INDEX
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, chunk_tokens=3), (hidden, weight))


def test_frozen_and_trained_head_give_the_same_hidden_gradient():
    hidden, weight, targets = make(20, 16, 50, torch.float32)
    grads = []
    for trains in (False, True):
        h = hidden.clone().requires_grad_()
        linear_logprobs(h, weight.clone().requires_grad_(trains), targets).sum().backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_alone_has_the_bits_of_the_row_in_any_batch(dtype):
    hidden, weight, targets = make(100, 64, 333, dtype)
    whole = linear_logprobs(hidden, weight, targets, chunk_tokens=32)
    for i in (0, 31, 32, 99):
        assert torch.equal(linear_logprobs(hidden[i : i + 1], weight, targets[i : i + 1], chunk_tokens=32)[0], whole[i])


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_last_chunk_of_few_rows_is_not_filled_up_and_keeps_its_bits(monkeypatch, dtype, trains):
    hidden, weight, targets = make(256, 64, 1333, dtype)
    bias = torch.linspace(-1, 1, 1333).to(dtype)

    def run(rows: int) -> tuple[list[int], list[torch.Tensor]]:
        h, seen = hidden[:rows].clone().requires_grad_(trains), []
        monkeypatch.setattr(linear_paths, "_softmax", lambda h, *rest: (seen.append(len(h)), softmax(h, *rest))[1])
        out = linear_logprobs(h, weight, targets[:rows], bias=bias, softcap=20.0, return_lse=True, return_entropy=True)
        if trains:
            (out.logp_T.sum() + out.lse_T.square().sum()).backward()
        return seen, [x.detach() for x in (*out, h.grad) if x is not None]

    softmax = linear_paths._softmax
    logits = {n: linear_paths._logits(hidden[:n], weight, out_of(hidden, n, 1333)) for n in (16, 32, 64, 128)}
    exact = [n for n in (16, 32, 64) if torch.equal(logits[n], logits[128][:n])]
    (rows, few), (tail_rows, tail) = run(12), run(140)
    if exact == [16, 32, 64] and not trains:  # else the gradient's product has a say, too
        assert rows == [16] and tail_rows == [128, 16]
    assert {*rows, *tail_rows} <= {*exact, 128}
    for one, other, every in zip(few, tail, run(256)[1], strict=True):
        assert torch.equal(one, every[:12]) and torch.equal(other, every[:140])


def out_of(like: torch.Tensor, rows: int, V: int) -> torch.Tensor:
    return like.new_empty(rows, V, dtype=torch.promote_types(like.dtype, torch.float32))


def test_where_bits_depend_on_the_number_of_rows_a_chunk_is_filled_up(monkeypatch):
    hidden, weight, targets = make(12, 16, 50, torch.float32)
    rows = []

    def multiply(hidden_CD, weight_VD, out_CV):
        rows.append(len(hidden_CD))
        out_CV.copy_((hidden_CD[:, None] * weight_VD).sum(-1))
        out_CV[:, -1] *= 1 + 1e-6 * (len(hidden_CD) in (16, 64))
        return out_CV

    linear_paths._exact_counts.cache_clear()
    monkeypatch.setattr(linear_paths, "_logits", multiply)
    linear_logprobs(hidden, weight, targets)
    linear_logprobs(hidden, weight, targets)
    linear_paths._exact_counts.cache_clear()
    assert rows == [128, 16, 32, 64, 32, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_hidden_rows_and_shifted_logits_give_exactly_uniform_log_probs(dtype):
    V = 100
    targets = torch.tensor([0, V - 1])
    logp = linear_logprobs(torch.zeros(2, 8, dtype=dtype), torch.ones(V, 8, dtype=dtype), targets)
    assert torch.allclose(logp, torch.tensor(-math.log(V)), rtol=torch.finfo(torch.float32).eps * 2, atol=0)
    for shift in (-128.0, 1e4):
        logp = linear_logprobs(torch.full((2, 1), shift, dtype=dtype), torch.ones(V, 1, dtype=dtype), targets)
        assert torch.allclose(logp, torch.tensor(-math.log(V)), rtol=torch.finfo(torch.float32).eps * 2, atol=0)


def test_a_process_group_serves_for_the_shards_of_the_vocabulary():
    hidden, weight, targets = make(5, 8, 20, torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone = linear_logprobs(hidden, weight, targets, vocab_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert (alone - linear_logprobs(hidden, weight, targets)).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_certain_targets_have_log_prob_zero_and_no_nan_gradient():
    hidden = torch.full((1, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    logp = linear_logprobs(hidden, weight, torch.tensor([0]))
    logp.sum().backward()
    assert logp.item() == 0 and hidden.grad.item() == 0 and not weight.grad.any()


def test_ignored_targets_score_zero_and_send_no_gradient_and_wrong_ones_are_refused():
    hidden, weight, targets = make(6, 8, 20, torch.float32)
    hidden.requires_grad_()
    targets[2] = IGNORE_INDEX
    logp = linear_logprobs(hidden, weight, targets)
    logp.sum().backward()
    assert logp[2] == 0 and not hidden.grad[2].any() and hidden.grad[1].any()
    for wrong in (-1, 20, 21):
        targets[0] = wrong
        with pytest.raises(IndexError, match="outside"):
            linear_logprobs(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_backend_bf16_gives_what_torch_gives_of_bf16_logits_in_values_and_gradients(dtype):
    hidden, weight, targets = make(33, 40, 97, dtype)
    targets[3] = IGNORE_INDEX

    def others(h, w, y, softcap=None, temperature=1.0):
        logits = h.bfloat16() @ w.bfloat16().T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return (logits / temperature).log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0].where(y >= 0, 0.0)

    upstream = torch.randn(33, generator=torch.Generator().manual_seed(1))
    for more in ({}, {"softcap": 3.0, "temperature": 2.0}):
        got, wanted, exact = (
            gradients(partial(function, **more, **backend), hidden, weight, targets, upstream)
            for function, backend in ((linear_logprobs, {"backend": "bf16"}), (others, {}), (linear_logprobs, {}))
        )
        assert got[0].dtype == exact[0].dtype == torch.promote_types(dtype, torch.float32)
        for ours, theirs, unrounded in zip(got, wanted, exact, strict=True):
            assert torch.equal(ours.double(), theirs.double()) and not torch.equal(ours, unrounded)
    for more in ({"return_lse": True}, {"return_entropy": True}, {"vocab_group": lambda x: [x]}):
        with pytest.raises(ValueError, match="whole vocabulary"):
            linear_logprobs(hidden, weight, targets, backend="bf16", **more)


def test_nothing_of_tokens_times_vocabulary_is_held_when_the_head_is_frozen():
    """The largest tensor that the forward makes is one chunk's logits."""
    hidden, weight, targets = make(512, 16, 2000, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_logprobs(hidden.requires_grad_(), weight, targets, chunk_tokens=64)
    assert largest == 64 * 2000
    largest = 0
    with Watch(), torch.no_grad():  # nor where it trains, in the passes that score
        linear_logprobs(hidden, weight.requires_grad_(), targets, chunk_tokens=64)
    assert largest == 64 * 2000


def test_a_second_derivative_is_refused():
    """J is a constant to autograd: a second backward would be silently wrong."""
    hidden, weight, targets = make(6, 8, 20, torch.float64)
    for function, x in ((lambda h: linear_logprobs(h, weight, targets), hidden),
                        (lambda z: selective_log_softmax(z, targets), hidden @ weight.T)):  # fmt: skip
        (grad,) = torch.autograd.grad(function(x.requires_grad_()).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
