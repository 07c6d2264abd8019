"""Attention over packed preference trees: one place that knows which token sees which.

Letters: `T` tokens of a pack, `P` of a prompt, `L` of a branch, `N` heads, `G` kv heads, `H` head width, `Q` and `K`
blocks of BLOCK query and key tokens. Read next: models/decoder.py.

A pack is a row of tokens: a prefix that all its trees begin with (often none), then the trees, each a prompt followed
by its branches, then padding. Branches that begin alike may have that once, as a stem of theirs, and so on. A token
sees what it goes on from (prefix, prompt, stems) and its own run of tokens, up to its own position, and of these what
its layer's `Span` leaves: windows and chunks count positions, not places in the pack.

On the CPU each run is read some tokens at a time over (what it goes on from + itself): products whose shapes depend on
nothing else in the pack, which makes alone = packed = shuffled exact. On CUDA it is one flex_attention, under a block
mask.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from kernels.widened import exact, fast_products

SCORES = 2**16  # of a head that the CPU makes at a time: they stay in its caches
QUERIES = 64, 256  # whose they are, at least and at most
EVEN = 32, 64  # of which their products' rows and keys are multiples
BLOCK = 128  # tokens of flex_attention's blocks

Shape: TypeAlias = "int | tuple[int, tuple[Shape, ...]]"
"""Tokens of a branch; or of a prompt or stem, and the shapes of what goes on from it."""


class Layout(NamedTuple):
    """What stands where in a pack: tokens of the shared prefix, then the trees in order; the rest is padding."""

    prefix: int
    trees: tuple[Shape, ...]

    @property
    def tokens(self) -> int:
        """All but the padding."""
        return runs(self)[-1].seen[-1].stop


class Run(NamedTuple):
    """Tokens of a prefix, prompt, stem or branch, perhaps none."""

    seen: tuple[slice, ...]  # places in the pack of all that they see, in order, their own last
    last: int  # number of the last run that sees them

    @property
    def tokens(self) -> int:
        return self.seen[-1].stop - self.seen[-1].start

    @property
    def before(self) -> int:
        """How many tokens their first one sees beside itself."""
        return sum(place.stop - place.start for place in self.seen[:-1])


@lru_cache(maxsize=64)  # every layer of a pack asks again
def runs(layout: Layout) -> tuple[Run, ...]:
    """Of a pack in its order, so that those which see a run follow it, without a gap."""
    found: list[Run] = []

    def add(shape: Shape, before: tuple[slice, ...], at: int) -> int:
        own, rest = (shape, ()) if isinstance(shape, int) else shape
        number, end = len(found), at + own
        found.append(Run((*before, slice(at, end)), number))
        for part in rest:
            end = add(part, found[number].seen, end)
        found[number] = found[number]._replace(last=len(found) - 1)
        return end

    add(layout, (), 0)
    return tuple(found)


class Span(NamedTuple):
    """How far a layer looks back, in positions: the last `window` of them, itself included; only its own `chunk`."""

    window: int | None = None
    chunk: int | None = None


FULL = Span()


def tree_attention(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout, span: Span = FULL, sinks_N: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention of every token over what it sees, [T, N, H]; padding gives zeros.

    `sinks_N`: one more logit in each head's softmax, not scaled, of no value: the weights then sum to less than 1.
    """
    if q_TNH.is_cuda:
        return flex_trees(q_TNH, k_TGH, v_TGH, layout, span, sinks_N, _compiled_flex())
    assert layout.tokens <= len(q_TNH), f"trees of {layout.tokens} tokens in a pack of {len(q_TNH)}"
    return _ByRuns.apply(q_TNH, k_TGH, v_TGH, layout, span, sinks_N)


# --- run by run (CPU) -------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Queries of one call: where they stand and what they see, and what zeros fill their products up to."""

    own: slice  # places in the pack
    begin: int  # the first one's position
    end: int  # keys up to the last one
    rows: int
    keys: int
    many: bool  # rows, so that a compiled product pays, and in half precision one that may be rounded


