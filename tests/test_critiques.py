"""dpo/critiques.py, dpo/judge/written.py: what is paired with what; rounds, killed and resumed; verdicts in writing."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from test_resume import contents, outcome, start, wait_until

import dpo.judge.__main__
import dpo.judge.written
from dpo import train
from dpo.config import Config
from dpo.critiques import critique_trees, kinds_of
from dpo.distributed import Ranks
from dpo.inputs import critique_settings, judge_settings, read_inputs
from dpo.judge.asked import verdict_odds
from dpo.judge.endpoint import Answer
from dpo.judge.written import Pen, written
from dpo.logprobs import score_trees
from dpo.policy import load_policy
from dpo.rows import PairValues, Row
from dpo.settings import load_config
from dpo.step import plan_steps
from dpo.tokens import _open, token_trees
from dpo.trees import Completion, Tree

SMALL = {
    "exp": "smoke",
    "objective": "critiques",
    "checkable.subsets": "Focus",
    "checkable.train_rows": "8",
    "checkable.validation_rows": "4",
    "checkable.test_rows": "4",
    "judge.blind_control": "false",
    "judge.critique": "greedy",
    "critiques.max_tokens": "32",
    "critiques.closing": "\nBetter answer:",
    "critiques.samples": "4",
    "critiques.batch": "16",
    "critiques.rounds": "2",
    "critiques.verdict_share": "0.3",
    "loss.rpo_alpha": "0.5",
    "train.batch_pairs": "4",
    "train.max_steps": "3",
    "train.lr": "1e-2",
    "log.plots": "false",
}
BATCHES = 4  # of a round: 8 rows, two questions each, in batches of 16 // 4 questions


def arguments(place: Path, more: Mapping[str, str] = {}) -> list[str]:  # noqa: B006 (never written)
    places = {"run.root": f"{place / 'runs'}", "run.cache": f"{place / 'cache'}", "model.path": f"{place / 'model'}"}
    return [f"{key}={value}" for key, value in {**SMALL, **places, **more}.items()]


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path


def run_folder(place: Path) -> Path:
    return (place / "runs" / "smoke" / "latest").resolve()


# --- what is paired with what ---------------------------------------------------------------------------------------

PROMPT = ({"role": "user", "content": "?"},)
ASKED = Tree("r", (1, 2), ((3,), (4, 5)), tuple(Completion(b, b + 1, (t,)) for b in (0, 1) for t in (7, 8)), (), 1)


def said(text: str, *ids: int) -> Answer:
    return Answer(text, "stop", (), 0, len(ids), "", 0.0, ids)


def letters(text: str) -> list[Answer]:
    """One answer a letter, each of other tokens; "-" is unparsable, "T" a tie."""
    words = {"T": "Tie", "-": "I cannot say"}
    return [said(f"Hm.\nVerdict: {words.get(letter, letter)}", 10 + n, 9) for n, letter in enumerate(text)]


def paired(one: str, other: str, **critiques: int) -> tuple[list[Tree], dict[str, int]]:
    row = Row("r", "s", PROMPT, ("c",), ("x",), "g", pair_values=(PairValues(2.0, 0.5, 0.9),))
    config = Config(exp="test", critiques=critiques, train={"pair_weight": "row"})
    return critique_trees(row, ASKED, letters(one) + letters(other), config)


def test_a_critique_is_right_wrong_a_tie_or_unparsable_by_its_own_verdict():
    assert kinds_of(letters("ABT-"), "A") == ["right", "wrong", "tie", "unparsable"]
    assert kinds_of(letters("ABT-"), "B") == ["wrong", "right", "tie", "unparsable"]
    odds = {" A": math.log(0.2), " B": math.log(0.8)}
    drawn = Answer("Verdict: A", "stop", (("Verdict:", {}), (" A", odds)), 0, 2, "", 0.0)
    assert verdict_odds(drawn) < 0 and kinds_of([drawn], "A") == ["right"]  # what it wrote, not what was likelier


def test_right_ones_meet_all_others_and_both_orders_give_as_many():
    trees, told = paired("AAABT", "BB-BA")
    first, second = trees
    assert (first.prompt, second.prompt) == ((1, 2, 3), (1, 2, 4, 5)) and first.prefix == 1
    assert [c.targets for c in first.completions] == [(10, 9), (11, 9), (13, 9), (14, 9)]  # two right, wrong and tie
    assert [c.targets for c in second.completions] == [(10, 9), (11, 9), (12, 9), (14, 9)]
    assert first.branches == ((10,), (11,), (13,), (14,))
    for tree in trees:
        assert [(pair.winner, pair.loser) for pair in tree.pairs] == [(0, 2), (0, 3), (1, 2), (1, 3)]
        assert {(p.weight, p.margin, p.soft_label, p.twin) for p in tree.pairs} == {(2.0 / 8, 0.5, 0.9, None)}
    assert told == {
        "right": 6,
        "wrong": 2,
        "tie": 1,
        "unparsable": 1,
        "say A": 4,
        "pairs used": 1,
        "critique pairs": 8,
    }
    assert [len(tree.pairs) for tree in paired("AAAB", "BAAA", kept=4)[0]] == [1, 1]  # the poorer order says how many


def test_a_text_that_was_written_twice_counts_once():
    twice = [said("A", 5, 9), said("A", 5, 9), said("B", 6, 9)]
    row = Row("r", "s", PROMPT, ("c",), ("x",), "g")
    trees, _ = critique_trees(row, ASKED, twice + letters("BBA"), Config(exp="test"))
    assert [len(tree.pairs) for tree in trees] == [1, 1]


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [("AAA", "BBB", "all right"), ("BT-", "AAA", "all wrong"), ("AAA", "AAA", "of one kind in one order")]
    + [("AAB", "BBB", "of one kind in one order")],
)
def test_a_pair_that_lacks_right_or_other_ones_in_an_order_is_left_out_and_counted(one, other, why):
    trees, told = paired(one, other)
    assert trees == [] and told[f"pairs {why}"] == 1 and told["critique pairs"] == 0


def test_trees_of_one_row_are_in_one_step():
    rows = [0, 0, 1, 2, 2, 2, 3]
    steps = plan_steps([1, 1, 2, 1, 1, 1, 2], Config(exp="test", train={"batch_pairs": 2, "epochs": 3}), rows)
    for step in steps:
        assert sorted(step) == [i for i, row in enumerate(rows) if row in {rows[i] for i in step}]
    assert sorted(i for step in steps for i in step) == sorted(3 * list(range(7)))


# --- the rounds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Where a run of two rounds was made that nothing stopped."""
    place = tmp_path_factory.mktemp("critiques")
    shutil.copytree(tiny_folder, place / "model")
    assert train.main(arguments(place)) == 0
    return place


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_round_samples_from_what_the_last_one_left_and_is_trained_against_it(finished):
    folder = run_folder(finished)
    results = json.loads((folder / "results.json").read_text())
    rounds = [json.loads((folder / f"round-{n}/checkpoints/finished.json").read_text()) for n in (1, 2)]
    assert [of["step0_max_difference"] for of in rounds] == [0, 0]  # the reference is the round's start, bit for bit
    assert rounds[0]["reference"] != rounds[1]["reference"]
    texts = [[line["text"] for line in read_lines(folder / f"round-{n}/critiques.jsonl")] for n in (1, 2)]
    assert len(texts[0]) == len(texts[1]) == 8 * 2 * 4 and texts[0] != texts[1]
    assert results["train"]["steps"] == 6
    assert [(line["round"], line["step"]) for line in read_lines(folder / "metrics.jsonl") if "loss" in line] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
        (2, 6),
    ]


