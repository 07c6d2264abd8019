"""models/attention.py: who sees whom, by the branch path and by the block mask, against a mask written out in full."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from models.attention import BLOCK, FULL, Layout, Span, block_mask, tree_attention

SPANS = {
    "full": FULL,
    "window": Span(window=9),
    "chunk": Span(chunk=16),
    "both": Span(window=20, chunk=32),
    "window of one": Span(window=1),
}
LAYOUTS = {
    "one plain sequence": (Layout(0, ((300, ()),)), 300),
    "trees": (Layout(0, ((40, (30, 5, 0)), (1, (130,)), (20, ()))), 300),
    "a prefix": (Layout(33, ((40, (30, 5, 60)), (7, (1, 90)))), 384),
    "a prefix longer than a block": (Layout(150, ((10, (30, 5)), (7, (150, 20)))), 512),
    "a block that is padding alone": (Layout(0, ((50, (20, 20)),)), 384),
}


def dense_mask(layout: Layout, tokens: int, span: Span) -> torch.Tensor:
    """[T, T] by the words of the definition, token by token."""
    prefix = [("prefix", None, position) for position in range(layout.prefix)]
    who = list(prefix)
    for tree, (prompt, branches) in enumerate(layout.trees):
        who += [(tree, None, layout.prefix + i) for i in range(prompt)]
        for branch, size in enumerate(branches):
            who += [(tree, branch, layout.prefix + prompt + i) for i in range(size)]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q, (tree, branch, position) in enumerate(who):
        for k, (other_tree, other_branch, other_position) in enumerate(who):
            before = other_tree == "prefix" or (other_tree == tree and other_branch in (None, branch))
            near = span.window is None or position - other_position < span.window
            chunk = span.chunk is None or position // span.chunk == other_position // span.chunk
            mask[q, k] = before and other_position <= position and near and chunk
    return mask


@pytest.fixture(params=LAYOUTS)
def pack(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=SPANS)
def span(request):
    return SPANS[request.param]


def vectors(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, heads, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2))


def dense_attention(q, k, v, mask):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return out.masked_fill(~mask.any(1)[:, None, None], 0.0)


def test_the_branch_path_equals_attention_under_the_dense_mask_in_values_and_gradients(pack, span):
    layout, tokens = pack
    mask = dense_mask(layout, tokens, span)
    upstream = torch.randn(tokens, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attend in (lambda *x: tree_attention(*x, layout, span), lambda *x: dense_attention(*x, mask)):
        inputs = [x.requires_grad_() for x in vectors(tokens)]
        out = attend(*inputs)
        (out * upstream).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, dense in zip(*results, strict=True):
        assert (ours - dense).abs().max() <= 100 * torch.finfo(torch.float64).eps * max(1.0, dense.abs().max())


def test_the_block_mask_names_exactly_the_blocks_of_the_dense_mask(pack, span):
    layout, tokens = pack
    dense = dense_mask(layout, tokens, span)
    blocks = -(-tokens // BLOCK)
    padded = F.pad(dense, (0, blocks * BLOCK - tokens) * 2)
    in_blocks = padded.unflatten(0, (blocks, BLOCK)).unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(2)
    mask = block_mask(layout, tokens, span, torch.device("cpu"))
    for number, indices, expected in (
        (mask.kv_num_blocks, mask.kv_indices, in_blocks.any(-1) & ~in_blocks.all(-1)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, in_blocks.all(-1)),
    ):
        for q in range(blocks):
            assert set(indices[0, 0, q, : number[0, 0, q]].tolist()) == set(expected[q].nonzero()[:, 0].tolist())
    every = torch.arange(tokens)
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), every[:, None], every[None]), dense)


def test_the_gradients_blocks_are_the_same_ones_seen_from_the_keys(pack, span):
    """flex_attention's backward walks the transposed lists, which BlockMask derives from ours."""
    layout, tokens = pack
    mask = block_mask(layout, tokens, span, torch.device("cpu"))
    for kv_number, kv, q_number, q in (
        (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        blocks = range(kv.shape[2])
        forward = {(i, j) for i in blocks for j in kv[0, 0, i, : kv_number[0, 0, i]].tolist()}
        assert forward == {(i, j) for j in blocks for i in q[0, 0, j, : q_number[0, 0, j]].tolist()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_under_the_block_mask_equals_the_branch_path(name):
    """Its forward alone: on the CPU it has no backward."""
    layout, tokens = LAYOUTS[name]
    q, k, v = vectors(tokens, torch.float32)
    mask = block_mask(layout, tokens, FULL, torch.device("cpu"))
    flex = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True)
    truth = dense_attention(*(x.double() for x in (q, k, v)), dense_mask(layout, tokens, FULL))
    branches = tree_attention(q, k, v, layout)
    error = (flex[0].transpose(0, 1).double() - truth).abs().max()
    assert error <= 2 * (branches.double() - truth).abs().max()


def test_windows_and_chunks_count_positions_so_a_branch_sees_what_it_would_alone(span):
    """A token late in the pack, of a branch that follows others, has the values of a plain sequence's token."""
    layout = Layout(12, ((30, (25, 40, 25)),))
    q, k, v = vectors(12 + 30 + 90)
    packed = tree_attention(q, k, v, layout, span)[-25:]
    rows = [*range(42), *range(107, 132)]
    alone = tree_attention(q[rows], k[rows], v[rows], Layout(0, ((67, ()),)), span)[-25:]
    assert (packed - alone).abs().max() <= 100 * torch.finfo(torch.float64).eps


def test_random_layouts_agree_with_the_dense_mask():
    draw = random.Random(0)
    for _ in range(20):
        trees = tuple(
            (draw.randint(1, 60), tuple(draw.randint(0, 40) for _ in range(draw.randint(0, 4)))) for _ in range(3)
        )
        layout = Layout(draw.choice([0, 1, 40]), trees)
        tokens = layout.prefix + sum(prompt + sum(branches) for prompt, branches in trees) + draw.randint(0, 100)
        span = Span(draw.choice([None, 5, 50]), draw.choice([None, 16]))
        mask = block_mask(layout, tokens, span, torch.device("cpu"))
        every = torch.arange(tokens)
        dense = dense_mask(layout, tokens, span)
        assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), every[:, None], every[None]), dense)
