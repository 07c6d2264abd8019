"""python -m dpo.study: whole on a tiny model and a scripted endpoint; the same command again does nothing twice."""

import json
from pathlib import Path

import pytest
from judge_server import Reply, completion, serving

from dpo.rows import Row, write_rows
from dpo.settings import load_sweep
from dpo.study import main

TINY = ["model.path=tiny-random", "pack.tokens=1024", "train.max_steps=1", "lora.rank=2", "log.plots=false"]
TINY += ["judge.blind_control=false", "data.rows=8", "dtype=fp32"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's arguments, of 40 rows in two subsets."""
    rows = [
        Row(
            f"r{i}",
            ("Math", "Focus")[i % 2],
            ({"role": "user", "content": f"{i} + {i}?"},),
            (f"{2 * i}",),
            ("77",),
            f"g{i}",
        )
        for i in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_KEY", "sk-mine")
    monkeypatch.delenv("NO_KEY", raising=False)
    return ["exp=study", f"data.path={tmp_path / 'rows.jsonl'}", f"run.root={tmp_path / 'runs'}", *TINY]


def right(body: dict, before: int) -> Reply:
    """A judge that shuns 77."""
    text = body["messages"][-1]["content"]
    return completion("B" if text.partition("Answer A: ")[2].startswith("77") else "A")


def test_a_study_trains_asks_and_reports_and_does_nothing_twice(study: list[str], tmp_path: Path, capsys) -> None:
    with serving(right) as served:
        endpoints = [f"judge-1 {served.url} MY_KEY seed=3", f"other {served.url} NO_KEY"]
        command = [*study, f"study.endpoints={json.dumps(endpoints)}"]
        assert main(command) == 0
        told = capsys.readouterr().out
        assert "other: left out, for the environment has no NO_KEY" in told
        asked = served.asked.total()
        assert served.keys == {"Bearer sk-mine"} and all(json.loads(body)["seed"] == 3 for body in served.asked)
        report = json.loads((tmp_path / "runs" / "study" / "report.json").read_text())
        n = {of["n"] for of in report["judges"].values()}
        assert n == {6} and asked == 2 * 2 * 6  # both orders, both sights
        assert set(report["judges"]) == {
            *(f"base, judge.sighted={sighted}" for sighted in ("true", "false")),
            *(f"judge-1, judge.sighted={sighted}" for sighted in ("true", "false")),
            *(
                f"trained, objective={objective}, judge.sighted={sighted}"
                for objective in ("verdicts", "responses")
                for sighted in ("true", "false")
            ),
        }
        assert report["judges"]["judge-1, judge.sighted=true"]["accuracy"] == 1.0
        shown = [json.loads(body)["messages"][-1]["content"] for body in served.asked]
        assert sum("+" in text for text in shown) == asked / 2
        before = sorted((tmp_path / "runs").rglob("results.json"))
        assert len(before) == 6 and main(command) == 0
        assert sorted((tmp_path / "runs").rglob("results.json")) == before and served.asked.total() == asked


def test_one_model_in_two_ways_is_two_judges_and_each_is_held_to_the_product_that_asked_it(
    study: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(right) as served:
        endpoints = [f"judge-1 {served.url} temperature={value}" for value in (0, 1)]
        command = [*study, "sweep.objective=verdicts", "sweep.judge.sighted=true"]
        command.append(f"study.endpoints={json.dumps(endpoints)}")
        assert main(command) == 0
    judges = json.loads((tmp_path / "runs" / "study" / "report.json").read_text())["judges"]
    assert len(judges) == 4 and sum(name.startswith("judge-1") for name in judges) == 2
    assert {json.loads(body)["temperature"] for body in served.asked} == {0, 1}
    capsys.readouterr()
    monkeypatch.setattr("dpo.arms.source_digest", lambda: "0123")
    assert main(command) == 2 and "judge-1-1, judge-1.2-1: begun by other sources" in capsys.readouterr().err


def test_an_endpoint_that_cannot_be_meant_is_told_before_anything_runs(
    study: list[str], tmp_path: Path, capsys
) -> None:
    for said in ("gpt-5.2", "gpt-5.2 api.openai.com", "gpt-5.2 http://x/v1 MY_KEY a-b=2"):
        assert main([*study, f"study.endpoints={said}"]) == 2
        assert "MODEL URL [KEY_VARIABLE]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_endpoint_that_fails_is_left_out_of_the_report(study: list[str], tmp_path: Path, capsys) -> None:
    with serving(right) as served:
        gone = served.url
    command = [*study, "sweep.objective=verdicts", "sweep.judge.sighted=true", f"study.endpoints=judge-1 {gone}"]
    assert main([*command, "endpoint.max_retries=0"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "runs" / "study" / "report.json").read_text())["judges"]) == {"base", "trained"}


def test_the_large_study_is_one_override_away() -> None:
    small, large = (
        load_sweep([f"exp={name}", "data.path=x"] if name == "study" else [f"exp={name}"])
        for name in ("study", "study-large")
    )
    assert [arm.varied for arm in small] == [arm.varied for arm in large] and len(large) == 4
    assert large[0].config.model.path == "openai/gpt-oss-120b" and large[0].config.data.path == "allenai/reward-bench-2"
