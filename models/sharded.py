"""Parameters that several processes share: what this one holds of them, and experts put together a few at a time.

Letters: `E` experts, `M` rows, `D` model width. FSDP2 keeps a parameter as a DTensor cut along one dimension into
parts of equal length, the last ones shorter or empty.
Read next: dpo/distributed.py, who cuts; models/checkpoint.py, who fills.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # importing it takes longer than all of ours: only where there are several processes
    from torch.distributed.tensor import DTensor


class Part(NamedTuple):
    """What this process holds of a tensor: `values`, its own storage, stand in the whole from `begin` on."""

    values: Tensor
    dimension: int = 0  # along which the whole is cut
    begin: int = 0
    copies: int = 1  # of this part, each held by another process
    group: dist.ProcessGroup | None = None  # those who hold the parts

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the values stand in the whole."""
        begins = [self.begin * (d == self.dimension) for d in range(self.values.dim())]
        return tuple(slice(b, b + n) for b, n in zip(begins, self.values.shape, strict=True))


def as_dtensor(tensor: Tensor) -> "DTensor | None":
    """The tensor, if this process holds a part of it."""
    if not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def own_part(tensor: Tensor) -> Part:
    """The part of a tensor, gradients not followed, that this process holds: all of it where it is not shared."""
    if (shared := as_dtensor(tensor.detach())) is None:
        return Part(tensor.detach())
    from torch.distributed.tensor import Shard

    mesh = shared.device_mesh
    cut, dimension = next((i, p.dim) for i, p in enumerate(shared.placements) if isinstance(p, Shard))
    length = math.ceil(shared.shape[dimension] / mesh.size(cut))
    begin = min(mesh.get_local_rank(cut) * length, shared.shape[dimension])
    copies = mesh.size() // mesh.size(cut)
    return Part(shared.to_local(), dimension, begin, copies, mesh.get_group(cut))


def local_tensor(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, gradients followed."""
    return parameter if (shared := as_dtensor(parameter)) is None else shared.to_local()


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor, of which this process may hold a part, to a whole value."""
    part = own_part(tensor)
    part.values.copy_(value[part.place])


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered if it is shared (a collective: all ranks must call)."""
    part = own_part(tensor)
    if part.group is None:
        return part.values
    return _joined(part.values, part.dimension, tensor.shape[part.dimension], part.group)


def _joined(values: Tensor, dimension: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' values, one after the other along a dimension that then has `size`."""
    ranks = dist.get_world_size(group)
    rows = values.transpose(0, dimension)
    padded = rows.new_zeros(math.ceil(size / ranks), *rows.shape[1:])
    padded[: len(rows)] = rows
    whole = rows.new_empty(ranks * len(padded), *rows.shape[1:])
    dist.all_gather_single(whole, padded, group)
    return whole[:size].transpose(0, dimension).contiguous()


# --- experts, put together a few at a time --------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """How a layer's experts, cut along their outputs over `group`, are put together: `experts` of them at a time."""

    experts: int
    outputs: Mapping[str, int]  # of the whole, by the name of each parameter that is cut
    group: dist.ProcessGroup
    copies: dist.ProcessGroup | None = None  # those who hold the same part


Answer = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # x [M, D], rows [E], weights by name -> [M, D]


def answer_by_units(answer: Answer, units: Units, x_MD: Tensor, rows_E: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """`answer` by so many experts at a time; x's rows lie by expert, rows_E of each. `own`: all weights [E, ...]."""
    rows = rows_E.split(units.experts)
    x_parts = x_MD.split([int(one.sum()) for one in rows])
    split = zip(*(tensor.split(units.experts) for tensor in own.values()), strict=True)  # its backward is one cat
    parts = [
        _Unit.apply(answer, units, tuple(own), one, x, *weights)
        for one, x, weights in zip(rows, x_parts, split, strict=True)
    ]
    return torch.cat(parts)


class _Unit(torch.autograd.Function):
    """Experts that are put together for their answer, and again for its backward pass; they are never kept.

    Every rank gathers and sums in the same order, whether or not any of its rows ask these experts.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, answer: Answer, units: Units, names: Sequence[str], rows_E: Tensor, x_MD: Tensor, *own: Tensor
    ) -> Tensor:
        ctx.answer, ctx.units, ctx.names, ctx.rows_E = answer, units, names, rows_E
        ctx.save_for_backward(x_MD, *own)
        weights = _whole(units, names, x_MD, own)
        return answer(x_MD, rows_E, dict(zip(names, weights, strict=True))) if len(x_MD) else x_MD.clone()

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x_MD, *own = ctx.saved_tensors
        weights = _whole(ctx.units, ctx.names, x_MD, own)
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip([x_MD, *weights], ctx.needs_input_grad[4:], strict=True)
        ]
        if len(x_MD):
            with torch.enable_grad():
                y_MD = ctx.answer(inputs[0], ctx.rows_E, dict(zip(ctx.names, inputs[1:], strict=True)))
            y_MD.backward(grad_MD)
        exact = torch.promote_types(x_MD.dtype, torch.float32)
        gradients: list[Tensor | None] = []
        for name, tensor, mine in zip(("", *ctx.names), inputs, (x_MD, *own), strict=True):
            gradient = tensor.grad
            if tensor.requires_grad and gradient is None:
                gradient = torch.zeros_like(tensor)
            if gradient is not None and name in ctx.units.outputs:
                gradient = _own_sum(gradient.to(exact), mine, ctx.units)
            gradients.append(gradient)
        return None, None, None, None, *gradients


def _whole(units: Units, names: Sequence[str], x_MD: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """The weights with those that are cut put together, on x's device and (but for bytes) in its dtype."""
    weights = []
    for name, values in zip(names, own, strict=True):
        if name in units.outputs:
            values = values.to(x_MD.device, x_MD.dtype if values.is_floating_point() else None)
            values = _joined(values, 1, units.outputs[name], units.group)
        weights.append(values)
    return weights


def _own_sum(whole: Tensor, own: Tensor, units: Units) -> Tensor:
    """The sum over all ranks of a gradient [E, outputs, ...]: the part of it that belongs to `own`."""
    rows, ranks = whole.transpose(0, 1), dist.get_world_size(units.group)
    length = math.ceil(len(rows) / ranks)
    padded = rows.new_zeros(length * ranks, *rows.shape[1:])
    padded[: len(rows)] = rows
    total = rows.new_empty(length, *rows.shape[1:])
    dist.reduce_scatter_single(total, padded, group=units.group)
    if units.copies is not None:
        dist.all_reduce(total, group=units.copies)
    return total[: own.shape[1]].transpose(0, 1).to(own)
