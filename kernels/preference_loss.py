"""Preference losses of pairs of completions from per-token log-probs, with the gradient per token.

Letters: `B` pairs, `S` = 2B completions, `T` tokens. Read next: kernels/preference_triton.py.

With r_w, r_l the log-ratios (sums over a completion's tokens of log pi - log pi_ref), d = r_w - r_l, x = beta d:

    sigmoid   -(1 - e) log sigma(x) - e log sigma(-x)    Rafailov et al. 2023, eq. 7; label smoothing e: Mitchell 2023
    hinge     max(0, 1 - x)                              Zhao et al. 2023 (SLiC), as DPO's margin
    ipo       (d - 1 / (2 beta))^2                       Azar et al. 2023, eq. 17; by sums, as in the paper

All depend on d alone: the rejected's gradient is the chosen's, negated.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend as backends

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""(chosen log-ratios, rejected log-ratios), fp64 [B] -> losses [B], differentiable."""


class PreferenceLoss(NamedTuple):
    """Per pair, fp32 (fp64 from fp64): the losses, and beta times the log-ratios, which have no gradient."""

    losses_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor


# --- the reference: the definition, and the torch path -------------------------------------------------------------


def _sigmoid(chosen_B: Tensor, rejected_B: Tensor, beta: float, smoothing: float) -> Tensor:
    x_B = beta * (chosen_B - rejected_B)
    return -(1 - smoothing) * F.logsigmoid(x_B) - smoothing * F.logsigmoid(-x_B)


def _hinge(chosen_B: Tensor, rejected_B: Tensor, beta: float, smoothing: float) -> Tensor:
    return (1 - beta * (chosen_B - rejected_B)).relu()


def _ipo(chosen_B: Tensor, rejected_B: Tensor, beta: float, smoothing: float) -> Tensor:
    return (chosen_B - rejected_B - 1 / (2 * beta)).square()


FUSED_LOSSES = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}


def reference_preference_loss(
    policy_T: Tensor,
    reference: Tensor | None,
    cu_seqlens: Tensor,
    *,
    beta: float,
    loss: str | PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
    interleaved: bool = True,
) -> PreferenceLoss:
    """The losses in fp64 by plain torch, differentiable; `reference` is [T], [2B, 1] or None. It is the torch path."""
    B = (len(cu_seqlens) - 1) // 2
    bounds = cu_seqlens.tolist()

    def sums(x_T: Tensor) -> Tensor:
        return torch.stack([x_T[begin:end].double().sum() for begin, end in zip(bounds, bounds[1:], strict=False)])

    ratio_S = sums(policy_T) if B else policy_T[:0].double()  # of the graph, also where there is no pair
    if reference is not None and B:
        ratio_S = ratio_S - (reference[:, 0].double() if reference.dim() == 2 else sums(reference))
    chosen_B, rejected_B = (ratio_S[0::2], ratio_S[1::2]) if interleaved else (ratio_S[:B], ratio_S[B:])
    if isinstance(loss, str):
        losses_B = FUSED_LOSSES[loss](chosen_B, rejected_B, beta, label_smoothing)
    else:
        losses_B = loss(chosen_B, rejected_B)
    return PreferenceLoss(losses_B, beta * chosen_B.detach(), beta * rejected_B.detach())


# --- autograd -----------------------------------------------------------------------------------------------------


