"""What the Triton kernels claim, as functions of the package under test: the tests run them on kernels/ itself, and
tests/test_kernel_mutations.py on broken copies, each of which must fail one. They run in Triton's interpreter.

A claim takes the package `k` (k.linear_logprobs, k.tiles, ...) and asserts. Truth is fp64, the yardstick plain torch.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

GUARD = 2**16  # elements of NaN on either side of every buffer that the kernels write
EPS = torch.finfo(torch.float32).eps

Claim = Callable[[ModuleType], None]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def words(T: int, V: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))


def poisoned(x: Tensor, rows: int = 40, columns: int = 72) -> Tensor:
    """x as a view into a larger matrix of NaN."""
    if x.dim() == 1:
        return torch.cat([x, x.new_full((rows,), torch.nan)])[: len(x)]
    whole = x.new_full((len(x) + rows, x.shape[1] + columns), torch.nan)
    whole[: len(x), : x.shape[1]] = x
    return whole[: len(x), : x.shape[1]]


@contextmanager
def guarded_buffers() -> Iterator[None]:
    """Every buffer made inside is NaN, between guards that nothing may write to (checked at the end)."""
    made: list[tuple[Tensor, int]] = []
    real = torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros

    def buffer(shape: tuple[int, ...], dtype: torch.dtype | None, fill: float) -> Tensor:
        n, dtype = math.prod(shape), dtype or torch.float32
        if not dtype.is_floating_point:
            return real[0](shape, dtype=dtype)
        flat = torch.full((n + 2 * GUARD,), torch.nan, dtype=dtype)
        flat[GUARD : GUARD + n] = fill
        made.append((flat, n))
        return flat[GUARD : GUARD + n].view(shape)

    def shape_of(size: tuple) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size

    torch.empty = lambda *size, dtype=None, device=None: buffer(shape_of(size), dtype, torch.nan)
    torch.zeros = lambda *size, dtype=None, device=None: buffer(shape_of(size), dtype, 0.0)
    torch.empty_like = lambda x, dtype=None: buffer(tuple(x.shape), dtype or x.dtype, torch.nan)
    torch.Tensor.new_empty = lambda x, *size, dtype=None, device=None: (  # the interpreter's own come with a device
        buffer(shape_of(size), dtype or x.dtype, torch.nan) if device is None else real[2](x, *size, dtype=dtype)
    )
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros = real
    for flat, n in made:
        assert bool(flat[:GUARD].isnan().all() and flat[GUARD + n :].isnan().all()), "written outside of a buffer"


def huge_rows(rows: int, columns: int, dtype: torch.dtype, stride: int = 2**23 - 64) -> Tensor:
    """A matrix whose last rows lie more than 2^31 elements from its first; its untouched pages take no memory."""
    assert (rows - 1) * stride > 2**31
    return torch.empty(rows * stride, dtype=dtype).as_strided((rows, columns), (stride, 1))


def at_most_twice(got: Tensor, yardstick: Tensor, truth: Tensor, floor: float = 0.0) -> None:
    """The error is at most twice the yardstick's, in the root mean square; `floor` where the yardstick may be exact."""
    got, yardstick, truth = got.detach().double(), yardstick.detach().double(), truth.detach().double()
    assert not got.isnan().any()
    assert (got - truth).norm() <= 2 * (yardstick - truth).norm() + floor * truth.norm()


