"""python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...]: every combination of [sweep], one table.

    [sweep] -> arms, each a run of dpo.train in a process of its own, in runs/NAME-sweep/ARM -> their verdicts, kept in
    one folder -> dpo/sweep_report.py

The same command goes on where it was stopped: finished arms are skipped, a half-done one is resumed. All arms share the
reference store: after the first, an arm whose rows are the same runs no reference forward.
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
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import IO, NamedTuple, cast

import torch

from dpo.config import Config, config_dict
from dpo.inputs import Inputs, pick_device, read_inputs
from dpo.log import source_digest
from dpo.loop import interruptible
from dpo.losses import check_loss
from dpo.results import Results
from dpo.rows import columns_of
from dpo.runs import flat, resumed_folder, write_json
from dpo.settings import Arm, Contrast, load_contrast, load_primary, load_question, load_sweep
from dpo.step import plan_steps
from dpo.sweep_report import READOUTS, Kept, KeptArm, write_sweep_report
from dpo.tokens import Trees
from models.checkpoint import weights_fingerprint
from models.errors import UserError, exit_code
from models.files import atomic_write_bytes, read_json_object

USAGE = """\
usage: python -m dpo.sweep exp=NAME [key=value ...] [sweep.key=value,value ...] [jobs=N] [--dry-run]
                           [results=FOLDER] [source=any]
  python -m dpo.sweep exp=losses
  python -m dpo.sweep exp=quickstart sweep.loss.beta=0.1,0.5 sweep.seed=0,1,2

jobs=N: so many arms at once, each on a GPU of its own, or on its share of the cores.
--dry-run: say the arms, their steps, and from finished ones, else from a run like them, the hours, and run nothing.
results=FOLDER: verdicts and report go to FOLDER/NAME, not to results/ beside the arms.
source=any: arms that another version of the product ran count as finished, and go on.
In a file: [sweep], then key = [values] a line; [[sweep.arm]], name and keys, for sets of keys that belong together;
[sweep.contrast] with a, b and readout names one comparison before; primary = "consistent" in [sweep], which readout it
is about. All other keys: python -m dpo.train --help"""


FREE = {"loss", "lora", "train", "log", "run"}  # sections that neither rows nor log-probs before training depend on


# --- running the arms -------------------------------------------------------------------------------------------------


def check_arms(arms: Sequence[Arm], *, any_source: bool) -> dict[str, str]:
    """By name, what each arm that is not finished asks of the reference: equal where all log-probs are shared.

    UserError where an arm would be refused when its turn comes: its folder's config, what it reads, its loss; where a
    finished one read other rows or weights; and, but for `any_source`, where another version of the product began it.
    """
    check_sources(arms, any_source=any_source)
    known: dict[str, tuple[set[str], Read]] = {}  # columns of the rows and digests of all that is read
    asks = {}
    for arm in arms:
        try:
            if (read := what_is_read(arm)) not in known:
                inputs = read_inputs(arm.config, pick_device(arm.config))
                columns = columns_of(chain(inputs.splits.train, inputs.splits.validation))
                known[read] = columns, digests_of(inputs, arm.config)
            columns, of = known[read]
            if run := finished_folder(arm):
                if old := of.not_of(run):
                    raise UserError(f"{run} was finished with other {old} than are read now; move it away to run again")
                continue
            check_loss(arm.config.loss, columns)
            asks[name_of(arm)] = f"{arm.config.model_dump_json(exclude={*FREE, 'seed'})} {of}"
        except UserError as error:
            raise UserError(f"{error} ({arm.sources}: the arm {name_of(arm)})") from None
    return asks


def check_sources(arms: Sequence[Arm], *, any_source: bool) -> None:
    """UserError where another version of the product began an arm, unless any will do."""
    now = source_digest()
    old = {name_of(arm): of for arm in arms if (run := begun_folder(arm)) and (of := source_of(run)) != now}
    if old and not any_source:
        raise UserError(
            f"{', '.join(old)}: begun by other sources ({', '.join(sorted({*old.values()}))}; now {now}), "
            f"so their figures may not be this one's; move their folders in {Path(arms[0].config.run.root).parent} "
            "away to run them again, or (python -m dpo.sweep) take them as they are with source=any"
        )


class Read(NamedTuple):
    """Digests of what an arm reads."""

    trees: str  # as dpo/loop.py's TrainState has them
    test_rows: str
    reference: str

    def not_of(self, run: Path) -> str:
        """What a finished run read otherwise, if anything."""
        results = read_json_object(run / "results.json")
        if cast(Results, results)["data"].get("test_sha256", self.test_rows) != self.test_rows:
            return "test rows"
        ends = run / "checkpoints" / "finished.json"
        saved = read_json_object(ends) if ends.is_file() else {}  # critiques have theirs by the round
        if saved.get("data", self.trees) != self.trees:
            return "training or validation rows"
        return "weights" if saved.get("reference", self.reference) != self.reference else ""


def digests_of(inputs: Inputs, config: Config) -> Read:
    """Those of all that these inputs are of."""
    adapter = Path(config.model.adapter) if config.model.adapter and not config.reference.path else None
    trees = f"{inputs.train_trees.digest} {inputs.validation_trees.digest}"
    memo = inputs.cache / "fingerprints.json"
    weights = weights_fingerprint(inputs.reference_folder, memo, adapter)
    return Read(trees, str(inputs.splits.report["test_sha256"]), weights)


def what_is_read(arm: Arm) -> str:
    """All of an arm's configuration that its inputs depend on."""
    return arm.config.model_dump_json(exclude=FREE)


