"""Runs stopped by Ctrl-C or a full disk: what is left is whole, and resumed they end as unstopped ones, bit for bit."""

import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo import loop, train
from dpo.checkpoint import last_checkpoint
from dpo.runs import sole_process
from models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
STEPS = 9
SMALL = [
    *("exp=smoke", "checkable.subsets=Focus", "checkable.test_rows=8", "checkable.validation_rows=8"),
    *("judge.blind_control=false", f"train.max_steps={STEPS}", "train.epochs=3", "train.eval_every_steps=2"),
    "log.plots=false",
]
FULL: tuple[str, ...] = ()
LORA = ("lora.rank=2", "train.lr=1e-2", "lora.dora=true", "lora.dropout=0.3", "train.activation_checkpointing=true")
Unstopped = Callable[[tuple[str, ...]], dict[str, object]]
CtrlC = Callable[[int], None]
SHARD = "shard-00001-model-00001-of-00001.safetensors"
CHECKPOINT_BYTES = 1_000_000  # of the tiny model: fp32 weights and two moments, of 76,000 parameters


def arguments(place: Path, *more: str) -> list[str]:
    """What exp=smoke is given: small sizes, folders in `place`, and `more`, which goes over the others."""
    places = (f"run.root={place / 'runs'}", f"run.cache={place / 'cache'}", f"model.path={place / 'model'}")
    return list({argument.partition("=")[0]: argument for argument in (*SMALL, *places, *more)}.values())


def start(place: Path, *more: str, before: Callable[[], object] = bool) -> "subprocess.Popen[str]":
    """The command in a process of its own, which Ctrl-C reaches even where the tests run in the background."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.nice(5)  # so that whoever waits for a moment in its life does not miss it
        before()

    command, pipe = [sys.executable, "-m", "dpo.train", *arguments(place, *more)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=prepare)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, err


def wait_until(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def run_folder(place: Path) -> Path:
    return (place / "runs" / "smoke" / "latest").resolve()


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what is measured with a clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time_s", "tokens_per_s")} for line in lines]


def outcome(folder: Path) -> dict[str, object]:
    """All that must not depend on having been stopped: figures, and the bytes of weights and verdicts."""
    results = json.loads((folder / "results.json").read_text())
    names = [folder / "verdicts.jsonl", *sorted((folder / "export").rglob("*.safetensors"))]
    timed = ("time_s", "tokens_per_s", "peak_rss_mib")
    return {
        "metrics": metrics(folder),
        "judge": results["judge"],
        "step 0": (results["step0_loss"], results["step0_max_difference"]),
        "train": {key: value for key, value in results["train"].items() if key not in timed},
        **{name.relative_to(folder).as_posix(): digest(name) for name in names},
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): digest(path) for path in folder.rglob("*") if path.is_file()}


def litter(place: Path) -> list[str]:
    return [path.name for path in place.rglob(".*")]


def new_place(place: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, place / "model")
    return place


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path) -> Path:
    return new_place(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Unstopped:
    """The outcome of a run that nothing stopped, made once for each set of arguments."""

    @functools.cache
    def outcome_of(more: tuple[str, ...]) -> dict[str, object]:
        place = new_place(tmp_path_factory.mktemp("unstopped"), tiny_folder)
        assert train.main(arguments(place, *more)) == 0
        return outcome(run_folder(place))

    return outcome_of


@pytest.fixture
def ctrl_c_in_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[CtrlC]:
    """Call it with n, and one Ctrl-C comes in the middle of step n (from 0) of the next run in this process."""
    rate = loop.learning_rate
    waiting: list[int] = []

    def interrupting(step: int, *others: object) -> float:
        while step in waiting:
            waiting.remove(step)
            signal.raise_signal(signal.SIGINT)
        return rate(step, *others)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(loop, "learning_rate", interrupting)
    yield waiting.append
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_of_the_real_command_leaves_a_checkpoint_and_resuming_ends_as_if_it_had_never_been(
    place: Path, unstopped: Unstopped
) -> None:
    process = start(place)
    wait_until(process, lambda: (file := run_folder(place) / "metrics.jsonl").exists() and file.read_text() != "")
    process.send_signal(signal.SIGINT)
    code, err = end(process)
    folder = run_folder(place)
    assert code == 130 and "run.resume=latest" in err
    assert (last := last_checkpoint(folder / "checkpoints")) is not None
    state = json.loads((last / "state.json").read_text())
    assert 1 <= state["step"] < STEPS and not (folder / "results.json").exists() and not litter(folder)

    assert train.main(arguments(place, "run.resume=latest")) == 0
    assert outcome(folder) == unstopped(FULL)


@pytest.mark.parametrize(("step", "more"), [(0, FULL), (3, FULL), (STEPS - 1, FULL), (3, LORA)])
def test_resumed_after_any_step_a_run_ends_with_the_same_bits(
    place: Path, unstopped: Unstopped, ctrl_c_in_step: CtrlC, step: int, more: tuple[str, ...]
) -> None:
    ctrl_c_in_step(step)
    assert train.main(arguments(place, *more)) == 130
    folder = run_folder(place)
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == [f"step-{step + 1:06d}"]
    assert train.main(arguments(place, *more, f"run.resume={folder}")) == 0
    assert run_folder(place) == folder and outcome(folder) == unstopped(more)


def test_a_run_that_died_goes_on_from_its_last_checkpoint_and_drops_what_came_after(
    place: Path, unstopped: Unstopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = loop.learning_rate

    def die(step: int, *others: object) -> float:
        return rate(step, *others) if step < 7 else sys.exit("dead")  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="dead"):
        patch.setattr(loop, "learning_rate", die)
        train.main(arguments(place, "train.checkpoint_every_steps=3"))
    folder = run_folder(place)
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-000003", "step-000006"]
    assert train.main(arguments(place, "run.resume=latest", "train.checkpoint_every_steps=3")) == 0
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-000006", "step-000009"]
    assert outcome(folder) == unstopped(FULL)


def test_the_checkpoints_that_were_counted_are_kept_though_ctrl_c_wrote_one_more(
    place: Path, ctrl_c_in_step: CtrlC
) -> None:
    ctrl_c_in_step(3)
    assert train.main(arguments(place, "train.n_checkpoints=4")) == 130
    assert train.main(arguments(place, "train.n_checkpoints=4", "run.resume=latest")) == 0
    kept = sorted((run_folder(place) / "checkpoints").glob("step-*"))
    assert [int(path.name[-6:]) for path in kept] == [3, 4, 5, 7, 9]


def trained_lines(place: Path) -> int:
    file = place / "runs" / "smoke" / "latest" / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


@pytest.mark.parametrize(
    ("seed", "more"),
    [(0, FULL), *(pytest.param(seed, more, marks=pytest.mark.long) for seed in (1, 2, 3) for more in (FULL, LORA))],
)
def test_killed_at_a_random_step_the_same_command_again_ends_with_the_same_bits(
    place: Path, unstopped: Unstopped, seed: int, more: tuple[str, ...]
) -> None:
    step = random.Random(seed).randrange(1, STEPS)
    command = (*more, "run.resume=auto", "train.checkpoint_every_steps=2")
    process = start(place, *command)
    wait_until(process, lambda: trained_lines(place) >= step)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    folder = run_folder(place)
    assert not (folder / "results.json").exists()
    assert train.main(arguments(place, *command)) == 0
    assert run_folder(place) == folder and outcome(folder) == unstopped(more) and not litter(folder)


KILLED = """
import os, signal, sys
import safetensors.torch
from dpo import checkpoint, loop, train