def _blocks(seen: Sequence[slice], sinks: int) -> Iterator[_Block]:
    """Of a sequence, as many queries at a time as keep their scores in the caches; no few are left over."""
    own, keys = seen[-1], sum(place.stop - place.start for place in seen)
    size = min(max(SCORES // keys, QUERIES[0]), QUERIES[1])
    calls = -(-(own.stop - own.start) // size)
    starts = [*range(own.start, own.stop, _even(-(-(own.stop - own.start) // calls), EVEN[0]))]
    if len(starts) > 1 and own.stop - starts[-1] < QUERIES[0]:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], own.stop], strict=True):
        begin, end, many = keys - own.stop + start, keys - own.stop + stop, stop - start >= QUERIES[0]
        of_rows, of_keys = EVEN if many else (1, 1)
        yield _Block(slice(start, stop), begin, end, _even(stop - start, of_rows), _even(end + sinks, of_keys), many)


def _even(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _mask(block: _Block, keys: int, span: Span, dtype: torch.dtype) -> Tensor:
    """[queries, last keys], -inf where a block's queries don't see; keys before these they see."""
    if span == FULL:  # a piece of the same triangle wherever it stands
        most = sum(QUERIES)
        return _unseen(0, most, most + EVEN[1], FULL, dtype)[: block.end - block.begin, : keys - block.begin]
    return _unseen(block.begin, block.end, keys, span, dtype)


@lru_cache(maxsize=256)  # a pack's: every layer asks again; at 8,000 keys one takes 2 MB
def _unseen(begin: int, end: int, keys: int, span: Span, dtype: torch.dtype) -> Tensor:
    """[queries, keys], -inf where queries `begin` to `end` of a sequence don't see."""
    hidden = ~reaches(torch.arange(begin, end)[:, None], torch.arange(keys), span)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def reaches(query: Tensor, key: Tensor, span: Span) -> Tensor:
    """Whether a token at position `query` may see one at position `key` of its own sequence (they broadcast)."""
    sees = key <= query
    if span.window is not None:
        sees = sees & (query - key < span.window)
    if span.chunk is not None:
        sees = sees & (query // span.chunk == key // span.chunk)
    return sees


class _ByRuns(torch.autograd.Function):
    """softmax(scale QK') V for each block of queries, of all heads that read the same keys, and its backward by hand.

    Kept are queries, keys and values as they came: autograd would keep weights, and keys for each run that sees them.

    Backward, with P = softmax(scale QK'): dV = P'dO, dP = dO V', dS = P * (dP - sum(P * dP)), dQ = scale dS K and
    dK = scale dS'Q (arXiv 2205.14135, appendix B.4, which has sum(dO * O) for that sum). QK', PV and dO V' are in fp32;
    the other three, as on GPUs, in the dtype of the queries where there are many, and summed in fp32. oneDNN compiles
    and keeps each shape of a product: zeros fill them up to few.
    """

    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, sinks_N)
        ctx.layout, ctx.span, ctx.scale = layout, span, q_TNH.shape[-1] ** -0.5
        groups, sinks = k_TGH.shape[1], int(sinks_N is not None)
        out_TNH = torch.zeros_like(q_TNH)
        for seen in (run.seen for run in runs(layout) if run.tokens):
            k, v = (_of_keys(x_TGH, seen, sinks) for x_TGH in (k_TGH, v_TGH))
            for block in _blocks(seen, sinks):
                p = _weights(_by_groups(q_TNH[block.own], groups, block.rows), k, block, span, sinks_N)
                with fast_products(p.dtype, block.many):
                    out = p @ v[:, : block.keys]
                out_TNH[block.own] = _by_queries(out, block)
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TGH, v_TGH, sinks_N = ctx.saved_tensors
        groups, sinks, wide = k_TGH.shape[1], int(sinks_N is not None), exact(q_TNH.dtype)
        q_grad, sinks_grad = torch.zeros_like(q_TNH), q_TNH.new_zeros(q_TNH.shape[1], dtype=wide)
        k_grad, v_grad = (torch.zeros_like(x, dtype=wide) for x in (k_TGH, v_TGH))
        for seen in (run.seen for run in runs(ctx.layout) if run.tokens):
            k, v = (_of_keys(x_TGH, seen, sinks) for x_TGH in (k_TGH, v_TGH))
            low_k, k_own, v_own = k.to(q_TNH.dtype), torch.zeros_like(k), torch.zeros_like(v)
            for block in _blocks(seen, sinks):
                low, keys = q_TNH.dtype if block.many else wide, block.keys
                q, out_grad = (_by_groups(x[block.own].to(low), groups, block.rows) for x in (q_TNH, grad_TNH))
                p = _weights(q, k, block, ctx.span, sinks_N)
                with fast_products(low, block.many):
                    s_grad = (out_grad.to(wide) @ v[:, :keys].mT).mul_(p)
                    s_grad = s_grad.addcmul_(p, s_grad.sum(-1, keepdim=True), value=-1)
                    if sinks:
                        sinks_grad += s_grad[..., 0].unflatten(1, (block.rows, -1)).sum(1).flatten()
                    s_grad = s_grad.to(low)
                    v_own[:, :keys] += p.to(low).mT @ out_grad
                    k_own[:, :keys] += s_grad.mT @ q
                    of_q = s_grad @ (k if low == wide else low_k)[:, :keys]
                q_grad[block.own] = ctx.scale * _by_queries(of_q, block)
            sizes = [place.stop - place.start for place in seen]
            for total_TGH, of_own in ((k_grad, k_own), (v_grad, v_own)):
                for place, part in zip(seen, of_own[:, sinks : sinks + sum(sizes)].split(sizes, 1), strict=True):
                    total_TGH[place] += part.transpose(0, 1)
        of_sinks = sinks_grad.to(sinks_N.dtype) if sinks else None
        return q_grad, k_grad.mul_(ctx.scale).to(k_TGH.dtype), v_grad.to(v_TGH.dtype), None, None, of_sinks


def _of_keys(x_TGH: Tensor, places: Sequence[slice], sinks: int) -> Tensor:
    """[G, keys, H] of these places in fp32 (fp64), one after the other; before them zeros for a sink, and behind."""
    x_GKH = torch.cat([x_TGH[place] for place in places]).to(exact(x_TGH.dtype)).transpose(0, 1)
    return F.pad(x_GKH, (0, 0, sinks, -(sinks + x_GKH.shape[1]) % EVEN[1]))


def _weights(q_GRH: Tensor, k_GKH: Tensor, block: _Block, span: Span, sinks_N: Tensor | None) -> Tensor:
    """P of a block [G, rows x N / G, keys]; a sink is the first key, of no value."""
    with fast_products(q_GRH.dtype, block.many):
        scale, nothing = q_GRH.shape[-1] ** -0.5, k_GKH.new_zeros(())
        s = torch.baddbmm(nothing, q_GRH.to(k_GKH.dtype), k_GKH[:, : block.keys].mT, beta=0, alpha=scale)
    by_query, keys = s.unflatten(1, (block.rows, -1)), block.keys
    if sinks_N is not None:
        by_query[..., 0], keys = sinks_N.to(s.dtype).view(len(s), 1, -1), keys - 1
    mask = _mask(block, keys, span, s.dtype)
    by_query[:, : len(mask), :, -mask.shape[1] :].add_(mask[:, None])
    return s.softmax(-1)


def _by_groups(x_LNH: Tensor, groups: int, rows: int) -> Tensor:
    """[G, L x N / G, H] of [L, N, H]: the rows of all heads that read the same keys; zeros up to L = `rows`.

    Always a copy: products may differ in their last bits by where in memory their factors begin.
    """
    padded = F.pad(x_LNH, (0, 0, 0, 0, 0, rows - len(x_LNH)))
    return padded.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_queries(x_GRH: Tensor, block: _Block) -> Tensor:
    """[L, N, H], what _by_groups made of a block's."""
    return x_GRH.unflatten(1, (block.rows, -1))[:, : block.end - block.begin].transpose(0, 1).flatten(1, 2)


# --- one block mask a pack (CUDA) -------------------------------------------------------------------------------------


def flex_trees(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    layout: Layout,
    span: Span,
    sinks_N: Tensor | None,
    flex: Callable[..., tuple[Tensor, AuxOutput]],
) -> Tensor:
    """tree_attention by one `flex`_attention; a sink takes its part of the softmax afterwards, by the log-sum-exp."""
    mask = block_mask(layout, len(q_TNH), span, q_TNH.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TGH, v_TGH))
    out, aux = flex(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=sinks_N is not None))
    if sinks_N is not None:
        assert aux.lse is not None, "it was asked for"
        out = out * torch.sigmoid(aux.lse - sinks_N.to(aux.lse.dtype)[:, None])[..., None].to(out.dtype)
    return out[0].transpose(0, 1)


def token_places(layout: Layout, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(number of its run, of the last that sees it, position) of each of a pack's `tokens` [T]; none sees padding."""
    found, places = runs(layout), []
    for number, run in enumerate(found):
        places += [(number, run.last, run.before + i) for i in range(run.tokens)]
    places += [(len(found), -1, 0)] * (tokens - len(places))
    run_T, last_T, position_T = torch.tensor(places).T.contiguous()
    return run_T, last_T, position_T


@lru_cache(maxsize=16)  # every layer of a pack asks again, in the forward and, recomputed, in the backward
def block_mask(layout: Layout, tokens: int, span: Span, device: torch.device) -> BlockMask:
    """flex_attention's block mask of a pack, built BLOCK queries at a time: never [T, T] in full.

    Blocks whose tokens all see each other are marked full, so that the kernel evaluates no mask in them.
    """
    run_T, last_T, position_T = (x.to(device) for x in token_places(layout, tokens))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        shown = (run_T[k] <= run_T[q]) & (run_T[q] <= last_T[k])
        return shown & reaches(position_T[q], position_T[k], span)

    blocks = -(-tokens // BLOCK)
    every_K = torch.arange(blocks * BLOCK, device=device)
    some_QK = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    full_QK = torch.zeros_like(some_QK)
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    for block in range(blocks):
        q, k = every_K[block * BLOCK : (block + 1) * BLOCK, None], every_K[None]
        last = tokens - 1
        seen = sees(nothing, nothing, q.clamp(max=last), k.clamp(max=last)) & (q <= last) & (k <= last)
        seen_QK = seen.unflatten(1, (blocks, BLOCK)).transpose(0, 1).flatten(1)
        some_QK[block], full_QK[block] = seen_QK.any(1), seen_QK.all(1)
    partial, full = (_block_lists(marks) for marks in (some_QK & ~full_QK, full_QK))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens))


def _block_lists(marks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices with the marked first) of each query block's key blocks, int32 [1, 1, Q] and [1, 1, Q, K]."""
    order_QK = marks_QK.int().argsort(dim=1, descending=True, stable=True)
    return marks_QK.sum(1, dtype=torch.int32)[None, None], order_QK.int()[None, None]


@cache
def _compiled_flex() -> Callable[..., tuple[Tensor, AuxOutput]]:
    return torch.compile(flex_attention)
