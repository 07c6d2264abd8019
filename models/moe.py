"""Mixture of experts: who is asked (three routers) and what they answer (two activations).

Letters: `T` tokens, `D` model width, `F` ffn width of an expert, `E` experts, `K` experts per token.
Experts keep their weights as [E, out, in] whatever the files' layout (models/checkpoint.py turns them). Routers choose
in fp32. Dropless: every token is answered by all the experts it chose. Read next: models/families/gpt_oss.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ExpertsConfig

Routes = tuple[Tensor, Tensor]  # the chosen experts [T, K] and their weights [T, K], in fp32 (fp64 in fp64)
Router = Callable[[Tensor, ExpertsConfig], Routes]
Activation = Callable[[Tensor, float], Tensor]


def softmax_of_chosen(logits_TE: Tensor, config: ExpertsConfig) -> Routes:
    """gpt-oss: softmax over the K largest logits."""
    logit_TK, choice_TK = logits_TE.topk(config.per_token)
    return choice_TK, logit_TK.softmax(-1)


def chosen_of_softmax(logits_TE: Tensor, config: ExpertsConfig) -> Routes:
    """Qwen3-MoE: the K largest of the softmax over all, divided by their sum where the config says so."""
    weight_TK, choice_TK = logits_TE.softmax(-1).topk(config.per_token)
    return choice_TK, weight_TK / weight_TK.sum(-1, keepdim=True) if config.renormalise else weight_TK


def sigmoid_of_chosen(logits_TE: Tensor, config: ExpertsConfig) -> Routes:
    """Llama 4: sigmoid of the K largest logits (it scales the experts' input)."""
    logit_TK, choice_TK = logits_TE.topk(config.per_token)
    return choice_TK, logit_TK.sigmoid()


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gpt-oss: gate and up stand in turn (even and odd columns), are clamped, and up is counted from -1."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up; gate is the first half."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class RouterLogits(nn.Module):
    """x W^T (+ b) [T, E], in fp32 (fp64 in fp64): a rounded logit would flip near ties."""

    def __init__(self, hidden: int, experts: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, dtype=dtype)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(exact), self.weight.to(exact), None if self.bias is None else self.bias.to(exact))


class Experts(nn.Module):
    """E gated MLPs; the names are the published ones."""

    def __init__(self, hidden: int, config: ExpertsConfig, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        E, F2 = config.count, 2 * config.ffn  # noqa: N806
        self.gate_up_proj = nn.Parameter(torch.empty(E, F2, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, hidden, config.ffn, dtype=dtype))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, F2, dtype=dtype)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(E, hidden, dtype=dtype)) if bias else None

    def one(self, expert: int, x: Tensor, activation: Activation, limit: float) -> Tensor:
        """One expert's answer to x [rows, D]."""
        up_bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert].to(x.dtype)
        down_bias = None if self.down_proj_bias is None else self.down_proj_bias[expert].to(x.dtype)
        inner = activation(F.linear(x, self.gate_up_proj[expert].to(x.dtype), up_bias), limit)
        return F.linear(inner, self.down_proj[expert].to(x.dtype), down_bias)


class MoE(nn.Module):
    """sum_k weight_k expert_k(x); with `scale_input`, sum_k expert_k(weight_k x). Subclasses name the router."""

    def __init__(
        self,
        hidden: int,
        config: ExpertsConfig,
        dtype: torch.dtype,
        route: Router,
        activation: Activation,
        *,
        bias: bool = False,
        scale_input: bool = False,
        router_name: str = "router",
    ) -> None:
        super().__init__()
        self.config, self.route, self.activation, self.scale_input = config, route, activation, scale_input
        self.router_name = router_name
        self.add_module(router_name, RouterLogits(hidden, config.count, bias, dtype))
        self.experts = Experts(hidden, config, bias, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        choice_TK, weight_TK = self.route(self.get_submodule(self.router_name)(x_TD), self.config)
        weight_TK = weight_TK.to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.config.count):
            token, k = torch.where(choice_TK == expert)
            weight = weight_TK[token, k, None]
            x = x_TD[token] * weight if self.scale_input else x_TD[token]
            y = self.experts.one(expert, x, self.activation, self.config.limit)
            out_TD = out_TD.index_add(0, token, y if self.scale_input else y * weight)
        return out_TD
