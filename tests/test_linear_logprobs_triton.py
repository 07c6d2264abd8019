"""kernels/linear_logprobs.py by its Triton kernels, in the interpreter: the claims of tests/kernel_claims.py."""

import functools
import importlib

import pytest
import torch

import kernels
from kernels import tiles
from tests import kernel_claims as claims

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the claims run in the interpreter")

kernels.linear_logprobs_module = importlib.import_module("kernels.linear_logprobs")


@pytest.mark.parametrize("claim", claims.LINEAR, ids=lambda claim: claim.__name__)
def test_fused(claim):
    claim(kernels)


WITH_DESCRIPTORS = [
    claims.padding_is_inert_and_nothing_is_written_beyond_a_buffer,
    claims.linear_error_is_at_most_twice_torchs_in_fp16,
]


@pytest.mark.parametrize("claim", WITH_DESCRIPTORS, ids=lambda claim: claim.__name__)
def test_fused_with_descriptors(claim, monkeypatch):
    described = {name: t | {"DESC": 1} if "DESC" in t else t for name, t in tiles.TILES["interpret"].items()}
    monkeypatch.setitem(tiles.TILES, "interpret", described)
    claim(kernels)


@pytest.fixture
def chunked(monkeypatch):
    """The path of library products around the row kernels, in chunks small enough to meet their edges."""
    monkeypatch.setattr("kernels.backend.resolve", lambda *asked: "chunked")
    monkeypatch.setattr(kernels.linear_logprobs_module, "CHUNKED_TOKENS", 16)
    monkeypatch.setattr(kernels, "linear_logprobs", functools.partial(kernels.linear_logprobs, chunk_tokens=16))
    whole_rows = {name: {"BV": 512} for name in ("row_forward", "row_backward")}  # in blocks: tests/test_log_softmax.py
    monkeypatch.setitem(tiles.TILES, "interpret", tiles.TILES["interpret"] | whole_rows)


NOT_CHUNKED = (  # dW is summed in other chunks, and only the fused path's scaled exponentials can be moved
    claims.chunks_of_rows_and_recomputing_change_no_bits,
    claims.offsets_beyond_two_to_the_31_are_reached,
    claims.linear_error_is_at_most_twice_torchs_in_bf16_at_odd_sizes,  # on a GPU by products that have fp32 results
    claims.linear_error_is_at_most_twice_torchs_in_fp16,
)


@pytest.mark.parametrize("claim", [c for c in claims.LINEAR if c not in NOT_CHUNKED], ids=lambda claim: claim.__name__)
def test_chunked(claim, chunked):
    claim(kernels)
