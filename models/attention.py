"""Attention over packed preference trees: one place that knows which token sees which.

Letters: `T` tokens of a pack, `P` of a prompt, `L` of a branch, `N` heads, `G` kv heads, `H` head width, `Q` and `K`
blocks of BLOCK query and key tokens. Read next: models/decoder.py.

A pack is a row of tokens: a prefix that all its trees begin with (often none), then the trees, each a prompt followed
by its branches, then padding. A token sees the prefix, its tree's prompt and its own branch, up to its own position,
and of these what its layer's `Span` leaves: windows and chunks count positions, not places in the pack.

On the CPU each prompt, and each branch over (prefix + prompt + itself), is one call of SDPA whose shape depends on
nothing else in the pack: that makes alone = packed = shuffled exact. On CUDA it is one flex_attention, under a block
mask.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

BLOCK = 128  # tokens of flex_attention's blocks
PREFIX, PADDING = -1, -2  # in place of a tree's number

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
    return _by_branches(q_TNH, k_TGH, v_TGH, layout, span, sinks_N)


# --- one SDPA a branch (CPU) ------------------------------------------------------------------------------------------


@lru_cache(maxsize=128)  # a pack's branches: every layer asks again; one may take a MB
def _mask(before: int, tokens: int, span: Span, device: torch.device) -> Tensor:
    """[L, P + L], True where `tokens` after `before` others see. SDPA's `is_causal` is top-left aligned: wrong here."""
    query, key = torch.arange(before, before + tokens, device=device)[:, None], torch.arange(before + tokens).to(device)
    return reaches(query, key, span)


def reaches(query: Tensor, key: Tensor, span: Span) -> Tensor:
    """Whether a token at position `query` may see one at position `key` of its own sequence (they broadcast)."""
    sees = key <= query
    if span.window is not None:
        sees = sees & (query - key < span.window)
    if span.chunk is not None:
        sees = sees & (query // span.chunk == key // span.chunk)
    return sees


def _by_branches(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout, span: Span, sinks_N: Tensor | None
) -> Tensor:
    sizes = [layout.prefix, *(size for prompt, branches in layout.trees for size in (prompt, *branches))]
    padding = len(q_TNH) - sum(sizes)
    assert padding >= 0, f"trees of {sum(sizes)} tokens in a pack of {len(q_TNH)}"
    # split, not slicing: its backward is one cat, where every slice would make a zero gradient of the whole pack.
    parts = zip(*(x.transpose(0, 1).split([*sizes, padding], dim=1) for x in (q_TNH, k_TGH, v_TGH)), strict=True)
    q, prefix_k, prefix_v = next(parts)
    outputs = [_attend(q, prefix_k, prefix_v, 0, span, sinks_N)] if layout.prefix else []
    for prompt, branches in layout.trees:
        q, prompt_k, prompt_v = next(parts)
        if layout.prefix:
            prompt_k, prompt_v = torch.cat([prefix_k, prompt_k], 1), torch.cat([prefix_v, prompt_v], 1)
        outputs.append(_attend(q, prompt_k, prompt_v, layout.prefix, span, sinks_N))
        for branch in branches:
            q, k, v = next(parts)
            if branch:
                k, v = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
                outputs.append(_attend(q, k, v, layout.prefix + prompt, span, sinks_N))
    outputs.append(q_TNH.new_zeros(q_TNH.shape[1], padding, q_TNH.shape[2]))
    return torch.cat(outputs, 1).transpose(0, 1)


def _attend(q_NLH: Tensor, k_GSH: Tensor, v_GSH: Tensor, before: int, span: Span, sinks_N: Tensor | None) -> Tensor:
    dtype = q_NLH.dtype
    if q_NLH.device.type == "cpu":  # its bf16 kernel takes twice as long, forward and back, on branches of a few tokens
        q_NLH, k_GSH, v_GSH = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q_NLH, k_GSH, v_GSH))
    causal, width = not before and span == FULL and sinks_N is None, q_NLH.shape[-1]
    mask = None if causal else _mask(before, q_NLH.shape[1], span, q_NLH.device)
    if mask is not None and sinks_N is not None:
        # One more key, of no value, and one more dimension: that key's 1 there meets the query's sink. As a bias the
        # sinks would need a mask for each head, and its gradient.
        sink = (sinks_N.to(q_NLH.dtype) * width**0.5)[:, None, None].expand(-1, len(mask), 1)
        q_NLH, only_sink = torch.cat([q_NLH, sink], -1), F.pad(k_GSH.new_ones(len(k_GSH), 1, 1), (width, 0))
        k_GSH, v_GSH = torch.cat([F.pad(k_GSH, (0, 1)), only_sink], 1), F.pad(v_GSH, (0, 1, 0, 1))
        mask = F.pad(mask, (0, 1), value=True)
    return F.scaled_dot_product_attention(
        q_NLH[None], k_GSH[None], v_GSH[None], attn_mask=mask, is_causal=causal, scale=width**-0.5, enable_gqa=True
    )[0, ..., :width].to(dtype)


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
