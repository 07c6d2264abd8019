"""What a judge is asked (dpo/judge/prompts.py): presets, a user's templates, and what is wrong with one."""

from pathlib import Path

import pytest

from dpo.judge.prompts import COMPARE, PRESETS, QUESTIONS, SLOTS, chosen_slot, columns, judge_messages, read_template
from dpo.rows import Row
from models.errors import UserError

REQUEST = ({"role": "user", "content": "{{ answer_a }}? {% x"},)  # a row's text is never a template
ROW = Row("r", "Math", REQUEST, ("right", "right too"), ("w1", "w2", "w3", "w4"), "g")


def user(template=COMPARE, answers=("one", "two"), **shown) -> str:
    return judge_messages(REQUEST, answers, template, **shown)[1]["content"]


def test_the_default_asks_as_it_always_did() -> None:
    sighted, blind = (judge_messages(REQUEST, ("one", "two"), COMPARE, sighted=sighted) for sighted in (True, False))
    answers = "Answer A: one\n\nAnswer B: two\n\nBetter answer:"
    told = "Reply with the letter of the better answer, A or B."
    assert [message["content"] for message in sighted] == [
        f"You compare two answers to a request. {told}",
        f"Request: {{{{ answer_a }}}}? {{% x\n\n{answers}",
    ]
    assert [message["content"] for message in blind] == [f"You compare two answers. {told}", answers]


def test_a_reference_answer_is_shown_where_the_row_has_one() -> None:
    assert user(reference="42") == user().replace("Answer A", "Reference answer: 42\n\nAnswer A")


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_shows_all_that_its_protocol_has(preset: str) -> None:
    others = {"study_blind": "compare", "fenced": "compare", "classify": "rate", "rewardbench2": "choose"}
    protocol = others.get(preset, preset.removesuffix("_critique"))
    template = read_template(preset, protocol)
    answers = [f"<{i}>" for i in range(SLOTS[protocol])]
    if preset == "study_blind":
        with pytest.raises(UserError, match="does not name the column prompt; name it, or set judge.sighted=false"):
            user(template, answers)
        text = user(template, answers, sighted=False)
    else:
        text = user(template, answers, reference="<ref>")
        assert text.count("{{ answer_a }}? {% x") == text.count("<ref>") == 1
        assert "<ref>" not in user(template, answers, sighted=False)
    assert all(text.count(answer) == 1 for answer in answers)


def write(path: Path, user: str, labels: str = '["A", "B"]', more: str = "") -> str:
    path.write_text(f"labels = {labels}\nsystem = 'judge'\nuser = '''{user}'''\n{more}")
    return str(path)


