"""Row kernels on logits that exist: their softmax at one index, and its gradient or probabilities.

Letters: `T` rows, `V` vocabulary, `P` spans of a row. Read next: kernels/log_softmax.py, kernels/linear_logprobs.py.

A program takes SPAN_BLOCKS blocks of one row's logits, whatever the number of rows: a row's bits do not depend on how
many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_triton import Softmax
from kernels.tiles import tile_of
from kernels.triton_parts import INTERPRETED, LOG2E, above, combine, finite, power_of_two, rounded

SPAN_BLOCKS = 8  # blocks of BV logits to a program

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def row_forward(
    L, Y, K, S, U, Z, T, V, l_stride, inv_temperature,
    ENTROPY: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Row t, span p: K, S, U [P, T] of the span; Z [T], the logit of the target Y (-1: none), by the first."""
    t, p = tl.program_id(0), tl.program_id(1)
    L += tl.cast(t, tl.int64) * l_stride
    y = tl.load(Y + t)
    top = tl.full([], float("-inf"), tl.float32)
    s = tl.zeros([], tl.float32)
    u = tl.zeros([], tl.float32)
    for i in range(0, tl.minimum(BLOCKS, tl.cdiv(V - p * BLOCKS * BV, BV))):
        v = (p * BLOCKS + i) * BV + tl.arange(0, BV)
        z = tl.load(L + v, mask=v < V, other=float("-inf")).to(tl.float32) * inv_temperature
        k_block = tl.ceil(tl.max(z, 0) * LOG2E)
        new = tl.maximum(top, k_block)
        from_k = above(z, finite(new))
        e = tl.exp2(from_k * LOG2E)
        scale = power_of_two(top - finite(new))
        if ENTROPY:
            shift = (finite(top) - finite(new)) * 0.6931471805599453
            u = scale * (u + s * shift) + tl.sum(tl.where(e > 0, e * from_k, 0.0), 0)
        s = scale * s + tl.sum(e, 0)
        top = new
    part = tl.cast(p, tl.int64) * T + t
    tl.store(K + part, top)
    tl.store(S + part, s)
    if ENTROPY:
        tl.store(U + part, u)
    if (p == 0) & (y >= 0):
        tl.store(Z + t, tl.load(L + y).to(tl.float32) * inv_temperature)


@triton.jit
def row_backward(
    L, OUT, Y, K_ROW, FACTOR, AT_TARGET, V, l_stride, o_stride, inv_temperature,
    BLOCKS: tl.constexpr, BV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """OUT [T, V] = factor_t exp(z - k_t ln 2), and at_target_t in the target's column; rows of factor 0 are zeros.

    OUT may be L: a block is read before it is written, by the same program, and its target's value comes from outside.
    """
    t, p = tl.program_id(0), tl.program_id(1)
    L += tl.cast(t, tl.int64) * l_stride
    OUT += tl.cast(t, tl.int64) * o_stride
    y, factor = tl.load(Y + t), tl.load(FACTOR + t)
    k = finite(tl.load(K_ROW + t))
    at_target = tl.load(AT_TARGET + t)
    for i in range(0, tl.minimum(BLOCKS, tl.cdiv(V - p * BLOCKS * BV, BV))):
        v = (p * BLOCKS + i) * BV + tl.arange(0, BV)
        z = tl.load(L + v, mask=v < V, other=float("-inf")).to(tl.float32) * inv_temperature
        out = tl.where(factor == 0, 0.0, factor * tl.exp2(above(z, k) * LOG2E))
        out = tl.where(v == y, at_target, out)
        tl.store(OUT + v, rounded(out, OUT.dtype.element_ty, INTERPRET), mask=v < V)


# --- launchers ----------------------------------------------------------------------------------------------------


def forward(logits_TV: Tensor, targets_T: Tensor, temperature: float, entropy: bool, arch: str) -> Softmax:
    """Softmax of the rows of logits / temperature at the targets (int32, -1: none). Rows are dense, at any stride."""
    (T, V), tile = logits_TV.shape, tile_of(arch, "row_forward")
    parts = triton.cdiv(V, tile["BV"] * SPAN_BLOCKS)
    k_PT = torch.empty(parts, T, dtype=torch.float32, device=logits_TV.device)
    s_PT = torch.empty_like(k_PT)
    u_PT = torch.empty_like(k_PT) if entropy else None
    z_T = torch.zeros(T, dtype=torch.float32, device=logits_TV.device)  # stays where there is no target
    row_forward[(T, parts)](
        logits_TV, targets_T, k_PT, s_PT, u_PT, z_T, T, V, logits_TV.stride(0), 1.0 / temperature,
        ENTROPY=entropy, BLOCKS=SPAN_BLOCKS, **tile,
    )  # fmt: skip
    k_T, s_T, u_T = combine(k_PT, s_PT, u_PT, arch)
    return Softmax(k_T, s_T, z_T, u_T)


def backward(
    logits_TV: Tensor,
    out_TV: Tensor,
    targets_T: Tensor,
    k_T: Tensor,
    factor_T: Tensor,
    at_target_T: Tensor,
    temperature: float,
    arch: str,
) -> None:
    """out = factor exp(logits / temperature - k ln 2), at_target in the targets' columns; out may be the logits."""
    (T, V), tile = logits_TV.shape, tile_of(arch, "row_backward")
    row_backward[(T, triton.cdiv(V, tile["BV"] * SPAN_BLOCKS))](
        logits_TV, out_TV, targets_T, k_T, factor_T, at_target_T, V,
        logits_TV.stride(0), out_TV.stride(0), 1.0 / temperature,
        BLOCKS=SPAN_BLOCKS, INTERPRET=INTERPRETED, **tile,
    )  # fmt: skip
