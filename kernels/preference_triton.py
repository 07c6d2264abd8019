"""The preference loss of pairs of completions, one program a pair, and its gradient per token.

Letters: `B` pairs, `S` = 2B completions, `T` tokens. Read next: kernels/preference_loss.py, which has the equations.

Sums run in fp64, BT tokens at a time: they are no cost, and a margin is a small difference of large sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import tile_of

SIGMOID, HINGE, IPO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CODES = {"sigmoid": 0, "hinge": 1, "ipo": 2}

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def segment_sum(X, begin, end, BT: tl.constexpr):
    """Sum of X[begin:end] in fp64."""
    total = tl.zeros([BT], tl.float64)
    for i in range(begin, end, BT):
        at = i + tl.arange(0, BT)
        total += tl.load(X + at, mask=at < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def log_ratio(POLICY, REFERENCE, CU, s, PER_TOKEN: tl.constexpr, PER_SEQUENCE: tl.constexpr, BT: tl.constexpr):
    """Log-ratio of completion s in fp64: the sums' difference, exactly 0 where policy and reference are equal."""
    begin, end = tl.load(CU + s), tl.load(CU + s + 1)
    ratio = segment_sum(POLICY, begin, end, BT)
    if PER_TOKEN:
        ratio -= segment_sum(REFERENCE, begin, end, BT)
    if PER_SEQUENCE:
        ratio -= tl.load(REFERENCE + s).to(tl.float64)
    return ratio


@triton.jit
def pair_forward(
    POLICY, REFERENCE, CU, LOSS, CHOSEN, REJECTED, SLOPE, BETA, SMOOTHING, B, INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr, PER_TOKEN: tl.constexpr, PER_SEQUENCE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Loss, rewards and d loss / d (log-ratio of the chosen) of pair b; the rejected's is its negative.

    Pair b's completions are 2b and 2b + 1 where they are interleaved, else b and B + b.
    """
    b = tl.program_id(0)
    first = 2 * b if INTERLEAVED else b
    second = first + 1 if INTERLEAVED else b + B
    chosen = log_ratio(POLICY, REFERENCE, CU, first, PER_TOKEN, PER_SEQUENCE, BT)
    rejected = log_ratio(POLICY, REFERENCE, CU, second, PER_TOKEN, PER_SEQUENCE, BT)
    beta = tl.load(BETA)
    smoothing = tl.load(SMOOTHING)
    d = chosen - rejected
    x = beta * d
    if KIND == SIGMOID:  # -(1 - e) log sigma(x) - e log sigma(-x)
        tail = tl.exp(-tl.abs(x))
        softplus = tl.log(1 + tail)
        loss = (1 - smoothing) * (tl.maximum(-x, 0.0) + softplus) + smoothing * (tl.maximum(x, 0.0) + softplus)
        sigma = tl.where(x >= 0, 1 / (1 + tail), tail / (1 + tail))
        slope = beta * (sigma - (1 - smoothing))
    if KIND == HINGE:
        loss = tl.maximum(1 - x, 0.0)
        slope = tl.where(x < 1, -beta, 0.0)
    if KIND == IPO:
        off = d - 1 / (2 * beta)
        loss = off * off
        slope = 2 * off
    tl.store(LOSS + b, loss)
    tl.store(CHOSEN + b, beta * chosen)
    tl.store(REJECTED + b, beta * rejected)
    tl.store(SLOPE + b, slope)


@triton.jit
def pair_backward(GRAD, SLOPE, CU, OUT, B, INTERLEAVED: tl.constexpr, BT: tl.constexpr):
    """OUT [T]: every token of completion s gets its pair's gradient, with the sign of its side."""
    s = tl.program_id(0)
    b = s // 2 if INTERLEAVED else s % B
    rejected = s % 2 if INTERLEAVED else s // B
    g = tl.load(GRAD + b).to(tl.float64) * tl.load(SLOPE + b)
    g = tl.where(rejected == 1, -g, g)
    begin, end = tl.load(CU + s), tl.load(CU + s + 1)
    for i in range(begin, end, BT):
        at = i + tl.arange(0, BT)
        tl.store(OUT + at, tl.zeros([BT], tl.float64) + g, mask=at < end)


# --- launchers ----------------------------------------------------------------------------------------------------


def forward(
    policy_T: Tensor,
    reference: Tensor | None,
    cu_seqlens: Tensor,
    beta: float,
    smoothing: float,
    kind: str,
    interleaved: bool,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, chosen rewards, rejected rewards, d loss / d chosen log-ratio), fp64 [B]; reference [T] or [2B, 1]."""
    B = (len(cu_seqlens) - 1) // 2
    per_sequence = reference is not None and reference.dim() == 2  # told apart from [T] by its form
    out = [torch.empty(B, dtype=torch.float64, device=policy_T.device) for _ in range(4)]
    scalars = torch.tensor([beta, smoothing], dtype=torch.float64, device=policy_T.device)
    pair_forward[(B,)](
        policy_T, reference, cu_seqlens, *out, scalars, scalars[1:], B, INTERLEAVED=interleaved,
        KIND=CODES[kind], PER_TOKEN=reference is not None and not per_sequence, PER_SEQUENCE=per_sequence,
        **tile_of(arch, "pair_forward"),
    )  # fmt: skip
    losses_B, chosen_B, rejected_B, slope_B = out
    return losses_B, chosen_B, rejected_B, slope_B


def backward(grad_B: Tensor, slope_B: Tensor, cu_seqlens: Tensor, out_T: Tensor, interleaved: bool, arch: str) -> None:
    """out_T = d (sum of grad * loss) / d (policy log-prob) of every token; those of no completion are left alone."""
    B = len(slope_B)
    pair_backward[(2 * B,)](
        grad_B, slope_B, cu_seqlens, out_T, B, INTERLEAVED=interleaved, **tile_of(arch, "pair_backward")
    )
