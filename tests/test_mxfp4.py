"""kernels/mxfp4.py: values against the format's definition and transformers', products against the unpacked weight."""

import pytest
import torch
import torch.nn.functional as F

from kernels import Packed, dequantise, rows_linear
from kernels.mxfp4 import VALUES, reference_dequantise

GENERATOR = torch.Generator().manual_seed(0)
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted"))]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def packed(*shape: int, low: int = 115, high: int = 125) -> Packed:
    """Random blocks of a weight [..., inputs], scales within [low, high]."""
    groups = (*shape[:-1], shape[-1] // 32)
    blocks = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=GENERATOR)
    return Packed(blocks, torch.randint(low, high + 1, groups, dtype=torch.uint8, generator=GENERATOR))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_every_byte_under_every_scale_has_the_value_of_the_definition(backend, dtype):
    low, high = (1, 252) if dtype != torch.float16 else (103, 140)  # those of which no value is rounded or infinite
    if backend == "triton" and dtype == torch.float64:
        backend = "auto"
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(high - low + 1, 16, 16).contiguous()
    scales = torch.arange(low, high + 1, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
    truth = reference_dequantise(blocks, scales)
    assert truth.unique().numel() > 15 and truth[127 - low, :32].tolist() == [v for b in range(16) for v in (VALUES[b], 0)]
    values = dequantise(blocks, scales, dtype, backend=backend)
    assert values.dtype == dtype and torch.equal(values.double(), truth)
    assert torch.equal(values.signbit(), truth.signbit())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 32), (7, 2, 3, 64)])
def test_odd_numbers_of_blocks_are_unpacked_whole_and_nothing_else_is_written(backend, shape):
    weight = packed(*shape)
    assert torch.equal(dequantise(*weight, backend=backend).double(), reference_dequantise(*weight))


def test_the_values_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = packed(2, 8, 64)
    exact = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(dequantise(blocks, scales).transpose(1, 2), exact.cpu())  # theirs are [E, in, out]


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
