"""Runs a function in several processes, ranks of one gloo group."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo.distributed import Ranks, end_process, leave_ranks


def _enter(rank: int, world: int, folder: Path, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), rank=rank, world_size=world)
    ranks = Ranks(rank, world, torch.device("cpu"))
    torch.save(function(ranks, *arguments), folder / f"{rank}.pt")
    leave_ranks(ranks)
    os.environ["WORLD_SIZE"] = str(world)  # as torchrun says that there are others
    end_process(0)


def on_ranks(world: int, folder: Path, function: Callable[..., object], *arguments: object) -> list[object]:
    """What function(ranks, *arguments) returned on each; a fault in one ends all. `folder` is empty before."""
    folder.mkdir()
    mp.start_processes(_enter, (world, folder, function, arguments), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
