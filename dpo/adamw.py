"""AdamW by torch's own fused kernel, to the bits of torch.optim.AdamW(fused=True).

That class imports torch's compiler on its way, two seconds of the few from start to first step. Read next: dpo/loop.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo.config import TrainConfig


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) on parameters of one dtype and device, whole or sharded."""

    parameters: Sequence[Tensor]
    config: TrainConfig
    state: defaultdict[Tensor, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient at the rate `lr`, and drop the gradients."""
        moving = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        if not moving:
            return
        for parameter in moving:
            if not self.state[parameter]:
                step = torch.zeros((), device=parameter.device)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] |= {"step": step, **moments}
        states = [self.state[parameter] for parameter in moving]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            list(moving), list(moving.values()), means, squares, [], steps, amsgrad=False, maximize=False, lr=lr,
            beta1=self.config.beta1, beta2=self.config.beta2, eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )  # fmt: skip
        for parameter in moving:
            parameter.grad = None