def test_what_is_trained_on_is_what_was_written_and_a_share_of_verdicts_alone(finished):
    folder = run_folder(finished)
    counts = json.loads((folder / "results.json").read_text())["critiques"]
    inputs = read_inputs(load_config(arguments(finished)), "cpu")
    for number, told in enumerate(counts, 1):
        lines = read_lines(folder / f"round-{number}/critiques.jsonl")
        assert sum(line["kind"] == "right" for line in lines) == told["right"] > 0
        assert told["wrong"] > 0 and told.get("unparsable", 0) == 0  # the closing gives each a verdict
        trees = _open(folder / f"round-{number}/trees")
        assert trees is not None
        alone = [tree for tree in trees if tree in inputs.train_trees]
        of_critiques = [tree for tree in trees if tree not in alone]
        assert sum(len(tree.pairs) for tree in of_critiques) == told["critique pairs"] > 0
        pairs = sum(len(tree.pairs) for tree in alone)
        assert pairs == told["verdict pairs"] and abs(pairs - told["critique pairs"] * 3 / 7) <= 2
        kinds = {(line["id"], line["text"]): line["kind"] for line in lines}
        for tree in of_critiques:
            for pair in tree.pairs:
                texts = [inputs.tokenizer.decode(tree.completions[c].targets) for c in (pair.winner, pair.loser)]
                won, lost = (kinds[tree.id, text.removesuffix("<|im_end|>")] for text in texts)
                assert won == "right" != lost


