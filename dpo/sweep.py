"""python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...]: every combination of [sweep], one table.

    [sweep] -> arms, each a run of dpo.train in a process of its own, in runs/NAME-sweep/ARM -> sweep.json, sweep.md

The same command goes on where it was stopped: finished arms are skipped, a half-done one is resumed. All arms share the
reference store: after the first, an arm whose rows are the same runs no reference forward.
Read next: dpo/settings.py, where arms come from; dpo/judge/statistics.py, where figures come from.
"""

import fcntl
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean, stdev
from threading import Event
from typing import IO, cast

import numpy as np
import torch

from dpo.inputs import pick_device, read_inputs
from dpo.judge.local import read_verdicts
from dpo.judge.statistics import (
    Floats,
    Verdict,
    averaged_scores,
    cluster_interval,
    compare,
    consistent_scores,
    holm,
    wilson_interval,
)
from dpo.loop import interruptible
from dpo.losses import check_loss
from dpo.page import Table, Text, markdown
from dpo.results import Results
from dpo.rows import columns_of
from dpo.runs import resumed_folder, write_json
from dpo.settings import Arm, load_sweep
from models.errors import UserError
from models.files import atomic_write_text, read_json_object

USAGE = """\
usage: python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...] [jobs=N]
  python -m dpo.sweep exp=losses
  python -m dpo.sweep exp=quickstart sweep.loss.beta=0.1,0.5 sweep.seed=0,1,2

jobs=N: so many arms at once, each on a GPU of its own, or on its share of the cores.
In a file: [sweep], then key = [values] a line. All other keys: python -m dpo.train --help"""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of 2, 3, ... 10 seeds; for more seeds the last, which is a little wide."""


# --- running the arms -------------------------------------------------------------------------------------------------


def check_arms(arms: Sequence[Arm]) -> None:
    """UserError where an arm would be refused when its turn comes: its folder's config, what it reads, its loss."""
    columns: dict[str, set[str]] = {}  # of the rows of all arms that read the same
    for arm in arms:
        try:
            if finished_folder(arm):
                continue
            read = what_is_read(arm)
            if read not in columns:
                splits = read_inputs(arm.config, pick_device(arm.config)).splits
                columns[read] = columns_of(chain(splits.train, splits.validation))
            check_loss(arm.config.loss, columns[read])
        except UserError as error:
            raise UserError(f"{error} ({arm.sources}: the arm {name_of(arm)})") from None


def what_is_read(arm: Arm, *but: str) -> str:
    """What of an arm's configuration picks its rows and its reference, `but` for some sections or keys."""
    return arm.config.model_dump_json(exclude={"loss", "lora", "train", "log", "run", *but})


def name_of(arm: Arm) -> str:
    """The arm's folder, ROOT/NAME-sweep/ARM, without what is before."""
    return Path(arm.config.run.root).name


def begun_folder(arm: Arm) -> Path | None:
    """The run folder of an arm that was begun; UserError where that was under another configuration."""
    latest = Path(arm.config.run.root) / arm.config.exp / "latest"
    if not (latest / "config.json").is_file():
        return None
    run = arm.config.run.model_copy(update={"resume": "latest"})
    try:
        return resumed_folder(arm.config.model_copy(update={"run": run}))
    except UserError as error:
        raise UserError(f"{error}. For a sweep from the start move that folder away, or set run.root") from None


def finished_folder(arm: Arm) -> Path | None:
    """The run folder of an arm whose report, the last thing that a run writes, is there."""
    folder = begun_folder(arm)
    return folder if folder and (folder / "report.html").is_file() else None


def run_arm(arm: Arm, lock: int, place: Mapping[str, str], log: IO[bytes] | None) -> int:
    """Run or resume an arm; the exit code of its process, which holds the sweep's lock as long as it lives."""
    command = [sys.executable, "-m", "dpo.train", *arm.argv, *(["run.resume=latest"] if begun_folder(arm) else [])]
    environment = os.environ | place
    return subprocess.run(command, pass_fds=[lock], env=environment, stdout=log, stderr=log).returncode


def places_of(jobs: int, device: str) -> list[dict[str, str]]:
    """What each of the arms that run at once finds in its environment: a GPU of its own, or its share of the cores."""
    if jobs == 1:
        return [{}]
    if device == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        if jobs > len(devices):
            raise UserError(f"jobs={jobs}: an arm takes a GPU, and {len(devices)} can be seen; give at most as many")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in devices[:jobs]]
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))}] * jobs


