"""Preference losses: pure functions of per-completion log-prob sums, one dict, each with its equation and paper.

Letters: `B` pairs. Read next: dpo/packing.py. To add one: write the function, name it in LOSSES (CONTRIBUTING.md).

A loss returns one value a pair; the caller weighs and averages over the pairs of the whole optimizer step, so that no
split into micro-batches or ranks can change a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dpo.config import LossConfig


@dataclass(frozen=True)
class PairLogps:
    """Sums of log p over the scored tokens of each pair's two completions, nats [B], and their token counts."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_length_B: Tensor
    rejected_length_B: Tensor

    @property
    def chosen_ratio_B(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x)."""
        return self.chosen_B - self.reference_chosen_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x)."""
        return self.rejected_B - self.reference_rejected_B


def sigmoid(logps: PairLogps, config: LossConfig) -> Tensor:
    """-(1 - e) log sigma(beta d) - e log sigma(-beta d), d = the log-ratios' difference (Rafailov et al. 2023, eq. 7;

    label smoothing e: Mitchell 2023, cDPO eq. 3). Without a reference, d is the policy's own (its sums are zero).
    """
    logits_B = config.beta * (logps.chosen_ratio_B - logps.rejected_ratio_B)
    smooth = config.label_smoothing
    return -(1 - smooth) * F.logsigmoid(logits_B) - smooth * F.logsigmoid(-logits_B)


LOSSES: dict[str, Callable[[PairLogps, LossConfig], Tensor]] = {"sigmoid": sigmoid}


def chosen_nll(logps: PairLogps) -> Tensor:
    """-log pi(y_w|x) / |y_w| per pair (Pang et al. 2024, eq. 2: the term that rpo_alpha weighs).

    Each pair's own length divides, so that pairs count alike; TRL divides by all the batch's tokens instead.
    """
    return -logps.chosen_B / logps.chosen_length_B


def pair_losses(logps: PairLogps, config: LossConfig) -> Tensor:
    """The configured loss of every pair [B]: LOSSES[config.name] + rpo_alpha * chosen NLL."""
    losses_B = LOSSES[config.name](logps, config)
    return losses_B + config.rpo_alpha * chosen_nll(logps) if config.rpo_alpha else losses_B


def reward_metrics(logps: PairLogps, losses_B: Tensor, weight_B: Tensor, beta: float) -> dict[str, float]:
    """Weighted SUMS over pairs under TRL's metric names (divide by `weight`): rewards are beta * log-ratios, in nats.

    A pair counts as right when its chosen reward is the larger, as half when they are equal.
    """
    chosen_B, rejected_B = beta * logps.chosen_ratio_B, beta * logps.rejected_ratio_B
    margin_B = chosen_B - rejected_B
    columns = {
        "loss": losses_B,
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": margin_B,
        "rewards/accuracies": (margin_B > 0).double() + 0.5 * (margin_B == 0).double(),
        "logps/chosen": logps.chosen_B,
        "logps/rejected": logps.rejected_B,
        "weight": weight_B / weight_B,
    }
    return {name: float((column_B.detach() * weight_B).sum()) for name, column_B in columns.items()}
