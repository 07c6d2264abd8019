"""What the kernels of rows, pairs and packed weights claim: the second half of tests/kernel_claims.py."""

import math
from types import ModuleType

import torch
from torch import Tensor

from kernels.mxfp4 import VALUES
from tests.kernel_claims import (
    EPS,
    Claim,
    at_most_twice,
    gradients,
    guarded_buffers,
    huge_rows,
    poisoned,
    random,
    words,
)

# --- selective_log_softmax ----------------------------------------------------------------------------------------


def index_logp(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(1, y[:, None])[:, 0]


def compare_rows(k: ModuleType, z: Tensor, y: Tensor, temperature: float = 1.0) -> None:
    """Value, logsumexp, entropy and gradient, the last also in place, to the same bits."""
    T = len(z)
    up, up_lse = random(T, seed=2), random(T, seed=3)
    upstream = torch.stack([up, up_lse, torch.zeros(T)])

    def plain(z: Tensor) -> Tensor:
        z = z / temperature
        logp = z.log_softmax(-1)
        entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1).detach()
        return torch.stack([logp.gather(1, y[:, None])[:, 0], z.logsumexp(-1), entropy])

    def ours(z: Tensor, inplace: bool = False) -> Tensor:
        return torch.stack(
            tuple(
                k.selective_log_softmax(
                    z, y, temperature=temperature, inplace_backward=inplace,
                    return_lse=True, return_entropy=True, backend="triton",
                )
            )
        )  # fmt: skip

    value, grad = gradients(ours, z, upstream=upstream)
    truth, fp32 = (gradients(plain, z.to(dtype), upstream=upstream) for dtype in (torch.float64, torch.float32))
    for i in range(3):
        at_most_twice(value[i], fp32[0][i], truth[0][i])
    at_most_twice(grad, fp32[1].to(z.dtype), truth[1])  # the gradient is rounded once, to the logits' dtype
    taken = z.clone()
    in_place = gradients(lambda z: ours(z, inplace=True), taken, upstream=upstream)
    assert torch.equal(in_place[1], grad) and in_place[1].data_ptr() == taken.data_ptr()


def rows_are_as_good_as_torchs_in_fp32_and_bf16_over_several_spans(k: ModuleType) -> None:
    compare_rows(k, random(7, 997, scale=3.0).float(), words(7, 997))
    compare_rows(k, random(6, 600, scale=3.0).bfloat16(), torch.tensor([599, 0, 511, 512, 63, 64]), 1.3)


def rows_of_gradients_are_rounded_to_nearest(k: ModuleType) -> None:
    z, y = random(3, 200).bfloat16(), words(3, 200)
    fine, coarse = (
        gradients(lambda z: k.selective_log_softmax(z, y, backend="triton"), x, upstream=random(3, seed=2))
        for x in (z.float(), z)
    )
    assert torch.equal(fine[0], coarse[0]) and torch.equal(fine[1].bfloat16(), coarse[1])


def rows_of_equal_logits_are_exactly_uniform(k: ModuleType) -> None:
    for shift in (0.0, -128.0, 1e4):
        logp = k.selective_log_softmax(torch.full((2, 579), shift), torch.tensor([0, 578]), backend="triton")
        assert torch.allclose(logp, torch.tensor(-math.log(579)), rtol=2 * EPS, atol=0)


def rows_with_minus_infinity_and_rows_of_nothing_else(k: ModuleType) -> None:
    z = random(3, 600).float()
    z[:, :512] = -torch.inf  # the first span whole
    z[1, 540:] = -torch.inf
    compare_rows(k, z[:2], torch.tensor([599, 520]))
    assert k.selective_log_softmax(z[:1], torch.tensor([4]), backend="triton") == -torch.inf
    assert k.selective_log_softmax(z[2:].fill_(-torch.inf), torch.tensor([4]), backend="triton").isnan().all()


def rows_ignore_their_padding_and_write_nothing_beyond_a_buffer(k: ModuleType) -> None:
    z, y, up = random(5, 579).float(), words(5, 579), torch.ones(5)

    def run(z: Tensor) -> list[Tensor]:
        return gradients(lambda z: k.selective_log_softmax(z, y, backend="triton"), z, upstream=up)

    with guarded_buffers():  # before anything is run without guards, which might write into the heap
        dirty = run(poisoned(z))
    clean = run(z)
    taken = poisoned(z)
    whole = taken.as_strided((len(taken) + 40, taken.stride(0)), (taken.stride(0), 1))
    value = k.selective_log_softmax(taken.requires_grad_(), y, inplace_backward=True, backend="triton")
    value.sum().backward()
    assert all(torch.equal(*pair) for pair in zip(clean, dirty, strict=True))
    assert torch.equal(whole[:5, :579], clean[1]) and whole[:, 579:].isnan().all() and whole[5:].isnan().all()


