"""The paths of linear_logprobs: torch chunk by chunk, with the Triton row kernels in it, or the fused kernels.

Letters: `T` scored rows, `C` rows of one chunk, `D` model width, `V` vocabulary (of this shard). c = dz / da is the
slope of softcap, 1 without one. Read next: kernels/linear_triton.py, kernels/row_triton.py.

A path (`run_chunks`, `run_fused`) gives scores and the sum of c_v p_v W_v over the words but the target; its weight
gradient gives the sum over rows. What the target itself adds is kept apart in fp32, by kernels/linear_logprobs.py: as
p_y -> 1, W_y - p_y W_y would cancel in bf16.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.widened import exact, multiplies_bf16, widened_product

if TYPE_CHECKING:
    from kernels.linear_triton import Softmax

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 16, 32, 64  # of a chunk, run instead of a whole one where no bit changes
LN2 = 0.6931471805599453
SAVED_PROBS_BYTES = 2**29  # probabilities kept from forward to backward when the head trains; beyond: recomputed
FUSED_CHUNK_BYTES = 2**29  # scaled exponentials of one chunk of rows of the fused kernels: what may be kept of them

Gather = Callable[[Tensor], Sequence[Tensor]]
"""A collective: one rank's tensor in, every rank's out, in rank order."""

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""hidden_TD, weight_VD (of run_* in the hidden's dtype), bias_V, and targets_T as words of this shard, -1: none."""


class Options(NamedTuple):
    """What the paths need to know beside the tensors."""

    temperature: float
    softcap: float | None
    chunk: int  # rows to a product of the torch and chunked paths
    path: str
    arch: str
    entropy: bool


# --- logits and softmax of a chunk, in torch ----------------------------------------------------------------------


class Scores(NamedTuple):
    """Per row, over this shard's words: log p of the target; logsumexp and the target's logit (fp64); entropy."""

    logp_T: Tensor
    lse_T: Tensor
    target_T: Tensor
    entropy_T: Tensor | None


class Run(NamedTuple):
    """What a path gives back: sum_{v != y} c_v p_v W_v times scale_T [T, D], and what dW needs, chunk after chunk."""

    scores: Scores
    others_TD: Tensor
    scale_T: Tensor | None
    kept: list[Tensor]  # the probabilities, or (fused) the three of a Kept for each chunk


def _widens(like: Tensor) -> bool:
    """Whether products of tensors like this one are computed in fp32 for want of something better."""
    return like.dtype in HALF and not like.is_cuda and not (like.dtype == torch.bfloat16 and multiplies_bf16())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in b's dtype; of half-precision products the fp32 sums, where the device has them."""
    if b.dtype in HALF and b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return widened_product(a, b) if _widens(b) else a.to(b.dtype) @ b


