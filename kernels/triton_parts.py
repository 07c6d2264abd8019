"""What the Triton kernels share: tiles with masked tails, products, scaled exponentials, sums of partial softmaxes.

Letters: `T` rows, `V` vocabulary. Read next: kernels/linear_triton.py, kernels/row_triton.py.

A softmax over V is summed in parts. Each part keeps k = ceil(max z / ln 2), an integer, and s = sum exp(z - k ln 2);
parts are brought to one k by powers of two, which is exact in every float format. z - k ln 2 is taken in natural units,
ln 2 in two pieces (Cody-Waite), so that |z| = 1e4 costs no accuracy. A part of nothing but -inf has k = -inf, s = 0.

INTERPRET is for triton's interpreter alone, which multiplies the bits of bf16 and truncates where a GPU rounds: it
widens before a product and rounds by hand before a store. On a GPU it is 0 and changes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import tile_of

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read once, as the decorators below do

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: k times it is exact in fp32 for |k| < 2^14
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def load_tile(A, row, column, rows, columns, stride, BR: tl.constexpr, BC: tl.constexpr, DESC: tl.constexpr):
    """[BR, BC] of a row-major matrix from (row, column) on, zeros outside; A is a pointer, with DESC a descriptor."""
    if DESC:
        return A.load([row, column])
    else:  # of a branch that returns, Triton compiles what follows too
        r = tl.arange(0, BR)[:, None]
        c = tl.arange(0, BC)[None, :]
        corner = A + tl.cast(row, tl.int64) * stride + column
        return tl.load(corner + r * stride + c, mask=(r < rows - row) & (c < columns - column), other=0.0)


@triton.jit
def product(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b with fp32 accumulation; fp32 inputs are not rounded to TF32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x in dtype, to the nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def power_of_two(n):
    """2^n for integers n <= 0 held as fp32, from its bits: exact, and 0 below 2^-126."""
    exponent = tl.maximum(n, -127.0).to(tl.int32) + 127
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def finite(k):
    """k, and 0 where no logit is finite yet."""
    return tl.where(k == float("-inf"), 0.0, k)


@triton.jit
def above(z, k):
    """z - k ln 2, in natural units."""
    return (z - k * LN2_HIGH) - k * LN2_LOW


@triton.jit
def tanh(x):
    """tanh to fp32's accuracy, also where x is small."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def combine_parts(K, S, U, K_OUT, S_OUT, U_OUT, T, parts, ENTROPY: tl.constexpr, BT: tl.constexpr):
    """Sums [parts, T] partial softmaxes over the parts, in their order: k, s, u = sum of exp(z - k ln 2) (z - k ln 2).

    The sums run in fp64: a vocabulary has a thousand parts. One program per BT rows; every row on its own.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = t < T
    top = tl.full([BT], float("-inf"), tl.float32)
    for i in range(0, parts):
        top = tl.maximum(top, tl.load(K + tl.cast(i, tl.int64) * T + t, mask=inside, other=float("-inf")))
    k = finite(top)
    s = tl.zeros([BT], tl.float64)
    u = tl.zeros([BT], tl.float64)
    for i in range(0, parts):
        at = tl.cast(i, tl.int64) * T + t
        k_part = tl.load(K + at, mask=inside, other=float("-inf"))
        s_part = tl.load(S + at, mask=inside, other=0.0)
        scale = power_of_two(k_part - k)
        s += (scale * s_part).to(tl.float64)
        if ENTROPY:
            shift = (finite(k_part) - k).to(tl.float64) * 0.6931471805599453
            u_part = tl.load(U + at, mask=inside, other=0.0).to(tl.float64)
            u += scale.to(tl.float64) * (u_part + s_part.to(tl.float64) * shift)
    tl.store(K_OUT + t, top, mask=inside)
    tl.store(S_OUT + t, s, mask=inside)
    if ENTROPY:
        tl.store(U_OUT + t, u, mask=inside)


def combine(k_PT: Tensor, s_PT: Tensor, u_PT: Tensor | None, arch: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k fp32, s fp64, u fp64 or None), [T] each, of partial softmaxes [parts, T]."""
    parts, T = k_PT.shape
    k_T = torch.empty_like(k_PT[0])
    s_T = torch.empty_like(k_T, dtype=torch.float64)
    u_T = None if u_PT is None else torch.empty_like(s_T)
    tile = tile_of(arch, "combine_parts")
    entropy = u_PT is not None
    combine_parts[(triton.cdiv(T, tile["BT"]),)](k_PT, s_PT, u_PT, k_T, s_T, u_T, T, parts, ENTROPY=entropy, **tile)
    return k_T, s_T, u_T