def name_of(arm: Arm) -> str:
    """The arm's folder, ROOT/NAME-sweep/ARM, without what is before."""
    return Path(arm.config.run.root).name


def begun_folder(arm: Arm) -> Path | None:
    """The run folder of an arm that was begun; UserError where that was under another configuration."""
    latest = Path(arm.config.run.root) / arm.config.exp / "latest"
    if not (latest / "config.json").is_file():
        return None
    try:
        return resumed_folder(arm.config, "latest")
    except UserError as error:
        raise UserError(f"{error}. For a sweep from the start move that folder away, or set run.root") from None


def finished_folder(arm: Arm) -> Path | None:
    """The run folder of an arm whose report, the last thing that a run writes, is there."""
    folder = begun_folder(arm)
    return folder if folder and (folder / "report.html").is_file() else None


def source_of(run: Path) -> str:
    """dpo.log.source_digest of the product that began this run; "" where that said none."""
    return str(read_json_object(run / "env.json").get("source", ""))


def dry_run(arms: Sequence[Arm], jobs: int) -> str:
    """A line an arm: its steps and tokens; then the hours of those to run, by the time that finished ones took."""
    trees: dict[str, tuple[Trees, list[int]]] = {}
    lines, time_s, done, to_do = [], 0.0, 0, 0  # seconds of the finished arms, tokens of those and of the others
    for arm in arms:
        if (read := what_is_read(arm)) not in trees:
            train = read_inputs(arm.config, pick_device(arm.config)).train_trees
            trees[read] = train, [tree.tokens for tree in train]
        of, sizes = trees[read]
        steps = plan_steps(of.column("pairs"), arm.config, of.column("row"))
        tokens = sum(sizes[place] for step in steps for place in step)
        folder = finished_folder(arm)
        if folder:
            time_s += sum(cast(Results, read_json_object(folder / "results.json"))["time_s"].values())
            done += tokens
        else:
            to_do += tokens
        state = "finished" if folder else "begun" if begun_folder(arm) else "to run"
        lines.append(f"{state:8} {len(steps):6,} steps {tokens:11,} tokens  {name_of(arm)}")
    told = ""
    if not done and (like := _like(arms[0])):
        results = cast(Results, read_json_object(like / "results.json"))
        time_s, done = sum(results["time_s"].values()), int(results["train"]["tokens"])
        told = f", as {like} took time for its tokens"
    known = f"about {time_s / done * to_do / jobs / 3600:.1f} h{told}" if done else "hours: not before one is"
    left = sum(not line.startswith("finished") for line in lines)
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
    arms: Sequence[Arm], jobs: int = 1, *, any_source: bool, after: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Run what is not finished, `jobs` arms at once; the exit codes of those that failed.

    `after` is called when an arm has finished, by one thread at a time.
    """
    home = Path(arms[0].config.run.root).parent
    asks = check_arms(arms, any_source=any_source)
    todo = sum(not finished_folder(arm) for arm in arms)
    ended: list[float] = []  # times of the arms that ended here, s
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places_of(jobs, pick_device(arms[0].config)):
        free.put(place)
    stopped, alone = Event(), Lock()
    leaders: dict[str, tuple[Arm, Event]] = {}  # the first of those that ask the same, and whether it is over
    for arm in arms:
        if name_of(arm) in asks:
            leaders.setdefault(asks[name_of(arm)], (arm, Event()))

    def turn(number: int, arm: Arm) -> int:
        told = f"arm {number} of {len(arms)}, {name_of(arm)}"
        if finished_folder(arm):
            print(f"{told}: finished", flush=True)
            return 0
        leader, over = leaders[asks[name_of(arm)]]
        trains = Path(leader.config.run.root) / leader.config.exp / "latest" / "metrics.jsonl"
        while arm is not leader and not trains.exists() and not over.wait(0.1):
            pass  # it stores the log-probs that all of them need
        place, folder = free.get(), Path(arm.config.run.root)
        try:
            if stopped.is_set() or interrupted():
                return 130
            print(f"{told}: {'goes on' if begun_folder(arm) else 'begins'}", flush=True)
            folder.mkdir(exist_ok=True)
            begin = time.perf_counter()
            with open(folder / "log.txt", "ab") if jobs > 1 else nullcontext() as log:
                code = run_arm(arm, lock, place, log)
        finally:
            free.put(place)
            over.set()
        ended.append(time.perf_counter() - begin)
        if code == 130:
            stopped.set()
        elif code:
            print(f"arm {name_of(arm)}: failed with exit code {code}; going on{_why(folder)}", file=sys.stderr)
        if done := finished_folder(arm):
            of = cast(Results, read_json_object(done / "results.json"))["judge"]["trained"]
            hours = sum(ended) / len(ended) * (todo - len(ended)) / jobs / 3600
            shares = f"averaged {100 * of['averaged_accuracy']:5.1f} % | consistent {100 * of['accuracy']:5.1f} %"
            print(f"| {told} | {shares} | {ended[-1] / 60:6.1f} min | {hours:5.1f} h left |", flush=True)
            with alone:
                after()
        return code

    with locked(home) as lock, interruptible() as interrupted, ThreadPoolExecutor(jobs) as pool:
        others = {folder.name for folder in home.iterdir() if folder.is_dir()} - {name_of(arm) for arm in arms}
        others.discard("results")
        if others:
            print(f"not in this sweep, nor in its table: {', '.join(sorted(others))}")
        codes = list(pool.map(turn, range(1, len(arms) + 1), arms))
        if 130 in codes or interrupted():
            raise KeyboardInterrupt("the same command goes on from here")
    return {name_of(arm): code for arm, code in zip(arms, codes, strict=True) if code}


def _why(folder: Path) -> str:
    """The end of a failed arm's log, where it has one."""
    log = folder / "log.txt"
    told = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return f" ({log}: {told[-1]})" if told else ""


