"""Claims about splits: what is bound stays together, nothing leaks, the order of the file does not matter."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dpo.inputs import sample
from dpo.rows import SPLITS, PairValues, Row, keep_rows, normalise, pairs_of, read_rows
from dpo.split import Splits, find_leaks, split_rows
from models.errors import UserError
from tests.rewardbench2 import COUNTS, made_records, write_parquet

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the development data is not here")
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def make_row(name: str, subset: str = "s", prompt: str = "", answer: str = "", **other: str) -> Row:
    prompt_text = prompt or f"request {name}"
    return Row(
        id=name,
        subset=subset,
        prompt=({"role": "user", "content": prompt_text},),
        chosen=(answer or f"right {name}",),
        rejected=(f"wrong {name}",),
        group=other.get("group", f"prompt:{normalise(prompt_text)}"),
        split=other.get("split"),
        where=other.get("where", ""),
    )


def split_of(
    rows: Sequence[Row], seed: int = 0, split: str = "group", validation: float = 0.1, test: float = 0.2
) -> Splits:
    return split_rows(keep_rows(rows), split=split, validation_fraction=validation, test_fraction=test, seed=seed)


def places(splits: Splits) -> dict[str, str]:
    return {row.id: name for name in SPLITS for row in getattr(splits, name)}


def test_every_row_is_in_one_split_and_every_subset_is_divided_by_the_fractions() -> None:
    rows = [
        make_row(f"{subset}{n}", subset) for subset, count in (("a", 200), ("b", 37), ("c", 10)) for n in range(count)
    ]
    splits = split_of(rows)
    assert Counter(row.id for name in SPLITS for row in getattr(splits, name)) == Counter(row.id for row in rows)
    subsets = splits.report["subsets"]
    assert isinstance(subsets, dict)
    for subset, count in (("a", 200), ("b", 37), ("c", 10)):
        assert sum(subsets[subset].values()) == count
        for name, fraction in FRACTIONS.items():
            assert abs(subsets[subset][name] - fraction * count) < 2, "units of one row: within a row at either end"


def test_the_roundings_of_many_small_subsets_do_not_add_up() -> None:
    splits = split_of([make_row(f"{subset}-{n}", f"{subset}") for subset in range(50) for n in range(2)])
    assert splits.report["rows"] == {"train": 70, "validation": 10, "test": 20}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    rows = [make_row(f"r{n}", f"s{n % 3}", answer=f"an answer that {n // 2} rows share") for n in range(60)]
    shuffled = random.Random(1).sample(rows, len(rows))
    for method in ("group", "study"):
        assert split_of(rows, split=method) == split_of(shuffled, split=method)
        assert places(split_of(rows, split=method)) != places(split_of(rows, seed=1, split=method))


@pytest.mark.parametrize(
    "shared",
    [{"group": "g"}, {"prompt": "The same, request!"}, {"answer": "An answer of more than 20 characters"}],
    ids=lambda shared: next(iter(shared)),
)
def test_rows_that_share_a_group_a_prompt_or_a_long_answer_are_never_parted(shared: dict[str, str]) -> None:
    for seed in range(10):
        rows = [make_row(f"r{n}") for n in range(40)] + [make_row(f"x{n}", **shared) for n in range(6)]
        where = places(split_of(rows, seed))
        assert len({where[f"x{n}"] for n in range(6)}) == 1
        assert split_of(rows, seed).report["leaks"] == {"group": 0, "prompt": 0, "answer": 0}


def test_a_chain_of_shared_things_binds_too() -> None:
    long = "a sentence that is long enough"
    for seed in range(10):
        chain = [
            make_row("x0", prompt="Same?"),
            make_row("x1", prompt="same", answer=long),
            replace(make_row("x2", group="g"), rejected=("wrong", long.upper() + "!!")),
            make_row("x3", group="g"),
        ]
        where = places(split_of([make_row(f"r{n}") for n in range(40)] + chain, seed))
        assert len({where[row.id] for row in chain}) == 1


def test_answers_of_twenty_characters_bind_nothing_and_of_twenty_one_do() -> None:
    for length, parted in ((20, True), (21, False)):
        rows = [make_row(f"r{n}", answer="a" * length + " ...") for n in range(40)]
        if parted:
            assert split_of(rows).report["leaks"] == {"group": 0, "prompt": 0, "answer": 0}
        else:
            with pytest.raises(UserError, match="no row is left for"):
                split_of(rows)


def test_given_splits_are_honoured_and_what_is_bound_to_them_follows() -> None:
    rows = [make_row(f"r{n}") for n in range(30)]
    rows += [make_row(f"{name}{n}", split=name, group=f"{name}{n}") for name in SPLITS for n in range(4)]
    rows += [make_row(f"{name}-bound", group=f"{name}0") for name in SPLITS]
    for seed in range(5):
        where = places(split_of(rows, seed))
        assert all(where[f"{name}{end}"] == name for name in SPLITS for end in (0, 1, 2, 3, "-bound"))


def test_a_fraction_of_zero_leaves_a_given_test_as_it_is() -> None:
    rows = [make_row(f"r{n}") for n in range(30)] + [make_row(f"t{n}", split="test") for n in range(5)]
    splits = split_of(rows, test=0.0)
    assert {row.id for row in splits.test} == {f"t{n}" for n in range(5)}
    assert split_of(rows[:30], validation=0.0, test=0.0).report["rows"] == {"train": 30, "validation": 0, "test": 0}


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({"group": "g"}, "1 group over"),
        ({"prompt": "The same, request!"}, "1 prompt, 1 group over"),
        ({"answer": "An answer of more than 20 characters"}, "1 answer over"),
    ],
    ids=["group", "prompt", "answer"],
)
def test_given_splits_that_leak_are_an_error_that_names_the_rows(shared: dict[str, str], expected: str) -> None:
    rows = [make_row(f"r{n}", where=f"f.jsonl:{n}") for n in range(30)]
    rows += [make_row(f"x{n}", split="test" if n else "train", where=f"f.jsonl:9{n}", **shared) for n in range(7)]
    with pytest.raises(UserError) as caught:
        split_of(rows)
    message = str(caught.value)
    assert f"7 rows share {expected}" in message
    assert "'x0' (f.jsonl:90) in train" in message and "'x1' (f.jsonl:91) in test" in message
    assert message.count("f.jsonl:") == 5, "at most five rows are named"
    assert "remove `split`" in message


def test_given_splits_that_leak_through_rows_without_a_split_are_an_error_too() -> None:
    rows = [make_row("a", split="train", prompt="one"), make_row("b", split="test", group="g")]
    rows += [make_row("between", prompt="one", group="g")] + [make_row(f"r{n}") for n in range(30)]
    with pytest.raises(UserError, match="'between'"):
        split_of(rows)


def test_the_guard_finds_every_kind_of_leak_in_finished_parts() -> None:
    long = "a sentence that is long enough"
    parts = {
        "train": [make_row("a", group="g"), make_row("b", prompt="x y"), make_row("c", answer=long)],
        "validation": [make_row("d", group="g")],
        "test": [make_row("e", prompt="X, y", group="h"), make_row("f", answer=f"{long}!")],
    }
    assert list(find_leaks(parts)) == [("prompt", "x y"), ("group", "g"), ("answer", long)]


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(UserError, match="no row is left for validation .* or set data.validation_fraction=0"):
        split_of([make_row(f"r{n}", split="test" if n else "train") for n in range(9)])
    with pytest.raises(UserError, match="no row is left for train"):
        split_of([make_row("a", split="test"), make_row("b", split="validation")])


def rewardbench2_sized_rows() -> list[Row]:
    counts = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
    return [
        replace(make_row(f"{subset}{n}", subset), rejected=("wrong", "worse", "worst"))
        for subset, count in counts.items()
        for n in range(count)
    ]


def test_the_study_split_has_the_published_counts_and_counts_its_leaks() -> None:
    rows = rewardbench2_sized_rows()
    splits = split_of(rows, split="study")
    assert Counter(row.subset for row in splits.test) == {
        "Factuality": 76, "Precise IF": 25, "Math": 29, "Safety": 72, "Focus": 79, "Ties": 16
    }  # fmt: skip
    train_ids = {row.id.rpartition("#")[0] for row in [*splits.train, *splits.validation]}
    assert (len(splits.test), len(train_ids), splits.report["unused_rows"]) == (297, 1498, 70)
    assert not train_ids & {row.id for row in splits.test}
    assert (len(splits.validation), len(splits.train)) == (449, 4045), "a tenth of 3 x 1498 pairs, and the others"
    leaks = splits.report["leaks"]
    parted = {row.group for row in splits.train} & {row.group for row in splits.validation}
    assert isinstance(leaks, dict) and leaks["group"] == leaks["prompt"] == len(parted) > 300


def test_the_study_split_pairs_the_first_chosen_answer_with_each_rejected_one() -> None:
    values = tuple(PairValues(weight=1.0 + pair) for pair in range(6))
    rows = {row.id: replace(row, chosen=("right", "also right")) for row in rewardbench2_sized_rows()}
    rows = {row.id: replace(row, pair_values=values[: len(pairs_of(row, 0))]) for row in rows.values()}
    splits = split_of(list(rows.values()), split="study")
    for row in [*splits.train, *splits.validation]:
        source, _, j = row.id.rpartition("#")
        whole = rows[source]
        cut = {"chosen": whole.chosen[:1], "rejected": (whole.rejected[int(j)],)}
        assert row == replace(whole, id=row.id, **cut, pair_values=(PairValues(1.0 + int(j)),))
    pairs = Counter(row.id.rpartition("#")[0] for row in [*splits.train, *splits.validation])
    assert all(count == len(rows[source].rejected) for source, count in pairs.items())


def made_rewardbench2(folder: Path) -> Sequence[Row]:
    """Rows read from the made parquet, whose Ties rows have the study's wrong answers in those that seed 0 draws."""
    rows = read_rows(write_parquet(folder / "first.parquet", made_records()))
    study = split_of(rows, split="study")
    train = [*study.train, *study.validation]
    drawn = {row.id.rpartition("#")[0] for row in train if row.subset == "Ties"}
    return read_rows(write_parquet(folder / "rb2.parquet", made_records(drawn)), "rb2")


