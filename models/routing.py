"""Which experts a pack's tokens are sent to: as each layer chooses, or as another forward chose.

Letters: `T` tokens of a pack without its padding, `E` experts, `K` experts per token. Read next: models/moe.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Routing:
    """One forward's routes, by layer, of the pack's first `tokens` tokens; the others are padding, and are not sent."""

    tokens: int
    reference: Mapping[int, Tensor] | None = None  # another forward's choices [T, K]
    replay: bool = False  # take these in place of the layers' own
    balanced: bool = False  # keep load_balance of every layer
    own: dict[int, Tensor] = field(default_factory=dict)  # the layers' own choices [T, K], the largest logit first
    asked: dict[int, Tensor] = field(default_factory=dict)  # how many tokens each expert answered [E]
    balance: dict[int, Tensor] = field(default_factory=dict)

    def choose(self, layer: int, logits_TE: Tensor, per_token: int) -> Tensor:
        """The experts [T, K] of each token. A layer that is recomputed for its backward chooses as it did."""
        if layer not in self.own:
            self.own[layer] = logits_TE.detach().topk(per_token).indices
        choice_TK = self.own[layer] if self.reference is None or not self.replay else self.reference[layer]
        self.asked[layer] = asked(choice_TK, logits_TE.shape[1])
        if self.balanced:
            balance = load_balance(logits_TE, self.asked[layer] / self.tokens)  # always: recomputed, it must save alike
            self.balance.setdefault(layer, balance)
        return choice_TK


def asked(choice_TK: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert [E]."""
    choice_N = choice_TK.flatten()
    return choice_N.new_zeros(experts).scatter_add_(0, choice_N, choice_N.new_ones(len(choice_N)))


def load_balance(logits_TE: Tensor, asked_E: Tensor) -> Tensor:
    """E sum_e f_e P_e: f_e choices of expert e a token, P_e its mean probability (Fedus et al. 2021, eq. 4).

    K where all are asked alike, as transformers scales it; the gradient is through P alone.
    """
    return logits_TE.shape[1] * (asked_E * logits_TE.softmax(-1).mean(0)).sum()
