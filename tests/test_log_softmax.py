"""kernels/log_softmax.py: the claims of tests/kernel_claims_rows.py by the row kernels and by the torch path."""

import pytest
import torch

import kernels
from kernels import selective_log_softmax
from kernels.log_softmax import reference_selective_log_softmax
from tests import kernel_claims_rows as claims

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the claims run in the interpreter")


@in_interpreter
@pytest.mark.parametrize("claim", claims.ROWS, ids=lambda claim: claim.__name__)
def test_row_kernels(claim):
    claim(kernels)


@pytest.mark.parametrize("claim", claims.ROWS, ids=lambda claim: claim.__name__)
def test_torch_path(claim, monkeypatch):
    monkeypatch.setattr("kernels.backend.resolve", lambda *asked: "torch")
    claim(kernels)


def test_gradcheck_of_the_torch_path_in_fp64():
    logits, index = claims.random(5, 7).requires_grad_(), torch.tensor([0, 6, -100, 3, 3])

    def value(logits):
        out = selective_log_softmax(logits, index, temperature=0.7, return_lse=True, return_entropy=True)
        return out.logp_T, out.lse_T

    assert torch.autograd.gradcheck(value, logits)
    assert torch.autograd.gradcheck(lambda logits: sum(value(logits)), logits)  # of which nothing but 1[v = y] is left
    truth = reference_selective_log_softmax(logits.detach(), index, 0.7)
    few_steps = 4 * torch.finfo(torch.float64).eps
    assert torch.allclose(value(logits)[0].detach(), truth, rtol=few_steps, atol=few_steps)
