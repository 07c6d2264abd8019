"""Many processes as one: FSDP2 sharding, who does which work, and putting results together; none of it for one.

Read next: dpo/train.py. Launch: `torchrun --nproc-per-node=N -m dpo.train exp=...`.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.hang import watch
from models.checkpoint import Made
from models.decoder import Decoder
from models.errors import UserError

if TYPE_CHECKING:  # importing it takes longer than all of ours: only where there are several processes
    from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def join_ranks(device: str, hang_s: float) -> Ranks:
    """Join torchrun's process group (gloo on the CPU, nccl on CUDA); alone without torchrun.

    `hang_s`: how long one rank may keep the others waiting.
    """
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, torch.device(device))
    local = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    # torchrun hands ranks that it starts again the store with the addresses of the dead ones (pytorch#135712).
    restarts, shared = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(shared) != "1":
        raise UserError(f"torchrun --max-restarts on several nodes: set {shared}=1 before it, or ranks may not meet")
    prefix = "" if several else restarts  # nodes count their own restarts
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if local.type == "cuda" else "gloo",
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=hang_s + 60),
    )
    client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    watch(dist.PrefixStore(prefix, client), rank, world, hang_s)
    return Ranks(dist.get_rank(), dist.get_world_size(), local)


def leave_ranks(ranks: Ranks) -> None:
    """End the process group, if there is one, when every rank is done: none pulls the rug from under another."""
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit; as one of many at once, since gloo's threads may want an interpreter that is being taken down (SIGABRT)."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard(model: Decoder, ranks: Ranks) -> Decoder:
    """Shard parameters over the ranks, a unit a layer; gradients are summed (the loss is divided by all pairs)."""
    if ranks.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    exact = torch.promote_types(model.compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=exact, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root too, unlike FSDP's default: between forwards every parameter is the sharded one that an optimizer keeps.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else fp32 is reduced by an operation that gloo does not have
    return model


def own_share(items: Sequence[Item], ranks: Ranks) -> list[Item]:
    """Every world-th item, from this rank's on."""
    return list(items[ranks.rank :: ranks.world])


def gather(items: list[Item], ranks: Ranks) -> list[Item]:
    """All ranks' lists as one, in rank order, on every rank. Items must pickle; nothing from outside is unpickled."""
    if ranks.world == 1:
        return items
    lists: list[list[Item]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def total(sums: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Sum each figure over the ranks, in rank order (fp64: every rank gets the same bits)."""
    parts = gather([sums], ranks)
    return {name: sum(part[name] for part in parts) for name in sums}


def broadcast_first(item: Item, ranks: Ranks) -> Item:
    """The first rank's item, everywhere."""
    return gather([item], ranks)[0]


def _sharded(tensor: Tensor) -> "DTensor | None":
    """The tensor, if this process holds a shard of it."""
    if not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def _own(tensor: Tensor) -> Tensor:
    """What of the tensor this process holds: a shard, or all of it."""
    return tensor if (shard := _sharded(tensor)) is None else shard.to_local()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a parameter, gathered if it is sharded (a collective: all ranks must call)."""
    if (shard := _sharded(tensor)) is None:
        return tensor
    local, ranks = shard.to_local(), shard.device_mesh.size()
    rows = math.ceil(tensor.shape[0] / ranks)  # of every rank's shard; the last ones may hold fewer, or none
    padded = local.new_zeros(rows, *tensor.shape[1:])
    padded[: local.shape[0]] = local
    whole = local.new_empty(rows * ranks, *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, padded)
    return whole[: tensor.shape[0]]


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, of which this process may hold a shard, to a whole value."""
    if (shard := _sharded(parameter)) is not None:
        rows = math.ceil(value.shape[0] / shard.device_mesh.size())
        begin = shard.device_mesh.get_local_rank() * rows
        parameter, value = shard.to_local(), value[begin : begin + rows]
    parameter.copy_(value)


def full_parameters(model: Decoder) -> Made:
    """Every parameter whole, by its published name, gathered when it is asked for: all ranks ask in the same order."""
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return Made(shapes, lambda name: full_tensor(parameters[name].detach()))


def without_gradient(parameters: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of those whose gradient is absent or zero, on every rank."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    moved = set(gather([name for name, gradient in gradients.items() if bool(_own(gradient).any())], ranks))
    return [name for name in parameters if name not in moved]


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], limit: float, ranks: Ranks) -> float:
    """Scale gradients so that their global L2 norm is at most `limit` (0: leave them); the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [_own(gradient) for gradient in gradients]
    norms = torch._foreach_norm(local, dtype=torch.float64)
    norm = math.sqrt(total({"square": float(torch.stack(norms).square().sum())}, ranks)["square"])
    if limit and norm > limit:
        torch._foreach_mul_(local, limit / norm)
    return norm
