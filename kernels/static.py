"""Every Triton kernel compiled for every GPU it is shipped for, on a CPU without a driver, and the outcome inspected.

    python -m kernels.static [--all] [--write-baseline] [--jobs N]

The launchers themselves run, on meta tensors, against a driver that names a GPU and launches nothing: what is compiled
is what training would launch, specialisation and tile included. Machine code is read with the disassemblers in
Triton's own wheel. One launch of every kernel and target; with --all, with every option and dtype too.

Exit status 1 where a shipped tile spills or uses an atomic, or where, against kernels/baseline.json, a kernel
  - has fewer resident warps (registers or shared memory grew so far that occupancy falls),
  - has fewer matrix instructions or fewer asynchronous copies,
  - is not in the baseline, or (with --all) is only in the baseline.
Growth that costs no occupancy is no fault. A wanted change is committed with --all --write-baseline.
Read next: kernels/roofline.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

Baseline = dict[str, dict[str, float]]  # by a row's key: its figures
BASELINE = Path(__file__).with_name("baseline.json")
MATRIX_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")  # mma.sync, wgmma, tcgen05
ASYNC_OPCODES = ("LDGSTS", "UTMALDG")  # cp.async, TMA loads
ATOMIC_OPCODES = ("ATOM", "ATOMG", "RED", "UTMAREDG")  # on global memory; ATOMS is sm_100's own tensor memory set-up


@dataclass(frozen=True)
class Target:
    """A GPU as the compiler sees it, and what one multiprocessor (compute unit) holds."""

    backend: str
    arch: int | str
    warp_threads: int
    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, a block


TARGETS = {
    "sm_80": Target("cuda", 80, 32, warps=64, blocks=32, shared_bytes=164 * 1024, reserved_bytes=1024),
    "sm_90": Target("cuda", 90, 32, warps=64, blocks=32, shared_bytes=228 * 1024, reserved_bytes=1024),
    "sm_100": Target("cuda", 100, 32, warps=64, blocks=32, shared_bytes=228 * 1024, reserved_bytes=1024),
    "gfx942": Target("hip", "gfx942", 64, warps=32, blocks=32, shared_bytes=64 * 1024, reserved_bytes=0),
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Registers and spilled bytes are a thread's; occupancy is the share of warps resident."""

    kernel: str
    target: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    async_copies: int
    atomics: int
    occupancy: float

    @property
    def key(self) -> str:
        return f"{self.target} {self.kernel} {self.tile}"


# --- what the machine code says -----------------------------------------------------------------------------------