def rows_sentinels_no_rows_and_ignored_rows_of_nan(k: ModuleType) -> None:
    z = random(3, 70).float()
    z[1] = torch.nan
    value, grad = gradients(
        lambda z: k.selective_log_softmax(z, torch.tensor([69, -100, 0]), backend="triton"), z, upstream=torch.ones(3)
    )
    assert value[1] == 0 and not grad[1].any() and not value.isnan().any() and not grad.isnan().any()
    empty = torch.zeros(0, dtype=torch.int64)
    assert k.selective_log_softmax(z[:0].requires_grad_(), empty, backend="triton").sum().backward() is None
    for wrong in (-1, 70, 71):
        try:
            k.selective_log_softmax(z, torch.tensor([0, wrong, 0]), backend="triton")
        except IndexError:
            continue
        raise AssertionError(f"index {wrong} was scored")


def rows_may_lie_far_apart_transposed_or_alone(k: ModuleType) -> None:
    far = huge_rows(3, 66, torch.bfloat16, stride=2**30 + 64)
    far.copy_(random(3, 66))
    near, y, up = far.clone(), torch.tensor([5, 65, 0]), torch.ones(3)

    def run(z: Tensor, rows: slice = slice(None), inplace: bool = False) -> list[Tensor]:
        more = {"inplace_backward": inplace, "backend": "triton"}
        return gradients(lambda z: k.selective_log_softmax(z, y[rows], **more), z[rows], upstream=up[rows])

    wanted, taken = run(near), run(far, inplace=True)
    assert torch.equal(wanted[0], taken[0]) and torch.equal(wanted[1], far)
    assert all(torch.equal(*pair) for pair in zip(wanted, run(near.T.contiguous().T), strict=True))
    alone = run(near, slice(2, 3))
    assert torch.equal(alone[0], wanted[0][2:]) and torch.equal(alone[1], wanted[1][2:])


def rows_used_elsewhere_in_the_backward_pass_are_not_taken_silently(k: ModuleType) -> None:
    z = random(3, 70).float().requires_grad_()
    other = z.square().sum()  # needs z again
    logp = k.selective_log_softmax(z, torch.tensor([0, 1, 2]), inplace_backward=True, backend="triton")
    logp.sum().backward()
    try:
        other.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    raise AssertionError("a gradient was computed from overwritten logits")


ROWS: list[Claim] = [
    rows_of_equal_logits_are_exactly_uniform,
    rows_of_gradients_are_rounded_to_nearest,
    rows_are_as_good_as_torchs_in_fp32_and_bf16_over_several_spans,
    rows_with_minus_infinity_and_rows_of_nothing_else,
    rows_ignore_their_padding_and_write_nothing_beyond_a_buffer,
    rows_sentinels_no_rows_and_ignored_rows_of_nan,
    rows_used_elsewhere_in_the_backward_pass_are_not_taken_silently,
    rows_may_lie_far_apart_transposed_or_alone,
]

# --- preference_loss ----------------------------------------------------------------------------------------------

BOUNDS = torch.tensor([0, 5, 5, 28, 40, 49, 61])  # three pairs; one completion is empty, one longer than a block


def compare_pairs(k: ModuleType, dtype: torch.dtype, **more: object) -> None:
    policy, up = random(64).to(dtype), random(3, seed=2)
    plain = dict(more)
    reference_T, reference_S = plain.pop("reference_T", None), plain.pop("reference_S", None)
    reference = reference_T if reference_S is None else reference_S[:, None]
    interleaved = plain.pop("pairing", "interleaved") == "interleaved"

    def truth(p: Tensor) -> Tensor:
        module = k.preference_loss_module
        return torch.stack(
            tuple(module.reference_preference_loss(p, reference, BOUNDS, interleaved=interleaved, **plain))
        )

    def ours(p: Tensor) -> Tensor:
        return torch.stack(tuple(k.preference_loss(p, BOUNDS, backend="triton", **more)))

    upstream = torch.stack([up, torch.zeros(3), torch.zeros(3)])
    wanted, grad = gradients(truth, policy.double(), upstream=upstream)
    got, got_grad = gradients(ours, policy, upstream=upstream)
    assert torch.allclose(got.double(), wanted, rtol=2 * EPS, atol=0)  # computed in fp64, rounded once
    assert torch.allclose(got_grad.double(), grad, rtol=2 * float(torch.finfo(dtype).eps), atol=0)
    assert not got_grad[61:].any()  # tokens of no completion


