"""Log-probabilities of target tokens from hidden rows and the head's weight, never holding [tokens, vocabulary].

Letters: `T` scored rows, `C` rows of one chunk, `D` model width, `V` vocabulary. Read next: models/decoder.py.

With z = h W^T and p = softmax(z), log p_y = z_y - logsumexp(z) and

    d log p_y / d h = W_y - sum_v p_v W_v                                  =: J      (stored in the forward pass)
    d log p_y / d W_v = (1[v = y] - p_v) h

so for any upstream g_T the hidden gradient is g * J, one multiply, and a frozen head costs two matrix products in all.
A trained head adds one (its probabilities kept, within SAVED_PROBS_BYTES) or two (recomputed beyond it).
Every product has the fixed shape of a whole chunk, the last one padded: a row's bits do not depend on its neighbours.
"""

import torch
from torch import Tensor

SAVED_PROBS_BYTES = 512 * 2**20  # probabilities kept from forward to backward when the head trains; beyond: recomputed
IGNORE_INDEX = -100


# --- the reference: the definition ---------------------------------------------------------------------------------


def reference_linear_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target] in fp64, whole and slow; ignored targets give 0. Returns fp64 [T]."""
    logits_TV = hidden_TD.double() @ weight_VD.double().T
    ignored_T = targets_T == IGNORE_INDEX
    logp_T = logits_TV.log_softmax(-1).gather(1, targets_T.masked_fill(ignored_T, 0)[:, None])[:, 0]
    return logp_T.masked_fill(ignored_T, 0.0)


# --- the torch path -----------------------------------------------------------------------------------------------


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits with fp32's accuracy (fp64's from fp64) from one or two products in the inputs' own dtype."""
    if hidden_CD.dtype not in (torch.bfloat16, torch.float16):
        return hidden_CD @ weight_VD.T
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
    # Two limbs: the CPU's product accumulates in fp32 but rounds its result to bf16. The second product subtracts the
    # first result inside the accumulator, so what is rounded is the small remainder.
    high_CV = hidden_CD @ weight_VD.T
    low_CV = torch.addmm(high_CV, hidden_CD, weight_VD.T, beta=-1)
    return high_CV.float().add_(low_CV)