def resident_warps(target: Target, registers: int, threads: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """Warps of this kernel that one multiprocessor holds at once."""
    warps = -(-threads // target.warp_threads)
    if target.backend == "cuda":  # 64 Ki registers, given out by 256 a warp
        by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // warps
    else:  # 512 registers a lane in each of 4 SIMDs, given out by 8, at most 8 waves each
        by_registers = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // warps
    by_shared = target.shared_bytes // (shared_bytes + target.reserved_bytes or 1)
    by_tensor = 512 // tensor_columns if tensor_columns else target.blocks
    return warps * min(by_registers, by_shared, by_tensor, target.blocks, target.warps // warps)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the disassemblers in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise SystemExit(f"kernels.static needs {name}, which this Triton ({triton.__version__}) does not ship: {path}")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """(registers, bytes of stack a thread, opcodes without their suffixes) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump -res-usage prints no registers: {usage}"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, flags=re.M)
    assert opcodes, "nvdisasm prints no instructions"
    return int(found[1]), int(found[2]), Counter(opcodes)


def read_amdgcn(text: str) -> tuple[int, int, Counter[str]]:
    """(registers, bytes of scratch a thread, opcodes) of the kernel in AMD assembly; copies to LDS as `async_lds`."""
    found = {name: re.search(rf"^; {name}: (\d+)", text, flags=re.M) for name in ("TotalNumVgprs", "ScratchSize")}
    registers, scratch = (int(match[1]) for match in found.values() if match)
    opcodes = Counter(re.findall(r"^\s+([vsbdgf][a-z0-9]*_[a-z0-9_]+)", text, flags=re.M))
    opcodes["async_lds"] = len(re.findall(r"^\s+(?:buffer|global)_load_\w+ .*\blds\b", text, flags=re.M))
    return registers, scratch, opcodes


def describe(kernel: CompiledKernel, target: str) -> Row:
    """One row from what triton.compile returned."""
    asm, metadata = kernel.asm, kernel.metadata
    gpu = TARGETS[target]
    if gpu.backend == "cuda":
        registers, spilled, opcodes = read_cubin(asm["cubin"])
        wanted = re.search(r"\.reqntid (\d+)", asm["ptx"])
        threads = int(wanted[1]) if wanted else metadata.num_warps * 32  # more than num_warps when warps specialise
        matrix, copies, atomics = (
            sum(opcodes[name] for name in names) for names in (MATRIX_OPCODES, ASYNC_OPCODES, ATOMIC_OPCODES)
        )
    else:
        registers, spilled, opcodes = read_amdgcn(asm["amdgcn"])
        threads = metadata.num_warps * gpu.warp_threads
        matrix = sum(n for name, n in opcodes.items() if name.startswith("v_mfma"))
        copies = opcodes["async_lds"]
        atomics = sum(n for name, n in opcodes.items() if re.match(r"(global|flat|buffer)_atomic", name))
    tensor_columns = metadata.tmem_size if gpu.backend == "cuda" else 0
    return Row(
        kernel=metadata.name.strip("_"),
        target=target,
        tile=tile_name(kernel),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=metadata.shared,
        matrix_instructions=matrix,
        async_copies=copies,
        atomics=atomics,
        occupancy=resident_warps(gpu, registers, threads, metadata.shared, tensor_columns) / gpu.warps,
    )


def tile_name(kernel: CompiledKernel) -> str:
    """A compiled kernel's constants in words: float operands' dtypes, sizes, options that are on, warps and stages."""
    source, metadata = kernel.src, kernel.metadata
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    kinds = "\n".join(source.signature.values())
    operands = ",".join(dict.fromkeys(re.findall(r"^(?:\*|tensordesc<)(b?fp?\d+)", kinds, flags=re.M)))
    sizes = [f"{name}{value}" for name, value in constants.items() if type(value) is int and name.isupper() and value]
    options = [name for name, value in constants.items() if value is True]
    return " ".join([operands, *sizes, *options, f"w{metadata.num_warps} s{metadata.num_stages}"])


# --- compiling without a GPU --------------------------------------------------------------------------------------


class _NoGpu:
    """Triton's driver for a GPU that is not there: it has a target and nothing else."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # Triton keeps what it compiled by device: here, by target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        gpu = TARGETS[self.target]
        return GPUTarget(gpu.backend, gpu.arch, gpu.warp_threads)


def compile_launches(target: str, launches: Sequence[Callable[[], object]]) -> list[Row]:
    """Run launchers on meta tensors so that every kernel they launch is compiled for `target` instead; one row each."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "Triton was imported to interpret, not to compile"
    compiled: dict[int, CompiledKernel] = {}
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = kernel

    driver.set_active(_NoGpu(target))
    JITFunction.run = compile_only
    try:
        for one in launches:
            one()
    finally:
        JITFunction.run = launch
    rows = [describe(kernel, target) for kernel in compiled.values()]
    return list({row.key: row for row in rows}.values())


def launches(arch: str, every: bool) -> list[Callable[[], object]]:
    """The launches of training at gpt-oss's head, in bf16; `every`: with each option, and in fp16, as well."""
    import torch

    from kernels import linear_triton, mxfp4_triton, preference_triton, row_triton

    T, D, V, B = 2048, 2880, 201088, 64
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    targets_T, row_T = new(torch.int32, T), new(fp32, T)

    def products(
        dtype: torch.dtype, bias: bool = False, softcap: float | None = None, entropy: bool = False, keep: bool = True
    ) -> None:
        hidden_TD, weight_VD, bias_V = new(dtype, T, D), new(dtype, V, D), new(dtype, V) if bias else None
        kept = linear_triton.forward(hidden_TD, weight_VD, bias_V, targets_T, 1.0, softcap, entropy, keep, arch)[1]
        if kept is None:
            return
        linear_triton.hidden_grad(kept, weight_VD, new(fp32, T, D), arch)
        for add in (False, True):
            linear_triton.add_weight_grad(new(fp32, V, D), kept, hidden_TD, add, arch)
        linear_triton.add_target_rows(new(fp32, V, D), targets_T, row_T, hidden_TD, arch)

    def rows(logits: torch.dtype, out: torch.dtype, entropy: bool) -> None:
        row_triton.forward(new(logits, T, V), targets_T, 1.0, entropy, arch)
        row_triton.backward(new(logits, T, V), new(out, T, V), targets_T, row_T, row_T, row_T, 1.0, arch)

    def pairs(kind: str, reference: torch.Tensor | None, interleaved: bool) -> None:
        cu_seqlens = new(torch.int32, 2 * B + 1)
        preference_triton.forward(row_T, reference, cu_seqlens, 0.1, 0.0, kind, interleaved, arch)
        preference_triton.backward(new(fp64, B), new(fp64, B), cu_seqlens, row_T, interleaved, arch)

    def experts(dtype: torch.dtype) -> None:
        mxfp4_triton.dequantise(new(torch.uint8, 2 * D, D // 32, 16), new(torch.uint8, 2 * D, D // 32), dtype, arch)

    wanted: list[Callable[[], object]] = [
        lambda: products(bf16),
        lambda: rows(fp32, bf16, False),
        lambda: pairs("sigmoid", row_T, True),
        lambda: experts(bf16),
    ]
    if every:
        wanted += [partial(products, bf16, keep=False), partial(products, bf16, entropy=True, keep=False)]
        wanted += [partial(products, bf16, bias=True), partial(products, bf16, softcap=30.0)]
        wanted += [partial(products, bf16, entropy=True), partial(products, bf16, True, 30.0, True)]
        wanted += [partial(products, fp16), partial(rows, fp32, fp32, True), partial(rows, bf16, bf16, True)]
        wanted += [partial(pairs, kind, new(fp32, 2 * B, 1), False) for kind in preference_triton.CODES]
        wanted += [partial(pairs, "sigmoid", None, False), partial(experts, fp16), partial(experts, fp32)]
    return wanted


def compile_target(target: str, every: bool) -> list[Row]:
    """All rows of one target."""
    return compile_launches(target, launches(target, every))


# --- comparing and printing ---------------------------------------------------------------------------------------


def faults(rows: Sequence[Row], baseline: Baseline, every: bool) -> list[str]:
    """What is wrong with the rows, in words, also against the baseline. `every`: these rows are all there are."""
    found = []
    for row in rows:
        found += [f"{row.key}: spills {row.spilled_bytes} bytes a thread"] * (row.spilled_bytes > 0)
        found += [f"{row.key}: {row.atomics} atomics on global memory"] * (row.atomics > 0)
        if row.key not in baseline:
            found.append(f"{row.key}: not in the baseline")
            continue
        now, before = asdict(row), baseline[row.key]
        for name in ("occupancy", "matrix_instructions", "async_copies"):
            if now[name] < before[name]:
                grown = [f"{n} {before[n]} -> {now[n]}" for n in ("registers", "shared_bytes") if now[n] != before[n]]
                found.append(f"{row.key}: {name.replace('_', ' ')} {before[name]} -> {now[name]} {', '.join(grown)}")
    if every:
        found += [f"{key}: only in the baseline" for key in sorted(baseline.keys() - {row.key for row in rows})]
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, a header first."""
    header = ("kernel", "target", "tile", "registers", "spilled", "shared", "matrix", "async", "atomics", "occupancy")
    cells = [header] + [(*map(str, list(asdict(row).values())[:-1]), f"{row.occupancy:.1%}") for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * 3 + [str.rjust] * 7
    lines = [[side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)] for line in cells]
    return "\n".join("  ".join(line) for line in lines)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.static", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every option and dtype of every kernel, not one each")
    parser.add_argument("--write-baseline", action="store_true", help="accept what was compiled as the baseline")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (%(default)s)")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="another baseline file")
    asked = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("kernels.static needs triton, which is not installed (pip install triton)")
        return 1
    begin = time.perf_counter()
    os.environ.pop("TRITON_INTERPRET", None)  # the processes that compile are new ones, and read it anew
    targets = asked.targets.split(",")
    with ProcessPoolExecutor(min(asked.jobs, len(targets)), mp_context=get_context("spawn")) as pool:
        rows = [row for part in pool.map(compile_target, targets, [asked.all] * len(targets)) for row in part]
    rows.sort(key=lambda row: (row.kernel, row.tile, list(TARGETS).index(row.target)))
    print(table(rows))
    kept: Baseline = json.loads(asked.baseline.read_text()) if asked.baseline.exists() else {}
    if asked.write_baseline:
        drop = {"kernel", "target", "tile"}
        new = {row.key: {name: value for name, value in asdict(row).items() if name not in drop} for row in rows}
        kept = new if asked.all else kept | new
        asked.baseline.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(kept[k])}' for k in sorted(kept)) + "\n}\n")
    found = faults(rows, kept, asked.all and targets == list(TARGETS))
    print("".join(f"FAULT {line}\n" for line in found), end="")
    spills, atomics = sum(row.spilled_bytes > 0 for row in rows), sum(row.atomics > 0 for row in rows)
    print(
        f"{'FAULTS: ' + str(len(found)) if found else 'ok'}: {len(rows)} kernels for {', '.join(targets)}, "
        f"{spills} with spills, {atomics} with atomics, {time.perf_counter() - begin:.0f} s"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
