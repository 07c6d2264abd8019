"""What one GPU of many holds, moves and multiplies for a pack: the real model on meta tensors, sharded by a fake group.

Letters: `T` tokens of a pack, `R` scored tokens, `D` model width, `V` vocabulary, `N` heads, `G` kv heads, `H` head
width. Read next: dpo/plan.py, which makes hours and costs of it.

States are read off the whole model as dpo/distributed.py shards it. Activations are metered: forward and backward run
with the last layers alone (one more than the period of dense and sparse ones), once more with a period more, and grow
by as much with every further one. Only two operators are stood in for, attention and head: on a GPU they are other
kernels than what meta tensors could run.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dpo.config import Config
from dpo.distributed import Ranks, shard
from dpo.packing import Pack
from dpo.policy import empty_policy
from kernels.backend import RATES, choose
from kernels.linear_logprobs import CHUNKED_TOKENS
from kernels.linear_paths import SAVED_PROBS_BYTES, fused_rows
from kernels.roofline import GPUS, modelled_ms, steps
from models.attention import Span
from models.config import ModelConfig
from models.decoder import Decoder
from models.moe import Experts
from models.parts import Attend
from models.routing import Routing
from models.sharded import own_part

LAUNCH_S = 5e-6  # assumed: eager PyTorch starts no kernel faster than one in so long
GATHERS = ("embedding", "index", "index_select", "gather")  # they read what they return, not all of their first input
ADAM_BYTES = 28  # read and written of an fp32 parameter: itself, two moments, its gradient read


@contextmanager
def fake_world(world: int) -> Iterator[Ranks]:
    """Rank 0 of so many processes that do not exist: its collectives return at once."""
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world)
    try:
        yield Ranks(0, world, torch.device("cpu"))
    finally:
        if world > 1:
            dist.destroy_process_group()


# --- what is held between steps, and gathered within them -----------------------------------------------------------


class Unit(NamedTuple):
    """Parameters that are gathered together; bytes of all parts, as they are computed with."""

    name: str  # of its module; "" is the root
    gathered: int
    reduced: int  # of its gradients, as they are summed
    backward: int = 1  # times that it is gathered there
    fsdp: bool = True  # else experts that are put together a few at a time: Trial has their memory


class State(NamedTuple):
    """Bytes that rank 0 keeps, and the units, each cut into `parts`."""

    parameters: int
    gradients: int
    optimizer: int
    parts: int = 1
    units: tuple[Unit, ...] = ()  # none in one process

    @property
    def kept(self) -> int:
        """All that rank 0 keeps."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def root(self) -> int:
        """Bytes gathered throughout a pack."""
        return sum(unit.gathered for unit in self.units if not unit.name)

    @property
    def largest(self) -> int:
        """Bytes of the largest layer, gathered: with one, the next is on its way."""
        return max((unit.gathered for unit in self.units if unit.name and unit.fsdp), default=0)

    @property
    def reducing(self) -> int:
        """Bytes of the largest layer's gradients on their way."""
        return max((unit.reduced for unit in self.units if unit.name and unit.fsdp), default=0)


