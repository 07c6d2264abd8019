"""Model folders: which file holds which tensor, streaming load, fingerprint, save. safetensors only, nothing unpickled.

Parameter names are the published ones; where files hold a tensor otherwise, models/layouts.py says how.
Read next: models/layouts.py, models/decoder.py (the parameters), dpo/checkpoint.py (who saves).
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels import dequantise
from models.errors import UserError
from models.families import FAMILIES, llama4, read_model_config
from models.files import atomic_folder, file_digest, read_json_object, write_json
from models.layouts import IGNORED, Layout, Piece, plain
from models.sharded import Part, own_part

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's, in a folder of their own
# Copied from the source folder beside new weights (patterns): what a tokenizer, a template and a licence need.
COPIED = ("*token*", "vocab.*", "merges.txt", "chat_template.*", "generation_config.json", "LICENSE*", "NOTICE*")
STEP_VALUES = 2**24  # read at a time, or one expert
FLOATS = ("BF16", "F16", "F32", "F64")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors: model.safetensors (or an adapter's), or else the shards that its index names."""
    found = next((name for name in (SINGLE, INDEX, ADAPTER) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{folder}: no weights there; expected {SINGLE}, or {INDEX} and the shards that it names "
            "(pickled files such as pytorch_model.bin are never opened: convert them to safetensors)"
        )
    if found != INDEX:
        return [folder / found]
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map is missing or no map from tensor names to shard files")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{folder}: shard missing that {INDEX} names: {_listed(missing)}; fetch the model again")
    return files


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    shape: tuple[int, ...]
    kind: str  # safetensors' word: F32, BF16, U8, ...


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, by name. The library checks each header against its file's length."""
    stored = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    entry = handle.get_slice(name)
                    stored[name] = Stored(path, tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated, or no safetensors file ({error}); fetch the file again") from error
    return stored


def load_weights(folder: Path, parameters: Mapping[str, torch.Tensor], layout: Layout = plain) -> int:
    """Copy the folder's weights into `parameters`, cast to each one's dtype; names and shapes must match exactly.

    Of a parameter that is cut over ranks only this one's part is read. Returns the bytes read.
    All checks come before the first copy. A stored lm_head.weight is ignored where the model has none (tied), as is
    all else in IGNORED. Never more than a part of one stored tensor is held beside the parameters.
    """
    stored = stored_tensors(folder)
    pieces = {name: layout(name, parameter.shape, stored) for name, parameter in parameters.items()}
    wanted = {
        name: (shape, FLOATS if parameters[owner].is_floating_point() and len(piece.stored) == 1 else ("U8",))
        for owner, its_pieces in pieces.items()
        for piece in its_pieces
        for name, shape in piece.stored.items()
    }
    faults = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted and not IGNORED.fullmatch(name)],
        "wrong shape": [
            f"{name} is {list(stored[name].shape)}, the config asks for {list(shape)}"
            for name, (shape, _) in wanted.items()
            if name in stored and stored[name].shape != shape
        ],
        "wrong type": [
            f"{name} is {stored[name].kind}, read are {', '.join(kinds)}"
            for name, (_, kinds) in wanted.items()
            if name in stored and stored[name].kind not in kinds
        ],
    }
    if any(faults.values()):
        named = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{folder}: the weights do not fit the model's config.json; {named}")
    parts = {name: own_part(parameter) for name, parameter in parameters.items()}
    return sum(_read(piece, stored, parts[name]) for name, its_pieces in pieces.items() for piece in its_pieces)