def test_a_parquet_of_rewardbench2_gives_the_studys_rows_pairs_and_splits(tmp_path: Path) -> None:
    rows = made_rewardbench2(tmp_path)
    assert (len(rows), Counter(row.subset for row in rows)) == (1865, Counter(COUNTS))
    study = split_of(rows, split="study")
    assert Counter(row.subset for row in study.test) == {
        "Factuality": 76, "Precise IF": 25, "Math": 29, "Safety": 72, "Focus": 79, "Ties": 16
    }  # fmt: skip
    pairs = [*study.train, *study.validation]
    train_rows = {row.id.rpartition("#")[0] for row in pairs}
    assert (len(train_rows), len(study.test), study.report["unused_rows"]) == (1498, 297, 70)
    ties = [row for row in pairs if row.subset == "Ties"]
    assert (len({row.id.rpartition("#")[0] for row in ties}), len(ties)) == (82, 1159)
    assert (len(pairs), len(study.train), len(study.validation)) == (5407, 4866, 541)
    leaks = study.report["leaks"]
    assert isinstance(leaks, dict) and leaks["prompt"] > 400 and leaks["group"] > 400


def test_our_split_of_the_same_parquet_does_not_leak(tmp_path: Path) -> None:
    rows = made_rewardbench2(tmp_path)
    ours = split_of(rows, test=297 / 1865)
    assert ours.report["leaks"] == {"prompt": 0, "group": 0, "answer": 0}
    assert (
        abs(len(ours.test) - 297) <= 2 and sum(len(part) for part in (ours.train, ours.validation, ours.test)) == 1865
    )
    where = places(ours)
    assert all(where[f"ref:{n}"] == where[f"tied:{n}"] for n in range(51)), "a Ties question is one group"