def test_a_template_of_ones_own_is_read_and_rendered(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", "{{prompt}} | {{answer_a}} | {{answer_b}}")
    template = read_template(name, "compare")
    assert template.name == "mine" and columns(template) == {"prompt", "answer_a", "answer_b"}
    assert user(template) == "{{ answer_a }}? {% x | one | two"
    with pytest.raises(UserError, match="does not name the column reference_answer.*judge.reference_answer=false"):
        user(template, reference="42")
    with pytest.raises(UserError, match="'prompt' is undefined.*judge.sighted=false hides it"):
        user(template, sighted=False)


@pytest.mark.parametrize(
    "text", ["{% if reference_answer %}{{answer_a}}{% endif %}{{answer_b}}", "{{answer_a}}{{answer_b[:1]}}"]
)
def test_a_template_that_hides_an_answer_of_a_row_is_told(tmp_path: Path, text: str) -> None:
    template = read_template(write(tmp_path / "mine.toml", "{{prompt}}" + text), "compare")
    with pytest.raises(UserError, match="mine: hides some of answer_[ab]; no if or filter may cut it"):
        user(template)


@pytest.mark.parametrize("text", ["{{answer_a + 1}}", "{{answer_a | truncate(2)}}", "{{1 / 0}}"])
def test_a_template_whose_expression_fails_is_told(tmp_path: Path, text: str) -> None:
    template = read_template(write(tmp_path / "mine.toml", "{{prompt}}{{answer_a}}{{answer_b}}" + text), "compare")
    with pytest.raises(UserError, match="mine: cannot be filled in: "):
        user(template)


@pytest.mark.parametrize(
    ("text", "labels", "more", "protocol", "told"),
    [
        ("{{prompt}} {{answer_a}}", '["A", "B"]', "", "compare", r"names no \{\{ answer_b \}\}"),
        ("{{answer_a}}{{answer_b}}", '["A", "B"]', "", "choose", r"names no \{\{ answer_c \}\}"),
        ("{{answer_a}}{{answer_b}}{{category}}", '["A", "B"]', "", "compare", "names category; there are answer_a"),
        ("{{answer_a}}{{answer_b}}{% if", '["A", "B"]', "", "compare", "cannot be read as Jinja"),
        ("{{answer_a}}{{answer_b}}", '["A", "C"]', "", "compare", r'they must be \["A", "B"\]'),
        ("{{answer}}", '["good", "bad"]', "", "rate", "numbers, or some are `passing`"),
        ("{{answer}}", '["good", "bad"]', 'passing = ["great"]', "rate", "numbers, or some are `passing`"),
        ("{{answer}}", '["good", "ok", "bad"]', 'passing = ["good", "okay"]', "rate", "some are `passing`"),
        ("{{answer}}", '["1", "2", "2"]', "", "rate", "labels are"),
        ("{{answer_a}}{{answer_b}}", '"AB"', "", "compare", "must be TOML with"),
        ("{{answer}}", '["1"]', "", "rate", "labels are"),
        ("{{answer}}", '["-1", "1"]', "", "rate", "labels are"),
        ("{{answer}}", '["1", "2"]', "rubric = 1", "rate", "the key rubric; allowed are labels"),
        ("{{answer}}", "1", "", "rate", "must be TOML with"),
        ("{{answer}}", "[", "", "rate", "must be TOML with"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, labels: str, more: str, protocol: str, told: str
) -> None:
    with pytest.raises(UserError, match=told) as refused:
        read_template(write(tmp_path / "mine.toml", text, labels, more), protocol)
    assert "mine.toml" in str(refused.value)


def test_a_template_that_is_not_there_names_the_presets() -> None:
    with pytest.raises(UserError, match="no such file; presets are choose, choose_critique, classify, compare"):
        read_template("none", "compare")


def test_a_template_cannot_reach_out_of_its_texts(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.toml", "{{prompt.__class__.__mro__}}{{answer_a}}{{answer_b}}")
    with pytest.raises(UserError, match="mine: .*unsafe"):
        user(read_template(name, "compare"))


# ---- questions


def test_compare_asks_every_pair_in_both_orders_and_rate_every_answer() -> None:
    asked = QUESTIONS["compare"](ROW, [(0, 1), (1, 3)], 0)
    assert asked == [("right", "w2"), ("w2", "right"), ("right too", "w4"), ("w4", "right too")]
    assert [one for (one,) in QUESTIONS["rate"](ROW, [(0, 0)], 0)] == ["right", "right too", "w1", "w2", "w3", "w4"]


def test_choose_exchanges_the_right_answer_into_a_slot_of_the_seeds() -> None:
    rows = [Row(f"r{i}", "Math", REQUEST, ("right",), ("w1", "w2", "w3"), "g") for i in range(400)]
    slots = [chosen_slot(row, 3) for row in rows]
    assert all(80 <= slots.count(slot) <= 120 for slot in range(4))
    assert slots != [chosen_slot(row, 4) for row in rows]
    for row, slot in zip(rows, slots, strict=True):
        expected = ["right", "w1", "w2", "w3"]
        expected[0], expected[slot] = expected[slot], expected[0]
        assert QUESTIONS["choose"](row, [], 3) == [tuple(expected)]
    with pytest.raises(UserError, match="needs three rejected answers, the row has 2"):
        QUESTIONS["choose"](Row("r", "s", REQUEST, ("right",), ("w1", "w2"), "g"), [], 0)
