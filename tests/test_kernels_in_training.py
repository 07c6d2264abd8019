"""kernels.backend=triton is what training uses: the whole command under the interpreter, against the torch path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("exp=smoke", "checkable.subsets=Focus", "checkable.train_rows=8", "checkable.test_rows=4", "train.max_steps=2"),
    *("checkable.validation_rows=4", "judge.blind_control=false", "log.plots=false", "train.batch_pairs=4"),
]


def train(place: Path, *more: str, **environment: str) -> tuple[int, str]:
    """The real command in `place`; its exit code and what it printed."""
    command = [sys.executable, "-m", "dpo.train", *SMALL, f"run.root={place / 'runs'}", f"run.cache={place}", *more]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def outcome(place: Path) -> tuple[dict[str, dict[str, str]], list[float], torch.Tensor]:
    """What kernels it used, the loss of each step, and all trained weights in one."""
    folder = place / "runs" / "smoke" / "latest"
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "checkpoints" / "best" / "weights.safetensors")
    losses = [line["loss"] for line in lines if "loss" in line]
    return results["kernels"], losses, torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize("more", [(), ("lora.rank=2", "objective=responses")], ids=["full", "lora"])
def test_two_steps_on_the_triton_kernels_give_the_losses_and_weights_of_the_torch_path(tmp_path, more):
    runs = {}
    for name, backend, dtype in (("truth", "torch", "fp64"), ("torch", "torch", "fp32"), ("triton", "triton", "fp32")):
        place = tmp_path / name
        code, said = train(place, f"kernels.backend={backend}", f"dtype={dtype}", *more, TRITON_INTERPRET="1")
        assert code == 0, said
        runs[name] = outcome(place)
    assert runs["torch"][0]["linear_logprobs"]["path"] == "torch"
    used = runs["triton"][0]["linear_logprobs"]
    assert used["path"] == "fused" and "BV=" in used["linear_forward"]
    assert runs["torch"][0]["preference_loss"]["path"] == "torch"
    assert "BT=" in runs["triton"][0]["preference_loss"]["pair_forward"]
    (_, losses, weights), (_, torch_losses, torch_weights), (_, our_losses, our_weights) = runs.values()
    assert len(losses) == 2 and losses[1] != losses[0]
    for truth, yardstick, ours in zip(losses, torch_losses, our_losses, strict=True):
        assert abs(ours - truth) <= 2 * abs(yardstick - truth) + 4 * torch.finfo(torch.float32).eps
    # AdamW's first steps follow a gradient's sign, also where it is rounding noise: by norm, not by the largest.
    assert (our_weights - weights).norm() <= 2 * (torch_weights - weights).norm()


def test_asking_for_triton_where_there_is_none_is_a_users_mistake_that_says_what_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, said = train(tmp_path, "kernels.backend=triton")
    assert code == 2 and "kernels.backend=triton" in said and "TRITON_INTERPRET=1" in said
    assert not (tmp_path / "runs").exists()
