"""models/generate.py: greedy tokens as transformers', logits as without a cache, draws as the distribution says.

All pass the tiny models' windows, chunks and temperature steps.
"""

import math
from collections import Counter

import pytest
import torch
from test_families import VARIANTS, both

from models import generate as module
from models import kv_cache
from models.attention import FULL, Span
from models.decoder import Decoder, next_token_logits
from models.files import write_json
from models.generate import Prompt, generate
from models.tiny import FAMILIES, SHARED

EDGES = ("llama: as many kv heads as heads", "llama: 9 heads on 3", "gpt_oss: window of 1", "llama4: chunks of 5")
MODELS = {family: (family, {}) for family in FAMILIES} | {name: VARIANTS[name] for name in EDGES}

# Two prompts that begin alike, one of them with three branches of which one is empty, longer than window and chunk.
PROMPTS = [
    Prompt((5, 9, 2, 61, 33, 8, 17, 70, 41), ((3, 12, 90, 44, 7, 1, 26, 58, 39, 71, 4), (), (95, 6))),
    Prompt((5, 9, 2, 50, 13)),
]
WHOLE = [(*prompt.shared, *branch) for prompt in PROMPTS for branch in prompt.branches]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Decoder]:
    """transformers' tiny random model of a family and ours of the same weights, in fp32."""
    folder, (family, changes) = tmp_path_factory.mktemp("twins"), MODELS[request.param]
    write_json(folder / "config.json", {**SHARED, **FAMILIES[family], **changes})
    return both(folder, torch.float32, seed=0)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Decoder:
    """gpt-oss in fp64: sinks, a window, experts."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    write_json(folder / "config.json", {**SHARED, **FAMILIES["gpt_oss"]})
    return both(folder, torch.float64, seed=0)[1]


def in_fp64(model: Decoder) -> Decoder:
    exact = Decoder(model.config, weight_dtype=torch.float64, compute_dtype=torch.float64)
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return exact.requires_grad_(False).eval()


def flat(generations: list) -> list:
    return [one for of_prompt in generations for of_branch in of_prompt for one in of_branch]


def test_greedy_tokens_of_every_family_are_transformers_own(pair):
    theirs, model = pair
    ours = flat(generate(model, PROMPTS, stops=(), max_new_tokens=40))
    cached = model.config.layers[0].span.window != 1  # their cache then keeps every key (a slice from -0 on)
    for tokens, one in zip(WHOLE, ours, strict=True):
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(torch.tensor([tokens]), use_cache=cached, **options)[0, len(tokens) :].tolist()
        assert one.tokens == expected


def test_logits_of_every_step_are_those_of_the_whole_sequence_run_without_a_cache(pair, monkeypatch):
    model, choose, seen = in_fp64(pair[1]), module._choose, []
    monkeypatch.setattr(module, "_choose", lambda logits, *rest: (seen.append(logits), choose(logits, *rest))[1])
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "watched": (70, 7)}
    written = flat(generate(model, PROMPTS, stops=(), **options))
    for sequence, (tokens, one) in enumerate(zip(WHOLE, written, strict=True)):
        truth = next_token_logits(model, [*tokens, *one.tokens])[len(tokens) - 1 : -1]
        cached = torch.stack([logits[sequence] for logits in seen])
        assert (cached - truth).norm() <= 1e4 * torch.finfo(torch.float64).eps * truth.norm()
        expected = truth.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert one.logps == pytest.approx(expected.tolist(), rel=1e-9)
        watched = truth.log_softmax(-1)[:, [70, 7]].flatten()
        assert [p for place in one.watched for p in place] == pytest.approx(watched.tolist(), rel=1e-9)


def test_a_sample_is_the_same_alone_and_beside_others_and_another_with_every_number(ours):
    options = {"stops": (), "max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    together = generate(ours, PROMPTS, samples=3, **options)
    alone = [flat(generate(ours, [Prompt(tokens)], samples=3, **options)) for tokens in WHOLE]
    assert [one.tokens for one in flat(together)] == [one.tokens for many in alone for one in many]
    assert len({tuple(one.tokens) for one in flat(together)}) == 3 * len(WHOLE)
    first = flat(generate(ours, PROMPTS, samples=1, **options))
    assert [one.tokens for one in first] == [many[0].tokens for many in alone]
    assert flat(generate(ours, PROMPTS, **options | {"seed": 12}))[0].tokens != first[0].tokens
    even = flat(generate(ours, PROMPTS, **options | {"temperature": 1e9, "top_p": 1.0}))  # the numbers drawn, no more
    assert len({tuple(one.tokens) for one in even}) == len(WHOLE)


def test_a_sequence_ends_at_its_first_stop_token_and_the_others_go_on_as_they_would(ours):
    options = {"max_new_tokens": 30, "temperature": 1.0, "samples": 4}
    free = flat(generate(ours, PROMPTS, stops=(), **options))
    stops = {one.tokens[3 + 2 * i] for i, one in enumerate(free[::3])}
    ends = []
    for one, stopped in zip(free, flat(generate(ours, PROMPTS, stops=stops, **options)), strict=True):
        end = next((i for i, token in enumerate(one.tokens) if token in stops), None)
        ends.append(end)
        assert stopped.tokens == one.tokens[: None if end is None else end + 1]
        assert stopped.logps == pytest.approx(one.logps[: len(stopped.tokens)], rel=1e-9)
        assert stopped.stop == (None if end is None else one.tokens[end])
    assert len(set(ends)) > 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_samples_have_the_distribution_that_was_asked_for(ours, temperature, top_p):
    tokens, draws = WHOLE[0], 4000
    options = {"stops": (), "max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
    counts = Counter(one.tokens[0] for one in flat(generate(ours, [Prompt(tokens)], samples=draws, **options)))
    p = (next_token_logits(ours, tokens)[-1] / temperature).softmax(-1).detach()
    likely = p.sort(descending=True)
    inside = likely.indices[: int((likely.values.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else torch.arange(len(p))
    assert counts.keys() <= set(inside.tolist())
    expected = {int(i): draws * float(p[i] / p[inside].sum()) for i in inside}
    cells = [(counts[i], e) for i, e in expected.items() if e >= 5]
    cells.append((draws - sum(n for n, _ in cells), max(draws - sum(e for _, e in cells), 1e-9)))
    chi2 = sum((n - e) ** 2 / e for n, e in cells if e > 1e-6)
    freedom = len(cells) - 1
    assert freedom >= 5
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)  # mean and spread of chi-square


def test_top_p_leaves_the_fewest_tokens_of_that_mass_in_their_proportions():
    logits = torch.tensor([[0.125, 0.5, 0.0, 0.375]], dtype=torch.float64).log().expand(700, -1)
    uniform = (torch.arange(700) + 0.5).double() / 700
    for top_p, expected in ((0.4, [0, 700, 0, 0]), (0.6, [0, 400, 0, 300]), (1.0, [87, 350, 0, 263])):
        counts = module._choose(logits, uniform, top_p).bincount(minlength=4).tolist()
        assert counts == pytest.approx(expected, abs=1)


def test_gpt_oss_holds_24576_bytes_a_token_beyond_its_windows(monkeypatch):
    """Its 20b: 24 layers, 8 kv heads of 64, bf16, every other layer a window of 128 (issue's figure: 49,152 in all)."""
    spans = [Span(window=128), FULL] * 12

    def held(prompt: int, steps: int) -> tuple[int, int]:
        tokens_T, layout, levels, _ = module._lay_out(
            [Prompt((1,) * prompt, ((2,) * 5, (3,) * 5))], 1, torch.device("cpu")
        )
        cache = kv_cache.Cache(layout, levels, torch.tensor([prompt + 5] * 2))
        heads = [torch.zeros(len(tokens_T), 8, 64, dtype=torch.bfloat16) for _ in range(3)]
        for layer, span in enumerate(spans):
            cache.prefill(layer, *heads, span, None)
        kept = sum(kv.nbytes for of_layer in cache.shared for kv in of_layer)
        for _ in range(steps):
            for layer, span in enumerate(spans):
                cache.attend(layer, *(x[:2] for x in heads), span, None)
            cache.advance()
        return kept, sum(own.nbytes for own in cache.own)

    monkeypatch.setattr(kv_cache, "tree_attention", lambda q, *rest: q)
    token = 2 * 8 * 64 * 2 * 12  # of the 12 full layers, and of the 12 others
    assert token == 24576
    assert held(300, 0)[0] == token * 310 + token * (122 + 2 * 5)  # a window of 128 sees 127 before the next token
    assert held(400, 0)[0] - held(300, 0)[0] == 100 * token
    assert held(300, 200)[1] == 2 * token * (
        256 + 128
    )  # of two sequences: 16 doubled four times, and a ring of the window
