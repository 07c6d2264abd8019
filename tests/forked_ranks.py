"""Checkpoints and exports by several ranks, forked from one process which has imported everything: the work of
tests/test_reshard.py.

python tests/forked_ranks.py FOLDER MODEL SETTING...
"""

import math
import resource
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.multiprocessing as mp

import models.checkpoint
from dpo.adamw import AdamW
from dpo.checkpoint import export, load, save, trained_parameters
from dpo.config import Config
from dpo.distributed import Ranks, clip_gradients
from dpo.policy import load_policy
from dpo.settings import load_config
from models.decoder import Decoder
from models.errors import UserError

Part = Callable[[Ranks, Decoder, AdamW, Path, Config], None]


def saves(name: str) -> Part:
    """Two steps along random gradients, then a checkpoint."""

    def part(ranks: Ranks, model: Decoder, optimizer: AdamW, folder: Path, config: Config) -> None:
        torch.manual_seed(ranks.rank)
        for _ in range(2):
            for parameter in trained_parameters(model).values():
                parameter.grad = torch.zeros_like(parameter)
                own = parameter.grad if ranks.world == 1 else parameter.grad.to_local()  # type: ignore[attr-defined]
                own.normal_()
            optimizer.step(1e-2)
        save(folder / name, model, {"step": 2}, ranks, optimizer)

    return part


def goes_on(before: str, name: str) -> Part:
    """What another number of ranks saved is loaded, saved again, and exported."""

    def part(ranks: Ranks, model: Decoder, optimizer: AdamW, folder: Path, config: Config) -> None:
        assert load(folder / before, model, ranks, optimizer) == {"step": 2}
        save(folder / name, model, {"step": 2}, ranks, optimizer)
        export(folder / f"{name}-export", model, Path(config.model.path), config, ranks)

    return part


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def fails(ranks: Ranks, model: Decoder, optimizer: AdamW, folder: Path, config: Config) -> None:
    """A byte flipped, a disk full at the last rank, a NaN there: all stop, and what was there is whole."""
    last = ranks.rank == ranks.world - 1
    assert "shard-00001" in refused(lambda: load(folder / "flipped", model, ranks, optimizer))
    parameters = list(trained_parameters(model).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    local = parameters[0].grad.to_local()  # type: ignore[union-attr]
    local.view(-1)[:1] = math.nan if last else 1.0
    assert not math.isfinite(clip_gradients(parameters, 1.0, ranks))
    if last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
    said = refused(lambda: save(folder / "two", model, {"step": 3}, ranks))
    assert "cannot write" in said and "File too large" in said


def one_rank(rank: int, world: int, part: Part, folder: Path, argv: list[str]) -> None:
    meeting = f"file://{folder / 'meeting'}"
    if world > 1:
        dist.init_process_group("gloo", meeting, timedelta(seconds=60), rank=rank, world_size=world)
    config, ranks = load_config(argv), Ranks(rank, world, torch.device("cpu"))
    model = load_policy(config, Path(config.model.path), torch.float32, ranks)
    part(ranks, model, AdamW(list(trained_parameters(model).values()), config.train), folder, config)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    place, argv = Path(sys.argv[1]), ["exp=smoke", f"model.path={sys.argv[2]}", *sys.argv[3:]]
    write, least = models.checkpoint.write_weights, 30_000  # bytes: several files of a tiny model
    models.checkpoint.write_weights = lambda *given, **named: write(*given, **named, max_shard_bytes=least)
    parts = [(4, saves("four")), (2, goes_on("four", "two")), (1, goes_on("two", "one")), (4, goes_on("one", "again"))]
    for world, part in [*parts, (2, fails)]:
        if part is fails:
            shutil.copytree(place / "two", place / "flipped")
            shard = next((place / "flipped").glob("shard-00001-*"))
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        (place / "meeting").unlink(missing_ok=True)
        mp.start_processes(one_rank, (world, part, place, argv), nprocs=world, start_method="fork")
