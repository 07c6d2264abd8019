"""Ranks killed or hung under torchrun: started again they end as ranks that nothing stopped, to the same bits.

The agent is torchrun's, the ranks are forked (tests/elastic_runs.py). test_resume.py kills a single process.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from saved import saved_tensors
from test_resume import litter, outcome

from dpo.checkpoint import last_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = [
    *("exp=smoke", "checkable.subsets=Focus", "checkable.train_rows=24", "checkable.test_rows=4"),
    *("checkable.validation_rows=4", "judge.blind_control=false", "train.max_steps=6", "train.epochs=3"),
    *("train.eval_every_steps=2", "train.checkpoint_every_steps=1", "pack.tokens=1024", "lora.rank=4", "train.lr=1e-2"),
]
Kill = tuple[int, int, str]
"""The restart and the rank that it comes to, and when: see tests/elastic_runs.py."""


class Run(NamedTuple):
    name: str
    kills: Sequence[Kill] = ()
    settings: tuple[str, ...] = ()
    ranks: int = 2
    restarts: int | None = None  # one for each kill


def elastic(place: Path, *runs: Run) -> tuple[list[str], str]:
    """How each run ended, and all of stderr."""
    given = []
    for name, kills, settings, ranks, restarts in runs:
        argv = [*SMALL, f"run.root={place / name}", f"run.cache={place / f'cache-{name}'}", *settings]
        restarts = len(kills) if restarts is None else restarts
        given.append({"ranks": ranks, "restarts": restarts, "argv": argv, "kills": kills})
    return run_elastic(given)


def run_elastic(runs: Sequence[Mapping[str, object]]) -> tuple[list[str], str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "tests/elastic_runs.py", json.dumps(runs)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=60 + 60 * sum(1 + len(run["kills"]) for run in runs))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise
    assert process.returncode == 0, errors[-4000:]
    return [line for line in output.splitlines() if line.startswith(("ended well", "failed"))], errors


def folder_of(place: Path, name: str, exp: str = "smoke") -> Path:
    return (place / name / exp / "latest").resolve()


def test_three_kills_and_a_hang_change_no_bit_and_who_hangs_is_named(tmp_path):
    """In a step, in a checkpoint's file, in the export; between them a rank that sleeps in a step."""
    kills = [(0, 1, "learning_rate:2"), (1, 0, "save:3"), (2, 1, "sleep learning_rate:2"), (3, 0, "save_file:1")]
    ends, told = elastic(tmp_path, Run("unkilled"), Run("killed", kills, ("run.hang_s=6",)))
    assert ends == ["ended well", "ended well"], told[-4000:]
    assert told.count("here comes SIGKILL to") == 3
    assert "error: no progress for run.hang_s=6 s: rank 1 stands at dpo/loop.py:" in told
    folder = folder_of(tmp_path, "killed")
    assert outcome(folder) == outcome(folder_of(tmp_path, "unkilled"))
    assert not litter(folder) and len(list(folder.parent.iterdir())) == 2


MOMENTS = {"learning_rate": 3, "save": 4, "all_gather_object": 20}  # at most so many calls after the start
OF_THE_FIRST = {"rename": 4, "replace": 6, "rmtree": 2, "write_part": 1, "save_file": 1}


def random_kill(draw: random.Random, restart: int) -> Kill:
    rank = draw.randrange(2)
    name, most = draw.choice(list((MOMENTS if rank else MOMENTS | OF_THE_FIRST).items()))
    return restart, rank, f"{draw.uniform(0, 3):.3f}" if draw.random() < 0.5 else f"{name}:{draw.randint(1, most)}"


@pytest.mark.long
def test_a_hundred_random_kills_change_no_bit(tmp_path):
    """At any moment, or just before a call: of a step, a checkpoint's files and folders, the export, the store."""
    assert elastic(tmp_path, Run("unkilled"))[0] == ["ended well"]
    truth, kills, run = outcome(folder_of(tmp_path, "unkilled")), 0, 0
    while kills < 100:
        draw, run = random.Random(run), run + 1
        ends, told = elastic(tmp_path, Run(f"run-{run}", [random_kill(draw, restart) for restart in range(8)]))
        assert ends == ["ended well"], (run, told[-4000:])
        assert outcome(folder_of(tmp_path, f"run-{run}")) == truth, run
        assert not litter(folder_of(tmp_path, f"run-{run}")), run
        kills += told.count("here comes SIGKILL to")


