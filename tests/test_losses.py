"""dpo/losses.py against values worked out by hand, formulas in another form, and what must hold for every loss."""

import math

import numpy as np
import pytest
import torch

from dpo.config import LossConfig
from dpo.losses import LOSSES, chosen_nll, pair_losses, reward_metrics
from dpo.pairs import PairLogps

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
    return PairLogps(*(reference + ratio), *reference, *lengths)


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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"rpo_alpha": 0.7}])
def test_gradients_are_those_of_finite_differences_in_fp64(name, settings):
    logps = random_pairs(6)
    fixed = (*_references(logps), logps.chosen_length_B, logps.rejected_length_B)
    config = LossConfig(name=name, **settings)
    inputs = (logps.chosen_B.clone().requires_grad_(), logps.rejected_B.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda chosen_B, rejected_B: pair_losses(PairLogps(chosen_B, rejected_B, *fixed), config), inputs
    )


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_sends_a_gradient_into_the_reference_or_mixes_pairs(name):
    logps = random_pairs(5)
    chosen_B = logps.chosen_B.clone().requires_grad_()
    losses_B = pair_losses(PairLogps(chosen_B, *list(vars(logps).values())[1:]), LossConfig(name=name))
    jacobian = torch.stack([torch.autograd.grad(one, chosen_B, retain_graph=True)[0] for one in losses_B])
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal())) and bool((jacobian.diagonal() < 0).all())


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
