"""Log-probs of packed trees: per scored token, and summed per completion.

Letters: `R` scored tokens, `S` completions. Read next: dpo/reference.py, dpo/losses.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpo.config import PackConfig
from dpo.distributed import Ranks, gather, own_share
from dpo.log import progress
from dpo.packing import Batch, Pack, empty_pack, pack_trees
from dpo.trees import Tree
from models.decoder import Decoder

WINDOW_TREES = 4096  # trees packed at a time when scoring: bin packing stays cheap, memory flat in the number of rows

TreeLogps = list[np.ndarray]
"""Of one tree: for each completion, log p of its scored tokens (nats; fp32, fp64 in fp64 runs)."""


def pack_logps(model: Decoder, pack: Pack, head_chunk: int) -> Tensor:
    """log p of a pack's scored tokens [R], differentiable."""
    device = next(model.parameters()).device
    return model(
        pack.tokens_T.to(device),
        pack.positions_T.to(device),
        pack.layout,
        pack.rows_R.to(device),
        pack.targets_R.to(device),
        head_chunk,
    )


def completion_sums(logp_R: Tensor, completion_R: Tensor, completions: int) -> Tensor:
    """Sum of log p per completion [S], in fp64, in token order: the same bits from the same tokens."""
    sums_S = torch.zeros(completions, dtype=torch.float64, device=logp_R.device)
    return sums_S.index_add(0, completion_R.to(logp_R.device), logp_R.double())


def batch_sums(model: Decoder, batch: Batch, head_chunk: int) -> Tensor:
    """Sum of log p per completion of a batch [S], differentiable; its packs' graphs are all alive until backward."""
    logp_R = torch.cat([pack_logps(model, pack, head_chunk) for pack in batch.packs])
    return completion_sums(logp_R, torch.cat([pack.completion_R for pack in batch.packs]), len(batch.completions))


@torch.no_grad()
def score_trees(model: Decoder, trees: Sequence[Tree], pack: PackConfig, ranks: Ranks, label: str) -> list[TreeLogps]:
    """Per-token log-probs of every completion of every tree, in order. All ranks share the work and get all of it."""
    scored: list[TreeLogps] = [[np.empty(0)] * len(tree.completions) for tree in trees]
    with progress(len(trees), label, "trees") as bar:
        for begin in range(0, len(trees), WINDOW_TREES):
            batches = pack_trees(trees[begin : begin + WINDOW_TREES], pack.tokens)
            jobs = [(batch, one) for batch in batches for one in batch.packs]
            rounds = -(-len(jobs) // ranks.world)
            mine = own_share(jobs, ranks)
            parts: list[tuple[int, int, np.ndarray]] = []
            for batch, one in mine:
                logp_R = pack_logps(model, one, pack.head_chunk).cpu()
                for slot in one.completion_R.unique().tolist():
                    tree, completion = batch.completions[slot]
                    parts.append((begin + tree, completion, logp_R[one.completion_R == slot].numpy()))
                bar.update(len(one.layout.trees) * ranks.world)
            for _ in range(rounds - len(mine)):  # every rank must take part in every forward's all-gathers
                pack_logps(model, empty_pack(pack.tokens), pack.head_chunk)
            for tree, completion, logps in gather(parts, ranks):
                scored[tree][completion] = logps
    return scored
