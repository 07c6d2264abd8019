"""Many processes as one: FSDP2 sharding, who does which work, and putting results together; none of it for one.

Read next: dpo/train.py. Launch: `torchrun --nproc-per-node=N -m dpo.train exp=...`.
"""

import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo.config import FsdpConfig
from dpo.hang import watch
from models.checkpoint import Made
from models.decoder import Decoder
from models.errors import UserError
from models.moe import Experts
from models.sharded import Units, full_tensor, own_part

if TYPE_CHECKING:  # importing it takes longer than all of ours: only where there are several processes
    from torch.distributed.device_mesh import DeviceMesh

NORM_BLOCK = 2**18  # elements of a gradient whose norm is taken at once
UNIT_BYTES = 2**33  # of a layer's experts, at most, that are put together at once: a tenth of the larger GPUs

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

    `hang_s`: how long one rank may keep the others waiting; watch_ranks names it.
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
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("" if several else restarts, store)  # nodes count their own restarts
    backend = "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo"  # objects go through gloo
    limit = timedelta(seconds=hang_s + 60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Ranks(rank, world, local)


def watch_ranks(ranks: Ranks, hang_s: float) -> None:
    """From now on a rank that stands still for `hang_s` ends all of them (dpo/hang.py); nothing for one process.

    To be called when the inputs are read: a download, or one rank's tokenising, may stand on one line for longer.
    """
    if ranks.world > 1:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"watch {restarts}", client)
        threading.Thread(target=watch, args=(store, ranks.rank, ranks.world, hang_s), daemon=True).start()


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


def shard(model: Decoder, ranks: Ranks, config: FsdpConfig) -> None:
    """Cut parameters over the ranks, a unit a layer; gradients are summed (the loss is divided by all pairs).

    The model is an empty one (on the meta device), the process group may be a fake one. Weights that train are put
    together in the dtype of the arithmetic; frozen ones are in it, and the adapters beside them keep theirs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import Shard

    if ranks.world % config.replicas:
        raise UserError(
            f"fsdp.replicas = {config.replicas}: {ranks.world} ranks cannot hold so many whole models, each cut over "
            "equally many; give a divisor of their number"
        )
    parts = ranks.world // config.replicas
    # A dimension of one copy would cost a collective of its own.
    shape = (config.replicas, parts)[config.replicas == 1 :]
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("copies", "parts")[-len(shape) :])

    def along(parameter: nn.Parameter) -> Shard | None:
        """Experts that the ranks do not divide are cut along their outputs, where they divide those."""
        outputs = parameter.dim() > 2 and parameter.shape[0] % parts and parameter.shape[1] % parts == 0
        return Shard(1) if outputs else None

    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype if model.head.weight.requires_grad else None,
        reduce_dtype=torch.promote_types(model.compute_dtype, torch.float32),
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if config.offload else OffloadPolicy()
    apart = {parameter for module in model.modules() for parameter in _cut_experts(module, model, mesh, config)}
    # The root too, unlike FSDP's default: between forwards every parameter is the sharded one that an optimizer keeps.
    for module in (*model.model.layers, model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=along,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=apart,
        )
        if ranks.world > 1:  # else there is nothing to divide by, and a factor of 1 would cost a pass all the same
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else fp32 is reduced by an operation that gloo does not have


def _cut_experts(module: nn.Module, model: Decoder, mesh: "DeviceMesh", config: FsdpConfig) -> list[nn.Parameter]:
    """Where a layer's experts are to be put together in several units: the parameters, which are cut here."""
    if not isinstance(module, Experts):
        return []
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = module.weights()
    width = model.compute_dtype.itemsize
    size = sum(p.numel() * (width if p.is_floating_point() else 1) for p in whole.values())
    units = config.expert_units or math.ceil(size / UNIT_BYTES)
    if units == 1:
        return []
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(1)]
    for name, parameter in whole.items():
        cut = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, parameter.requires_grad))
    copies = mesh.get_group("copies") if mesh.ndim > 1 else None
    experts = math.ceil(len(next(iter(whole.values()))) / units)
    outputs = {name: parameter.shape[1] for name, parameter in whole.items()}
    module.units = Units(experts, outputs, mesh.get_group("parts"), copies)
    return list(module.weights().values())


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


def full_parameters(model: Decoder) -> Made:
    """Every parameter whole, by its published name, gathered when it is asked for: all ranks ask in the same order."""
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return Made(shapes, lambda name: full_tensor(parameters[name].detach()))


def without_gradient(parameters: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of those whose gradient is absent or zero, on every rank."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    moved = set(gather([name for name, gradient in gradients.items() if bool(own_part(gradient).values.any())], ranks))
    return [name for name in parameters if name not in moved]


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], limit: float, ranks: Ranks) -> float:
    """Scale gradients so that their global L2 norm is at most `limit` (0: leave them); the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [own_part(gradient) for gradient in gradients]
    local = [part.values for part in parts]
    # In the gradients' dtype by blocks, the blocks' squares in fp64: no gradient is copied to fp64.
    blocks = [block for values in local for block in values.flatten().split(NORM_BLOCK)]
    square = float(torch.stack(torch._foreach_norm(blocks)).double().square().sum())
    square /= max(part.copies for part in parts)
    norm = math.sqrt(total({"square": square}, ranks)["square"])
    if limit and norm > limit:
        torch._foreach_mul_(local, limit / norm)
    return norm
