"""The exactness that the design rests on: packed = one at a time, alone = packed = shuffled, split = whole."""

import random

import numpy as np
import pytest
import torch

from dpo.config import Config
from dpo.distributed import Ranks
from dpo.logprobs import batch_logps, batch_sums, score_trees
from dpo.losses import pair_losses
from dpo.packing import pack_trees
from dpo.pairs import PairLogps, reference_sums
from dpo.step import accumulate_gradients
from dpo.trees import Completion, Pair, Stem, Tree, find_stems
from models.decoder import Decoder, load_decoder, next_token_logits
from models.errors import UserError
from models.tiny import FAMILIES, write_tiny_model

ALONE = Ranks(0, 1, torch.device("cpu"))
CONFIG = Config(exp="test", pack={"tokens": 256, "head_chunk": 16})

PREFIXES = ((), tuple(range(1, 20)), tuple(range(2, 21)))  # trees with the same one share it in a pack


def random_tree(seed: int) -> Tree:
    """A tree of 1 to 4 branches, one-token answers, answers scored only at their end, and stems in stems among them."""
    draw = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(259) for _ in range(n))

    stems = (), tokens(9)
    stems = (*stems, stems[1] + tokens(4))
    branches = tuple(
        (draw.choice(stems) + tokens(draw.choice([0, 1, 5, 17, 40])))[:40] for _ in range(draw.randint(1, 4))
    )
    completions: list[Completion] = []
    for b, branch in enumerate(branches):
        if draw.random() < 0.5:
            completions.append(Completion(b, 0, (*branch, draw.randrange(259))))
        else:
            completions += [Completion(b, len(branch), tokens(1)), Completion(b, len(branch), tokens(1))]
    while len(completions) < 2:
        completions.append(Completion(0, 0, tokens(1)))
    pairs = tuple(Pair(i, i + 1, draw.choice([1.0, 0.5])) for i in range(len(completions) - 1))
    prompt = tokens(draw.randint(1, 60))
    prefix = draw.choice(PREFIXES)
    found = find_stems(branches, least=1)
    return Tree(f"t{seed}", prefix + prompt, branches, tuple(completions), pairs, len(prefix), found)


def model(folder, dtype: torch.dtype, trains: bool = False) -> Decoder:
    weights = dtype if not trains else torch.promote_types(dtype, torch.float32)
    return load_decoder(folder, weight_dtype=weights, compute_dtype=dtype).requires_grad_(trains)


def one_at_a_time(decoder: Decoder, tree: Tree) -> torch.Tensor:
    """The oracle: every completion as a plain sequence of its own, the whole logits, no packing and no chunks."""
    sums = []
    for completion in tree.completions:
        sequence = [*tree.prompt, *tree.branches[completion.branch][: completion.start], *completion.targets]
        logits = next_token_logits(decoder, sequence)
        first = len(sequence) - len(completion.targets)
        logp = logits.log_softmax(-1)[range(first - 1, len(sequence) - 1), sequence[first:]]
        sums.append(logp.sum())
    return torch.stack(sums)