@pytest.mark.long
def test_a_stopped_rank_is_named_and_its_run_goes_on(tmp_path):
    ends, told = elastic(tmp_path, Run("run", [(0, 1, "stop save:2")], ("run.hang_s=6",), ranks=3))
    assert ends == ["ended well"]
    assert "rank 1 does not answer" in told and "2 of 3 ranks wait: waits at dpo/" in told


@pytest.mark.long
def test_begun_on_four_ranks_a_run_goes_on_with_two_with_one_and_with_four_again(tmp_path):
    """Each dies in its second step; in fp64, where the order of sums is all that another number of ranks changes."""
    argv = ("dtype=fp64", "run.resume=auto")
    stopped = [Run("run", [(0, 0, "learning_rate:2")], argv, ranks, restarts=0) for ranks in (4, 2, 1)]
    ends, told = elastic(tmp_path, Run("whole", (), argv), *stopped, Run("run", (), argv, ranks=4))
    assert ends[0] == ends[-1] == "ended well" and all(end.startswith("failed") for end in ends[1:-1]), told[-4000:]
    one, other = (saved_tensors(folder_of(tmp_path, name) / "checkpoints" / "best") for name in ("whole", "run"))
    assert all((one[name] - other[name]).abs().max() <= 1e-9 for name in one)


def test_a_nan_or_a_full_disk_of_one_rank_ends_both_with_the_last_checkpoint_whole(tmp_path):
    """And a damaged part of a checkpoint is named; what is whole goes on to the bits of a run without a fault."""
    faults = {"nan": "nan clip_gradients:3", "full": "full save:4"}  # save: steps 1, 2, the best at 2, step 3
    given = [Run(name, [(0, 1, harm)], restarts=0) for name, harm in faults.items()]
    ends, told = elastic(tmp_path, Run("unkilled"), *given)
    assert ends[0] == "ended well" and [end[:6] for end in ends[1:]] == ["failed"] * 2, told[-4000:]
    assert "error: step 2: the gradient's norm is nan; the weights are left as they were" in told
    assert "step-000003: cannot write" in told and "No space left" in told and "\nTraceback" not in told
    for name in faults:
        checkpoints = folder_of(tmp_path, name) / "checkpoints"
        assert last_checkpoint(checkpoints) == checkpoints / "step-000002" and not litter(checkpoints)

    part = folder_of(tmp_path, "full") / "checkpoints" / "step-000002" / "shard-00002-model-00001-of-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    (end,), told = elastic(tmp_path, Run("full", settings=("run.resume=latest",)))
    assert end.startswith("failed") and f"{part.name} is not what was written" in told, told[-4000:]
    part.write_bytes(whole)
    ends, told = elastic(tmp_path, *(Run(name, settings=("run.resume=latest",)) for name in faults))
    assert ends == ["ended well"] * 2, told[-4000:]
    assert all(outcome(folder_of(tmp_path, name)) == outcome(folder_of(tmp_path, "unkilled")) for name in faults)


def test_two_ranks_judge_each_row_once_with_the_verdicts_of_one_process(tmp_path):
    argv = ["dpo.judge", *SMALL[:6], f"run.cache={tmp_path / 'cache'}", "judge.split=test"]
    given = [{"ranks": n, "restarts": 0, "argv": [*argv, f"run.root={tmp_path / str(n)}"], "kills": []} for n in (1, 2)]
    ends, told = run_elastic(given)
    assert ends == ["ended well", "ended well"], told[-4000:]
    one, two = ((folder_of(tmp_path, str(n), "smoke-judge") / "verdicts.jsonl").read_text() for n in (1, 2))
    assert one == two and one.count("\n") == 4
