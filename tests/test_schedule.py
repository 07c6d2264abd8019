"""dpo/step.py: the rates and the steps of a run, against values worked out by hand."""

import math
from collections import Counter

import pytest
import torch
from test_exactness import random_tree

from dpo.config import Config, TrainConfig
from dpo.loop import due
from dpo.step import SCHEDULES, learning_rate, plan_steps

EPS = torch.finfo(torch.float64).eps

# --- the rates of a run ---------------------------------------------------------------------------------------------


def rates(steps: int, **settings) -> list[float]:
    config = TrainConfig(lr=1.0, **settings)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup_ratio": 0.0}, [1] * 8),
        ({"schedule": "constant", "warmup_ratio": 0.5}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_ratio": 0.0}, [n / 8 for n in range(8, 0, -1)]),
        ({"schedule": "linear", "warmup_ratio": 0.25}, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "linear", "warmup_ratio": 0.5, "min_lr_ratio": 0.2}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 0.8, 0.6, 0.4]),
        (
            {"schedule": "cosine", "warmup_ratio": 0.0},
            [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)],
        ),
        (
            {"schedule": "cosine", "warmup_ratio": 0.25, "min_lr_ratio": 0.5},  # cos 0, 30, 60, 90, 120, 150 degrees
            [1 / 2, 1, 1, *(0.75 + 0.25 * c for c in (math.sqrt(0.75), 0.5, 0.0, -0.5, -math.sqrt(0.75)))],
        ),
    ],
)
def test_the_rate_of_every_step_is_the_schedules_own(settings, expected):
    assert rates(8, **settings) == pytest.approx(expected, rel=8 * EPS, abs=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.9])
def test_no_step_is_wasted_at_rate_zero_and_the_rate_rises_then_falls(schedule, steps, warmup_ratio):
    all_rates = rates(steps, schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=0.0)
    top = all_rates.index(max(all_rates))
    assert all_rates[top] == 1.0 and min(all_rates) > 0
    assert all_rates[:top] == sorted(all_rates[:top]) and all_rates[top:] == sorted(all_rates[top:], reverse=True)


@pytest.mark.parametrize("num_cycles", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(("warmup_ratio", "min_lr_ratio"), [(0.0, 0.0), (0.1, 0.1)])
def test_the_cosine_is_that_of_transformers_and_so_of_the_services(num_cycles, warmup_ratio, min_lr_ratio):
    """But in the warm-up, where theirs begins with a step at rate 0."""
    optimization = pytest.importorskip("transformers").optimization
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = optimization.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(50 * warmup_ratio), 50, num_cycles=num_cycles, min_lr_rate=min_lr_ratio
    ).lr_lambdas[0]
    ours = rates(50, schedule="cosine", num_cycles=num_cycles, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
    warmup = round(50 * warmup_ratio)
    assert ours[warmup:] == pytest.approx([theirs(step) for step in range(warmup, 50)], rel=8 * EPS, abs=8 * EPS)
    assert ours[:warmup] == pytest.approx([theirs(step + 1) for step in range(warmup)], rel=8 * EPS)


@pytest.mark.parametrize(("steps", "count"), [(10, 1), (10, 3), (7, 7), (100, 8), (3, 5)])
def test_what_is_done_so_many_times_is_spaced_evenly_and_ends_with_the_run(steps, count):
    done = [step for step in range(1, steps + 1) if due(step, steps, 0, count)]
    assert len(done) == min(steps, count) and done[-1] == steps
    gaps = {after - before for before, after in zip([0, *done], done, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_what_is_done_every_so_many_steps_is_and_neither_is_never():
    assert [step for step in range(1, 11) if due(step, 10, 4, 0)] == [4, 8]
    assert not any(due(step, 10, 0, 0) for step in range(1, 11))


def test_the_peak_rate_multiplies_all_rates():
    small = TrainConfig(lr=3e-5, schedule="cosine")
    assert [learning_rate(s, 20, small) for s in range(20)] == pytest.approx(
        [3e-5 * r for r in rates(20, schedule="cosine")], rel=4 * EPS
    )


# --- the steps of a run ---------------------------------------------------------------------------------------------

TREES = [random_tree(seed) for seed in range(23)]  # of 1 to 7 pairs


def planned(seed: int = 0, **settings) -> list[list[int]]:
    return plan_steps(
        [len(tree.pairs) for tree in TREES], Config(exp="test", seed=seed, train={"batch_pairs": 8, **settings})
    )


def test_every_row_comes_once_an_epoch_and_steps_never_cross_epochs():
    steps = planned(epochs=3)
    assert Counter(index for step in steps for index in step) == dict.fromkeys(range(len(TREES)), 3)
    seen: set[int] = set()
    for step in steps:
        seen |= set(step)
        if len(seen) == len(TREES):
            seen = set()  # an epoch ends exactly at the end of a step
    assert not seen


def test_a_step_takes_whole_rows_until_it_has_batch_pairs_pairs():
    steps = planned()
    counts = [[len(TREES[index].pairs) for index in step] for step in steps]
    assert len({sum(count) for count in counts}) > 1  # rows of several pairs do make steps differ
    for count in counts[:-1]:
        assert sum(count) >= 8 > sum(count[:-1])
    assert counts[-1] and sum(counts[-1][:-1]) < 8


def test_the_order_is_the_seeds_and_differs_between_epochs_and_seeds():
    first = planned(seed=1, epochs=2)
    assert first == planned(seed=1, epochs=2) != planned(seed=2, epochs=2)
    flat = [index for step in first for index in step]
    assert flat[: len(TREES)] != flat[len(TREES) :] and flat[: len(TREES)] != sorted(flat[: len(TREES)])
    assert first[: len(planned(seed=1))] == planned(seed=1)


def test_max_steps_cuts_and_zero_does_not():
    assert planned(epochs=2, max_steps=5) == planned(epochs=2)[:5]
    assert planned(max_steps=0) == planned() == planned(max_steps=10**6)
    assert planned(epochs=10**9, max_steps=5) == planned(epochs=2)[:5]  # epochs that are not reached cost nothing
