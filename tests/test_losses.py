"""dpo/losses.py against values worked out by hand, formulas in another form, and what must hold for every loss."""

import math
from collections.abc import Callable
from dataclasses import replace

import mpmath  # torch brings it, with sympy
import numpy as np
import pytest
import torch

from dpo.config import LossConfig
from dpo.losses import LOSSES, READ_BY, check_loss, chosen_nll, pair_losses, reads, reward_metrics, terms, wpo_weight
from dpo.pairs import PairLogps
from models.errors import UserError

EPS = torch.finfo(torch.float64).eps


def pairs(chosen, rejected, reference_chosen=0.0, reference_rejected=0.0, lengths=(1, 1)) -> PairLogps:
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = (
        torch.as_tensor(x, dtype=torch.float64).reshape(-1)
        for x in (chosen, rejected, reference_chosen, reference_rejected)
    )
    lengths_B = [torch.full_like(chosen_B, n) for n in lengths]
    return PairLogps(
        chosen_B, rejected_B, ref_chosen_B.expand_as(chosen_B), ref_rejected_B.expand_as(chosen_B), *lengths_B
    )


def loss(logps: PairLogps, **settings) -> torch.Tensor:
    return pair_losses(logps, LossConfig(**settings))


def random_pairs(n: int = 50, seed: int = 0) -> PairLogps:
    """Sums as real ones are: some tens of nats, log-ratios of some nats."""
    generator = torch.Generator().manual_seed(seed)
    reference = -60 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    ratio = 5 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 40, (2, n), generator=generator)
    return PairLogps(*(reference + ratio).clamp(max=-0.01), *reference, *lengths)


def plain_sigmoid(logps: PairLogps, beta: float, smoothing: float) -> np.ndarray:
    """The definition, probabilities and all, in fp64: (1 - e) and e are the odds that the label is right and wrong."""
    ratio = [(a - b).numpy() for a, b in ((logps.chosen_B, logps.rejected_B), _references(logps))]
    right = 1 / (1 + np.exp(-beta * (ratio[0] - ratio[1])))
    return -((1 - smoothing) * np.log(right) + smoothing * np.log(1 - right))