@contextmanager
def locked(home: Path) -> Iterator[int]:
    """The sweep's folder, made and this process's alone; arms of a killed sweep that still run count as using it."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{home}: a sweep, or an arm of one, runs there; wait for its end or stop it") from None
        yield file.fileno()


def sweep(arms: Sequence[Arm], jobs: int = 1) -> int:
    """Run what is not finished, `jobs` arms at once, then write the table; 1 where an arm failed, else 0."""
    home = Path(arms[0].config.run.root).parent
    check_arms(arms)
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places_of(jobs, pick_device(arms[0].config)):
        free.put(place)
    stopped = Event()
    leaders: dict[str, tuple[Arm, Event]] = {}  # the first of those that read the same, and whether it is over
    for arm in arms:
        if not finished_folder(arm):
            leaders.setdefault(what_is_read(arm, "seed"), (arm, Event()))  # rows of a file are the same for all seeds

    def turn(number: int, arm: Arm) -> int:
        told = f"arm {number} of {len(arms)}, {name_of(arm)}"
        if finished_folder(arm):
            print(f"{told}: finished", flush=True)
            return 0
        leader, over = leaders[what_is_read(arm, "seed")]
        trains = Path(leader.config.run.root) / leader.config.exp / "latest" / "metrics.jsonl"
        while arm is not leader and not trains.exists() and not over.wait(0.1):
            pass  # it stores the log-probs that all of them need
        place, folder = free.get(), Path(arm.config.run.root)
        try:
            if stopped.is_set() or interrupted():
                return 130
            print(f"{told}: {'goes on' if begun_folder(arm) else 'begins'}", flush=True)
            folder.mkdir(exist_ok=True)
            with open(folder / "log.txt", "ab") if jobs > 1 else nullcontext() as log:
                code = run_arm(arm, lock, place, log)
        finally:
            free.put(place)
            over.set()
        if code == 130:
            stopped.set()
        elif code:
            print(f"arm {name_of(arm)}: failed with exit code {code}; going on", file=sys.stderr)
        return code

    with locked(home) as lock, interruptible() as interrupted, ThreadPoolExecutor(jobs) as pool:
        others = {folder.name for folder in home.iterdir() if folder.is_dir()} - {name_of(arm) for arm in arms}
        if others:
            print(f"not in this sweep, nor in its table: {', '.join(sorted(others))}")
        codes = list(pool.map(turn, range(1, len(arms) + 1), arms))
        if 130 in codes or interrupted():
            raise KeyboardInterrupt("the same command goes on from here")
    failed = {name_of(arm): code for arm, code in zip(arms, codes, strict=True) if code}
    write_table(home, arms, failed)
    return 1 if failed else 0


# --- the table --------------------------------------------------------------------------------------------------------

Figure = tuple[float, list[float]]
"""A mean and its 95 % interval."""

Judged = dict[str, list[Verdict]]
"""One run's verdicts, by judge."""


@dataclass(frozen=True)
class Line:
    """All runs of one setting, which differ in their seeds alone; differences are of order-averaged accuracies."""

    setting: str
    seeds: list[int]
    averaged: Figure
    averaged_range: list[float]  # the lowest and the highest of its seeds
    consistent: Figure
    over_base: Figure
    over_first: Figure | None  # the first line; None where it is that, or was judged on other rows
    p_over_first: float | None  # the larger of the exact and the clustered test
    reference_computed: int  # completions that the reference was run on


def over_seeds(scores: Sequence[Floats], verdicts: Sequence[Sequence[Verdict]], *, share: bool) -> Figure:
    """The mean of the seeds' scores, a score a verdict, with the widest of its 95 % intervals.

    These are: cluster_interval's over groups of rows, a group's pairs of all seeds together (rows vary); Student's over
    the means of the seeds, if there are two (training varies); Wilson's for a `share`.
    """
    pooled, means = np.concatenate(scores), [float(score.mean()) for score in scores]
    groups = [verdict.group for judge in verdicts for verdict in judge]
    bounds = (0.0, 1.0) if share else (-1.0, 1.0)
    intervals = [cluster_interval(pooled, groups, 0, bounds=bounds)]
    if len(means) > 1:
        half = T_975[min(len(means) - 2, len(T_975) - 1)] * stdev(means) / math.sqrt(len(means))
        intervals.append((max(bounds[0], fmean(means) - half), min(bounds[1], fmean(means) + half)))
    if share:
        intervals.append(wilson_interval(float(pooled.sum()), len(pooled)))
    low, high = max(intervals, key=lambda ends: ends[1] - ends[0])
    return float(pooled.mean()), [low, high]


