"""Generation: greedy and sampled decoding of many sequences at once, the tokens that they share kept and run once.

Letters: `S` live sequences, `T` tokens of the prefill, `N` heads, `G` kv heads, `R` query heads of a kv head (N = GR),
`H` head width, `W` keys beside which a sequence's scores have a column, `V` vocabulary.

A prompt is run as a preference tree is: what all prompts begin with, what a prompt's branches share, each branch. Their
keys and values are kept once each, cut to what a layer's window or chunk can still see; the samples of a branch are
sequences over the same keys. Then every step is one token a live sequence, and a sequence's softmax runs over the keys
of its segments, multiplied for all the sequences that share them at once, and over its own. Read next: models/parts.py.
"""

import os
from collections.abc import Collection, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Layout, Span, reaches, token_places, tree_attention
from models.decoder import Decoder

FAR = 2**62  # the position of what no query sees
CAPACITY = 16  # own keys of a sequence at first; then doubled


class Prompt(NamedTuple):
    """Token ids that all branches begin with (at least one), and how each goes on; a branch may be empty."""

    shared: Sequence[int]
    branches: Sequence[Sequence[int]] = ((),)


class Generation(NamedTuple):
    """What the model wrote after one branch of a prompt."""

    tokens: list[int]  # with the stop token
    logps: list[float]  # of each, the model's own whatever the temperature, nats
    stop: int | None  # the token that ended it; None: there was no room for more


class Segment(NamedTuple):
    """Tokens that the sequences `first` to `last` (not included) have in common."""

    first: int
    last: int
    row: int  # where they begin in the prefill
    position: int  # the first one's
    tokens: int


class View(NamedTuple):
    """What the layers of one span see in one step."""

    mask_SW: Tensor  # 0 where a sequence sees the key, else -inf: those of its segments, its own, the sink
    columns: list[tuple[int, int]]  # of each segment
    own: tuple[int, int]  # columns
    slot: int  # of the step's token among the own keys, a ring where the span ends


