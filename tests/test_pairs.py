"""dpo/pairs.py: what a loss is given of a pair: tails, twins, what the rows say of it; from packs and store alike."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_exactness import ALONE, CONFIG, model, random_tree
from test_trees import build_trees

from dpo.config import LossConfig
from dpo.logprobs import batch_logps, batch_sums, score_trees, tail_sums
from dpo.losses import desensitised, pair_losses, swap_penalty
from dpo.packing import bare_batch, pack_trees
from dpo.pairs import batch_references, pair_logps, reference_sums, tree_sums
from dpo.rows import PairValues, Row
from models.tokenizer import load_tokenizer

LD = LossConfig(ld_alpha=0.25)
TREES = [random_tree(seed) for seed in range(10)]


def test_a_tail_is_what_lies_beyond_the_other_sides_length():
    logp_R = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
    completion_R = torch.tensor([1, 1, 1, 0, 2, 2])  # tokens lie in the order of packs, not of completions
    sides_2B = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0])  # pairs 0-1, 1-0, 2-1, 0-0
    assert tail_sums(logp_R, completion_R, sides_2B, 3).tolist() == [0, 6, 0, 0, 6, 0, 4, 0]


def test_desensitised_sums_weigh_the_tail_by_alpha_in_policy_and_reference_alike():
    tree = next(tree for tree in TREES if len({len(c.targets) for c in tree.completions}) > 1)
    draw = random.Random(0)
    logps, reference = (
        [np.array([-draw.random() for _ in completion.targets]) for completion in tree.completions] for _ in range(2)
    )
    whole = pair_logps(tree_sums(logps, tree, LD), tree_sums(reference, tree, LD), bare_batch({0: tree}))
    short = desensitised(whole, 0.25)
    for b, pair in enumerate(tree.pairs):
        shared = min(len(logps[pair.winner]), len(logps[pair.loser]))
        for ours, side, values in (
            (short.chosen_B, pair.winner, logps),
            (short.rejected_B, pair.loser, logps),
            (short.reference_chosen_B, pair.winner, reference),
            (short.reference_rejected_B, pair.loser, reference),
        ):
            expected = sum(values[side][:shared]) + 0.25 * sum(values[side][shared:])
            assert ours[b].item() == pytest.approx(expected, rel=64 * np.finfo(float).eps)
    assert any((getattr(short, name) != getattr(whole, name)).any() for name in ("chosen_B", "rejected_B"))
    losses_B = pair_losses(whole, LD)
    assert torch.equal(losses_B, pair_losses(replace(short, tails_4B=None), LossConfig()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tails_from_packs_have_the_bits_of_tails_from_the_store(tiny_folder, dtype):
    """So that step 0 is exact under LD-DPO too, with the reference's values scored in other packs."""
    decoder = model(tiny_folder, dtype)
    stored = score_trees(decoder, TREES[::-1], CONFIG.pack, ALONE, "test")[::-1]
    references = [tree_sums(logps, tree, LD) for logps, tree in zip(stored, TREES, strict=True)]
    nonzero = 0
    for batch in pack_trees(TREES, CONFIG.pack.tokens):
        logp_R = batch_logps(decoder, batch, CONFIG.pack.head_chunk)
        sums = batch_sums(logp_R, batch, tails=True)
        assert torch.equal(sums, batch_references(references, batch))
        assert len(sums) == len(batch.completions) + 2 * len(batch.weight_B)
        assert torch.equal(sums[: len(batch.completions)], batch_sums(logp_R, batch))  # the plain sums are as they were
        nonzero += int((sums[len(batch.completions) :] != 0).sum())
    assert nonzero > 5


