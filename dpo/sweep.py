"""python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...]: every combination of [sweep], one table.

    [sweep] -> arms, each a run of dpo.train in a process of its own, in runs/NAME-sweep/ARM -> their verdicts, kept in
    one folder -> dpo/sweep_report.py

The same command goes on where it was stopped: finished arms are skipped, a half-done one is resumed. With results= it
goes on where run folders are gone, too, in another clone: what is kept there is finished. All arms share the reference
store: after the first, an arm whose rows are the same runs no reference forward.
Read next: dpo/settings.py, where arms come from; dpo/sweep_report.py, where figures come from.
"""

import fcntl
import gzip
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import IO, cast

import torch

from dpo.arms import (
    begun_folder,
    check_arms,
    finished_folder,
    kept_in,
    read_by,
    settings_of,
    source_of,
    verdicts_file,
    what_is_read,
)
from dpo.config import config_dict
from dpo.inputs import pick_device, read_inputs
from dpo.loop import interruptible
from dpo.results import Results
from dpo.runs import flat
from dpo.settings import Arm, Contrast, load_contrast, load_primary, load_question, load_sweep
from dpo.step import plan_steps
from dpo.sweep_figures import READOUTS, Kept, KeptArm
from dpo.sweep_report import write_sweep_report
from dpo.tokens import Trees
from models.errors import UserError, exit_code
from models.files import atomic_write_bytes, read_json_object, write_json

USAGE = """\
usage: python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...] [jobs=N] [--dry-run]
                           [results=FOLDER] [source=any]
  python -m dpo.sweep exp=losses
  python -m dpo.sweep exp=quickstart sweep.loss.beta=0.1,0.5 sweep.seed=0,1,2

jobs=N: so many arms at once, each on a GPU of its own, or on its share of the cores.
--dry-run: say the arms, their steps, and from finished ones, else from a run like them, the hours, and run nothing.
results=FOLDER: verdicts and report go to FOLDER/NAME, not to results/ beside the arms; an arm that is kept there under
the same configuration counts as finished without its run folder (remove its verdicts to run it again).
source=any: arms that another version of the product ran count as finished, and go on.
In a file: [sweep], then key = [values] a line; [[sweep.arm]], name and keys, for sets of keys that belong together;
[sweep.contrast] with a, b and readout names one comparison before; primary = "consistent" in [sweep], which readout it
is about. All other keys: python -m dpo.train --help"""


# --- running the arms -------------------------------------------------------------------------------------------------


def dry_run(arms: Sequence[Arm], kept: Mapping[str, KeptArm], jobs: int) -> str:
    """A line an arm: its steps and tokens; then the hours of those to run, by the time that finished ones took."""
    trees: dict[str, tuple[Trees, list[int]]] = {}
    lines, time_s, done, to_do, left = [], 0.0, 0, 0, 0  # seconds and tokens of finished arms; tokens and arms to do
    for arm in arms:
        if (read := what_is_read(arm)) not in trees:
            train = read_inputs(arm.config, pick_device(arm.config)).train_trees
            trees[read] = train, [tree.tokens for tree in train]
        of, sizes = trees[read]
        steps = plan_steps(of.column("pairs"), arm.config, of.column("row"))
        tokens = sum(sizes[place] for step in steps for place in step)
        if folder := finished_folder(arm):
            state, took_s = "finished", whole_s(cast(Results, read_json_object(folder / "results.json")))
        elif arm.name in kept:
            state, took_s = "kept", kept[arm.name]["whole_s"]
        else:
            state, took_s = "begun" if begun_folder(arm) else "to run", 0.0
        if state in ("finished", "kept"):
            time_s, done = time_s + took_s, done + tokens
        else:
            to_do, left = to_do + tokens, left + 1
        lines.append(f"{state:8} {len(steps):6,} steps {tokens:11,} tokens  {arm.name}")
    told = ""
    if not done and (like := _like(arms[0])):
        results = cast(Results, read_json_object(like / "results.json"))
        time_s, done = whole_s(results), int(results["train"]["tokens"])
        told = f", as {like} took time for its tokens"
    known = f"about {time_s / done * to_do / jobs / 3600:.1f} h{told}" if done else "hours: not before one is"
    return "\n".join([*lines, f"{len(arms)} arms, {left} to finish, {known}"])