class Killed(BaseException):
    """As good as kill -9: nothing is tidied up."""


@pytest.mark.parametrize("calls", [2, BATCHES + 2], ids=["round 1", "round 2"])
def test_a_run_killed_while_it_samples_writes_what_is_missing_and_ends_as_if_nothing_had_been(
    finished, place, monkeypatch, calls
):
    count, writes = [0], dpo.judge.written._write

    def dying(pen: Pen, trees: list[Tree]) -> list[list[Answer]]:
        count[0] += pen.samples > 1
        if count[0] > calls:
            raise Killed
        return writes(pen, trees)

    monkeypatch.setattr(dpo.judge.written, "_write", dying)
    with pytest.raises(Killed):
        train.main(arguments(place))
    files = sorted((place / "cache/answers").iterdir(), key=lambda file: file.stat().st_mtime)
    files[-1].write_bytes(files[-1].read_bytes()[:-9])  # of the last line only a part had come to the disk
    count[0] = -100
    assert train.main(arguments(place, {"run.resume": "latest"})) == 0
    assert count[0] == -100 + 2 * BATCHES - calls + 1  # the batch whose last line was torn is written again
    assert outcome(run_folder(place)) == outcome(run_folder(finished))
    for number in (1, 2):
        one, other = (run_folder(of) / f"round-{number}" for of in (place, finished))
        assert contents(one / "trees") == contents(other / "trees")
        assert (one / "critiques.jsonl").read_bytes() == (other / "critiques.jsonl").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("files", [2, 4], ids=["round 1", "round 2"])
