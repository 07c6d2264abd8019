"""Log-probabilities of target tokens from hidden rows and the head's weight, never holding [tokens, vocabulary].

Letters: `T` scored rows, `D` model width, `V` vocabulary. Read next: kernels/linear_paths.py, the ways to compute it.

With a = h W^T + b, z = softcap(a) / temperature and p = softmax(z), log p_y = z_y - logsumexp(z) and

    d log p_y / d h = c_y (1 - p_y) W_y - sum_{v != y} c_v p_v W_v =: J    (stored in the forward pass; c = dz / da)
    d log p_y / d W_v = c_v (1[v = y] - p_v) h
    d logsumexp / d h = c_y W_y - J

so for any upstream g_T the hidden gradient is g * J, one multiply, and a frozen head costs two matrix products in all.
A trained head adds one (its probabilities kept, within SAVED_PROBS_BYTES) or two (recomputed beyond it).
On the torch path every row of the forward pass has the bits of a whole chunk's, the last one run with fewer rows where
that changes none, and the fused kernels sum in one fixed order: a row's bits do not depend on its neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend as backends
from kernels.linear_paths import Gather, Options, Scores, run_chunks, run_fused, weight_grad_chunks, weight_grad_fused

CHUNKED_TOKENS = 2048  # rows to a product of the chunked path, padded to it: it reads the weight once a chunk
IGNORE_INDEX = -100


class LinearLogprobs(NamedTuple):
    """Per row, fp32 (fp64 in fp64), nats: log p of the target; logsumexp; entropy, which has no gradient."""

    logp_T: Tensor
    lse_T: Tensor | None
    entropy_T: Tensor | None


# --- the reference: the definition ---------------------------------------------------------------------------------


def reference_linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """log softmax(softcap(hidden weight^T + bias) / temperature)[target], whole and slow: [T], all of it in `dtype`.

    Ignored targets give 0. In fp64 the truth; in bf16 what trainers get that keep logits and log-probs so (backend
    "bf16").
    """
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.to(dtype)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    ignored_T = targets_T == IGNORE_INDEX
    logp_T = (logits_TV / temperature).log_softmax(-1).gather(1, targets_T.masked_fill(ignored_T, 0)[:, None])[:, 0]
    return logp_T.masked_fill(ignored_T, 0.0)


# --- autograd -----------------------------------------------------------------------------------------------------


def _over_shards(
    scores: Scores, targets_T: Tensor, scored_T: Tensor, gather: Gather | None
) -> tuple[Scores, Tensor | None]:
    """(scores over all shards, this shard's share of each row's probability): sums in rank order, the same on all."""
    if gather is None:
        return scores, None
    own_T = targets_T >= 0
    entropy_T = scores.lse_T.new_zeros(len(own_T)) if scores.entropy_T is None else scores.entropy_T.double()
    mine_4T = torch.stack([scores.lse_T, scores.target_T.where(own_T, 0), own_T.double(), entropy_T])
    lse_RT, target_RT, own_RT, entropy_RT = torch.stack(tuple(gather(mine_4T))).unbind(1)
    if bool((own_RT.sum(0) != 1)[scored_T].any()):
        raise IndexError("a target lies outside the vocabulary of all shards, or on two of them")
    top_T = lse_RT.amax(0)
    top_T = top_T.where(top_T > -torch.inf, 0)
    lse_T = top_T + _in_order((lse_RT - top_T).exp()).log()
    target_T = _in_order(target_RT)
    logp_T, share_RT = (target_T - lse_T).to(scores.logp_T.dtype), (lse_RT - lse_T).exp()
    every = Scores(logp_T, lse_T, target_T, None)
    if scores.entropy_T is not None:
        parts_RT = (share_RT * (entropy_RT + lse_T - lse_RT)).where(share_RT > 0, 0)
        every = every._replace(entropy_T=_in_order(parts_RT).to(logp_T.dtype))
    return every, (scores.lse_T - lse_T).exp().to(logp_T.dtype)


def _in_order(ranks_R: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum over ranks, from the first on."""
    total = ranks_R[0].clone()
    for rank in ranks_R[1:]:
        total += rank
    return total


def _summed(x: Tensor, gather: Gather | None) -> Tensor:
    return x if gather is None else _in_order(gather(x))


def _slope(target_T: Tensor, targets_T: Tensor, o: Options) -> Tensor:
    """dz / da at the targets; 0 where the target is on no shard or on another."""
    slope_T = torch.ones_like(target_T)
    if o.softcap is not None:
        slope_T = 1 - (target_T * (o.temperature / o.softcap)).square()
    return (slope_T / o.temperature).where(targets_T >= 0, 0)


