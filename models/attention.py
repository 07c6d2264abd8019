"""Attention over packed preference trees: one place that knows which token sees which.

Letters: `T` tokens of a pack, `P` of a prompt, `L` of a branch, `N` heads, `G` kv heads, `H` head width, `Q` and `K`
blocks of BLOCK query and key tokens. Read next: models/decoder.py.

A pack is a row of tokens: a prefix that all its trees begin with (often none), then the trees, each a prompt followed
by its branches, then padding. A token sees the prefix, its tree's prompt and its own branch, up to its own position,
and of these what its layer's `Span` leaves: windows and chunks count positions, not places in the pack.

On the CPU each prompt and branch is read QUERIES tokens at a time over (prefix + prompt + itself): calls whose shapes
depend on nothing else in the pack, which makes alone = packed = shuffled exact. On CUDA it is one flex_attention,
under a block mask.
"""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

QUERIES = 128  # of one call on the CPU: their scores stay in its caches
EVEN = 32, 64  # of which rows and keys of the backward's products in bf16 are multiples
BLOCK = 128  # tokens of flex_attention's blocks
PREFIX, PADDING = -1, -2  # in place of a tree's number
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

TreeShape = tuple[int, tuple[int, ...]]  # (prompt tokens after the prefix, tokens of each branch)


class Layout(NamedTuple):
    """What stands where in a pack: tokens of the shared prefix, then the trees in order; the rest is padding."""

    prefix: int
    trees: tuple[TreeShape, ...]

    @property
    def tokens(self) -> int:
        """All but the padding."""
        return self.prefix + sum(prompt + sum(branches) for prompt, branches in self.trees)


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
    return _ByBranches.apply(q_TNH, k_TGH, v_TGH, layout, span, sinks_N)


# --- branch by branch (CPU) -------------------------------------------------------------------------------------------


def _sequences(layout: Layout) -> Iterator[list[slice]]:
    """Each prefix, prompt and branch as the places of what its tokens see, in order, its own last."""
    seen = [slice(0, layout.prefix)]
    yield seen
    at = layout.prefix
    for prompt, branches in layout.trees:
        seen = [slice(0, layout.prefix), slice(at, at + prompt)]
        yield seen
        at += prompt
        for branch in branches:
            yield [*seen, slice(at, at + branch)]
            at += branch


def _blocks(seen: list[slice]) -> Iterator[tuple[slice, int, int]]:
    """Of a sequence QUERIES tokens at a time: places in the pack, the first one's position, the keys up to the last."""
    *others, own = seen
    shift = sum(place.stop - place.start for place in others) - own.start
    for start in range(own.start, own.stop, QUERIES):
        stop = min(start + QUERIES, own.stop)
        yield slice(start, stop), start + shift, stop + shift


@lru_cache(maxsize=256)  # a pack's: every layer asks again; one may take a quarter of a MB
def _hidden(begin: int, end: int, keys: int, span: Span) -> Tensor:
    """[queries, last keys], True where queries `begin` to `end` of a sequence don't see; keys before these they see."""
    first = begin if span == FULL else 0
    return ~reaches(torch.arange(begin, end)[:, None], torch.arange(first, keys), span)