def _references(logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    return logps.reference_chosen_B, logps.reference_rejected_B


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_loses_exactly_ln_2(beta, smoothing):
    same = pairs([-7.5, -300.0], [-9.25, -1e-3], [-7.5, -300.0], [-9.25, -1e-3])
    expected = torch.full((2,), math.log(2), dtype=torch.float64)
    assert torch.allclose(loss(same, beta=beta, label_smoothing=smoothing), expected, rtol=EPS, atol=0)
    assert torch.equal(loss(same, beta=beta), expected)


@pytest.mark.parametrize(
    ("difference", "beta", "smoothing", "expected"),
    [
        (10 * math.log(3), 0.1, 0.0, math.log(4 / 3)),  # sigma(ln 3) = 3/4
        (-10 * math.log(3), 0.1, 0.0, math.log(4)),
        (math.log(9), 0.5, 0.0, math.log(4 / 3)),  # beta multiplies: 0.5 ln 9 = ln 3
        (-math.log(4), 1.0, 0.0, math.log(5)),
        (math.log(3), 1.0, 0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        (math.log(3), 1.0, 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ],
)
def test_known_margins_give_the_loss_worked_out_by_hand(difference, beta, smoothing, expected):
    # The difference of log-ratios reaches the loss whichever of the four sums it comes from.
    for logps in (
        pairs(difference, 0.0),
        pairs(0.0, -difference),
        pairs(0.0, 0.0, -difference, 0.0),
        pairs(0.0, 0.0, 0.0, difference),
    ):
        assert loss(logps, beta=beta, label_smoothing=smoothing).item() == pytest.approx(expected, rel=8 * EPS, abs=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_the_sigmoid_loss_is_the_plain_formula_in_fp64(beta, smoothing):
    logps = random_pairs()
    plain = plain_sigmoid(logps, beta, smoothing)
    # What the plain formula itself loses: the rounding of a probability near 1, divided by the odds against it.
    margin = beta * np.abs((logps.chosen_ratio_B - logps.rejected_ratio_B).numpy())
    tolerance = 8 * EPS * (1 + np.exp(margin)) * np.maximum(plain, 1)
    assert (np.abs(loss(logps, beta=beta, label_smoothing=smoothing).numpy() - plain) <= tolerance).all()


def test_without_a_reference_the_margin_is_the_policys_own():
    free = pairs([-3.0, -8.0], [-5.0, -2.0])  # the loop passes zero reference sums
    expected = [math.log1p(math.exp(-0.3 * 2.0)), math.log1p(math.exp(0.3 * 6.0))]
    assert loss(free, beta=0.3, reference_free=True).tolist() == pytest.approx(expected, rel=8 * EPS, abs=0)


def test_rpo_alpha_adds_the_chosen_answers_mean_negative_log_likelihood_and_nothing_else():
    logps = pairs([-12.0, -3.0], [-1.0, -2.0], [-11.0, -4.0], [-1.5, -2.5], lengths=(6, 2))
    assert chosen_nll(logps).tolist() == [2.0, 0.5]
    added = loss(logps, rpo_alpha=0.5) - loss(logps)
    assert torch.allclose(added, torch.tensor([1.0, 0.25], dtype=torch.float64), rtol=4 * EPS, atol=4 * EPS)
    chosen_B = logps.chosen_B.clone().requires_grad_()
    with_nll = PairLogps(chosen_B, *[getattr(logps, name) for name in list(vars(logps))[1:]])
    (both,) = torch.autograd.grad(loss(with_nll, rpo_alpha=0.5).sum(), chosen_B)
    (one,) = torch.autograd.grad(loss(with_nll).sum(), chosen_B)
    assert torch.allclose(both - one, torch.full_like(both, -0.5 / 6), rtol=16 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_margins_of_ten_thousand_nats_keep_loss_and_gradient_finite_and_right(beta, smoothing, dtype):
    margin_B = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero_B = torch.zeros(2, dtype=dtype)
    losses_B = loss(
        PairLogps(margin_B, zero_B, zero_B, zero_B, zero_B + 1, zero_B + 1), beta=beta, label_smoothing=smoothing
    )
    losses_B.sum().backward()
    logit, eps = beta * 1e4, torch.finfo(dtype).eps
    # log sigma(x) is 0 for a large x and x for a large -x, its slope 0 and 1
    assert losses_B.tolist() == pytest.approx([smoothing * logit, (1 - smoothing) * logit], rel=2 * eps, abs=0)
    assert margin_B.grad.tolist() == pytest.approx([beta * smoothing, -beta * (1 - smoothing)], rel=2 * eps, abs=0)


def test_reward_metrics_are_weighted_sums_under_trls_names():
    logps = pairs([-1.0, -2.0, -3.0], [-4.0, -1.0, -5.0], [-2.0, -2.5, -3.0], [-3.0, -2.5, -5.0])
    weight_B = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    losses_B = torch.tensor([8.0, 4.0, 2.0], dtype=torch.float64)
    sums = reward_metrics(logps, losses_B, weight_B, beta=0.5)
    # log-ratios: chosen 1, .5, 0; rejected -1, 1.5, 0: right, wrong, equal
    assert sums == {
        "loss": 8 + 2 + 0.5,
        "rewards/chosen": 0.5 * (1 + 0.25),
        "rewards/rejected": 0.5 * (-1 + 0.75),
        "rewards/margins": 0.5 * (2 - 0.5),
        "rewards/accuracies": 1 + 0.25 * 0.5,
        "logps/chosen": -1 - 1 - 0.75,
        "logps/rejected": -4 - 0.5 - 1.25,
        "weight": 1.75,
    }


# --- every loss -----------------------------------------------------------------------------------------------------

LN_3 = math.log(3)
HAND = pairs(-4 + LN_3, -6 - LN_3, -4.0, -6.0, lengths=(2, 3))  # odds against the reference: 3, 1/3; of the two: 9
FALLEN = pairs(-4 - LN_3, -6 - LN_3, -4.0, -6.0)
BY_HAND: list[tuple[PairLogps, dict, float]] = [
    (HAND, {"name": "sigmoid", "beta": 1.0}, math.log(10 / 9)),
    (
        HAND,
        {"name": "robust", "beta": 1.0, "label_smoothing": 0.1},
        (0.9 * math.log(10 / 9) - 0.1 * math.log(10)) / 0.8,
    ),
    (HAND, {"name": "hinge", "beta": 0.25}, 1 - 0.5 * LN_3),
    (HAND, {"name": "rso", "beta": 2.0}, 0.0),
    (HAND, {"name": "slic", "beta": 0.1}, 1 - 0.1 * (2 + 2 * LN_3)),
    (HAND, {"name": "ipo", "beta": 0.5}, (LN_3 * 5 / 6 - 1) ** 2),
    (HAND, {"name": "ipo_sum", "beta": 0.5}, (2 * LN_3 - 1) ** 2),
    (HAND, {"name": "dpo_norm", "beta": 1.2}, math.log(4 / 3)),  # 1.2 (ln 3 / 2 + ln 3 / 3) = ln 3
    (HAND, {"name": "simpo", "beta": 1.2, "simpo_gamma": 0.5}, math.log(1 + math.exp(0.5) / 3)),  # -4/2 = -6/3
    (HAND, {"name": "cpo", "beta": 0.5}, math.log(1 + math.exp(-1) / 3) + (4 - LN_3) / 2),
    (
        pairs(2 * math.log(3 / 4), 3 * math.log(1 / 4), lengths=(2, 3)),
        {"name": "orpo", "beta": 0.5},
        math.log(4 / 3) + 0.5 * math.log(10 / 9),
    ),
    (HAND, {"name": "nca_pair", "beta": 1.0}, 1.5 * math.log(4 / 3) + 0.5 * math.log(4)),
    (
        HAND,
        {"name": "exo_pair", "beta": 1.0, "label_smoothing": 0.25},
        0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.4),
    ),
    (HAND, {"name": "sppo_hard", "beta": 0.5}, 2 * (LN_3 - 1) ** 2),
    (HAND, {"name": "apo_zero", "beta": 1.0}, 1 / 4 + 1 / 4),
    (HAND, {"name": "apo_down", "beta": 1.0}, 3 / 4 + 1 / 10),
    (HAND, {"name": "discopop", "beta": 1.0, "discopop_tau": 1.0}, 0.1 * math.log(10 / 9) + 0.9 / 9),
    (HAND, {"name": "dpop", "beta": 1.0}, math.log(10 / 9)),  # the chosen answer has not fallen
    (FALLEN, {"name": "dpop", "beta": 1.0, "dpop_lambda": 2.0}, math.log(10)),  # by ln 3: d = 0 - 2 ln 3
    (HAND, {"name": "rdpo", "beta": 1.0, "rdpo_alpha": LN_3}, math.log(4 / 3)),  # 2 ln 3 + ln 3 (2 - 3)
    (HAND, {"name": "sft"}, (4 - LN_3) / 2),
    (HAND, {"divergence": "forward_kl", "beta": 0.375}, math.log(1 + math.exp(-1))),  # (1 - 1/3) - (1 - 3) = 8/3
    (HAND, {"divergence": "js", "beta": 1.0}, math.log(4 / 3)),  # ln(2 * 3/4) - ln(2 * 1/4) = ln 3
    (
        HAND,
        {"divergence": "alpha", "divergence_alpha": 0.5, "beta": 3**0.5 / 4},
        math.log(1 + math.exp(-1)),
    ),  # 4 / 3^.5
    (HAND, {"divergence": "alpha", "divergence_alpha": 0.0, "beta": 0.375}, math.log(1 + math.exp(-1))),  # forward KL
    (HAND, {"divergence": "alpha", "divergence_alpha": 1.0, "beta": 1.0}, math.log(10 / 9)),  # reverse KL
    (HAND, {"name": "sigmoid", "beta": 1.0, "mix": ["apo_zero:2", "sft:0.5"]}, math.log(10 / 9) + 1 + (4 - LN_3) / 4),
    (HAND, {"name": "apo_zero", "beta": 1.0, "wpo": True}, 0.5 * math.exp(-4) * 3 ** (1 / 2 - 1 / 3)),
    (  # WPO weighs what is compared, not the likelihood
        HAND,
        {"name": "apo_zero", "beta": 1.0, "wpo": True, "rpo_alpha": 1.0},
        0.5 * math.exp(-4) * 3 ** (1 / 2 - 1 / 3) + (4 - LN_3) / 2,
    ),
    (replace(HAND, margin_B=LN_3), {"beta": 1.0}, math.log(4 / 3)),
    (replace(HAND, margin_B=0.5), {"name": "hinge", "beta": 0.25}, 1.5 - 0.5 * LN_3),
    (replace(HAND, soft_label_B=0.75), {"beta": 1.0}, 0.75 * math.log(10 / 9) + 0.25 * math.log(10)),
    # 0.75 right, of which a tenth flips, and a tenth of the wrong ones flips back
    (
        replace(HAND, soft_label_B=0.75),
        {"beta": 1.0, "label_smoothing": 0.1},
        0.7 * math.log(10 / 9) + 0.3 * math.log(10),
    ),
]


@pytest.mark.parametrize(("logps", "settings", "expected"), BY_HAND, ids=lambda value: str(value)[:60])
def test_every_loss_has_the_value_worked_out_by_hand(logps, settings, expected):
    assert loss(logps, **settings).item() == pytest.approx(expected, rel=16 * EPS, abs=4 * EPS)


def test_every_loss_and_divergence_is_worked_out_by_hand():
    assert {settings.get("name", "sigmoid") for _, settings, _ in BY_HAND} == LOSSES.keys()


def _s(m, x):
    return 1 / (1 + m.exp(-x))


Plain = Callable[..., object]
PLAIN: dict[str, Plain] = {  # in probabilities; w, r: log-ratios, a, b: log-probs, p, q: lengths, c: the settings
    "sigmoid": lambda m, w, r, a, b, p, q, c: -m.log(_s(m, c.beta * (w - r))),
    "robust": lambda m, w, r, a, b, p, q, c: (
        (-(1 - c.label_smoothing) * m.log(_s(m, c.beta * (w - r))) + c.label_smoothing * m.log(_s(m, c.beta * (r - w))))
        / (1 - 2 * c.label_smoothing)
    ),
    "hinge": lambda m, w, r, a, b, p, q, c: max(0, 1 - c.beta * w + c.beta * r),
    "rso": lambda m, w, r, a, b, p, q, c: max(0, 1 - c.beta * w + c.beta * r),
    "slic": lambda m, w, r, a, b, p, q, c: max(0, 1 - c.beta * a + c.beta * b),
    "ipo": lambda m, w, r, a, b, p, q, c: (w / p - r / q - 1 / (2 * c.beta)) ** 2,
    "ipo_sum": lambda m, w, r, a, b, p, q, c: (w - r - 1 / (2 * c.beta)) ** 2,
    "dpo_norm": lambda m, w, r, a, b, p, q, c: m.log(1 + m.exp(-c.beta * (w / p - r / q))),
    "simpo": lambda m, w, r, a, b, p, q, c: m.log(1 + m.exp(c.simpo_gamma - c.beta * (a / p - b / q))),
    "cpo": lambda m, w, r, a, b, p, q, c: m.log(1 + m.exp(-c.beta * (a - b))) - a / p,
    "orpo": lambda m, w, r, a, b, p, q, c: (
        -a / p + c.beta * m.log(1 + (m.exp(b / q) / (1 - m.exp(b / q))) / (m.exp(a / p) / (1 - m.exp(a / p))))
    ),
    "nca_pair": lambda m, w, r, a, b, p, q, c: (
        -m.log(_s(m, c.beta * w) * (1 - _s(m, c.beta * w)) ** 0.5 * (1 - _s(m, c.beta * r)) ** 0.5)
    ),
    "exo_pair": lambda m, w, r, a, b, p, q, c: sum(
        x * m.log(x / y)
        for x, y in ((_s(m, c.beta * (w - r)), 1 - c.label_smoothing), (_s(m, c.beta * (r - w)), c.label_smoothing))
    ),
    "sppo_hard": lambda m, w, r, a, b, p, q, c: (w - 1 / (2 * c.beta)) ** 2 + (r + 1 / (2 * c.beta)) ** 2,
    "apo_zero": lambda m, w, r, a, b, p, q, c: 1 - _s(m, c.beta * w) + _s(m, c.beta * r),
    "apo_down": lambda m, w, r, a, b, p, q, c: _s(m, c.beta * w) + 1 - _s(m, c.beta * (w - r)),
    "discopop": lambda m, w, r, a, b, p, q, c: (
        (1 - _s(m, c.beta * (w - r) / c.discopop_tau)) * -m.log(_s(m, c.beta * (w - r)))
        + _s(m, c.beta * (w - r) / c.discopop_tau) * m.exp(c.beta * (r - w))
    ),
    "dpop": lambda m, w, r, a, b, p, q, c: -m.log(_s(m, c.beta * (w - r + c.dpop_lambda * min(0, w)))),
    "rdpo": lambda m, w, r, a, b, p, q, c: -m.log(_s(m, c.beta * (w - r) + c.rdpo_alpha * (p - q))),
    "sft": lambda m, w, r, a, b, p, q, c: -a / p,
}


def plain_losses(name: str, m, logps: PairLogps, config: LossConfig) -> list:
    """PLAIN in the arithmetic of `m`: mpmath's (the truth) or Python's floats (the yardstick)."""
    number = mpmath.mpf if m is mpmath.mp else float
    rows = zip(*(column.tolist() for column in list(vars(logps).values())[:6]), strict=True)
    values = []
    for chosen, rejected, reference_chosen, reference_rejected, p, q in rows:
        a, b, ra, rb = map(number, (chosen, rejected, reference_chosen, reference_rejected))
        values.append(PLAIN[name](m, a - ra, b - rb, a, b, p, q, config))
    return values


def smoothed(name: str) -> float:
    return 0.1 if name in ("robust", "exo_pair") else 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_errs_at_most_twice_as_much_as_the_plain_formula_in_fp64(name):
    config = LossConfig(name=name, beta=0.3, label_smoothing=smoothed(name), dpop_lambda=2.0)
    logps = random_pairs()
    with mpmath.workdps(60):
        truth = plain_losses(name, mpmath.mp, logps, config)
        plain = [abs(float(x - t)) for x, t in zip(plain_losses(name, math, logps, config), truth, strict=True)]
        ours = [abs(float(x - t)) for x, t in zip(pair_losses(logps, config).tolist(), truth, strict=True)]
        size = max(1.0, *(abs(float(t)) for t in truth))
    assert max(ours) <= 2 * max(max(plain), 4 * EPS * size)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.2}, {"rpo_alpha": 0.7}, {"divergence": "forward_kl"}, {"divergence": "alpha"}],
)
def test_gradients_are_those_of_finite_differences_in_fp64(name, settings):
    logps = random_pairs(6)
    settings = {"label_smoothing": smoothed(name)} | settings
    config = LossConfig(name=name, **settings)
    inputs = (logps.chosen_B.clone().requires_grad_(), logps.rejected_B.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda chosen_B, rejected_B: pair_losses(replace(logps, chosen_B=chosen_B, rejected_B=rejected_B), config),
        inputs,
    )


NOT_ALWAYS_UP = {"ipo", "ipo_sum", "sppo_hard", "exo_pair", "apo_down"}  # these aim at a finite lead, or push both down


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_sends_a_gradient_into_the_reference_or_mixes_pairs(name):
    logps = random_pairs(5)
    config = LossConfig(name=name, label_smoothing=smoothed(name))
    chosen_B = logps.chosen_B.clone().requires_grad_()
    losses_B = pair_losses(replace(logps, chosen_B=chosen_B), config)
    jacobian = torch.stack([torch.autograd.grad(one, chosen_B, retain_graph=True)[0] for one in losses_B])
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal())) and bool((jacobian.diagonal() != 0).any())
    assert bool((jacobian.diagonal() <= 0).all()) or name in NOT_ALWAYS_UP