def dies_at(owner, name, call):
    real, calls = getattr(owner, name), []

    def counting(*given, **named):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(owner, name, counting)

owners = {"learning_rate": loop, "save": safetensors.torch, "rename": os, "rmtree": checkpoint.shutil}
for moment in sys.argv[1].split(","):
    name, call = moment.split(":")
    child = os.fork()
    if not child:
        dies_at(owners[name], name, int(call))
        os._exit(train.main(sys.argv[2:]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, (moment, status)
"""


@pytest.mark.parametrize(
    ("more", "moments"),
    [
        (FULL, "save:2,learning_rate:2,rename:3"),
        (LORA, "rename:4"),
        pytest.param(FULL, "rmtree:1,rename:1,rmtree:2,save:1,rename:2", marks=pytest.mark.long),
        pytest.param(LORA, "save:1,rename:1,save:5,rmtree:2,rmtree:3,rename:2", marks=pytest.mark.long),
    ],
)
def test_killed_within_steps_and_while_checkpoints_are_written_it_ends_with_the_same_bits(
    place: Path, unstopped: Unstopped, more: tuple[str, ...], moments: str
) -> None:
    """One kill -9 after another: in a step, at a checkpoint's files, between renames, while an old one is removed."""
    command = arguments(place, *more, "run.resume=auto", "train.checkpoint_every_steps=1")
    killed = subprocess.run([sys.executable, "-c", KILLED, moments, *command], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    assert litter(run_folder(place))
    assert train.main(command) == 0
    assert outcome(folder := run_folder(place)) == unstopped(more)
    assert not litter(folder) and len(list(folder.parent.iterdir())) == 2


def test_auto_goes_on_with_what_is_unfinished_under_the_same_configuration_and_else_begins_anew(
    place: Path, ctrl_c_in_step: CtrlC
) -> None:
    short = ("train.max_steps=2", "run.resume=auto")
    ctrl_c_in_step(0)
    assert train.main(arguments(place, *short)) == 130
    begun = run_folder(place)
    assert train.main(arguments(place, *short, "loss.beta=0.2")) == 0  # another configuration: a run of its own
    assert (other := run_folder(place)) != begun and not (begun / "results.json").exists()
    assert train.main(arguments(place, *short, "log.project=other")) == 0
    assert run_folder(place) == other and (begun / "results.json").exists()
    (other / "report.html").unlink()  # killed while it was written: no new training for that
    assert train.main(arguments(place, *short, "loss.beta=0.2")) == 0
    assert run_folder(place) == other and (other / "report.html").exists()
    assert train.main(arguments(place, *short)) == 0  # finished: the next one
    assert run_folder(place) not in (begun, other)


def test_two_processes_never_train_in_one_folder(
    place: Path, ctrl_c_in_step: CtrlC, capsys: pytest.CaptureFixture[str]
) -> None:
    ctrl_c_in_step(0)
    assert train.main(arguments(place, "train.max_steps=2")) == 130
    before = contents(folder := run_folder(place))
    capsys.readouterr()
    with sole_process(folder):
        assert train.main(arguments(place, "train.max_steps=2", "run.resume=latest")) == 2
    assert "another process is training in it" in capsys.readouterr().err and contents(folder) == before
    assert train.main(arguments(place, "train.max_steps=2", "run.resume=latest", "log.project=other")) == 0
    assert "these may differ: log.project was 'dpo-judges', is 'other'" in capsys.readouterr().out


def test_ctrl_c_in_the_reference_stage_exits_130_and_the_run_can_be_resumed(place: Path, unstopped: Unstopped) -> None:
    process = start(place)
    wait_until(process, lambda: any((place / "cache").glob("reference/*/identity.json")))
    process.send_signal(signal.SIGINT)
    code, err = end(process)
    folder = run_folder(place)
    assert code == 130 and err.startswith("interrupted: run.resume=latest goes on") and err.count("\n") == 1
    assert not (folder / "metrics.jsonl").exists(), "it was past the reference stage"
    assert not litter(place)
    assert train.main(arguments(place, "run.resume=latest")) == 0
    assert outcome(folder) == unstopped(FULL)


@pytest.mark.parametrize("stage", ["judge_results", "export", "write_report"])
def test_ctrl_c_after_training_loses_none_of_it(
    place: Path, unstopped: Unstopped, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    def trained_again(*_: object) -> None:
        raise AssertionError("a step was trained again")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(train, stage, interrupted)
        assert train.main(arguments(place)) == 130
    signal.signal(signal.SIGINT, before)
    folder = run_folder(place)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", trained_again)
        assert train.main(arguments(place, "run.resume=latest")) == 0
    assert outcome(folder) == unstopped(FULL)


def test_a_second_ctrl_c_stops_at_once(place: Path, ctrl_c_in_step: CtrlC) -> None:
    ctrl_c_in_step(1)
    ctrl_c_in_step(1)
    assert train.main(arguments(place)) == 130
    assert not (run_folder(place) / "checkpoints").exists() and not litter(place)


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(
    place: Path, unstopped: Unstopped, ctrl_c_in_step: CtrlC
) -> None:
    ctrl_c_in_step(2)
    assert train.main(arguments(place)) == 130
    folder = run_folder(place)
    whole = contents(folder / "checkpoints" / "step-000003")
    limit = CHECKPOINT_BYTES // 2  # bytes a file: more than the weights, less than the optimizer's moments
    resumed = ("run.resume=latest", "train.checkpoint_every_steps=1")
    code, err = end(start(place, *resumed, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    assert code == 2 and err.startswith("error: checkpoint ") and err.count("\n") == 1
    assert "step-000004: cannot write" in err and "earlier checkpoints are whole" in err and "run.resume=latest" in err
    assert contents(folder / "checkpoints" / "step-000003") == whole
    assert not litter(folder) and last_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-000003"
    assert train.main(arguments(place, "run.resume=latest")) == 0
    assert outcome(folder) == unstopped(FULL)


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_real_command_with_the_last_one_whole(
    place: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(CHECKPOINT_BYTES * 3 // 2)
    often = ("train.checkpoint_every_steps=2", "train.eval_every_steps=0")
    code, err = end(start(place, f"run.root={disk / 'runs'}", *often))
    assert code == 2 and err.startswith("error: checkpoint ") and err.count("\n") == 1
    assert "step-000004: cannot write" in err and "MiB left" in err
    folder = run_folder(disk)
    assert last_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-000002" and not litter(disk)
    # Freeing space by moving the run is one way on: where it lies is no part of what it computes.
    shutil.copytree(disk / "runs", place / "runs", symlinks=True)
    assert train.main(arguments(place, "run.resume=latest", "train.eval_every_steps=0")) == 0


@pytest.mark.parametrize("kibibytes", [4, 8, 400])  # at the folder, at metrics.jsonl, at the export
def test_a_disk_that_is_full_elsewhere_is_an_error_without_traceback(
    place: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str], kibibytes: int
) -> None:
    disk = small_disk(kibibytes * 1024)
    code = train.main(arguments(place, f"run.root={disk / 'runs'}", "train.max_steps=1"))
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and "o space left" in err and str(disk) in err
    assert not litter(disk)


# --- resuming what is not the same ----------------------------------------------------------------------------------


def test_resuming_under_another_configuration_is_refused_and_the_keys_are_named(
    place: Path, ctrl_c_in_step: CtrlC, capsys: pytest.CaptureFixture[str]
) -> None:
    ctrl_c_in_step(0)
    assert train.main(arguments(place)) == 130
    before = contents(folder := run_folder(place))
    capsys.readouterr()
    assert train.main(arguments(place, "run.resume=latest", "loss.beta=0.2", "seed=1", "log.project=other")) == 2
    err = capsys.readouterr().err
    may_not, _, may = err.partition("these may differ: ")
    assert "loss.beta was 0.1, is 0.2" in may_not and "seed was 0, is 1" in may_not and "log.project" not in may_not
    assert "log.project was 'dpo-judges', is 'other'" in may and "run.resume" not in may and "loss.beta" not in may
    assert contents(folder) == before and len(list(folder.parent.iterdir())) == 2


def test_resuming_on_rows_that_have_changed_since_is_refused(
    place: Path, ctrl_c_in_step: CtrlC, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's name is in the configuration, what it holds is not."""
    file = place / "rows.jsonl"
    rows = [
        {"id": f"r{n}", "subset": "s", "prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"{n}."}
        | {"split": "validation" if n < 8 else "test" if n < 16 else "train"}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = arguments(place, f"data.path={file}", "train.checkpoint_every_steps=1")
    ctrl_c_in_step(2)
    assert train.main(given) == 130
    for split in ("validation", "train"):
        changed = [
            row | {"chosen": row["chosen"].replace("It", "That")} if row["split"] == split else row for row in rows
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
        capsys.readouterr()
        assert train.main([*given, "run.resume=latest"]) == 2
        assert "begun on other training or validation rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (SHARD, lambda data: data[:1000], "is not what was written"),
        (SHARD, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "is not what was written"),
        (SHARD, None, "No such file"),
        ("state.json", lambda data: data[:40], "is not what was written"),
        ("SHA256SUMS", lambda data: data[:40], "SHA256SUMS is not what was written"),
        ("SHA256SUMS", lambda data: b"", "SHA256SUMS is not what was written"),
    ],
)
def test_a_checkpoint_that_was_damaged_is_named(
    place: Path,
    ctrl_c_in_step: CtrlC,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[bytes], bytes] | None,
    said: str,
) -> None:
    ctrl_c_in_step(0)
    assert train.main(arguments(place)) == 130
    file = run_folder(place) / "checkpoints" / "step-000001" / name
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    capsys.readouterr()
    assert train.main(arguments(place, "run.resume=latest")) == 2
    err = capsys.readouterr().err
    assert str(file.parent) in err and said in err and err.count("\n") == 1


def test_other_base_weights_under_an_adapter_are_refused_whatever_the_reference(
    place: Path, ctrl_c_in_step: CtrlC, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(place, "lora.rank=2", f"reference.path={place / 'other'}")
    write_tiny_model(place / "other", seed=5)
    ctrl_c_in_step(2)
    assert train.main(given) == 130
    shutil.rmtree(place / "model")
    write_tiny_model(place / "model", seed=99)
    capsys.readouterr()
    assert train.main([*given, "run.resume=latest"]) == 2
    assert "begun with a reference and start of other weights (" in capsys.readouterr().err


def test_a_copy_of_a_checkpoint_is_none(place: Path, ctrl_c_in_step: CtrlC) -> None:
    ctrl_c_in_step(2)
    assert train.main(arguments(place, "train.checkpoint_every_steps=1")) == 130
    checkpoints = run_folder(place) / "checkpoints"
    last = last_checkpoint(checkpoints)
    assert last is not None
    shutil.copytree(last, last.with_name(f"{last.name}-backup"))
    assert last_checkpoint(checkpoints) == last