# --- what is kept of them -------------------------------------------------------------------------------------------


def check_kept(folder: Path, arms: Sequence[Arm]) -> None:
    """UserError where arms are kept there that are not among these: they would be lost."""
    if (folder / "arms.json").is_file():
        kept = cast(Kept, read_json_object(folder / "arms.json"))["arms"]
        others = {arm["verdicts"] for arm in kept} - {_verdicts_of(arm) for arm in arms}
        if others:
            raise UserError(
                f"results: {folder} keeps arms that are not of this sweep ({', '.join(sorted(others))}), and they "
                "would be lost; give another results= or move the folder away"
            )


def _verdicts_of(arm: Arm) -> str:
    return f"{name_of(arm)}.jsonl.gz"


def keep(folder: Path, arms: Sequence[Arm], failed: Mapping[str, int], argv: list[str], jobs: int) -> None:
    """Put the finished arms' verdicts, compressed, and what else dpo/sweep_report.py reads into `folder`."""
    kept: list[KeptArm] = []
    contrast, primary = contrast_of(arms, argv), load_primary(argv, list(READOUTS))
    for arm in arms:
        if not (run := finished_folder(arm)):
            continue
        results = cast(Results, read_json_object(run / "results.json"))
        name, ran = _verdicts_of(arm), read_json_object(run / "env.json")
        atomic_write_bytes(folder / name, gzip.compress((run / "verdicts.jsonl").read_bytes(), mtime=0))
        train, data, made = results["train"], results["data"], arm.config.data.path == "checkable"
        kept.append(
            KeptArm(
                setting=arm.setting,
                axes=arm.varied,
                seed=arm.config.seed,
                sighted=arm.config.judge.sighted,
                verdicts=name,
                rows=data.get("test_sha256", "")[:12] if made else file_of(arm.config.data.path),
                source=source_of(run),
                ran={key: ran.get(key) for key in ("start_utc", "git", "cpu", "threads", "gpu", "packages")},
                steps=float(train["steps"]),
                tokens=float(train["tokens"]),
                train_s=float(train["time_s"]),
                whole_s=sum(results["time_s"].values()),
                reference_computed=results["reference"]["misses"],
            )
        )
        controls = results["judge"].get("controls", {})
        leads = {name: (of["averaged"]["difference"], of["averaged"]["interval"]) for name, of in controls.items()}
        kept[-1].update({"controls": leads} if leads else {})
        role = primary if primary == "rewards" else "trained"
        looks = [of for of in results.get("biases", []) if (of["judge"], of["look"]) == (role, "longer")]
        kept[-1].update({"longer": looks[0]} if looks else {})
        if attacks := results.get("attacks", []):
            kept[-1]["attacks"] = attacks
    written = Kept(
        name=arms[0].config.exp,
        question=load_question(argv),
        command=shlex.join(["python", "-m", "dpo.sweep", *_told(argv), f"jobs={jobs}"]),
        contrast=contrast and contrast._asdict(),
        primary=primary,
        planned=len(arms),
        arms=kept,
        failed=dict(failed),
    )
    write_json(folder / "arms.json", written)


