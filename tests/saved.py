"""What a run's checkpoint holds, whole, by name, however many ranks wrote it."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
