"""models/moe.py and models/routing.py: bits that no neighbour changes, every path alike, packed experts."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_exactness import ALONE, CONFIG, one_at_a_time, random_tree
from torch import Tensor

import models.moe
from dpo.logprobs import batch_logps, batch_sums, score_trees
from dpo.packing import pack_trees
from kernels import dequantise
from models.lora import Adapter, add_lora
from models.moe import MoE, by_expert, sigmoid_of_chosen
from models.parts import Context
from models.routing import Routing, asked, load_balance
from tests.moe_models import KINDS, decoder

TREES = [random_tree(seed) for seed in range(8)]
EXPERTS = Adapter(8, 16.0, ("all-linear", "experts.gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_alone_packed_and_shuffled_agree_bit_for_bit_at_fixed_shape(kind, dtype):
    model = decoder(kind, dtype)
    packed = score_trees(model, TREES, CONFIG.pack, ALONE, "test")
    order = random.Random(1).sample(range(len(TREES)), len(TREES))
    shuffled = score_trees(model, [TREES[i] for i in order], CONFIG.pack, ALONE, "test")
    for i, tree in enumerate(TREES):
        alone = score_trees(model, [tree], CONFIG.pack, ALONE, "test")[0]
        assert all(map(np.array_equal, alone, packed[i])) and all(map(np.array_equal, alone, shuffled[order.index(i)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sigmoid_router_rounds_alike_wherever_a_token_stands(dtype):
    logits, config = torch.randn(300, 16, dtype=dtype, generator=torch.Generator().manual_seed(0)), None
    choice = logits.argmax(-1, keepdim=True)
    whole = sigmoid_of_chosen(logits, choice, config)
    for n in range(1, 300, 7):
        assert torch.equal(sigmoid_of_chosen(logits[-n:], choice[-n:], config), whole[-n:])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_trees_equal_one_sequence_at_a_time(kind):
    model = decoder(kind, torch.float64)
    for batch in pack_trees(TREES[:4], 256):
        sums = batch_sums(batch_logps(model, batch, 16), batch)
        for (tree, completion), value in zip(batch.completions, sums, strict=True):
            exact = one_at_a_time(model, TREES[tree])[completion]
            assert (value - exact).abs() <= 1000 * torch.finfo(torch.float64).eps * exact.abs()


def layer_of(kind: str, dtype: torch.dtype, **more: bool) -> MoE:
    return next(module for module in decoder(kind, dtype, **more).modules() if isinstance(module, MoE))


def context(tokens: int, **more: object) -> Context:
    nothing = torch.zeros(0)
    return Context(nothing, nothing, nothing, lambda *asked: nothing, Routing(tokens, **more))


def naive(moe: MoE, x_TD: Tensor) -> Tensor:
    """The definition, a token and an expert at a time, without a shared expert."""
    logits_TE = moe.get_submodule(moe.router_name)(x_TD)
    choice_TK = logits_TE.topk(moe.config.per_token).indices
    weight_TK = moe.route(logits_TE, choice_TK, moe.config)
    weights = dict(moe.experts.named_parameters())
    out = []
    for x_D, choice_K, weight_K in zip(x_TD, choice_TK.tolist(), weight_TK, strict=True):
        answers = []
        for expert, weight in zip(choice_K, weight_K, strict=True):
            inner = x_D * weight if moe.scale_input else x_D
            for name in ("gate_up_proj", "down_proj"):
                bias = weights.get(f"{name}_bias")
                inner = F.linear(inner, weights[name][expert], None if bias is None else bias[expert])
                inner = moe.activation(inner, moe.config.limit) if name == "gate_up_proj" else inner
            answers.append(inner if moe.scale_input else inner * weight)
        out.append(sum(answers))
    return torch.stack(out)


def outcome(moe: MoE, x_TD: Tensor, tokens: int) -> list[Tensor]:
    """Values and all gradients of the routed experts' answer."""
    x_TD = x_TD.clone().requires_grad_()
    moe.requires_grad_(True).zero_grad()
    y_TD = MoE.forward(moe, x_TD, context(tokens))  # without Llama 4's shared expert
    y_TD.backward(torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).to(y_TD))
    router_and_experts = [p for name, p in moe.named_parameters() if "shared" not in name]
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in router_and_experts)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_dropped_however_many_want_the_same_expert(kind, monkeypatch):
    moe = layer_of(kind, torch.float64)
    with torch.no_grad():
        moe.get_submodule(moe.router_name).weight[2] += 1.0  # nearly everybody asks one expert
    x_TD = torch.randn(150, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    told = context(150)
    moe(x_TD, told)
    assert told.routing.asked[moe.index][2] > 140
    ours = outcome(moe, x_TD, 150)
    monkeypatch.setattr(MoE, "forward", lambda self, x_TD, context: naive(self, x_TD))
    for one, exact in zip(ours, outcome(moe, x_TD, 150), strict=True):
        assert (one - exact).norm() <= 100 * torch.finfo(torch.float64).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_and_looped_experts_give_the_same(kind, dtype, monkeypatch):
    def run(dtype: torch.dtype, grouped: bool) -> list[Tensor]:
        monkeypatch.setattr(models.moe, "grouped_is_legal", lambda x, experts: grouped)
        model = decoder(kind, torch.float32)
        add_lora(model, EXPERTS, seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(weight.bfloat16() + 0.1 * name.endswith(".B"))
        moe = next(module for module in model.modules() if isinstance(module, MoE)).to(dtype)
        return outcome(moe, x_TD.to(dtype), 100)

    x_TD = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth, looped, grouped = run(torch.float64, False), run(dtype, False), run(dtype, True)
    for one, other, exact in zip(looped, grouped, truth, strict=True):
        assert (other - exact).norm() <= 2 * (one - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (one - exact).norm() <= 16 * torch.finfo(dtype).eps * exact.norm()


def test_padding_is_sent_to_nobody_and_comes_out_as_zeros():
    moe = layer_of("gpt_oss", torch.float32)
    x_TD = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    told = context(50)
    y_TD = moe(x_TD, told)
    assert y_TD[:50].all(-1).all() and not y_TD[50:].any()
    assert told.routing.own[0].shape == (50, 3) and int(told.routing.asked[0].sum()) == 150
    assert torch.equal(moe(torch.cat([x_TD[:50], x_TD[:78]]), context(50)), y_TD)


def test_rows_are_sorted_by_expert_and_filled_up_to_whole_blocks():
    choice_TK = torch.tensor([[2, 0], [2, 3], [2, 0]])
    pair_M, place_N, rows_E = by_expert(choice_TK, 5, 4)
    assert rows_E.tolist() == [4, 0, 4, 4, 0] and asked(choice_TK, 5).tolist() == [2, 0, 3, 1, 0]
    assert pair_M.tolist() == [1, 5, 0, 0, 0, 2, 4, 0, 3, 0, 0, 0]
    assert pair_M[place_N].tolist() == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_reuse_the_routes_and_change_no_bit(kind):
    def run(checkpointed: bool) -> list[Tensor]:
        model = decoder(kind, torch.bfloat16).requires_grad_(True)
        model.checkpoint_activations = checkpointed
        (batch,) = pack_trees(TREES[:1], 512)
        routing = Routing(batch.packs[0].layout.tokens, balanced=True)
        loss = batch_logps(model, batch, 16, [routing]).sum()
        kept = dict(routing.own)
        (loss + 100 * torch.stack(list(routing.balance.values())).sum()).backward()
        assert all(routing.own[layer] is choice for layer, choice in kept.items())
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


def test_a_recomputed_layer_takes_its_first_choice_even_where_rounding_would_now_choose_another():
    routing = Routing(1)
    first = routing.choose(0, torch.tensor([[1.0, 1.0 + 1e-7, 0.0]]), 1)
    assert torch.equal(routing.choose(0, torch.tensor([[1.0 + 1e-7, 1.0, 0.0]]), 1), first)


def test_the_balancing_loss_is_transformers_own_and_its_least_is_the_experts_per_token():
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func
    logits_TE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = load_balance(logits_TE, asked(logits_TE.topk(3).indices, 8) / 40)
    exact = theirs((logits_TE,), 8, 3)
    assert torch.allclose(ours, exact, rtol=1e-6) and ours > 3
    gradients = [torch.autograd.grad(loss, logits_TE)[0] for loss in (ours, exact)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8) and gradients[0].any()
    assert float(load_balance(torch.zeros(8, 8), torch.full((8,), 3 / 8))) == pytest.approx(3)


# --- packed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_model_with_packed_experts_has_the_bits_of_the_unpacked_one_in_values_and_gradients(dtype):
    (batch,) = pack_trees(TREES[:1], 512)
    outcomes = []
    for how in ({"packed": True}, {"unpack": True}):
        model = decoder("gpt_oss", dtype, **how)
        add_lora(model, EXPERTS, seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(".B"):
                    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
        logp_R = batch_logps(model, batch, 16)
        logp_R.sum().backward()
        outcomes.append([logp_R, *(p.grad for name, p in model.named_parameters() if ".lora." in name)])
        assert all(gradient.any() for gradient in outcomes[-1])
    assert len(outcomes[0]) > 20 and all(map(torch.equal, *outcomes))


def test_packed_experts_hold_little_more_than_a_quarter_of_bf16():
    def resident(model: torch.nn.Module) -> int:
        weights = (p for n, p in model.named_parameters() if ".experts." in n and "bias" not in n)
        return sum(p.numel() * p.itemsize for p in weights)

    packed, plain = (
        resident(decoder("gpt_oss", torch.bfloat16, **how)) for how in ({"packed": True}, {"unpack": True})
    )
    assert packed / plain == 4.25 / 16


def test_unpacked_whole_and_unpacked_by_expert_are_the_same():
    experts = layer_of("gpt_oss", torch.bfloat16, packed=True).experts
    whole = dequantise(experts.down_proj_blocks, experts.down_proj_scales)
    one = dequantise(experts.down_proj_blocks[3], experts.down_proj_scales[3])
    assert whole.shape == experts.shapes["down_proj"] and torch.equal(whole[3], one)