def test_references_of_a_batch_are_its_trees_own_with_and_without_tails():
    references = [torch.arange(len(tree.completions), dtype=torch.float64) + 100 * i for i, tree in enumerate(TREES)]
    tailed = [
        torch.cat([one, torch.arange(2.0 * len(tree.pairs), dtype=torch.float64) - 1000 * (i + 1)])
        for i, (one, tree) in enumerate(zip(references, TREES, strict=True))
    ]
    for batch in pack_trees(TREES, 128):
        expected = [100 * tree + completion for tree, completion in batch.completions]
        assert batch_references(references, batch).tolist() == expected
        members = list(dict.fromkeys(tree for tree, _ in batch.completions))
        pairs = [(tree, place) for tree in members for place in range(len(TREES[tree].pairs))]
        winners = [place - 1000 * (tree + 1) for tree, place in pairs]
        losers = [len(TREES[tree].pairs) + place - 1000 * (tree + 1) for tree, place in pairs]
        assert batch_references(tailed, batch).tolist() == expected + winners + losers


# --- what rows say --------------------------------------------------------------------------------------------------

VALUES = (PairValues(2.0, 0.5, 0.9), PairValues(1.0, 0.0, 1.0), PairValues(0.25, -1.0, 0.5))
ROW = Row("r", "s", ({"role": "user", "content": "Say a"},), ("a",), ("b", "c", "d"), "g", pair_values=VALUES)


@pytest.mark.parametrize("objective", ["verdicts", "responses"])
def test_weight_margin_and_soft_label_reach_the_loss_in_every_order(tiny_folder, objective):
    tokenizer = load_tokenizer(tiny_folder)
    plain = replace(ROW, id="plain", pair_values=())
    trees = build_trees(
        [ROW, plain], tokenizer, objective=objective, pairs_per_row=0, pair_weight="row", pack_tokens=1024
    )
    orders = 2 if objective == "verdicts" else 1
    batch = bare_batch(dict(enumerate(trees)))
    share = 1 / (3 * orders)
    assert batch.weight_B.tolist() == [v.weight * share for v in VALUES for _ in range(orders)] + [share] * 3 * orders
    assert batch.margin_B.tolist() == [v.margin for v in VALUES for _ in range(orders)] + [0.0] * 3 * orders
    assert batch.soft_label_B.tolist() == [v.soft_label for v in VALUES for _ in range(orders)] + [1.0] * 3 * orders


def test_a_twin_is_the_same_pair_in_the_other_order_and_a_response_has_none(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    rows = [ROW, replace(ROW, id="other", rejected=("b",), pair_values=())]
    for objective, expected in (("verdicts", [1, 0, 3, 2, 5, 4, 7, 6]), ("responses", [0, 1, 2, 3])):
        trees = build_trees(rows, tokenizer, objective=objective, pairs_per_row=0, pair_weight="pair", pack_tokens=1024)
        assert bare_batch(dict(enumerate(trees))).twin_B.tolist() == expected
        (packed,) = pack_trees(trees, 4096)
        assert packed.twin_B.tolist() == expected


def test_the_swap_penalty_is_zero_for_a_judge_without_position_bias_and_grows_with_its_square(tiny_folder):
    """Log-odds of A are bias + right where A is right, bias - right where B is: 4 bias^2, whatever the reference's."""
    tokenizer = load_tokenizer(tiny_folder)
    (tree,) = build_trees([ROW], tokenizer, objective="verdicts", pairs_per_row=1, pair_weight="pair", pack_tokens=1024)
    batch = bare_batch({0: tree})
    reference = reference_sums([np.array([-float(c)]) for c in range(4)])
    for right, bias in ((0.5, 0.0), (0.5, 1.5), (-2.0, -1.5)):
        odds = (bias + right, bias - right)  # of "A", chosen first and chosen second
        logps = [np.array([one]) for odd in odds for one in (-1.0 + odd, -1.0)]
        seen = pair_logps(reference_sums(logps), reference, batch)
        assert swap_penalty(seen).tolist() == pytest.approx([4 * bias**2] * 2, abs=1e-12)
        added = pair_losses(seen, LossConfig(swap_consistency=0.5)) - pair_losses(seen, LossConfig())
        assert added.tolist() == pytest.approx([2 * bias**2] * 2, abs=1e-12)
        chosen_B = seen.chosen_B.requires_grad_()
        (slope_B,) = torch.autograd.grad(swap_penalty(seen).sum(), chosen_B)
        assert slope_B.tolist() == pytest.approx([8 * bias, -8 * bias], abs=1e-12)  # both orders move, m - m' = 2 bias
