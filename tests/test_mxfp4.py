"""kernels/mxfp4.py: values against the format's definition and transformers', products against the unpacked weight."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import Packed, dequantise, rows_linear
from kernels.mxfp4 import VALUES
from tests import kernel_claims_rows as claims
from tests.kernel_claims_rows import reference_dequantise

GENERATOR = torch.Generator().manual_seed(0)
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def packed(*shape: int, low: int = 115, high: int = 125) -> Packed:
    """Random blocks of a weight [..., inputs], scales within [low, high]."""
    groups = (*shape[:-1], shape[-1] // 32)
    blocks = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=GENERATOR)
    return Packed(blocks, torch.randint(low, high + 1, groups, dtype=torch.uint8, generator=GENERATOR))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claims run in the interpreter")
@pytest.mark.parametrize("claim", claims.PACKED, ids=lambda claim: claim.__name__)
def test_triton_kernel(claim):
    claim(kernels)


@pytest.mark.parametrize("claim", claims.PACKED, ids=lambda claim: claim.__name__)
def test_torch_path(claim, monkeypatch):
    monkeypatch.setattr("kernels.backend.resolve", lambda *asked: "torch")
    claim(kernels)


def test_the_values_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = packed(2, 8, 64)
    exact = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(dequantise(blocks, scales).transpose(1, 2), exact.cpu())  # theirs are [E, in, out]


def test_the_definition_is_the_formats_own():
    """Low half first; 1 sign, 2 exponent and 1 mantissa bits; a scale of 127 is 1."""
    blocks, scales = torch.arange(16, dtype=torch.uint8)[None], torch.tensor([128], dtype=torch.uint8)
    assert reference_dequantise(blocks, scales).tolist() == [2 * v for code in range(16) for v in (VALUES[code], 0.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_has_the_bits_of_the_unpacked_one_and_so_have_its_gradients(dtype, bias):
    weight = packed(48, 96)
    x = torch.randn(64, 96, generator=GENERATOR, dtype=torch.float64).to(dtype)
    start, up = (torch.randn(n, 48, generator=GENERATOR, dtype=torch.float64).to(dtype) for n in (1, 64))
    outcomes = []
    for one in (weight, dequantise(*weight), dequantise(*weight, dtype)):
        inputs = [x.clone().requires_grad_(), start[0].clone().requires_grad_(bias)]
        y = rows_linear(inputs[0], one, inputs[1] if bias else None, rows=32)
        y.backward(up)
        outcomes.append([y, *(tensor.grad for tensor in inputs if tensor.requires_grad)])
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))
    plain = x.clone().requires_grad_()
    exact = F.linear(plain.double(), reference_dequantise(*weight), start[0].double() if bias else None)
    exact.backward(up.double())
    yardstick = F.linear(x, dequantise(*weight, dtype), start[0] if bias else None)
    assert (outcomes[0][0] - exact).norm() <= 2 * (yardstick - exact).norm() + 1e-15 * exact.norm()
    assert (outcomes[0][1] - plain.grad).norm() <= 4 * torch.finfo(dtype).eps * plain.grad.norm()


def test_nothing_unpacked_is_kept_for_the_backward():
    weight, kept = packed(64, 64), []
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rows_linear(x, weight, rows=32)
    assert kept and all(tensor.dtype == torch.uint8 for tensor in kept)


@pytest.mark.parametrize("start", ["bias", "rows", None])
def test_gradients_of_the_product_pass_gradcheck(start):
    x, weight, bias, rows = (
        torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).requires_grad_()
        for shape in ((6, 5), (4, 5), (4,), (6, 4))
    )
    begin, alpha = {"bias": (bias, 0.7), "rows": (rows, 0.7), None: (None, 1.0)}[start]
    inputs = [x, weight] if begin is None else [x, weight, begin]
    assert torch.autograd.gradcheck(lambda *given: rows_linear(*given, rows=3, alpha=alpha), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 96, 2880])
def test_a_row_has_the_same_bits_wherever_it_stands_and_whatever_stands_beside_it(dtype, inputs):
    weight = torch.randn(128, inputs, generator=GENERATOR).to(dtype)
    x = torch.randn(192, inputs, generator=GENERATOR).to(dtype)
    order = torch.randperm(192, generator=GENERATOR)
    whole = rows_linear(x, weight, rows=64)
    assert torch.equal(rows_linear(x[order], weight, rows=64), whole[order])
    assert torch.equal(rows_linear(x[:64], weight, rows=64), whole[:64])
