"""gpt-oss: attention with sinks, every other layer in a window, YaRN, experts with a clamped activation.

Letters: `N` heads. Read next: models/families/llama4.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.attention import FULL, Span
from models.config import ExpertsConfig, Fields, LayerKind, ModelConfig, decoder_config, flag, positive, supported
from models.errors import UserError
from models.moe import MoE, clamped_swiglu, softmax_of_chosen
from models.parts import Attention, Layer, rms_normal


def read_config(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """GptOssForCausalLM."""
    supported(fields, "swiglu_alpha", path, 1.702)
    count = positive(fields, "num_hidden_layers", path, int)
    kinds = fields.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(count)]
    window = Span(window=positive(fields, "sliding_window", path, int, 128))
    spans = {"sliding_attention": window, "full_attention": FULL}
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= spans.keys():
        raise UserError(f"{path}: layer_types must name one of {', '.join(spans)} for each of {count} layers")
    bias = flag(fields, "attention_bias", path, True)
    ffn = positive(fields, "intermediate_size", path, int)
    return decoder_config(
        architecture,
        fields,
        path,
        layers=tuple(LayerKind(span=spans[kind], sparse=True) for kind in kinds),
        qkv_bias=bias,
        output_bias=bias,
        experts=ExpertsConfig(
            count=positive(fields, "num_local_experts", path, int),
            per_token=positive(fields, "num_experts_per_tok", path, int),
            ffn=ffn,
            limit=positive(fields, "swiglu_limit", path, float, 7.0),
        ),
        defaults={"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    )


class ExactRMSNorm(nn.Module):
    """x / rms(x) times the weight, all in fp32, then cast (the other families cast before the weight)."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width, dtype=dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        normal = rms_normal(x, self.eps)
        return (normal * self.weight.to(normal.dtype)).to(x.dtype)


def layer(config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Layer `index` of the model."""
    assert config.experts is not None
    attention = Attention(config, index, dtype)
    attention.sinks = nn.Parameter(torch.empty(config.heads, dtype=dtype))
    mlp = MoE(config.hidden, config.experts, dtype, softmax_of_chosen, clamped_swiglu, bias=True)
    return Layer(config, dtype, attention, mlp, ExactRMSNorm)
