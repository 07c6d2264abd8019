"""Mixture of experts: who is asked (three routers) and what they answer (two activations).

Letters: `T` tokens, `D` model width, `F` ffn width of an expert, `E` experts, `K` experts per token, `M` rows: a token
and one of its experts, sorted by expert.

Experts keep their weights as [E, out, in] whatever the files' layout (models/layouts.py has the turns), or packed as
published, in MXFP4. Routers choose in fp32. Dropless: every token is answered by all the experts it chose. On the CPU
an expert takes its rows in blocks of ROWS, the last one filled up, so that a token's bits do not depend on how many
others chose the same. Read next: models/routing.py, kernels/mxfp4.py, models/families/gpt_oss.py.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Packed, rows_linear
from models import frugal
from models.config import ExpertsConfig, ModelConfig
from models.parts import Context
from models.routing import asked
from models.sharded import Units, answer_by_units, local_tensor

ROWS = 64  # a matrix product of fewer is slower a row, more are more often padding

Router = Callable[[Tensor, Tensor, ExpertsConfig], Tensor]  # logits [T, E], choice [T, K] -> weights [T, K]
Activation = Callable[[Tensor, float], Tensor]


def softmax_of_chosen(logits_TE: Tensor, choice_TK: Tensor, config: ExpertsConfig) -> Tensor:
    """gpt-oss: softmax over the chosen logits."""
    return logits_TE.gather(1, choice_TK).softmax(-1)


def chosen_of_softmax(logits_TE: Tensor, choice_TK: Tensor, config: ExpertsConfig) -> Tensor:
    """Qwen3-MoE: the chosen of the softmax over all, divided by their sum where the config says so."""
    weight_TK = logits_TE.softmax(-1).gather(1, choice_TK)
    return weight_TK / weight_TK.sum(-1, keepdim=True) if config.renormalise else weight_TK


def sigmoid_of_chosen(logits_TE: Tensor, choice_TK: Tensor, config: ExpertsConfig) -> Tensor:
    """Llama 4: sigmoid of the chosen logits (it scales the experts' input)."""
    flat = logits_TE.gather(1, choice_TK).flatten()
    whole = F.pad(flat, (0, -len(flat) % 64))  # the CPU rounds what is left of its vectors in another way
    return whole.sigmoid()[: len(flat)].view_as(choice_TK)


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gpt-oss: gate and up stand in turn (even and odd columns), are clamped, and up is counted from -1."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up; gate is the first half."""
    return frugal.swiglu(*gate_up.chunk(2, -1))


class RouterLogits(nn.Module):
    """x W^T (+ b) [T, E], in fp32 (fp64 in fp64): a rounded logit would flip near ties.

    W and b are rounded to x's dtype all the same, as on ranks that send them in it.
    """

    def __init__(self, hidden: int, experts: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, dtype=dtype)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(x_TD.dtype).to(exact)
        return F.linear(x_TD.to(exact), self.weight.to(x_TD.dtype).to(exact), bias_E)


class LowRankExperts(nn.Module):
    """An update of one projection of E experts: A [E, r, in] and B [E, out, r], see models/lora.py."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(a), nn.Parameter(b), scale


class Experts(nn.Module):
    """E gated MLPs; the names are the published ones, `..._blocks` and `..._scales` of packed weights too."""

    def __init__(self, hidden: int, config: ExpertsConfig, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.limit = config.packed, config.limit
        # [E, out, in] of each projection, however it is stored
        self.shapes = {
            "gate_up_proj": (config.count, 2 * config.ffn, hidden),
            "down_proj": (config.count, hidden, config.ffn),
        }
        self.lora = nn.ModuleDict()  # by projection, where models/lora.py has attached an update
        self.units: Units | None = None  # where dpo/distributed.py has cut the weights along their outputs
        for name, (count, outputs, inputs) in self.shapes.items():
            if config.packed:
                assert inputs % 32 == 0, f"{name}: {inputs} inputs are no whole number of MXFP4 blocks"
                scales = torch.empty(count, outputs, inputs // 32, dtype=torch.uint8)
                blocks = torch.empty(*scales.shape, 16, dtype=torch.uint8)
                self.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
                self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(count, outputs, inputs, dtype=dtype)))
            bias_EO = nn.Parameter(torch.empty(count, outputs, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", bias_EO)

    def forward(self, x_MD: Tensor, rows_E: Tensor, activation: Activation, grouped: bool) -> Tensor:
        """Each row answered by its expert; the rows lie one expert's after another's, rows_E of each."""
        project = self._grouped if grouped else self._looped
        own = {name: local_tensor(parameter) for name, parameter in self.named_parameters()}

        def answer(x_MD: Tensor, rows_E: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            inner_MF = activation(project("gate_up_proj", x_MD, rows_E, weights), self.limit)
            return project("down_proj", inner_MF, rows_E, weights)

        if self.units is None:
            return answer(x_MD, rows_E, own)
        return answer_by_units(answer, self.units, x_MD, rows_E, own)

    def update(self, name: str) -> LowRankExperts | None:
        """The low-rank update of a projection, if it has one."""
        update = self.lora[name] if name in self.lora else None  # noqa: SIM401 (a ModuleDict has no get)
        assert update is None or isinstance(update, LowRankExperts)
        return update

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights [E, out, ...] as they are stored, without biases and updates."""
        endings = ("_blocks", "_scales") if self.packed else ("",)
        return {name + ending: self.get_parameter(name + ending) for name in self.shapes for ending in endings}

    def _looped(self, name: str, x_MI: Tensor, rows_E: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        weights: Sequence[Tensor | Packed]
        if self.packed:
            stored = (own[f"{name}_{part}"].unbind() for part in ("blocks", "scales"))
            weights = [Packed(*one) for one in zip(*stored, strict=True)]
        else:
            weights = own[name].unbind()  # its backward is one stack: no gradient of all for each
        biases = own.get(f"{name}_bias")
        biases_E = [None] * len(weights) if biases is None else biases.unbind()
        update = self.update(name)
        low = [] if update is None else [own[f"lora.{name}.{part}"].unbind() for part in "AB"]
        low_E = list(zip(*low, strict=True))
        parts = []
        for expert, x in enumerate(x_MI.split(rows_E.tolist())):
            if len(x):
                y = rows_linear(x, weights[expert], biases_E[expert], rows=ROWS)
                if update is not None:
                    a, b = low_E[expert]
                    y = rows_linear(rows_linear(x, a, rows=ROWS), b, y, rows=ROWS, alpha=update.scale)
                parts.append(y)
        return torch.cat(parts)

    def _grouped(self, name: str, x_MI: Tensor, rows_E: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        ends_E = rows_E.cumsum(0).int()

        def product(x: Tensor, weight_EOI: Tensor) -> Tensor:
            return F.grouped_mm(x, weight_EOI.to(x.dtype).transpose(1, 2), offs=ends_E)

        y_MO = product(x_MI, own[name])
        if (biases := own.get(f"{name}_bias")) is not None:
            y_MO = y_MO + biases.to(x_MI.dtype).repeat_interleave(rows_E, 0, output_size=len(x_MI))
        if (update := self.update(name)) is not None:
            a, b = own[f"lora.{name}.A"], own[f"lora.{name}.B"]
            y_MO = y_MO + update.scale * product(product(x_MI, a), b)
        return y_MO


def grouped_is_legal(x: Tensor, experts: Experts) -> bool:
    """Whether torch's grouped_mm takes these: on a GPU of compute capability 8 or more, bf16, rows of 16n bytes.

    Meta tensors stand for such a GPU's.
    """
    if x.device.type not in ("cuda", "meta") or x.dtype != torch.bfloat16 or experts.packed:
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 8:
        return False
    updates = [update for name in experts.shapes if (update := experts.update(name)) is not None]
    widths = [width for shape in experts.shapes.values() for width in shape[1:]]
    return all(width % 8 == 0 for width in [*widths, *(update.A.shape[1] for update in updates)])


def by_expert(choice_TK: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, each expert's filled up to a multiple of `block`: (pair [M], place [T * K], rows [E]).

    A pair is a token and one of its choices, t * K + k: row m answers pair_M[m] (0 where it only fills up), and the
    answer to pair p stands in row place[p].
    """
    choice_N = choice_TK.flatten()
    order_N = choice_N.argsort(stable=True)
    asked_E = asked(choice_TK, experts)
    rows_E = (asked_E + block - 1) // block * block
    shift_E = (rows_E.cumsum(0) - rows_E) - (asked_E.cumsum(0) - asked_E)
    row_N = torch.arange(len(choice_N), device=choice_N.device) + shift_E[choice_N[order_N]]
    pair_M = choice_N.new_zeros(len(choice_N) if block == 1 else int(rows_E.sum()))
    pair_M[row_N] = order_N
    place_N = torch.empty_like(order_N)
    place_N[order_N] = row_N
    return pair_M, place_N, rows_E


class MoE(nn.Module):
    """sum_k weight_k expert_k(x); with `scale_input`, sum_k expert_k(weight_k x). `router_name`: as published."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: torch.dtype,
        route: Router,
        activation: Activation,
        *,
        bias: bool = False,
        scale_input: bool = False,
        router_name: str = "router",
    ) -> None:
        super().__init__()
        assert config.experts is not None, "a sparse layer has experts"
        self.config, self.index, self.route, self.activation = config.experts, index, route, activation
        self.scale_input, self.router_name = scale_input, router_name
        self.add_module(router_name, RouterLogits(config.hidden, self.config.count, bias, dtype))
        self.experts = Experts(config.hidden, self.config, bias, dtype)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        tokens, K = context.routing.tokens, self.config.per_token  # noqa: N806
        # The router reads the padding too: a product of one shape. Nobody answers it.
        logits_TE = self.get_submodule(self.router_name)(x_TD)[:tokens]
        choice_TK = context.routing.choose(self.index, logits_TE, K)
        weight_TK = self.route(logits_TE, choice_TK, self.config)

        grouped = grouped_is_legal(x_TD, self.experts)
        pair_M, place_N, rows_E = by_expert(choice_TK, self.config.count, 1 if grouped else ROWS)
        x_MD = x_TD.index_select(0, pair_M // K)
        if self.scale_input:
            x_MD = x_MD * weight_TK.flatten().index_select(0, pair_M)[:, None].to(x_TD.dtype)
        y_MD = self.experts(x_MD, rows_E, self.activation, grouped)

        out_TD = torch.zeros_like(x_TD[:tokens], dtype=logits_TE.dtype)
        for k, answer_TD in enumerate(y_MD.index_select(0, place_N).unflatten(0, (tokens, K)).unbind(1)):
            out_TD = out_TD + (answer_TD if self.scale_input else answer_TD * weight_TK[:, k, None])
        return F.pad(out_TD.to(x_TD.dtype), (0, 0, 0, len(x_TD) - tokens))
