"""Rotary position embedding: frequencies (plain, Llama 3's, YaRN's), tables, and the two ways to form pairs.

Letters: `T` tokens, `N` heads, `H` head width. Read next: models/attention.py.
"""

import math

import torch
from torch import Tensor

from models.config import ModelConfig, RopeScaling, Yarn


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a smooth passage between the two bounds."""
    wavelength = 2 * math.pi / frequency
    band = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-9)  # the passage may be empty
    kept = ((scaling.original_max_position / wavelength - scaling.low_freq_factor) / band).clamp(0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _yarn(frequency: Tensor, scaling: Yarn, theta: float) -> Tensor:
    """Divided by the factor from index `high` on, kept up to `low`, a ramp between (YaRN, sec. 3.2)."""
    half = len(frequency)

    def index(turns: float) -> float:  # of the frequency that turns so often within the original context
        return half * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    kept = 1 - ((torch.arange(half).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency / scaling.factor * (1 - kept) + frequency * kept


def inverse_frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """theta^(-2i/H), fp32 [H/2] (made on the host, in fp32), stretched as the config asks."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if isinstance(config.rope_scaling, RopeScaling):
        frequency = _llama3(frequency, config.rope_scaling)
    elif isinstance(config.rope_scaling, Yarn):
        frequency = _yarn(frequency, config.rope_scaling, config.rope_theta)
    return frequency.to(device)


def rope_tables(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T, 1, H/2] of the positions' angles, in fp32 (fp64 for fp64); YaRN's are 0.1 ln(factor) + 1 long."""
    exact = torch.promote_types(dtype, torch.float32)
    angles = positions_T[:, None].to(exact) * inverse_frequencies(config, positions_T.device).to(exact)
    scaling = config.rope_scaling
    length = 0.1 * math.log(max(scaling.factor, 1.0)) + 1 if isinstance(scaling, Yarn) else 1.0
    return (angles.cos() * length)[:, None], (angles.sin() * length)[:, None]


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + H/2}) by its position's angle, in x's dtype (Llama, Qwen, gpt-oss)."""
    cos, sin = cos.to(x_TNH.dtype), sin.to(x_TNH.dtype)
    left, right = x_TNH.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def rotate_pairs(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_2i, x_2i+1) by its position's angle, in the tables' dtype (Llama 4)."""
    left, right = x_TNH.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([left * cos - right * sin, right * cos + left * sin], -1).flatten(-2).to(x_TNH.dtype)