EVERY = [(name, "reverse_kl") for name in LOSSES]
EVERY += [(name, divergence) for name in sorted(READ_BY["divergence"]) for divergence in ("forward_kl", "js", "alpha")]


@pytest.mark.parametrize(("name", "divergence"), EVERY)
def test_margins_of_ten_thousand_nats_keep_every_loss_and_gradient_finite(name, divergence):
    """Ratios of 1e4 nats either way, of one token and of a thousand; and the value is the plain formula's."""
    config = LossConfig(name=name, beta=0.01, label_smoothing=smoothed(name), divergence=divergence)
    far = [(one, other) for one in (-1e4, 0.0, 1e4) for other in (-1e4, 0.0, 1e4)]
    chosen, rejected = (torch.tensor([-2e4 + one[i] for one in far] * 2, dtype=torch.float64) for i in (0, 1))
    logps = pairs(chosen, rejected, -2e4, -2e4)
    tokens_B = torch.tensor([1] * 9 + [1000] * 9)
    inputs = [chosen.requires_grad_(), rejected.requires_grad_()]
    logps = replace(logps, chosen_B=chosen, rejected_B=rejected, chosen_length_B=tokens_B, rejected_length_B=tokens_B)
    losses_B = pair_losses(logps, config)
    losses_B.sum().backward()
    assert all(bool(x.isfinite().all()) for x in (losses_B, *(one.grad for one in inputs if one.grad is not None)))
    if divergence == "reverse_kl":
        with mpmath.workdps(2500):
            truth = plain_losses(name, mpmath.mp, logps, config)
            for ours, exact in zip(losses_B.tolist(), truth, strict=True):
                assert abs(ours - exact) <= 4 * EPS * max(1, abs(exact))