def _logits(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> Tensor:
    """Logits with fp32's accuracy (fp64's from fp64), in `out_CV`; on a GPU from half precision in a new tensor."""
    if hidden_CD.dtype not in HALF:
        return torch.mm(hidden_CD, weight_VD.T, out=out_CV)
    if hidden_CD.is_cuda:
        return _product(hidden_CD, weight_VD.T)
    return widened_product(hidden_CD, weight_VD.T, out_CV)


def _softmax_in_torch(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Scores, Tensor]:
    """(scores, probabilities, made in the logits' place)."""
    top_C1 = logits_CV.amax(-1, keepdim=True)
    top_C1 = top_C1.where(top_C1 > -torch.inf, 0)
    here_C1 = targets_C[:, None].clamp(min=0)
    target_C1 = logits_CV.gather(1, here_C1)
    logits_CV -= top_C1
    shifted_CV = logits_CV.clone() if entropy else None
    probs_CV = logits_CV.exp_()
    sum_C1 = probs_CV.sum(-1, keepdim=True)
    probs_CV /= sum_C1.where(sum_C1 > 0, 1)  # a shard may hold nothing but -inf
    logp_C1, lse_C1 = target_C1 - top_C1 - sum_C1.log(), top_C1.double() + sum_C1.double().log()
    entropy_C = None
    if shifted_CV is not None:
        entropy_C = sum_C1[:, 0].log() - shifted_CV.clamp_(min=-1e30).mul_(probs_CV).sum(-1)  # 0 * -inf counts 0
    return Scores(logp_C1[:, 0], lse_C1[:, 0], target_C1[:, 0].double(), entropy_C), probs_CV


def _softmax_in_kernels(logits_CV: Tensor, targets_C: Tensor, dtype: torch.dtype, o: Options) -> tuple[Scores, Tensor]:
    """(scores, probabilities in dtype) by the Triton row kernels."""
    from kernels import row_triton

    softmax = row_triton.forward(logits_CV, targets_C, 1.0, o.entropy, o.arch)
    probs_CV = torch.empty_like(logits_CV, dtype=dtype)
    scale_C = softmax.s_T.reciprocal().where(softmax.s_T > 0, 0).float()
    row_triton.backward(logits_CV, probs_CV, targets_C, softmax.k_T, scale_C, torch.zeros_like(scale_C), 1.0, o.arch)
    return scores_of(softmax), probs_CV


def scores_of(softmax: "Softmax") -> Scores:
    """The kernels' (k, s, target, u) as scores."""
    log_s_T = softmax.s_T.log()
    target_T = softmax.target_T.double()
    lse_T = softmax.k_T.double().clamp(min=-1e30) * LN2 + log_s_T
    entropy_T = None if softmax.u_T is None else (log_s_T - softmax.u_T / softmax.s_T).float()
    return Scores((target_T - lse_T).float(), lse_T, target_T, entropy_T)


def _softmax(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_C: Tensor, o: Options, place_CV: Tensor
) -> tuple[Scores, Tensor]:
    """(scores, c_v p_v with the target's own entry zero) of a chunk of rows; a target of -1 is not on this shard."""
    logits_CV = _logits(hidden_CD, weight_VD, place_CV[: len(hidden_CD)])
    slope_CV = None
    if bias_V is not None:
        logits_CV += bias_V
    if o.softcap is not None:
        logits_CV.div_(o.softcap).tanh_()
        slope_CV = 1 - logits_CV * logits_CV
        logits_CV *= o.softcap
    if o.temperature != 1.0:
        logits_CV /= o.temperature
    if o.path == "chunked":
        scores, probs_CV = _softmax_in_kernels(logits_CV, targets_C, hidden_CD.dtype, o)
    else:
        scores, probs_CV = _softmax_in_torch(logits_CV, targets_C, o.entropy)
        here_C1 = targets_C[:, None].clamp(min=0)
        probs_CV.scatter_(1, here_C1, probs_CV.gather(1, here_C1).where(targets_C[:, None] < 0, 0.0))
    return scores, probs_CV if slope_CV is None else probs_CV.mul_(slope_CV)


# --- the paths ----------------------------------------------------------------------------------------------------


def _pad_rows(x_T: Tensor, rows: int) -> Tensor:
    return x_T if len(x_T) == rows else torch.cat([x_T, x_T.new_zeros(rows - len(x_T), *x_T.shape[1:])])


def _concatenated(scores: list[Scores], like: Tensor, entropy: bool) -> Scores:
    """Scores of all rows from those of chunks; empty ones of no chunk."""
    if not scores:
        empty, empty64 = like.new_empty(0, dtype=exact(like.dtype)), like.new_empty(0, dtype=torch.float64)
        return Scores(empty, empty64, empty64, empty if entropy else None)
    logp, lse, target, entropies = zip(*scores, strict=True)
    return Scores(torch.cat(logp), torch.cat(lse), torch.cat(target), torch.cat(entropies) if entropy else None)


class Places(NamedTuple):
    """Where every chunk's logits, then probabilities, go in turn: allocating each anew would hold two at a time.

    `probs_CV`: where they are rounded to, if their product is in half precision on a CPU, whose new pages cost more.
    """

    logits_CV: Tensor
    probs_CV: Tensor | None


def _places(hidden_TD: Tensor, rows: int, V: int, o: Options, grad: bool) -> Places:
    elsewhere = hidden_TD.is_cuda and hidden_TD.dtype in HALF  # a GPU's product makes its own
    logits_CV = hidden_TD.new_empty(0 if elsewhere else rows, V, dtype=exact(hidden_TD.dtype))
    rounded = grad and o.path == "torch" and hidden_TD.dtype in HALF and not (elsewhere or _widens(hidden_TD))
    return Places(logits_CV, hidden_TD.new_empty(rows, V) if rounded else None)


@cache
def _exact_counts(
    V: int, D: int, dtype: torch.dtype, chunk: int, entropy: bool, grad: bool, threads: int
) -> tuple[int, ...]:
    """Of FEW_ROWS those of which logits, softmax and (`grad`) gradient have, row for row, the bits of a whole chunk's.

    It depends on the library and the machine, which is asked once, by numbers of no meaning.
    """
    counts = tuple(count for count in FEW_ROWS if count < chunk)
    if not counts:
        return ()
    draw = torch.Generator().manual_seed(0)
    hidden_CD = torch.randn(chunk, D, generator=draw, device="cpu").to(dtype)
    some_WD = torch.randn(min(V, 509), D, generator=draw, device="cpu").mul(D**-0.5).to(dtype)
    weight_VD = some_WD.repeat(-(-V // len(some_WD)), 1)[:V]
    targets_C, place_CV = torch.arange(chunk, device="cpu") % V, hidden_CD.new_empty(chunk, V, dtype=exact(dtype))

    def values(count: int) -> list[Tensor]:
        logits_CV = _logits(hidden_CD[:count], weight_VD, place_CV[:count])
        first = logits_CV[: max(counts)].clone()
        scores, probs_CV = _softmax_in_torch(logits_CV, targets_C[:count], entropy)
        others = [_product(probs_CV, weight_VD)] if grad else []
        return [first, probs_CV[: max(counts)].clone(), *(x for x in scores if x is not None), *others]

    whole = values(chunk)

    def same(count: int) -> bool:
        return all(torch.equal(few, all_C[:count]) for few, all_C in zip(values(count), whole, strict=True))

    return tuple(count for count in counts if same(count))


def _rows_to_run(rows: int, weight_VD: Tensor, o: Options, grad: bool) -> int:
    """With how many rows a chunk of so many is run: as few as change none of their bits."""
    if weight_VD.is_cuda or o.path != "torch" or rows > max(FEW_ROWS):
        return o.chunk
    counts = _exact_counts(*weight_VD.shape, weight_VD.dtype, o.chunk, o.entropy, grad, torch.get_num_threads())
    return next((count for count in counts if rows <= count), o.chunk)


def run_chunks(inputs: Inputs, o: Options, needs: tuple[bool, bool]) -> Run:
    """The torch and chunked paths, for the gradients (hidden, weight): every row has the bits of a whole chunk's."""
    hidden_TD, weight_VD, bias_V, targets_T = inputs
    (T, D), V = hidden_TD.shape, len(weight_VD)
    keep = needs[1] and T * V * hidden_TD.element_size() <= SAVED_PROBS_BYTES
    others_TD = hidden_TD.new_empty((T, D) if needs[0] else (0, D), dtype=exact(hidden_TD.dtype))
    probs_TV = hidden_TD.new_empty((T, V) if keep else (0, V))
    last = _rows_to_run(T % o.chunk, weight_VD, o, needs[0]) if T % o.chunk else o.chunk
    places = _places(hidden_TD, o.chunk if o.chunk < T else last, V, o, needs[0])
    scores = []
    for start in range(0, T, o.chunk):
        rows = slice(start, min(start + o.chunk, T))
        n, run = rows.stop - start, o.chunk if start + o.chunk <= T else last
        hidden_CD, targets_C = _pad_rows(hidden_TD[rows], run), _pad_rows(targets_T[rows], run)
        scores_C, probs_CV = _softmax(hidden_CD, weight_VD, bias_V, targets_C, o, places.logits_CV)
        if places.probs_CV is not None:
            probs_CV = places.probs_CV[:run].copy_(probs_CV)
        scores.append(Scores(*(None if x is None else x[:n] for x in scores_C)))  # type: ignore[arg-type]
        if needs[0]:
            others_TD[rows] = _product(probs_CV, weight_VD)[:n]
        if keep:
            probs_TV[rows] = probs_CV[:n]
    return Run(_concatenated(scores, hidden_TD, o.entropy), others_TD, None, [probs_TV] if keep else [])


def run_fused(inputs: Inputs, o: Options, needs: tuple[bool, bool]) -> Run:
    """The fused path: its chunks of rows only bound the memory of the scaled exponentials, and change no bits."""
    from kernels import linear_triton

    hidden_TD, weight_VD, bias_V, targets_T = inputs
    (T, D), row_bytes = hidden_TD.shape, len(weight_VD) * hidden_TD.element_size()
    others_TD = hidden_TD.new_empty((T, D) if needs[0] else (0, D), dtype=torch.float32)
    kept: list[Tensor] = []
    scores, scales = [], [hidden_TD.new_empty(0, dtype=torch.float32)]
    for rows in _fused_chunks(T, row_bytes):
        keep = needs[1] and rows.stop * row_bytes <= SAVED_PROBS_BYTES
        hidden_CD, targets_C, e_too = hidden_TD[rows], targets_T[rows], needs[0] or keep
        softmax, chunk = linear_triton.forward(
            hidden_CD, weight_VD, bias_V, targets_C, o.temperature, o.softcap, o.entropy, e_too, o.arch
        )
        if chunk is not None and needs[0]:
            linear_triton.hidden_grad(chunk, weight_VD, others_TD[rows], o.arch)
        if chunk is not None and keep:
            kept.extend(chunk)
        scores.append(scores_of(softmax))
        scales.append(softmax.s_T.reciprocal().where(softmax.s_T > 0, 0).float())
    return Run(_concatenated(scores, hidden_TD, o.entropy), others_TD, torch.cat(scales), kept)


def fused_rows(row_bytes: int) -> int:
    """Rows to a chunk of the fused path, whose scaled exponentials take `row_bytes` a row."""
    return max(FUSED_CHUNK_BYTES // row_bytes // 128 * 128, 128)


def _fused_chunks(T: int, row_bytes: int) -> list[slice]:
    chunk = fused_rows(row_bytes)
    return [slice(start, min(start + chunk, T)) for start in range(0, T, chunk)]


def weight_grad_chunks(scaled_TD: Tensor, inputs: Inputs, kept: list[Tensor], o: Options) -> Tensor:
    """-sum_t c_v p_tv scaled_t over the words but the targets, [V, D] in the exact dtype: torch and chunked paths."""
    hidden_TD, weight_VD, bias_V, targets_T = inputs
    if kept:
        return _product(kept[0].T, -scaled_TD).to(exact(hidden_TD.dtype))
    weight_VD = weight_VD.to(hidden_TD.dtype)
    grad_VD = torch.zeros_like(weight_VD, dtype=exact(hidden_TD.dtype))
    place_CV = _places(hidden_TD, o.chunk, len(weight_VD), o, False).logits_CV
    chunks = (x.split(o.chunk) for x in (hidden_TD, scaled_TD, targets_T))
    for hidden_CD, scaled_CD, targets_C in zip(*chunks, strict=True):
        probs_CV = _softmax(hidden_CD, weight_VD, bias_V, targets_C, o, place_CV)[1]
        grad_VD -= _product(probs_CV.T, scaled_CD)
    return grad_VD


def weight_grad_fused(scaled_TD: Tensor, inputs: Inputs, kept: list[Tensor], o: Options) -> Tensor:
    """The same by the fused kernels; chunks beyond those kept are computed again, to the same bits."""
    from kernels import linear_triton

    hidden_TD, weight_VD, bias_V, targets_T = inputs
    grad_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
    chunks = _fused_chunks(len(hidden_TD), len(weight_VD) * hidden_TD.element_size())
    weight_VD = weight_VD.to(hidden_TD.dtype) if len(kept) < 3 * len(chunks) else weight_VD
    for i, rows in enumerate(chunks):
        if 3 * i < len(kept):
            chunk = linear_triton.Kept(*kept[3 * i : 3 * i + 3])
        else:
            hidden_CD, targets_C = hidden_TD[rows], targets_T[rows]
            again = linear_triton.forward(
                hidden_CD, weight_VD, bias_V, targets_C, o.temperature, o.softcap, False, True, o.arch
            )[1]
            assert again is not None, "asked for"
            chunk = again
        linear_triton.add_weight_grad(grad_VD, chunk, scaled_TD[rows], i > 0, o.arch)
    return grad_VD.neg_()
