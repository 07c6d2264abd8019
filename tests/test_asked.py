"""Written verdicts are read strictly (dpo/judge/asked.py); python -m dpo.judge judges a file by model or endpoint."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import Reply, Script, completion, fault, serving

from dpo.config import Config
from dpo.inputs import load_splits
from dpo.judge.__main__ import main
from dpo.judge.asked import verdict_odds
from dpo.judge.endpoint import Answer
from dpo.judge.local import read_verdicts
from dpo.judge.prompts import COMPARE, judge_messages
from dpo.rows import Row, read_rows, write_rows
from dpo.settings import load_config
from models.errors import UserError

ROWS = [
    Row(
        f"row-{i}",
        "Focus" if i % 2 else "Math",
        ({"role": "user", "content": f"{i} + {i}?"},),
        (c,),
        (r,),
        f"group {i}",
    )
    for i, (c, r) in enumerate(
        [(f"It is {2 * i}.", f"{i}") for i in range(8)] + [("8", "It may be 44."), ("9", "No idea.")]
    )
]  # the chosen answer is the longer one in 8 of 10


def said(text: str, *tokens: tuple[str, dict[str, float]], finish: str = "stop") -> Answer:
    return Answer(text, finish, tokens, 0, 0, "", 0.0)


def letter(text: str) -> str | None:
    odds = verdict_odds(said(text))
    return None if math.isnan(odds) else "A" if odds > 0 else "B"


@pytest.mark.parametrize(
    "text",
    [
        "A",
        " A\n",
        "A.",
        "**A**",
        "[[A]]",
        "(A)",
        "Answer A",
        "Answer: A",
        "The better answer is A.",
        "Better answer: **A**",
    ]
    + ["The first one is right, so [[A]].", "[[B]] is how it ends, but\n[[A]] is right: [[A]]"]
    + ["**Answer B:**\nIt is 4.\n\n**Answer A:**\nIt is 5.\n\nBetter answer: A", "Answer A\n\nIt is right."]
    + ["A\n\nAnswer B adds three numbers.", "B looks right, but\nA is.\n\nVerdict: A", "Winner: __A__", "verdict - A"],
)
def test_a_letter_on_the_first_or_the_last_line_is_a_verdict(text: str) -> None:
    assert letter(text) == "A"
    assert letter(re.sub("[AB](?![a-z])", lambda found: "B" if found[0] == "A" else "A", text)) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "a",
        "AB",
        "A or B",
        "A/B",
        "Both",
        "Tie",
        "C",
        "I think A",
        "As an AI I cannot",
        "A\nB",
        "Answer A is good.",
    ]
    + ["### Answer A\nBad.\n### Answer B\nGood.\nI prefer the second.", "**Answer A:**\nIt says that"]
    + ["x\nA\ny", "Not A", "A and B are equal", "[[A]] or [[B]]", "ВА", "Answer:", "The answer is a"],
)
def test_anything_else_is_none(text: str) -> None:
    assert letter(text) is None


def test_an_answer_that_was_not_had_is_no_verdict_whatever_its_text() -> None:
    assert math.isnan(verdict_odds(said("A", finish="error")))


def logs(**shares: float) -> dict[str, float]:
    return {name.replace("_", " "): math.log(share) for name, share in shares.items()}


def test_odds_are_those_of_the_tokens_in_the_verdicts_place() -> None:
    top = logs(A=0.6, _A=0.1, B=0.2, The=0.1)
    assert verdict_odds(said("A", ("A", top))) == pytest.approx(math.log(0.7 / 0.2))
    assert verdict_odds(said("B", ("B", logs(A=0.25, B=0.75)))) == pytest.approx(math.log(1 / 3))
    thought = [("So", {}), (" A", logs(_A=0.9, _B=0.1)), ("?", {})]  # a server may list the tokens of a thought too
    verdict = [("Answer", {}), (":", {}), (" B", logs(_B=0.8, _A=0.2)), ("<|end|>", {})]
    assert verdict_odds(said("Answer: B", *thought, *verdict)) == pytest.approx(math.log(0.25))
    assert verdict_odds(said("A", ("A", {}))) == 1 and verdict_odds(said("B")) == -1
    assert verdict_odds(said("A", ("something else", top))) == 1
    half = [("\\xf0\\x9f", {}), ("\\x98\\x80", {}), (" Answer", {}), (" A", logs(_A=0.99))]  # of one character
    joined = said("😀 Answer A is not right:\nB", *half, (" is not right:\n", {}), ("B", logs(B=0.9, A=0.1)))
    assert verdict_odds(joined) == -1  # not those of the A that stands where B does in the text


def test_a_letter_that_is_not_named_is_as_likely_as_it_can_be() -> None:
    assert verdict_odds(said("A", ("A", logs(A=0.9, The=0.08)))) == pytest.approx(math.log(0.9 / 0.02))  # of the rest
    assert verdict_odds(said("B", ("B", logs(B=0.5, The=0.1)))) == pytest.approx(math.log(0.1 / 0.5))  # as the least
    assert math.isfinite(verdict_odds(said("A", ("A", {"A": 0.0}))))


# ---- the command line


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dpo.judge.endpoint.BACKOFF_S", 0.01)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def judge(data: Path, *more: str) -> tuple[int, dict, Path]:
    runs = data.parent / "runs"
    code = main([f"data.path={data}", f"run.root={runs}", *more])
    folder = runs / "judge" / "latest"
    return code, json.loads((folder / "results.json").read_text()) if folder.exists() else {}, folder


def by_endpoint(data: Path, script: Script, *more: str) -> tuple[int, dict, Path]:
    with serving(script) as served:
        return judge(data, f"endpoint.url={served.url}", "endpoint.model=judge-1", *more)


def longer(body: dict, before: int) -> Reply:
    """A judge that prefers the longer answer, and knows nothing of log-probs."""
    a, b = body["messages"][-1]["content"].partition("Answer A: ")[2].split("\n\nBetter")[0].split("\n\nAnswer B: ")
    return completion("A" if len(a) > len(b) else "B")


def test_a_file_is_judged_by_an_endpoint_into_a_run_folder(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results, folder = by_endpoint(data, longer)
    summary = results["judge"]["judge-1"]
    assert code == 0 and (summary["n"], summary["wins"], summary["losses"], summary["invalid"]) == (10, 8, 2, 0)
    assert set(summary["subsets"]) == {"Focus", "Math"}
    assert results["endpoint"]["prompt_tokens"] == 2000 and results["data"]["rows"]["test"] == 10
    [verdict, *_] = read_verdicts(folder / "verdicts.jsonl")["judge-1"]
    assert (verdict.id, verdict.pair, verdict.first, verdict.second) == ("row-0", (0, 0), 1.0, -1.0)
    [answer, *_] = (json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines())
    assert answer == {"id": "row-0", "question": 0, "text": "A"}
    assert json.loads((folder / "config.json").read_text())["endpoint"]["model"] == "judge-1"
    assert json.loads((folder / "env.json").read_text())["packages"]
    assert "judge-1: order-averaged accuracy 80.0 %" in capsys.readouterr().out


def test_a_judge_that_always_says_a_ties_every_pair(data: Path) -> None:
    _, results, _ = by_endpoint(data, lambda body, before: completion("A"))
    summary = results["judge"]["judge-1"]
    assert (summary["ties"], summary["accuracy"], summary["averaged_accuracy"]) == (10, 0.0, 0.5)


def test_a_blind_judge_is_not_sent_the_request(data: Path) -> None:
    sent: list[str] = []
    by_endpoint(data, lambda body, before: sent.append(json.dumps(body)) or longer(body, before), "judge.sighted=false")
    assert len(sent) == 20 and not any("Request:" in text or "+" in text for text in sent)


def test_a_refused_run_leaves_no_folder_and_the_same_command_goes_on(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    credit = [7]

    def while_there_is_credit(body: dict, before: int) -> Reply:
        credit[0] -= 1
        return longer(body, before) if credit[0] >= 0 else fault(402, "Insufficient balance")

    with serving(while_there_is_credit) as served:
        arguments = (f"endpoint.url={served.url}", "endpoint.model=judge-1", "endpoint.concurrency=1")
        code, results, _ = judge(data, *arguments)
        told = capsys.readouterr().err
        assert code == 2 and results == {} and "no credit left" in told and "7 of 20 answers are kept" in told
        credit[0] = 13
        code, results, _ = judge(data, *arguments)
    assert (code, credit[0]) == (0, 0) and (results["endpoint"]["found"], results["judge"]["judge-1"]["wins"]) == (7, 8)


def test_ctrl_c_keeps_what_is_answered_and_the_same_command_goes_on(data: Path) -> None:
    with serving(lambda body, before: Reply(longer(body, before).body, delay_s=0.3)) as served:
        arguments = [f"data.path={data}", f"run.root={data.parent / 'runs'}", "endpoint.concurrency=2"]
        arguments += [f"endpoint.url={served.url}", "endpoint.model=judge-1"]
        command = [sys.executable, "-m", "dpo.judge", *arguments]
        client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while served.answered.total() < 4 and client.poll() is None:
            time.sleep(0.01)
        client.send_signal(signal.SIGINT)
        told = client.communicate()[1]
        kept = served.answered.total()
        assert client.returncode == 130 and 4 <= kept < 20
        assert f"interrupted: {kept} of 20 answers are kept in " in told and "the same command goes on" in told
        assert not (data.parent / "runs").exists()
        assert main(arguments) == 0 and served.asked.total() == 20


def test_an_endpoint_that_serves_the_model_gives_its_verdicts(data: Path) -> None:
    """The local maker's log-odds, sent as a server would, are read back as the same verdicts and the same figures."""
    code, local, folder = judge(data, "model.path=tiny-random", "dtype=fp32")
    assert code == 0
    [(name, verdicts)] = read_verdicts(folder / "verdicts.jsonl").items()
    odds: dict[str, float] = {}
    for verdict, row in zip(verdicts, ROWS, strict=True):
        for first, second, value in (
            (row.chosen[0], row.rejected[0], verdict.first),
            (row.rejected[0], row.chosen[0], verdict.second),
        ):
            odds[judge_messages(row.prompt, (first, second), COMPARE)[1]["content"]] = value

    def serve(body: dict, before: int) -> Reply:
        value = odds[body["messages"][1]["content"]]
        return completion("A" if value > 0 else "B", {"A": -3.0 + value, "B": -3.0, "The": -0.5})

    code, remote, folder = by_endpoint(data, serve)
    again = read_verdicts(folder / "verdicts.jsonl")["judge-1"]
    for side in ("first", "second"):
        assert [vars(v)[side] for v in again] == pytest.approx([vars(v)[side] for v in verdicts])
    assert code == 0 and remote["judge"]["judge-1"] == local["judge"][name] and name == "tiny-random"
    assert "endpoint" not in local and not (folder.parent / "answers.jsonl").exists()