def state_of(shape: ModelConfig, config: Config, dtype: torch.dtype, world: int) -> State:
    """The whole policy, cut over `world` ranks."""
    policy = empty_policy(shape, config, dtype)
    with fake_world(world) as ranks:
        if world > 1:
            shard(policy, ranks, config.fsdp)
        own = {parameter: own_part(parameter).values for parameter in policy.parameters()}
        parts = world // config.fsdp.replicas if world > 1 else 1
        units = tuple(_units(policy, own, parts)) if world > 1 else ()
    gradients = _bytes(values for parameter, values in own.items() if parameter.requires_grad)
    return State(_bytes(own.values()), gradients, 2 * gradients, parts, units)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _units(model: Decoder, own: Mapping[nn.Parameter, Tensor], parts: int) -> Iterator[Unit]:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    few = {name: module for name, module in model.named_modules() if isinstance(module, Experts) and module.units}
    apart = {parameter: name for name, module in few.items() for parameter in module.weights().values()}
    found: dict[str, list[nn.Parameter]] = {name: [] for name in (*modules, *few)}
    for name, parameter in model.named_parameters():
        owners = (unit for unit in modules if not unit or name.startswith(f"{unit}."))
        found[apart.get(parameter) or max(owners, key=len)].append(parameter)
    exact = torch.promote_types(model.compute_dtype, torch.float32)
    for name, parameters in found.items():
        sizes = {p: own[p].numel() * parts for p in parameters}  # the first part is the largest; the rest is padded
        masters = model.head.weight.requires_grad  # are gathered in the dtype of the arithmetic
        widths = {p: (model.compute_dtype if masters and p.is_floating_point() else p.dtype).itemsize for p in sizes}
        gathered = sum(size * widths[p] for p, size in sizes.items())
        reduced = sum(size * exact.itemsize for p, size in sizes.items() if p.requires_grad)
        yield Unit(name, gathered, reduced, 1 + (name in few and model.checkpoint_activations), name in modules)


# --- what a pack takes: metered ---------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of an operator that is stood in for: bytes kept to the backward, of its workspace; FLOP and seconds."""

    kept: int
    work: tuple[int, int]  # forward, backward, as the others
    flop: tuple[float, float]
    time_s: tuple[float, float]
    layer: int = -1