class _PreferenceLoss(torch.autograd.Function):
    """Forward: losses, rewards and each pair's slope by the kernel. Backward: the slope on every token of the pair."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        policy_T: Tensor,
        reference: Tensor | None,
        cu_seqlens: Tensor,
        beta: float,
        smoothing: float,
        loss: str,
        interleaved: bool,
        arch: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from kernels import preference_triton

        losses_B, chosen_B, rejected_B, slope_B = preference_triton.forward(
            policy_T, reference, cu_seqlens, beta, smoothing, loss, interleaved, arch
        )
        ctx.save_for_backward(slope_B, cu_seqlens)
        ctx.interleaved, ctx.arch, ctx.like = interleaved, arch, (policy_T.shape, policy_T.dtype)
        ctx.mark_non_differentiable(chosen_B, rejected_B)
        return losses_B, chosen_B, rejected_B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        from kernels import preference_triton

        slope_B, cu_seqlens = ctx.saved_tensors
        shape, dtype = ctx.like
        grad_T = torch.zeros(shape, dtype=torch.float32, device=grad_B.device)  # tokens of no completion keep 0
        preference_triton.backward(grad_B.contiguous(), slope_B, cu_seqlens, grad_T, ctx.interleaved, ctx.arch)
        return (grad_T.to(dtype), *(None,) * 7)


# --- public -------------------------------------------------------------------------------------------------------


def preference_loss(
    policy_T: Tensor,
    cu_seqlens: Tensor,
    *,
    reference_T: Tensor | None = None,
    reference_S: Tensor | None = None,
    beta: float = 0.1,
    loss: str | PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
    pairing: str = "interleaved",
    backend: str = "auto",
) -> PreferenceLoss:
    """Loss and rewards of B pairs from the log-probs of their tokens (nats), not reduced: weigh and average them.

    Completion s is the tokens cu_seqlens[s] to cu_seqlens[s + 1] (integers [2B + 1], ascending); pair b is completions
    2b (chosen) and 2b + 1 where `pairing` is "interleaved", b and B + b where it is "halves". The reference is per
    token or a sum per completion [2B] (in fp64 where a log-ratio of zero must stay zero), or absent: log-ratios are
    then the policy's sums. Differentiable in `policy_T`; sums, loss and gradient are in fp64 and rounded once.

    `loss` is one of FUSED_LOSSES, one kernel a pair, or a function (PairLoss), which plain torch computes and
    backend="triton" refuses. `label_smoothing` is the sigmoid's alone.
    """
    if pairing not in ("interleaved", "halves"):
        raise ValueError(f"pairing={pairing!r}: allowed are 'interleaved' and 'halves'")
    if isinstance(loss, str) and loss not in FUSED_LOSSES:
        raise ValueError(f"loss={loss!r}: allowed are {', '.join(map(repr, FUSED_LOSSES))} or a function of log-ratios")
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"label_smoothing={label_smoothing} with loss={loss!r}: only 'sigmoid' has it")
    if not isinstance(loss, str) and backend == "triton":
        raise ValueError("backend='triton' has no kernel for a loss that is a function: pass 'auto' or 'torch'")
    assert len(cu_seqlens) % 2 == 1, f"{len(cu_seqlens)} bounds of completions: 2B + 1 of B pairs"
    assert reference_T is None or reference_S is None, "one reference: per token or per completion"
    assert reference_T is None or reference_T.shape == policy_T.shape, "the reference has a log-prob for every token"
    assert reference_S is None or len(reference_S) == len(cu_seqlens) - 1, (
        "the reference has a sum for every completion"
    )
    B, interleaved = (len(cu_seqlens) - 1) // 2, pairing == "interleaved"
    path = "torch"
    if isinstance(loss, str):
        path = backends.resolve(backend, policy_T.device, policy_T.dtype)
    reference = reference_T if reference_S is None else reference_S[:, None]
    if path == "torch" or B == 0:
        result = reference_preference_loss(
            policy_T, reference, cu_seqlens,
            beta=beta, loss=loss, label_smoothing=label_smoothing, interleaved=interleaved,
        )  # fmt: skip
    else:
        reference = None if reference is None else reference.detach().contiguous()
        tensors = (policy_T.contiguous(), reference, cu_seqlens.contiguous())
        settings = (beta, label_smoothing, loss, interleaved, backends.arch_of(policy_T.device))
        result = PreferenceLoss(*_PreferenceLoss.apply(*tensors, *settings))
    exact = torch.promote_types(policy_T.dtype, torch.float32)
    return PreferenceLoss(*(x_B.to(exact) for x_B in result))