def test_beyond_thirty_nats_an_exponential_goes_on_as_its_tangent_and_keeps_its_gradient():
    """There fp32 gradients would overflow (TRL: inf, or a clamp that sends no gradient at all)."""
    for ratio in (-29.0, -31.0, -1e4):
        chosen_B = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
        one = pair_losses(pairs(chosen_B, 0.0), LossConfig(divergence="forward_kl", beta=1.0))
        (slope,) = torch.autograd.grad(one, chosen_B)
        assert slope.item() == pytest.approx(-math.exp(min(-ratio, 30.0)), rel=1e-9)
        value = math.exp(30) * (1 + max(0.0, -ratio - 30)) if ratio < -30 else math.exp(-ratio)
        assert one.item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("sure", [0.0, -1e-9, -1e-30])
def test_orpo_is_finite_where_an_answer_is_certain(sure):
    for chosen, rejected in ((sure, sure), (sure, -3.0), (-3.0, sure)):
        logps = pairs(chosen, rejected)
        chosen_B, rejected_B = logps.chosen_B.requires_grad_(), logps.rejected_B.requires_grad_()
        one = pair_losses(logps, LossConfig(name="orpo"))
        slopes = torch.autograd.grad(one, (chosen_B, rejected_B))
        assert all(bool(x.isfinite()) for x in (one, *slopes)) and slopes[1].item() > 0 > slopes[0].item()


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_equal_sequences_of_one_token_or_none_are_finite_with_finite_gradients(name, length):
    """Step 0 of any run: policy = reference; and chosen = rejected. No token at all counts as a mean of 0."""
    sums = (-3.0 if length else 0.0,) * 4
    logps = pairs(*sums, lengths=(length, length))
    config = LossConfig(name=name, label_smoothing=smoothed(name))
    inputs = logps.chosen_B.requires_grad_(), logps.rejected_B.requires_grad_()
    losses_B = pair_losses(logps, config)
    slopes = torch.autograd.grad(losses_B.sum(), inputs, allow_unused=True)
    assert all(bool(x.isfinite().all()) for x in (losses_B, *(slope for slope in slopes if slope is not None)))
    if name in READ_BY["reference"] and length:
        free = plain_losses(name, math, pairs(0.0, 0.0, lengths=(1, 1)), config)
        assert losses_B.item() == pytest.approx(free[0], rel=4 * EPS, abs=4 * EPS)


