"""Rotary position embedding, half-split form (Llama, SmolLM2, Qwen), with Llama 3's frequency scaling.

Letters: `T` tokens, `N` heads, `H` head width. Read next: models/attention.py.
"""

import math

import torch
from torch import Tensor

from models.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """theta^(-2i/H), fp32 [H/2] (fp64 math on the host), stretched by Llama 3's rule where the config asks for it."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / frequency
        longest = scaling.original_max_position / scaling.low_freq_factor
        shortest = scaling.original_max_position / scaling.high_freq_factor
        # Between the two bounds the frequency moves smoothly from scaled to unscaled; the band may be empty.
        band = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-9)
        share = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / band
        between = (1 - share) * frequency / scaling.factor + share * frequency
        scaled = torch.where(wavelength > longest, frequency / scaling.factor, frequency)
        frequency = torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)
    return frequency.to(device)


def rope_tables(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T, 1, H/2] of the positions' angles, computed in fp32 (fp64 for fp64), cast to `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    angles = positions_T[:, None].to(exact) * inverse_frequencies(config, positions_T.device).to(exact)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + H/2}) by its position's angle."""
    left, right = x_TNH.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
