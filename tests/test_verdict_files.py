"""Verdicts in the shapes of others: checked by their own rules, written apart."""

import json
from pathlib import Path

import pytest
from judge_server import Reply, completion
from test_asked import by_endpoint, data, judge, letter, longer  # noqa: F401

from dpo import export, train
from dpo.judge.local import read_verdicts


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sometimes_lost(body: dict, before: int) -> Reply:
    """Prefers the longer answer; of one request it never says which, of another only in one order."""
    text = body["messages"][-1]["content"]
    a = text.partition("Answer A: ")[2]
    lost = "3 + 3?" in text or ("5 + 5?" in text and a.startswith("It is"))
    return completion("I cannot say. \ud83d") if lost else longer(body, before)


def test_the_services_rows_keep_its_rules(data: Path) -> None:  # noqa: F811
    _, results, folder = by_endpoint(data, sometimes_lost)
    assert export.main([str(folder), "--verdicts=together"]) == 0
    rows = {row["id"]: row for row in lines(folder / "together-judge-1.jsonl")}
    assert len(rows) == 10
    for row in rows.values():
        raw = {"original": row["judge_raw_output_original"], "flipped": row["judge_raw_output_flipped"]}
        said = {order: letter(text) for order, text in raw.items()}
        assert row["choice_original"] == said["original"]
        assert row["choice_flipped"] == {"A": "B", "B": "A", None: None}[said["flipped"]]
        assert row["is_invalid_judge_output"] == (None in said.values())
    assert (rows["row-0"]["final_decision"], rows["row-0"]["evaluation_successful"]) == ("A", True)
    assert (rows["row-8"]["final_decision"], rows["row-8"]["choice_flipped"]) == ("B", "B")
    assert rows["row-5"]["final_decision"] == "A" and rows["row-5"]["choice_original"] is None
    assert (rows["row-3"]["final_decision"], rows["row-3"]["evaluation_successful"]) == (None, False)
    decided = sum(row["final_decision"] == "A" and not row["is_invalid_judge_output"] for row in rows.values())
    assert decided == results["judge"]["judge-1"]["wins"]
    assert rows["row-0"]["MODEL_TO_EVALUATE_OUTPUT_A"] == "It is 0." and rows["row-0"]["prompt"] == "0 + 0?"


def flip(decision: str) -> str:
    return {"A>B": "B>A", "B>A": "A>B"}.get(decision, decision)


def test_judgebenchs_rows_give_its_own_score(data: Path) -> None:  # noqa: F811
    """Its rule as its repository has it: +1 a game for the label, -1 for the opposite, the second game flipped back."""
    code, _, folder = judge(data, "model.path=tiny-random", "dtype=fp32", "data.format=ours")
    assert code == 0 and export.main([str(folder), "--verdicts=judgebench"]) == 0
    rows = lines(folder / "judgebench-tiny-random.jsonl")
    [verdicts] = read_verdicts(folder / "verdicts.jsonl").values()
    for row, verdict in zip(rows, verdicts, strict=True):
        games = [one["decision"] for one in row["judgments"]]
        counter = sum((d == row["label"]) - (d == flip(row["label"])) for d in (games[0], flip(games[1])))
        assert (counter > 0) == (
            (verdict.first > 0) + (verdict.second < 0) > (verdict.first < 0) + (verdict.second > 0)
        )
        first, second = (one["judgment"]["prompt"] for one in row["judgments"])
        assert f"Answer A: {row['response_A']}" in first and f"Answer A: {row['response_B']}" in second


def test_an_unreadable_game_is_null(data: Path) -> None:  # noqa: F811
    _, _, folder = by_endpoint(data, sometimes_lost)
    assert export.main([str(folder), "--verdicts=judgebench"]) == 0
    rows = {row["pair_id"]: row for row in lines(folder / "judgebench-judge-1.jsonl")}
    assert rows["row-3"]["judgments"] == [None, None] and rows["row-5"]["judgments"][0] is None
    assert rows["row-5"]["judgments"][1]["decision"] == "B>A"


@pytest.mark.parametrize(("fault", "told"), [("rows", "cannot be read again"), ("protocol", "has no two orders")])
def test_what_cannot_be_written_is_told(data: Path, capsys, fault: str, told: str) -> None:  # noqa: F811
    more = ["judge.protocol=rate"] if fault == "protocol" else []
    _, _, folder = judge(data, "model.path=tiny-random", "dtype=fp32", *more)
    if fault == "rows":
        data.unlink()
    assert export.main([str(folder), "--verdicts=together"]) == 2
    assert told in capsys.readouterr().err and not [*folder.glob("together*")]


def test_a_sighted_control_is_told_with_the_request_that_it_saw(tmp_path: Path) -> None:
    places = [f"run.root={tmp_path / 'runs'}", f"run.cache={tmp_path / 'cache'}", "train.max_steps=1"]
    assert train.main(["exp=smoke", *places, "judge.sighted=false", "judge.sighted_control=true"]) == 0
    folder = tmp_path / "runs" / "smoke" / "latest"
    assert export.main([str(folder), "--verdicts=judgebench"]) == 0
    for role, seen in (("sighted", True), ("trained", False)):
        for row in lines(folder / f"judgebench-{role}.jsonl"):
            prompts = [one["judgment"]["prompt"] for one in row["judgments"]]
            assert [row["question"] in prompt for prompt in prompts] == [seen, seen]
    assert {path.name for path in folder.glob("judgebench-*")} == {
        f"judgebench-{role}.jsonl" for role in ("base", "trained", "sighted")
    }