class Cache:
    """Keys and values: of shared tokens once, of what the sequences add beside. Its methods are Context.attend."""

    def __init__(self, layout: Layout, segments: list[Segment], position_S: Tensor) -> None:
        self.layout, self.segments = layout, segments
        self.position_S = position_S  # of the next token
        self.step = 0  # tokens that each sequence has added
        self.shared: list[list[Tensor]] = []  # by layer and segment, [2, G, tokens, H]
        self.own: list[Tensor] = []  # by layer, [2, G, S, capacity, H]
        self.views: dict[Span, View] = {}
        self.columns: dict[Span, tuple[list[tuple[int, int]], Tensor]] = {}

    def prefill(
        self, layer: int, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        """Attention of the prompts, of which the last keys that a sequence will see are kept."""
        kept, kv = [], torch.stack([k_TGH.transpose(0, 1), v_TGH.transpose(0, 1)])
        for first, last, row, position, tokens in self.segments:
            key = torch.arange(position, position + tokens, device=kv.device)
            seen = int(reaches(self.position_S[first:last, None], key, span).any(0).sum())
            kept.append(kv[:, :, row + tokens - seen : row + tokens].clone())
        self.shared.append(kept)
        shape = (2, kv.shape[1], len(self.position_S), min(CAPACITY, _limit(span)), kv.shape[3])
        self.own.append(kv.new_empty(shape))
        return tree_attention(q_TNH, k_TGH, v_TGH, self.layout, span, sinks_N)

    def attend(
        self, layer: int, q_SNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, span: Span, sinks_N: Tensor | None
    ) -> Tensor:
        """Attention of one more token a sequence, whose key and value join its own."""
        if span not in self.views:
            self.views[span] = self._view(span, layer, q_SNH.dtype)
        mask_SW, columns, (begin, end), slot = self.views[span]
        if slot == self.own[layer].shape[3]:
            self.own[layer] = F.pad(self.own[layer], (0, 0, 0, min(slot, _limit(span) - slot)))
        own, shared = self.own[layer], self.shared[layer]
        own[0, :, :, slot], own[1, :, :, slot] = k_SGH.transpose(0, 1), v_SGH.transpose(0, 1)
        own_k, own_v = own.flatten(1, 2)[:, :, : end - begin]

        (S, N, H), G, W = q_SNH.shape, k_SGH.shape[1], mask_SW.shape[1]  # noqa: N806
        R, scale = N // G, H**-0.5  # noqa: N806
        # The rows of one sequence lie together, and those of one segment: each are a batch of one product.
        q = q_SNH.unflatten(1, (G, R)).transpose(0, 1).contiguous()
        scores = mask_SW[:, None].expand(G, S, R, W).clone(memory_format=torch.contiguous_format)
        if sinks_N is not None:
            scores[..., -1] = sinks_N.view(G, 1, R)
        scores.view(G * S, R, W)[:, :, begin:end].baddbmm_(q.view(G * S, R, H), own_k.transpose(1, 2), alpha=scale)
        parts = [
            (slice(segment.first * R, segment.last * R), slice(*column), kv)
            for segment, column, kv in zip(self.segments, columns, shared, strict=True)
        ]
        for rows, keys, kv in parts:
            scores.view(G, S * R, W)[:, rows, keys].baddbmm_(
                q.view(G, S * R, H)[:, rows], kv[0].transpose(1, 2), alpha=scale
            )
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = torch.bmm(weights.view(G * S, R, W)[:, :, begin:end], own_v).view(G, S * R, H)
        for rows, keys, kv in parts:
            out[:, rows].baddbmm_(weights.view(G, S * R, W)[:, rows, keys], kv[1])
        return out.view(G, S, R, H).transpose(0, 1).reshape(S, N, H)

    def advance(self) -> None:
        """The step is over."""
        self.step, self.position_S = self.step + 1, self.position_S + 1
        self.views.clear()

    def keep(self, keep_S: Tensor) -> None:
        """Only these sequences go on; what none of them sees is let go."""
        before = [0, *keep_S.cumsum(0).tolist()]
        segments = [s._replace(first=before[s.first], last=before[s.last]) for s in self.segments]
        used = [s.first < s.last for s in segments]
        self.segments = list(compress(segments, used))
        self.shared = [list(compress(of_layer, used)) for of_layer in self.shared]
        self.own = [own[:, :, keep_S] for own in self.own]
        self.position_S = self.position_S[keep_S]
        self.columns.clear()

    def _view(self, span: Span, layer: int, dtype: torch.dtype) -> View:
        if span not in self.columns:
            self.columns[span] = self._columns(self.shared[layer])
        columns, key_SW = self.columns[span]
        limit, shared = _limit(span), key_SW.shape[1]
        own = min(self.step + 1, limit)
        age = (self.step - torch.arange(own, device=key_SW.device)) % limit
        query = self.position_S[:, None]
        key_SW = torch.cat([key_SW, query - age, torch.full_like(query, FAR)], 1)
        mask_SW = torch.zeros_like(key_SW, dtype=dtype).masked_fill(~reaches(query, key_SW, span), -torch.inf)
        return View(mask_SW, columns, (shared, shared + own), self.step % limit)

    def _columns(self, shared: list[Tensor]) -> tuple[list[tuple[int, int]], Tensor]:
        """Where each segment's scores stand, behind those of the segment that it continues, and positions [S, W]."""
        filled, columns = [0] * len(self.position_S), []
        for (first, last, *_), kv in zip(self.segments, shared, strict=True):
            columns.append((filled[first], filled[first] + kv.shape[2]))
            filled[first:last] = [columns[-1][1]] * (last - first)
        key_SW = self.position_S.new_full((len(filled), max(filled)), FAR)
        for (first, last, _, position, tokens), (start, stop) in zip(self.segments, columns, strict=True):
            end = position + tokens
            key_SW[first:last, start:stop] = torch.arange(end - (stop - start), end, device=key_SW.device)
        return columns, key_SW


def _limit(span: Span) -> int:
    """The most positions that a query sees, itself included."""
    return min(span.window or FAR, span.chunk or FAR)


def _choose(logits_SV: Tensor, uniform_S: Tensor | None, top_p: float) -> Tensor:
    """The likeliest token of each row; or, by inverse transform of `uniform_S`, one of the fewest of mass `top_p`."""
    if uniform_S is None:
        return logits_SV.argmax(-1)
    p_SV = logits_SV.double().softmax(-1)
    if top_p < 1:
        likely_SV, token_SV = p_SV.sort(dim=-1, descending=True, stable=True)
        p_SV = p_SV.scatter(1, token_SV, likely_SV * (likely_SV.cumsum(-1) - likely_SV < top_p))
    mass_SV = p_SV.cumsum(-1)
    return torch.searchsorted(mass_SV, uniform_S[:, None] * mass_SV[:, -1:], right=True)[:, 0]


def _lay_out(prompts: Sequence[Prompt], samples: int) -> tuple[list[int], Layout, list[Segment], list[int]]:
    """The prefill's tokens and layout, the segments (those that continue another behind it), and each one's last row.

    The first of the rows, one a sequence: by prompt, by branch, by sample.
    """
    shortest = min(len(prompt.shared) for prompt in prompts)
    assert shortest and all(prompt.branches for prompt in prompts), "a prompt has a token and a branch"
    common = len(os.path.commonprefix([tuple(prompt.shared) for prompt in prompts]))
    prefix = min(common, shortest - 1) if len(prompts) > 1 else 0
    tokens = list(prompts[0].shared[:prefix])
    segments: list[Segment] = []
    last_rows: list[int] = []
    for prompt in prompts:
        first = len(last_rows)
        segment = Segment(
            first, first + len(prompt.branches) * samples, len(tokens), prefix, len(prompt.shared) - prefix
        )
        segments.append(segment)
        tokens += prompt.shared[prefix:]
        end = len(tokens) - 1
        for branch in prompt.branches:
            if branch:
                here = len(last_rows)
                segments.append(Segment(here, here + samples, len(tokens), len(prompt.shared), len(branch)))
                tokens += branch
            last_rows += [len(tokens) - 1 if branch else end] * samples
    if prefix:
        segments.insert(0, Segment(0, len(last_rows), 0, 0, prefix))
    trees = tuple((len(prompt.shared) - prefix, tuple(map(len, prompt.branches))) for prompt in prompts)
    return tokens, Layout(prefix, trees), segments, last_rows


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    *,
    stops: Collection[int],
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[list[Generation]]]:
    """What the model writes, by prompt, by branch and by sample, until a token of `stops` or `max_new_tokens`.

    Temperature 0 is greedy. A sample's random numbers depend on the seed, its prompt and its number alone, whatever
    runs beside it. All prompts run at once: the caller gives as many as memory holds.
    """
    assert not model.training, "dropout would join in: call eval() first"
    assert max_new_tokens > 0 and samples > 0 and temperature >= 0 and 0 < top_p <= 1, "see the docstring"
    if not prompts:
        return []
    tokens, layout, segments, last_rows = _lay_out(prompts, samples)
    device, head = next(model.parameters()).device, model.head.weight.to(model.compute_dtype)
    position_T = token_places(layout, len(tokens))[2].to(device)
    cache = Cache(layout, segments, position_T[last_rows] + 1)
    uniform_SM = torch.from_numpy(
        np.stack(
            [
                np.random.default_rng((seed, sample, *prompt.shared, *branch)).random(max_new_tokens)
                for prompt in prompts
                for branch in prompt.branches
                for sample in range(samples)
            ]
        )
    ).to(device)
    written: list[Generation] = [Generation([], [], None) for _ in last_rows]
    live = list(range(len(written)))

    hidden_SD = model.hidden(torch.tensor(tokens, device=device), position_T, cache.prefill)[last_rows]
    for step in range(max_new_tokens):
        logits_SV = F.linear(hidden_SD, head)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        drawn_S = uniform_SM[live, step] if temperature else None
        token_S = _choose(logits_SV / temperature if temperature else logits_SV, drawn_S, top_p)
        logp_S = logits_SV.gather(1, token_S[:, None])[:, 0] - logits_SV.logsumexp(-1)
        chosen = token_S.tolist()
        for sequence, token, logp in zip(live, chosen, logp_S.tolist(), strict=True):
            written[sequence].tokens.append(token)
            written[sequence].logps.append(logp)
            if token in stops:
                written[sequence] = written[sequence]._replace(stop=token)
        going = [token not in stops for token in chosen]
        if step + 1 == max_new_tokens or not any(going):
            break
        if not all(going):
            keep_S = torch.tensor(going, device=device)
            cache.keep(keep_S)
            token_S, live = token_S[keep_S], list(compress(live, going))
        hidden_SD = model.hidden(token_S, cache.position_S, cache.attend)
        cache.advance()
    each = iter(written)
    return [[[next(each) for _ in range(samples)] for _ in prompt.branches] for prompt in prompts]
