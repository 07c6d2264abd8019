"""The checkable rows: labels proved again on the final text, closed groups, splits that share nothing, exact knobs."""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import combinations, product

import pytest

from dpo.checkable import assert_closed, make_rows
from dpo.checkable.makers import BANKS, SUBSETS, TOPICS, Request, plain_words
from dpo.config import CheckableConfig
from dpo.rows import Row, normalise
from models.errors import UserError

SPLITS = ("train", "validation", "test")


def rows_of(seed: int = 0, **changed: object) -> list[Row]:
    arguments: dict[str, object] = {"train_rows": 320, "validation_rows": 80, "test_rows": 160, "difficulty": 2}
    arguments |= {"subsets": tuple(SUBSETS), "label_noise": 0.0, "rejected_per_row": 1}
    arguments |= {"length_confound": 0.0, "length_counter": 0.0}
    return make_rows(CheckableConfig.model_construct(**arguments | changed), seed)


def request(row: Row) -> str:
    return row.prompt[-1]["content"]


def groups(rows: list[Row]) -> list[list[Row]]:
    by_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    return list(by_group.values())


def in_split(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if row.split == split]


# Proofs, made again from the text alone


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_each_answer_of_a_row_is_right_for_one_request_of_its_group_and_listed_wrong_for_the_others(
    difficulty: int,
) -> None:
    for group in groups(rows_of(difficulty=difficulty, rejected_per_row=3)):
        answers = {row.chosen[0] for row in group}
        assert len(group) == len(answers) == len({request(row) for row in group}) == 4
        for row in group:
            assert set(row.rejected) == answers - set(row.chosen) and len(row.rejected) == 3


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_math_labels_hold_when_the_sum_is_read_off_the_bare_request(difficulty: int) -> None:
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "equals what": ""}
    checked = 0
    for row in rows_of(subsets=("Math",), difficulty=difficulty, rejected_per_row=3):
        text = request(row).lower().split("compute ")[-1].split("what is ")[-1]
        for word, sign in signs.items():
            text = text.replace(word, sign)
        found = re.search(r"(\d+) *([-+*/]) *(\d+)(?: *([-+]) *(\d+))? *[.?]", text)
        if found is None or "subtracted" in text or "then" in text:
            continue
        value = eval("".join(part for part in found.groups() if part))  # the test's own arithmetic, on digits and signs
        numbers = [re.findall(r"\d+", answer) for answer in (*row.chosen, *row.rejected)]
        assert [numbers[0] == [str(int(value))], *(n == [str(int(value))] for n in numbers[1:])] == [True] + [False] * 3
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_precise_if_labels_hold_when_the_constraint_is_read_off_the_request(difficulty: int) -> None:
    seen: Counter[str] = Counter()
    names = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    for row in rows_of(train_rows=1200, subsets=("Precise IF",), difficulty=difficulty, rejected_per_row=3):
        text = request(row)
        count = re.search(r"(?:exactly|it in|Make it) (\w+) words|(\w+) (?:suitable|fitting) words", text)
        ends = re.search(r'(?:End with the word|Finish on the word) "(\w+)"|[Ff]inal word should be "(\w+)"', text)
        leave = re.search(r'(?:Do not use the word|Avoid the word|Never say) "(\w+)"', text)

        def right(answer: str, text: str = text, count=count, ends=ends, leave=leave) -> bool | None:  # type: ignore[no-untyped-def]
            if count:
                digits = next(group for group in count.groups() if group)
                n = int(digits) if digits.isdigit() else names.index(digits)
                if count.group(1):
                    return len(answer.replace("\n- ", " ").removeprefix("- ").split()) == n
                return bool(re.fullmatch(r"\w+(, \w+)+", answer)) and answer.count(",") == n - 1
            if ends:
                return answer.lower().rstrip('".}').endswith(" " + next(group for group in ends.groups() if group))
            if leave:
                return re.search(rf"\b{leave.group(1)}\b", answer, re.IGNORECASE) is None
            if re.search(r"JSON", text):
                return answer.startswith("{") and bool(json.loads(answer))
            if re.search(r"upper ?case|in all capitals|apital letters, please|Capitalize every|in capitals", text):
                return not any(letter.islower() for letter in answer)
            if re.search(r"lower ?case|small letters|No capital|not capitalize", text):
                return not any(letter.isupper() for letter in answer)
            return None

        verdicts = [right(answer) for answer in (*row.chosen, *row.rejected)]
        if verdicts[0] is not None:
            assert verdicts == [True, False, False, False], (text, row)
            seen["count" if count else "ends" if ends else "avoid" if leave else "form"] += 1
    assert seen["count"] > 50 and (difficulty == 1 or seen["ends"] > 20) and (difficulty == 3 or seen["form"] > 50)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_grounding_labels_hold_when_the_fact_is_looked_up_in_the_request(difficulty: int) -> None:
    value = r"(\w+(?: am| pm| o'clock| dollars| pounds| euros)?)"
    for row in rows_of(train_rows=400, subsets=("Grounding",), difficulty=difficulty, rejected_per_row=3):
        *facts, question = re.split(r"(?<=[.?]) ", request(row))
        bank = BANKS[row.split or ""]
        thing = next(e for e in bank["places"] + bank["objects"] if plain_words(e) in plain_words(question))
        patterns = [bank[a] for kind in ("opens entry runs street", "price color owner room") for a in kind.split()]
        fact = next(p for p in patterns if p[1].format(e=thing) == question)[0]
        stated = [re.fullmatch(fact.format(e=thing, v=value) + r"\.", f, re.IGNORECASE) for f in facts]
        values = [match.group(1) for match in stated if match]
        assert len(values) == 1
        assert values[0] in row.chosen[0] and not any(
            re.search(rf"\b{re.escape(values[0])}\b", answer) for answer in row.rejected
        )


