"""Padding that is not run: fewer rows where no bit changes, all of them where one would."""

import pytest
import torch

from dpo.config import Config
from dpo.logprobs import pack_logps
from dpo.packing import Pack, pack_trees
from dpo.trees import Completion, Pair, Tree
from models import decoder, padding
from models.decoder import Decoder, load_decoder
from models.lora import Adapter, add_lora
from models.padding import Shape, exact_counts, rows_to_run
from models.tiny import FAMILIES, write_tiny_model

PACK = Config(exp="test", pack={"tokens": 512}).pack


def half_full() -> Pack:
    """A pack of 512 tokens that holds 170."""
    tree = Tree(
        "t",
        tuple(range(50, 150)),
        (tuple(range(100, 140)), tuple(range(60, 90))),
        tuple(Completion(branch, 0, tuple(range(60, 80))) for branch in (0, 1)),
        (Pair(0, 1, 1.0),),
    )
    [batch] = pack_trees([tree], PACK.tokens)
    [pack] = batch.packs
    assert pack.layout.tokens == 170
    return pack


def run_rows(model: Decoder, pack: Pack) -> tuple[torch.Tensor, int]:
    """The pack's log-probs, and how many of its rows went through the layers."""
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda layer, given, out: seen.append(len(out)))
    logp_R = pack_logps(model, pack, PACK.head_chunk)
    hook.remove()
    return logp_R, seen[0]


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "rows_to_run", lambda model, tokens, pack, dtype: pack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_most_of_its_padding_a_pack_has_the_bits_that_it_has_with_it(tmp_path, monkeypatch, family, dtype):
    write_tiny_model(tmp_path, family=family)
    model, pack = load_decoder(tmp_path, weight_dtype=dtype, compute_dtype=dtype), half_full()
    with torch.no_grad():
        less, rows = run_rows(model, pack)
        whole(monkeypatch)
        more, all_rows = run_rows(model, pack)
    assert torch.equal(less, more) and rows <= all_rows == 512
    assert rows == rows_to_run(model, 170, 512, dtype)


def test_on_the_real_model_too_and_with_an_adapter(smollm2_folder, monkeypatch):
    pack = half_full()
    model = load_decoder(smollm2_folder, weight_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    add_lora(model, Adapter(4, 8.0), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.B"):
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        less, rows = run_rows(model, pack)
        whole(monkeypatch)
        assert torch.equal(less, run_rows(model, pack)[0]) and 170 <= rows <= 512


def test_gradients_are_those_of_the_whole_pack(tiny_folder, monkeypatch):
    pack, gradients = half_full(), []
    for _ in range(2):
        model = load_decoder(tiny_folder, weight_dtype=torch.float64, compute_dtype=torch.float64).requires_grad_(True)
        run_rows(model, pack)[0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        whole(monkeypatch)
    for less, more in zip(*gradients, strict=True):
        assert less is not None and more is not None
        torch.testing.assert_close(less, more, rtol=1e-12, atol=1e-12)


def test_where_bits_depend_on_the_number_of_rows_all_are_run(monkeypatch):
    multiply = padding._product
    even = Shape(8, 8, 0, False, torch.float32)
    monkeypatch.setattr(
        padding, "_product", lambda bias, x, *rest: multiply(bias, x, *rest) + (len(x) % 128 == 64) * 1e-3
    )
    assert exact_counts(frozenset([even]), 320, 2) == (64, 192, 320)  # as 320, which is no multiple of 128 either
    monkeypatch.setattr(padding, "_product", lambda bias, x, *rest: multiply(bias, x, *rest) + len(x))
    assert exact_counts(frozenset([even]), 640, 2) == (640,)


@pytest.mark.parametrize("pack", [1, 63, 64, 512, 896, 1984, 8192])
def test_some_sixteen_even_counts_are_tried_and_the_pack_is_always_one(monkeypatch, pack):
    monkeypatch.setattr(padding, "_product", lambda bias, x, *rest: x[:, :1])
    counts = exact_counts(frozenset([Shape(1, 1, 0, False, torch.float64)]), pack, 2)
    assert counts[-1] == pack and len(counts) <= 17 and all(rows % 64 == 0 for rows in counts[:-1])
    assert pack <= 64 or len(counts) > 1


def test_all_that_multiplies_rows_is_asked_about(tmp_path):
    write_tiny_model(tmp_path, family="gpt_oss")
    model = load_decoder(tmp_path, weight_dtype=torch.float32, compute_dtype=torch.bfloat16)
    plain = set(padding._shapes(model, torch.bfloat16))
    assert {shape.bias for shape in plain} == {False, True} and {shape.rank for shape in plain} == {0}
    assert {shape.dtype for shape in plain} == {torch.bfloat16, torch.float32}  # routers choose in fp32
    add_lora(model, Adapter(4, 8.0), seed=0)
    assert {shape.rank for shape in padding._shapes(model, torch.bfloat16)} == {0, 4}
