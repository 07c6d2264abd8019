"""What the log-prob path must move and multiply, and how long that takes on a GPU: counted, then modelled.

    python -m kernels.roofline

Letters: `T` rows, `D` model width, `V` vocabulary. Read next: kernels/backend.py, which picks by the same rates.

Counted: every kernel runs in Triton's interpreter, where each load, store and product passes through one function; the
bytes of active lanes and the FLOP must equal the closed forms below exactly. A byte asked for is one that the L2
serves; a byte of HBM is one asked for first in a group of programs that run together (GROUP, or a wave).
Modelled: the closed forms at full size, divided by rates that are assumed (RATES, GPUS). Nothing here is measured.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.backend import RATES, choose
from kernels.linear_logprobs import CHUNKED_TOKENS
from kernels.linear_paths import SAVED_PROBS_BYTES, fused_rows
from kernels.tiles import TILES, Tile


class Gpu(NamedTuple):
    """A GPU: whose rates and tiles it takes, the data sheet's dense bf16 peak, memory (peak, assumed), processors."""

    arch: str
    peak_tflops: float
    peak_tbps: float
    memory_tbps: float
    processors: int


GPUS = {  # peaks and processors: the makers' data sheets; products' rates: assumed, backend.RATES, as the memory's here
    "A100": Gpu("sm_80", 312, 2.04, RATES["sm_80"].memory_tbps, 108),
    "H100": Gpu("sm_90", 989, 3.35, RATES["sm_90"].memory_tbps, 132),
    "H200": Gpu("sm_90", 989, 4.8, 4.3, 132),
    "B200": Gpu("sm_100", 2250, 8.0, RATES["sm_100"].memory_tbps, 148),
    "MI300X": Gpu("gfx942", 1307, 5.3, RATES["gfx942"].memory_tbps, 304),
}
H100_L2_TBPS = (5.5, 7.0)  # others' estimates; what 128 x 128 tiles of ours need is compared with it
HEADS = {"gpt-oss": (2880, 201088), "Qwen3": (4096, 151936), "Llama 4": (5120, 202048)}  # D, V
ROWS = 8192


# --- closed forms: what a launch moves and multiplies -------------------------------------------------------------


@dataclass
class Traffic:
    """Of a launch: bytes asked for, bytes stored, bytes first asked for in a group, FLOP with the tails of tiles."""

    loaded: int = 0
    stored: int = 0
    distinct: int = 0
    flop: int = 0
    groups: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False, compare=False)