# --- what a loss looks at -------------------------------------------------------------------------------------------


def changed(name: str, what: str) -> bool:
    """Whether another value of `what` changes the loss of some pair."""
    logps = replace(random_pairs(), tails_4B=torch.arange(200.0, dtype=torch.float64).reshape(4, 50) / 100)
    config = LossConfig(name=name, label_smoothing=smoothed(name))
    other = {
        "reference": lambda: (replace(logps, reference_chosen_B=logps.reference_chosen_B + 0.5), config),
        "label_smoothing": lambda: (logps, config.model_copy(update={"label_smoothing": 0.2})),
        "soft_label": lambda: (replace(logps, soft_label_B=torch.full((50,), 0.7)), config),
        "margin": lambda: (replace(logps, margin_B=torch.full((50,), 0.7)), config),
        "divergence": lambda: (logps, config.model_copy(update={"divergence": "js"})),
        "ld_alpha": lambda: (logps, config.model_copy(update={"ld_alpha": 0.5})),
        "simpo_gamma": lambda: (logps, config.model_copy(update={"simpo_gamma": 0.7})),
        "discopop_tau": lambda: (logps, config.model_copy(update={"discopop_tau": 0.7})),
        "dpop_lambda": lambda: (logps, config.model_copy(update={"dpop_lambda": 0.7})),
        "rdpo_alpha": lambda: (logps, config.model_copy(update={"rdpo_alpha": 0.7})),
    }
    return not torch.equal(pair_losses(logps, config), pair_losses(*other[what]()))