def test_a_topic_is_proved_by_words_that_no_other_topic_of_its_split_uses_and_never_by_its_own_name() -> None:
    for split in SPLITS:
        topics = [topic for cluster in TOPICS[split] for topic in cluster]
        assert all(len(cluster) == 4 for cluster in TOPICS[split]) and len({t.name for t in topics}) == len(topics)
        for topic in topics:
            assert len(topic.sentences) == 2
            for sentence in topic.sentences:
                assert SUBSETS["Focus"].check(topic.keys, sentence)
                name_words = {w for w in plain_words(topic.name).split() if len(w) > 3} - {"with", "after"}
                assert not name_words & set(plain_words(sentence).split()), topic.name
                assert not any(SUBSETS["Focus"].check(other.keys, sentence) for other in topics if other != topic)


@pytest.mark.parametrize("subset", list(SUBSETS))
def test_check_refuses_a_wrong_answer(subset: str) -> None:
    specs = {
        "Focus": ("leash",),
        "Precise IF": ("words", "3"),
        "Math": ("3", "+", "4"),
        "Grounding": ("a", "x", "a", "x", "9 am"),
    }
    right = {"Focus": "Use a leash.", "Precise IF": "One two three", "Math": "It is 7.", "Grounding": "At 9 am."}
    wrong = {"Focus": "Use it.", "Precise IF": "One two", "Math": "It is 7 or 8.", "Grounding": "At 19 am."}
    assert SUBSETS[subset].check(specs[subset], right[subset]) and not SUBSETS[subset].check(
        specs[subset], wrong[subset]
    )


# Closed groups


@pytest.mark.parametrize(("rejected_per_row", "label_noise"), [(1, 0.0), (3, 0.0), (1, 0.3), (3, 0.3)])
def test_a_judge_that_does_not_read_the_request_wins_as_often_as_it_loses_in_every_group(
    rejected_per_row: int, label_noise: float
) -> None:
    chance = random.Random(0)
    scores: dict[str, float] = {}
    judges = {
        "longest": lambda answer: float(len(answer)),
        "alphabetical": lambda answer: float(int.from_bytes(answer.encode()[:6].ljust(6, b" "), "big")),
        "random but fixed": lambda answer: scores.setdefault(answer, chance.random()),
    }
    for group in groups(rows_of(rejected_per_row=rejected_per_row, label_noise=label_noise)):
        assert_closed(group)
        for name, score in judges.items():
            pairs = [(score(w), score(x)) for row in group for w, x in product(row.chosen, row.rejected)]
            assert sum(w > x for w, x in pairs) == sum(w < x for w, x in pairs), name


