"""kernels/widened.py: products of bf16 numbers in fp32 lose nothing, nor do fast ones."""

import pytest
import torch
from products import Products

from kernels.widened import _rounds_to_bf16, exact, fast_products, widened_product


def factors(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(m, k, generator=draw).to(dtype), torch.randn(k, n, generator=draw).to(dtype)


def worst(product: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    return float((product - a.double() @ b.double()).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(16, 64, 1500), (1500, 64, 16), (24, 1500, 40), (1, 1, 1)])
def test_a_widened_product_is_as_exact_as_one_of_fp32_copies(dtype, m, k, n):
    a, b = factors(m, k, n, dtype)
    product = widened_product(a, b)
    assert product.dtype == torch.float32
    error = worst(a.float() @ b.float(), a, b)
    assert worst(product, a, b) <= 4 * error + torch.finfo(torch.float32).eps  # fp32 sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fast_products_lose_nothing_of_what_they_are_told_to_expect(dtype):
    a, b = (x.to(exact(dtype)) for x in factors(128, 256, 300, dtype))
    with fast_products(dtype):
        one, batched = a @ b, a[None] @ b[None]
        halved = torch.baddbmm(a.new_zeros(()), a[None], b[None], beta=0, alpha=0.5)
    for product in (one, batched[0], 2 * halved[0]):
        assert worst(product, a, b) <= 4 * worst(a @ b, a, b)  # fp32 sums in another order


def test_what_onednn_may_do_is_as_before_afterwards_even_after_an_error():
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products(torch.bfloat16):
        assert products.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert products.fp32_precision == before != "bf16"
    with fast_products(torch.bfloat16, wanted=False):
        assert products.fp32_precision == before


@pytest.mark.parametrize("rounds", [True, False])
def test_of_fp32_numbers_products_are_fast_only_where_onednn_does_not_round_them(monkeypatch, rounds):
    monkeypatch.setattr("kernels.widened._rounds_to_bf16", lambda: rounds)
    for dtype in (torch.float32, torch.float16):
        with fast_products(dtype):
            assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") != rounds


def test_whether_this_machine_rounds_is_what_its_products_say():
    a, b = factors(300, 64, 300, torch.float32)
    with fast_products(torch.bfloat16):
        product = a @ b
    assert _rounds_to_bf16() == (worst(product, a, b) > 100 * worst(a @ b, a, b))


def test_where_onednn_rounds_probabilities_are_kept_from_it(monkeypatch):
    monkeypatch.setattr("kernels.widened._rounds_to_bf16", lambda: True)
    asked = []
    (a, _), (h, w) = factors(16, 64, 1, torch.float32), factors(16, 64, 1500, torch.bfloat16)
    with Products(lambda a, b, fast: asked.append(fast)):
        widened_product(a, w)
        assert asked and not any(asked)
        widened_product(h, w)
    assert asked[-1]
