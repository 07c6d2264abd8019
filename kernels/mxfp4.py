"""Weights in 4.25 bits (MXFP4), and the product with one that stays packed: unpacked forward, and again backward.

Letters: `M` rows, `I` inputs, `O` outputs. Read next: kernels/mxfp4_triton.py, models/moe.py.

32 neighbours along the inputs are a block: 16 bytes, each two 4-bit floats, the low half first, and one power of two
(OCP Microscaling Formats 1.0, sec. 5.3). Every value is exact in bf16, so that what is computed has the bits that the
unpacked weight would give.

On the CPU the rows are multiplied in blocks of one fixed number, so that a row's bits depend on nothing but the row.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend as backends

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Packed(NamedTuple):
    """A weight [..., O, I] as published: uint8 blocks [..., O, I/32, 16] and scales [..., O, I/32]."""

    blocks: Tensor
    scales: Tensor


# --- the torch path -----------------------------------------------------------------------------------------------


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two values of each byte, bf16, as one int32 [256]; the power of two of each scale, bf16 [256]."""
    pairs = torch.tensor([(VALUES[byte & 15], VALUES[byte >> 4]) for byte in range(256)], dtype=torch.bfloat16)
    powers = torch.tensor([2.0 ** (scale - 127) for scale in range(256)], dtype=torch.bfloat16)
    return pairs.view(torch.int32).flatten().to(device), powers.to(device)


def _in_torch(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    pairs, powers = _tables(blocks.device)
    values = pairs.index_select(0, blocks.flatten().int()).view(torch.bfloat16).view(*scales.shape, 32)
    values.mul_(powers.index_select(0, scales.flatten().int()).view(*scales.shape, 1))
    return values.flatten(-2).to(dtype)


# --- autograd -----------------------------------------------------------------------------------------------------


def _whole(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scales is None else dequantise(weight, scales, dtype)


class _RowsLinear(torch.autograd.Function):
    """Forward: alpha x W^T + start, `rows` rows at a time. Backward: alpha g W, alpha g^T x; W is not kept."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_MI: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        start: Tensor | None,
        rows: int,
        alpha: float,
    ) -> Tensor:
        whole_OI = _whole(weight, scales, x_MI.dtype)
        y_MO = x_MI.new_empty(len(x_MI), len(whole_OI))
        for begin in range(0, len(x_MI), rows):
            part = slice(begin, begin + rows)
            if start is None:
                torch.mm(x_MI[part], whole_OI.T, out=y_MO[part])
            else:
                origin = start if start.dim() == 1 else start[part]
                torch.addmm(origin.to(x_MI.dtype), x_MI[part], whole_OI.T, alpha=alpha, out=y_MO[part])
        ctx.save_for_backward(x_MI if weight.requires_grad else None, weight, scales)
        ctx.start = None if start is None else (start.dim(), start.dtype)
        ctx.alpha = alpha
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x_MI, weight, scales = ctx.saved_tensors
        grad_x = grad_weight = grad_start = None
        scaled_MO = grad_MO if ctx.alpha == 1 else grad_MO * ctx.alpha
        if ctx.needs_input_grad[0]:
            grad_x = scaled_MO @ _whole(weight, scales, grad_MO.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (scaled_MO.T @ x_MI).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dimensions, dtype = ctx.start
            grad_start = (grad_MO.sum(0) if dimensions == 1 else grad_MO).to(dtype)
        return grad_x, grad_weight, None, grad_start, None, None


# --- public -------------------------------------------------------------------------------------------------------


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, *, backend: str = "auto") -> Tensor:
    """The weight [..., O, I] of uint8 blocks [..., O, I/32, 16] and scales [..., O, I/32]: exact in bf16, fp32, fp64.

    Within scales of 2^-125 to 2^125: a value is then neither subnormal nor infinite.
    """
    assert blocks.dtype == scales.dtype == torch.uint8, "blocks and scales are bytes"
    assert blocks.shape == (*scales.shape, 16), f"blocks {list(blocks.shape)} and scales {list(scales.shape)}"
    if backends.resolve(backend, blocks.device, dtype) == "torch":
        return _in_torch(blocks, scales, dtype)
    from kernels import mxfp4_triton

    return mxfp4_triton.dequantise(blocks.contiguous(), scales.contiguous(), dtype, backends.arch_of(blocks.device))


def rows_linear(
    x_MI: Tensor, weight: Tensor | Packed, start: Tensor | None = None, *, rows: int, alpha: float = 1.0
) -> Tensor:
    """alpha x W^T + start [M, O] in x's dtype; `start` is a bias [O] or rows [M, O] (alpha needs one).

    `rows`: so many at a time (M is a multiple of them): a row's bits then do not depend on M, nor on the other rows. A
    packed weight gets no gradient, and is unpacked anew in the backward pass.
    """
    assert alpha == 1 or start is not None, "alpha is for a product that is added to something"
    assert len(x_MI) % rows == 0, f"{len(x_MI)} rows in blocks of {rows}"
    first, scales = weight if isinstance(weight, Packed) else (weight, None)
    return _RowsLinear.apply(x_MI, first, scales, start, rows, alpha)
