"""Products in fp32 of half-precision numbers, on CPUs, whose own are rounded to half precision again.

Letters: `M`, `K`, `N` of a product [M, K] x [K, N], `B` a block of one of them. Read next: kernels/linear_paths.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

BLOCK = 512  # words (or rows) of a weight in fp32 at a time; larger ones leave holes in the heap


def exact(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 and fp16, else the dtype."""
    return torch.promote_types(dtype, torch.float32)


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has units for bf16; without them a product was measured (AVX2) at 6 to 100 times fp32's time."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@cache
def _rounds_to_bf16() -> bool:
    """Whether oneDNN rounds what it multiplies where it may: with AMX; tried once."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw, dtype=torch.float32) for _ in range(2))
    truth = a.double() @ b.double()
    with fast_products(torch.bfloat16):
        error = (a @ b - truth).abs().max() / truth.abs().max()
    return float(error) > torch.finfo(torch.bfloat16).eps / 100


@contextmanager
def fast_products(dtype: torch.dtype, wanted: bool = True) -> Iterator[None]:
    """Within it products of fp32 tensors are oneDNN's, if nothing is lost by it: of `dtype` bf16 hold bf16 numbers.

    Allowed to, it rounds what it multiplies to bf16 where there is AMX, multiplies exactly and sums in fp32; elsewhere
    it multiplies in fp32, on a Zen 5 at 2 to 3 times the rate of MKL, which has no AVX-512 for AMD. The setting is the
    process's, of all its threads.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if wanted and (dtype == torch.bfloat16 or not _rounds_to_bf16()):
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _blocks_in_fp32(x: Tensor) -> Iterator[Tensor]:
    """BLOCK rows at a time in fp32, each block in the place of the one before."""
    place = x.new_empty(min(BLOCK, len(x)), x.shape[1], dtype=torch.float32)
    for block in x.split(BLOCK):
        yield place[: len(block)].copy_(block)


def widened_product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """a @ b in fp32 from half precision, a block at a time along the longest side: no fp32 copy of a whole weight."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    out_MN = a_MK.new_empty(M, N, dtype=torch.float32) if out_MN is None else out_MN
    with fast_products(torch.promote_types(a_MK.dtype, b_KN.dtype)):
        if max(M, N) < K:
            out_MN.zero_()
            for a_MB, b_BN in zip(a_MK.split(BLOCK, 1), _blocks_in_fp32(b_KN), strict=True):
                out_MN.addmm_(a_MB.float(), b_BN)
        elif M > N:
            b_KN = b_KN.float()
            for a_BK, out_BN in zip(_blocks_in_fp32(a_MK), out_MN.split(BLOCK), strict=True):
                torch.mm(a_BK, b_KN, out=out_BN)
        else:
            a_MK = a_MK.float()
            for b_BK, out_MB in zip(_blocks_in_fp32(b_KN.T), out_MN.split(BLOCK, 1), strict=True):
                torch.mm(a_MK, b_BK.T, out=out_MB)
    return out_MN
