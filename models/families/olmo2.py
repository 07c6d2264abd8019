"""OLMo 2: norms after attention and MLP instead of before; queries and keys normed over all heads at once.

Letters: `T` tokens, `D` model width, `N` heads, `G` kv heads, `H` head width. Read next: CONTRIBUTING.md, Add a family.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import Fields, ModelConfig, decoder_config
from models.parts import MLP, Attention, Context, ExactRMSNorm


def read_config(architecture: str, fields: Fields, path: Path) -> ModelConfig:
    """Olmo2ForCausalLM."""
    return decoder_config(architecture, fields, path, qk_norm=True, defaults={"rms_norm_eps": 1e-5})


class Olmo2Attention(Attention):
    """Queries and keys are normed over their whole projection, then rotated."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        self.q_norm = ExactRMSNorm(config.heads * config.head_dim, config.norm_eps, dtype)
        self.k_norm = ExactRMSNorm(config.kv_heads * config.head_dim, config.norm_eps, dtype)

    def prepare(self, q_TNH: Tensor, k_TGH: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        q_TNH, k_TGH = self.q_norm(q_TNH.flatten(1)).view_as(q_TNH), self.k_norm(k_TGH.flatten(1)).view_as(k_TGH)
        return super().prepare(q_TNH, k_TGH, context)


class Olmo2Layer(nn.Module):
    """Post-norm: x += norm(attention x), x += norm(mlp x)."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, index, dtype)
        self.post_attention_layernorm = ExactRMSNorm(config.hidden, config.norm_eps, dtype)
        self.mlp = MLP(config.hidden, config.ffn, config.mlp_bias, dtype)
        self.post_feedforward_layernorm = ExactRMSNorm(config.hidden, config.norm_eps, dtype)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        x_TD = x_TD + self.post_attention_layernorm(self.self_attn(x_TD, context))
        return x_TD + self.post_feedforward_layernorm(self.mlp(x_TD, context))


layer = Olmo2Layer
