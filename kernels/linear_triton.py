"""The fused kernels of linear_logprobs: logits, their softmax and its two products, never a [T, V] tensor of logits.

Letters: `T` rows, `D` model width, `V` vocabulary, `P` vocabulary tiles. Read next: kernels/triton_parts.py, which
explains the powers of two; kernels/linear_logprobs.py, which calls this.

linear_forward makes a tile of logits, reduces it to (k, s) per row and stores e = exp(z - k ln 2), the target's own
entry set to zero. linear_hidden_grad multiplies p = e 2^(k_tile - k_row) with W, linear_weight_grad p^T with the scaled
hidden rows. Every output element has one writer and one order of summation: no atomics, no locks, and a row's bits do
not depend on its neighbours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.tiles import tile_of
from kernels.triton_parts import (
    INTERPRETED,
    LOG2E,
    above,
    combine,
    finite,
    load_tile,
    power_of_two,
    product,
    rounded,
    tanh,
)

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def linear_forward(
    X, W, BIAS, Y, K, S, U, Z, E, T, V, D, x_stride, w_stride, e_stride, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE_E: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    DESC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tile (BT rows, BV words): K, S, U [P, T]; Z [T] by the tile that holds the target; E [T, V] where asked."""
    tiles_t, tiles_v = tl.cdiv(T, BT), tl.cdiv(V, BV)
    pid = tl.program_id(0)  # GROUP tiles of rows share a tile of weights while it is in the L2
    first = pid // (GROUP * tiles_v) * GROUP
    height = tl.minimum(tiles_t - first, GROUP)
    tile_t = first + pid % (GROUP * tiles_v) % height
    tile_v = pid % (GROUP * tiles_v) // height
    t0, v0 = tile_t * BT, tile_v * BV
    acc = tl.zeros([BT, BV], tl.float32)
    for d in range(0, D, BD):
        x = load_tile(X, t0, d, T, D, x_stride, BT, BD, DESC)
        w = load_tile(W, v0, d, V, D, w_stride, BV, BD, DESC)
        acc = product(x, w.T, acc, INTERPRET)
    t = t0 + tl.arange(0, BT)
    v = v0 + tl.arange(0, BV)
    z = acc
    if HAS_BIAS:
        z += tl.load(BIAS + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        capped = tanh(z / softcap)
        z = softcap * capped
    z *= inv_temperature
    z = tl.where(v[None, :] < V, z, float("-inf"))
    y = tl.load(Y + t, mask=t < T, other=-1)
    hit = v[None, :] == y[:, None]
    tl.store(Z + t, tl.sum(tl.where(hit, z, 0.0), 1), mask=(t < T) & (y >= v0) & (y < v0 + BV))
    k = tl.ceil(tl.max(z, 1) * LOG2E)
    from_k = above(z, finite(k)[:, None])
    e = tl.exp2(from_k * LOG2E)
    part = tl.cast(tile_v, tl.int64) * T + t
    tl.store(K + part, k, mask=t < T)
    tl.store(S + part, tl.sum(e, 1), mask=t < T)
    if ENTROPY:
        tl.store(U + part, tl.sum(tl.where(e > 0, e * from_k, 0.0), 1), mask=t < T)
    if STORE_E:
        if SOFTCAP:
            e *= 1 - capped * capped
        e = rounded(tl.where(hit, 0.0, e), E.dtype.element_ty, INTERPRET)
        corner = E + tl.cast(t0, tl.int64) * e_stride + v0
        at = tl.arange(0, BT)[:, None] * e_stride + tl.arange(0, BV)[None, :]
        tl.store(corner + at, e, mask=(t[:, None] < T) & (v[None, :] < V))


@triton.jit
def linear_hidden_grad(
    E, W, K, K_ROW, J, T, V, D, e_stride, w_stride,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """J [T, D] fp32 = sum_v e 2^(k_tile - k_row) W_v: tile (BT rows, BN columns), over all V. BK divides BV."""
    tiles_n = tl.cdiv(D, BN)
    t0, n0 = tl.program_id(0) // tiles_n * BT, tl.program_id(0) % tiles_n * BN
    t = t0 + tl.arange(0, BT)
    k_row = finite(tl.load(K_ROW + t, mask=t < T, other=0.0))
    acc = tl.zeros([BT, BN], tl.float32)
    for v in range(0, V, BK):
        e = load_tile(E, t0, v, T, V, e_stride, BT, BK, DESC)
        w = load_tile(W, v, n0, V, D, w_stride, BK, BN, DESC)
        k = tl.load(K + tl.cast(v // BV, tl.int64) * T + t, mask=t < T, other=float("-inf"))
        p = (e.to(tl.float32) * power_of_two(k - k_row)[:, None]).to(e.dtype)
        acc = product(p, w, acc, INTERPRET)
    n = n0 + tl.arange(0, BN)
    corner = J + tl.cast(t0, tl.int64) * D + n0
    at = tl.arange(0, BT)[:, None] * D + tl.arange(0, BN)[None, :]
    tl.store(corner + at, acc, mask=(t[:, None] < T) & (n[None, :] < D))


@triton.jit
def linear_weight_grad(
    E, G, K, K_ROW, DW, T, V, D, e_stride, g_stride,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """DW [V, D] fp32 (+)= sum_t e 2^(k_tile - k_row) G_t: tile (BM words, BN columns), over all T. BM divides BV."""
    tiles_n = tl.cdiv(D, BN)
    v0, n0 = tl.program_id(0) // tiles_n * BM, tl.program_id(0) % tiles_n * BN
    K += tl.cast(v0 // BV, tl.int64) * T
    acc = tl.zeros([BM, BN], tl.float32)
    for t0 in range(0, T, BK):
        t = t0 + tl.arange(0, BK)
        e = load_tile(E, t0, v0, T, V, e_stride, BK, BM, DESC)
        g = load_tile(G, t0, n0, T, D, g_stride, BK, BN, DESC)
        k = tl.load(K + t, mask=t < T, other=float("-inf"))
        k_row = finite(tl.load(K_ROW + t, mask=t < T, other=0.0))
        p = (e.to(tl.float32) * power_of_two(k - k_row)[:, None]).to(e.dtype)
        acc = product(p.T, g, acc, INTERPRET)
    v = v0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    inside = (v[:, None] < V) & (n[None, :] < D)
    out = DW + tl.cast(v0, tl.int64) * D + n0 + tl.arange(0, BM)[:, None] * D + tl.arange(0, BN)[None, :]
    if ADD:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc, mask=inside)


@triton.jit
def linear_target_rows(Y, ORDER, COEFFICIENT, H, DW, T, D, h_stride, BN: tl.constexpr):
    """DW[y] += sum of coefficient_t h_t over the rows t with target y, in their order: Y sorted [T], ORDER its rows.

    Program (i, columns) works where position i opens a run of equal targets, and takes the whole run.
    """
    i = tl.program_id(0)
    y = tl.load(Y + i)
    before = tl.load(Y + i - 1, mask=i > 0, other=-1)
    if y != before:  # rows without a target, -1, come first, and equal the -1 before the beginning
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        out = DW + tl.cast(y, tl.int64) * D + n
        acc = tl.load(out, mask=n < D, other=0.0)
        here = y
        while here == y:
            row = tl.load(ORDER + i)
            h = tl.load(H + row * h_stride + n, mask=n < D, other=0.0).to(tl.float32)
            acc += tl.load(COEFFICIENT + row) * h
            i += 1
            here = tl.load(Y + i, mask=i < T, other=-1)
        tl.store(out, acc, mask=n < D)


# --- launchers ----------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What the products need of a chunk of rows: e [T, V], k of its tiles [P, T], k of the rows [T]."""

    e_TV: Tensor
    k_PT: Tensor
    k_T: Tensor


class Softmax(NamedTuple):
    """Per row: k and s (fp64), logsumexp = k ln 2 + log s; the target's logit; u = sum exp(z - k ln 2) (z - k ln 2)."""

    k_T: Tensor
    s_T: Tensor
    target_T: Tensor
    u_T: Tensor | None


def dense_rows(x: Tensor) -> Tensor:
    """x itself where its rows are dense and offsets inside a tile fit 32 bits, else a copy of which that is true."""
    return x if x.stride(1) == 1 and 0 < x.stride(0) < 2**31 // 256 else x.contiguous()


def _operand(x: Tensor, rows: int, columns: int, tile: dict[str, int]) -> Tensor | TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]) if tile["DESC"] else x


def _described(tile: dict[str, int], *operands: Tensor) -> dict[str, int]:
    """The tile, without descriptors where an operand's address or row is no multiple of their 16 bytes."""
    fit = all((x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0 for x in operands)
    return tile if fit else tile | {"DESC": 0}


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    keep: bool,
    arch: str,
) -> tuple[Softmax, Kept | None]:
    """Softmax of hidden weight^T at the targets (int32, -1: none), and with `keep` what the products need."""
    (T, D), V = hidden_TD.shape, len(weight_VD)
    tile = _described(tile_of(arch, "linear_forward"), hidden_TD, weight_VD)
    parts = triton.cdiv(V, tile["BV"])
    k_PT = torch.empty(parts, T, dtype=torch.float32, device=hidden_TD.device)
    s_PT = torch.empty_like(k_PT)
    u_PT = torch.empty_like(k_PT) if entropy else None
    z_T = torch.zeros(T, dtype=torch.float32, device=hidden_TD.device)  # no tile writes where there is no target
    padded = triton.cdiv(V, 64) * 64  # a row of e begins at a multiple of 128 bytes
    e_TV = hidden_TD.new_empty(T, padded)[:, :V] if keep else None
    e_stride = 0 if e_TV is None else e_TV.stride(0)
    linear_forward[(triton.cdiv(T, tile["BT"]) * parts,)](
        _operand(hidden_TD, tile["BT"], tile["BD"], tile),
        _operand(weight_VD, tile["BV"], tile["BD"], tile),
        bias_V, targets_T, k_PT, s_PT, u_PT, z_T, e_TV, T, V, D,
        hidden_TD.stride(0), weight_VD.stride(0), e_stride, 1.0 / temperature, softcap or 1.0,
        HAS_BIAS=bias_V is not None, SOFTCAP=softcap is not None, ENTROPY=entropy, STORE_E=keep,
        INTERPRET=INTERPRETED, **tile,
    )  # fmt: skip
    k_T, s_T, u_T = combine(k_PT, s_PT, u_PT, arch)
    return Softmax(k_T, s_T, z_T, u_T), None if e_TV is None else Kept(e_TV, k_PT, k_T)


def hidden_grad(kept: Kept, weight_VD: Tensor, out_TD: Tensor, arch: str) -> None:
    """out (fp32, dense) = sum over the words but the target of exp(z - k_row ln 2) W_v."""
    (T, V), D = kept.e_TV.shape, weight_VD.shape[1]
    tile = _described(tile_of(arch, "linear_hidden_grad"), kept.e_TV, weight_VD)
    linear_hidden_grad[(triton.cdiv(T, tile["BT"]) * triton.cdiv(D, tile["BN"]),)](
        _operand(kept.e_TV, tile["BT"], tile["BK"], tile), _operand(weight_VD, tile["BK"], tile["BN"], tile),
        kept.k_PT, kept.k_T, out_TD, T, V, D, kept.e_TV.stride(0), weight_VD.stride(0),
        BV=tile_of(arch, "linear_forward")["BV"], INTERPRET=INTERPRETED, **tile,
    )  # fmt: skip


def add_weight_grad(grad_VD: Tensor, kept: Kept, scaled_TD: Tensor, add: bool, arch: str) -> None:
    """grad_VD (fp32) = or += sum_t exp(z - k_row ln 2) scaled_t, the targets' own entries left out."""
    (T, V), D = kept.e_TV.shape, scaled_TD.shape[1]
    tile = _described(tile_of(arch, "linear_weight_grad"), kept.e_TV, scaled_TD)
    linear_weight_grad[(triton.cdiv(V, tile["BM"]) * triton.cdiv(D, tile["BN"]),)](
        _operand(kept.e_TV, tile["BK"], tile["BM"], tile), _operand(scaled_TD, tile["BK"], tile["BN"], tile),
        kept.k_PT, kept.k_T, grad_VD, T, V, D, kept.e_TV.stride(0), scaled_TD.stride(0), ADD=add,
        BV=tile_of(arch, "linear_forward")["BV"], INTERPRET=INTERPRETED, **tile,
    )  # fmt: skip


def add_target_rows(grad_VD: Tensor, targets_T: Tensor, coefficient_T: Tensor, hidden_TD: Tensor, arch: str) -> None:
    """grad_VD[y_t] += coefficient_t hidden_t, equal targets in the order of their rows; targets of -1 are left out."""
    (T, D), tile = hidden_TD.shape, tile_of(arch, "linear_target_rows")
    sorted_T, order_T = torch.sort(targets_T, stable=True)
    linear_target_rows[(T, triton.cdiv(D, tile["BN"]))](
        sorted_T, order_T, coefficient_T, hidden_TD, grad_VD, T, D, hidden_TD.stride(0), **tile
    )
