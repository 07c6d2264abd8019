"""LoRA: a trained low-rank update beside a frozen weight, stored as peft stores it.

Letters: `r` rank. y = x W^T + (alpha / r) * (x A^T) B^T, A [r, in] uniform as peft's (Kaiming, a = sqrt 5), B [out, r]
zero, both kept in fp32 (Hu et al. 2021, eq. 3). B = 0 makes the first forward exactly the base model's.
Read next: models/checkpoint.py.
"""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.decoder import Decoder, Linear
from models.errors import UserError
from models.files import atomic_folder

ALL_LINEAR = "all-linear"


class LowRank(nn.Module):
    """The update of one Linear: y + scale * (x A^T) B^T for x [T, in], y [T, out], in their dtype."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, generator: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        master = torch.promote_types(like.dtype, torch.float32)
        bound = 1 / math.sqrt(inputs)  # = kaiming_uniform(a=sqrt(5))
        values = torch.rand(rank, inputs, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        self.A = nn.Parameter(values.to(like.device, master))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=master, device=like.device))
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # Added inside the second product: no pass of its own over the output. With B = 0 it is y, exactly.
        return torch.addmm(y, x @ self.A.to(x.dtype).T, self.B.to(x.dtype).T, alpha=self.scale)


def _linears(model: Decoder) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"}


def add_lora(model: Decoder, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Attach trainable low-rank updates to the Linears that `targets` names ("all-linear": all but the head)."""
    linears = _linears(model)
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    for target in targets:
        if target != ALL_LINEAR and target not in kinds:
            near = difflib.get_close_matches(target, [ALL_LINEAR, *kinds], 1, 0.4)
            raise UserError(
                f"lora.targets: no linear layer is called {target!r}{f'; did you mean {near[0]!r}?' if near else ''}; "
                f"allowed are {ALL_LINEAR} or any of {', '.join(kinds)}"
            )
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if ALL_LINEAR in targets or name.rpartition(".")[2] in targets:
            outputs, inputs = linear.weight.shape
            linear.lora = LowRank(inputs, outputs, rank, alpha / rank, generator, linear.weight)


@torch.no_grad()
def merged_weights(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names and tensors with every update folded in, W + scale B A computed in fp32 (fp64 in fp64).

    `tensors`: the model's full (unsharded) parameters by name, the updates' `...lora.A` and `.B` among them.
    """
    merged = {name: tensor for name, tensor in tensors.items() if ".lora." not in name}
    for name, linear in _linears(model).items():
        if isinstance(linear.lora, LowRank):
            a, b = tensors[f"{name}.lora.A"], tensors[f"{name}.lora.B"]
            merged[f"{name}.weight"] = merged[f"{name}.weight"].to(a.dtype) + linear.lora.scale * (b @ a)
    return merged


def save_adapter(folder: Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, base: str) -> None:
    """Write peft's adapter_model.safetensors and adapter_config.json from full parameters by name, atomically."""
    adapter = {
        f"base_model.model.{name.replace('.lora.A', '.lora_A.weight').replace('.lora.B', '.lora_B.weight')}": tensor
        for name, tensor in tensors.items()
        if ".lora." in name
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter}),
    }
    try:
        with atomic_folder(folder) as temporary:
            save_file(
                {k: v.contiguous().cpu() for k, v in adapter.items()},
                temporary / "adapter_model.safetensors",
                {"format": "pt"},
            )
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the adapter ({error}); nothing half-written is left") from error