def test_all_rows_are_judged_or_those_that_a_training_would_judge(data: Path) -> None:
    config = load_config(["exp=verdicts", f"data.path={data}"])
    assert isinstance(config, Config)
    trained = load_splits(config)
    assert 0 < len(trained.test) < 10
    whole = load_splits(config, judging=True)
    assert {row.id for row in whole.test} == {row.id for row in read_rows(data)} and whole.train == ()
    test = load_splits(load_config(["exp=verdicts", f"data.path={data}", "judge.split=test"]), judging=True)
    assert test.test == trained.test and test.train == test.validation == ()
    none = ["exp=verdicts", f"data.path={data}", "data.test_fraction=0", "judge.rows=4"]
    for given in (none, [*none, "judge.split=test"]):  # whoever reads these says that there are no test rows
        assert load_splits(load_config(given), judging=len(given) > len(none)).test == ()


@pytest.mark.parametrize("protocol", ["choose", "ties"])
def test_what_is_held_out_does_not_hang_on_what_a_protocol_asks(tmp_path: Path, protocol: str) -> None:
    rows = [
        Row(name, subset, ({"role": "user", "content": name},), ("yes",), ("a", "b", "c"), name)
        for i in range(40)
        for name, subset in ((f"r{i}", "Math"), (f"ref:{i}", "Ties"))
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = ["exp=verdicts", f"data.path={tmp_path / 'rows.jsonl'}", f"run.cache={tmp_path}"]
    held_out = {row.id for row in load_splits(load_config(given)).test}
    asked = load_splits(load_config([*given, "judge.split=test", f"judge.protocol={protocol}"]), judging=True).test
    assert {row.id for row in asked} == {name for name in held_out if name.startswith("ref:") is (protocol == "ties")}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["endpoint.url=http://x/v1"], "set both"),
        (["endpoint.model=x"], "set both"),
        (["endpoint.url=x:8000/v1", "endpoint.model=x"], r"must be http\(s\)"),
        (["endpoint.url=http://x:80a0/v1", "endpoint.model=x"], r"must be http\(s\)"),
        (["endpoint.url=http:///v1", "endpoint.model=x"], r"must be http\(s\)"),
        (["endpoint.url=http://x/v1/chat/completions", "endpoint.model=x"], "ends before /chat/completions"),
        (["endpoint.top_logprobs=21"], "a whole number >= 0, <= 20"),
    ],
)
def test_an_endpoint_that_cannot_be_meant_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(["exp=judge", *arguments])


def test_help_tells_the_commands_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "python -m dpo.judge" in told and "endpoint.max_cost" in told
    assert main(["endpoint.modle=x"]) == 2 and "did you mean endpoint.model?" in capsys.readouterr().err