def compare_settings(
    judged: Mapping[str, Mapping[int, Judged]], computed: Mapping[str, int], moving: bool
) -> list[Line]:
    """The table's lines from verdicts by setting and seed; `moving`: what is swept may change the judged rows."""
    lines = []
    first = next(iter(judged.values()))
    for setting, by_seed in judged.items():
        trained, base = ([judge[name] for judge in by_seed.values()] for name in ("trained", "base"))
        gains = [averaged_scores(a) - averaged_scores(b) for a, b in zip(trained, base, strict=True)]
        over_first, p = None, None
        same = [seed for seed in by_seed if seed in first and _same_rows(by_seed[seed], first[seed], moving)]
        if same and by_seed is not first:
            mine, others = ([run[seed]["trained"] for seed in same] for run in (by_seed, first))
            leads = [averaged_scores(a) - averaged_scores(b) for a, b in zip(mine, others, strict=True)]
            over_first = over_seeds(leads, mine, share=False)
            test = compare(sum(mine, []), sum(others, []), 0)["averaged"]
            p = max(test["p"], test["p_clustered"])
        means = [float(averaged_scores(judge).mean()) for judge in trained]
        lines.append(
            Line(
                setting,
                list(by_seed),
                over_seeds([*map(averaged_scores, trained)], trained, share=True),
                [min(means), max(means)],
                over_seeds([*map(consistent_scores, trained)], trained, share=True),
                over_seeds(gains, trained, share=False),
                over_first,
                p,
                computed[setting],
            )
        )
    return lines


def _same_rows(run: Judged, other: Judged, moving: bool) -> bool:
    """If both judged the same pairs: by their ids, and if rows may have moved by the untrained judge's log-odds."""
    names = [[(v.id, v.pair, v.group) for v in judged["base"]] for judged in (run, other)]
    odds = [[(v.first, v.second) for v in judged["base"]] for judged in (run, other)]
    return names[0] == names[1] and (not moving or odds[0] == odds[1])


def write_table(home: Path, arms: Sequence[Arm], failed: Mapping[str, int]) -> None:
    """Write sweep.json and sweep.md of the arms that are finished, and print the table."""
    judged: dict[str, dict[int, Judged]] = {}
    computed: Counter[str] = Counter()
    for arm in arms:
        if folder := finished_folder(arm):
            setting = ", ".join(f"{key}={value}" for key, value in arm.varied.items() if key != "seed") or "all"
            judged.setdefault(setting, {})[arm.config.seed] = read_verdicts(folder / "verdicts.jsonl")
            results = cast(Results, read_json_object(folder / "results.json"))
            computed[setting] += results["reference"]["misses"]
    moving = any(key.startswith(("data.", "checkable.")) for key in arms[0].varied)
    lines = compare_settings(judged, computed, moving) if judged else []
    tests = [line.p_over_first for line in lines if line.p_over_first is not None]
    corrected = iter(holm(tests))
    header = "setting, seeds, averaged, its seeds, consistent, over base, over first, p (corrected), reference"
    rows: list[tuple[str, ...]] = [tuple(header.split(", "))]
    for line in lines:
        p = "" if line.p_over_first is None else f"{next(corrected):.2g}"
        seeds = " to ".join(f"{100 * share:.1f}" for share in line.averaged_range)
        figures = [_percent(line.averaged), seeds, _percent(line.consistent), _percent(line.over_base, "+")]
        figures += [_percent(line.over_first, "+") if line.over_first else "", p, f"{line.reference_computed:,}"]
        rows.append((line.setting, ", ".join(map(str, line.seeds)), *figures))
    text = (
        "Accuracies in %, differences of order-averaged accuracies in points; in brackets 95 % intervals: the widest "
        "of one over groups of rows, Student's over seeds, and Wilson's. Its seeds: the lowest and the highest. Over "
        "first: over the first line on the same pairs; p: the larger of McNemar's exact and the sign-flip test over "
        "groups, Holm-corrected, for the seeds. Reference: completions that the reference had to be run on."
    )
    failures = [Text("paragraph", f"{name} failed with exit code {code}.") for name, code in failed.items()]
    page = markdown([Table("Settings", rows), Text("paragraph", text), *failures])
    write_json(home / "sweep.json", {"lines": [asdict(line) for line in lines], "failed": dict(failed)})
    atomic_write_text(home / "sweep.md", page)
    print(f"{page}table: {home / 'sweep.md'}")


def _percent(figure: Figure, sign: str = "") -> str:
    mean, *ends = (f"{round(100 * share, 1) + 0.0:{sign}.1f}" for share in (figure[0], *figure[1]))
    return f"{mean} [{', '.join(ends)}]"


def main(argv: list[str]) -> int:
    """The command line: 0 when all arms are finished, 1 where one failed, 2 for a user's mistake, 130 for Ctrl-C."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    try:
        jobs = [argument.removeprefix("jobs=") for argument in argv if argument.startswith("jobs=")] or ["1"]
        if not jobs[-1].isdecimal() or jobs[-1] == "0":
            raise UserError(f"jobs={jobs[-1]}: must be a number of arms, 1 or more")
        return sweep(load_sweep([argument for argument in argv if not argument.startswith("jobs=")]), int(jobs[-1]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
