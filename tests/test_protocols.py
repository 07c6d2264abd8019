"""Protocols (dpo/judge/protocols.py): replies of models and endpoints, their verdicts and scores."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judge_server import Reply, completion, serving

from dpo.judge.__main__ import main
from dpo.judge.asked import written_label
from dpo.judge.endpoint import Answer
from dpo.judge.prompts import asked_by, chosen_slot, read_template
from dpo.judge.protocols import PROTOCOLS, ratings, replies_of, verdicts_of
from dpo.judged import judges_of, read_run, reasons
from dpo.report import write_report
from dpo.rows import Row, read_rows, write_rows
from dpo.train import main as train
from dpo.trees import Completion, Tree, TreeSettings, verdict_tree
from models.errors import UserError
from models.tokenizer import load_tokenizer

NAN = float("nan")


def request(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def settings(protocol: str, template: str = "", pairs_per_row: int = 0) -> TreeSettings:
    how = {"protocol": protocol, "template": read_template(template, protocol)}
    return TreeSettings("verdicts", pairs_per_row, "pair", 2048, **how)


FOUR = [Row(f"r{i}", "ab"[i % 2], request(f"{i}?"), ("right",), ("w1", "w2", "w3"), f"g{i}") for i in range(4)]


def test_choose_scores_the_right_slot_and_a_quarter_for_no_reply() -> None:
    how = settings("choose")
    replies = []
    for row, said in zip(FOUR, ["right", "wrong", "nothing", "in words"], strict=True):
        slot = chosen_slot(row, 0)
        reply_L = np.array([-3.0] * 4) if said != "in words" else np.array([-math.inf] * 4)
        reply_L[slot if said != "wrong" else (slot + 1) % 4] = -0.5 if said != "in words" else 0.0
        replies.append(np.array([reply_L]) if said != "nothing" else np.full((1, 4), NAN))
    verdicts = verdicts_of(FOUR, replies, how)
    assert [(v.first, v.second) for v in verdicts[:2]] == [(2.5, -2.5), (-2.5, 2.5)]
    assert math.isnan(verdicts[2].first) and (verdicts[3].first, verdicts[3].second) == (1.0, -1.0)
    score = PROTOCOLS["choose"].score
    assert score and score(FOUR, replies, how) == {"a": (1 + 0.25) / 2, "b": (0 + 1) / 2, "score": (0.625 + 0.5) / 2}


def test_a_rating_is_expected_and_a_class_is_the_probability_to_pass() -> None:
    template = read_template("", "rate")
    reply_QL = np.full((3, 10), -math.inf)
    reply_QL[0, [2, 9]] = np.log([0.3, 0.1])  # of what is a rating at all, three quarters say 3, one quarter 10
    reply_QL[1, 9] = 0.0
    reply_QL[2] = NAN
    assert ratings(template, reply_QL).tolist() == pytest.approx([(3 * 3 + 10) / 4, 10.0, NAN], nan_ok=True)
    good = ratings(read_template("classify", "rate"), np.log([[0.2, 0.6], [0.5, 0.0 + 1e-9]]))
    assert good.tolist() == pytest.approx([0.25, 1.0])


def by_rating(rows: list[Row], given: list[list[int]]) -> list[np.ndarray]:
    one_hot = np.where(np.eye(11)[:, 1:] == 1, 0.0, -math.inf)
    return [np.array([one_hot[rating] if rating else np.full(10, NAN) for rating in row]) for row in given]


def test_rate_gives_verdicts_on_pairs_and_both_of_rewardbench_2s_scores() -> None:
    rows = [
        Row("1", "Math", request("?"), ("c",), ("r1", "r2", "r3"), "g1"),
        Row("2", "Math", request("?"), ("c",), ("r1", "r2", "r3"), "g2"),
        Row("ref:7", "Ties", request("?"), ("c",), ("r",), "g3"),
        Row("tied:7", "Ties", request("?"), ("c1", "c2"), ("r",), "g3"),
    ]
    replies = by_rating(rows, [[8, 8, 1, 1], [5, 9, 1, 0], [9, 4], [9, 8, 5]])
    how = settings("rate")
    verdicts = verdicts_of(rows, replies, how)
    assert [v.first for v in verdicts[:3]] == [0.0, 7.0, 7.0] and [v.second for v in verdicts[3:5]] == [4.0, -4.0]
    assert math.isnan(verdicts[5].first) and [v.pair for v in verdicts[7:]] == [(0, 0), (1, 0)]
    assert [v.first for v in verdicts[7:]] == [4.0, 3.0]
    score = PROTOCOLS["rate"].score
    ties = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(3 - 1)
    assert score and score(rows, replies, how) == pytest.approx(
        {"Math": (1 / 2 + 0) / 2, "Ties": ties, "score": (0.25 + ties) / 2}
    )
    assert len(verdicts_of(rows, replies, settings("rate", pairs_per_row=1))) == 4


# ---- a local model


@pytest.mark.parametrize("folder", ["tiny_folder", "smollm2_folder"])
def test_a_trees_labels_are_scored_where_the_models_reply_begins(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    how = settings("rate")
    tree = verdict_tree(FOUR[0], tokenizer, how)
    labels = [tuple(tokenizer.verdict_ids(label)) for label in how.template.labels]
    assert len(tree.branches) == 4 and len(tree.completions) == 40 and tree.pairs == ()
    longest = max(map(len, labels))
    for place, scored in enumerate(tree.completions):
        branch = tree.branches[scored.branch]
        assert scored.branch == place // 10 and scored.targets == labels[place % 10]
        assert scored.start == len(branch) - longest + 1
        assert branch[scored.start :] == labels[9][:-1]  # what the end of 10 is read behind


def test_the_rating_1_is_where_no_0_follows() -> None:
    # By hand: two labels, 1 and 10, of the tokens (5,) and (5, 6).
    tree = Tree("t", (1,), ((2, 5),), (Completion(0, 1, (5,)), Completion(0, 1, (5, 6))), ())
    reply_QL = replies_of(tree, [np.log([0.5]), np.log([0.5, 0.4])])
    assert np.exp(reply_QL).tolist() == [pytest.approx([0.3, 0.2])]


def test_labels_that_begin_unlike_the_longest_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "words.toml"
    labels = 'labels = ["entirely acceptable", "utterly unusable"]\npassing = ["entirely acceptable"]'
    path.write_text(f"{labels}\nsystem = ''\nuser = '{{{{ prompt }}}} {{{{ answer }}}}'\n")
    template = read_template(str(path), "rate")
    with pytest.raises(UserError, match="must be one token of its own"):
        verdict_tree(FOUR[0], load_tokenizer(tiny_folder), replace(settings("rate"), template=template))


# ---- in words


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("[[A]] or [[B]]? [[C]] it is", None),
        ("So it is [[C]].", "C"),
        ("I weighed all.\n\nBest answer: D", "D"),
        ("**B**", "B"),
        ("A and B", None),
    ]
    + [("", None), ("[[E]]", None), ("Not C", None), ("B says [[B]]: a trick.\n\nBest answer: C", "C")]
    + [("B says [[B]].\nI will not be told.", None), ("B says: Best answer:\nB\nAnd so on.\n[[C]]", "C")],
)
def test_the_only_boxed_letter_of_the_last_line_or_one_on_its_own_is_chosen(text: str, label: str | None) -> None:
    said = written_label(Answer(text, "stop", (), 0, 0, "", 0.0), "ABCD")
    assert (None if math.isnan(said[0]) else "ABCD"[said.index(0.0)]) == label
    assert math.isnan(written_label(Answer("A", "error", (), 0, 0, "", 0.0), "ABCD")[0])


@pytest.mark.parametrize(
    ("text", "rating"),
    [("7", "7"), ("Rating: 10", "10"), ("It is fine.\n\n**Score: 8/10**", "8"), ("[[3]]", "3"), ("11", None)]
    + [("0", None), ("7 of 10 people", None), ("7\n8", None), ("7.5", None), ("8 / 10", "8"), ("Rating - 8", "8")]
    + [("8/5", None), ("-8", None), ("Rating: -8", None), ("**−8**", None)],
)
def test_a_rating_is_a_whole_number_on_a_line_of_its_own(text: str, rating: str | None) -> None:
    labels = read_template("", "rate").labels
    said = written_label(Answer(text, "stop", (), 0, 0, "", 0.0), labels)
    assert (None if math.isnan(said[0]) else labels[said.index(0.0)]) == rating


# ---- the command line


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    ties = [
        Row("ref:1", "Ties", request("A colour? The first."), ("red",), ("dog", "cat"), "ties:1"),
        Row("tied:1", "Ties", request("A colour?"), ("red", "blue"), ("dog", "cat"), "ties:1"),
    ]
    rows = [Row(f"r{i}", "Math", request(f"{i}?"), (f"{i}!",), ("x", "yy", "zzz"), f"g{i}") for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", [*rows, *ties])
    return tmp_path / "rows.jsonl"


def judge(data: Path, *more: str) -> tuple[int, dict]:
    code = main([f"data.path={data}", f"run.root={data.parent / 'runs'}", *more])
    results = data.parent / "runs" / "judge" / "latest" / "results.json"
    return code, json.loads(results.read_text()) if results.exists() else {}


@pytest.mark.parametrize(("protocol", "n"), [("choose", 8), ("rate", 10), ("ties", 2)])
def test_a_local_model_judges_by_every_protocol(
    data: Path, capsys: pytest.CaptureFixture[str], protocol: str, n: int
) -> None:
    code, results = judge(data, "model.path=tiny-random", f"judge.protocol={protocol}", "dtype=fp32")
    assert code == 0 and results["judge"]["tiny-random"]["n"] == n and results["protocol"] == protocol
    summary = results["judge"]["tiny-random"]
    assert summary["invalid"] == 0 and summary["brier"] is None  # no log-odds of a pair
    assert results["answers"] == {"choose": 8, "rate": 8 * 4 + 3 + 4, "ties": 3 + 4}[protocol]
    report = (write_report([data.parent / "runs" / "judge" / "latest"]) / "report.md").read_text()
    assert "Verdicts in both orders" not in report and "## Calibration" not in report
    chance = 25 if protocol == "choose" else 50
    assert f"chance has {chance} %" in report and f"invalid verdicts as guesses, holds {chance} %" in report
    assert "always says A" not in report and "says A" not in capsys.readouterr().out
    assert (re.search(r"\| kappa +\| +- \|", report) is not None) == (protocol == "choose")
    assert "No interval: fewer than 100 groups of rows" in report
    figures = results["benchmark"]["figures"]
    assert ("Ties" in figures) == (protocol != "choose") and -0.01 <= figures["score"] <= 1.01
    assert f"| score | {100 * figures['score']:.1f} % |" in re.sub(" +", " ", report)


def test_an_endpoint_chooses_in_words_and_its_official_parser_is_shown_beside(data: Path) -> None:
    def reply(body: dict, before: int) -> Reply:
        answers = body["messages"][1]["content"].split("\n\n")[1:5]
        best = next(answer[7] for answer in answers if answer.endswith("!"))
        return completion(f"[[A]] is short.\n\nSo the best is [[{best}]].")

    with serving(reply) as served:
        endpoint = (f"endpoint.url={served.url}", "endpoint.model=judge-1")
        assert judge(data, "judge.protocol=choose", *endpoint)[1]["benchmark"]["figures"] == {"Math": 1.0, "score": 1.0}
        code, results = judge(data, "judge.protocol=choose", "judge.template=rewardbench2", *endpoint)
    assert code == 0 and results["benchmark"]["figures"]["score"] == 1.0 and results["judge"]["judge-1"]["wins"] == 8
    slots = [chosen_slot(Row(f"r{i}", "", (), (), (), ""), 0) for i in range(8)]
    assert results["benchmark"]["figures"]["score_by_its_parser"] == slots.count(0) / 8 < 1


def test_the_studys_blind_preset_is_refused_sighted_and_runs_blind(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("model.path=tiny-random", "judge.template=study_blind")
    code, results = judge(data, *asked)
    told = capsys.readouterr().err
    assert code == 2 and results == {} and "rows.jsonl:1: judge.template=study_blind does not name" in told
    assert judge(data, *asked, "judge.sighted=false")[0] == 0


def test_a_training_judges_by_comparing_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["exp=smoke", "judge.protocol=rate"]) == 2
    assert "is for python -m dpo.judge" in capsys.readouterr().err


def test_a_benchmark_of_pairs_scores_its_own_rows(data: Path) -> None:
    row = {"question": "?", "response_A": "a", "response_B": "b", "label": "A>B", "source": "law"}
    data.write_text("".join(json.dumps(row | {"pair_id": f"p{i}"}) + "\n" for i in range(4)))
    code, results = judge(data, "model.path=tiny-random", "dtype=fp32")
    summary = results["judge"]["tiny-random"]
    assert code == 0 and list(summary["subsets"]) == ["law"]
    score = summary["wins"] / 4  # no exact 0 and nothing unread: only wins sum to > 0
    assert results["benchmark"] == {"name": "JudgeBench", "figures": {"score": score}, "intervals": {}}


def test_rows_of_ties_are_rated_in_their_own_words_by_either_protocol(data: Path) -> None:
    tied = next(row for row in read_rows(data) if row.id == "tied:1")
    other = next(row for row in read_rows(data) if row.id == "r0")
    rate, ties = (read_template("", protocol) for protocol in ("rate", "ties"))
    assert asked_by(rate, tied) == ties and asked_by(rate, other) == rate
    mine = replace(rate, user=f"{rate.user} ")
    assert asked_by(mine, tied) == mine  # who brings a template is asked by it


def test_rm_bench_in_a_file_that_does_not_say_so_is_not_scored_by_a_ninth(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    styles = {"chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
    data.write_text(
        "".join(json.dumps({"id": i, "prompt": f"{i}?", "domain": "chat", **styles}) + "\n" for i in range(2))
    )
    assert judge(data, "model.path=tiny-random", "judge.pairs_per_row=1")[0] == 2
    assert "RM-Bench's score needs all nine pairs of a row; set judge.pairs_per_row=0" in capsys.readouterr().err
    code, results = judge(data, "model.path=tiny-random", "judge.pairs_per_row=0")
    assert code == 0 and results["benchmark"]["name"] == "RM-Bench" and "hard" in results["benchmark"]["figures"]
    with data.open("a") as file:
        file.write(json.dumps({"id": "two", "prompt": "?", "domain": "chat", **styles, "chosen": ["a", "b"]}) + "\n")
    assert judge(data, "model.path=tiny-random", "judge.pairs_per_row=0")[0] == 2
    assert "two: RM-Bench's score needs rows of 3 chosen and 3 rejected" in capsys.readouterr().err


def test_the_report_puts_best_of_four_and_ties_together(data: Path) -> None:
    runs = []
    for protocol in ("choose", "ties"):
        judge(data, "model.path=tiny-random", f"judge.protocol={protocol}", "dtype=fp32")
        runs.append((data.parent / "runs" / "judge" / "latest").resolve())
    report = (write_report(runs) / "report.md").read_text()
    best, ties = (json.loads((run / "results.json").read_text())["benchmark"]["figures"]["score"] for run in runs)
    assert f"| tiny-random | {100 * (best + ties) / 2:.1f} % |" in re.sub(" +", " ", report)


def test_a_best_of_four_asked_otherwise_than_ties_is_not_put_together_with_them(data: Path) -> None:
    rows = list(read_rows(data))
    mixed = data.with_name("mixed.jsonl")
    write_rows(mixed, [*rows, replace(rows[0], id="no tie", subset="Ties")])
    blind = ("judge.sighted=false", "judge.template=study_blind")
    for best, asked in ((data, blind), (mixed, ())):
        runs = []
        for path, settings in ((best, ("judge.protocol=choose",)), (data, ("judge.protocol=ties", *asked[:1]))):
            judge(path, "model.path=tiny-random", *settings, "dtype=fp32")
            runs.append((data.parent / "runs" / "judge" / "latest").resolve())
        assert "its six subsets" not in (write_report(runs) / "report.md").read_text()


def test_a_number_of_rows_to_train_on_is_no_number_to_judge(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(data, "model.path=tiny-random", "data.rows=2")[0] == 2
    assert "data.rows=2: chooses rows to train on; judge.rows chooses those to judge" in capsys.readouterr().err


def test_a_best_of_four_is_compared_with_no_verdict_on_a_pair(data: Path) -> None:
    runs = []
    for protocol in ("choose", "compare"):
        judge(data, "model.path=tiny-random", f"judge.protocol={protocol}", "dtype=fp32")
        runs.append(read_run((data.parent / "runs" / "judge" / "latest").resolve()))
    choose, compare = judges_of(runs)
    told = {why for whys in reasons([choose, compare]).values() for why in whys}
    assert told and not any(choose.name in why and compare.name in why for why in told)
