"""Sweeps: every arm is a run like any other, none is run twice, and the table says no more than the verdicts do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dpo import sweep
from dpo.judge.statistics import Verdict, averaged_scores, cluster_interval, mcnemar_exact, wilson_interval
from dpo.settings import load_config, load_sweep
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SWEPT = ("sweep.loss.beta=0.1,0.5", "sweep.seed=0,1")


def experiment(path: Path, *sweep_lines: str) -> Path:
    path.write_text("\n".join(["# Which?", 'extends = "smoke"', "[sweep]", *sweep_lines]) + "\n")
    return path


# --- the arms ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_the_seeds_innermost(tmp_path: Path) -> None:
    lines = (
        "seed = [0, 7]",
        '"loss.name" = ["sigmoid", "ipo"]',
        "loss.beta = [0.05, 1]",
        'loss.mix = [[], ["sft:0.1"]]',
    )
    arms = load_sweep([f"exp={experiment(tmp_path / 'grid.toml', *lines)}", "train.lr=1e-4"])
    seen = [(arm.config.loss.name, arm.config.loss.beta, arm.config.loss.mix, arm.config.seed) for arm in arms]
    names, betas, mixes, seeds = ("sigmoid", "ipo"), (0.05, 1.0), ([], ["sft:0.1"]), (0, 7)
    assert seen == [(name, beta, mix, seed) for name in names for beta in betas for mix in mixes for seed in seeds]
    assert all(arm.config.train.lr == 1e-4 for arm in arms)
    folders = [Path(arm.config.run.root) for arm in arms]
    assert len(set(folders)) == len(arms) and {folder.parent for folder in folders} == {Path("runs/grid-sweep")}
    assert folders[0].name.startswith("loss.name=sigmoid,loss.beta=0.05,loss.mix=__,seed=0-")


def test_a_file_that_extends_a_sweep_inherits_it_and_the_command_line_goes_over_both(tmp_path: Path) -> None:
    below = experiment(tmp_path / "below.toml", "loss.beta = [0.1, 0.2]", "seed = [0, 1]")
    above = tmp_path / "above.toml"
    above.write_text('extends = "below.toml"\n[sweep]\nseed = [5]\n')
    assert below.exists()
    arms = load_sweep([f"exp={above}", "sweep.loss.beta=0.3"])
    assert [(arm.config.loss.beta, arm.config.seed) for arm in arms] == [(0.3, 5)]


def test_a_single_run_leaves_a_files_sweep_alone_and_refuses_one_that_is_typed(tmp_path: Path) -> None:
    file = experiment(tmp_path / "e.toml", "loss.beta = [0.3, 0.4]")
    assert load_config([f"exp={file}"]).loss.beta == 0.1
    with pytest.raises(UserError, match=r"sweep.loss.beta=0.3,0.4 \(command line\): only python -m dpo.sweep"):
        load_config([f"exp={file}", "sweep.loss.beta=0.3,0.4"])


@pytest.mark.parametrize(
    ("line", "argument", "expected"),
    [
        ("loss.betta = [0.1]", "", ["unknown key loss.betta (", "e.toml [sweep])", "did you mean loss.beta?"]),
        ("loss.beta = [0.1, -1]", "", ["loss.beta = -1 (", "e.toml [sweep])", "a number > 0"]),
        ('loss.beta = [0.1, "x"]', "", ['loss.beta = "x" (', "e.toml [sweep])", "a number > 0"]),
        ("loss.beta = 0.1", "", ["loss.beta = 0.1 (", "must be a list"]),
        ("loss.beta = []", "", ["loss.beta = [] (", "must be a list"]),
        ("loss.beta = [0.1, 1e-1]", "", ["loss.beta (", "has 0.1 twice"]),
        ('loss.name = ["ipo", "sigmod"]', "", ["sigmod", "e.toml [sweep]", "the arm loss.name=sigmod"]),
        ('model.path = ["tiny-random", "nowhere"]', "", ["nowhere", "the arm model.path=nowhere"]),
        ("lora.rank = [4, 0]", "lora.alpha=8", ["lora.alpha = 8", "lora.rank = 0 (", "e.toml [sweep]"]),
        ('run.root = ["a", "b"]', "", ["run.root (", "cannot be swept"]),
        ("seed = [0, 1]", "seed=3", ["seed (command line)", "is swept by", "sweep.seed="]),
        ("seed = [0]", "sweep.sed=1", ["unknown key sweep.sed (command line)", "did you mean seed?"]),
        ("seed = [0]", "run.resume=latest", ["run.resume (command line)", "goes on by itself"]),
        ("", "", ["nothing to sweep", "[sweep]"]),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, argument: str, expected: list[str]
) -> None:
    given = [f"exp={experiment(tmp_path / 'e.toml', line)}", f"run.root={tmp_path / 'runs'}", f"run.cache={tmp_path}"]
    assert sweep.main([*given, *filter(None, [argument])]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(part in message for part in expected), message
    assert not (tmp_path / "runs").exists()


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    """The arguments of a sweep over two betas and two seeds, run to its end."""
    place = tmp_path_factory.mktemp("sweep")
    rows = [
        {
            "id": f"{split}{n}",
            "split": split,
            "subset": "Sums",
            "prompt": f"{split} {n} + 1?",
            "chosen": [f"It is {n + 1}."],
        }
        for split, size in (("train", 8), ("validation", 4), ("test", 6))
        for n in range(size)
    ]
    lines = [json.dumps(row | {"rejected": ["No idea."]}) for row in rows]
    (place / "rows.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["exp=smoke", f"data.path={place / 'rows.jsonl'}", f"run.root={place / 'runs'}", "train.max_steps=2"]
    arguments += [f"run.cache={place / 'cache'}", f"model.path={tiny_folder}", "train.lr=1e-2", "log.plots=false"]
    assert sweep.main([*arguments, *SWEPT, "jobs=2"]) == 0
    return arguments


def home_of(arguments: list[str]) -> Path:
    return Path(load_sweep([*arguments, "sweep.seed=0"])[0].config.run.root).parent


def forbid(*arguments: object, **more: object) -> "subprocess.CompletedProcess[str]":
    raise AssertionError(f"was started again: {arguments}")


def test_only_the_first_arm_runs_the_reference_and_judges_the_base(finished: list[str]) -> None:
    folders = [sweep.finished_folder(arm) for arm in load_sweep([*finished, *SWEPT])]
    usage = [json.loads((folder / "results.json").read_text())["reference"] for folder in folders if folder]
    assert [used["misses"] > 0 for used in usage] == [True, False, False, False]
    assert len({used["misses"] + used["hits"] for used in usage}) == 1


def test_the_table_has_a_line_a_setting_with_the_seeds_together(finished: list[str]) -> None:
    home = home_of(finished)
    first, second = json.loads((home / "sweep.json").read_text())["lines"]
    assert (first["setting"], second["setting"]) == ("loss.beta=0.1", "loss.beta=0.5")
    assert first["seeds"] == second["seeds"] == [0, 1]
    assert first["over_first"] is None and second["over_first"] is not None
    assert first["reference_computed"] > 0 == second["reference_computed"]
    verdicts = sweep.read_verdicts(next(home.glob("loss.beta=0.5,seed=1/smoke/latest")) / "verdicts.jsonl")["trained"]
    other = sweep.read_verdicts(next(home.glob("loss.beta=0.5,seed=0/smoke/latest")) / "verdicts.jsonl")["trained"]
    assert second["averaged"][0] == np.concatenate([averaged_scores(verdicts), averaged_scores(other)]).mean()
    assert "loss.beta=0.5" in (home / "sweep.md").read_text()


def test_the_same_command_again_runs_nothing_and_a_torn_arm_alone_is_resumed(
    finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    before = (home_of(finished) / "sweep.md").read_text()
    assert sweep.main([*finished, *SWEPT]) == 0
    assert (home_of(finished) / "sweep.md").read_text() == before
    arm = load_sweep([*finished, *SWEPT])[2]
    folder = sweep.finished_folder(arm)
    assert folder
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    started: list[list[str]] = []

    def finish(command: list[str], **more: object) -> "subprocess.CompletedProcess[str]":
        started.append(command)
        (folder / "report.html").write_bytes(page)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", finish)
    assert sweep.main([*finished, *SWEPT]) == 0
    assert [command[3:] for command in started] == [[*arm.argv, "run.resume=latest"]]


def test_a_changed_sweep_is_named_and_a_larger_one_keeps_what_is_finished(
    finished: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    changed = [argument.replace("train.lr=1e-2", "train.lr=1e-3") for argument in finished]
    assert sweep.main([*changed, *SWEPT]) == 2
    message = capsys.readouterr().err
    assert "train.lr was 0.01, is 0.001" in message and "move that folder away" in message
    assert sweep.main([*finished, "sweep.loss.beta=0.5", "sweep.seed=0,1"]) == 0
    assert "not in this sweep, nor in its table: loss.beta=0.1,seed=0, loss.beta=0.1,seed=1" in capsys.readouterr().out

    def killed(command: list[str], **more: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(subprocess, "run", killed)
    assert sweep.main([*finished, "sweep.loss.beta=0.1,0.5,0.9", "sweep.seed=0,1"]) == 1
    written = json.loads((home_of(finished) / "sweep.json").read_text())
    assert [line["setting"] for line in written["lines"]] == ["loss.beta=0.1", "loss.beta=0.5"]
    assert written["failed"] == {"loss.beta=0.9,seed=0": -9, "loss.beta=0.9,seed=1": -9}
    monkeypatch.setattr(subprocess, "run", forbid)
    assert sweep.main([*finished, *SWEPT]) == 0


def test_arms_that_run_at_once_have_a_gpu_or_a_share_of_the_cores(
    finished: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fixture ran two at once, and yet the first alone asked the reference."""
    logs = [path.read_text() for path in home_of(finished).glob("*/log.txt")]
    assert len(logs) == 4 and all("report: " in log for log in logs)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sweep.places_of(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3 and sweep.places_of(1, "cuda") == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert sweep.places_of(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UserError, match="jobs=4: an arm takes a GPU, and 3 can be seen"):
        sweep.places_of(4, "cuda")
    assert sweep.main([*finished, *SWEPT, "jobs=0"]) == 2 and "jobs=0: must be" in capsys.readouterr().err


def test_two_sweeps_never_share_a_folder(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with sweep.locked(home_of(finished)):
        assert sweep.main([*finished, *SWEPT]) == 2
    assert "a sweep, or an arm of one, runs there" in capsys.readouterr().err


def test_ctrl_c_ends_the_arm_whole_and_starts_no_other(tmp_path: Path, finished: list[str]) -> None:
    given = {argument.partition("=")[0]: argument for argument in finished}
    given |= {"run.root": f"run.root={tmp_path}", "train.max_steps": "train.max_steps=0", "lr": "train.epochs=500"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo.sweep", *given.values(), *SWEPT],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("smoke-sweep/*/smoke/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "the same command goes on" in err
    assert out.count(": begins") == 1 and len(list(tmp_path.glob("smoke-sweep/*/smoke/latest/checkpoints/step-*"))) == 1


# --- what the table says ----------------------------------------------------------------------------------------------


def judge(rights: list[bool], groups: int = 10**9) -> list[Verdict]:
    return [
        Verdict(f"r{i}", "All", f"g{i % groups}", (0, 0), *((1.0, -1.0) if r else (-1.0, 1.0)))
        for i, r in enumerate(rights)
    ]


@pytest.mark.parametrize(("rights", "groups", "wilsons"), [([True] * 40, 40, True), ([True, False] * 20, 4, False)])
def test_one_seed_has_the_wider_of_wilsons_and_the_clustered_interval(
    rights: list[bool], groups: int, wilsons: bool
) -> None:
    verdicts = judge(rights, groups)
    scores = averaged_scores(verdicts)
    clustered = cluster_interval(scores, [verdict.group for verdict in verdicts], 0)
    wider = wilson_interval(sum(rights), 40) if wilsons else clustered  # of four groups two all right, two all wrong
    assert sweep.over_seeds([scores], [verdicts], share=True) == (sum(rights) / 40, list(wider))


def test_seeds_that_disagree_widen_the_interval_as_student_says() -> None:
    runs = [judge([True] * n + [False] * (100 - n)) for n in (60, 70, 80)]
    mean, (low, high) = sweep.over_seeds([averaged_scores(run) for run in runs], runs, share=True)
    half = 4.303 * 0.1 / 3**0.5  # t of 2 degrees of freedom, standard deviation 0.1, three seeds
    assert (mean, low, high) == pytest.approx((0.7, 0.7 - half, 0.7 + half))


def test_a_setting_is_compared_with_the_first_on_the_same_pairs_of_the_same_seeds_only() -> None:
    def run(trained: list[bool]) -> sweep.Judged:
        return {"base": judge([False] * len(trained)), "trained": judge(trained)}

    judged = {
        "first": {0: run([True] * 4 + [False] * 6), 1: run([True] * 5 + [False] * 5)},
        "better": {0: run([True] * 10), 1: run([True] * 10)},
        "other rows": {0: run([True] * 9)},
        "one seed": {1: run([True] * 10)},
    }
    lines = {line.setting: line for line in sweep.compare_settings(judged, dict.fromkeys(judged, 0), moving=False)}
    assert lines["first"].over_first is None and lines["other rows"].over_first is None
    better, one = lines["better"], lines["one seed"]
    assert better.over_first and better.over_first[0] == pytest.approx(0.55) and one.over_first
    assert one.over_first[0] == 0.5 and one.p_over_first == mcnemar_exact(5, 0)
    assert better.p_over_first is not None and better.p_over_first >= mcnemar_exact(11, 0)
    assert better.over_base[0] == 1.0


def test_rows_that_the_sweep_may_have_moved_are_the_same_only_if_the_untrained_judge_says_so() -> None:
    same, moved = {"base": judge([True, False])}, {"base": judge([True, True])}
    assert sweep._same_rows(same, same, True) and sweep._same_rows(same, moved, False)
    assert not sweep._same_rows(same, moved, True)


def test_a_broken_line_of_verdicts_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_text('{"judge": "base"}\n')
    with pytest.raises(UserError, match="verdicts.jsonl:1: no verdict"):
        sweep.read_verdicts(tmp_path / "verdicts.jsonl")
