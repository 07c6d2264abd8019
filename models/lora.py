"""LoRA: a trained low-rank update beside a frozen weight, read and written as peft stores it.

Letters: `r` rank. y = x W^T + s (x A^T) B^T, A [r, in] uniform as peft's (Kaiming, a = sqrt 5), B [out, r] zero, both
kept in fp32 (Hu et al. 2021, eq. 3); s = alpha / r, or alpha / sqrt r (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al.
2024, eq. 5) has a magnitude for each output: y = (||W|| + M) / ||W + s B A|| times that, norms over the inputs.
B = 0 and M = 0 make the first forward exactly the base model's. The experts of a sparse layer are adapted one by one,
where a target names experts.gate_up_proj or experts.down_proj: A [E, r, in], B [E, out, r]. Read next: models/moe.py.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint import ADAPTER, ADAPTER_CONFIG, Made, load_weights, shapes_of, stored_tensors, whole_tensor
from models.decoder import Decoder
from models.errors import UserError
from models.files import atomic_folder, read_json_object, write_json
from models.moe import Experts, LowRankExperts
from models.parts import Linear
from models.sharded import copy_into, own_part

ALL_LINEAR = "all-linear"  # as peft's: no experts among them, which are parameters and no layers
PROJECTIONS = ("gate_up_proj", "down_proj")  # of experts, in the order in which peft wraps them
PEFT_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "lora_magnitude_vector"}
_norms = partial(torch.linalg.vector_norm, dim=1)  # ||W|| [out], over the inputs


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, apart from its values."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL_LINEAR,)  # ends of names of layers or of experts' parameters, or whole ones
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """s, by which B A is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, name: str) -> bool:
        """Whether a target means this layer, or these experts' parameter."""
        return any(_means(target, name) for target in self.targets)


def _means(target: str, name: str) -> bool:
    experts = _of_experts(name)
    if target == ALL_LINEAR:
        return not experts
    return _of_experts(target) == experts and f".{name}".endswith(f".{target}")


def _of_experts(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] == "experts"


class LowRank(nn.Module):
    """The update of one Linear: from y = x W^T (+ b), x [T, in], to the adapted y [T, out], in their dtype.

    M is the magnitude less the weight's own: 0 at first, as B is, whatever the weight.
    Dropout (in train mode, of torch's global generator) is of the low-rank path's input alone.
    """

    def __init__(self, weight: Tensor, adapter: Adapter) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        like = weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
        self.A = nn.Parameter(like.new_empty(adapter.rank, inputs))
        self.B = nn.Parameter(like.new_empty(outputs, adapter.rank))
        self.M = nn.Parameter(like.new_empty(outputs)) if adapter.dora else None
        self.scale, self.dropout = adapter.scale, adapter.dropout

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        # Added inside the second product: no pass of its own over the output. With B = 0 it is y, exactly.
        y = torch.addmm(y, F.dropout(x, self.dropout, self.training) @ a.T, b.T, alpha=self.scale)
        if self.M is None:
            return y
        stretch = _stretch(weight, a, b, self.M, self.scale)  # fp32: bf16 has no number between 1 and 1.0078
        # The bias is not stretched; in this form a stretch of 1 leaves y's bits as they are.
        return (y * stretch if bias is None else y * stretch + (1 - stretch) * bias).to(x.dtype)


def _stretch(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, scale: float) -> Tensor:
    """(||W|| + M) / ||W + s B A|| [out], in fp32 (fp64): exactly 1 at B = M = 0. The norms are constants (sec. 4.3)."""
    with torch.no_grad():
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(exact)
        norms, adapted = _norms(weight), _norms(torch.addmm(weight, b.to(exact), a.to(exact), alpha=scale))
    return (norms + m.to(exact)) / adapted


def _linears(model: Decoder) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"}