def gradients(function: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor) -> list[Tensor]:
    """[value, gradient of (value * upstream).sum() in each of the inputs]."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad((value * upstream.to(value.dtype)).sum(), leaves)]


def plain_logp(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (h @ w.T).log_softmax(-1).gather(1, y[:, None])[:, 0]


# --- linear_logprobs ----------------------------------------------------------------------------------------------


def compare_linear(k: ModuleType, T: int, D: int, V: int, dtype: torch.dtype, y: Tensor | None = None) -> None:
    h, w = random(T, D).to(dtype), random(V, D, seed=1, scale=0.3).to(dtype)
    y = words(T, V) if y is None else y
    up = random(T, seed=2)
    ours = gradients(lambda h, w: k.linear_logprobs(h, w, y, backend="triton"), h, w, upstream=up)
    truth = gradients(lambda h, w: plain_logp(h, w, y), h.double(), w.double(), upstream=up)
    fp32 = gradients(lambda h, w: plain_logp(h, w, y), h.float(), w.float(), upstream=up)
    same = gradients(lambda h, w: plain_logp(h, w, y), h, w, upstream=up)
    at_most_twice(ours[0], fp32[0], truth[0])
    assert (ours[0] - truth[0]).square().mean().sqrt() <= 5e-6
    at_most_twice(ours[1], same[1], truth[1])
    at_most_twice(ours[2], same[2], truth[2])


def linear_error_is_at_most_twice_torchs_in_fp32_at_odd_sizes(k: ModuleType) -> None:
    compare_linear(k, 37, 100, 333, torch.float32)


def linear_error_is_at_most_twice_torchs_in_bf16_at_odd_sizes(k: ModuleType) -> None:
    compare_linear(k, 61, 100, 997, torch.bfloat16)


def linear_error_is_at_most_twice_torchs_in_fp16(k: ModuleType) -> None:
    compare_linear(k, 17, 72, 130, torch.float16)


def targets_in_the_last_partial_tile_and_repeated_targets_are_scored(k: ModuleType) -> None:
    compare_linear(k, 20, 66, 130, torch.float32, torch.tensor([129, 128, 0, 127] * 5))


def zero_hidden_rows_give_exactly_uniform_log_probs(k: ModuleType) -> None:
    for V in (97, 130):
        logp = k.linear_logprobs(torch.zeros(2, 8), torch.ones(V, 8), torch.tensor([0, V - 1]), backend="triton")
        assert torch.allclose(logp, torch.tensor(-math.log(V)), rtol=2 * EPS, atol=0)


def logits_all_of_minus_128_or_1e4_give_exactly_uniform_log_probs(k: ModuleType) -> None:
    for shift in (-128.0, 1e4):
        h = torch.full((2, 1), shift)
        logp = k.linear_logprobs(h, torch.ones(130, 1), torch.tensor([0, 129]), backend="triton")
        assert torch.allclose(logp, torch.tensor(-math.log(130)), rtol=2 * EPS, atol=0)


def logits_far_from_zero_keep_their_differences(k: ModuleType) -> None:
    """To a few of fp32's steps at that size, which the logits themselves are rounded to."""
    h, w = torch.tensor([[1e4, 1.0]]).repeat(3, 1), torch.stack([torch.ones(200), torch.arange(200) / 50], 1)
    y = torch.tensor([0, 100, 199])
    at_most_twice(
        k.linear_logprobs(h, w, y, backend="triton"), plain_logp(h, w, y), plain_logp(h.double(), w.double(), y)
    )


def sentinels_are_refused_or_ignored(k: ModuleType) -> None:
    V = 130
    h, w = random(4, 16).float(), random(V, 16, seed=1).float().requires_grad_()
    h.requires_grad_()
    y = torch.tensor([3, -100, 129, -100])
    logp = k.linear_logprobs(h, w, y, backend="triton")
    logp.sum().backward()
    assert logp[1] == 0 and logp[3] == 0 and not h.grad[[1, 3]].any() and bool(h.grad[[0, 2]].any(1).all())
    kept = torch.tensor([0, 2])
    alone = gradients(
        lambda h, w: k.linear_logprobs(h, w, y[kept], backend="triton"), h[kept], w, upstream=torch.ones(2)
    )
    assert torch.equal(logp[kept], alone[0]) and torch.allclose(w.grad, alone[2], rtol=4 * EPS, atol=4 * EPS)
    for wrong in (-1, V, V + 1):
        y[0] = wrong
        try:
            k.linear_logprobs(h, w, y, backend="triton")
        except IndexError:
            continue
        raise AssertionError(f"target {wrong} was scored")


