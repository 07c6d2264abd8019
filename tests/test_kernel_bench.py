"""kernels/bench.py: runs without a GPU, says so, checks what it times, and writes what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs for minutes")


@no_gpu
def test_the_command_runs_on_a_cpu_says_so_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "kernels.bench", "--small", "--rounds", "1", "--json", str(tmp_path / "b.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU: the torch path is timed" in done.stdout and done.stdout.splitlines()[-1].startswith("ok: ")
    kept = json.loads((tmp_path / "b.json").read_text())
    heads = [line for line in kept["results"] if "dtype" in line]
    kernels = {line["kernel"]: line for line in kept["results"] if "kernel" in line}
    assert {line["dtype"] for line in heads} == {"bfloat16", "float32"}
    for line in heads:
        assert line["ms"] > 0 and line["fp32_ms"] > 0 and line["peak_rise_mib"] >= 0
    assert set(kernels) == {"selective_log_softmax", "preference_loss"}
    for line in kernels.values():  # plain torch's own rounding of sums of 64 or of 1000 terms in fp32
        assert line["ms"] > 0 and line["torch_ms"] > 0 and line["largest_difference"] < 1e-5


def test_the_error_it_reports_is_that_of_what_it_times():
    tensors = bench.inputs(32, 64, 500, torch.bfloat16, "cpu")
    rounded, exact = (bench.rms_error(loss, *tensors) for loss in (bench.plain_torch, bench.fp32_logits))
    assert exact <= bench.FP32_GRADE < rounded


@no_gpu
def test_log_probs_of_nan_fail_the_command_wherever_they_stand(monkeypatch, capsys):
    errors = iter((1e-7, 0.0, float("nan"), 0.0))  # ours and plain torch's, in bf16 and in fp32
    monkeypatch.setattr(bench, "rms_error", lambda *tensors: next(errors))
    assert bench.main(["--small", "--rounds", "1"]) == 1
    assert "FAULT" in capsys.readouterr().out.splitlines()[-1]


@no_gpu
def test_log_probs_that_are_not_of_fp32s_grade_fail_the_command(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ours", lambda backend: bench.plain_torch)
    assert bench.main(["--small", "--rounds", "1"]) == 1
    assert "FAULT" in capsys.readouterr().out.splitlines()[-1]


def test_medians_are_of_runs_in_turn_after_a_warming_round():
    order: list[str] = []
    times = bench.in_turn_s({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3)
    assert order == ["a", "b"] * 4 and set(times) == {"a", "b"}
