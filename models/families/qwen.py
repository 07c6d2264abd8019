"""Qwen2.5 (biased q, k, v), Qwen3 (normed q and k), Qwen3-MoE (experts beside).

Letters: `T` tokens, `N` heads, `G` kv heads, `H` head width. Read next: models/families/gpt_oss.py.
"""

from pathlib import Path

import torch
from torch import Tensor

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
    supported,
)
from models.moe import MoE, chosen_of_softmax, swiglu
from models.parts import MLP, Attention, Context, Layer, RMSNorm


def _refuse_windows(fields: Fields, path: Path) -> None:
    """No published Qwen turns them on."""
    supported(fields, "use_sliding_window", path, False)
    count = positive(fields, "num_hidden_layers", path, int)
    layer_types(fields, path, ["full_attention"] * count, ("full_attention",))


def read_qwen2(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Qwen2ForCausalLM (Qwen2.5): q, k and v have a bias, whatever the file says."""
    _refuse_windows(fields, path)
    fields = {**fields, "attention_bias": None}
    return decoder_config(architecture, fields, path, qkv_bias=True, defaults={"num_key_value_heads": 32})


def read_qwen3(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Qwen3ForCausalLM."""
    _refuse_windows(fields, path)
    defaults = {"head_dim": 128, "num_key_value_heads": 32}
    return decoder_config(architecture, fields, path, qk_norm=True, defaults=defaults)


def read_qwen3_moe(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Qwen3MoeForCausalLM: a layer is sparse where decoder_sparse_step and mlp_only_layers say so."""
    _refuse_windows(fields, path)
    count = positive(fields, "num_hidden_layers", path, int)
    step = positive(fields, "decoder_sparse_step", path, int, 1)
    dense = layer_numbers(fields, "mlp_only_layers", path, count)
    layers = tuple(LayerKind(sparse=i not in dense and (i + 1) % step == 0) for i in range(count))
    total = fields.get("num_experts") or fields.get("num_local_experts")  # as published; as transformers 5 saves it
    experts = ExpertsConfig(
        count=positive({"num_experts": total}, "num_experts", path, int),
        per_token=positive(fields, "num_experts_per_tok", path, int),
        ffn=positive(fields, "moe_intermediate_size", path, int),
        renormalise=flag(fields, "norm_topk_prob", path),
    )
    defaults = {"num_key_value_heads": 4}
    return decoder_config(architecture, fields, path, layers=layers, experts=experts, qk_norm=True, defaults=defaults)


class Qwen3Attention(Attention):
    """Queries and keys are normed by head, then rotated."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype)

    def prepare(self, q_TNH: Tensor, k_TGH: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return super().prepare(self.q_norm(q_TNH), self.k_norm(k_TGH), context)


def layer(config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Layer `index` of a Qwen3."""
    if config.layers[index].sparse:
        mlp: MLP | MoE = MoE(config, index, dtype, chosen_of_softmax, swiglu, router_name="gate")
    else:
        mlp = MLP(config.hidden, config.ffn, config.mlp_bias, dtype)
    return Layer(config, dtype, Qwen3Attention(config, index, dtype), mlp)
