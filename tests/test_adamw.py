"""Our optimizer is torch's, without what torch imports for it."""

import subprocess
import sys

import pytest
import torch

from dpo.adamw import AdamW
from dpo.config import TrainConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_moves_parameters_to_the_bits_of_torchs_own(dtype: torch.dtype) -> None:
    config = TrainConfig(weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)
    shapes = [(7, 5), (3,), (2, 2)]
    ours, theirs = (
        [torch.randn(s, dtype=dtype, generator=torch.Generator().manual_seed(0)) for s in shapes] for _ in "ab"
    )
    for parameter in (*ours, *theirs):
        parameter.requires_grad_()
    mine = AdamW(ours, config)
    other = torch.optim.AdamW(theirs, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    for step, lr in enumerate((1e-1, 3e-2, 1e-3)):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad, b.grad = (torch.full_like(x, 0.5 + step - place) if place < 2 or step else None for x in (a, b))
        other.param_groups[0]["lr"] = lr
        mine.step(lr)
        other.step()
        assert all(parameter.grad is None for parameter in ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a].keys() == other.state[b].keys()
        assert all(torch.equal(value, other.state[b][name]) for name, value in mine.state[a].items())


def test_a_lone_process_imports_neither_the_compiler_nor_the_sharding() -> None:
    code = (
        "import sys, torch, dpo.train; from dpo.adamw import AdamW; from dpo.config import TrainConfig\n"
        "p = torch.ones(3, requires_grad=True); p.sum().backward(); AdamW([p], TrainConfig()).step(1.0)\n"
        "slow = 'torch._dynamo torch.distributed.fsdp torch.distributed.tensor sympy pyarrow wandb pandas'\n"
        "print([name for name in slow.split() if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
