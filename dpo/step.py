"""One optimizer step: which rows it takes, at what rate, and the gradient of its loss, exact in pairs.

Letters: `B` pairs. Read next: dpo/losses.py, dpo/packing.py.
"""

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo.config import Config, TrainConfig
from dpo.distributed import Ranks, total
from dpo.logprobs import batch_sums
from dpo.losses import pair_losses, reads, reward_metrics
from dpo.packing import pack_share
from dpo.pairs import batch_references, pair_logps
from dpo.trees import Tree
from models.decoder import Decoder

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""Share of the peak rate after the warm-up, `done` from 0 to 1."""


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): rising over the warm-up, then by SCHEDULES down to min_lr_ratio of the peak."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    shape = SCHEDULES[config.schedule]((step - warmup) / max(1, steps - warmup))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def plan_steps(trees: Sequence[Tree], config: Config) -> list[list[int]]:
    """Tree indices of every optimizer step: each epoch shuffled by the seed, whole trees until batch_pairs pairs."""
    steps: list[list[int]] = []
    for epoch in range(config.train.epochs):
        order = list(range(len(trees)))
        random.Random(f"epoch {epoch} of seed {config.seed}").shuffle(order)
        step: list[int] = []
        pairs = 0
        for index in order:
            step.append(index)
            pairs += len(trees[index].pairs)
            if pairs >= config.train.batch_pairs:
                steps.append(step)
                step, pairs = [], 0
        steps += [step] if step else []
    return steps[: config.train.max_steps or None]


def accumulate_gradients(
    policy: Decoder, trees: Sequence[Tree], references: Sequence[Tensor], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Backward through every pair of one optimizer step: the gradient is the mean over all ranks' pairs, exactly.

    `references` holds the sums of each tree (of reference_sums; with the tails of its pairs where ld_alpha is not 1).
    Returns sums over all pairs for the log, `weight` to divide them by, and `difference`: this rank's largest
    |policy - reference| of a completion, nats (NaN if any is).
    """
    weight = sum(pair.weight for tree in trees for pair in tree.pairs)
    mine = range(ranks.rank, len(trees), ranks.world)
    sums = {"tokens": float(sum(trees[i].tokens for i in mine))}
    differences = [torch.zeros(1, dtype=torch.float64)]
    for batch in pack_share(trees, config.pack.tokens, ranks.rank, ranks.world):
        scored = batch_sums(policy, batch, config.pack.head_chunk, tails=config.loss.ld_alpha != 1).cpu()
        reference = batch_references([references[i] for i in mine], batch)
        differences.append((scored.detach() - reference).abs())
        logps = pair_logps(scored, reference * reads(config.loss, "reference"), batch)
        losses_B = pair_losses(logps, config.loss)
        ((losses_B * batch.weight_B).sum() / weight).backward()
        for name, value in reward_metrics(logps, losses_B, batch.weight_B, config.loss.beta).items():
            sums[name] = sums.get(name, 0.0) + value
    return {**total(sums, ranks), "difference": float(torch.cat(differences).max())}


def means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics as means over pairs."""
    return {
        name: value / sums["weight"] for name, value in sums.items() if name not in ("weight", "tokens", "difference")
    }
