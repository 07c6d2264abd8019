"""Sweeps: every arm is a run like any other, none is run twice, and the table says no more than the verdicts do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo import report, sweep
from dpo.judge.local import read_verdicts
from dpo.settings import load_config, load_sweep
from dpo.sweep_figures import read_kept
from experiments.bench_sweep import write_experiments
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


def test_the_bench_of_sweeps_runs_twelve_arms_and_each_of_them_apart(tmp_path: Path) -> None:
    alone, swept = write_experiments(tmp_path, rows=96)
    arms = load_sweep([f"exp={swept}"])
    assert len(arms) == 12
    for arm in arms:
        loss = arm.config.loss
        apart = load_config([f"exp={alone}", f"loss.name={loss.name}", f"loss.beta={loss.beta}"])
        assert (apart.loss, apart.checkable, apart.train) == (loss, arm.config.checkable, arm.config.train)


def arms_file(path: Path, *lines: str) -> list[str]:
    named = ['[[sweep.arm]]\nname = "plain"', '[[sweep.arm]]\nname = "ipo"\nloss.name = "ipo"\nloss.beta = 0.3']
    experiment(path, "seed = [0, 1]", *named, *lines)
    return [f"exp={path}"]


def test_named_arms_are_crossed_with_the_lists_and_keep_their_keys_together(tmp_path: Path) -> None:
    arms = load_sweep([*arms_file(tmp_path / "e.toml"), "sweep.train.lr=1e-3,1e-4", "sweep.seed=0"])
    seen = [(arm.setting, arm.config.loss.name, arm.config.loss.beta, arm.config.train.lr) for arm in arms]
    plain, ipo = ("sigmoid", 0.1), ("ipo", 0.3)
    names = (("plain", plain), ("ipo", ipo))
    assert seen == [(f"{name}, train.lr={lr}", *of, lr) for name, of in names for lr in (1e-3, 1e-4)]
    assert Path(arms[2].config.run.root).name == "arm=ipo,train.lr=0.001,seed=0"
    assert load_config([*arms_file(tmp_path / "e.toml")]).loss.name == "sigmoid"


@pytest.mark.parametrize(
    ("lines", "argument", "expected"),
    [
        ('[[sweep.arm]]\nname = "ipo"', "", 'the name "ipo" is there twice; each arm has its own'),
        ("[[sweep.arm]]\nloss.beta = 1", "", "name = null must be a text"),
        ('[[sweep.arm]]\nname = "x"\nloss.betta = 1', "", "unknown key loss.betta"),
        ('[[sweep.arm]]\nname = "x"\nloss.beta = -1', "", "loss.beta = -1 ("),
        ('[[sweep.arm]]\nname = "x"\nseed = 1', "", "is swept by"),
        ("", "loss.beta=2", "is swept by"),
        ('[sweep.contrast]\na = "ipo"\nb = "plain"', "", "must have a, b and readout"),
        ('[sweep.contrast]\na = "ipo"\nb = "plane"\nreadout = "averaged"', "", "one of base; plain; ipo"),
        ('[sweep.contrast]\na = "ipo"\nb = "plain"\nreadout = "accuracy"', "", "one of averaged; consistent"),
        ('[sweep.contrast]\na = "ipo"\nb = "ipo"\nreadout = "averaged"', "", "a and b are both ipo"),
        ('[sweep.contrast]\na = "ipo"\nb = "base"\nreadout = "judged blind"', "", "a base never has"),
        ('[sweep.contrast]\na = "ipo"\nb = "plain"\nreadout = "judged sighted"', "", "needs judge.sighted_control"),
        ('[[sweep.arm]]\nname = "same"', "", "are one and the same"),
        ("", "jobs=1 jobs=2", "jobs is given twice"),
    ],
)
def test_named_arms_and_contrasts_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, argument: str, expected: str
) -> None:
    given = [*arms_file(tmp_path / "e.toml", lines), f"run.root={tmp_path / 'runs'}", *argument.split()]
    assert sweep.main(given) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1, message
    assert not (tmp_path / "runs").exists()


def test_a_contrast_is_read_as_it_was_named(tmp_path: Path) -> None:
    given = arms_file(tmp_path / "e.toml", '[sweep.contrast]\na = "ipo"\nb = "base"\nreadout = "says A"')
    assert sweep.named_contrast(load_sweep(given), given) == ("ipo", "base", "says A")


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
        ("seed = [0]", "sweep.sed=1", ["unknown key sweep.sed (command line)", "did you mean sweep.seed?"]),
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


@pytest.mark.long
@pytest.mark.parametrize(("name", "readouts"), [("q_a_objectives", {"rewards"}), ("q_b_sight", {"judged sighted"})])
def test_a_question_goes_through_sweep_and_report_made_tiny(tmp_path: Path, name: str, readouts: set[str]) -> None:
    given = [f"exp={name}", "sweep.seed=0,1", "model.path=tiny-random", "pack.tokens=2048", "train.max_steps=1"]
    given += [
        "checkable.train_rows=16",
        "checkable.test_rows=16",
        f"run.root={tmp_path}",
        f"run.cache={tmp_path}/cache",
    ]
    assert sweep.main([*given, f"results={tmp_path / 'kept'}"]) == 0
    figures = json.loads((tmp_path / "kept" / name / "report.json").read_text())
    assert figures["contrast"]["seeds"] == [0, 1] and figures["contrast"]["p_seeds"] >= 0.5
    assert all(readouts <= set(of["figures"]) for of in figures["settings"] if not of["setting"].startswith("base"))
    assert f"python -m dpo.sweep exp={name}" in (tmp_path / "kept" / name / "report.md").read_text()


def home_of(arguments: list[str]) -> Path:
    return Path(load_sweep([*arguments, "sweep.seed=0"])[0].config.run.root).parent


def forbid(*arguments: object, **more: object) -> "subprocess.CompletedProcess[str]":
    raise AssertionError(f"was started again: {arguments}")


def test_only_the_first_arm_runs_the_reference_and_judges_the_base(finished: list[str]) -> None:
    folders = [sweep.finished_folder(arm) for arm in load_sweep([*finished, *SWEPT])]
    usage = [json.loads((folder / "results.json").read_text())["reference"] for folder in folders if folder]
    assert [used["misses"] > 0 for used in usage] == [True, False, False, False]
    assert len({used["misses"] + used["hits"] for used in usage}) == 1


def test_what_is_kept_holds_every_verdict_and_its_report_is_made_again_to_the_letter(finished: list[str]) -> None:
    home = home_of(finished)
    kept, settings = read_kept(home / "results")
    assert list(settings) == ["base", "loss.beta=0.1", "loss.beta=0.5"] and "run.root" not in kept["command"]
    assert [arm["reference_computed"] > 0 for arm in kept["arms"]] == [True, False, False, False]
    verdicts = read_verdicts(next(home.glob("loss.beta=0.5,seed=1/smoke/latest")) / "verdicts.jsonl")["trained"]
    assert [v.first for v in settings["loss.beta=0.5"][1]["trained"]] == [v.first for v in verdicts]
    before = (home / "results" / "report.md").read_bytes()
    (home / "results" / "report.md").unlink()
    assert report.main([str(home / "results")]) == 0
    assert (home / "results" / "report.md").read_bytes() == before


def test_a_dry_run_tells_steps_and_hours_and_starts_nothing(
    finished: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    assert sweep.main([*finished, "sweep.loss.beta=0.1,0.9", "sweep.seed=0,1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [" ".join(line.split()) for line in lines[:4]]
    assert [line[: line.index(" steps")] for line in told] == ["finished 2", "finished 2", "to run 2", "to run 2"]
    assert lines[4].startswith("4 arms, 2 to finish, about ")
    judged = home_of(finished).parent / "judged" / "99991231-0"  # the last of all, but it trained nothing
    judged.mkdir(parents=True)
    run = sweep.finished_folder(load_sweep([*finished, *SWEPT])[0])
    assert run
    (judged / "config.json").write_text((run / "config.json").read_text())
    (judged / "results.json").write_text("{}")
    others = [argument for argument in finished if not argument.startswith("train.lr")]
    assert sweep.main([*others, "sweep.train.lr=0.3", "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(
        r"1 arms, 1 to finish, about [\d.]+ h, as .*/smoke-sweep/loss.beta=.* took time for its tokens$", last
    )


def test_an_arm_of_other_sources_is_refused_unless_any_will_do(
    finished: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    monkeypatch.setattr("dpo.arms.source_digest", lambda: "0123")
    assert sweep.main([*finished, *SWEPT]) == 2
    message = capsys.readouterr().err
    assert "loss.beta=0.5,seed=1: begun by other sources" in message and "now 0123" in message
    assert sweep.main([*finished, *SWEPT, "source=any"]) == 0


def test_an_arm_that_was_finished_on_other_rows_is_refused(
    finished: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    path = Path(next(argument for argument in finished if argument.startswith("data.path=")).partition("=")[2])
    before = path.read_text()
    for old, new, told in (
        ("No idea.", "No clue.", "test rows"),
        ("train 0 + 1?", "train 0 + 2?", "training or valid"),
    ):
        try:
            path.write_text(before.replace(old, new))
            assert sweep.main([*finished, *SWEPT]) == 2
        finally:
            path.write_text(before)
        message = capsys.readouterr().err
        assert f"was finished with other {told}" in message and "the arm loss.beta=0.1" in message


def test_a_contrast_of_rewards_that_no_arm_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for b, reward in (("plain", "off"), ("base", "sum")):
        contrast = f'[sweep.contrast]\na = "ipo"\nb = "{b}"\nreadout = "rewards"'
        given = arms_file(tmp_path / "e.toml", contrast)
        assert sweep.main([*given, f"run.root={tmp_path / 'runs'}", f"judge.rewards={reward}"]) == 2
        assert 'readout = "rewards": ' in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_same_command_again_runs_nothing_and_a_torn_arm_alone_is_resumed(
    finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    assert sweep.main([*finished, *SWEPT]) == 0
    before = (home_of(finished) / "results" / "report.md").read_text()
    assert sweep.main([*finished, *SWEPT]) == 0
    assert (home_of(finished) / "results" / "report.md").read_text() == before
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
    written = read_kept(home_of(finished) / "results")[0]
    assert list(dict.fromkeys(arm["setting"] for arm in written["arms"])) == ["loss.beta=0.1", "loss.beta=0.5"]
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


def test_results_that_are_published_are_never_written_over_by_fewer_arms(
    finished: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    given = [*finished, f"results={tmp_path}"]
    assert sweep.main([*given, *SWEPT]) == 0
    before = (tmp_path / "smoke" / "arms.json").read_bytes()
    assert sweep.main([*given, "sweep.loss.beta=0.5", "sweep.seed=0,1"]) == 2
    assert "keeps arms that are not of this sweep (loss.beta=0.1,seed=0.jsonl.gz, " in capsys.readouterr().err
    assert (tmp_path / "smoke" / "arms.json").read_bytes() == before
    kept = json.loads(before)
    assert kept["planned"] == 4 and kept["primary"] == "averaged" and kept["command"].endswith(" jobs=1")
    assert {"always A", "longer answer"} <= read_verdicts(tmp_path / "smoke" / kept["arms"][0]["verdicts"]).keys()
    assert {arm["ran"]["threads"] for arm in kept["arms"]} == {max(1, (os.cpu_count() or 1) // 2)}
    for argument in ("results=", "--dry-run=no"):
        assert sweep.main([*finished, *SWEPT, argument]) == 2
        assert f"{argument}: --dry-run has no value" in capsys.readouterr().err


def test_arms_that_are_kept_count_as_finished_where_their_run_folders_are_gone(
    finished: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", forbid)
    results = f"results={tmp_path / 'kept'}"
    assert sweep.main([*finished, *SWEPT, results]) == 0
    folder = tmp_path / "kept" / "smoke"
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    elsewhere = [*(given for given in finished if not given.startswith("run.root=")), f"run.root={tmp_path / 'runs'}"]
    assert sweep.main([*elsewhere, *SWEPT, results]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert capsys.readouterr().out.count("finished, its verdicts are kept") == 4

    changed = [given.replace("train.lr=1e-2", "train.lr=0.5") for given in elsewhere]
    assert sweep.main([*changed, *SWEPT, results]) == 2
    assert "loss.beta=0.1,seed=0.jsonl.gz of another configuration (train.lr)" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("dpo.arms.source_digest", lambda: "0123")
        assert sweep.main([*elsewhere, *SWEPT, results]) == 2
        assert "begun by other sources" in capsys.readouterr().err
    arms = json.loads(before["arms.json"])
    arms["arms"][0]["read"]["test_rows"] = "others"
    (folder / "arms.json").write_text(json.dumps(arms))
    assert sweep.main([*elsewhere, *SWEPT, results]) == 2
    assert "loss.beta=0.1,seed=0.jsonl.gz was finished with other test rows" in capsys.readouterr().err
    del arms["arms"][0]["config"]  # as before it was kept
    (folder / "arms.json").write_text(json.dumps(arms))
    assert sweep.main([*elsewhere, *SWEPT, results, "source=any"]) == 2
    assert "loss.beta=0.1,seed=0.jsonl.gz without its configuration" in capsys.readouterr().err
    assert json.loads((folder / "arms.json").read_text()) == arms

    (folder / "arms.json").write_bytes(before["arms.json"])
    (folder / "loss.beta=0.5,seed=1.jsonl.gz").unlink()
    assert sweep.main([*elsewhere, *SWEPT, results, "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:7].strip() for line in lines] == ["kept", "kept", "kept", "to run"]
    assert last.startswith("4 arms, 1 to finish, about ")
    started: list[list[str]] = []

    def fail(command: list[str], **more: object) -> "subprocess.CompletedProcess[str]":
        started.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    assert sweep.main([*elsewhere, *SWEPT, results]) == 1
    assert [[word for word in command if word.startswith(("loss.beta=", "seed="))] for command in started] == [
        ["loss.beta=0.5", "seed=1"]
    ]
    assert len(json.loads((folder / "arms.json").read_text())["arms"]) == 3


def test_a_run_begun_before_a_key_was_there_has_its_default(finished: list[str]) -> None:
    arm = load_sweep([*finished, *SWEPT])[0]
    folder = sweep.finished_folder(arm)
    assert folder
    path = folder / "config.json"
    before = path.read_text()
    config = json.loads(before)
    assert config["judge"].pop("self_preference") is False and config["train"].pop("lr") == 1e-2
    try:
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"configuration: train.lr was [\d.e-]+, is 0.01\. "):
            sweep.finished_folder(arm)
    finally:
        path.write_text(before)


def test_who_looks_whether_an_arm_is_finished_is_told_nothing_of_keys_that_may_differ(
    finished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arm = load_sweep([*finished, *SWEPT, "log.project=other"])[0]
    assert sweep.finished_folder(arm) and not capsys.readouterr().out


def test_the_primary_readout_is_the_contrasts_or_one_of_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lines, told in (
        (['primary = "nice"'], "one of averaged; consistent; "),
        (['primary = "likelihood"'], "needs judge.rewards"),
        (['primary = "consistent"', '[sweep.contrast]\na = "ipo"\nb = "plain"\nreadout = "averaged"'], 'be "averaged"'),
    ):
        given = arms_file(tmp_path / "e.toml")
        text = (tmp_path / "e.toml").read_text().replace("[sweep]", "[sweep]\n" + lines[0])
        (tmp_path / "e.toml").write_text("\n".join([text, *lines[1:]]))
        assert sweep.main([*given, f"run.root={tmp_path / 'runs'}"]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_two_sweeps_never_share_a_folder(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with sweep.locked(home_of(finished)):
        assert sweep.main([*finished, *SWEPT]) == 2
    assert "a sweep, or an arm of one, runs there" in capsys.readouterr().err


def test_ctrl_c_ends_the_arm_whole_starts_no_other_and_leaves_the_verdicts_of_those_before(
    tmp_path: Path, finished: list[str]
) -> None:
    given = {argument.partition("=")[0]: argument for argument in finished}
    given |= {"run.root": f"run.root={tmp_path}", "train.max_steps": "train.max_steps=0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo.sweep", *given.values(), "sweep.train.epochs=1,500,501"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("smoke-sweep/train.epochs=500/smoke/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "the same command goes on" in err
    assert (
        out.count(": begins") == 2 and len(list(tmp_path.glob("smoke-sweep/*00/smoke/latest/checkpoints/step-*"))) == 1
    )
    kept, settings = read_kept(tmp_path / "smoke-sweep" / "results")
    assert [arm["setting"] for arm in kept["arms"]] == ["train.epochs=1"] and "train.epochs=1" in settings


def test_a_broken_line_of_verdicts_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_text('{"judge": "base"}\n')
    with pytest.raises(UserError, match="verdicts.jsonl:1: no verdict"):
        read_verdicts(tmp_path / "verdicts.jsonl")