class _LinearLogprobs(torch.autograd.Function):
    """Forward: log p, logsumexp, entropy, and J. Backward: g J, and dW from the kept (or recomputed) probabilities."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        scored_T: Tensor,
        o: Options,
        gather: Gather | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        cast_VD = weight_VD.to(hidden_TD.dtype)
        path = run_fused if o.path == "fused" else run_chunks
        run = path((hidden_TD, cast_VD, bias_V, targets_T), o, (needs_hidden, needs_weight))
        scores, share_T = _over_shards(run.scores, targets_T, scored_T, gather)
        # Without a target log p is no log-prob: exp of it may be inf, and inf times a slope of 0 is NaN.
        logp_T, jacobian_TD = scores.logp_T.where(scored_T, 0.0), run.others_TD
        temperature_T = None if o.temperature == 1.0 else torch.full_like(logp_T, 1 / o.temperature)
        factors = [factor_T for factor_T in (run.scale_T, share_T, temperature_T) if factor_T is not None]
        factor_T = torch.stack(factors).prod(0) if factors else None
        slope_T = _slope(scores.target_T, targets_T, o).to(logp_T.dtype)
        if needs_hidden:
            coefficient_T = torch.expm1(logp_T).neg_() * slope_T
            for start in range(0, len(targets_T), o.chunk):
                rows = slice(start, start + o.chunk)
                others_CD = jacobian_TD[rows] if factor_T is None else jacobian_TD[rows] * factor_T[rows, None]
                target_CD = coefficient_T[rows, None] * cast_VD[targets_T[rows].clamp(min=0)]
                jacobian_TD[rows] = target_CD.sub_(others_CD)
            jacobian_TD = _summed(jacobian_TD, gather)
        ctx.o, ctx.gather, ctx.hidden_dtype = o, gather, hidden_TD.dtype
        inputs = (hidden_TD if needs_weight else None, weight_VD, bias_V, targets_T)
        ctx.save_for_backward(jacobian_TD, logp_T, slope_T, factor_T, *inputs, *run.kept)
        ctx.set_materialize_grads(False)
        if scores.entropy_T is not None:
            ctx.mark_non_differentiable(scores.entropy_T)
        return logp_T, scores.lse_T.to(logp_T.dtype), scores.entropy_T

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def, override]
        ctx, grad_T: Tensor | None, grad_lse_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        o: Options = ctx.o
        jacobian_TD, logp_T, slope_T, factor_T, hidden_TD, weight_VD, bias_V, targets_T, *kept = ctx.saved_tensors
        if grad_T is None and grad_lse_T is None:
            return (None,) * 7
        grad_T = torch.zeros_like(logp_T) if grad_T is None else grad_T
        total_T = grad_T if grad_lse_T is None else grad_T - grad_lse_T
        grad_hidden_TD = grad_weight_VD = None
        if ctx.needs_input_grad[0]:
            grad_hidden_TD = total_T[:, None] * jacobian_TD
            if grad_lse_T is not None:
                target_TD = _summed(slope_T[:, None] * weight_VD[targets_T.clamp(min=0)].to(logp_T.dtype), ctx.gather)
                grad_hidden_TD += grad_lse_T[:, None] * target_TD
            grad_hidden_TD = grad_hidden_TD.to(ctx.hidden_dtype)
        if ctx.needs_input_grad[1]:
            scaled_T = total_T if factor_T is None else total_T * factor_T
            scaled_TD = (scaled_T[:, None] * hidden_TD).to(hidden_TD.dtype)
            weight_grad = weight_grad_fused if o.path == "fused" else weight_grad_chunks
            grad_weight_VD = weight_grad(scaled_TD, (hidden_TD, weight_VD, bias_V, targets_T), kept, o)
            coefficient_T = grad_T * -torch.expm1(logp_T)
            if grad_lse_T is not None:
                coefficient_T = coefficient_T + grad_lse_T * logp_T.exp()
            _add_target_rows(grad_weight_VD, targets_T, coefficient_T * slope_T, hidden_TD, o)
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def _add_target_rows(grad_VD: Tensor, targets_T: Tensor, coefficient_T: Tensor, hidden_TD: Tensor, o: Options) -> None:
    """grad_VD[y_t] += coefficient_t hidden_t, in the order of the rows."""
    if o.path == "torch":
        target_TD = (coefficient_T[:, None] * hidden_TD).to(grad_VD.dtype)
        grad_VD.index_add_(0, targets_T.clamp(min=0), target_TD)
    elif len(targets_T):
        from kernels import linear_triton

        linear_triton.add_target_rows(grad_VD, targets_T, coefficient_T, hidden_TD, o.arch)


# --- public -------------------------------------------------------------------------------------------------------


def _gather_of(group: dist.ProcessGroup | Gather) -> Gather:
    """A process group's all-gather, or the function itself."""
    if not isinstance(group, dist.ProcessGroup):
        return group

    def gather(x: Tensor) -> list[Tensor]:
        ranks = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, x.contiguous(), group=group)
        return ranks

    return gather


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    vocab_start: int = 0,
    vocab_group: dist.ProcessGroup | Gather | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    chunk_tokens: int = 128,
    backend: str = "auto",
) -> Tensor | LinearLogprobs:
    """log softmax(z)[target] per row, z = softcap(hidden weight^T + bias) / temperature, in nats: fp32 [T].

    Fp64 from fp64 inputs. With `return_lse` or `return_entropy`, a LinearLogprobs with them: the logsumexp is
    differentiable, the entropy is not. Differentiable in `hidden_TD` and, when it requires a gradient, `weight_VD` (any
    float dtype; the products run in the hidden's, the weight's gradient is accumulated in fp32 and returned in the
    weight's); `bias` is a constant. Targets of `ignore_index` give 0 and no gradient, though their logsumexp and
    entropy are their row's; others outside [0, V) raise IndexError. A row of nothing but -inf gives nan.

    A vocabulary shard: the weight (and bias) hold words [vocab_start, vocab_start + V), targets are words of the whole.
    `vocab_group` is a process group or its all-gather (Gather). Results and the hidden's gradient are the whole's on
    every rank, to the same bits: sums run in rank order. The weight's gradient is the shard's.

    `chunk_tokens` is part of the torch path's numerics: rows at another chunk size may differ in the last bits.
    `backend` is "auto", "torch", "triton" or "bf16" (kernels/backend.py); "triton" where it cannot be had, and "bf16",
    which has log-probs of a whole vocabulary alone, with a shard or for more, raise ValueError.
    """
    T, V = len(hidden_TD), len(weight_VD)
    assert hidden_TD.dim() == 2 and weight_VD.dim() == 2 and hidden_TD.shape[1] == weight_VD.shape[1], (
        "shapes [T,D], [V,D]"
    )
    assert targets_T.shape == hidden_TD.shape[:1], f"targets {tuple(targets_T.shape)} for {T} rows"
    if not (temperature > 0 and (softcap is None or softcap > 0)):
        raise ValueError(f"temperature={temperature}, softcap={softcap}: both must be positive")
    if bias is not None and bias.requires_grad:
        raise ValueError("bias requires a gradient, which no backend computes: pass bias.detach()")
    if vocab_start and vocab_group is None:
        raise ValueError(f"vocab_start={vocab_start} without vocab_group: a shard alone knows no log-prob")
    scored_T = targets_T != ignore_index
    outside_T = (targets_T < vocab_start) | (targets_T >= vocab_start + V)
    if vocab_group is None and bool((wrong_T := outside_T & scored_T).any()):
        raise IndexError(f"the targets {targets_T[wrong_T][:5].tolist()} lie outside [0, {V})")
    if not torch.is_grad_enabled():  # the function would keep J and probabilities: it sees requires_grad alone
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    if backend == "bf16":
        if vocab_group is not None or return_lse or return_entropy:
            raise ValueError("backend='bf16' has log-probs of a whole vocabulary alone")
        asked_T = targets_T.where(scored_T, IGNORE_INDEX)
        rounded_T = reference_linear_logprobs(hidden_TD, weight_VD, asked_T, bias, temperature, softcap, torch.bfloat16)
        return rounded_T.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    path = backends.resolve(backend, hidden_TD.device, hidden_TD.dtype, hidden_TD.shape[1])
    local_T = (targets_T - vocab_start).where(scored_T & ~outside_T, -1)
    if path != "torch":
        from kernels.linear_triton import dense_rows

        hidden_TD, weight_VD, local_T = dense_rows(hidden_TD), dense_rows(weight_VD), local_T.int()
        bias = None if bias is None else bias.contiguous()
    chunk = max(chunk_tokens, CHUNKED_TOKENS) if path == "chunked" else chunk_tokens
    gather = None if vocab_group is None else _gather_of(vocab_group)
    arch = backends.arch_of(hidden_TD.device)
    options = Options(temperature, softcap, chunk, path, arch, return_entropy)
    logp_T, lse_T, entropy_T = _LinearLogprobs.apply(hidden_TD, weight_VD, bias, local_T, scored_T, options, gather)
    logp_T = logp_T.where(scored_T, 0.0)
    if not (return_lse or return_entropy):
        return logp_T
    return LinearLogprobs(logp_T, lse_T if return_lse else None, entropy_T)
