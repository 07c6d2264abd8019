"""gpt-oss: attention with sinks, every other layer in a window, YaRN, experts with a clamped activation.

Letters: `N` heads. Read next: models/families/llama4.py.
"""

from pathlib import Path

import torch
from torch import nn

from models.attention import FULL, Span
from models.config import (
    ExpertsConfig,
    Fields,
    LayerKind,
    ModelConfig,
    decoder_config,
    flag,
    layer_types,
    positive,
    supported,
)
from models.moe import MoE, clamped_swiglu, softmax_of_chosen
from models.parts import Attention, ExactRMSNorm, Layer

# Where the file is silent; the rest as models/config.py has it.
YARN: Fields = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def read_config(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """GptOssForCausalLM."""
    supported(fields, "swiglu_alpha", path, 1.702)
    count = positive(fields, "num_hidden_layers", path, int)
    window = Span(window=positive({"sliding_window": 128, **fields}, "sliding_window", path, int))
    spans = {"sliding_attention": window, "full_attention": FULL}
    kinds = layer_types(fields, path, [tuple(spans)[i % 2] for i in range(count)], spans)
    bias = flag(fields, "attention_bias", path, True)
    return decoder_config(
        architecture,
        {**fields, "attention_bias": bias, "rope_scaling": fields.get("rope_scaling") or YARN},
        path,
        layers=tuple(LayerKind(span=spans[kind], sparse=True) for kind in kinds),
        experts=ExpertsConfig(
            count=positive(fields, "num_local_experts", path, int),
            per_token=positive(fields, "num_experts_per_tok", path, int),
            ffn=positive(fields, "intermediate_size", path, int),
            limit=positive(fields, "swiglu_limit", path, float, 7.0),
            packed=fields.get("quantization_config") is not None,
        ),
        defaults={"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150000.0},
    )


def layer(config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Layer `index` of the model."""
    attention = Attention(config, index, dtype)
    attention.sinks = nn.Parameter(torch.empty(config.heads, dtype=dtype))
    mlp = MoE(config, index, dtype, softmax_of_chosen, clamped_swiglu, bias=True)
    return Layer(config, dtype, attention, mlp, ExactRMSNorm)
