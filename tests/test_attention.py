"""models/attention.py: who sees whom, by the branch path and by the block mask, against a mask written out in full."""

import random

import pytest
import torch
import torch.nn.functional as F
from products import Products
from torch.nn.attention.flex_attention import flex_attention

from models.attention import BLOCK, FULL, QUERIES, Layout, Span, _blocks, block_mask, flex_trees, tree_attention

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
    "more queries than a call takes": (Layout(5, ((sum(QUERIES) + 6, (sum(QUERIES) + 14, 3)),)), 704),
    "a block that is padding alone": (Layout(0, ((50, (20, 20)),)), 384),
    "stems": (Layout(4, ((40, ((30, (5, (25, (9, 0, 70)), 0)), 12)), (20, ((8, (3, 4)), (0, (2, 2)))), (9, ()))), 320),
}


def dense_mask(layout: Layout, tokens: int, span: Span) -> torch.Tensor:
    """[T, T] by the words of the definition, token by token."""
    who: list[tuple[tuple[int, ...], int]] = []  # the way from the prefix to the token's run, and its position

    def add(shape, way: tuple[int, ...], begin: int) -> None:
        own, rest = (shape, ()) if isinstance(shape, int) else shape
        who.extend((way, begin + i) for i in range(own))
        for number, part in enumerate(rest):
            add(part, (*way, number), begin + own)

    add(layout, (), 0)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q, (way, position) in enumerate(who):
        for k, (other_way, other_position) in enumerate(who):
            before = way[: len(other_way)] == other_way
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


def dense_attention(q, k, v, mask, sinks=None):
    if sinks is not None:  # the definition: a softmax over the scores and the sink, whose weight is dropped
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
        scores = torch.cat([scores.masked_fill(~mask, -torch.inf), sinks[:, None, None].expand(-1, len(q), 1)], -1)
        out = torch.einsum("nqk,knh->qnh", scores.softmax(-1)[..., :-1], v)
        return out.masked_fill(~mask.any(1)[:, None, None], 0.0)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return out.masked_fill(~mask.any(1)[:, None, None], 0.0)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_branch_path_equals_attention_under_the_dense_mask_in_values_and_gradients(pack, span, has_sinks):
    layout, tokens = pack
    sinks = [torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)] if has_sinks else []
    mask = dense_mask(layout, tokens, span)
    upstream = torch.randn(tokens, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attend in (
        lambda q, k, v, *sinks: tree_attention(q, k, v, layout, span, *sinks),
        lambda q, k, v, *sinks: dense_attention(q, k, v, mask, *sinks),
    ):
        inputs = [x.clone().requires_grad_() for x in (*vectors(tokens), *sinks)]
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


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_under_the_block_mask_equals_the_branch_path(name, sinks):
    """Its forward alone: on the CPU it has no backward."""
    layout, tokens = LAYOUTS[name]
    span = FULL if sinks is None else SPANS["window"]
    q, k, v = vectors(tokens, torch.float32)
    flex = flex_trees(q, k, v, layout, span, sinks, flex_attention)
    exact_sinks = None if sinks is None else sinks.double()
    truth = dense_attention(*(x.double() for x in (q, k, v)), dense_mask(layout, tokens, span), exact_sinks)
    branches = tree_attention(q, k, v, layout, span, sinks)
    assert (flex.double() - truth).abs().max() <= 2 * (branches.double() - truth).abs().max()


@pytest.mark.parametrize("spread", [1, 3])
def test_errors_in_bf16_are_at_most_those_of_torchs_own_attention(spread):
    """Of the result and of all gradients, against fp64 on the same bf16 numbers; a wider spread: peaked weights."""
    q, k, v = (x.bfloat16() for x in vectors(600, torch.float32))
    upstream = torch.randn(600, 4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    layout = Layout(0, ((600, ()),))
    mask = dense_mask(layout, 600, FULL)

    def of(attend, dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (spread * q, spread * k, v)]
        out = attend(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, upstream.to(dtype)))]

    torchs, branches = (lambda *x: dense_attention(*x, mask)), (lambda *x: tree_attention(*x, layout))
    of_truth, of_torch, of_branches = (
        of(torchs, torch.float64),
        of(torchs, torch.bfloat16),
        of(branches, torch.bfloat16),
    )
    for truth, theirs, ours in zip(of_truth, of_torch, of_branches, strict=True):
        assert (ours - truth).norm() <= (theirs - truth).norm()
        assert (ours - truth).norm() <= torch.finfo(torch.bfloat16).eps / 2 * truth.norm()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0]).bfloat16()], ids=["", "sinks"])
def test_compiled_products_have_few_shapes_for_each_is_kept(sinks):
    shapes = set()
    q, k, v = (x.bfloat16().requires_grad_() for x in vectors(1400, torch.float32))
    with Products(lambda a, b, compiled: compiled and shapes.add((*a.shape, b.shape[2]))):
        for tokens in range(1, 1400, 53):
            layout = Layout(0, ((tokens // 3, (tokens // 2, tokens // 7)),))
            tree_attention(q, k, v, layout, FULL, sinks).sum().backward()
    rows, keys = {2 * rows for rows in range(64, 321, 32)}, set(range(64, 1400, 64))
    assert shapes and all({*shape[1:]} & rows and set(shape[1:]) <= rows | keys | {16} for shape in shapes)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0]).bfloat16()], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_onednn_rounds_to_bf16_it_is_given_numbers_that_lose_nothing(monkeypatch, dtype, sinks):
    monkeypatch.setattr("kernels.widened._rounds_to_bf16", lambda: True)
    fast = []

    def seen(a, b, compiled):
        if compiled:
            assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in (a, b))
            fast.append(a.dtype)

    q, k, v = (x.to(dtype).requires_grad_() for x in vectors(600, torch.float32))
    with Products(seen):
        tree_attention(q, k, v, Layout(10, ((150, (200, 5, 90)),)), FULL, sinks).square().sum().backward()
    assert set(fast) == ({torch.float32, torch.bfloat16} if dtype == torch.bfloat16 else set())


def test_no_few_queries_are_left_over_and_a_call_has_at_most_what_the_mask_covers():
    for before in range(0, 3000, 37):
        for tokens in (1, 63, 64, 65, 300, 333, 1023):
            sizes = [
                block.end - block.begin for block in _blocks([slice(0, before), slice(before, before + tokens)], 0)
            ]
            assert sum(sizes) == tokens and max(sizes) <= sum(QUERIES)
            assert min(sizes) >= QUERIES[0] or len(sizes) == 1


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

        def shape(depth: int):
            if depth == 0 or draw.random() < 0.3:
                return draw.randint(0, 40)
            return draw.randint(0, 40), tuple(shape(depth - 1) for _ in range(draw.randint(0, 4)))

        layout = Layout(draw.choice([0, 1, 40]), tuple(shape(3) for _ in range(2)))
        tokens = layout.tokens + draw.randint(1, 100)
        span = Span(draw.choice([None, 5, 50]), draw.choice([None, 16]))
        mask = block_mask(layout, tokens, span, torch.device("cpu"))
        every = torch.arange(tokens)
        dense = dense_mask(layout, tokens, span)
        assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), every[:, None], every[None]), dense)