def pairs_agree_with_the_definition_in_every_form(k: ModuleType) -> None:
    reference = random(64, seed=1)
    sums = random(6, seed=4, scale=5.0)
    compare_pairs(k, torch.float32, beta=0.3, reference_T=reference.float())
    compare_pairs(k, torch.float32, beta=0.3, reference_S=sums, label_smoothing=0.2)
    compare_pairs(k, torch.bfloat16, beta=0.05, loss="ipo", pairing="halves", reference_T=reference.float())
    compare_pairs(k, torch.float32, beta=0.6, loss="hinge", pairing="halves")


def pairs_at_step_0_lose_exactly_ln_2(k: ModuleType) -> None:
    policy = random(64, scale=30.0).float()
    result = k.preference_loss(policy, BOUNDS, reference_T=policy.clone(), beta=0.1, backend="triton")
    assert torch.equal(result.losses_B, torch.full((3,), math.log(2)))
    assert not result.chosen_rewards_B.any() and not result.rejected_rewards_B.any()


def pairs_swapped_negate_the_margin(k: ModuleType) -> None:
    policy, bounds = random(40).float(), torch.tensor([0, 10, 40])
    swapped = torch.cat([policy[10:], policy[:10]])
    straight = k.preference_loss(policy, bounds, backend="triton")
    turned = k.preference_loss(swapped, torch.tensor([0, 30, 40]), backend="triton")
    margin = straight.chosen_rewards_B - straight.rejected_rewards_B
    assert torch.equal(margin, -(turned.chosen_rewards_B - turned.rejected_rewards_B)) and margin.item() != 0
    assert torch.allclose(straight.losses_B - turned.losses_B, -margin, rtol=8 * EPS, atol=0)


def pairs_ignore_padding_write_nothing_beyond_and_bear_extreme_margins(k: ModuleType) -> None:
    policy = random(61).float()
    clean = gradients(lambda p: k.preference_loss(p, BOUNDS, backend="triton").losses_B, policy, upstream=torch.ones(3))
    with guarded_buffers():
        dirty = gradients(
            lambda p: k.preference_loss(p, BOUNDS, backend="triton").losses_B, poisoned(policy), upstream=torch.ones(3)
        )
    assert all(torch.equal(*pair) for pair in zip(clean, dirty, strict=True))
    for sign in (1, -1):
        losses, grad = gradients(
            lambda p: k.preference_loss(p, torch.tensor([0, 1, 2]), beta=1.0, backend="triton").losses_B,
            torch.tensor([1e4, -1e4]) * sign, upstream=torch.ones(1),
        )  # fmt: skip
        assert losses.item() == (0 if sign > 0 else 2e4) and grad[0].item() == (0 if sign > 0 else -1)


PAIRS: list[Claim] = [
    pairs_at_step_0_lose_exactly_ln_2,
    pairs_agree_with_the_definition_in_every_form,
    pairs_swapped_negate_the_margin,
    pairs_ignore_padding_write_nothing_beyond_and_bear_extreme_margins,
]


# --- dequantise ---------------------------------------------------------------------------------------------------


def reference_dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """The definition: value * 2^(scale - 127), fp64 [..., O, I]."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    powers = torch.tensor([2.0 ** (scale - 127) for scale in range(256)], dtype=torch.float64)
    return (torch.tensor(VALUES, dtype=torch.float64)[codes.long()] * powers[scales.long()][..., None]).flatten(-2)


def packed_values_are_the_definitions_under_every_byte_and_scale(k: ModuleType) -> None:
    """Within the scales of which no value is subnormal, rounded or infinite; -0 keeps its sign."""
    for dtype, low, high in ((torch.bfloat16, 2, 252), (torch.float32, 2, 252), (torch.float16, 104, 140)):
        blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(high - low + 1, 16, 16).contiguous()
        scales = torch.arange(low, high + 1, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
        truth = reference_dequantise(blocks, scales)
        values = k.dequantise(blocks, scales, dtype, backend="triton")
        assert values.dtype == dtype and torch.equal(values.double(), truth)
        assert torch.equal(values.signbit(), truth.signbit()) and truth.unique().numel() > 15


def packed_tails_are_unpacked_whole_and_nothing_else_is_written(k: ModuleType) -> None:
    for shape in ((3, 5, 3), (1, 1), (7, 2, 3, 2)):
        blocks, scales = torch.arange(16 * math.prod(shape)).view(*shape, 16) % 251, torch.full(shape, 120)
        with guarded_buffers():
            values = k.dequantise(blocks.byte(), scales.byte(), torch.bfloat16, backend="triton")
        assert torch.equal(values.double(), reference_dequantise(blocks.byte(), scales.byte()))


PACKED: list[Claim] = [
    packed_values_are_the_definitions_under_every_byte_and_scale,
    packed_tails_are_unpacked_whole_and_nothing_else_is_written,
]
