"""How many rows of a pack are run: as few of its padding as leave every bit of the others as it is.

Letters: `T` rows of a pack, `I` and `O` inputs and outputs of a linear layer, `N` rank of its adapter.

A library may pick a product's kernel by the number of rows, and with it a row's last bits. So packs have one shape, and
their padding costs what tokens cost. But whether bits depend on it can be asked of the machine, once for each shape of
weight: of a few numbers of rows those are used whose products are, row for row, those of a whole pack.
Read next: models/decoder.py.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.widened import exact
from models.moe import RouterLogits
from models.parts import Linear

COUNTS = 16  # tried of a pack
ROWS = 64  # of which they are multiples: what threads and vectors share evenly


class Shape(NamedTuple):
    """Of a layer's product: its weight's, the rank of its adapter (0: none), its bias, the dtype of the arithmetic."""

    outputs: int
    inputs: int
    rank: int
    bias: bool
    dtype: torch.dtype


def rows_to_run(model: nn.Module, tokens: int, pack: int, dtype: torch.dtype) -> int:
    """Of a pack, whose first `tokens` rows are no padding, how many are run through this model's layers on the CPU."""
    counts = exact_counts(frozenset(_shapes(model, dtype)), pack, torch.get_num_threads())
    return next(rows for rows in counts if rows >= tokens)


def _shapes(model: nn.Module, dtype: torch.dtype) -> Iterator[Shape]:
    for one in model.modules():
        if isinstance(one, Linear | RouterLogits):  # experts run blocks of rows of their own
            outputs, inputs = one.weight.shape
            lora, arithmetic = (None, exact(dtype)) if isinstance(one, RouterLogits) else (one.lora, dtype)
            rank = len(lora.get_parameter("A")) if lora else 0
            yield Shape(outputs, inputs, rank, one.bias is not None, arithmetic)


@cache
def exact_counts(shapes: frozenset[Shape], pack: int, threads: int) -> tuple[int, ...]:
    """Numbers of rows, the least first, of whose products each row has the bits it has among `pack`; `pack` last."""
    step = ROWS * -(-pack // (ROWS * COUNTS))
    counts = list(range(step, pack, step))
    for outputs, inputs, rank, bias, dtype in shapes if counts else ():
        draw = torch.Generator().manual_seed(0)
        sizes = ((pack, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (outputs,))
        x_TI, *weights = (torch.randn(size, generator=draw).to(dtype) for size in sizes)
        whole_TO = _product(bias, x_TI, *weights)
        counts = [rows for rows in counts if torch.equal(_product(bias, x_TI[:rows], *weights), whole_TO[:rows])]
    return (*counts, pack)


def _product(bias: bool, x_TI: Tensor, weight_OI: Tensor, a_NI: Tensor, b_ON: Tensor, bias_O: Tensor) -> Tensor:
    """As models/parts.py and models/lora.py multiply."""
    y_TO = F.linear(x_TI, weight_OI, bias_O if bias else None)
    return torch.addmm(y_TO, x_TI @ a_NI.T, b_ON.T, alpha=2.0) if len(a_NI) else y_TO
