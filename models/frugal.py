"""Norm and gated activation as autograd functions that keep less for their backward.

Autograd keeps what each operation read: of bf16 hidden states their fp32 copies, and every value on the way. These keep
what came in, in the dtype in which it came, and work out the rest again: values stay as they are, gradients but for the
norm's rounding in fp32. With attention on the CPU, which does likewise (models/attention.py), a layer of SmolLM2 keeps
23 kB a token in bf16 instead of 35.

Letters: `D` normed width. Read next: models/parts.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.widened import exact


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, late: bool) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps, ctx.late = eps, late
        normal = F.rms_norm(x.to(exact(x.dtype)), (x.shape[-1],), eps=eps)
        return (normal * weight_D).to(x.dtype) if late else normal.to(x.dtype).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight_D = ctx.saved_tensors
        wide = x.to(exact(x.dtype))
        scale = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            normal = wide * scale if ctx.late else (wide * scale).to(x.dtype)
            weight_grad = (grad * normal).flatten(0, -2).sum(0).to(weight_D.dtype)
        through = grad.to(wide.dtype) * weight_D if ctx.late else (grad * weight_D).to(wide.dtype)
        x_grad = through * scale - wide * (scale**3 * (through * wide).mean(-1, keepdim=True))
        return x_grad.to(x.dtype), weight_grad, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, late: bool) -> Tensor:
    """x / rms(x) in fp32 (fp64 in fp64), times the weight, in x's dtype: cast before the product, or after (`late`)."""
    return _Norm.apply(x, weight_D, eps, late)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)