@pytest.mark.parametrize(("family", "pack_tokens"), [("llama", 128), *((family, 256) for family in FAMILIES)])
def test_packed_trees_equal_one_sequence_at_a_time_in_values_and_gradients(tmp_path, family, pack_tokens):
    """Windows, chunks and temperatures count positions: a branch has its own, wherever it stands in the pack."""
    write_tiny_model(tmp_path, family=family)
    trees = [random_tree(seed) for seed in range(6)]
    weights = torch.randn(
        sum(len(t.completions) for t in trees), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    results = []
    for packed in (True, False):
        decoder = model(tmp_path, torch.float64, trains=True)
        sums: dict[tuple[int, int], torch.Tensor] = {}
        if packed:
            for batch in pack_trees(trees, pack_tokens):
                sums.update(zip(batch.completions, batch_sums(batch_logps(decoder, batch, 16), batch), strict=True))
        else:
            for i, tree in enumerate(trees):
                sums.update({(i, c): value for c, value in enumerate(one_at_a_time(decoder, tree))})
        values = torch.stack([sums[key] for key in sorted(sums)])
        (values * weights).sum().backward()
        results.append((values.detach(), {n: p.grad for n, p in decoder.named_parameters()}))
    (packed_values, packed_grads), (values, grads) = results
    tolerance = 1000 * torch.finfo(torch.float64).eps  # sums over some hundred tokens and 2 layers, in another order
    assert (packed_values - values).abs().max() <= tolerance * values.abs().max()
    for name, grad in grads.items():
        assert (packed_grads[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alone_packed_and_shuffled_agree_bit_for_bit_at_fixed_shape(tiny_folder, dtype):
    decoder = model(tiny_folder, dtype)
    trees = [random_tree(seed) for seed in range(12)]
    packed = score_trees(decoder, trees, CONFIG.pack, ALONE, "test")
    order = random.Random(1).sample(range(12), 12)
    shuffled = score_trees(decoder, [trees[i] for i in order], CONFIG.pack, ALONE, "test")
    for i, tree in enumerate(trees):
        for a, b, c in zip(
            packed[i],
            score_trees(decoder, [tree], CONFIG.pack, ALONE, "test")[0],
            shuffled[order.index(i)],
            strict=True,
        ):
            assert np.array_equal(a, b) and np.array_equal(a, c)


def test_alone_and_packed_agree_bit_for_bit_on_the_real_model(smollm2_folder):
    """bf16, the demo model: what the reference store relies on."""
    decoder = model(smollm2_folder, torch.bfloat16)
    trees = [random_tree(seed) for seed in range(3)]
    packed = score_trees(decoder, trees, CONFIG.pack, ALONE, "test")
    for tree, expected in zip(trees, packed, strict=True):
        assert all(map(np.array_equal, score_trees(decoder, [tree], CONFIG.pack, ALONE, "test")[0], expected))


def test_weights_that_are_not_finite_are_named(tiny_folder):
    decoder = model(tiny_folder, torch.float32)
    decoder.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="^reference: log-probs are nan or inf; check the weights"):
        score_trees(decoder, [random_tree(0)], CONFIG.pack, ALONE, "reference")


@pytest.mark.parametrize("stems", [(), ((Stem(0, 2),), (Stem(0, 2),), (), ())], ids=["", "stems"])
def test_a_branch_is_worth_the_same_whatever_other_branches_its_tree_has(tiny_folder, stems):
    """By the same stems, which are part of its address."""
    decoder = model(tiny_folder, torch.bfloat16)
    branches = ((1, 2, 3), (1, 2), (4, 5), ())
    answers = tuple(Completion(b, 0, (*branch, 2)) for b, branch in enumerate(branches))
    tree = Tree("t", tuple(range(20)), branches, answers, (), stems=stems)
    whole = score_trees(decoder, [tree], CONFIG.pack, ALONE, "test")[0]
    for c, completion in enumerate(tree.completions):
        own, scored = tree.branches[completion.branch], Completion(0, 0, completion.targets)
        single = Tree("s", tree.prompt, (own,), (scored,), (), stems=stems[c : c + 1])
        assert single.key(0) == tree.key(c)
        assert np.array_equal(score_trees(decoder, [single], CONFIG.pack, ALONE, "test")[0][0], whole[c])


def test_a_tree_larger_than_a_pack_is_split_and_scores_the_same(tiny_folder):
    decoder = model(tiny_folder, torch.float64)
    draw = random.Random(5)
    branches = tuple(tuple(draw.randrange(259) for _ in range(60)) for _ in range(7))
    tree = Tree(
        "big",
        tuple(range(40)),
        branches,
        tuple(Completion(b, 0, (*t, 2)) for b, t in enumerate(branches)),
        (Pair(0, 6, 1.0),),
    )
    batches = pack_trees([tree], 256)
    assert len(batches) == 1 and len(batches[0].packs) == 3
    split, whole = (
        batch_sums(batch_logps(decoder, batch, 16), batch) for batch in (batches[0], *pack_trees([tree], 512))
    )
    assert (split - whole).abs().max() <= 1000 * torch.finfo(torch.float64).eps * whole.abs().max()


def test_every_completion_stands_in_exactly_one_batch_and_pairs_do_not_cross_batches():
    trees = [random_tree(seed) for seed in range(40)]
    batches = pack_trees(trees, 128)
    seen = [completion for batch in batches for completion in batch.completions]
    assert sorted(seen) == [(i, c) for i, tree in enumerate(trees) for c in range(len(tree.completions))]
    assert sum(len(batch.weight_B) for batch in batches) == sum(len(tree.pairs) for tree in trees)
    for batch in batches:
        scored = torch.cat([pack.completion_R for pack in batch.packs]).bincount(minlength=len(batch.completions))
        assert torch.equal(scored, batch.lengths_S)
        assert all(len(pack.tokens_T) == 128 for pack in batch.packs)


@pytest.mark.parametrize("head_trains", [True, False])
def test_the_gradient_is_the_mean_over_pairs_whatever_the_split_into_packs_and_ranks(
    tiny_folder, monkeypatch, head_trains
):
    monkeypatch.setattr("dpo.step.total", lambda sums, ranks: sums)  # the other ranks' figures are not asked for here
    trees = [random_tree(seed) for seed in range(8)]
    gradients = []
    for pack_tokens, world in ((1024, 1), (128, 1), (256, 3)):
        decoder = model(tiny_folder, torch.float64, trains=True)
        decoder.model.embed_tokens.weight.requires_grad_(head_trains)
        config = CONFIG.model_copy(update={"pack": CONFIG.pack.model_copy(update={"tokens": pack_tokens})})
        scored = score_trees(decoder, trees, config.pack, ALONE, "test")
        references = [reference_sums(logps) + 0.5 * i for i, logps in enumerate(scored)]
        for rank in range(world):  # ranks one after another, gradients summed as reduce-scatter would
            accumulate_gradients(decoder, trees, references, config, Ranks(rank, world, torch.device("cpu")))
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1000 * torch.finfo(torch.float64).eps * gradients[0].norm()


def test_swapping_winner_and_loser_negates_the_margin_and_mirrors_the_loss():
    generator = torch.Generator().manual_seed(0)
    win, lose, ref_win, ref_lose = torch.randn(4, 9, generator=generator, dtype=torch.float64) * 20
    ones = torch.ones(9)
    one, other = (
        PairLogps(win, lose, ref_win, ref_lose, ones, ones),
        PairLogps(lose, win, ref_lose, ref_win, ones, ones),
    )
    difference = pair_losses(one, CONFIG.loss) - pair_losses(other, CONFIG.loss)
    margin = CONFIG.loss.beta * ((win - ref_win) - (lose - ref_lose))
    assert torch.allclose(difference, -margin, rtol=1e-12, atol=1e-12)
