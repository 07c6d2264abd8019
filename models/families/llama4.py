"""Llama 4 (Scout, Maverick), its text part: chunked attention, every fourth layer without positions, top-1 experts.

Letters: `T` tokens, `D` model width, `N` heads, `G` kv heads, `H` head width. Read next: models/moe.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.attention import FULL, Span
from models.config import (
    ExpertsConfig,
    Fields,
    LayerKind,
    ModelConfig,
    decoder_config,
    flag,
    layer_numbers,
    layer_types,
    positive,
)
from models.errors import UserError
from models.frugal import rms_norm
from models.moe import MoE, sigmoid_of_chosen, swiglu
from models.parts import MLP, Attention, Context, Layer
from models.rope import rotate_pairs


def read_nested(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Llama4ForConditionalGeneration: the decoder is its text_config; pictures are not read."""
    return read_config(architecture, text_fields(fields, path), path)


def text_fields(fields: Fields, path: Path) -> dict[str, object]:
    """The config.json of the decoder alone: text_config, and what only the object around it says."""
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{path}: text_config = {text!r} must be an object")
    outer = {key: fields[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if key in fields}
    return {**outer, **text, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def read_config(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Llama4ForCausalLM."""
    count = positive(fields, "num_hidden_layers", path, int)
    step = positive(fields, "interleave_moe_layer_step", path, int, 1)
    sparse = layer_numbers(fields, "moe_layers", path, count, range(step - 1, count, step))
    interval = positive(fields, "no_rope_layer_interval", path, int, 4)
    rotary = fields.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotary, list) or len(rotary) != count or not all(value in (0, 1) for value in rotary):
        raise UserError(f"{path}: no_rope_layers = {rotary!r} must be a list of 0 or 1 for each of {count} layers")
    chunk = Span(chunk=positive({"attention_chunk_size": 8192, **fields}, "attention_chunk_size", path, int))
    spans = {"chunked_attention": chunk, "full_attention": FULL}
    kinds = layer_types(fields, path, [tuple(spans)[not rotates] for rotates in rotary], spans)
    tuned = fields.get("attn_temperature_tuning", True)  # published as true, 4 or left out
    if not isinstance(tuned, int):
        raise UserError(f"{path}: attn_temperature_tuning = {tuned!r} must be true or false")
    floor = positive(fields, "floor_scale", path, float, 8192.0)
    scale = positive(fields, "attn_scale", path, float, 0.1)
    return decoder_config(
        architecture,
        fields,
        path,
        layers=tuple(LayerKind(spans[kinds[i]], bool(rotary[i]), i in sparse) for i in range(count)),
        experts=ExpertsConfig(
            count=positive(fields, "num_local_experts", path, int),
            per_token=positive(fields, "num_experts_per_tok", path, int),
            ffn=positive(fields, "intermediate_size", path, int),
        ),
        qk_norm=flag(fields, "use_qk_norm", path, True),
        temperature=(floor, scale) if tuned else None,
        ffn_key="intermediate_size_mlp",
        defaults={"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    )


class Llama4Attention(Attention):
    """Rotated (neighbours as pairs) and then normed; or neither, with queries that grow with the position."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        self.eps = config.norm_eps if config.qk_norm else None
        self.temperature = config.temperature

    def prepare(self, q_TNH: Tensor, k_TGH: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if self.kind.rotary:
            q_TNH, k_TGH = (rotate_pairs(x, context.cos, context.sin) for x in (q_TNH, k_TGH))
            if self.eps is not None:
                ones_H = q_TNH.new_ones(self.head_dim)  # it has no weights
                q_TNH, k_TGH = (rms_norm(x, ones_H, self.eps, late=False) for x in (q_TNH, k_TGH))
        elif self.temperature is not None:
            floor, scale = self.temperature
            steps_T = ((context.positions_T.to(context.cos.dtype) + 1) / floor).floor()
            q_TNH = (q_TNH * (1 + scale * steps_T.log1p())[:, None, None]).to(q_TNH.dtype)
        return q_TNH, k_TGH


class SharedMoE(MoE):
    """Top-1 experts that read their input scaled by the router, and one that everybody asks."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype, sigmoid_of_chosen, swiglu, scale_input=True)
        self.shared_expert = MLP(config.hidden, self.config.ffn, False, dtype)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        return self.shared_expert(x_TD, context) + super().forward(x_TD, context)


def layer(config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Layer `index` of the model."""
    sparse = config.layers[index].sparse
    mlp = SharedMoE(config, index, dtype) if sparse else MLP(config.hidden, config.ffn, False, dtype)
    return Layer(config, dtype, Llama4Attention(config, index, dtype), mlp, mlp_name="feed_forward")