@pytest.mark.parametrize("what", READ_BY)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_looks_at_what_the_table_says_and_at_nothing_else(name, what):
    assert changed(name, what) == (name in READ_BY[what])


@pytest.mark.parametrize(
    ("settings", "columns", "expected"),
    [
        ({"name": "sigmod"}, (), ['loss.name = "sigmod"', "did you mean sigmoid? Allowed are sigmoid, robust"]),
        ({"name": "hinge", "label_smoothing": 0.1}, (), ["loss.label_smoothing = 0.1", "loss hinge", "use sigmoid"]),
        ({"name": "orpo", "divergence": "js"}, (), ["loss.divergence = js", "loss orpo"]),
        ({"name": "sft", "ld_alpha": 0.5}, (), ["loss.ld_alpha = 0.5", "loss sft"]),
        ({"simpo_gamma": 1.0}, (), ["loss.simpo_gamma = 1.0", "loss sigmoid", "use simpo"]),
        ({"name": "simpo", "dpop_lambda": 7.0}, (), ["loss.dpop_lambda = 7.0", "loss simpo", "use dpop"]),
        ({"divergence_alpha": 0.2}, (), ["loss.divergence_alpha = 0.2", "loss.divergence=alpha"]),
        ({"name": "simpo", "reference_free": True}, (), ["loss.reference_free", "loss simpo"]),
        ({"name": "ipo"}, ("margin",), ["the rows' column margin", "loss ipo"]),
        ({"name": "robust", "label_smoothing": 0.1}, ("soft_label",), ["the rows' column soft_label", "loss robust"]),
        ({"name": "exo_pair"}, (), ["loss.label_smoothing = 0", "1e-3"]),
        ({"mix": ["exo_pair:1"]}, (), ["loss.label_smoothing = 0", "1e-3"]),
        ({"mix": ["sft"]}, (), ['loss.mix: "sft"', "NAME:WEIGHT, e.g. sft:0.1"]),
        ({"mix": ["sft:x"]}, (), ['"sft:x"']),
        ({"mix": ["sft:0"]}, (), ['"sft:0"', "above 0"]),
        ({"mix": ["sft:inf"]}, (), ['"sft:inf"']),
        ({"mix": ["stf:1"]}, (), ['"stf:1"', "losses: sigmoid, "]),
        ({"mix": ["sigmoid:1"]}, (), ['"sigmoid:1"', "not added yet (sigmoid is)"]),
        ({"mix": ["sft:1", "sft:2"]}, (), ['"sft:2"', "(sigmoid, sft are)"]),
    ],
)
def test_what_would_be_ignored_or_is_no_loss_is_refused(settings, columns, expected):
    with pytest.raises(UserError) as error:
        check_loss(LossConfig(**settings), columns)
    assert all(part in str(error.value) for part in expected), str(error.value)