def _like(arm: Arm) -> Path | None:
    """The last finished run, of any experiment, that trained as much of the same model by the same objective.

    What has no training, a run of dpo.judge, tells nothing of it.
    """
    keys = ("objective", "dtype", "model.path", "lora.rank")
    own = flat(config_dict(arm.config))
    runs = Path(arm.config.run.root).parents[1].glob("**/[0-9]*/results.json")
    for results in sorted(runs, key=lambda path: path.parent.name, reverse=True):
        of, told = (flat(read_json_object(path)) for path in (results.with_name("config.json"), results))
        if all(of.get(key) == own[key] for key in keys) and told.get("train.tokens"):
            return results.parent
    return None


def run_arm(arm: Arm, lock: int, place: Mapping[str, str], log: IO[bytes] | None) -> int:
    """Run or resume an arm; the exit code of its process, which holds the sweep's lock as long as it lives."""
    command = [sys.executable, "-m", "dpo.train", *arm.argv, *(["run.resume=latest"] if begun_folder(arm) else [])]
    return subprocess.run(command, pass_fds=[lock], env=os.environ | place, stdout=log, stderr=log).returncode


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


def sweep(
    arms: Sequence[Arm],
    kept: Mapping[str, KeptArm],
    jobs: int,
    *,
    any_source: bool,
    after: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Run what is neither finished nor `kept`, `jobs` arms at once; the exit codes of those that failed.

    `after` is called when an arm has finished, by one thread at a time.
    """
    home = Path(arms[0].config.run.root).parent
    asks = check_arms(arms, kept, any_source=any_source)
    todo = len(asks)
    ended: list[float] = []  # times of the arms that ended here, s
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places_of(jobs, pick_device(arms[0].config)):
        free.put(place)
    stopped, alone = Event(), Lock()
    leaders: dict[str, tuple[Arm, Event]] = {}  # the first of those that ask the same, and whether it is over
    for arm in arms:
        if arm.name in asks:
            leaders.setdefault(asks[arm.name], (arm, Event()))

    def say(line: str) -> None:
        print(f"{line}\n", end="", flush=True)  # at once: print writes its end apart, and others may come between

    def turn(number: int, arm: Arm) -> int:
        told = f"arm {number} of {len(arms)}, {arm.name}"
        if arm.name not in asks:
            say(f"{told}: finished{', its verdicts are kept' if arm.name in kept else ''}")
            return 0
        leader, over = leaders[asks[arm.name]]
        trains = Path(leader.config.run.root) / leader.config.exp / "latest" / "metrics.jsonl"
        while arm is not leader and not trains.exists() and not over.wait(0.1):
            pass  # it stores the log-probs that all of them need
        place, folder = free.get(), Path(arm.config.run.root)
        try:
            if stopped.is_set() or interrupted():
                return 130
            say(f"{told}: {'goes on' if begun_folder(arm) else 'begins'}")
            folder.mkdir(exist_ok=True)
            begin = time.perf_counter()
            with open(folder / "log.txt", "ab") if jobs > 1 else nullcontext() as log:
                code = run_arm(arm, lock, place, log)
        finally:
            free.put(place)
            over.set()
        ended.append(took := time.perf_counter() - begin)
        if code == 130:
            stopped.set()
        elif code:
            print(f"arm {arm.name}: failed with exit code {code}; going on{_why(folder)}", file=sys.stderr)
        if done := finished_folder(arm):
            of = cast(Results, read_json_object(done / "results.json"))["judge"]["trained"]
            hours = sum(ended) / len(ended) * (todo - len(ended)) / jobs / 3600
            shares = f"averaged {100 * of['averaged_accuracy']:5.1f} % | consistent {100 * of['accuracy']:5.1f} %"
            say(f"| {told} | {shares} | {took / 60:6.1f} min | {hours:5.1f} h left |")
            with alone:
                after()
        return code

    with locked(home) as lock, interruptible() as interrupted, ThreadPoolExecutor(jobs) as pool:
        others = {folder.name for folder in home.iterdir() if folder.is_dir()} - {arm.name for arm in arms}
        others.discard("results")
        if others:
            print(f"not in this sweep, nor in its table: {', '.join(sorted(others))}")
        codes = list(pool.map(turn, range(1, len(arms) + 1), arms))
        if 130 in codes or interrupted():
            raise KeyboardInterrupt("the same command goes on from here")
    return {arm.name: code for arm, code in zip(arms, codes, strict=True) if code}


def _why(folder: Path) -> str:
    """The end of a failed arm's log, where it has one."""
    log = folder / "log.txt"
    told = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return f" ({log}: {told[-1]})" if told else ""


# --- what is kept of them -------------------------------------------------------------------------------------------


def keep(
    folder: Path, arms: Sequence[Arm], before: Mapping[str, KeptArm], about: Kept, failed: Mapping[str, int]
) -> None:
    """Put the finished arms' verdicts, compressed, and what else dpo/sweep_report.py reads into `folder`.

    Arms that were kept there `before` stay as they are; `about` is arms.json without any.
    """
    kept: list[KeptArm] = []
    for arm in arms:
        if arm.name in before:
            kept.append(before[arm.name])
        elif run := finished_folder(arm):
            kept.append(_record_of(arm, run))
            verdicts = gzip.compress((run / "verdicts.jsonl").read_bytes(), mtime=0)
            atomic_write_bytes(folder / verdicts_file(arm), verdicts)
    write_json(folder / "arms.json", about | {"arms": kept, "failed": dict(failed)})


def _record_of(arm: Arm, run: Path) -> KeptArm:
    results, ran = cast(Results, read_json_object(run / "results.json")), read_json_object(run / "env.json")
    train, data, made = results["train"], results["data"], arm.config.data.path == "checkable"
    record = KeptArm(
        setting=arm.setting,
        axes=arm.varied,
        seed=arm.config.seed,
        sighted=arm.config.judge.sighted,
        verdicts=verdicts_file(arm),
        rows=data.get("test_sha256", "")[:12] if made else file_of(arm.config.data.path),
        source=source_of(run),
        config=settings_of(arm.config),
        read=read_by(run),
        ran={key: ran.get(key) for key in ("start_utc", "git", "cpu", "threads", "gpu", "packages")},
        steps=float(train["steps"]),
        tokens=float(train["tokens"]),
        train_s=float(train["time_s"]),
        whole_s=whole_s(results),
        reference_computed=results["reference"]["misses"],
    )
    if attacks := results.get("attacks", []):
        record["attacks"] = attacks
    return record


def whole_s(results: Results) -> float:
    """Seconds of all stages; of a resumed run those of its last process, but for training, which counts all of them."""
    stages = results["time_s"]
    return sum(stages.values()) - stages["train"] + max(stages["train"], float(results["train"]["time_s"]))


def file_of(path: str) -> str:
    """A file's name, told apart from one of the same name elsewhere, without where on this machine it lies."""
    return f"{Path(path).name} {hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _refuse_twins(arms: Sequence[Arm]) -> None:
    """UserError where two arms, which would be compared, have one configuration."""
    first: dict[str, str] = {}
    for arm in arms:
        told = arm.config.model_dump_json(exclude={"run", "log"})
        if (twin := first.setdefault(told, arm.name)) != arm.name:
            raise UserError(f"the arms {twin} and {arm.name} are one and the same ({arm.sources}); leave one out")


def named_contrast(arms: Sequence[Arm], argv: list[str]) -> Contrast | None:
    """The comparison that the sweep names before; UserError where a side of it will not have its readout."""
    settings = ["base", *dict.fromkeys(arm.setting for arm in arms)]
    contrast = load_contrast(argv, settings, list(READOUTS))
    if contrast is None:
        return None
    if contrast.a == contrast.b:
        raise UserError(f"sweep.contrast: a and b are both {contrast.a}; name two settings")
    for side in (contrast.a, contrast.b):
        _check_read(arms, side, contrast.readout, "sweep.contrast: readout")
    return contrast


def named_primary(arms: Sequence[Arm], argv: list[str]) -> str:
    """The readout that the sweep is about; UserError where not every arm will have it."""
    primary = load_primary(argv, list(READOUTS))
    if not load_contrast(argv, ["base", *(arm.setting for arm in arms)], list(READOUTS)):
        for setting in dict.fromkeys(arm.setting for arm in arms):
            _check_read(arms, setting, primary, "sweep.primary")
    return primary


def _check_read(arms: Sequence[Arm], side: str, readout: str, key: str) -> None:
    both = len({arm.config.judge.sighted for arm in arms}) > 1
    of = [arm for arm in arms if side in ("base", arm.setting)]
    if not all(_has(arm, readout, both=both, base=side == "base") for arm in of):
        raise UserError(f'{key} = "{readout}": {side} has none: {WHENCE[readout]}')


WHENCE = {
    "rewards": "a base never has, an arm needs judge.rewards",
    "likelihood": "an arm, and its base, needs judge.rewards",
    "judged sighted": "a base never has, an arm that judges blind needs judge.sighted_control",
    "judged blind": "a base never has, an arm that judges sighted needs judge.blind_control",
}
"""Which arms have a readout that not all of them have."""


def _has(arm: Arm, readout: str, *, both: bool, base: bool) -> bool:
    """Whether an arm, or its base, is read that way; `both`: arms of the sweep judge sighted, others blind."""
    judge = arm.config.judge
    if readout == "likelihood":
        return judge.rewards != "off"
    if base and readout in WHENCE:
        return False
    if readout == "judged sighted":
        return (both and judge.sighted) or (not judge.sighted and judge.sighted_control)
    if readout == "judged blind":
        return (both and not judge.sighted) or (judge.sighted and judge.blind_control)
    return readout != "rewards" or judge.rewards != "off"


def _told(argv: Sequence[str]) -> list[str]:
    """The arguments without where on this machine a file lies."""
    given = [arg.partition("=") for arg in argv if not arg.startswith(("run.", "reference.store="))]
    return [key + equals + (Path(value).name if value.startswith("/") else value) for key, equals, value in given]


def main(argv: list[str]) -> int:
    """The command line: 0 when all arms are finished, 1 where one failed, else exit_code's."""

    def command() -> int:
        mine, given = _own_arguments(argv)
        arms = load_sweep(given)
        _refuse_twins(arms)
        any_source, jobs = mine["source"] == "any", int(mine["jobs"])
        contrast = named_contrast(arms, given)
        about = Kept(
            name=arms[0].config.exp,
            question=load_question(given),
            command=shlex.join(["python", "-m", "dpo.sweep", *_told(given), f"jobs={jobs}"]),
            contrast=contrast and contrast._asdict(),
            primary=named_primary(arms, given),
            planned=len(arms),
            arms=[],
            failed={},
        )
        folder, kept = Path(arms[0].config.run.root).parent / "results", dict[str, KeptArm]()
        if mine["results"]:
            folder = Path(mine["results"]) / arms[0].config.exp
            kept = kept_in(folder, arms)
        if mine["--dry-run"]:
            check_arms(arms, kept, any_source=any_source)
            print(dry_run(arms, kept, jobs))
            return 0
        # Verdicts are kept arm by arm: who stops a sweep of many hours has those of all that finished.
        finish = partial(keep, folder, arms, kept, about)
        failed = sweep(arms, kept, jobs, any_source=any_source, after=lambda: finish(failed={}))
        finish(failed=failed)
        print(f"{write_sweep_report(folder)}\nreport: {folder / 'report.html'}")
        return 1 if failed else 0

    return exit_code(command, argv, USAGE, "finished arms are whole; the same command goes on from here")


def _own_arguments(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The sweep's own arguments, and those of its arms."""
    mine = {"jobs": "1", "source": "same", "results": "", "--dry-run": ""}
    given, seen = [], set[str]()
    for argument in argv:
        key, _, value = argument.partition("=")
        if key in mine and (value == "") is not (key == "--dry-run"):
            raise UserError(f"{argument}: --dry-run has no value, jobs=, source= and results= need one")
        if key in mine and key in seen:
            raise UserError(f"{argument}: {key} is given twice; leave one out")
        if key in mine:
            mine[key] = value or "yes"
            seen.add(key)
        else:
            given.append(argument)
    if not mine["jobs"].isdecimal() or int(mine["jobs"]) == 0:
        raise UserError(f"jobs={mine['jobs']}: must be a number of arms, 1 or more")
    if mine["source"] not in ("same", "any"):
        raise UserError(
            f"source={mine['source']}: must be same, or any for arms that another version of the product ran"
        )
    return mine, given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
