"""MXFP4 blocks unpacked: 16 bytes and a scale in, 32 values out.

Letters: `G` blocks. Read next: kernels/mxfp4.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import tile_of

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def value_of(code, scale):
    """scale times the value of a 4-bit float (sign, 2 bits of exponent, 1 of mantissa): exact, -0 included."""
    small = code & 7
    halves = tl.where(small < 2, small, (2 + (small & 1)) << tl.maximum((small >> 1) - 1, 0))
    return halves.to(tl.float32) * tl.where(code >= 8, -0.5, 0.5) * scale  # a minus sign would lose -0


@triton.jit
def dequantise_blocks(BLOCKS, SCALES, OUT, G, BG: tl.constexpr):
    """OUT [G, 32] of BLOCKS [G, 16], low halves of the bytes first, and SCALES [G]; one program per BG blocks."""
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    at = tl.cast(g, tl.int64)[:, None]
    inside = g < G
    codes = tl.load(BLOCKS + at * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    power = tl.load(SCALES + g, mask=inside, other=127).to(tl.int32)
    scale = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)[:, None]  # 2^(power - 127)
    values = tl.interleave(value_of(codes & 15, scale), value_of(codes >> 4, scale))
    tl.store(OUT + at * 32 + tl.arange(0, 32)[None, :], values.to(OUT.dtype.element_ty), mask=inside[:, None])


# --- launcher -----------------------------------------------------------------------------------------------------


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype, arch: str) -> Tensor:
    """Values [..., 32 * blocks of a row] of contiguous uint8 blocks [..., 16] and scales [...]."""
    out = torch.empty(*blocks.shape[:-2], 32 * blocks.shape[-2], dtype=dtype, device=blocks.device)
    tile = tile_of(arch, "dequantise_blocks")
    dequantise_blocks[(triton.cdiv(scales.numel(), tile["BG"]),)](blocks, scales, out, scales.numel(), **tile)
    return out
