"""Attention over packed preference trees: one place that knows which token sees which.

Letters: `T` tokens of a pack, `P` of a prompt, `L` of a branch, `N` heads, `G` kv heads, `H` head width.
Read next: models/decoder.py.

A pack is a row of tokens: a prefix that all its trees begin with (often none), then the trees, each a prompt followed
by its branches, then padding. A token sees the prefix, its tree's prompt and its own branch, up to its own position.
Each prompt, and each branch over (prefix + prompt + itself), is one call of SDPA whose shape depends on nothing else in
the pack: that is what makes alone = packed = shuffled exact. (On CUDA a flex_attention block mask will take this
function's place.)
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TreeShape = tuple[int, tuple[int, ...]]  # (prompt tokens after the prefix, tokens of each branch)


class Layout(NamedTuple):
    """What stands where in a pack: tokens of the shared prefix, then the trees in order; the rest is padding."""

    prefix: int
    trees: tuple[TreeShape, ...]


@lru_cache(maxsize=2048)
def _mask(before: int, tokens: int, device: torch.device) -> Tensor:
    """[L, P + L], True where `tokens` after `before` others see. SDPA's `is_causal` is top-left aligned: wrong here."""
    return torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)


def tree_attention(q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, layout: Layout) -> Tensor:
    """Scaled dot-product attention of every token over prefix, prompt and branch, [T, N, H]; padding gives zeros."""
    sizes = [layout.prefix, *(size for prompt, branches in layout.trees for size in (prompt, *branches))]
    padding = len(q_TNH) - sum(sizes)
    assert padding >= 0, f"trees of {sum(sizes)} tokens in a pack of {len(q_TNH)}"
    # split, not slicing: its backward is one cat, where every slice would make a zero gradient of the whole pack.
    parts = zip(*(x.transpose(0, 1).split([*sizes, padding], dim=1) for x in (q_TNH, k_TGH, v_TGH)), strict=True)
    q, prefix_k, prefix_v = next(parts)
    outputs = [_attend(q, prefix_k, prefix_v, None)] if layout.prefix else []
    for prompt, branches in layout.trees:
        q, prompt_k, prompt_v = next(parts)
        mask = None
        if layout.prefix:
            prompt_k, prompt_v = torch.cat([prefix_k, prompt_k], 1), torch.cat([prefix_v, prompt_v], 1)
            mask = _mask(layout.prefix, prompt, q.device)
        outputs.append(_attend(q, prompt_k, prompt_v, mask))
        for branch in branches:
            q, k, v = next(parts)
            if branch:
                mask = _mask(layout.prefix + prompt, branch, q.device)
                outputs.append(_attend(q, torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1), mask))
    outputs.append(q_TNH.new_zeros(q_TNH.shape[1], padding, q_TNH.shape[2]))
    return torch.cat(outputs, 1).transpose(0, 1)


def _attend(q_NLH: Tensor, k_GSH: Tensor, v_GSH: Tensor, mask_LS: Tensor | None) -> Tensor:
    dtype = q_NLH.dtype
    if q_NLH.device.type == "cpu":  # its bf16 kernel takes twice as long, forward and back, on branches of a few tokens
        q_NLH, k_GSH, v_GSH = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q_NLH, k_GSH, v_GSH))
    return F.scaled_dot_product_attention(
        q_NLH[None], k_GSH[None], v_GSH[None], attn_mask=mask_LS, is_causal=mask_LS is None, enable_gqa=True
    )[0].to(dtype)