def padding_is_inert_and_nothing_is_written_beyond_a_buffer(k: ModuleType) -> None:
    T, D, V = 19, 70, 131
    h, w, b = random(T, D).float(), random(V, D, seed=1, scale=0.3).float(), random(V, seed=3).float()
    y, up = words(T, V), random(T, seed=2)
    y[3], y[5] = -100, V - 1  # the last row of every buffer is written: what is written beyond it meets the guard

    def run(h: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        out = k.linear_logprobs(*leaves, y, bias=bias, backend="triton", return_lse=True, return_entropy=True)
        total = ((out.logp_T + out.lse_T) * up.float()).sum()
        return [*(x.detach() for x in out), *torch.autograd.grad(total, leaves)]

    with guarded_buffers():  # before anything is run without guards, which might write into the heap
        dirty = run(poisoned(h), poisoned(w), poisoned(b))
    clean = run(h, w, b)
    assert all(torch.equal(*pair) for pair in zip(clean, dirty, strict=True))


def words_and_whole_tiles_of_minus_infinity_have_no_probability(k: ModuleType) -> None:
    T, D, V = 5, 16, 300
    h, w, y = random(T, D).float(), random(V, D, seed=1).float(), torch.tensor([130, 299, 140, 200, 3])
    b = torch.zeros(V)
    b[:128] = b[256:298] = -torch.inf  # the first tile whole, and a part of the last
    inside = torch.tensor([0, 1, 2, 3])
    alive = b > -torch.inf
    index = torch.cumsum(alive, 0) - 1

    def full(h: Tensor, w: Tensor) -> Tensor:
        return k.linear_logprobs(h, w, y, bias=b, backend="triton")[inside]

    ours = gradients(full, h, w, upstream=torch.ones(4))
    truth = gradients(
        lambda h, w: plain_logp(h[inside], w[alive], index[y[inside]]), h.double(), w.double(), upstream=torch.ones(4)
    )
    same = gradients(lambda h, w: plain_logp(h[inside], w[alive], index[y[inside]]), h, w, upstream=torch.ones(4))
    for three in zip(ours, same, truth, strict=True):
        at_most_twice(*three)
    out = k.linear_logprobs(h, w, y, bias=b, backend="triton", return_entropy=True)
    assert out.logp_T[4] == -torch.inf and not out.entropy_T.isnan().any()
    assert k.linear_logprobs(h, w, y, bias=b.fill_(-torch.inf), backend="triton").isnan().all()


def no_row_one_row_and_only_ignored_rows_are_fine(k: ModuleType) -> None:
    w = random(50, 16, seed=1).float()
    for T in (0, 1, 3):
        h, y = random(T, 16).float(), torch.full((T,), -100)
        value, dh, dw = gradients(
            lambda h, w, y=y: k.linear_logprobs(h, w, y, backend="triton"), h, w, upstream=torch.ones(T)
        )
        assert value.shape == (T,) and not value.any() and not dh.any() and not dw.any()


def an_ignored_row_of_very_low_logits_sends_no_nan(k: ModuleType) -> None:
    """Its logsumexp is far below 0: log p without a target's logit would be far above."""
    h, w = torch.full((2, 1), -128.0), torch.ones(130, 1)
    value, dh, dw = gradients(
        lambda h, w: k.linear_logprobs(h, w, torch.tensor([-100, 3]), backend="triton"), h, w, upstream=torch.ones(2)
    )
    assert value[0] == 0 and not dh[0].any() and not value.isnan().any()
    assert not dh.isnan().any() and not dw.isnan().any() and dw[3].any()


def hidden_and_weight_may_lie_in_memory_as_they_like(k: ModuleType) -> None:
    h, w, y = random(18, 66).float(), random(130, 66, seed=1, scale=0.3).float(), words(18, 130)
    up = torch.ones(18)

    def run(h: Tensor, w: Tensor) -> list[Tensor]:
        return gradients(lambda h, w: k.linear_logprobs(h, w, y, backend="triton"), h, w, upstream=up)

    dense = run(h, w)
    wide = torch.full((36, 200), torch.nan)
    wide[::2, 1:133:2] = h
    for hidden, weight in ((h.T.contiguous().T, w.T.contiguous().T), (wide[::2, 1:133:2], poisoned(w, 7, 9))):
        assert not hidden.is_contiguous() and not weight.is_contiguous()
        assert all(torch.equal(*pair) for pair in zip(dense, run(hidden, weight), strict=True))


def offsets_beyond_two_to_the_31_are_reached(k: ModuleType) -> None:
    """In the weight (a tile of 128 words ends at word 384), the hidden rows and the scaled exponentials [T, V]."""

    def run(h: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
        return gradients(lambda h, w: k.linear_logprobs(h, w, y, backend="triton"), h, w, upstream=torch.ones(len(h)))

    def equal(some: list[Tensor], others: list[Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(some, others, strict=True))

    far = huge_rows(390, 8, torch.bfloat16)
    far.copy_(random(390, 8, seed=1))
    near, small, y = far.clone(), random(1, 8).bfloat16(), torch.tensor([389])
    assert equal(run(small, far, y), run(small, near, y))
    far, near, small, y = far[:290], near[:290], random(16, 8, seed=2).bfloat16(), words(290, 16)
    wanted = run(near, small, y)
    assert equal(run(far, small, y), wanted)
    real = torch.Tensor.new_empty
    exponentials = huge_rows(290, 64, torch.bfloat16)
    torch.Tensor.new_empty = lambda x, *size, **more: exponentials if size == (290, 64) else real(x, *size, **more)
    try:
        assert equal(run(near, small, y), wanted)
    finally:
        torch.Tensor.new_empty = real


def two_runs_and_a_row_alone_give_the_same_bits(k: ModuleType) -> None:
    T, D, V = 40, 70, 200
    h, w, y, up = random(T, D).bfloat16(), random(V, D, seed=1).bfloat16(), words(T, V), torch.ones(T)

    def run(rows: slice | list[int]) -> list[Tensor]:
        return gradients(lambda h, w: k.linear_logprobs(h, w, y[rows], backend="triton"), h[rows], w, upstream=up[rows])

    whole, again = run(slice(None)), run(slice(None))
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    for rows in ([0], [17], [39], [38, 3]):
        logp, dh, _ = run(rows)
        assert torch.equal(logp, whole[0][rows]) and torch.equal(dh, whole[1][rows])


def chunks_of_rows_and_recomputing_change_no_bits(k: ModuleType) -> None:
    """dW is summed chunk by chunk: its bits depend on the chunks, not on what was kept of them."""
    T, D, V = 150, 16, 200
    h, w, y, up = random(T, D).float(), random(V, D, seed=1).float(), words(T, V), random(T, seed=2)

    def run(w_trains: bool = True) -> list[Tensor]:
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_(w_trains)]
        logp = k.linear_logprobs(*leaves, y, backend="triton")
        wanted = leaves if w_trains else leaves[:1]
        return [logp.detach(), *torch.autograd.grad((logp * up.float()).sum(), wanted)]

    whole, frozen = run(), run(w_trains=False)
    assert torch.equal(whole[0], frozen[0]) and torch.equal(whole[1], frozen[1])
    real_chunk, real_saved = k.linear_paths.FUSED_CHUNK_BYTES, k.linear_paths.SAVED_PROBS_BYTES
    try:
        k.linear_paths.FUSED_CHUNK_BYTES = 0  # chunks of 128 rows: two here
        kept = run()
        k.linear_paths.SAVED_PROBS_BYTES = 0
        recomputed = run()
        k.linear_paths.SAVED_PROBS_BYTES = 128 * V * 4
        half_kept = run()
    finally:
        k.linear_paths.FUSED_CHUNK_BYTES, k.linear_paths.SAVED_PROBS_BYTES = real_chunk, real_saved
    for other in (kept, recomputed, half_kept):
        assert torch.equal(other[0], whole[0]) and torch.equal(other[1], whole[1])
        assert torch.equal(other[2], kept[2])
    truth = gradients(lambda h, w: plain_logp(h, w, y), h.double(), w.double(), upstream=up)
    same = gradients(lambda h, w: plain_logp(h, w, y), h, w, upstream=up)
    at_most_twice(kept[2], same[2], truth[2])


def probabilities_of_all_words_sum_to_one(k: ModuleType) -> None:
    V = 131
    h = random(1, 16).float().expand(V, 16)
    logp = k.linear_logprobs(h, random(V, 16, seed=1).float(), torch.arange(V), backend="triton")
    assert (logp <= 0).all() and abs(float(logp.double().exp().sum()) - 1) <= 4 * EPS


def bias_softcap_temperature_logsumexp_and_entropy_are_as_good_as_torchs(k: ModuleType) -> None:
    T, D, V = 18, 66, 200
    h, w, b = random(T, D).float(), random(V, D, seed=1).float(), random(V, seed=3).float()
    y, up, up_lse = words(T, V), random(T, seed=4), random(T, seed=5)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        z = 15.0 * torch.tanh((h @ w.T + b.to(h.dtype)) / 15.0) / 1.7
        logp = z.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).detach()
        return torch.stack([logp.gather(1, y[:, None])[:, 0], z.logsumexp(-1), entropy])

    def fused(h: Tensor, w: Tensor) -> Tensor:
        more = {"bias": b, "softcap": 15.0, "temperature": 1.7, "return_lse": True, "return_entropy": True}
        return torch.stack(tuple(k.linear_logprobs(h, w, y, backend="triton", **more)))

    upstream = torch.stack([up, up_lse, torch.zeros(T)])
    ours, same = (gradients(f, h, w, upstream=upstream) for f in (fused, plain))
    truth = gradients(plain, h.double(), w.double(), upstream=upstream)
    for i in range(3):
        at_most_twice(ours[0][i], same[0][i], truth[0][i])
    at_most_twice(ours[1], same[1], truth[1])
    at_most_twice(ours[2], same[2], truth[2])


def in_shards(ranks: int, work: Callable[[int, Callable[[Tensor], list[Tensor]]], list[Tensor]]) -> list[list[Tensor]]:
    """work(rank, all-gather) on every rank at once, a thread each; every rank's results."""
    slots: list[Tensor | None] = [None] * ranks
    results: list[list[Tensor]] = [[] for _ in range(ranks)]
    failures: list[BaseException] = []
    barrier, one = (
        threading.Barrier(ranks, timeout=60),
        threading.Lock(),
    )  # the interpreter patches triton: one at a time

    def run(rank: int) -> None:
        def gather(x: Tensor) -> list[Tensor]:
            slots[rank] = x.clone()
            one.release()
            barrier.wait()
            everyone = [slot for slot in slots if slot is not None]
            barrier.wait()
            one.acquire()
            return everyone

        try:
            with one:
                results[rank] = work(rank, gather)
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError("a rank failed") from failures[0]
    return results


def vocabulary_shards_give_every_rank_the_same_bits_and_the_whole_result(k: ModuleType) -> None:
    T, D, V = 9, 34, 300
    h, w, y, up, up_lse = random(T, D).float(), random(V, D, seed=1).float(), words(T, V), random(T), random(T, seed=6)
    y[2] = -100
    bias = torch.zeros(V)
    bias[200:] = -torch.inf  # the last shard of three has nothing to say
    y[0], y[1] = 0, 199
    y[3:] %= 200

    def run(h: Tensor, w: Tensor, b: Tensor, **shard: object) -> list[Tensor]:
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = k.linear_logprobs(h, w, y, bias=b, backend="triton", return_lse=True, return_entropy=True, **shard)
        scalar = (out.logp_T * up.float() + out.lse_T * up_lse.float()).sum()
        dh, dw = torch.autograd.grad(scalar, (h, w))
        return [*(x.detach() for x in out), dh, dw]

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logp = (h @ w.T + bias.to(h.dtype)).log_softmax(-1)
        entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1).detach()
        scored = logp.gather(1, y.clamp(min=0)[:, None])[:, 0].where(y >= 0, 0)
        return torch.stack([scored, (h @ w.T + bias.to(h.dtype)).logsumexp(-1), entropy])

    upstream = torch.stack([up, up_lse, torch.zeros(T)])
    truth = gradients(plain, h.double(), w.double(), upstream=upstream)
    same = gradients(plain, h, w, upstream=upstream)
    whole = run(h, w, bias)
    for bounds in ([0, 300], [0, 150, 300], [0, 100, 200, 300]):
        ends = list(zip(bounds, bounds[1:], strict=False))

        def work(rank: int, gather: Callable, ends: list = ends) -> list[Tensor]:
            begin, end = ends[rank]
            return run(h, w[begin:end], bias[begin:end], vocab_start=begin, vocab_group=gather)

        ranks = in_shards(len(ends), work)
        for rank in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank[:4], ranks[0][:4], strict=True))
        if len(ends) == 1:
            assert torch.equal(ranks[0][0], whole[0])
        for i in range(3):
            at_most_twice(ranks[0][i], same[0][i], truth[0][i])
        at_most_twice(ranks[0][3], same[1], truth[1])
        at_most_twice(torch.cat([rank[4] for rank in ranks]), same[2], truth[2])


