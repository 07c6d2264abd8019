"""Log-probs of packed trees: per scored token, and summed per completion.

Letters: `R` scored tokens, `S` completions, `B` pairs. Read next: dpo/reference.py, dpo/pairs.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo.config import PackConfig
from dpo.distributed import Ranks, gather, own_share
from dpo.log import progress
from dpo.packing import Batch, Pack, empty_pack, pack_trees
from dpo.trees import Tree
from models.decoder import Decoder
from models.errors import UserError
from models.routing import Routing

WINDOW_TREES = 4096  # trees packed at a time when scoring: bin packing stays cheap, memory flat in the number of rows

TreeLogps = list[np.ndarray]
"""Of one tree: for each completion, log p of its scored tokens (nats; fp32, fp64 in fp64 runs)."""
Score = Callable[[Sequence[Tree]], list[TreeLogps]]
"""A model as a function: trees in, per-token log-probs out."""
Note = Callable[[Pack, Routing], None]
"""What is told where a pack sent its tokens."""


def pack_logps(model: Decoder, pack: Pack, head_chunk: int, routing: Routing | None = None) -> Tensor:
    """log p of a pack's scored tokens [R], differentiable; `routing` is told the routes to its experts."""
    device = next(model.parameters()).device
    tokens_T, positions_T = pack.tokens_T.to(device), pack.positions_T.to(device)
    rows_R, targets_R = pack.rows_R.to(device), pack.targets_R.to(device)
    return model(tokens_T, positions_T, pack.layout, rows_R, targets_R, head_chunk, routing)


def completion_sums(logp_R: Tensor, completion_R: Tensor, completions: int, sides_2B: Tensor | None = None) -> Tensor:
    """Sum of log p per completion [S], in fp64, in token order: the same bits from the same tokens.

    With `sides_2B` their tail_sums follow [S + 2B].
    """
    zeros_S = torch.zeros(completions, dtype=torch.float64, device=logp_R.device)
    sums_S = zeros_S.index_add(0, completion_R.to(logp_R.device), logp_R.double())
    return sums_S if sides_2B is None else torch.cat([sums_S, tail_sums(logp_R, completion_R, sides_2B, completions)])


def tail_sums(logp_R: Tensor, completion_R: Tensor, sides_2B: Tensor, completions: int) -> Tensor:
    """Sum of log p of each side of each pair beyond the other side's length [2B], nats; 0 for the shorter side.

    `sides_2B` are completions, the pairs' winners then their losers. A completion's tokens lie together, in order.
    """
    tokens_S = completion_R.bincount(minlength=completions)
    end_S = torch.zeros_like(tokens_S).scatter_reduce(0, completion_R, torch.arange(len(completion_R)) + 1, "amax")
    winner_B, loser_B = tokens_S[sides_2B].chunk(2)
    tail_2B = tokens_S[sides_2B] - torch.minimum(winner_B, loser_B).repeat(2)
    side_R = torch.arange(len(sides_2B)).repeat_interleave(tail_2B)
    # The last tail_2B tokens of each side, one side after the other.
    token_R = torch.arange(len(side_R)) + (end_S[sides_2B] - tail_2B.cumsum(0))[side_R]
    return completion_sums(logp_R[token_R.to(logp_R.device)], side_R, len(sides_2B))


def batch_logps(model: Decoder, batch: Batch, head_chunk: int, routings: Sequence[Routing | None] = ()) -> Tensor:
    """log p of a batch's scored tokens [R], differentiable; the graphs of its packs are all alive until backward."""
    packs = zip(batch.packs, routings or [None] * len(batch.packs), strict=True)
    return torch.cat([pack_logps(model, pack, head_chunk, routing) for pack, routing in packs])


def batch_sums(logp_R: Tensor, batch: Batch, *, tails: bool = False) -> Tensor:
    """Sum of log p per completion of a batch [S], with `tails` those of its pairs behind them [S + 2B]."""
    sides_2B = torch.cat([batch.winner_B, batch.loser_B]) if tails else None
    return completion_sums(logp_R, batch.completion_R, len(batch.completions), sides_2B)


@torch.no_grad()
def score_trees(
    model: Decoder, trees: Sequence[Tree], pack: PackConfig, ranks: Ranks, label: str, note: Note | None = None
) -> list[TreeLogps]:
    """Per-token log-probs of every completion of every tree, in order. All ranks share the work and get all of it.

    `note` is told where each pack of this rank sent its tokens. UserError where a log-prob is not finite.
    """
    scored: list[TreeLogps] = [[np.empty(0)] * len(tree.completions) for tree in trees]
    with progress(len(trees), label, "trees") as bar:
        for begin in range(0, len(trees), WINDOW_TREES):
            batches = pack_trees(trees[begin : begin + WINDOW_TREES], pack.tokens)
            jobs = [(batch, one) for batch in batches for one in batch.packs]
            rounds = -(-len(jobs) // ranks.world)
            mine = own_share(jobs, ranks)
            parts: list[tuple[int, int, np.ndarray]] = []
            for batch, one in mine:
                routing = Routing(one.layout.tokens)
                logp_R = pack_logps(model, one, pack.head_chunk, routing).cpu()
                if note is not None:
                    note(one, routing)
                for slot in one.completion_R.unique().tolist():
                    tree, completion = batch.completions[slot]
                    parts.append((begin + tree, completion, logp_R[one.completion_R == slot].numpy()))
                bar.update(len(one.layout.trees) * ranks.world)
            for _ in range(rounds - len(mine)):  # every rank must take part in every forward's all-gathers
                pack_logps(model, empty_pack(pack.tokens), pack.head_chunk)
            for tree, completion, logps in gather(parts, ranks):
                if not np.isfinite(logps).all():
                    raise UserError(f"{label}: log-probs are nan or inf; check the weights for nan, or set dtype=fp32")
                scored[tree][completion] = logps
    return scored
