"""dpo/alarms.py: each alarm shows where it should and only there, once, and the same after a resume; a run tells it."""

import json
import math
import shutil

import pytest
import torch
from test_reference import Runs, write_small_rows

import dpo.train
from dpo.alarms import ALARMS, WINDOW, Line, Watch, alarms_of, told
from dpo.config import Config
from dpo.distributed import Ranks, without_gradient
from dpo.loop import STEP0_TOLERANCE
from dpo.policy import load_policy

STEPS = 6 * WINDOW
CONFIG = Config(exp="test")


def healthy(step: int) -> Line:
    """Of a run that learns: chosen up, rejected down, every other step's accuracy a little higher."""
    done = step / STEPS
    line = {"step": step, "epoch": done, "loss": 0.69 - 0.2 * done, "lr": 1e-4, "grad_norm": 0.5 + 0.2 * (step % 3)}
    rewards = {"rewards/chosen": 0.5 * done, "rewards/rejected": -0.5 * done}
    return line | rewards | {"rewards/accuracies": 0.5 + 0.4 * done + 0.1 * (step % 2), "without_gradient": 0.0}


SICK = {
    "both_rewards_fall": lambda step: {"rewards/chosen": -0.002 * step, "rewards/rejected": -0.005 * step},
    "far_from_reference": lambda step: {"rewards/chosen": 0.2 * step, "rewards/rejected": -0.3 * step},
    "accuracy_at_chance": lambda step: {"rewards/accuracies": 0.5 + 0.06 * (-1) ** step},
    "gradient_spike": lambda step: {"grad_norm": 9.0} if step == 50 else {},
    "always_clipped": lambda step: {"grad_norm": 12.0 + step % 2},
    "without_gradient": lambda step: {"without_gradient": 2.0},
    "reference_drift": lambda step: {"reference_difference": 1e-3} if step == 1 else {},
}


def raised(lines: list[Line], config: Config = CONFIG, kept: int = 0) -> list[tuple[str, int, float]]:
    """What a run with these lines is told, of which the first `kept` were written before it was resumed."""
    written: list[Line] = []
    watch = Watch(config)
    for number, line in enumerate(lines):
        if kept and number == kept:
            watch = Watch(config, json.loads(json.dumps(written)))
        written.append(line)
        figures = {name: value for name, value in line.items() if name != "step"}
        written += [
            {"step": alarm["step"], f"alarm/{alarm['name']}": alarm["value"]}
            for alarm in watch.after(int(line["step"]), figures)
        ]
    return [(alarm["name"], alarm["step"], alarm["value"]) for alarm in alarms_of(written)]


def test_a_run_that_learns_raises_none():
    assert raised([healthy(step) for step in range(1, STEPS + 1)]) == []


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_shows_once_and_alone_and_the_same_wherever_the_run_was_resumed(name):
    lines = [healthy(step) | SICK[name](step) for step in range(1, STEPS + 1)]
    whole = raised(lines)
    assert [alarm[0] for alarm in whole] == [name] and math.isfinite(whole[0][2])
    for kept in (1, WINDOW - 1, WINDOW, 2 * WINDOW + 7, whole[0][1], STEPS - 1):
        assert raised(lines, kept=kept) == whole


def test_every_alarm_has_a_sick_run_here_and_says_what_it_means_and_what_to_try():
    assert SICK.keys() == ALARMS.keys()
    for name in ALARMS:
        (alarm,) = alarms_of([{"step": 3, f"alarm/{name}": 0.123}])
        line = told(alarm)
        assert line.startswith(f"alarm: {name} after step 3: 0.123 ") and "Try: " in line and "\n" not in line


def test_a_judge_that_learns_late_is_not_called_stuck_and_one_at_chance_is_when_two_thirds_are_over():
    late = [healthy(s) | {"rewards/accuracies": 0.5 if s < STEPS * 0.6 else 0.8} for s in range(1, STEPS + 1)]
    assert raised(late) == []
    stuck = [healthy(s) | SICK["accuracy_at_chance"](s) for s in range(1, STEPS + 1)]
    assert raised(stuck)[0][1] == STEPS * 2 // 3
    short = Config(exp="test", train={"epochs": 5, "max_steps": STEPS})
    assert raised(stuck, short)[0][1] == STEPS * 2 // 3


def test_a_loss_without_reference_is_told_nothing_about_log_ratios():
    simpo = Config(exp="test", loss={"name": "simpo"})
    names = ("both_rewards_fall", "far_from_reference", "accuracy_at_chance")
    lines = [healthy(step) | {"rewards/chosen": -9.0 * step, "rewards/rejected": -9.0 * step} for step in range(1, 99)]
    assert {name for name, _, _ in raised(lines, simpo)}.isdisjoint(names)
    assert {name for name, _, _ in raised(lines)} == {"both_rewards_fall", "far_from_reference"}


def test_a_difference_that_is_no_number_is_a_drift_and_the_tolerance_is_that_of_step_0():
    assert raised([healthy(1) | {"reference_difference": math.nan}])[0][0] == "reference_drift"
    assert raised([healthy(1) | {"reference_difference": STEP0_TOLERANCE}]) == []


def test_a_parameter_counts_as_moved_once_one_rank_has_a_gradient_of_it(monkeypatch):
    named = {name: torch.nn.Parameter(torch.zeros(3)) for name in ("none", "zero", "here", "there")}
    for name, value in (("zero", 0.0), ("here", 1e-30), ("there", 0.0)):
        named[name].grad = torch.full((3,), value)
    monkeypatch.setattr("dpo.distributed.gather", lambda items, ranks: [*items, "there"])
    assert without_gradient(named, Ranks(0, 2, torch.device("cpu"))) == ["none", "zero"]


# --- whole commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_tells_of_a_parameter_that_never_gets_a_gradient_and_of_no_other(tmp_path, monkeypatch, capsys, rank):
    """On stderr, in metrics.jsonl, in results.json by name, in the report; and once though it is resumed."""
    write_small_rows(tmp_path / "rows.jsonl")
    runs = Runs(tmp_path, [])
    settings = (f"lora.rank={rank}", "train.max_steps=8", "train.batch_pairs=2", "train.checkpoint_every_steps=2")
    assert runs.results(*settings)["alarms"] == []

    def with_a_spare(*given):
        policy = load_policy(*given)
        policy.spare = torch.nn.Parameter(torch.ones(4))
        return policy

    monkeypatch.setattr("dpo.train.load_policy", with_a_spare)
    capsys.readouterr()
    (alarm,) = runs.results(*settings)["alarms"]
    told_to = capsys.readouterr().err
    assert told_to.count("alarm: without_gradient after step 5: 1 trained parameters") == 1
    assert (alarm["name"], alarm["step"], alarm["value"]) == ("without_gradient", 5, 1) and "(spare)" in alarm[
        "meaning"
    ]
    folder = tmp_path / "runs" / "smoke" / "latest"
    lines = (folder / "metrics.jsonl").read_text()
    assert lines.count('"alarm/without_gradient": 1') == 1
    report = (folder / "report.md").read_text()
    assert "## Alarms" in report and "(spare)" in report and "Try: check that lora.targets" in report

    (folder / "checkpoints" / "finished.json").unlink()
    for step, again in ((6, 0), (2, 1)):  # resumed behind the alarm and before it
        for path in (folder / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        assert dpo.train.main(runs.argv(*settings, "run.resume=latest")) == 0
        (folder / "checkpoints" / "finished.json").unlink()
        assert capsys.readouterr().err.count("alarm: ") == again
        assert json.loads((folder / "results.json").read_text())["alarms"] == [alarm]