def ceil_div(n: int, size: int) -> int:
    """Tiles of `size` that cover `n`."""
    return -(-n // size)


def forward_traffic(T: int, D: int, V: int, tile: Tile, width: int, keep: bool) -> Traffic:
    """linear_forward: a group reads W once, and its rows of X."""
    tiles_t, tiles_v = ceil_div(T, tile["BT"]), ceil_div(V, tile["BV"])
    x, w, y = T * D * width, V * D * width, 4 * T
    return Traffic(
        loaded=x * tiles_v + w * tiles_t + y * tiles_v,
        stored=8 * T * tiles_v + 4 * T + keep * T * V * width,
        distinct=x + w * ceil_div(tiles_t, tile["GROUP"]) + y,
        flop=2 * tiles_t * tile["BT"] * tiles_v * tile["BV"] * ceil_div(D, tile["BD"]) * tile["BD"],
    )


def hidden_grad_traffic(T: int, D: int, V: int, tile: Tile, width: int, BV: int, group: int) -> Traffic:
    """linear_hidden_grad: `group` tiles of rows run together and read W once; e passes once."""
    tiles_t, tiles_n, steps = ceil_div(T, tile["BT"]), ceil_div(D, tile["BN"]), ceil_div(V, tile["BK"])
    e, w = T * V * width, V * D * width
    return Traffic(
        loaded=e * tiles_n + w * tiles_t + 4 * T * tiles_n * (1 + steps),
        stored=4 * T * D,
        distinct=e + w * ceil_div(tiles_t, group) + 4 * T * (1 + ceil_div(V, BV)),
        flop=2 * tiles_t * tile["BT"] * tiles_n * tile["BN"] * steps * tile["BK"],
    )


def weight_grad_traffic(T: int, D: int, V: int, tile: Tile, width: int, add: bool, BV: int, group: int) -> Traffic:
    """linear_weight_grad: `group` tiles of words run together and read the scaled rows once; e passes once."""
    tiles_v, tiles_n, steps = ceil_div(V, tile["BM"]), ceil_div(D, tile["BN"]), ceil_div(T, tile["BK"])
    e, g, groups = T * V * width, T * D * width, ceil_div(tiles_v, group)
    return Traffic(
        loaded=e * tiles_n + g * tiles_v + 8 * T * tiles_v * tiles_n + add * 4 * V * D,
        stored=4 * V * D,
        distinct=e + g * groups + 4 * T * (groups + ceil_div(V, BV)) + add * 4 * V * D,
        flop=2 * tiles_v * tile["BM"] * tiles_n * tile["BN"] * steps * tile["BK"],
    )


def combine_traffic(T: int, parts: int) -> Traffic:
    """combine_parts: k twice, s once; k and s (fp64) of the rows out."""
    return Traffic(loaded=12 * T * parts, stored=12 * T, distinct=8 * T * parts)


def row_forward_traffic(T: int, V: int, tile: Tile, width: int, span: int) -> Traffic:
    """row_forward: the logits once, the target's a second time."""
    logits, parts = T * V * width, ceil_div(V, tile["BV"] * span)
    return Traffic(loaded=logits + 4 * T * parts + T * width, stored=8 * T * parts + 4 * T, distinct=logits + 4 * T)


def row_backward_traffic(T: int, V: int, tile: Tile, width: int, out_width: int, span: int) -> Traffic:
    """row_backward: the logits once, the probabilities once; four numbers a row and span."""
    parts = ceil_div(V, tile["BV"] * span)
    return Traffic(T * V * width + 16 * T * parts, T * V * out_width, T * V * width + 16 * T)


# --- counting in the interpreter ----------------------------------------------------------------------------------


@contextmanager
def counting(group_of: Callable[[str, int], int]) -> Iterator[dict[str, Traffic]]:
    """Traffic by kernel of what is launched inside; `group_of(kernel, program)` names the group that shares the L2."""
    from triton.runtime.interpreter import GridExecutor, TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    load, store = builder.create_masked_load, builder.create_masked_store
    dot, call = builder.create_dot, GridExecutor.__call__
    counts: dict[str, Traffic] = {}
    running = [""]

    def bytes_of(pointers: TensorHandle, mask: TensorHandle) -> tuple[int, np.ndarray, int]:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return int(active.sum()) * width, pointers.data[active], width

    def counted_load(pointers: TensorHandle, mask: TensorHandle, *rest: object) -> TensorHandle:
        total, addresses, width = bytes_of(pointers, mask)
        here = counts[running[0]]
        here.loaded += total
        group = group_of(running[0], builder.grid_idx[0])
        here.groups.setdefault(group, []).append(addresses.astype(np.int64).ravel() * 16 + width)
        return load(pointers, mask, *rest)

    def counted_store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: object) -> None:
        counts[running[0]].stored += bytes_of(pointers, mask)[0]
        store(pointers, value, mask, *rest)

    def counted_dot(a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        counts[running[0]].flop += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(a, b, *rest)

    def named_call(self: GridExecutor, *arguments: object, **options: object) -> None:
        running[0] = self.fn.__name__
        here = counts.setdefault(running[0], Traffic())
        call(self, *arguments, **options)
        for asked in here.groups.values():
            here.distinct += int((np.unique(np.concatenate(asked)) % 16).sum())
        here.groups.clear()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_dot = counted_dot
    GridExecutor.__call__ = named_call
    try:
        yield counts
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_dot
        GridExecutor.__call__ = call


# --- modelled time ------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One launch at full size: FLOP, bytes of HBM (read once a group, and stored), bytes that the L2 serves."""

    kernel: str
    flop: float
    hbm: float
    l2: float


def _step(kernel: str, traffic: Traffic) -> Step:
    return Step(kernel, traffic.flop, traffic.distinct + traffic.stored, traffic.loaded + traffic.stored)


def _library(rows: int, columns: int, depth: int) -> Step:
    """The vendor's product of bf16 matrices, each read once, stored once in fp32; its tiles are its own affair."""
    moved = 2 * (rows + columns) * depth + 4 * rows * columns
    return Step("library product", 2 * rows * columns * depth, moved, moved)


def steps(path: str, gpu: str, T: int, D: int, V: int, trained: bool) -> list[Step]:
    """What forward and backward launch in bf16, chunk by chunk, as kernels/linear_paths.py does."""
    taken = (_fused_steps if path == "fused" else _chunked_steps)(GPUS[gpu], T, D, V, trained)
    return [*taken, Step("torch: J and g J", 0, 26 * T * D, 26 * T * D)]


def _fused_steps(gpu: Gpu, T: int, D: int, V: int, trained: bool) -> list[Step]:
    forward, hidden, weight = (TILES[gpu.arch][f"linear_{name}"] for name in ("forward", "hidden_grad", "weight_grad"))
    hidden_wave, weight_wave = (max(gpu.processors // ceil_div(D, tile["BN"]), 1) for tile in (hidden, weight))
    rows = fused_rows(2 * V)
    taken: list[Step] = []
    for start in range(0, T, rows):
        C = min(rows, T - start)
        made = [
            _step("linear_forward", forward_traffic(C, D, V, forward, 2, True)),
            _step("combine_parts", combine_traffic(C, ceil_div(V, forward["BV"]))),
        ]
        traffic = hidden_grad_traffic(C, D, V, hidden, 2, forward["BV"], hidden_wave)
        taken += [*made, _step("linear_hidden_grad", traffic)]
        if trained:
            traffic = weight_grad_traffic(C, D, V, weight, 2, start > 0, forward["BV"], weight_wave)
            taken += made * (2 * V * (start + C) > SAVED_PROBS_BYTES) + [_step("linear_weight_grad", traffic)]
    return taken


def _chunked_steps(gpu: Gpu, T: int, D: int, V: int, trained: bool) -> list[Step]:
    from kernels.row_triton import SPAN_BLOCKS

    C, tiles = CHUNKED_TOKENS, TILES[gpu.arch]  # the last chunk is padded: all are alike
    made = [
        _library(C, V, D),
        _step("row_forward", row_forward_traffic(C, V, tiles["row_forward"], 4, SPAN_BLOCKS)),
        _step("row_backward", row_backward_traffic(C, V, tiles["row_backward"], 4, 2, SPAN_BLOCKS)),
    ]
    chunk, chunks = [*made, _library(C, D, V)], ceil_div(T, C)
    if not trained:
        return chunk * chunks
    if 2 * T * V <= SAVED_PROBS_BYTES:  # all probabilities are kept, or none
        return [*chunk * chunks, _library(V, D, T)]
    return [*chunk, *made, _library(V, D, C), Step("torch: dW -= product", 0, 12 * V * D, 12 * V * D)] * chunks


def modelled_ms(gpu: str, path: str, taken: Sequence[Step]) -> float:
    """Each launch takes the longer of its FLOP and its HBM bytes at the assumed rates; launches follow one another."""
    rates, memory = RATES[GPUS[gpu].arch], GPUS[gpu].memory_tbps
    tflops = rates.fused_tflops if path == "fused" else rates.vendor_tflops
    return sum(max(step.flop / tflops, step.hbm / memory) for step in taken) / 1e9


def floor_ms(gpu: str, products: int, T: int, D: int, V: int) -> float:
    """`products` of 2TVD FLOP at the rate assumed of the vendor's library, and nothing else."""
    return products * 2 * T * V * D / RATES[GPUS[gpu].arch].vendor_tflops / 1e9


# --- the report ---------------------------------------------------------------------------------------------------

SHAPES = ((64, 64, 256), (61, 100, 997))  # T, D, V that are counted: whole tiles, and tails everywhere


def count_and_model(T: int, D: int, V: int) -> dict[str, tuple[Traffic, Traffic]]:
    """By kernel, (counted in the interpreter, closed form), every kernel launched once in fp32."""
    import torch

    from kernels import linear_triton, row_triton

    arch, tiles = "interpret", TILES["interpret"]
    forward, hidden, weight = (tiles[f"linear_{name}"] for name in ("forward", "hidden_grad", "weight_grad"))
    parts, span, group = ceil_div(V, forward["BV"]), row_triton.SPAN_BLOCKS, 2
    sizes = {
        "linear_forward": forward["GROUP"] * parts,
        "linear_hidden_grad": group * ceil_div(D, hidden["BN"]),
        "linear_weight_grad": group * ceil_div(D, weight["BN"]),
    }
    random = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(rows, D, generator=random) for rows in (T, V))
    targets_T = torch.randint(V, (T,), generator=random, dtype=torch.int32)
    with counting(lambda kernel, program: program // sizes[kernel] if kernel in sizes else 0) as counted:
        kept = linear_triton.forward(hidden_TD, weight_VD, None, targets_T, 1.0, None, False, True, arch)[1]
        assert kept is not None, "asked for"
        linear_triton.hidden_grad(kept, weight_VD, torch.empty(T, D), arch)
        linear_triton.add_weight_grad(torch.zeros(V, D), kept, hidden_TD, True, arch)
    modelled = {
        "linear_forward": forward_traffic(T, D, V, forward, 4, True),
        "combine_parts": combine_traffic(T, parts),
        "linear_hidden_grad": hidden_grad_traffic(T, D, V, hidden, 4, forward["BV"], group),
        "linear_weight_grad": weight_grad_traffic(T, D, V, weight, 4, True, forward["BV"], group),
    }
    logits_TV = hidden_TD @ weight_VD.T
    k_T, factor_T, at_target_T = torch.ones(3, T)
    with counting(lambda kernel, program: 0) as rows:
        row_triton.forward(logits_TV, targets_T, 1.0, False, arch)
        row_triton.backward(logits_TV, torch.empty_like(logits_TV), targets_T, k_T, factor_T, at_target_T, 1.0, arch)
    modelled["row_forward"] = row_forward_traffic(T, V, tiles["row_forward"], 4, span)
    modelled["row_backward"] = row_backward_traffic(T, V, tiles["row_backward"], 4, 4, span)
    counted |= {kernel: traffic for kernel, traffic in rows.items() if kernel != "combine_parts"}
    return {kernel: (counted[kernel], traffic) for kernel, traffic in modelled.items()}


def counted_report() -> tuple[list[str], bool]:
    """Counted against modelled, a line a kernel and shape, and whether all are equal."""
    lines = ["COUNTED in the interpreter (fp32): bytes asked of the L2, first asked in a group, stored; FLOP"]
    equal = True
    for T, D, V in SHAPES:
        for kernel, (counted, modelled) in count_and_model(T, D, V).items():
            same = counted == modelled
            equal &= same
            figures = f"{counted.loaded:>11,} {counted.distinct:>10,} {counted.stored:>10,} {counted.flop:>12,}"
            lines.append(f"  T{T} D{D} V{V}  {kernel:<19}{figures}  {'= model' if same else f'NOT {modelled}'}")
            if kernel in ("linear_forward", "linear_hidden_grad") and T % 64 == D % 64 == V % 64 == 0:
                equal &= counted.flop == 2 * T * V * D
    lines.append("  where tiles fit, a frozen head's FLOP are 2 x 2TVD exactly; tails of tiles come on top")
    return lines, equal


def modelled_report() -> list[str]:
    """Predicted times of every GPU and head, then the H100 at gpt-oss's frozen head in detail."""
    lines = [
        f"MODELLED, T {ROWS}, bf16, forward + backward, ms; assumed: TFLOP/s of the library, ours, TB/s; * auto's path",
        f"  {'GPU':<8}{'assumed (of peak)':<34}{'head':<9}{'trained':<9}{'floor':>7}{'chunked':>10}{'fused':>9}    x",
    ]
    for gpu, (arch, peak, peak_tbps, memory, _) in GPUS.items():
        rates = RATES[arch]
        told = f"{rates.vendor_tflops:g}, {rates.fused_tflops:g} of {peak:g}; {memory:g} of {peak_tbps:g}"
        for head, (D, V) in HEADS.items():
            for trained in (False, True):
                ms = {p: modelled_ms(gpu, p, steps(p, gpu, ROWS, D, V, trained)) for p in ("chunked", "fused")}
                auto, floor = choose(arch, D), floor_ms(gpu, 2 + trained, ROWS, D, V)
                times = "".join(f"{value:8.1f}{'*' if path == auto else ' '}" for path, value in ms.items())
                case = f"  {gpu:<8}{told:<34}{head:<9}{'yes' if trained else 'no':<9}"
                lines.append(f"{case}{floor:7.1f} {times}{ms[auto] / floor:9.2f}")
    return lines


def h100_report() -> tuple[list[str], float]:
    """What auto's path costs at T 8192, gpt-oss's frozen head, on an H100; what would bring it to 1.1 x the floor."""
    (D, V), rates, memory = HEADS["gpt-oss"], RATES["sm_90"], GPUS["H100"].memory_tbps
    floor = floor_ms("H100", 2, ROWS, D, V)
    chunked, fused = (steps(path, "H100", ROWS, D, V, False) for path in ("chunked", "fused"))
    ms, ours = modelled_ms("H100", "chunked", chunked), modelled_ms("H100", "fused", fused)
    rows = sum(step.hbm for step in chunked if step.kernel.startswith("row_")) / memory / 1e9
    once = rows - 4 * ROWS * V / memory / 1e9  # one pass: read fp32, write bf16
    enough = floor * rates.vendor_tflops / (1.35 * floor - (ms - floor))
    product = next(step for step in fused if step.kernel == "linear_forward")
    demand = product.l2 / (product.flop / rates.fused_tflops)
    return [
        f"H100, T {ROWS}, gpt-oss, frozen head, MODELLED",
        f"  floor: 2 x 2TVD at {rates.vendor_tflops:g} TFLOP/s (assumed of the library): {floor:.1f} ms",
        f"  chunked, auto's: {ms:.1f} ms = {ms / floor:.2f} x: products {floor:.1f}, row passes {rows:.1f}, the rest "
        f"{ms - floor - rows:.1f}",
        f"      within 1.35 x as long as the library reaches {enough:.0f} TFLOP/s",
        f"  fused: {ours:.1f} ms = {ours / floor:.2f} x at {rates.fused_tflops:g} TFLOP/s (others' Triton: 370-470)",
        f"      at that rate linear_forward's tiles ask the L2 for {demand:.1f} TB/s (estimates of what it gives: "
        f"{H100_L2_TBPS[0]}-{H100_L2_TBPS[1]})",
        f"  what would bring it to 1.1 x = {1.1 * floor:.1f} ms",
        f"      one row pass instead of two (the first block guesses k; bf16 has the range for a wrong guess): "
        f"{ms - rows + once:.1f} ms",
        f"      that pass under the next chunk's product, on a second stream: down to {ms - rows:.1f} ms",
        f"      fused alone: {ours / floor / 1.1 * rates.fused_tflops:.0f} TFLOP/s: operands shared by clusters",
    ], ms / floor


def published_report() -> list[str]:
    """The peers' own figures, of kernels/roofline.toml, beside our model at their shapes."""
    lines = ["PUBLISHED by the peers, theirs and not rerun, beside our model at their shape (ms, auto's path)"]
    figures = tomllib.loads(Path(__file__).with_name("roofline.toml").read_text(encoding="utf-8"))["published"]
    for gpu, T, D, V, what, theirs, whose in figures:
        path = choose(GPUS[gpu].arch, D)
        taken = steps(path, gpu, T, D, V, trained=what == "trained")
        if what == "forward":  # of the chunked path: one product and one row pass
            taken = [_library(T, V, D), *(step for step in taken if step.kernel == "row_forward")]
        shape = f"T{T} D{D} V{V}"
        modelled = f"ours, modelled {modelled_ms(gpu, path, taken):7.1f}"
        lines.append(f"  {gpu:<6}{shape:<22}{what:<9}{theirs:8.2f} {whose:<38}{modelled}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status: 1 where a count differs from its closed form."""
    parser = argparse.ArgumentParser(prog="python -m kernels.roofline", description=(__doc__ or "").split("\n\n")[0])
    parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":  # it is read when the kernels are imported
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", "kernels.roofline", *arguments], env=env).returncode
    counted, equal = counted_report()
    detail, ratio = h100_report()
    print("\n".join([*counted, "", *modelled_report(), "", *detail, "", *published_report()]))
    verdict = "ok: counts equal the model" if equal else "FAULT: a count differs from the model"
    print(f"{verdict}; modelled, not measured: H100, gpt-oss, frozen head: auto takes {ratio:.2f} x the floor")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
