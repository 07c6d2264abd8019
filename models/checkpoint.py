"""Model folders: which file holds which tensor, streaming load, fingerprint, save. safetensors only, nothing unpickled.

Parameter names are the published ones, so nothing is converted: a stored name is a parameter's name.
Read next: models/decoder.py (the parameters), dpo/checkpoint.py (who saves).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import UserError
from models.families import read_model_config
from models.files import atomic_folder, atomic_write_text, read_json_object, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's, in a folder of their own
# Copied from the source folder beside new weights (patterns): what a tokenizer, a template and a licence need.
COPIED = ("*token*", "vocab.*", "merges.txt", "chat_template.*", "generation_config.json", "LICENSE*", "NOTICE*")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors: model.safetensors (or an adapter's), or else the shards that its index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / ADAPTER).is_file() and not (folder / INDEX).is_file():
        return [folder / ADAPTER]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder}: no weights there; expected {SINGLE}, or {INDEX} and the shards that it names "
            "(pickled files such as pytorch_model.bin are never opened: convert them to safetensors)"
        )
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map is missing or no map from tensor names to shard files")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{folder}: shard missing that {INDEX} names: {_listed(missing)}; fetch the model again")
    return files


def stored_tensors(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of every tensor, by name. The library checks each header against its file's length."""
    stored = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as handle:
                stored.update({name: (path, handle.get_slice(name).get_shape()) for name in handle.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated, or no safetensors file ({error}); fetch the file again") from error
    return stored


def load_weights(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy the folder's weights into `parameters`, cast to each one's dtype; names and shapes must match exactly.

    All checks come before the first copy. A stored lm_head.weight is ignored where the model has none (tied), as are
    old files' rotary tables. Never more than one stored tensor is held beside the parameters.
    """
    stored = stored_tensors(folder)
    ignored = {name for name in stored if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")}
    faults = {
        "missing": [name for name in parameters if name not in stored],
        "unexpected": [name for name in stored if name not in parameters.keys() | ignored],
        "wrong shape": [
            f"{name} is {stored[name][1]}, the config asks for {list(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in stored and stored[name][1] != list(parameter.shape)
        ],
    }
    if any(faults.values()):
        named = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{folder}: the weights do not fit the model's config.json; {named}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            # Opened for this tensor alone: mapped pages count as our memory as long as a file is open.
            with safe_open(stored[name][0], framework="pt") as handle:
                parameter.copy_(handle.get_tensor(name))


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def weights_fingerprint(folder: Path, memo: Path | None = None, adapter: Path | None = None) -> str:
    """32 hex digits: the weight files' bytes and names, and the config values that the forward reads.

    `adapter`: a peft folder whose updates are part of the weights.
    `memo`: a JSON file that keeps each file's digest by path, size and mtime, so that 200 GB are hashed once.
    """
    config = asdict(read_model_config(folder)) | {"dtype": None}  # how it is stored is not how it is computed
    files = weight_files(folder) + ([] if adapter is None else [adapter / ADAPTER, adapter / ADAPTER_CONFIG])
    digests = [[path.name, _digest(path.resolve(), memo)] for path in files]
    return hashlib.sha256(json.dumps([config, digests], sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path, memo: Path | None) -> str:
    known = read_json_object(memo) if memo and memo.is_file() else {}
    stat = path.stat()
    key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
    if key not in known:
        with open(path, "rb") as handle:
            known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
        # A file this young could change again within one tick of its clock and look the same: hash it again next time.
        if memo and time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            atomic_write_text(memo, json.dumps(known, indent=1))
    return str(known[key])


def save_folder(folder: Path, tensors: Mapping[str, torch.Tensor], source_folder: Path, *, dtype: torch.dtype) -> None:
    """Write a Hugging Face model folder, whole or not at all: weights in `dtype`, the rest from `source_folder`.

    An older folder at `folder` is replaced once the new one is complete.
    """
    fields = read_json_object(source_folder / "config.json")
    spelling = "dtype" if "dtype" in fields else "torch_dtype"  # the older one is read by every version
    try:
        with atomic_folder(folder) as temporary:
            write_json(temporary / "config.json", fields | {spelling: str(dtype).removeprefix("torch.")})
            for path in (path for pattern in COPIED for path in source_folder.glob(pattern)):
                shutil.copyfile(path, temporary / path.name)
            write_weights(temporary, tensors, dtype)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        raise UserError(
            f"{folder}: cannot write the model ({error}); it needs at least {needed} bytes: free space. "
            "Nothing half-written is left, and what stood there before is whole"
        ) from error


def write_weights(
    folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write model.safetensors beside config.json; beyond `max_shard_bytes`, shards with their index. In `dtype`."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # the library makes it readable to the owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