LINEAR: list[Claim] = [
    zero_hidden_rows_give_exactly_uniform_log_probs,
    logits_all_of_minus_128_or_1e4_give_exactly_uniform_log_probs,
    logits_far_from_zero_keep_their_differences,
    padding_is_inert_and_nothing_is_written_beyond_a_buffer,
    targets_in_the_last_partial_tile_and_repeated_targets_are_scored,
    sentinels_are_refused_or_ignored,
    words_and_whole_tiles_of_minus_infinity_have_no_probability,
    no_row_one_row_and_only_ignored_rows_are_fine,
    an_ignored_row_of_very_low_logits_sends_no_nan,
    hidden_and_weight_may_lie_in_memory_as_they_like,
    probabilities_of_all_words_sum_to_one,
    bias_softcap_temperature_logsumexp_and_entropy_are_as_good_as_torchs,
    linear_error_is_at_most_twice_torchs_in_fp32_at_odd_sizes,
    linear_error_is_at_most_twice_torchs_in_fp16,
    linear_error_is_at_most_twice_torchs_in_bf16_at_odd_sizes,
    vocabulary_shards_give_every_rank_the_same_bits_and_the_whole_result,
    two_runs_and_a_row_alone_give_the_same_bits,
    chunks_of_rows_and_recomputing_change_no_bits,
    offsets_beyond_two_to_the_31_are_reached,
]
