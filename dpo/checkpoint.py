"""What a run keeps of its weights: resumable checkpoints, the best weights so far, and the export others can open.

A checkpoint is a folder of safetensors shards (torch.distributed.checkpoint's: each rank writes what it holds, any
number of ranks reads them), one JSON file and their SHA-256, written beside its place and renamed into it: the last
good one stays whole whatever happens. Data order needs no state, it follows from seed and step.
Read next: models/checkpoint.py, models/lora.py.
"""

import hashlib
import json
import shutil
import warnings
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dpo.adamw import AdamW
from dpo.config import Config
from dpo.distributed import Ranks, broadcast_first, full_parameters, gather, own_share
from dpo.policy import adapter_of
from models.checkpoint import save_folder
from models.decoder import Decoder
from models.errors import UserError
from models.files import atomic_folder, file_digest, read_json_object, read_text
from models.lora import LowRank, merged_weights, save_adapter
from models.moe import LowRankExperts
from models.sharded import full_tensor

STATE, SUMS = "state.json", "SHA256SUMS"  # `sha256sum -c` reads the latter
FILE_BYTES = 2**26  # of a rank's shards at least, about: torch holds one three times while it writes
FILES = 64  # of a rank at most, about


def trained_parameters(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_digest(model: Decoder, base: str) -> str:
    """32 hex digits of the trained parameters, adapters' scales and the `base` weights' fingerprint; of every rank."""
    scales = [module.scale for module in model.modules() if isinstance(module, LowRank | LowRankExperts)]
    digest = hashlib.sha256(f"{base} {scales}".encode())
    for name, parameter in trained_parameters(model).items():
        digest.update(name.encode())
        digest.update(full_tensor(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _line(path: Path) -> str:
    return f"{file_digest(path)}  {path.name}\n"


def save(folder: Path, model: Decoder, state: dict[str, object], ranks: Ranks, optimizer: AdamW | None = None) -> None:
    """The trained parameters, an optimizer's moments, and a few words of state; every rank must call."""
    from torch.distributed import checkpoint as dcp  # a second: now, not at every start

    parameters = trained_parameters(model)
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter] if optimizer else {}
        tensors |= {f"{name}|{key}": value for key, value in moments.items()}
    ends = list(accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    size = max(FILE_BYTES * ranks.world, ends[-1] // FILES)
    files = {name: 1 + end // size for name, end in zip(tensors, ends, strict=True)}
    try:
        with atomic_folder(folder) if ranks.first else nullcontext(folder) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # that one process is enough
            place = broadcast_first(temporary, ranks)
            writer = dcp.HuggingFaceStorageWriter(str(place), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.world == 1)
            sums = gather([_line(path) for path in sorted(place.glob(f"shard-{ranks.rank + 1:05d}-*"))], ranks)
            if ranks.first:
                (place / STATE).write_text(json.dumps(state, indent=2) + "\n")
                (place / SUMS).write_text("".join([*sums, _line(place / STATE)]))
    except (dcp.CheckpointException, OSError) as error:
        failure = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        if not isinstance(failure, Exception):  # a second Ctrl-C
            raise failure from None
        raise UserError(
            f"checkpoint {folder}: cannot write {ends[-1] / 2**20:.1f} MiB ({failure}); earlier checkpoints are whole. "
            f"Free space ({shutil.disk_usage(folder.parent).free / 2**20:.1f} MiB left), then run.resume=latest goes on"
        ) from failure


def _damaged(folder: Path, line: str) -> str:
    """What is wrong with the file that a line of SUMS names, if anything."""
    name = line[66:].removesuffix("\n")
    try:
        return "" if name and _line(folder / name) == line else f"{name or SUMS} is not what was written"
    except OSError as error:
        return str(error)


@torch.no_grad()
def load(folder: Path, model: Decoder, ranks: Ranks, optimizer: AdamW | None = None) -> dict[str, object]:
    """Put saved parameters, and an optimizer's moments, back, bit for bit; the state saved with them.

    Every rank must call; the number of ranks need not be that which saved.
    """
    from torch.distributed import checkpoint as dcp

    lines = read_text(folder / SUMS).splitlines(keepends=True)
    damages = [damage for line in own_share(lines, ranks) if (damage := _damaged(folder, line))]
    damages += [] if any(line.endswith(f"  {STATE}\n") for line in lines) else [f"{SUMS} is not what was written"]
    if damages := gather(damages, ranks):
        raise UserError(f"{folder}: damaged: {damages[0]}; remove the folder, and resume from what was saved before it")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    saved = {name: entry for name, entry in entries if isinstance(entry, dcp.TensorStorageMetadata)}
    parameters = trained_parameters(model)
    shapes = {name: entry.size for name, entry in saved.items() if "|" not in name}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise UserError(f"{folder}: these are not the tensors that this model trains; give it its own base")
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, entry in saved.items():
        owner, bar, key = name.partition("|")
        if optimizer and bar:  # a moment, laid out as its parameter is, or a count of steps
            like = parameters[owner]
            scalar = torch.empty(entry.size, dtype=entry.properties.dtype, device=like.device)
            tensors[name] = optimizer.state[like][key] = torch.empty_like(like) if entry.size == like.shape else scalar
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.load(tensors, storage_reader=reader, no_dist=ranks.world == 1)
    return read_json_object(folder / STATE)


def save_checkpoint(
    folder: Path, model: Decoder, optimizer: AdamW, state: dict[str, object], ranks: Ranks, keep: int
) -> None:
    """A resumable checkpoint `folder/step-N` (N = state["step"]); the oldest beyond `keep` go. Every rank must call."""
    save(folder / f"step-{state['step']:06d}", model, state, ranks, optimizer)
    for old in _steps(folder)[:-keep] if ranks.first else ():
        shutil.rmtree(old)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints, oldest first; a copy that somebody made, `step-000002-backup`, is none."""
    named = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, if any."""
    return next((path for path in reversed(_steps(folder)) if (path / STATE).is_file()), None)


def export(folder: Path, model: Decoder, source: Path, config: Config, ranks: Ranks) -> None:
    """Write what others open: `model/` (a Hugging Face folder, updates merged) and, for LoRA, peft's `adapter/`.

    Weights are written in the dtype of `source`'s config. Every rank must call; each writes its own files of the model.
    """
    tensors = full_parameters(model)
    if config.lora.rank:
        adapter, architecture = adapter_of(config.lora), model.config.architecture
        place = folder / "adapter"
        save_adapter(place, tensors, adapter, base=str(source), architecture=architecture, write=ranks.first)
    save_folder(
        folder / "model",
        merged_weights(model, tensors),
        source,
        dtype=getattr(torch, model.config.dtype),
        rank=ranks.rank,
        world=ranks.world,
        of_first=lambda place: broadcast_first(place, ranks),
    )
