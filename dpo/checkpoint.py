"""What a run keeps of its weights: resumable checkpoints, the best weights so far, and the export others can open.

A checkpoint is a folder of safetensors and one JSON file, written beside its place and renamed into it: the last good
one stays whole whatever happens. Data order needs no state, it follows from seed and step.
Read next: models/checkpoint.py, models/lora.py.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.adamw import AdamW
from dpo.config import Config
from dpo.distributed import Ranks, full_parameters
from dpo.policy import adapter_of
from models.checkpoint import save_folder
from models.decoder import Decoder
from models.errors import UserError
from models.files import atomic_folder, read_json_object
from models.lora import merged_weights, save_adapter
from models.sharded import copy_into, full_tensor

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def trained_parameters(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_digest(model: Decoder, base: str) -> str:
    """32 hex digits of the trained parameters and of the `base` weights' fingerprint; every rank must call."""
    digest = hashlib.sha256(base.encode())
    for name, parameter in trained_parameters(model).items():
        digest.update(name.encode())
        digest.update(full_tensor(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(folder: Path, files: Mapping[str, dict[str, Tensor]], state: dict[str, object]) -> None:
    try:
        with atomic_folder(folder) as temporary:
            for name, tensors in files.items():
                save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary / name)
            (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
    except Exception as error:  # safetensors reports a full disk as its own exception type
        needed = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
        raise UserError(
            f"checkpoint {folder}: cannot write {needed / 2**20:.1f} MiB ({error}); earlier checkpoints are whole. "
            f"Free space ({shutil.disk_usage(folder.parent).free / 2**20:.1f} MiB left), then run.resume=latest goes on"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove {path.parent} and resume from what was saved before it"
        ) from error


def save_weights(folder: Path, model: Decoder, state: dict[str, object], ranks: Ranks) -> None:
    """The trained parameters whole, with a few words of state; every rank must call, the first writes."""
    tensors = {name: full_tensor(p.detach()) for name, p in trained_parameters(model).items()}
    if ranks.first:
        _write(folder, {WEIGHTS: tensors}, state)


@torch.no_grad()
def load_weights_into(folder: Path, model: Decoder) -> dict[str, object]:
    """Put saved trained parameters back, bit for bit; the state saved with them."""
    tensors, parameters = _read(folder / WEIGHTS), trained_parameters(model)
    if {name: value.shape for name, value in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{folder / WEIGHTS}: these are not the tensors that this model trains; give it its own base")
    for name, parameter in parameters.items():
        copy_into(parameter, tensors[name])
    return read_json_object(folder / STATE)


def save_checkpoint(
    folder: Path, model: Decoder, optimizer: AdamW, state: dict[str, object], ranks: Ranks, keep: int
) -> None:
    """A resumable checkpoint `folder/step-N` (N = state["step"]): weights, optimizer moments, state; the oldest go."""
    weights = {name: full_tensor(p.detach()) for name, p in trained_parameters(model).items()}
    moments = {
        f"{name}|{key}": full_tensor(value)
        for name, p in trained_parameters(model).items()
        for key, value in optimizer.state[p].items()
    }
    if ranks.first:
        _write(folder / f"step-{state['step']:06d}", {WEIGHTS: weights, OPTIMIZER: moments}, state)
        for old in sorted(folder.glob("step-*"), key=_step_of)[:-keep]:
            shutil.rmtree(old)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, if any."""
    whole = [path for path in folder.glob("step-*") if (path / STATE).is_file()]
    return max(whole, key=_step_of, default=None)


@torch.no_grad()
def load_checkpoint(folder: Path, model: Decoder, optimizer: AdamW) -> dict[str, object]:
    """Put weights and optimizer moments back, bit for bit; the state saved with them."""
    state = load_weights_into(folder, model)
    moments = _read(folder / OPTIMIZER)
    for name, parameter in trained_parameters(model).items():
        slot = optimizer.state[parameter]
        for full_name, value in moments.items():
            owner, _, key = full_name.partition("|")
            if owner == name:
                # Scalars (AdamW's step) are kept as they are; moments are laid out as their parameter is.
                slot[key] = torch.empty_like(parameter) if value.shape == parameter.shape else value
                if value.shape == parameter.shape:
                    copy_into(slot[key], value)
    return state


def export(folder: Path, model: Decoder, source: Path, config: Config, ranks: Ranks) -> None:
    """Write what others open: `model/` (a Hugging Face folder, updates merged) and, for LoRA, peft's `adapter/`.

    Weights are written in the dtype of `source`'s config. Every rank must call, the first writes.
    """
    tensors = full_parameters(model)
    if not ranks.first:
        return
    if config.lora.rank:
        adapter, architecture = adapter_of(config.lora), model.config.architecture
        save_adapter(folder / "adapter", tensors, adapter, base=str(source), architecture=architecture)
    dtype = getattr(torch, model.config.dtype)
    save_folder(folder / "model", merged_weights(model, tensors), source, dtype=dtype)
