"""Log-probabilities at one index of logits that exist, with a backward pass that may take their place.

Letters: `T` rows, `V` vocabulary. Read next: kernels/row_triton.py; kernels/linear_logprobs.py needs no logits at all.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend as backends
from kernels.linear_logprobs import IGNORE_INDEX, LinearLogprobs
from kernels.linear_paths import Scores, scores_of

TORCH_ROWS = 128  # rows that the torch path holds in fp32 at a time

# --- the reference: the definition ---------------------------------------------------------------------------------


def reference_selective_log_softmax(logits_TV: Tensor, index_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[index] in fp64, whole and slow; ignored rows give 0. Returns fp64 [T]."""
    ignored_T = index_T == IGNORE_INDEX
    logp_TV = (logits_TV.double() / temperature).log_softmax(-1)
    return logp_TV.gather(1, index_T.masked_fill(ignored_T, 0)[:, None])[:, 0].masked_fill(ignored_T, 0.0)


# --- the torch path -----------------------------------------------------------------------------------------------


def _scores_in_torch(logits_TV: Tensor, index_T: Tensor, temperature: float, entropy: bool) -> Scores:
    exact = torch.promote_types(logits_TV.dtype, torch.float32)
    logp_T, lse_T = (logits_TV.new_empty(len(index_T), dtype=exact) for _ in range(2))
    entropy_T = torch.empty_like(logp_T) if entropy else None
    for start in range(0, len(index_T), TORCH_ROWS):
        rows = slice(start, start + TORCH_ROWS)
        logits_CV = logits_TV[rows].to(exact) / temperature
        logp_CV = logits_CV.log_softmax(-1)
        logp_T[rows] = logp_CV.gather(1, index_T[rows, None].clamp(min=0))[:, 0]
        lse_T[rows] = logits_CV.logsumexp(-1)
        if entropy_T is not None:
            entropy_T[rows] = -(logp_CV.exp() * logp_CV.clamp(min=-1e30)).sum(-1)  # 0 * -inf counts 0
    return Scores(logp_T, lse_T.double(), logp_T.double() + lse_T, entropy_T)


def _grad_in_torch(
    logits_TV: Tensor, out_TV: Tensor, index_T: Tensor, factor_T: Tensor, at_index_T: Tensor, temperature: float
) -> None:
    """out = factor * softmax(logits / temperature), and at_index in the index's column; out may be the logits."""
    for start in range(0, len(index_T), TORCH_ROWS):
        rows = slice(start, start + TORCH_ROWS)
        factor_C1, here_C1 = factor_T[rows, None], index_T[rows, None].clamp(min=0)
        grad_CV = factor_C1 * (logits_TV[rows].to(factor_T.dtype) / temperature).softmax(-1)
        grad_CV.masked_fill_(factor_C1 == 0, 0.0)  # before the index's own entry, which may stand alone
        grad_CV.scatter_(1, here_C1, at_index_T[rows, None].where(index_T[rows, None] >= 0, grad_CV.gather(1, here_C1)))
        out_TV[rows] = grad_CV.to(out_TV.dtype)


# --- autograd -----------------------------------------------------------------------------------------------------


class _SelectiveLogSoftmax(torch.autograd.Function):
    """Forward: log p, logsumexp, entropy. Backward: g (1[v = y] - p_v) / temperature, in the logits' place if asked."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, logits_TV: Tensor, index_T: Tensor, temperature: float, inplace: bool, entropy: bool, arch: str | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        k_T = s_T = None
        if arch is None:
            scores = _scores_in_torch(logits_TV, index_T, temperature, entropy)
        else:
            from kernels import row_triton

            softmax = row_triton.forward(logits_TV, index_T, temperature, entropy, arch)
            scores, k_T, s_T = scores_of(softmax), softmax.k_T, softmax.s_T
        ctx.temperature, ctx.inplace, ctx.arch = temperature, inplace, arch
        ctx.save_for_backward(logits_TV, index_T, scores.logp_T, k_T, s_T)
        ctx.set_materialize_grads(False)
        if scores.entropy_T is not None:
            ctx.mark_non_differentiable(scores.entropy_T)
        return scores.logp_T, scores.lse_T.to(scores.logp_T.dtype), scores.entropy_T

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def, override]
        ctx, grad_T: Tensor | None, grad_lse_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits_TV, index_T, logp_T, k_T, s_T = ctx.saved_tensors
        if grad_T is None and grad_lse_T is None:
            return (None,) * 6
        tau = ctx.temperature
        grad_T = torch.zeros_like(logp_T) if grad_T is None else grad_T
        grad_lse_T = torch.zeros_like(logp_T) if grad_lse_T is None else grad_lse_T
        # The index's own entry in fp32: as p_y -> 1, 1 - p_y would cancel after rounding.
        at_index_T = (grad_T * -torch.expm1(logp_T) + grad_lse_T * logp_T.exp()) / tau
        factor_T = (grad_lse_T - grad_T) / tau
        out_TV = logits_TV.detach() if ctx.inplace else torch.empty_like(logits_TV)
        if ctx.arch is None:
            _grad_in_torch(logits_TV, out_TV, index_T, factor_T, at_index_T, tau)
        elif len(index_T):
            from kernels import row_triton

            scale_T = (factor_T / s_T).where(factor_T != 0, 0).float()  # an ignored row may hold anything
            row_triton.backward(logits_TV, out_TV, index_T, k_T, scale_T, at_index_T, tau, ctx.arch)
            torch.autograd.graph.increment_version(out_TV)
        return out_TV, None, None, None, None, None


# --- public -------------------------------------------------------------------------------------------------------


def selective_log_softmax(
    logits_TV: Tensor,
    index_T: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | LinearLogprobs:
    """log softmax(logits / temperature)[index] per row, in nats: fp32 [T] whatever the logits' dtype (fp64 in fp64).

    With `return_lse` or `return_entropy`, a LinearLogprobs with them: the logsumexp is differentiable, the entropy not.
    An index of -100 gives 0 and no gradient; others outside [0, V) raise IndexError. Rows must be dense (else copied).

    `inplace_backward` writes the logits' gradient over the logits: nothing else may need them in the backward pass
    (autograd raises where something else does), and a second backward through the same graph raises too.
    """
    assert logits_TV.dim() == 2 and index_T.shape == logits_TV.shape[:1], "shapes [T, V], [T]"
    (T, V), device = logits_TV.shape, logits_TV.device
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it must be positive")
    scored_T = index_T != IGNORE_INDEX
    if bool((wrong_T := scored_T & ((index_T < 0) | (index_T >= V))).any()):
        raise IndexError(f"the indices {index_T[wrong_T][:5].tolist()} lie outside [0, {V})")
    by_torch = backends.resolve(backend, device, logits_TV.dtype) == "torch"
    index_T = index_T.where(scored_T, -1)
    if not by_torch:
        index_T = index_T.int()
    if logits_TV.stride(1) != 1 or logits_TV.stride(0) < V:  # rows with gaps, or on top of one another
        logits_TV = logits_TV.contiguous()
    arch = None if by_torch or not T else backends.arch_of(device)
    logp_T, lse_T, entropy_T = _SelectiveLogSoftmax.apply(
        logits_TV, index_T, temperature, inplace_backward, return_entropy, arch
    )
    logp_T = logp_T.where(scored_T, 0.0)
    if not (return_lse or return_entropy):
        return logp_T
    return LinearLogprobs(logp_T, lse_T if return_lse else None, entropy_T)
