"""LoRA: a trained low-rank update beside a frozen weight, read and written as peft stores it.

Letters: `r` rank. y = x W^T + s (x A^T) B^T, A [r, in] uniform as peft's (Kaiming, a = sqrt 5), B [out, r] zero, both
kept in fp32 (Hu et al. 2021, eq. 3); s = alpha / r, or alpha / sqrt r (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al.
2024, eq. 5) has a magnitude for each output: y = (||W|| + M) / ||W + s B A|| times that, norms over the inputs.
B = 0 and M = 0 make the first forward exactly the base model's. Read next: models/checkpoint.py.
"""

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint import ADAPTER, ADAPTER_CONFIG, load_weights, stored_tensors
from models.decoder import Decoder
from models.errors import UserError
from models.files import atomic_folder, read_json_object, write_json
from models.parts import Linear

ALL_LINEAR = "all-linear"
PEFT_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, apart from its values."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL_LINEAR,)  # ends of layer names, or whole ones
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """s, by which B A is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nn.Module):
    """The update of one Linear: from y = x W^T (+ b), x [T, in], to the adapted y [T, out], in their dtype.

    M is the magnitude less the weight's own: small, so that FSDP's bf16 copy of it loses nothing that matters.
    Dropout (in train mode, of torch's global generator) is of the low-rank path's input alone.
    """

    def __init__(self, weight: Tensor, adapter: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        master = torch.promote_types(weight.dtype, torch.float32)
        bound = 1 / math.sqrt(inputs)  # = kaiming_uniform(a=sqrt(5))
        values = torch.rand(adapter.rank, inputs, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        self.A = nn.Parameter(values.to(weight.device, master))
        self.B = nn.Parameter(torch.zeros(outputs, adapter.rank, dtype=master, device=weight.device))
        self.M = nn.Parameter(torch.zeros(outputs, dtype=master, device=weight.device)) if adapter.dora else None
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


def _norms(weight: Tensor) -> Tensor:
    """||W|| over the inputs [out]."""
    return torch.linalg.vector_norm(weight, dim=1)


def _stretch(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, scale: float) -> Tensor:
    """(||W|| + M) / ||W + s B A|| [out], in fp32 (fp64): exactly 1 at B = M = 0. The norms are constants (sec. 4.3)."""
    with torch.no_grad():
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(exact)
        norms, adapted = _norms(weight), _norms(torch.addmm(weight, b.to(exact), a.to(exact), alpha=scale))
    return (norms + m.to(exact)) / adapted


def _linears(model: Decoder) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"}


def add_lora(model: Decoder, adapter: Adapter, *, seed: int) -> None:
    """Attach trainable low-rank updates to the Linears that the targets name ("all-linear": all but the head)."""
    linears = _linears(model)
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    for target in adapter.targets:
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in linears):
            near = difflib.get_close_matches(target, [ALL_LINEAR, *kinds], 1, 0.4)
            raise UserError(
                f"lora.targets: no linear layer is called {target!r}{f'; did you mean {near[0]!r}?' if near else ''}; "
                f"allowed are {ALL_LINEAR} or any of {', '.join(kinds)}"
            )
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if ALL_LINEAR in adapter.targets or any(f".{name}".endswith(f".{target}") for target in adapter.targets):
            linear.lora = LowRank(linear.weight, adapter, generator).train(model.training)


@torch.no_grad()
def merged_weights(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names and tensors with every update folded in, computed in fp32 (fp64 in fp64).

    `tensors`: the model's full (unsharded) parameters by name, the updates' `...lora.A`, `.B` and `.M` among them.
    """
    merged = {name: tensor for name, tensor in tensors.items() if ".lora." not in name}
    for name, linear in _linears(model).items():
        if isinstance(linear.lora, LowRank):
            weight, a, b = (tensors[f"{name}.{part}"] for part in ("weight", "lora.A", "lora.B"))
            whole = weight.to(a.dtype) + linear.lora.scale * (b @ a)
            if linear.lora.M is not None:
                whole *= _stretch(weight, a, b, tensors[f"{name}.lora.M"], linear.lora.scale)[:, None]
            merged[f"{name}.weight"] = whole
    return merged


# --- as peft stores it ----------------------------------------------------------------------------------------------

READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"}
HARMLESS = {  # they say nothing of the arithmetic, or what the tensors' names say too
    *("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping", "inference_mode"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core", "qalora_group_size", "eva_config"),
}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of A and B; others (pissa, olora, ...) change the base weight


def _peft_name(name: str) -> str:
    stem, _, part = name.rpartition(".lora.")
    return f"base_model.model.{stem}.{PEFT_NAMES[part]}"


def read_adapter(folder: Path) -> Adapter:
    """What the peft adapter in `folder` is, dropout left out; UserError where it is not there or more than we compute.

    Its values are load_adapter's, which checks their names and shapes.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: no adapter there; expected peft's {ADAPTER_CONFIG} and {ADAPTER}")
    fields = read_json_object(folder / ADAPTER_CONFIG)
    if fields.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: peft_type = {fields.get('peft_type')!r}; only LORA adapters are read"
        )
    wrong = {key: value for key, value in fields.items() if key not in READ | HARMLESS and value and value != "none"}
    if fields.get("init_lora_weights", True) not in STARTS:
        wrong["init_lora_weights"] = fields["init_lora_weights"]
    if wrong:
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in wrong.items())
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: {told}: not supported; merge the adapter with peft, then set model.path"
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: r = {rank!r}, lora_alpha = {alpha!r}; both must be numbers above 0"
        )
    stored = [name.rpartition(".lora_")[0] for name in stored_tensors(folder)]
    layers = {name.removeprefix("base_model.model.") for name in stored if name}
    if not layers:
        raise UserError(f"{folder / ADAPTER}: holds no tensor of a low-rank update (lora_A, lora_B)")
    targets = fields.get("target_modules")
    everywhere = isinstance(targets, list) and not any("." in str(target) for target in targets)
    if everywhere and not fields.get("layers_to_transform") and not fields.get("exclude_modules"):
        layers = {name.rpartition(".")[2] for name in layers}
    dora, rslora = fields.get("use_dora") is True, fields.get("use_rslora") is True
    return Adapter(rank, float(alpha), tuple(sorted(layers)), rslora, dora)


@torch.no_grad()
def load_adapter(folder: Path, model: Decoder) -> None:
    """Copy a peft adapter's values into the updates that add_lora attached; names and shapes must match exactly."""
    parameters = {name: p for name, p in model.named_parameters() if ".lora." in name}
    values = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
    load_weights(folder, {_peft_name(name): value for name, value in values.items()})
    for name, parameter in parameters.items():
        if name.endswith(".M"):  # stored as a whole, and put together again to the same bits
            weight = model.get_parameter(name.replace(".lora.M", ".weight"))
            values[name] -= _norms(weight.to(parameter.dtype))
        parameter.copy_(values[name])


def save_adapter(folder: Path, tensors: dict[str, Tensor], adapter: Adapter, *, base: str) -> None:
    """Write peft's adapter_model.safetensors and adapter_config.json from full parameters by name, atomically."""
    values = {name: tensor for name, tensor in tensors.items() if ".lora." in name}
    for name in values:
        if name.endswith(".M"):
            values[name] = values[name] + _norms(tensors[name.replace(".lora.M", ".weight")].to(values[name].dtype))
    kinds = {name.rpartition(".lora.")[0].rpartition(".")[2] for name in values}
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
        "target_modules": sorted(kinds if ALL_LINEAR in adapter.targets else adapter.targets),
    }
    try:
        with atomic_folder(folder) as temporary:
            stored = {_peft_name(name): tensor.contiguous().cpu() for name, tensor in values.items()}
            save_file(stored, temporary / ADAPTER, {"format": "pt"})
            write_json(temporary / ADAPTER_CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the adapter ({error}); nothing half-written is left") from error