def test_kill_9_of_the_real_command_in_a_rounds_second_batch_changes_nothing(finished, place, files):
    """`files` of critiques are there then: the base's verdicts, a round's samples, validation, the next's samples."""
    process = start(place, *arguments(place, {"train.epochs": "1", "train.eval_every_steps": "0"}))

    def sampling() -> bool:
        kept = sorted((place / "cache/answers").glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        return len(kept) == files and len(kept[-1].read_bytes().splitlines()) > 16

    wait_until(process, sampling)
    process.kill()
    process.communicate()
    assert train.main(arguments(place, {"run.resume": "latest"})) == 0
    assert outcome(run_folder(place)) == outcome(run_folder(finished))


def test_another_loss_samples_nothing_again_in_its_first_round(finished, monkeypatch, tmp_path):
    more = {"loss.beta": "0.7", "critiques.rounds": "1", "run.root": f"{tmp_path}", "train.max_steps": "1"}
    monkeypatch.setattr(dpo.judge.written, "_write", only_judging(dpo.judge.written._write))
    assert train.main(arguments(finished, more)) == 0


def only_judging(write: Callable[[Pen, list[Tree]], list[list[Answer]]]):
    def checked(pen: Pen, trees: list[Tree]) -> list[list[Answer]]:
        assert pen.samples == 1, "a critique is sampled again"
        return write(pen, trees)

    return checked


def test_without_a_usable_pair_the_run_ends_and_says_what_the_critiques_were(place, capsys):
    assert train.main(arguments(place, {"critiques.closing": ""})) == 2  # noise: no letter on a line of its own
    message = capsys.readouterr().err
    for part in ("no pair of answers has right and wrong critiques in both orders", "unparsable", "8 pairs all wrong"):
        assert part in message
    assert "critiques.closing" in message and str(run_folder(place) / "round-1/critiques.jsonl") in message


# --- a judge that writes --------------------------------------------------------------------------------------------


def pen_of(place: Path, more: dict[str, str], *, samples: int = 1, greedy: bool = True) -> Pen:
    config = load_config(arguments(place, more))
    inputs = read_inputs(config, "cpu")
    model = load_policy(config, inputs.model_folder, inputs.dtype, Ranks(0, 1, torch.device("cpu")))
    return Pen(model, "weights", inputs, critique_settings(config), config, samples, greedy)


def test_the_odds_of_a_written_verdict_are_those_of_its_place_behind_the_critique(place):
    pen = pen_of(place, {"dtype": "fp32"})
    inputs, tokenizer = pen.inputs, pen.inputs.tokenizer
    settings = judge_settings(pen.config, sighted=True)
    trees = token_trees(inputs.splits.test, tokenizer, settings, inputs.cache)
    checked = 0
    for tree, answers in zip(trees, written(pen, trees), strict=True):
        for branch, answer in enumerate(answers):
            letters = [i for i, token in enumerate(answer.ids) if tokenizer.decode([token]) in ("A", "B")]
            before = tree.branches[branch] + tuple(answer.ids[: letters[-1]])
            labels = tuple(Completion(0, len(before), tuple(tokenizer.encode(label))) for label in "AB")
            scored = score_trees(
                pen.model,
                [Tree("", tree.prompt, (before,), labels, ())],
                pen.config.pack,
                Ranks(0, 1, torch.device("cpu")),
                "",
            )
            a, b = (float(logp.sum()) for logp in scored[0])
            assert verdict_odds(answer) == pytest.approx(a - b, abs=1e-4)
            assert tokenizer.decode(answer.ids).removesuffix("<|im_end|>") == answer.text
            checked += 1
    assert checked == 8


def test_critiques_are_the_seeds_and_each_another_one(place):
    texts = {}
    for name, more in (("one", {}), ("same", {"run.cache": f"{place / 'other'}"}), ("seed", {"seed": "1"})):
        pen = pen_of(place, {**more, "data.path": f"{rows_file(place)}"}, samples=3, greedy=False)
        trees = token_trees(pen.inputs.splits.train, pen.inputs.tokenizer, pen.settings, pen.inputs.cache)
        texts[name] = [answer.text for of_tree in written(pen, trees) for answer in of_tree]
    assert texts["one"] == texts["same"] != texts["seed"]
    assert len(set(texts["one"])) == len(texts["one"])


def rows_file(place: Path) -> Path:
    path = place / "rows.jsonl"
    lines = [
        {"id": f"{i}", "subset": "s", "prompt": f"{i}?", "chosen": f"{i}", "rejected": "no", "split": split}
        for i, split in enumerate(["train", "train", "train", "validation", "test", "test"])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def judge(place: Path, more: dict[str, str]) -> int:
    kept = ("exp", "critiques.max_tokens", "critiques.closing", "judge.critique", "run.root", "run.cache", "model.path")
    given = dict(argument.split("=", 1) for argument in arguments(place, {"exp": "judge"}))
    wanted = {key: value for key, value in given.items() if key in kept} | {"data.path": f"{rows_file(place)}"} | more
    return dpo.judge.__main__.main([f"{key}={value}" for key, value in wanted.items()])


def test_dpo_judge_keeps_what_the_judge_wrote_and_stops_where_too_little_is_in_form(place, capsys):
    assert judge(place, {}) == 0
    folder = (place / "runs/judge/latest").resolve()
    answers = read_lines(folder / "answers.jsonl")
    assert len(answers) == 12 and all(answer["text"][-1] in "AB" for answer in answers)
    assert json.loads((folder / "results.json").read_text())["judge"]
    assert judge(place, {"critiques.closing": ""}) == 2
    assert "8 of 8 critiques give no verdict in the form asked for, more than 30%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"objective": "verdicts", "judge.critique": "off"}, "nothing reads it; set objective=critiques"),
        ({"reference.path": "x"}, "whose reference is each round's start"),
        ({"critiques.max_tokens": "2048"}, "must leave room for the question"),
        ({"critiques.closing": "x", "critiques.template": "rate"}, "names no {{ answer_a }}"),
    ],
)
def test_settings_that_cannot_be_are_refused(place, capsys, more, said):
    assert train.main(arguments(place, more)) == 2
    assert said in capsys.readouterr().err
