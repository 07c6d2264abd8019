"""What every family is put together from: linear layers, norms, attention, the dense MLP, the pre-norm layer.

Letters: `T` tokens of a pack, `D` model width, `F` ffn width, `N` heads, `G` kv heads, `H` head width.
Weights may be kept in fp32 (masters, when they train) while the arithmetic runs in the hidden states' dtype: each part
casts its own weight as it is used. Read next: models/families/llama.py, models/moe.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Span
from models.config import ModelConfig
from models.frugal import rms_norm, swiglu
from models.rope import rotate
from models.routing import Routing

# (layer number, q [T, N, H], k and v [T, G, H], span, sinks [N] or None) -> [T, N, H]
Attend = Callable[[int, Tensor, Tensor, Tensor, Span, Tensor | None], Tensor]


class Context(NamedTuple):
    """What a layer is told beside the hidden states."""

    positions_T: Tensor
    cos: Tensor  # rotary tables of these positions [T, 1, H/2], fp32 (fp64 in fp64)
    sin: Tensor
    attend: Attend
    routing: Routing  # to the experts of sparse layers


class Linear(nn.Module):
    """y = x W^T (+ b), in x's dtype; plus a low-rank update when models/lora.py has attached one."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, weight, bias)
        return y if self.lora is None else self.lora(x, y, weight, bias)


class Embedding(nn.Module):
    """One row of the weight per token."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back to x's dtype, then times the weight (Llama's order)."""

    late = False  # the cast, after the weight

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width, dtype=dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps, late=self.late)


class ExactRMSNorm(RMSNorm):
    """x / rms(x) times the weight, all in fp32, then cast (gpt-oss's and OLMo 2's order)."""

    late = True


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; families override how queries and keys are prepared."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.index, self.kind = config.head_dim, index, config.layers[index]
        width = config.head_dim
        self.q_proj = Linear(config.hidden, config.heads * width, config.qkv_bias, dtype)
        self.k_proj = Linear(config.hidden, config.kv_heads * width, config.qkv_bias, dtype)
        self.v_proj = Linear(config.hidden, config.kv_heads * width, config.qkv_bias, dtype)
        self.o_proj = Linear(config.heads * width, config.hidden, config.output_bias, dtype)
        self.sinks: nn.Parameter | None = None  # [N], a learned logit that every softmax has beside its keys

    def prepare(self, q_TNH: Tensor, k_TGH: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are multiplied."""
        return rotate(q_TNH, context.cos, context.sin), rotate(k_TGH, context.cos, context.sin)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        q_TNH, k_TGH, v_TGH = (
            project(x_TD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_TNH, k_TGH = self.prepare(q_TNH, k_TGH, context)
        sinks_N = None if self.sinks is None else self.sinks.to(x_TD.dtype)
        return self.o_proj(context.attend(self.index, q_TNH, k_TGH, v_TGH, self.kind.span, sinks_N).flatten(1))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, ffn: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn, bias, dtype)
        self.up_proj = Linear(hidden, ffn, bias, dtype)
        self.down_proj = Linear(ffn, hidden, bias, dtype)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Layer(nn.Module):
    """Pre-norm: x += attention(norm x), x += mlp(norm x). `mlp_name`: as published."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        attention: Attention,
        mlp: nn.Module,
        norm: Callable[[int, float, torch.dtype], nn.Module] = RMSNorm,
        mlp_name: str = "mlp",
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(config.hidden, config.norm_eps, dtype)
        self.self_attn = attention
        self.post_attention_layernorm = norm(config.hidden, config.norm_eps, dtype)
        self.mlp_name = mlp_name
        self.add_module(mlp_name, mlp)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        return x_TD + self.get_submodule(self.mlp_name)(self.post_attention_layernorm(x_TD), context)
