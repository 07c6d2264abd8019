"""kernels/preference_loss.py: the claims of tests/kernel_claims_rows.py, dpo's own losses, and what is refused."""

import importlib

import pytest
import torch

import kernels
from dpo.config import LossConfig
from dpo.logprobs import completion_sums
from dpo.losses import LOSSES, PairLogps
from kernels import preference_loss
from tests import kernel_claims_rows as claims

kernels.preference_loss_module = importlib.import_module("kernels.preference_loss")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claims run in the interpreter")
@pytest.mark.parametrize("claim", claims.PAIRS, ids=lambda claim: claim.__name__)
def test_pair_kernels(claim):
    claim(kernels)


@pytest.mark.parametrize("claim", claims.PAIRS, ids=lambda claim: claim.__name__)
def test_torch_path(claim, monkeypatch):
    monkeypatch.setattr("kernels.backend.resolve", lambda *asked: "torch")
    claim(kernels)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_agrees_with_the_loss_that_training_uses(backend, smoothing):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels run in the interpreter")
    policy, reference, bounds = claims.random(64).float(), claims.random(64, seed=1).float(), claims.BOUNDS
    completion = torch.repeat_interleave(torch.arange(6), bounds.diff())
    sums, reference_sums = (completion_sums(x[:61], completion, 6) for x in (policy, reference))
    lengths = bounds.diff().double()
    logps = PairLogps(sums[0::2], sums[1::2], reference_sums[0::2], reference_sums[1::2], lengths[0::2], lengths[1::2])
    config = LossConfig(name="sigmoid", beta=0.2, label_smoothing=smoothing)
    ours = preference_loss(policy, bounds, reference_T=reference, beta=0.2, label_smoothing=smoothing, backend=backend)
    few_steps = {"rtol": 4 * claims.EPS, "atol": 0}
    assert torch.allclose(ours.losses_B.double(), LOSSES["sigmoid"](logps, config), **few_steps)
    assert torch.allclose(ours.chosen_rewards_B.double(), 0.2 * logps.chosen_ratio_B, **few_steps)
    assert torch.allclose(ours.rejected_rewards_B.double(), 0.2 * logps.rejected_ratio_B, **few_steps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_pairs_send_a_gradient_of_zeros(backend):
    """A rank without pairs runs its backward with the others: its loss is part of the graph."""
    policy = claims.random(3).float().requires_grad_()
    none = torch.zeros(0, dtype=torch.float64)
    result = preference_loss(policy[:0], torch.tensor([0]), reference_S=none, backend=backend)
    result.losses_B.sum().backward()
    assert result.losses_B.shape == (0,) and not policy.grad.any()


def test_a_loss_may_be_a_function_of_the_log_ratios():
    policy = claims.random(64).requires_grad_()
    by_name = preference_loss(policy, claims.BOUNDS, beta=0.5, loss="ipo")
    by_function = preference_loss(policy, claims.BOUNDS, beta=0.5, loss=lambda w, l: (w - l - 1).square())  # noqa: E741
    assert torch.equal(by_name.losses_B, by_function.losses_B)
    assert torch.autograd.gradcheck(lambda p: preference_loss(p, claims.BOUNDS, loss="sigmoid").losses_B, policy)


def test_what_cannot_be_meant_is_refused_by_name():
    policy = claims.random(64)
    for wrong, named in (
        ({"loss": "sigmoidal"}, "loss='sigmoidal'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"pairing": "zip"}, "pairing='zip'"),
        ({"loss": lambda w, l: w - l, "backend": "triton"}, "backend='triton'"),  # noqa: E741
        ({"backend": "cuda"}, "backend='cuda'"),
    ):
        with pytest.raises(ValueError, match=named):
            preference_loss(policy, claims.BOUNDS, **wrong)
