"""Keys and values of a batch of sequences that share most of their tokens, and the attention of one token more of each.

Letters: `S` live sequences, `P` stretches of a level, `T` tokens of the prefill, `N` heads, `G` kv heads, `R` query
heads of a kv head (N = GR), `H` head width, `W` keys that a sequence's softmax has columns for, `Z` keys or H.

Prompts are run as preference trees without stems: what all begin with, what a prompt's branches share, each branch.
These are three levels of stretches; a stretch's keys and values are kept once, of which a layer with a window or chunk
keeps what is still seen. On each level the queries of all sequences that continue one stretch are one product with its
keys; then comes a sequence's own product with what it added. No key is copied. Read next: models/generate.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Layout, Span, reaches, tree_attention

FAR = 2**62  # the position of what no query sees
CAPACITY = 16  # tokens that a sequence's own keys have room for at first; then doubled


class Level(NamedTuple):
    """Stretches of the prompts side by side; every sequence continues one of them, which may be empty."""

    stretches_3P: Tensor  # of each, its first row of the prefill, its first position, and the position behind it
    of_S: Tensor  # which is a sequence's, ascending


class Groups(NamedTuple):
    """Sequences that continue the same stretch, as rows of one product: padded to `width` sequences a stretch."""

    stretches: int  # P
    width: int
    place_S: Tensor  # among P * width

    def together(self, x_SGRZ: Tensor) -> Tensor:
        """[P * G, width * R, Z]."""
        S, G, R, Z = x_SGRZ.shape  # noqa: N806
        if self.stretches * self.width != S:
            x_SGRZ = x_SGRZ.new_zeros(self.stretches * self.width, G, R, Z).index_copy_(0, self.place_S, x_SGRZ)
        x = x_SGRZ.view(self.stretches, self.width, G, R, Z).transpose(1, 2)
        return x.reshape(self.stretches * G, self.width * R, Z)

    def apart(self, x: Tensor) -> Tensor:
        """[S, G, R, Z] of a [P * G, width * R, Z]."""
        R, Z = x.shape[1] // self.width, x.shape[2]  # noqa: N806
        x_SGRZ = x.view(self.stretches, -1, self.width, R, Z).transpose(1, 2).flatten(0, 1)
        return x_SGRZ if len(x_SGRZ) == len(self.place_S) else x_SGRZ[self.place_S]


def _groups(of_S: Tensor) -> Groups:
    size_P = of_S.bincount()
    width, first_P = int(size_P.max()), size_P.cumsum(0) - size_P
    return Groups(len(size_P), width, of_S * width + torch.arange(len(of_S), device=of_S.device) - first_P[of_S])


class Cache:
    """Keys and values of the levels and of what each sequence adds; `prefill` and `attend` are a Context's `attend`."""

    def __init__(self, layout: Layout, levels: list[Level], position_S: Tensor) -> None:
        self.layout, self.levels = layout, levels
        self.position_S = position_S  # of the next token
        self.step = 0  # tokens that each sequence has added
        self.shared: list[list[Tensor]] = []  # by layer and level, [2, P, G, tokens of the longest, H], to the right
        self.own: list[Tensor] = []  # by layer, [2, S, G, capacity, H]: a ring where the span ends
        self.masks: dict[Span, Tensor] = {}  # of this step, [S, 1, 1, W]: 0, or -inf where a sequence sees no such key
        self.key_SW: dict[Span, Tensor] = {}  # positions of the shared keys
        self._group()

    def _group(self) -> None:
        alone = torch.arange(len(self.position_S), device=self.position_S.device)
        self.groups = [_groups(of_S) for of_S in (*(level.of_S for level in self.levels), alone)]

    def prefill(
        self, layer: int, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        """Attention of the prompts, of whose keys those stay that a sequence will see."""
        kv, device = torch.stack([k_TGH.transpose(0, 1), v_TGH.transpose(0, 1)]), k_TGH.device
        every = torch.arange(int(self.position_S.max()), device=device)
        first_S = reaches(self.position_S[:, None], every, span).int().argmax(1)
        self.shared.append([])
        for level in self.levels:
            row_P, begin_P, end_P = level.stretches_3P
            first_P = torch.full_like(row_P, FAR).scatter_reduce(0, level.of_S, first_S, "amin")
            seen = (end_P - first_P.maximum(begin_P)).clamp(min=0).tolist()
            kept = kv.new_zeros(2, len(seen), kv.shape[1], max(seen), kv.shape[3])
            for place, (end, tokens) in enumerate(zip((row_P + end_P - begin_P).tolist(), seen, strict=True)):
                kept[:, place, :, max(seen) - tokens :] = kv[:, :, end - tokens : end]
            self.shared[layer].append(kept)
        shape = (2, len(self.position_S), kv.shape[1], min(CAPACITY, _limit(span)), kv.shape[3])
        self.own.append(kv.new_empty(shape))
        return tree_attention(q_TNH, k_TGH, v_TGH, self.layout, span, sinks_N)

    def attend(
        self, layer: int, q_SNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        """Attention of one more token a sequence, whose key and value join its own."""
        slot, used = self.step % _limit(span), min(self.step + 1, _limit(span))
        if slot == self.own[layer].shape[3]:
            self.own[layer] = F.pad(self.own[layer], (0, 0, 0, min(slot, _limit(span) - slot)))
        own = self.own[layer]
        own[0, :, :, slot], own[1, :, :, slot] = k_SGH, v_SGH
        parts = [kv.flatten(1, 2).unbind() for kv in (*self.shared[layer], own[:, :, :, :used])]
        q = q_SNH.unflatten(1, (k_SGH.shape[1], -1)) * q_SNH.shape[2] ** -0.5
        scores = [
            group.apart(torch.bmm(group.together(q), k.transpose(1, 2)))
            for group, (k, _) in zip(self.groups, parts, strict=True)
        ]
        if sinks_N is not None:
            scores.append(sinks_N.to(q.dtype).view(1, *q.shape[1:3], 1).expand(q.shape[0], -1, -1, -1))
        if span not in self.masks:
            self.masks[span] = self._mask(span, layer, q.dtype)
        scores_SGRW = torch.cat(scores, -1)
        scores_SGRW += self.masks[span][..., : scores_SGRW.shape[-1]]
        weights = scores_SGRW.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        columns = weights.split([one.shape[-1] for one in scores], -1)
        values = [
            group.apart(torch.bmm(group.together(weight), v))
            for group, (_, v), weight in zip(self.groups, parts, columns, strict=False)  # the sink has none
        ]
        return torch.stack(values).sum(0).flatten(1, 2)

    def advance(self) -> None:
        """The step is over."""
        self.step, self.position_S = self.step + 1, self.position_S + 1
        self.masks.clear()

    def keep(self, stay_X: Tensor) -> None:
        """Only these of the sequences go on; what none of them continues is let go."""
        self.position_S = self.position_S[stay_X]
        for place, (stretches_3P, of_S) in enumerate(self.levels):
            used_P, of_X = of_S[stay_X].unique(return_inverse=True)
            self.levels[place] = Level(stretches_3P[:, used_P], of_X)
            if len(used_P) < stretches_3P.shape[1]:
                for shared in self.shared:
                    shared[place] = shared[place][:, used_P]
        for layer, own in enumerate(self.own):
            self.own[layer] = own[:, stay_X]
        self.key_SW.clear()
        self._group()

    def _mask(self, span: Span, layer: int, dtype: torch.dtype) -> Tensor:
        query_S1 = self.position_S[:, None]
        if span not in self.key_SW:
            keys = [query_S1[:, :0]]
            for level, kv in zip(self.levels, self.shared[layer], strict=True):
                _, begin_P1, end_P1 = level.stretches_3P[:, :, None]
                key_PL = end_P1 - torch.arange(kv.shape[3], 0, -1, device=query_S1.device)
                keys.append(key_PL.masked_fill(key_PL < begin_P1, FAR)[level.of_S])
            self.key_SW[span] = torch.cat(keys, 1)
        limit = _limit(span)
        age = (self.step - torch.arange(min(self.step + 1, limit), device=query_S1.device)) % limit
        key_SW = torch.cat([self.key_SW[span], query_S1 - age, query_S1], 1)  # the last is the sink's: always seen
        seen_SW = reaches(query_S1, key_SW, span)
        return torch.zeros_like(key_SW, dtype=dtype).masked_fill(~seen_SW, -torch.inf)[:, None, None]


def _limit(span: Span) -> int:
    """The most positions that a query sees, itself included."""
    return min(span.window or FAR, span.chunk or FAR)