def file_of(path: str) -> str:
    """A file's name, told apart from one of the same name elsewhere, without where on this machine it lies."""
    return f"{Path(path).name} {hashlib.sha256(path.encode()).hexdigest()[:8]}"


def contrast_of(arms: Sequence[Arm], argv: list[str]) -> Contrast | None:
    """The comparison that the sweep names before; UserError where a side of it will not have its readout."""
    settings = ["base", *dict.fromkeys(arm.setting for arm in arms)]
    contrast = load_contrast(argv, settings, list(READOUTS))
    if contrast and contrast.readout == "rewards":
        without = ["base", *(arm.setting for arm in arms if arm.config.judge.rewards == "off")]
        if side := next((side for side in (contrast.a, contrast.b) if side in without), ""):
            raise UserError(
                f'sweep.contrast: readout = "rewards": {side} has none: a base never has, an arm needs judge.rewards'
            )
    return contrast


def _told(argv: Sequence[str]) -> list[str]:
    """The arguments without where on this machine a file lies."""
    given = [arg.partition("=") for arg in argv if not arg.startswith(("run.", "reference.store="))]
    return [key + equals + (Path(value).name if value.startswith("/") else value) for key, equals, value in given]


def main(argv: list[str]) -> int:
    """The command line: 0 when all arms are finished, 1 where one failed, else exit_code's."""

    def command() -> int:
        mine, given = _own_arguments(argv)
        arms = load_sweep(given)
        contrast_of(arms, given)
        load_primary(given, list(READOUTS))
        any_source = mine["source"] == "any"
        if mine["--dry-run"]:
            check_arms(arms, any_source=any_source)
            print(dry_run(arms, int(mine["jobs"])))
            return 0
        folder, jobs = Path(arms[0].config.run.root).parent / "results", int(mine["jobs"])
        if mine["results"]:
            folder = Path(mine["results"]) / arms[0].config.exp
            check_kept(folder, arms)
        # Verdicts are kept arm by arm: who stops a sweep of many hours has those of all that finished.
        failed = sweep(arms, jobs, any_source=any_source, after=lambda: keep(folder, arms, {}, given, jobs))
        keep(folder, arms, failed, given, jobs)
        print(f"{write_sweep_report(folder)}\nreport: {folder / 'report.html'}")
        return 1 if failed else 0

    return exit_code(command, argv, USAGE, "finished arms are whole; the same command goes on from here")


def _own_arguments(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The sweep's own arguments, and those of its arms."""
    mine = {"jobs": "1", "source": "same", "results": "", "--dry-run": ""}
    given = []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key in mine and (value == "") is not (key == "--dry-run"):
            raise UserError(f"{argument}: --dry-run has no value, jobs=, source= and results= need one")
        if key in mine:
            mine[key] = value or "yes"
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