def test_a_setting_that_one_of_the_mixed_losses_reads_is_accepted():
    config = LossConfig(name="sft", mix=["sigmoid:2"], label_smoothing=0.1, ld_alpha=0.5)
    check_loss(config, ("margin", "soft_label", "weight"))
    check_loss(LossConfig(mix=["rdpo:1"], rdpo_alpha=0.1, divergence="alpha", divergence_alpha=0.2), ())
    assert terms(config) == {"sft": 1.0, "sigmoid": 2.0}
    assert reads(config, "reference") and not reads(LossConfig(name="sft", mix=["orpo:1"]), "reference")
    assert not reads(LossConfig(reference_free=True), "reference")


def test_wpo_weighs_a_pair_by_its_probability_per_token_and_sends_no_gradient_through_the_weight():
    logps = random_pairs()
    chosen_B = logps.chosen_B.clone().requires_grad_()
    logps = replace(logps, chosen_B=chosen_B)
    slopes = [torch.autograd.grad(loss(logps, wpo=wpo).sum(), chosen_B)[0] for wpo in (False, True)]
    weight_B = (logps.chosen_B / logps.chosen_length_B).exp() * (logps.rejected_B / logps.rejected_length_B).exp()
    assert torch.allclose(wpo_weight(logps), weight_B, rtol=64 * EPS, atol=0) and not wpo_weight(logps).requires_grad
    assert torch.allclose(slopes[1], slopes[0] * weight_B, rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("name", ["sft", "cpo", "orpo"])
def test_the_likelihood_of_the_chosen_answer_is_never_shortened(name):
    """LD-DPO discounts what is compared, not what is learnt by heart."""
    logps = replace(random_pairs(), tails_4B=torch.arange(200.0, dtype=torch.float64).reshape(4, 50) / 100)
    with_ld = loss(logps, ld_alpha=0.5, mix=[f"{name}:1"]) - loss(logps, ld_alpha=0.5)
    assert torch.allclose(with_ld, loss(logps, name=name), rtol=1024 * EPS, atol=1024 * EPS)
    added = loss(logps, ld_alpha=0.5, rpo_alpha=1.0) - loss(logps, ld_alpha=0.5)
    assert torch.allclose(added, chosen_nll(logps), rtol=1024 * EPS, atol=1024 * EPS)
