"""The autograd functions that keep less: the bits of plain torch, its gradients, and how much they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Layout, tree_attention
from models.frugal import rms_norm, swiglu


def plain_norm(x: Tensor, weight: Tensor, eps: float, *, late: bool) -> Tensor:
    normal = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=eps)
    return (normal * weight).to(x.dtype) if late else normal.to(x.dtype) * weight


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def run(function: Callable[..., Tensor], inputs: list[Tensor], **named: object) -> list[Tensor]:
    """The value, and gradients under a fixed upstream one."""
    y = function(*inputs, **named)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, up)]


def kept_bytes(function: Callable[[], Tensor]) -> int:
    """What autograd keeps of a call, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = function()
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (5, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_norm_is_torchs(dtype: torch.dtype, shape: tuple[int, ...], late: bool) -> None:
    eps = 1e-5
    ours, plain = (run(f, leaves(shape, shape[-1:], dtype=dtype), eps=eps, late=late) for f in (rms_norm, plain_norm))
    truth = run(plain_norm, [x.detach().double().requires_grad_() for x in leaves(shape, shape[-1:], dtype=dtype)],
                eps=eps, late=late)  # fmt: skip
    assert torch.equal(ours[0], plain[0])
    for one, other, exact in zip(ours, plain, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        error, allowed = ((x.double() - exact).norm() for x in (one, other))
        assert torch.equal(one, other) or dtype != torch.bfloat16
        assert error <= 1.01 * allowed + 8 * torch.finfo(torch.float64).eps * exact.norm()  # sums in another order


def test_a_norms_weight_that_is_frozen_gets_no_gradient() -> None:
    x, weight = leaves((4, 8), (8,), dtype=torch.float32)
    rms_norm(x, weight.detach(), 1e-5, late=False).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gated_activation_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    ours, plain = (run(f, leaves((9, 32), (9, 32), dtype=dtype)) for f in (swiglu, plain_swiglu))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_of_bf16_no_fp32_copy_is_kept() -> None:
    x, weight, gate, up = leaves((64, 96), (96,), (64, 96), (64, 96), dtype=torch.bfloat16)
    whole = x.nbytes
    assert kept_bytes(lambda: rms_norm(x, weight, 1e-5, late=False)) == whole + weight.nbytes
    assert kept_bytes(lambda: swiglu(gate, up)) == 2 * whole
    assert kept_bytes(lambda: plain_norm(x, weight, 1e-5, late=False)) > 2 * whole  # what is saved


def test_attention_keeps_a_prompt_once_however_many_branches_see_it() -> None:
    q, k, v = leaves((60, 4, 16), (60, 2, 16), (60, 2, 16), dtype=torch.bfloat16)
    for branches in ((20,), (5, 5, 5, 5), (1,) * 20):
        layout = Layout(10, ((30, branches),))
        kept = kept_bytes(lambda layout=layout: tree_attention(q, k, v, layout))
        assert kept == q.nbytes + k.nbytes + v.nbytes
