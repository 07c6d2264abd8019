"""Attention over packed preference trees: one place that knows which token sees which.

Letters: `T` tokens of a pack, `P` of a prompt, `L` of a branch, `N` heads, `G` kv heads, `H` head width, `Q` and `K`
blocks of BLOCK query and key tokens. Read next: models/decoder.py.

A pack is a row of tokens: a prefix that all its trees begin with (often none), then the trees, each a prompt followed
by its branches, then padding. A token sees the prefix, its tree's prompt and its own branch, up to its own position,
and of these what its layer's `Span` leaves: windows and chunks count positions, not places in the pack.

On the CPU each prompt, and of each branch QUERIES tokens over (prefix + prompt + itself), is one call of SDPA whose
shape depends on nothing else in the pack: that makes alone = packed = shuffled exact. On CUDA it is one flex_attention,
under a block mask.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

QUERIES = 256  # of one call on the CPU
BLOCK = 128  # tokens of flex_attention's blocks
PREFIX, PADDING = -1, -2  # in place of a tree's number
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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


# --- one SDPA a branch (CPU) ------------------------------------------------------------------------------------------


@lru_cache(maxsize=128)  # a pack's branches: every layer asks again; one may take a MB
def _hidden(before: int, tokens: int, span: Span, device: torch.device) -> Tensor:
    """[L, P + L], True where `tokens` after `before` others don't see. `is_causal` is top-left aligned: wrong here."""
    query, key = torch.arange(before, before + tokens, device=device)[:, None], torch.arange(before + tokens).to(device)
    return ~reaches(query, key, span)


def reaches(query: Tensor, key: Tensor, span: Span) -> Tensor:
    """Whether a token at position `query` may see one at position `key` of its own sequence (they broadcast)."""
    sees = key <= query
    if span.window is not None:
        sees = sees & (query - key < span.window)
    if span.chunk is not None:
        sees = sees & (query // span.chunk == key // span.chunk)
    return sees


def _calls(layout: Layout) -> Iterator[tuple[slice, list[slice]]]:
    """What sees what: tokens of a pack and, in order, those that they see, themselves last.

    Of tokens that see others before them QUERIES at a time: under a mask the keys that it hides are multiplied, too.
    """
    before = [slice(0, layout.prefix)] if layout.prefix else []
    if before:
        yield before[0], before
    at = layout.prefix
    for prompt, branches in layout.trees:
        seen = [*before]
        for place, size in enumerate((prompt, *branches)):
            most = QUERIES if seen else max(size, 1)
            for begin in range(0, size, most):
                end = min(begin + most, size)
                yield slice(at + begin, at + end), [*seen, slice(at, at + end)]
            if place == 0:
                seen.append(slice(at, at + prompt))
            at += size


class _ByBranches(torch.autograd.Function):
    """One call of what SDPA calls on the CPU for each prompt and branch, in fp32 (fp64 in fp64).

    That kernel takes twice as long in bf16, forward and back, on branches of a few tokens. Of a pack are kept queries,
    keys and values as they came, the result and its log-sum-exp. Autograd would keep fp32 copies, a prompt's keys once
    for each branch, and tensors of ever other sizes, which leave holes in the heap.
    """

    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        (tokens, heads, width), extra = q_TNH.shape, int(sinks_N is not None)
        exact = torch.promote_types(q_TNH.dtype, torch.float32)
        out, lse = (q_TNH.new_zeros(1, heads, tokens, *own, dtype=exact) for own in ((width + extra,), ()))
        for own, seen in _calls(layout):
            *parts, mask = _parts(q_TNH, k_TGH, v_TGH, sinks_N, own, seen, span)
            out[:, :, own], lse[:, :, own] = FLASH(*parts, 0.0, mask is None, attn_mask=mask, scale=width**-0.5)
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, sinks_N, out, lse)
        ctx.layout, ctx.span = layout, span
        return out[0, ..., :width].transpose(0, 1).to(q_TNH.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TGH, v_TGH, sinks_N, out, lse = ctx.saved_tensors
        width, extra = q_TNH.shape[-1], int(sinks_N is not None)
        q_grad = torch.zeros_like(out)
        k_grad, v_grad = (out.new_zeros(1, k_TGH.shape[1], len(k_TGH), width + extra) for _ in "kv")
        for own, seen in _calls(ctx.layout):
            *parts, mask = _parts(q_TNH, k_TGH, v_TGH, sinks_N, own, seen, ctx.span)
            grad = F.pad(_part(grad_TNH, [own], out.dtype), (0, extra))
            result = out[:, :, own].contiguous(), lse[:, :, own].contiguous()
            q_grad[:, :, own], *grads = FLASH_BACKWARD(
                grad, *parts, *result, 0.0, mask is None, attn_mask=mask, scale=width**-0.5
            )
            sizes = [place.stop - place.start for place in seen]
            for total, of_keys in zip((k_grad, v_grad), grads, strict=True):
                for place, part in zip(seen, of_keys[:, :, : sum(sizes)].split(sizes, 2), strict=True):
                    total[:, :, place] += part
        sinks_grad = (q_grad[0, ..., width].sum(1) * width**0.5).to(sinks_N.dtype) if extra else None
        grads = [x[0, ..., :width].transpose(0, 1).to(q_TNH.dtype) for x in (q_grad, k_grad, v_grad)]
        return *grads, None, None, sinks_grad


def _part(x_TNH: Tensor, places: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """[1, heads, tokens, H] of these places one after the other: a copy, whose layout depends on nothing else."""
    return torch.cat([x_TNH[place] for place in places]).to(dtype).transpose(0, 1)[None].contiguous()


def _parts(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    sinks_N: Tensor | None,
    own: slice,
    seen: Sequence[slice],
    span: Span,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries of `own` and keys and values of `seen`, as they are multiplied, and the mask; none where causal says it.

    A sink is one more key, of no value, and one more dimension, in which that key has 1 and each query its head's sink.
    As a bias it would need a mask for each head, and its gradient.
    """
    exact, width = torch.promote_types(q_TNH.dtype, torch.float32), q_TNH.shape[-1]
    q, k, v = (_part(x, of, exact) for x, of in ((q_TNH, [own]), (k_TGH, seen), (v_TGH, seen)))
    if len(seen) == 1 and span == FULL and sinks_N is None:
        return q, k, v, None
    mask = q.new_zeros(q.shape[2], k.shape[2])
    mask.masked_fill_(_hidden(k.shape[2] - q.shape[2], q.shape[2], span, k.device), -torch.inf)
    if sinks_N is not None:
        sinks = (sinks_N.to(exact) * width**0.5)[None, :, None, None].expand(*q.shape[:-1], 1)
        only_sink = F.pad(k.new_ones(*k.shape[:2], 1, 1), (width, 0))
        q, k = torch.cat([q, sinks], -1), torch.cat([F.pad(k, (0, 1)), only_sink], 2)
        v, mask = F.pad(v, (0, 1, 0, 1)), F.pad(mask, (0, 1))
    return q, k, v, mask


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
        kept = torch.sigmoid(aux.lse - sinks_N.to(aux.lse.dtype)[None, :, None])
        out = out * kept[..., None].to(out.dtype)
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
