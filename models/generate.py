"""Generation: greedy and sampled decoding of many sequences at once, the tokens that they share kept and run once.

Letters: `S` live sequences, `T` tokens of the prefill, `M` new tokens, `V` vocabulary. Read next: models/kv_cache.py.
"""

import os
from collections.abc import Collection, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Layout, token_places
from models.decoder import Decoder
from models.kv_cache import Cache, Level


class Prompt(NamedTuple):
    """Token ids that all branches begin with (at least one), and how each goes on; a branch may be empty."""

    shared: Sequence[int]
    branches: Sequence[Sequence[int]] = ((),)


class Generation(NamedTuple):
    """What the model wrote after one branch of a prompt."""

    tokens: list[int]  # with the stop token
    logps: list[float]  # of each, the model's own whatever the temperature, nats
    watched: list[list[float]]  # in each place, the same of the watched tokens
    stop: int | None  # the token that ended it; None: there was no room for more


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


def _lay_out(
    prompts: Sequence[Prompt], samples: int, device: torch.device
) -> tuple[Tensor, Layout, list[Level], Tensor]:
    """The prefill's tokens, its layout and levels, and each sequence's last row: by prompt, by branch, by sample."""
    assert all(prompt.shared and prompt.branches for prompt in prompts), "a prompt has a token and a branch"
    common = len(os.path.commonprefix([tuple(prompt.shared) for prompt in prompts]))
    prefix = min(common, *(len(prompt.shared) - 1 for prompt in prompts)) if len(prompts) > 1 else 0
    tokens: list[int] = []
    stretches: list[list[tuple[int, int, int]]] = [[], [], []]  # row, first position, end
    of: list[list[int]] = [[], [], []]
    last_rows: list[int] = []

    def add(level: int, ids: Sequence[int], position: int, branches: int) -> None:
        of[level] += [len(stretches[level])] * (branches * samples)
        stretches[level].append((len(tokens), position, position + len(ids)))
        tokens.extend(ids)

    add(0, prompts[0].shared[:prefix], 0, sum(len(prompt.branches) for prompt in prompts))
    for prompt in prompts:
        add(1, prompt.shared[prefix:], prefix, len(prompt.branches))
        end = len(tokens) - 1
        for branch in prompt.branches:
            add(2, branch, len(prompt.shared), 1)
            last_rows += [len(tokens) - 1 if branch else end] * samples
    trees = tuple((len(prompt.shared) - prefix, tuple(map(len, prompt.branches))) for prompt in prompts)
    levels = [
        Level(torch.tensor(of_level, device=device).T, torch.tensor(of_S, device=device))
        for of_level, of_S in zip(stretches, of, strict=True)
        if any(end > begin for _, begin, end in of_level)
    ]
    return torch.tensor(tokens, device=device), Layout(prefix, trees), levels, torch.tensor(last_rows, device=device)


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
    watched: Sequence[int] = (),
) -> list[list[list[Generation]]]:
    """What the model writes, by prompt, by branch and by sample, until a token of `stops` or `max_new_tokens`.

    Temperature 0 is greedy. A sample's random numbers depend on the seed, its prompt and its number alone, whatever
    runs beside it. All prompts run at once, padded to the longest: the caller gives as many as memory holds.
    """
    assert not model.training, "dropout would join in: call eval() first"
    assert max_new_tokens > 0 and samples > 0 and temperature >= 0 and 0 < top_p <= 1, "see the docstring"
    if not prompts:
        return []
    device, head = next(model.parameters()).device, model.head.weight.to(model.compute_dtype)
    token_T, layout, levels, last_S = _lay_out(prompts, samples, device)
    position_T = token_places(layout, len(token_T))[2].to(device)
    cache = Cache(layout, levels, position_T[last_S] + 1)
    whole = [(*prompt.shared, *branch) for prompt in prompts for branch in prompt.branches]
    draws = [np.random.default_rng((seed, n, *ids)).random(max_new_tokens) for ids in whole for n in range(samples)]
    uniform_SM = torch.from_numpy(np.stack(draws)).to(device)
    written = [Generation([], [], [], None) for _ in draws]
    live = list(range(len(draws)))

    hidden_SD = model.hidden(token_T, position_T, cache.prefill)[last_S]
    for step in range(max_new_tokens):
        logits_SV = F.linear(hidden_SD, head)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        drawn_S = uniform_SM[live, step] if temperature else None
        token_S = _choose(logits_SV / temperature if temperature else logits_SV, drawn_S, top_p)
        mass_S1 = logits_SV.logsumexp(-1, keepdim=True)
        logp_S = (logits_SV.gather(1, token_S[:, None]) - mass_S1)[:, 0]
        chosen, of_watched = token_S.tolist(), (logits_SV[:, list(watched)] - mass_S1).tolist()
        for sequence, token, logp, of_token in zip(live, chosen, logp_S.tolist(), of_watched, strict=True):
            written[sequence].tokens.append(token)
            written[sequence].logps.append(logp)
            written[sequence].watched.append(of_token)
        going = [token not in stops for token in chosen]
        if step + 1 == max_new_tokens or not any(going):
            break
        if not all(going):
            stay = torch.tensor(list(compress(range(len(live)), going)), device=device)
            cache.keep(stay)
            token_S, live = token_S[stay], list(compress(live, going))
        hidden_SD = model.hidden(token_S, cache.position_S, cache.attend)
        cache.advance()
    each = (one._replace(stop=one.tokens[-1] if one.tokens[-1] in stops else None) for one in written)
    return [[[next(each) for _ in range(samples)] for _ in prompt.branches] for prompt in prompts]