class Meter(TorchDispatchMode):
    """Bytes alive of what is made on meta tensors within it, FLOP, and the time on a GPU.

    A launch takes the longest of its products at the assumed rate, its bytes, and LAUNCH_S. `known` tensors are not
    counted. Index tensors may be real: routes cannot be guessed.
    """

    def __init__(self, gpu: str, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.rate, self.bandwidth = RATES[GPUS[gpu].arch].vendor_tflops * 1e12, GPUS[gpu].memory_tbps * 1e12
        self.live = self.peak = 0
        self.until: dict[int, int] = {}  # the peak before a layer's attention is differentiated
        self.flop = self.time_s = 0.0
        self.held = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in known})

    def spend(self, flop: float, time_s: float) -> None:
        """Count what was done."""
        self.flop += flop
        self.time_s += time_s

    def __torch_dispatch__(  # type: ignore[override]
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...], kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func.namespace == "c10d":  # a fake group's collective; it takes no meta tensors
            args, kwargs = tree_map_only(Tensor, lambda x: torch.empty(0), (args, kwargs))
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        real = [x for x in given if not x.is_meta]
        if real and len(real) < len(given):
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_meta]
        name = _launched(func)
        if made and name is not None:
            moved = 2 * _bytes(made) if name in GATHERS else _bytes([*given, *made])
            flop = 0
            if name.endswith("mm"):  # mm, bmm, addmm, _grouped_mm, baddbmm
                left, right = given[name in ("addmm", "baddbmm") :][:2]
                flop = 2 * left.numel() * right.shape[-1]
            self.spend(flop, max(flop / self.rate, moved / self.bandwidth, LAUNCH_S))
        for storage in (x.untyped_storage() for x in made):
            if storage not in self.held:
                self.held[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


@cache
def _launched(func: OpOverload) -> str | None:
    """The operator's name, if it starts a kernel."""
    name = func.name().partition("::")[2].partition(".")[0]
    return None if func.is_view or "empty" in name or name == "detach" else name


class _StandIn(torch.autograd.Function):
    """An operator of `shape` that keeps its inputs and its result, and costs what it is said to."""

    @staticmethod
    def forward(ctx, meter: Meter, cost: Cost, shape: Sequence[int], *inputs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        meter.spend(cost.flop[0], cost.time_s[0])
        inputs[0].new_empty(cost.work[0], dtype=torch.uint8)
        result = inputs[0].new_empty(shape)
        ctx.meter, ctx.cost = meter, cost
        ctx.save_for_backward(result, inputs[0].new_empty(cost.kept, dtype=torch.uint8), *inputs)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        ctx.meter.spend(ctx.cost.flop[1], ctx.cost.time_s[1])
        ctx.meter.until[ctx.cost.layer] = ctx.meter.peak
        _, _, *inputs = ctx.saved_tensors
        grad.new_empty(ctx.cost.work[1], dtype=torch.uint8)
        needed = zip(inputs, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(torch.empty_like(x) if need else None for x, need in needed)


def seen_keys(pack: Pack, span: Span) -> int:
    """Pairs of a token and one that it sees."""
    seen_T = pack.positions_T[: pack.layout.tokens] + 1
    if span.window is not None:
        seen_T = seen_T.clamp(max=span.window)
    if span.chunk is not None:
        seen_T = (seen_T - 1) % span.chunk + 1
    return int(seen_T.sum())


def stand_in_attention(keys: float, meter: Meter) -> Attend:
    """Attention to so many keys that keeps queries, keys, values, result and log-sum-exp, as flex attention does."""

    def attend(layer: int, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, span: Span, sinks_N: Tensor | None) -> Tensor:
        T, N, H = q_TNH.shape  # noqa: N806
        product = 2 * N * H * keys
        flop = (2 * product, 5 * product)  # the backward makes the weights again
        cost = Cost(4 * T * N, (0, 0), flop, (flop[0] / meter.rate, flop[1] / meter.rate), layer)
        return _StandIn.apply(meter, cost, (T, N, H), q_TNH, k_TGH, v_TGH)

    return attend


def head_cost(R: int, V: int, D: int, width: int, chunk: int, trained: bool, gpu: str, path: str) -> Cost:  # noqa: N803
    """linear_logprobs of R rows by a path: J in fp32, probabilities that a trained head keeps, its chunk's logits."""
    rows = {"torch": chunk, "chunked": CHUNKED_TOKENS, "fused": fused_rows(width * V)}
    exact = max(width, 4)
    # Bytes of a logit: fp32 ones in their place; fp32 ones beside probabilities, and the last chunk's; those alone.
    each = {"torch": exact, "chunked": 4 + 2 * width, "fused": 2 * width}[path]
    work = rows[path] * V * each
    kept = R * V * width if trained and R * V * width <= SAVED_PROBS_BYTES else 0
    product = 2 * R * V * D
    timed = "chunked" if path == "torch" else path
    ms = modelled_ms(gpu, timed, steps(timed, gpu, R, D, V, trained))
    shares = (2 / 3, 1 / 3) if trained else (1, 0)
    time_s = (ms * shares[0] / 1e3, ms * shares[1] / 1e3)
    weight_grad = trained * (V * D * exact * (1 if kept else 2) + (0 if kept else work))
    return Cost(R * D * exact + kept, (work, weight_grad), (2 * product, trained * product), time_s)


@dataclass(frozen=True)
class Trial:
    """Of one pack on one GPU: bytes beside the state, FLOP, seconds of computing."""

    kept: float  # activations alive between forward and backward
    head: float  # beside them while the head runs
    last: float  # in all while the last layers are differentiated: then all activations are still kept
    backward: float  # in all at the backward's peak
    flop: float  # of the forward, and as much for every gradient: nothing that is computed again
    forward_s: float
    backward_s: float


def _period(shape: ModelConfig) -> int:
    """Layers after which dense and sparse ones come again; spans differ too, but attention is stood in for."""
    sparse = [layer.sparse for layer in shape.layers]
    return next(n for n in range(1, len(sparse) + 1) if (sparse[:n] * len(sparse))[: len(sparse)] == sparse)


def _run(
    shape: ModelConfig, layers: int, config: Config, dtype: torch.dtype, world: int, pack: Pack, gpu: str, path: str
) -> Trial:
    """Of the last `layers`, each with the mean attention of all."""
    period, keys = _period(shape), sum(seen_keys(pack, layer.span) for layer in shape.layers) / len(shape.layers)
    shape = replace(shape, layers=shape.layers[-layers:])
    policy = empty_policy(shape, config, dtype).train(config.lora.dropout > 0)
    if not config.lora.rank and world > 1:
        policy = policy.to(dtype)  # as FSDP gathers it
    choice = {}
    if shape.experts is not None:  # every expert is asked alike
        K = shape.experts.per_token  # noqa: N806
        choice_TK = (torch.arange(pack.layout.tokens * K) % shape.experts.count).view(-1, K)
        choice = dict.fromkeys(range(len(shape.layers)), choice_TK)
    head, R = policy.head.weight, len(pack.rows_R)  # noqa: N806
    routing = Routing(pack.layout.tokens, choice, replay=True)
    with fake_world(world) as ranks:
        if shape.experts is not None and world > 1:
            _cut_experts(policy, config, ranks)
        _free_gradients(policy, world)
        with Meter(gpu, policy.parameters()) as meter:
            tokens_T, positions_T = pack.tokens_T.to("meta"), pack.positions_T.to("meta")
            hidden_TD = policy.hidden(tokens_T, positions_T, stand_in_attention(keys, meter), routing)
            layers_flop, trained = meter.flop, head.requires_grad
            V, D = head.shape  # noqa: N806
            cost = head_cost(R, V, D, dtype.itemsize, config.pack.head_chunk, trained, gpu, path)
            meter.peak = 0
            logp_R = _StandIn.apply(meter, cost, (R,), hidden_TD[pack.rows_R], head)
            del hidden_TD
            head_peak, kept, forward_s = meter.peak, meter.live, meter.time_s
            meter.peak = 0
            logp_R.backward(torch.empty_like(logp_R))
    flop = (3 if trained else 2) * layers_flop + sum(cost.flop)
    last = meter.until[max(len(shape.layers) - 1 - period, 0)]
    return Trial(kept, head_peak - kept, last, meter.peak, flop, forward_s, meter.time_s - forward_s)


def _cut_experts(policy: Decoder, config: Config, ranks: Ranks) -> None:
    """Leave of experts that are put together a few at a time what rank 0 holds of them."""
    cut = empty_policy(policy.config, config, policy.compute_dtype)
    shard(cut, ranks, config.fsdp)
    for name, module in cut.named_modules():
        if isinstance(module, Experts) and module.units is not None:
            place = policy.get_submodule(name)
            assert isinstance(place, Experts), "of the same shape"
            place.units = module.units
            for part, parameter in module.weights().items():
                place.register_parameter(part, nn.Parameter(own_part(parameter).values, parameter.requires_grad))


def _free_gradients(policy: Decoder, world: int) -> None:
    """Let gradients go as they do: in one process at once (State has them), under FSDP when the layer's are whole."""
    waiting: list[tuple[str, Tensor]] = []

    def arrived(unit: str, parameter: Tensor) -> None:
        waiting.append((unit, parameter))
        for place in [p for p in waiting if world == 1 or (unit and p[0] not in ("", unit))]:
            place[1].grad = None
            waiting.remove(place)

    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            unit = name.split(".")[2] if name.startswith("model.layers.") else ""
            parameter.register_post_accumulate_grad_hook(partial(arrived, unit))


def try_pack(
    shape: ModelConfig, config: Config, dtype: torch.dtype, world: int, pack: Pack, gpu: str, path: str = ""
) -> Trial:
    """What a pack takes, beside the state, of a GPU of `world`; `path` is linear_logprobs' ("": auto's)."""
    period, count = _period(shape), len(shape.layers)
    path = path or choose(GPUS[gpu].arch, shape.hidden)
    sizes = [min(n, count) for n in (period + 1, 2 * period + 1)]
    one, two = (_run(shape, layers, config, dtype, world, pack, gpu, path) for layers in sizes)
    further = (count - sizes[1]) / max(sizes[1] - sizes[0], 1)
    return Trial(**{name: value + further * (value - getattr(one, name)) for name, value in vars(two).items()})