def _chunk_logp_and_probs(hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the targets [C], probabilities [C, V] with the target's own entry set to zero)."""
    logits_CV = _logits(hidden_CD, weight_VD)
    logits_CV -= logits_CV.amax(-1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C[:, None])
    probs_CV = logits_CV.exp_()
    sum_C1 = probs_CV.sum(-1, keepdim=True)
    probs_CV /= sum_C1
    return (target_C1 - sum_C1.log())[:, 0], probs_CV.scatter_(1, targets_C[:, None], 0.0)


def _pad_rows(x_T: Tensor, rows: int, fill: int = 0) -> Tensor:
    return x_T if len(x_T) == rows else torch.cat([x_T, x_T.new_full((rows - len(x_T), *x_T.shape[1:]), fill)])


# --- autograd -----------------------------------------------------------------------------------------------------


class _LinearLogprobs(torch.autograd.Function):
    """Forward: log p and J, chunk by chunk. Backward: g * J, and dW from the kept (or recomputed) probabilities."""

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_tokens: int) -> Tensor:  # type: ignore[no-untyped-def]
        (T, D), V = hidden_TD.shape, len(weight_VD)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        cast_VD = weight_VD.to(hidden_TD.dtype)
        keep_probs = needs_weight and T * V * hidden_TD.element_size() <= SAVED_PROBS_BYTES
        logp_T = hidden_TD.new_empty(T, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        jacobian_TD = logp_T.new_empty((T, D) if needs_hidden else (0, D))
        probs_TV = hidden_TD.new_empty((T, V) if keep_probs else (0, V))
        for start in range(0, T, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, T))
            n = rows.stop - start
            targets_C = _pad_rows(targets_T[rows], chunk_tokens)
            logp_C, probs_CV = _chunk_logp_and_probs(_pad_rows(hidden_TD[rows], chunk_tokens), cast_VD, targets_C)
            logp_T[rows] = logp_C[:n]
            if needs_hidden or keep_probs:
                probs_CV = probs_CV.to(hidden_TD.dtype)
            if needs_hidden:
                # The target's term is kept apart in fp32: as p_y -> 1, W_y - p_y W_y would cancel in bf16.
                others_CD = (probs_CV @ cast_VD)[:n].to(logp_C.dtype)
                target_CD = torch.expm1(logp_C[:n]).neg_()[:, None] * cast_VD[targets_T[rows]]
                jacobian_TD[rows] = target_CD.sub_(others_CD)
            if keep_probs:
                probs_TV[rows] = probs_CV[:n]
        ctx.chunk_tokens, ctx.keep_probs, ctx.hidden_dtype = chunk_tokens, keep_probs, hidden_TD.dtype
        ctx.save_for_backward(
            jacobian_TD, probs_TV, logp_T, targets_T, *((hidden_TD, weight_VD) if needs_weight else ())
        )
        return logp_T

    @staticmethod
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[no-untyped-def, override]
        jacobian_TD, probs_TV, logp_T, targets_T, *head = ctx.saved_tensors
        grad_hidden_TD = grad_weight_VD = None
        if ctx.needs_input_grad[0]:
            grad_hidden_TD = (grad_T[:, None] * jacobian_TD).to(ctx.hidden_dtype)
        if ctx.needs_input_grad[1]:
            hidden_TD, weight_VD = head
            scaled_TD = (grad_T[:, None] * hidden_TD).to(hidden_TD.dtype)
            target_TD = (grad_T * -torch.expm1(logp_T))[:, None] * hidden_TD
            if ctx.keep_probs:
                grad_weight_VD = (probs_TV.T @ scaled_TD).to(logp_T.dtype).neg_()
            else:
                cast_VD = weight_VD.to(hidden_TD.dtype)
                grad_weight_VD = torch.zeros_like(weight_VD, dtype=logp_T.dtype)
                for hidden_CD, scaled_CD, targets_C in zip(
                    *(x.split(ctx.chunk_tokens) for x in (hidden_TD, scaled_TD, targets_T)), strict=True
                ):
                    probs_CV = _chunk_logp_and_probs(hidden_CD, cast_VD, targets_C)[1].to(hidden_TD.dtype)
                    grad_weight_VD -= probs_CV.T @ scaled_CD
            grad_weight_VD.index_add_(0, targets_T, target_TD.to(logp_T.dtype))
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None


# --- public -------------------------------------------------------------------------------------------------------


def linear_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, chunk_tokens: int = 128, backend: str = "auto"
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] per row, in nats: fp32 [T] (fp64 from fp64 inputs).

    Differentiable in `hidden_TD` and, when it requires a gradient, `weight_VD` (any float dtype; the products run in
    the hidden's, the weight's gradient is accumulated in fp32 and returned in the weight's). Targets of -100 give 0
    and no gradient; others outside [0, V) raise IndexError. `chunk_tokens` is part of the numerics: the same rows at
    another chunk size may differ in the last bits. Only backend "torch" exists yet ("auto" takes it).
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend={backend!r}: allowed are 'auto' and 'torch'")
    assert hidden_TD.dim() == 2 and weight_VD.dim() == 2 and hidden_TD.shape[1] == weight_VD.shape[1], (
        "shapes [T,D], [V,D]"
    )
    assert targets_T.shape == hidden_TD.shape[:1], f"targets {tuple(targets_T.shape)} for {len(hidden_TD)} rows"
    scored_T = targets_T != IGNORE_INDEX
    if bool(((targets_T < 0) | (targets_T >= len(weight_VD)))[scored_T].any()):
        raise IndexError(f"a target lies outside [0, {len(weight_VD)})")
    logp_T = _LinearLogprobs.apply(hidden_TD, weight_VD, targets_T.where(scored_T, 0), chunk_tokens)
    return logp_T.where(scored_T, 0.0)