def _read(piece: Piece, stored: Mapping[str, Stored], part: Part) -> int:
    """Fill what `part` has of the piece; the bytes read."""
    inside, index = [], []  # where that is, in the part and in the piece
    for i, own in enumerate(part.place):
        place = piece.place[i] if i < len(piece.place) else slice(0, own.stop)
        first, end = (place, place + 1) if isinstance(place, int) else (place.start, place.stop)
        both = range(max(first, own.start), min(end, own.stop))
        if not both:
            return 0
        inside.append(slice(both.start - own.start, both.stop - own.start))
        if not isinstance(place, int):
            index.append(slice(both.start - first, both.stop - first))
    target = part.values[tuple(inside)].view([one.stop - one.start for one in index])
    step, read = max(1, STEP_VALUES * len(target) // target.numel()), 0
    for begin in range(0, len(target), step):
        rows = slice(index[0].start + begin, min(index[0].start + begin + step, index[0].stop))
        parts = []
        for name in piece.stored:
            # Opened for this part alone: mapped pages count as our memory as long as a file is open.
            with safe_open(stored[name].path, framework="pt") as handle:
                parts.append(handle.get_slice(name)[piece.where((rows, *index[1:]))])
        target[begin : begin + step].copy_(piece.decode(*parts))
        read += sum(one.nbytes for one in parts)
    return read


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
        known[key] = file_digest(path)
        # A file this young could change again within one tick of its clock and look the same: hash it again next time.
        if memo and time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            write_json(memo, known)
    return str(known[key])


@dataclass(frozen=True)
class Made(Mapping[str, torch.Tensor]):
    """Tensors by name, each made anew when it is asked for, so that few are held at once; shapes are at hand."""

    shapes: Mapping[str, Sequence[int]]
    make: Callable[[str], torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Sequence[int]]:
    """Their shapes by name; none of Made is made for it."""
    return tensors.shapes if isinstance(tensors, Made) else {name: tensor.shape for name, tensor in tensors.items()}


def save_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    source_folder: Path,
    *,
    dtype: torch.dtype,
    rank: int = 0,
    world: int = 1,
    of_first: Callable[[Path], Path] = lambda place: place,
) -> None:
    """Write a Hugging Face model folder, whole or not at all: weights in `dtype`, the rest from `source_folder`.

    Never quantised, and of a Llama 4 with pictures the text model alone, as Llama4ForCausalLM.
    An older folder at `folder` is replaced once the new one is complete.
    Several processes write it together, each its own files: `of_first(place)` is the first one's place, once all ask.
    """
    fields = read_json_object(source_folder / "config.json")
    if "text_config" in fields:
        fields = llama4.text_fields(fields, source_folder / "config.json")
    spelling = "dtype" if "dtype" in fields else "torch_dtype"  # the older one is read by every version
    fields = {key: value for key, value in fields.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    try:
        with atomic_folder(folder) if rank == 0 else nullcontext(folder) as temporary:
            if rank == 0:
                write_json(temporary / "config.json", fields | {spelling: str(dtype).removeprefix("torch.")})
                for path in (path for pattern in COPIED for path in source_folder.glob(pattern)):
                    shutil.copyfile(path, temporary / path.name)
            place = of_first(temporary)
            write_weights(place, tensors, dtype, rank=rank, world=world)
            of_first(place)  # all have written
    except (OSError, SafetensorError) as error:
        needed = sum(map(math.prod, shapes_of(tensors).values())) * dtype.itemsize
        raise UserError(
            f"{folder}: cannot write the model ({error}); it needs at least {needed} bytes: free space. "
            "Nothing half-written is left, and what stood there before is whole"
        ) from error


def whole_tensor(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter by its name, unpacked if its MXFP4 blocks and scales stand there instead."""
    if name in tensors:
        return tensors[name].detach()
    return dequantise(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write model.safetensors beside config.json, as the family is published, in `dtype`.

    Beyond `max_shard_bytes`: shards with their index. Experts that are packed in memory are unpacked.
    Of `world` processes each writes every world-th file and holds one at a time; all ask `tensors` in the same order.
    """
    layout = FAMILIES[read_model_config(folder).architecture].layout
    shapes: dict[str, Sequence[int]] = {}
    for name, shape in shapes_of(tensors).items():
        if name.endswith("_blocks"):
            shapes[name.removesuffix("_blocks")] = (*shape[:-2], 32 * shape[-2])
        elif not name.endswith("_scales"):
            shapes[name] = shape
    pieces = {
        stored: (name, piece)
        for name, shape in shapes.items()
        for piece in layout(name, shape, ())
        for stored in piece.stored
    }
    sizes = {name: math.prod(piece.stored[name]) * dtype.itemsize for name, (_, piece) in pieces.items()}
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    held, whole = "", torch.empty(0)
    for begin in range(0, len(shards), world):
        shard = {}
        for number, names in enumerate(shards[begin : begin + world]):
            for name in names:
                owner, piece = pieces[name]
                if owner != held:
                    held, whole = owner, whole_tensor(tensors, owner)
                if number == rank:
                    shard[name] = piece.decode(whole[piece.place]).to("cpu", dtype).contiguous()
        if shard:
            file = folder / files[begin + rank]
            save_file(shard, file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", file)  # the library makes it readable to the owner alone
    if len(shards) > 1 and rank == 0:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
