"""One optimizer step: which rows it takes, at what rate, and the gradient of its loss, exact in pairs.

Letters: `B` pairs, `S` completions, `R` scored tokens. Read next: dpo/losses.py, dpo/packing.py.
"""

import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config import Config, LossConfig, TrainConfig
from dpo.distributed import Ranks, own_share, total
from dpo.logprobs import batch_logps, batch_sums
from dpo.losses import pair_losses, reads, reward_metrics
from dpo.packing import Batch, pack_share
from dpo.pairs import batch_references, pair_logps
from dpo.routes import Routes, mean_balance
from dpo.trees import Tree
from kernels import preference_loss
from kernels.backend import resolve
from models.decoder import Decoder

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, cycles: 1 - done,
    "cosine": lambda done, cycles: 0.5 * (1 + math.cos(2 * math.pi * cycles * done)),
    "constant": lambda done, cycles: 1.0,
}
"""Share of the peak rate after the warm-up, `done` from 0 to 1 in so many `cycles`."""


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): rising over the warm-up, then by SCHEDULES down to min_lr_ratio of the peak."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    shape = SCHEDULES[config.schedule]((step - warmup) / max(1, steps - warmup), config.num_cycles)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def plan_steps(pairs_of_trees: Sequence[int], config: Config, rows: Sequence[int] = ()) -> list[list[int]]:
    """Tree indices of every optimizer step: each epoch shuffled by the seed, whole rows until batch_pairs pairs.

    `rows` are the trees' rows, where a row may have several, one after another; else each tree is one.
    """
    steps: list[list[int]] = []
    begins = [i for i in range(len(pairs_of_trees)) if not (i and rows) or rows[i] != rows[i - 1]]
    ends = [*begins[1:], len(pairs_of_trees)]
    places = list(range(len(begins)))
    for epoch in range(config.train.epochs):
        order = places.copy()  # the same numbers: a place costs 8 bytes an epoch
        random.Random(f"epoch {epoch} of seed {config.seed}").shuffle(order)
        step: list[int] = []
        pairs = 0
        for place in order:
            step += range(begins[place], ends[place])
            pairs += sum(pairs_of_trees[begins[place] : ends[place]])
            if pairs >= config.train.batch_pairs:
                steps.append(step)
                step, pairs = [], 0
        steps += [step] if step else []
        if 0 < config.train.max_steps <= len(steps):
            return steps[: config.train.max_steps]
    return steps


def set_dropout(policy: Decoder, step: int, config: Config, ranks: Ranks) -> None:
    """Dropout for one step, its masks drawn from seed, step and rank: a resumed run draws the same. Off at step 0.

    So step 0 compares policy and reference as they are. The masks follow the packs: with dropout a gradient is the
    same only for the same packs and ranks.
    """
    policy.train(config.lora.dropout > 0 and step > 0)
    if policy.training:
        torch.manual_seed(random.Random(f"dropout {step} of seed {config.seed}, rank {ranks.rank}").getrandbits(63))


def accumulate_gradients(
    policy: Decoder,
    trees: Sequence[Tree],
    references: Sequence[Tensor],
    config: Config,
    ranks: Ranks,
    *,
    one_kernel: bool = False,
    routes: Routes | None = None,
) -> dict[str, float]:
    """Backward through every pair of one optimizer step: the gradient is the mean over all ranks' pairs, exactly.

    `references` holds the sums of each tree (of dpo.pairs.tree_sums), those of other ranks' trees too;
    `one_kernel`, of in_one_kernel for all trees of the run, takes the pairs' losses from kernels.preference_loss;
    `routes` of a mixture of experts counts them, and lends the reference's. Each pair bears its batch's moe.aux_loss.
    Returns sums over all ranks' pairs for the log, `weight` to divide them by, `tokens` that were run, and
    `difference`: this rank's largest |policy - reference| of a completion, nats (NaN if any is).
    """
    weight = sum(pair.weight for tree in trees for pair in tree.pairs)
    own_references = own_share(references, ranks)  # as pack_share deals the trees
    sums = {"tokens": float(sum(tree.tokens for tree in own_share(trees, ranks)))}
    differences = [torch.zeros(1, dtype=torch.float64)]
    for batch in pack_share(trees, config.pack.tokens, ranks.rank, ranks.world):
        routings = None if routes is None else routes.of(batch.packs, ranks)
        logp_R = batch_logps(policy, batch, config.pack.head_chunk, routings or ())
        scored = batch_sums(logp_R, batch, tails=config.loss.ld_alpha != 1).cpu()
        reference = batch_references(own_references, batch)
        differences.append((scored.detach() - reference).abs())
        reference = reference * reads(config.loss, "reference")
        logps = pair_logps(scored, reference, batch)
        losses_B = kernel_losses(logp_R, reference, batch, config) if one_kernel else pair_losses(logps, config.loss)
        figures = reward_metrics(logps, losses_B, batch.weight_B, config.loss.beta)
        loss = (losses_B * batch.weight_B).sum()
        if routings is not None and config.moe.aux_loss:
            aux = mean_balance(routings).cpu() * batch.weight_B.sum()
            loss = loss + config.moe.aux_loss * aux
            figures["moe/aux_loss"] = float(aux.detach())
        (loss / weight).backward()
        if routes is not None and routings is not None:
            routes.count(batch.packs, routings)
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
    return {**total(sums, ranks), "difference": float(torch.cat(differences).max())}


KERNEL_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo_sum": "ipo"}
"""loss.name -> its name in kernels.preference_loss, which computes these of a pair's tokens in one kernel."""


def in_one_kernel(config: Config, trees: Sequence[Tree], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is in use here, in log-probs of this `dtype`, and kernels.preference_loss has all of the loss."""
    loss = config.loss
    return (
        loss.name in KERNEL_LOSSES
        and loss == LossConfig(**loss.model_dump(include={"name", "beta", "label_smoothing", "reference_free"}))
        and resolve(config.kernels.backend, device, dtype) != "torch"
        and all(pair.margin == 0 and pair.soft_label == 1 for tree in trees for pair in tree.pairs)
    )


def kernel_losses(logp_R: Tensor, reference_S: Tensor, batch: Batch, config: Config) -> Tensor:
    """pair_losses [B] by kernels.preference_loss, which takes a pair's tokens instead of its sums."""
    sides_2B = torch.stack([batch.winner_B, batch.loser_B], 1).flatten()
    begin_S = batch.lengths_S.cumsum(0) - batch.lengths_S  # in `order_R`, the tokens of one completion after another
    order_R = batch.completion_R.argsort(stable=True)
    tokens_2B = batch.lengths_S[sides_2B]
    end_2B = tokens_2B.cumsum(0)
    shift_2B = begin_S[sides_2B] - (end_2B - tokens_2B)
    token_R = order_R[torch.arange(int(tokens_2B.sum())) + shift_2B.repeat_interleave(tokens_2B)]
    device = logp_R.device
    return preference_loss(
        logp_R[token_R.to(device)],  # not index_select: this backward adds in one order on a GPU too
        F.pad(end_2B, (1, 0)).to(device),
        reference_S=reference_S[sides_2B].to(device),
        beta=config.loss.beta,
        loss=KERNEL_LOSSES[config.loss.name],
        label_smoothing=config.loss.label_smoothing,
        backend=config.kernels.backend,
    ).losses_B.cpu()


def means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics as means over pairs."""
    return {
        name: value / sums["weight"] for name, value in sums.items() if name not in ("weight", "tokens", "difference")
    }
