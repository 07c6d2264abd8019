"""kernels/static.py: the shipped kernels compile clean for every GPU, and what it is to catch is caught."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.static import BASELINE, TARGETS, Row, faults, read_amdgcn, resident_warps, table

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# One kernel that adds atomically and one whose sums are too many for its one warp.
INJECTED = """
import json, sys, torch, triton, triton.language as tl
from dataclasses import asdict
from kernels.static import compile_launches

@triton.jit
def adds(X, B: tl.constexpr):
    tl.atomic_add(X + tl.arange(0, B), 1.0)

@triton.jit
def spills(X, Y, n, B: tl.constexpr):
    at = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    acc = tl.zeros([B, B], tl.float32)
    for i in range(n):
        x = tl.load(X + i * B * B + at)
        acc = tl.dot(x, x, acc)
    tl.store(Y + at, acc)

def launch():
    x = torch.empty(4096, 128, device="meta")
    adds[(1,)](x, B=1024)
    spills[(1,)](x.half(), x, 3, B=128, num_warps=1)

if __name__ == "__main__":
    print(json.dumps([asdict(row) for target in sys.argv[1:] for row in compile_launches(target, [launch])]))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that compiles: tests interpret, and Triton decides once."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def row(**changed) -> Row:
    """A row that is in order, and one changed field."""
    return replace(Row("k", "sm_90", "BT128", 128, 0, 65536, 8, 24, 0, 0.25), **changed)


def baseline_of(*rows: Row) -> dict:
    return {one.key: asdict(one) for one in rows}


def test_one_tile_of_every_kernel_compiles_for_every_gpu_without_spills_atomics_or_regressions():
    done = run("-m", "kernels.static")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok: ")
    for kernel in ("linear_forward", "linear_hidden_grad", "linear_weight_grad", "row_forward", "combine_parts"):
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith(kernel + " ")]
        assert {words[1] for words in lines} == set(TARGETS), kernel
        assert ("linear_" not in kernel) or all(int(words[-4]) > 0 for words in lines), "products use matrix units"


@pytest.mark.long
def test_every_option_and_dtype_compiles_clean_from_a_cold_cache_within_five_minutes(tmp_path):
    done = run("-m", "kernels.static", "--all", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.splitlines()[-1].split()[-2]) < 300


def test_a_tampered_baseline_makes_the_command_fail(tmp_path):
    kept = json.loads(BASELINE.read_text())
    key = next(key for key in kept if re.match(r"sm_90 linear_forward bf16\S* .*DESC1 STORE_E", key))
    kept[key]["matrix_instructions"] += 1
    (tmp_path / "baseline.json").write_text(json.dumps(kept))
    done = run("-m", "kernels.static", "--targets", "sm_90", "--baseline", str(tmp_path / "baseline.json"))
    assert done.returncode == 1
    assert f"FAULT {key}: matrix instructions" in done.stdout and "FAULTS: 1:" in done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def injected(tmp_path_factory) -> dict[str, Row]:
    """The two faulty kernels, compiled for an NVIDIA and an AMD target, by target and name."""
    script = tmp_path_factory.mktemp("injected") / "faulty.py"
    script.write_text(INJECTED)
    done = run(str(script), "sm_80", "gfx942")
    assert done.returncode == 0, done.stderr
    return {f"{one['target']} {one['kernel']}": Row(**one) for one in json.loads(done.stdout.splitlines()[-1])}


def test_an_injected_atomic_is_caught(injected):
    for target in ("sm_80", "gfx942"):
        one = injected[f"{target} adds"]
        assert one.atomics > 0 and one.spilled_bytes == 0
        assert any("atomics" in line for line in faults([one], baseline_of(one), True))


def test_an_injected_spill_is_caught(injected):
    for target in ("sm_80", "gfx942"):
        one = injected[f"{target} spills"]
        assert one.spilled_bytes > 0 and one.atomics == 0
        assert any("spills" in line for line in faults([one], baseline_of(one), True))


@pytest.mark.parametrize("worse", [{"occupancy": 0.125}, {"matrix_instructions": 7}, {"async_copies": 0}])
def test_each_kind_of_regression_is_a_fault_and_growth_that_costs_no_occupancy_is_none(worse):
    kept = baseline_of(row())
    assert faults([row()], kept, True) == []
    assert faults([row(registers=160, shared_bytes=90000)], kept, True) == []
    (line,) = faults([row(**worse)], kept, True)
    assert next(iter(worse)).split("_")[0] in line


def test_kernels_missing_from_the_baseline_or_from_the_build_are_faults():
    assert "not in the baseline" in faults([row()], {}, True)[0]
    assert "only in the baseline" in faults([], baseline_of(row()), True)[0]
    assert faults([], baseline_of(row()), False) == []


def test_occupancy_counts_registers_shared_memory_tensor_memory_and_blocks():
    a100, h100, amd = TARGETS["sm_80"], TARGETS["sm_90"], TARGETS["gfx942"]
    assert resident_warps(a100, registers=142, threads=256, shared_bytes=65536) == 8  # 14 warps' registers: 1 block
    assert resident_warps(h100, registers=64, threads=256, shared_bytes=98304) == 16  # shared memory: 2 blocks
    assert resident_warps(h100, registers=32, threads=64, shared_bytes=0) == 64
    assert resident_warps(h100, registers=32, threads=32, shared_bytes=0) == 32  # no more than 32 blocks
    assert resident_warps(TARGETS["sm_100"], 32, 256, 0, tensor_columns=256) == 16
    assert resident_warps(amd, registers=108, threads=512, shared_bytes=32768) == 16
    assert resident_warps(amd, registers=32, threads=256, shared_bytes=0) == 32


def test_amd_assembly_is_read_for_registers_scratch_and_opcodes():
    text = "\tv_mfma_f32_32x32x8_bf16 a\n\tbuffer_load_dword v1, s[0:3], 0 offen lds\n\tglobal_atomic_add v0\n"
    registers, scratch, opcodes = read_amdgcn(text + "; TotalNumVgprs: 108\n; ScratchSize: 16\n")
    assert (registers, scratch, opcodes["async_lds"]) == (108, 16, 1)
    assert opcodes["v_mfma_f32_32x32x8_bf16"] == opcodes["global_atomic_add"] == 1


def test_the_table_has_a_line_a_row():
    lines = table([row(), row(target="sm_80")]).splitlines()
    assert len(lines) == 3 and lines[0].split()[-1] == "occupancy" and "25.0%" in lines[1]


@pytest.mark.parametrize("arch", TARGETS)
def test_fp32_never_reaches_the_fused_kernels_on_a_gpu_where_their_tiles_would_spill(monkeypatch, arch):
    monkeypatch.setattr(backend, "arch_of", lambda device: arch)
    for dtype, path in ((torch.float32, "chunked"), (torch.bfloat16, "fused")):
        assert backend.resolve("triton", torch.device("cuda"), dtype, 64) == path
