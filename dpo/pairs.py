"""What a loss is computed from: sums of log-probs of each pair's two completions, of policy and reference alike.

Letters: `S` completions, `B` pairs, `R` scored tokens. Read next: dpo/losses.py.

A vector of *sums* holds one value a completion [S]; where the loss looks at lengths token by token (LD-DPO) one value
a side of each pair follows, winners then losers [2B]: its *tail*, the part beyond the other side's length. Policy and
reference are added in the same token order, so that equal log-probs give equal bits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo.config import LossConfig
from dpo.logprobs import TreeLogps, completion_sums
from dpo.packing import Batch
from dpo.trees import Pair, Tree


@dataclass(frozen=True)
class PairLogps:
    """Sums of log p over the scored tokens of each pair's two completions, nats [B], and their token counts."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_length_B: Tensor
    rejected_length_B: Tensor
    margin_B: Tensor | float = 0.0  # by how much the chosen reward is to lead, reward units (beta * nats)
    soft_label_B: Tensor | float = 1.0  # probability that the chosen answer is the better one
    twin_B: Tensor | None = None  # index of the same pair in the other order, or its own
    tails_4B: Tensor | None = None  # [4, B], rows as the first four fields: what of them lies beyond the shorter length

    @property
    def chosen_ratio_B(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x)."""
        return self.chosen_B - self.reference_chosen_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x)."""
        return self.rejected_B - self.reference_rejected_B


def reference_sums(logps: TreeLogps, tailed: Sequence[Pair] = ()) -> Tensor:
    """Sums [S] of one tree's completions, then the tails [2B] of the pairs in `tailed` (all of the tree's, or none)."""
    logp_R = torch.cat([torch.from_numpy(value) for value in logps])
    # numpy's: torch's repeat_interleave wakes all threads, milliseconds a tree.
    completion_R = torch.from_numpy(np.repeat(np.arange(len(logps)), [len(value) for value in logps]))
    sides_2B = torch.tensor([(pair.winner, pair.loser) for pair in tailed]).T.flatten() if tailed else None
    return completion_sums(logp_R, completion_R, len(logps), sides_2B)


def tree_sums(logps: TreeLogps, tree: Tree, config: LossConfig) -> Tensor:
    """A tree's sums, with the tails of its pairs where the loss looks at them."""
    return reference_sums(logps, tree.pairs if config.ld_alpha != 1 else ())


@dataclass(frozen=True)
class TreeSums:
    """The sums of many trees, one after another in one vector."""

    values: Tensor  # fp64
    ends: NDArray[np.int64]  # of each tree's

    def __getitem__(self, tree: int) -> Tensor:
        """A view of a tree's sums."""
        return self.values[self.ends[tree - 1] if tree else 0 : self.ends[tree]]


def batch_references(references: Sequence[Tensor], batch: Batch) -> Tensor:
    """The sums of a batch, put together from those of its trees (`references[i]` is that of the batch's tree i)."""
    counts = Counter(tree for tree, _ in batch.completions)  # in the batch's order, each tree whole
    sums = [references[tree][:completions] for tree, completions in counts.items()]
    tails = [references[tree][completions:].reshape(2, -1) for tree, completions in counts.items()]
    empty = torch.zeros(0, dtype=torch.float64)
    return torch.cat([empty, *sums, *(torch.cat(tails, 1) if tails else [])])


def pair_logps(sums: Tensor, reference: Tensor, batch: Batch) -> PairLogps:
    """The two completions' sums of every pair of a batch, and what its rows say about the pair."""
    chosen_B, rejected_B, completions = batch.winner_B, batch.loser_B, len(batch.lengths_S)
    tailed = len(sums) == completions + 2 * len(chosen_B)
    return PairLogps(
        sums[chosen_B],
        sums[rejected_B],
        reference[chosen_B],
        reference[rejected_B],
        batch.lengths_S[chosen_B],
        batch.lengths_S[rejected_B],
        batch.margin_B,
        batch.soft_label_B,
        batch.twin_B,
        torch.cat([sums[completions:], reference[completions:]]).reshape(4, len(chosen_B)) if tailed else None,
    )
