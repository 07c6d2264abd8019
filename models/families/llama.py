"""Llama 2 and 3, SmolLM2: rotary attention and a gated MLP, all layers alike.

No dimension letters. Read next: models/families/qwen.py.
"""

from pathlib import Path

import torch

from models.config import Fields, ModelConfig, decoder_config, flag
from models.parts import MLP, Attention, Layer


def read_config(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """LlamaForCausalLM."""
    return decoder_config(architecture, fields, path, mlp_bias=flag(fields, "mlp_bias", path))


def layer(config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Layer `index` of the model."""
    mlp = MLP(config.hidden, config.ffn, config.mlp_bias, dtype)
    return Layer(config, dtype, Attention(config, index, dtype), mlp)
