"""What matrix products a piece of code asks for, to be looked at as they are made."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Every product's factors, and whether oneDNN makes it: in bf16, or where its fp32 ones may be rounded."""

    PLACES = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}

    def __init__(self, seen: Callable[[Tensor, Tensor, bool], object]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = self.PLACES.get(func.overloadpacket.__name__)
        if place is not None:
            a, b = args[place : place + 2]
            rounded = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            self.seen(a, b, rounded or a.dtype == torch.bfloat16)
        return func(*args, **kwargs or {})
