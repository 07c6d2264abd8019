"""kernels/roofline.py: counts in the interpreter equal the closed forms, and the model says what it claims."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import roofline
from kernels.backend import RATES, choose

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_the_command_counts_what_it_models_and_says_which_is_which():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kernels.roofline"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT" not in done.stdout and done.stdout.count("= model") == 6 * len(roofline.SHAPES)
    for word in ("COUNTED", "MODELLED", "PUBLISHED", *roofline.GPUS, *roofline.HEADS):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ok: counts equal the model")


def test_a_closed_form_that_is_off_by_one_row_is_noticed():
    """Under the interpreter the counts come from the kernels, so a wrong form cannot agree with them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels were imported to be compiled")
    counts = roofline.count_and_model(17, 36, 70)
    assert all(counted == modelled for counted, modelled in counts.values())
    counted = counts["linear_forward"][0]
    wrong = roofline.forward_traffic(18, 36, 70, roofline.TILES["interpret"]["linear_forward"], 4, True)
    assert counted != wrong


def test_flop_of_a_frozen_head_are_exactly_two_products_where_tiles_fit():
    D, V = roofline.HEADS["Qwen3"]
    taken = roofline.steps("fused", "H100", roofline.ROWS, D, V, trained=False)
    assert sum(step.flop for step in taken) == 2 * 2 * roofline.ROWS * V * D


def test_tails_of_tiles_are_counted_on_top():
    (D, V), columns = roofline.HEADS["gpt-oss"], roofline.TILES["sm_90"]["linear_hidden_grad"]["BN"]
    assert D % columns, "2880 columns are no whole number of tiles"
    taken = roofline.steps("fused", "H100", roofline.ROWS, D, V, trained=False)
    assert sum(step.flop for step in taken) == 2 * roofline.ROWS * V * (D + -(-D // columns) * columns)


def test_the_h100_figure_of_the_path_that_auto_picks_is_within_its_bound():
    lines, ratio = roofline.h100_report()
    assert choose("sm_90", roofline.HEADS["gpt-oss"][0]) == "chunked"
    assert ratio <= 1.35
    assert roofline.floor_ms("H100", 2, roofline.ROWS, *roofline.HEADS["gpt-oss"]) == pytest.approx(23.7, abs=0.05)
    assert 370 <= RATES["sm_90"].fused_tflops <= 470
    assert any("to 1.1 x" in line for line in lines)


def test_no_assumed_rate_passes_its_peak_and_every_gpu_has_tiles():
    for gpu in roofline.GPUS.values():
        assert RATES[gpu.arch].fused_tflops <= RATES[gpu.arch].vendor_tflops < gpu.peak_tflops
        assert gpu.memory_tbps < gpu.peak_tbps and gpu.arch in roofline.TILES


def test_more_of_anything_takes_longer():
    for path in ("chunked", "fused"):
        for trained in (False, True):
            base = roofline.modelled_ms("H100", path, roofline.steps(path, "H100", 4096, 4096, 65536, trained))
            for T, D, V in ((8192, 4096, 65536), (4096, 8192, 65536), (4096, 4096, 131072)):
                assert roofline.modelled_ms("H100", path, roofline.steps(path, "H100", T, D, V, trained)) > base