def reaches(query: Tensor, key: Tensor, span: Span) -> Tensor:
    """Whether a token at position `query` may see one at position `key` of its own sequence (they broadcast)."""
    sees = key <= query
    if span.window is not None:
        sees = sees & (query - key < span.window)
    if span.chunk is not None:
        sees = sees & (query // span.chunk == key // span.chunk)
    return sees


class _ByBranches(torch.autograd.Function):
    """A call of what SDPA runs on the CPU for each block of queries, in fp32 (fp64 in fp64), and its backward by hand.

    That kernel is slower in bf16, on branches of a few tokens by half. Of a pack are kept queries, keys and values as
    they came and the log-sum-exp. Autograd would keep fp32 copies, a prompt's keys once for each branch.

    Backward, with P = exp(scale QK' - lse): dV = P'dO, dP = dO V', dS = P * (dP - sum(P * dP)), dQ = scale dS K and
    dK = scale dS'Q (arXiv 2205.14135, appendix B.4, which has sum(dO * O) for that sum). P is divided by its sum, or an
    error of the log-sum-exp moves all of a row. QK' and dO V' are multiplied in fp32; the other three, as on GPUs, in
    the dtype of the queries where there are many, in bf16 at some four times the rate, and summed in fp32. The library
    compiles and keeps each shape of a product in bf16: zeros fill them up to few.
    """

    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        exact, scale = torch.promote_types(q_TNH.dtype, torch.float32), q_TNH.shape[-1] ** -0.5
        out_TNH, lse_TN = torch.zeros_like(q_TNH), q_TNH.new_zeros(q_TNH.shape[:2], dtype=exact)
        for seen in _sequences(layout):
            k, v = (_by_heads(x_TGH, seen, exact)[None] for x_TGH in (k_TGH, v_TGH))
            for own, begin, end in _blocks(seen):
                q, hidden = _by_heads(q_TNH, [own], exact)[None], _hidden(begin, end, end, span)
                mask = q.new_zeros(end - begin, end)
                mask[:, -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
                out, lse = FLASH(q, k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale)
                lse_TN[own] = lse[0].T
                kept = 1.0 if sinks_N is None else _kept(lse_TN[own], sinks_N)[..., None]
                out_TNH[own] = kept * out[0].transpose(0, 1)
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, sinks_N, lse_TN)
        ctx.layout, ctx.span, ctx.scale = layout, span, scale
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TGH, v_TGH, sinks_N, lse_TN = ctx.saved_tensors
        exact, groups = lse_TN.dtype, k_TGH.shape[1]
        kept_TN = torch.ones_like(lse_TN) if sinks_N is None else _kept(lse_TN, sinks_N)
        mean_TN = torch.zeros_like(lse_TN)  # sum(P * dP), where there are sinks
        q_grad, k_grad, v_grad = (torch.zeros_like(q_TNH), *(torch.zeros_like(x, dtype=exact) for x in (k_TGH, v_TGH)))
        for seen in _sequences(ctx.layout):
            sizes = [place.stop - place.start for place in seen]
            k, v = (F.pad(_by_heads(x, seen, exact), (0, 0, 0, -sum(sizes) % EVEN[1])) for x in (k_TGH, v_TGH))
            low_k, k_own, v_own = k.to(q_TNH.dtype), torch.zeros_like(k), torch.zeros_like(v)
            for own, begin, end in _blocks(seen):
                rows, keys, low = end - begin, end, exact
                if q_TNH.dtype != exact and 2 * rows >= QUERIES:  # fewer gain nothing by it
                    rows, keys = (-(-size // of) * of for size, of in zip((rows, keys), EVEN, strict=True))
                    low = q_TNH.dtype
                q, out_grad = (_by_groups(x[own].to(low), groups, rows) for x in (q_TNH, grad_TNH))
                lse, kept = (_by_groups(x[own, :, None], groups, rows) for x in (lse_TN, kept_TN))
                p = torch.baddbmm(lse, q.to(exact), k[:, :keys].mT, beta=-1, alpha=ctx.scale).exp_()
                hidden = _hidden(begin, end, keys, ctx.span)
                p.unflatten(1, (rows, -1))[:, : end - begin, :, -hidden.shape[1] :].masked_fill_(hidden[:, None], 0)
                p *= kept / p.sum(-1, keepdim=True)
                s_grad = (out_grad.to(exact) @ v[:, :keys].mT).mul_(p)
                mean = s_grad.sum(-1, keepdim=True)
                s_grad = s_grad.addcmul_(p, mean, value=-1).to(low)
                v_own[:, :keys] += p.to(low).mT @ out_grad
                k_own[:, :keys] += s_grad.mT @ q
                of_q = s_grad @ (k if low == exact else low_k)[:, :keys]
                q_grad[own] = ctx.scale * _by_queries(of_q, rows)[: end - begin]
                if sinks_N is not None:
                    mean_TN[own] = _by_queries(mean[..., 0], rows)[: end - begin]
            for total_TGH, of_own in ((k_grad, k_own), (v_grad, v_own)):
                for place, part in zip(seen, of_own[:, : sum(sizes)].split(sizes, 1), strict=True):
                    total_TGH[place] += part.transpose(0, 1)
        sinks_grad = None
        if sinks_N is not None:  # a key of no value: dS = P (0 - sum(P * dP))
            sinks_grad = -(torch.sigmoid(sinks_N - lse_TN) * mean_TN).sum(0).to(sinks_N.dtype)
        return q_grad, k_grad.mul_(ctx.scale).to(k_TGH.dtype), v_grad.to(v_TGH.dtype), None, None, sinks_grad


def _by_heads(x_TNH: Tensor, places: list[slice], dtype: torch.dtype) -> Tensor:
    """[N, tokens, H] of these places, one after the other: a copy, whose layout depends on nothing else in the pack."""
    return torch.cat([x_TNH[place] for place in places]).to(dtype).transpose(0, 1).contiguous()


def _by_groups(x_LNX: Tensor, groups: int, rows: int) -> Tensor:
    """[G, L x N / G, ...] of [L, N, ...]: the rows of all heads that read the same keys; zeros up to L = `rows`."""
    if more := rows - len(x_LNX):
        x_LNX = F.pad(x_LNX, (0, 0, 0, 0, 0, more))
    return x_LNX.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_queries(x_GRX: Tensor, rows: int) -> Tensor:
    """[L, N, ...], what _by_groups made of it."""
    return x_GRX.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)


def _kept(lse_TN: Tensor, sinks_N: Tensor) -> Tensor:
    """[T, N], the part of a softmax that a sink leaves to the keys, whose log-sum-exp this is."""
    return torch.sigmoid(lse_TN - sinks_N.to(lse_TN.dtype))


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
        out = out * _kept(aux.lse.mT, sinks_N).mT[..., None].to(out.dtype)
    return out[0].transpose(0, 1)


def token_places(layout: Layout, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tree, branch, position) of each of a pack's `tokens` [T]: PREFIX and PADDING are trees; branch -1 = a prompt."""
    places = [(PREFIX, -1, position) for position in range(layout.prefix)]
    for tree, (prompt, branches) in enumerate(layout.trees):
        end = layout.prefix + prompt
        places += [(tree, -1, position) for position in range(layout.prefix, end)]
        places += [(tree, b, end + i) for b, size in enumerate(branches) for i in range(size)]
    places += [(PADDING, -1, 0)] * (tokens - len(places))
    tree_T, branch_T, position_T = torch.tensor(places).T.contiguous()
    return tree_T, branch_T, position_T


@lru_cache(maxsize=16)  # every layer of a pack asks again, in the forward and, recomputed, in the backward
def block_mask(layout: Layout, tokens: int, span: Span, device: torch.device) -> BlockMask:
    """flex_attention's block mask of a pack, built BLOCK queries at a time: never [T, T] in full.

    Blocks whose tokens all see each other are marked full, so that the kernel evaluates no mask in them.
    """
    tree_T, branch_T, position_T = (x.to(device) for x in token_places(layout, tokens))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (tree_T[q] == tree_T[k]) & ((branch_T[k] == -1) | (branch_T[q] == branch_T[k]))
        shown = (tree_T[q] != PADDING) & ((tree_T[k] == PREFIX) | own)
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