def test_assert_closed_notices_an_open_group() -> None:
    with pytest.raises(AssertionError, match="not closed"):
        assert_closed(rows_of()[:1])


def test_couples_are_spread_over_all_three_ways_to_couple_four_rows() -> None:
    ways: Counter[tuple[int, ...]] = Counter()
    for group in groups(rows_of(subsets=("Math",))):
        answers = [row.chosen[0] for row in group]
        ways[tuple(answers.index(row.rejected[0]) for row in group)] += 1
    assert len(ways) == 3 and max(ways.values()) <= 2 * min(ways.values())


def test_chosen_and_rejected_answers_have_the_same_lengths() -> None:
    rows = rows_of()
    assert Counter(len(row.chosen[0]) for row in rows) == Counter(len(row.rejected[0]) for row in rows)


# Splits


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_splits_share_no_prompt_and_no_answer_of_more_than_20_characters(difficulty: int) -> None:
    rows = rows_of(train_rows=2000, validation_rows=320, test_rows=640, difficulty=difficulty, rejected_per_row=3)
    for one, other in combinations(SPLITS, 2):
        texts = []
        for split in (one, other):
            prompts = [normalise(request(row)) for row in in_split(rows, split)]
            answers = {normalise(answer) for row in in_split(rows, split) for answer in (*row.chosen, *row.rejected)}
            assert len(set(prompts)) == len(prompts), "a prompt comes twice"
            texts.append(set(prompts) | {answer for answer in answers if len(answer) > 20})
        assert not texts[0] & texts[1]


