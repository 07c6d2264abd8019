"""kernels.backend=triton is what training uses: the whole command under the interpreter, against the torch path."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved import saved_tensors
from test_exactness import random_tree

from dpo.config import Config, LossConfig
from dpo.logprobs import batch_sums
from dpo.losses import pair_losses
from dpo.packing import Batch, bare_batch, empty_pack, pack_trees
from dpo.pairs import pair_logps
from dpo.step import KERNEL_LOSSES, in_one_kernel, kernel_losses
from dpo.trees import Tree

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
    weights = saved_tensors(folder / "checkpoints" / "best")
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


def test_log_probs_rounded_to_bf16_train_too_and_share_no_stored_reference_with_others(tmp_path):
    runs = {}
    for backend in ("torch", "bf16", "bf16"):
        code, said = train(tmp_path, f"kernels.backend={backend}", "objective=responses")
        assert code == 0, said
        results = json.loads((tmp_path / "runs" / "smoke" / "latest" / "results.json").read_text())
        assert results["step0_max_difference"] == 0
        runs[backend] = outcome(tmp_path), results["reference"]["misses"], runs.get(backend, (0, None))[1]
    (used, losses, _), misses, _ = runs["torch"]
    (rounded, others, _), misses_again, misses_first = runs["bf16"]
    assert (used["linear_logprobs"]["path"], rounded["linear_logprobs"]["path"]) == ("torch", "bf16")
    assert misses == misses_first > 0 and misses_again == 0
    assert others[0] == losses[0] and others[1] != losses[1]


TREES = [random_tree(seed) for seed in range(8)]


def in_batches(trees: list[Tree]) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """(batch, log-probs of its scored tokens, reference sums); trees split over packs, completions in several pairs."""
    torch.manual_seed(0)
    for batch in pack_trees(trees, max(len(t.prompt) + max(map(len, t.branches)) for t in trees)):
        logp_R = -torch.rand(len(batch.completion_R)).requires_grad_()
        yield batch, logp_R, -torch.rand(len(batch.completions), dtype=torch.float64)


@pytest.mark.parametrize("name", KERNEL_LOSSES)
def test_the_pair_kernel_has_the_losses_and_gradients_of_the_losses_that_are_read(name):
    """Each token of a pair from where its pack put it, be its tree split over packs or its completion in many pairs."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run in the interpreter")
    smoothing = 0.1 * (name == "sigmoid")
    config = Config(exp="x", loss=LossConfig(name=name, label_smoothing=smoothing), kernels={"backend": "triton"})
    split = shared = 0
    for batch, logp_R, reference_S in in_batches(TREES):
        up_B = torch.rand(len(batch.winner_B), dtype=torch.float64)
        plain_B = pair_losses(pair_logps(batch_sums(logp_R, batch), reference_S, batch), config.loss)
        (plain_R,) = torch.autograd.grad((plain_B * up_B).sum(), logp_R)
        ours_B = kernel_losses(logp_R, reference_S, batch, config)
        (ours_R,) = torch.autograd.grad((ours_B * up_B).sum(), logp_R)
        eps = torch.finfo(torch.float32).eps
        assert torch.allclose(ours_B.double(), plain_B, rtol=2 * eps, atol=2 * eps)
        at_most = 8 * eps * float(plain_R.abs().max())  # a token's few pairs are added in fp32, and may cancel
        assert (ours_R - plain_R).abs().max() <= at_most
        split += len(batch.packs) > 1
        shared += len(torch.cat([batch.winner_B, batch.loser_B]).unique()) < 2 * len(batch.winner_B)
    assert split and shared, "no tree is split, or no completion in two pairs: nothing was tried"


def test_a_batch_without_pairs_still_has_a_backward():
    """Of a rank that has run out of rows: sharded weights need its gradient of zeros."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run in the interpreter")
    config = Config(exp="x", kernels={"backend": "triton"})
    idle = replace(bare_batch({}), packs=(empty_pack(64),))
    logp_R = torch.zeros(0, requires_grad=True)
    kernel_losses(logp_R, torch.zeros(0, dtype=torch.float64), idle, config).sum().backward()
    assert logp_R.grad.shape == (0,)


@pytest.mark.parametrize("more", [
    {"mix": ["sft:0.1"]}, {"rpo_alpha": 0.1}, {"ld_alpha": 0.5}, {"wpo": True}, {"swap_consistency": 0.1},
    {"divergence": "js"}, {"name": "dpo_norm"}, {"name": "rso"},
], ids=str)  # fmt: skip
def test_what_the_pair_kernel_lacks_is_left_to_torch(more):
    cpu, backend = torch.device("cpu"), {"backend": "triton"}

    def asks(trees: list[Tree], **loss: object) -> bool:
        return in_one_kernel(Config(exp="x", loss=LossConfig(**loss), kernels=backend), trees, cpu, torch.float32)

    assert torch.cuda.is_available() or (asks(TREES) and asks(TREES, reference_free=True, beta=0.5))
    assert not asks(TREES, **more)
    for values in ({"margin": 0.5}, {"soft_label": 0.9}):
        told = replace(TREES[1], pairs=(replace(TREES[1].pairs[0], **values), *TREES[1].pairs[1:]))
        assert not asks([TREES[0], told])


def test_asking_for_triton_where_there_is_none_is_a_users_mistake_that_says_what_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, said = train(tmp_path, "kernels.backend=triton")
    assert code == 2 and "kernels.backend=triton" in said and "TRITON_INTERPRET=1" in said
    assert not (tmp_path / "runs").exists()