def _experts(model: Decoder) -> dict[str, tuple[Experts, str]]:
    """Every projection of experts by its published name: whose it is, and its name there."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    return {f"{name}.{kind}": (module, kind) for name, module in found.items() for kind in module.shapes}


def add_lora(model: Decoder, adapter: Adapter, *, seed: int) -> None:
    """Attach trainable low-rank updates to what the targets name ("all-linear": all Linears but the head).

    An empty model's have no values: start_lora, once it is filled.
    """
    linears, experts = _linears(model), _experts(model)
    kinds = sorted({_kind(name) for name in [*linears, *experts]})
    for target in adapter.targets:
        named = [name for name in [*linears, *experts] if _means(target, name)]
        if target != ALL_LINEAR and not named:
            near = difflib.get_close_matches(target, [ALL_LINEAR, *kinds], 1, 0.4)
            raise UserError(
                f"lora.targets: no linear layer is called {target!r}{f'; did you mean {near[0]!r}?' if near else ''}; "
                f"allowed are {ALL_LINEAR} or any of {', '.join(kinds)}"
            )
        for key, asked, none in (("dropout", adapter.dropout, "0"), ("dora", adapter.dora, "false")):
            if asked and named and _of_experts(named[0]):
                raise UserError(
                    f"lora.{key} = {asked}: updates of experts have none, as in peft; set it to {none}, or leave "
                    f"{target} out of lora.targets"
                )
    for name, linear in linears.items():
        if adapter.adapts(name):
            linear.lora = LowRank(linear.weight, adapter).train(model.training)
    like = model.head.weight.new_empty((), dtype=torch.promote_types(model.compute_dtype, torch.float32))
    for name, (module, kind) in experts.items():
        if adapter.adapts(name):
            count, outputs, inputs = module.shapes[kind]
            a, b = like.new_empty(count, adapter.rank, inputs), like.new_empty(count, outputs, adapter.rank)
            module.lora[kind] = LowRankExperts(a, b, adapter.scale)
    start_lora(model, seed)


def start_lora(model: nn.Module, seed: int) -> None:
    """Set all updates to their start, the same one however the model is cut: A drawn by the seed, B and M 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.is_meta or ".lora." not in name:
            continue
        if name.endswith(".A"):  # [..., r, in]: peft's kaiming_uniform(a=sqrt(5)) of the inputs
            bound = 1 / math.sqrt(parameter.shape[-1])
            drawn = torch.rand(*parameter.shape, generator=generator, dtype=torch.float64)
            copy_into(parameter, drawn * (2 * bound) - bound)
        else:
            own_part(parameter).values.zero_()


def _kind(name: str) -> str:
    """What is called alike in every layer."""
    return ".".join(name.split(".")[-2 if _of_experts(name) else -1 :])


def merged_weights(model: Decoder, tensors: Mapping[str, Tensor]) -> Made:
    """Published names and tensors with every update folded in, computed in fp32 (fp64 in fp64) when asked for.

    `tensors`: the model's full (unsharded) parameters by name, the updates' `...lora.A`, `.B` and `.M` among them.
    Packed experts come out unpacked where they have an update.
    """
    linears = {f"{name}.weight": linear for name, linear in _linears(model).items()}
    experts = {
        name: (module.shapes[kind], kind, update)
        for name, (module, kind) in _experts(model).items()
        if (update := module.update(kind)) is not None
    }
    gone = {f"{name}_{part}" for name in experts for part in ("blocks", "scales")}
    shapes = {name: shape for name, shape in shapes_of(tensors).items() if ".lora." not in name and name not in gone}
    shapes |= {name: shape for name, (shape, *_) in experts.items()}

    @torch.no_grad()
    def make(name: str) -> Tensor:
        linear = linears.get(name)
        if linear is not None and isinstance(linear.lora, LowRank):
            stem = name.removesuffix("weight")
            weight, a, b = (tensors[f"{stem}{part}"] for part in ("weight", "lora.A", "lora.B"))
            whole = weight.to(a.dtype) + linear.lora.scale * (b @ a)
            if linear.lora.M is not None:
                whole *= _stretch(weight, a, b, tensors[f"{stem}lora.M"], linear.lora.scale)[:, None]
            return whole
        if name not in experts:
            return tensors[name]
        _, kind, update = experts[name]
        a, b = (tensors[f"{name.removesuffix(kind)}lora.{kind}.{part}"] for part in "AB")
        return torch.baddbmm(whole_tensor(tensors, name).to(a.dtype), b, a, alpha=update.scale)

    return Made(shapes, make)


# --- as peft stores it ----------------------------------------------------------------------------------------------

READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "target_parameters"),
    *("use_rslora", "use_dora", "lora_dropout", "init_lora_weights"),
}
HARMLESS = {  # they say nothing of the arithmetic, or what the tensors' names say too
    *("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping", "inference_mode"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core", "qalora_group_size", "eva_config"),
}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of A and B; others (pissa, olora, ...) change the base weight

# Their experts are [E, in, out], which peft takes for [E, out, in]: its A is our B, turned, and its B our A.
TURNED = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")


def _to_peft(values: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Updates by our names -> by peft's, as it lays them out: experts' A is [E r, in], B [out, r E], E innermost.

    peft wraps the module once for each of its parameters: gate_up_proj's update stands inside down_proj's.
    """
    stored = {}
    for name, value in values.items():
        stem, _, part = name.rpartition(".lora.")
        kind, _, part = part.rpartition(".")
        if kind:
            if architecture in TURNED:
                part, value = {"A": "B", "B": "A"}[part], value.mT
            value = value.flatten(0, 1) if part == "A" else value.permute(1, 2, 0).flatten(1)
            stem += ".base_layer" * (kind == "gate_up_proj" and f"{stem}.lora.down_proj.A" in values)
        stored[f"base_model.model.{stem}.{PEFT_NAMES[part]}"] = value
    return stored


def read_adapter(folder: Path) -> Adapter:
    """What the peft adapter in `folder` is, dropout left out; UserError where it is not there or more than we compute.

    Its values are load_adapter's, which checks their names and shapes.
    """
    said = folder / ADAPTER_CONFIG
    if not said.is_file():
        raise UserError(f"{folder}: no adapter there; expected peft's {ADAPTER_CONFIG} and {ADAPTER}")
    fields = read_json_object(said)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{said}: peft_type = {fields.get('peft_type')!r}; only LORA adapters are read")
    wrong = {key: value for key, value in fields.items() if key not in READ | HARMLESS and value and value != "none"}
    if fields.get("init_lora_weights", True) not in STARTS:
        wrong["init_lora_weights"] = fields["init_lora_weights"]
    if wrong:
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in wrong.items())
        raise UserError(f"{said}: {told}: not supported; merge the adapter with peft, then set model.path")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{said}: r = {rank!r}, lora_alpha = {alpha!r}; both must be numbers above 0")
    stored = [name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in stored_tensors(folder)]
    named = fields.get("target_parameters")
    parameters = [str(name) for name in named] if isinstance(named, list) else []
    layers = {name for name in stored if name and not _inside_experts(name)}
    wrapped = {name.removesuffix(".base_layer") for name in stored if _inside_experts(name)}
    experts = {f"{name}.{kind}" for name in wrapped for kind in PROJECTIONS}
    experts = {name for name in experts if any(f".{name}".endswith(f".{target}") for target in parameters)}
    if not layers | experts:
        raise UserError(f"{folder / ADAPTER}: holds no tensor of a low-rank update (lora_A, lora_B)")
    targets = fields.get("target_modules")
    everywhere = not fields.get("layers_to_transform") and not fields.get("exclude_modules")
    if everywhere and isinstance(targets, list) and not any("." in str(target) for target in targets):
        layers = {_kind(name) for name in layers}
    if everywhere and not any(part.isdigit() for name in parameters for part in name.split(".")):
        experts = {_kind(name) for name in experts}
    dora, rslora = fields.get("use_dora") is True, fields.get("use_rslora") is True
    return Adapter(rank, float(alpha), tuple(sorted(layers | experts)), rslora, dora)


def _inside_experts(name: str) -> bool:
    return name.removesuffix(".base_layer").endswith(".experts")


@torch.no_grad()
def load_adapter(folder: Path, model: Decoder) -> None:
    """Copy a peft adapter's values into the updates that add_lora attached; names and shapes must match exactly."""
    parameters = {name: p for name, p in model.named_parameters() if ".lora." in name}
    places = {name: torch.arange(p.numel()).view(p.shape) for name, p in parameters.items()}
    order = _to_peft(places, model.config.architecture)  # by peft's names, which of our values stands where
    values = {
        name: torch.empty(place.shape, dtype=parameter.dtype)
        for (name, place), parameter in zip(order.items(), parameters.values(), strict=True)
    }
    load_weights(folder, values)
    for (name, parameter), place, value in zip(parameters.items(), order.values(), values.values(), strict=True):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        whole.view(-1)[place] = value
        copy_into(parameter, whole)
        if name.endswith(".M"):  # stored as a whole, and put together again to the same bits
            weight = own_part(model.get_parameter(name.replace(".lora.M", ".weight")))  # cut as M is
            own_part(parameter).values.sub_(_norms(weight.values.to(parameter.dtype)))


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    *,
    base: str,
    architecture: str = "",
    write: bool = True,
) -> None:
    """Write peft's adapter_model.safetensors and adapter_config.json from full parameters by name, atomically.

    Where several processes make the tensors together, all call and one writes.
    """
    values = {name: tensors[name] for name in tensors if ".lora." in name}
    for name in values:
        if name.endswith(".M"):
            values[name] = values[name] + _norms(tensors[name.replace(".lora.M", ".weight")].to(values[name].dtype))
    if not write:
        return
    parts = [name.rpartition(".lora.") for name in values]
    linears = {stem.rpartition(".")[2] for stem, _, part in parts if part in PEFT_NAMES}
    named = {experts: sorted(t for t in adapter.targets if _of_experts(t) == experts) for experts in (False, True)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "target_modules": sorted(linears) if ALL_LINEAR in adapter.targets else named[False],
        "target_parameters": named[True] or None,
    }
    try:
        with atomic_folder(folder) as temporary:
            stored = {name: tensor.contiguous().cpu() for name, tensor in _to_peft(values, architecture).items()}
            save_file(stored, temporary / ADAPTER, {"format": "pt"})
            write_json(temporary / ADAPTER_CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the adapter ({error}); nothing half-written is left") from error