def test_the_study_split_refuses_rows_that_give_a_split() -> None:
    with pytest.raises(UserError, match=r"1 rows give one \('x' \(f.jsonl:3\)\)"):
        split_of([make_row("a"), make_row("x", split="test", where="f.jsonl:3")], split="study")


@needs_data
@pytest.mark.parametrize("name", ["rb2_shaped", "truthfulqa", "pandalm", "rewardbench2_safety"])
def test_real_rows_split_by_group_do_not_leak_and_keep_the_fractions(name: str) -> None:
    rows = read_rows(DATA / f"{name}.jsonl")
    splits = split_of(rows)
    texts = [
        {normalise(row.prompt[0]["content"]) for row in part}
        | {key for row in part for answer in row.chosen + row.rejected if len(key := normalise(answer)) > 20}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == len(rows)
    largest_unit = 11  # the largest set of rows bound together in these files
    for part, fraction in zip((splits.train, splits.validation, splits.test), FRACTIONS.values(), strict=True):
        assert abs(len(part) - fraction * len(rows)) <= largest_unit


@needs_data
def test_real_rows_split_like_the_study_leak_and_say_so() -> None:
    leaks = split_of(read_rows(DATA / "rb2_shaped.jsonl"), split="study").report["leaks"]
    assert isinstance(leaks, dict) and min(leaks.values()) > 100


@pytest.mark.parametrize("most", [1, 7, 8, 50])
def test_a_sample_takes_whole_groups_and_as_many_rows_as_fit(most: int) -> None:
    rows = keep_rows(make_row(f"{n}-{i}", group=f"g{n}") for n in range(10) for i in range(4 if n < 7 else 1))
    taken = sample(rows, most, seed=3, key="judge.rows")
    groups = {row.group for row in taken}
    assert taken == [row for row in rows if row.group in groups]
    assert len(taken) <= most and all(
        len(taken) + (4 if n < 7 else 1) > most for n in range(10) if f"g{n}" not in groups
    )
    assert sample(rows, most, seed=3, key="judge.rows") == taken and sample(rows, 0, 3, "judge.rows") == rows
    with pytest.raises(UserError, match="judge.rows=3: whole groups of rows are drawn"):
        sample(keep_rows(row for row in rows if row.group == "g0"), 3, seed=3, key="judge.rows")