def test_the_banks_of_the_splits_have_the_same_keys_and_share_no_entry() -> None:
    assert set(BANKS["train"]) - {"filler"} == set(BANKS["validation"]) == set(BANKS["test"])
    nouns, proofs = {}, {split: {key for c in TOPICS[split] for topic in c for key in topic.keys} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        for key in BANKS["test"]:
            assert not {normalise(e) for e in BANKS[one][key]} & {normalise(e) for e in BANKS[other][key]}, key
    for split in SPLITS:
        assert all(len(set(entries)) == len(entries) for entries in BANKS[split].values())
        names = [topic.name for cluster in TOPICS[split] for topic in cluster]
        entries = [e for key in ("things", "objects", "places", "goods") for e in BANKS[split][key]] + names
        words = {word for entry in entries for word in normalise(entry).split() if len(word) > 3}
        nouns[split] = {word for word in words if not word.endswith("ing")} - {"small", "night"}
    for one, other in combinations(SPLITS, 2):
        assert not nouns[one] & nouns[other] and not proofs[one] & proofs[other]


# Knobs


def test_equal_arguments_give_equal_rows_and_another_seed_other_rows() -> None:
    assert rows_of() == rows_of()
    assert not {request(row) for row in rows_of(subsets=("Math",))} <= {request(row) for row in rows_of(seed=1)}


def test_the_number_and_the_noise_of_training_rows_do_not_change_the_other_splits() -> None:
    small, large = rows_of(train_rows=64), rows_of(train_rows=640, label_noise=0.5, length_confound=0.5)
    for split in ("validation", "test"):
        assert in_split(small, split) == in_split(large, split)
    assert in_split(small, "train") == [
        row for row in in_split(rows_of(train_rows=640), "train") if int(row.group.rsplit("-", 1)[1]) < 4
    ]


@pytest.mark.parametrize("rejected_per_row", [1, 3])
def test_label_noise_swaps_exactly_its_fraction_of_the_training_rows_and_no_other(rejected_per_row: int) -> None:
    clean = rows_of(rejected_per_row=rejected_per_row)
    noisy = rows_of(rejected_per_row=rejected_per_row, label_noise=0.25)
    swapped = [(a, b) for a, b in zip(clean, noisy, strict=True) if a != b]
    assert len(swapped) == 80 and {a.split for a, _ in swapped} == {"train"}
    assert all((b.chosen, b.rejected) == (a.rejected, a.chosen) for a, b in swapped)


@pytest.mark.parametrize(("rejected_per_row", "difficulty"), [(1, 1), (1, 2), (1, 3), (3, 2), (3, 3)])
def test_length_confound_makes_the_chosen_answer_longer_in_its_fraction_of_the_rows_and_keeps_the_labels_true(
    rejected_per_row: int, difficulty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: dict[str, tuple[str, ...]] = {}
    for name, subset in list(SUBSETS.items()):

        def draw(rng: random.Random, split: str, level: int, draw=subset.draw) -> list[Request] | None:  # type: ignore[no-untyped-def]
            draft: list[Request] | None = draw(rng, split, level)
            specs.update({r.text: r.spec for r in draft or ()})
            return draft

        monkeypatch.setitem(SUBSETS, name, type(subset)(draw, subset.check))
    fillers = BANKS["train"]["filler"]
    arguments = {"rejected_per_row": rejected_per_row, "difficulty": difficulty, "test_rows": 0}
    for fraction, counter in ((0.5, 0.0), (1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (0.0, 0.5)):
        rows = rows_of(length_confound=fraction, length_counter=counter, **arguments)
        lengths = [(len(row.chosen[0]), [*map(len, row.rejected)]) for row in in_split(rows, "train")]
        longer, shorter = sum(a > max(b) for a, b in lengths), sum(a < min(b) for a, b in lengths)
        if fraction == 1:
            assert (longer, shorter) == (320 * (1 - counter), 320 * counter)
        assert longer >= fraction * (1 - counter) * 320 and shorter >= counter * 320
        for row in rows:
            check = SUBSETS[row.subset].check
            assert check(specs[request(row)], row.chosen[0])
            assert not any(check(specs[request(row)], answer) for answer in row.rejected)
            assert counter or not any(filler in answer for filler in fillers for answer in row.rejected)


def test_difficulty_brings_the_results_of_a_math_group_closer_and_changes_every_subset() -> None:
    spread = []
    for difficulty in (1, 2, 3):
        rows = rows_of(subsets=("Math",), difficulty=difficulty)
        results = [[int(re.findall(r"\d+", row.chosen[0])[0]) for row in group] for group in groups(rows)]
        spread.append({max(r) - min(r) for r in results})
    assert min(spread[0]) >= 24 and max(spread[1]) <= 15 and spread[2] == {3}
    texts = [{(row.subset, request(row)) for row in rows_of(difficulty=difficulty)} for difficulty in (1, 2, 3)]
    assert len(texts[0] & texts[1]) < 40 and len(texts[1] & texts[2]) < 40


@pytest.mark.parametrize("subset", list(SUBSETS))
def test_no_subset_runs_out_of_words_at_4000_training_rows(subset: str) -> None:
    rows = rows_of(train_rows=4000, validation_rows=160, test_rows=400, subsets=(subset,), difficulty=3)
    assert len(in_split(rows, "train")) == 4000 and len(in_split(rows, "test")) == 400


def test_sizes_are_rounded_up_to_whole_groups_with_equally_many_a_subset() -> None:
    rows = rows_of(train_rows=17, validation_rows=0, test_rows=16)
    assert Counter((row.split, row.subset) for row in rows) == {
        **{("train", name): 8 for name in SUBSETS},
        **{("test", name): 4 for name in SUBSETS},
    }
    assert rows[8].id == "checkable-train-precise-if-0-0" and rows[8].group == "checkable-train-precise-if-0"
    assert len({row.id for row in rows}) == len(rows)


def test_impossible_arguments_are_a_users_mistake_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"checkable\.train_rows = 12: .*at least 16"):
        rows_of(train_rows=12)
    with pytest.raises(UserError, match=r"checkable\.subsets .*'Safety'.*Focus, Precise IF, Math, Grounding"):
        rows_of(subsets=("Focus", "Safety"))
    with pytest.raises(UserError, match=r"checkable\.subsets .*different names"):
        rows_of(subsets=("Focus", "Focus"))
    with pytest.raises(UserError, match=r"checkable\.validation_rows: no new Focus group after"):
        rows_of(subsets=("Focus",), train_rows=0, validation_rows=20000, test_rows=0)
