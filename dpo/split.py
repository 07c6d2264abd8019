"""Splits of rows into training, validation and test that do not leak, and a guard that proves it.

A leak is a group, a prompt or a long answer (more than 20 characters, normalised as dpo/rows.py says) that is met in
two splits. "group" binds rows that share any of these and never parts them; "study" copies a published split and counts
its leaks. Read next: dpo/trees.py, where rows become tokens.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dpo.rows import SPLITS, Row, normalise, pairs_of, prompt_key, values_of
from models.errors import UserError, show

LONG_ANSWER_CHARACTERS = 20  # "yes" may be met in two splits, a sentence may not
STUDY_ROWS, STUDY_TRAIN_ROWS, STUDY_TEST_ROWS = 1865, 1500, 300  # RewardBench 2, and what Together AI drew from it
ROWS_IN_A_MESSAGE = 5
KINDS = ("prompt", "group", "answer")

Parts = dict[str, list[Row]]
Mark = tuple[str, str]  # what two rows of different splits must not share: (kind, normalised text)
Leaks = dict[Mark, list[tuple[str, Row]]]  # what they share nevertheless, and who: (split, row)


@dataclass(frozen=True)
class Splits:
    """Rows by use, each in the order of ids, and a report of counts and leaks for results.json."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    report: dict[str, object]


def split_rows(
    rows: Sequence[Row], *, split: str, validation_fraction: float, test_fraction: float, seed: int
) -> Splits:
    """Rows for training, validation and test; the same for the same rows and seed, whatever the order of the file.

    split="group" keeps together what shares a group, a prompt or a long answer, and stratifies by subset. A row with
    a `split` goes there with all that is bound to it; the fractions divide the others. Given splits that leak are an
    error. split="study" is Together's: 1500/1865 and 300/1865 of each subset's rows for training and test
    (test_fraction is not read), the rest unused; training is cut into one row per pair, "id#j": the first chosen answer
    against the rejected one j, however many are right (Ties); validation_fraction of these *pairs* validate.
    """
    assert len({row.id for row in rows}) == len(rows), "rows to split have ids in common"
    train_fraction = 1 - validation_fraction - test_fraction
    fraction = {"train": train_fraction, "validation": validation_fraction, "test": test_fraction}
    parts, unused_rows = SPLITTERS[split](sorted(rows, key=lambda row: row.id), fraction, seed)
    parts = {name: sorted(part, key=lambda row: row.id) for name, part in parts.items()}
    leaks = find_leaks(parts)
    if split == "group" and leaks:
        raise UserError(_leak_message(leaks))
    for name, part in parts.items():
        if not part and (fraction[name] > 0 or (split == "study" and name == "test")):
            way_out = f", or set data.{name}_fraction=0" if split == "group" and name != "train" else ""
            counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
            raise UserError(f"data.split={split}: no row is left for {name} ({counts}); give more rows{way_out}")
    count = Counter((row.subset, name) for name, part in parts.items() for row in part)
    subsets = sorted({row.subset for row in rows})
    report: dict[str, object] = {
        "split": split,
        "rows": {name: len(part) for name, part in parts.items()},
        "pairs": {name: sum(len(pairs_of(row, 0)) for row in part) for name, part in parts.items()},
        "groups": {name: len({row.group for row in part}) for name, part in parts.items()},
        "subsets": {subset: {name: count[subset, name] for name in SPLITS} for subset in subsets},
        "unused_rows": unused_rows,
        "leaks": {kind: sum(mark[0] == kind for mark in leaks) for kind in KINDS},
    }
    return Splits(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), report)


def _split_by_group(rows: list[Row], fraction: dict[str, float], seed: int) -> tuple[Parts, int]:
    parts: Parts = {name: [] for name in SPLITS}
    strata: dict[str, list[list[Row]]] = defaultdict(list)
    for unit in bound_rows(rows):
        given = [row.split for row in unit if row.split is not None]
        if given:  # given splits that differ: each row keeps its own, and the guard names the leak
            for row in unit:
                parts[row.split or given[0]].append(row)
        else:
            strata[Counter(row.subset for row in unit).most_common(1)[0][0]].append(unit)
    # A unit goes where rows are missed most, counted over all strata: each subset is divided by the fractions to within
    # about a unit, and the roundings of many small subsets do not add up.
    seen, count = 0, dict.fromkeys(SPLITS, 0)
    for subset in sorted(strata, key=lambda subset: _draw(seed, subset)):
        for unit in sorted(strata[subset], key=lambda unit: _draw(seed, unit[0].id)):
            seen += len(unit)
            # Rounded, so that 0.7 - 0.7 is a tie. What is missed adds up to the unit, so a fraction of 0 never leads.
            name = max(SPLITS, key=lambda name: (round(fraction[name] * seen - count[name], 9), fraction[name]))
            count[name] += len(unit)
            parts[name].extend(unit)
    return parts, 0


def _split_like_the_study(rows: list[Row], fraction: dict[str, float], seed: int) -> tuple[Parts, int]:
    given = [row for row in rows if row.split is not None]
    if given:
        raise UserError(
            f"data.split=study draws its own splits, but {len(given)} rows give one ({_name(given[0])}); "
            "remove `split` from the rows, or set data.split=group"
        )
    subsets: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _draw(seed, row.id)):
        subsets[row.subset].append(row)
    train: list[Row] = []
    test: list[Row] = []
    for drawn in subsets.values():
        train_rows, test_rows = (n * len(drawn) // STUDY_ROWS for n in (STUDY_TRAIN_ROWS, STUDY_TEST_ROWS))
        train += drawn[:train_rows]
        test += drawn[train_rows : train_rows + test_rows]
    pairs = [
        replace(
            row,
            id=f"{row.id}#{j}",
            chosen=row.chosen[:1],
            rejected=(rejected,),
            pair_values=(values_of(row, 0, j),) if row.pair_values else (),
        )
        for row in train
        for j, rejected in enumerate(row.rejected)
    ]
    pairs.sort(key=lambda row: _draw(seed, row.id))
    n_validation = round(fraction["validation"] * len(pairs))
    parts = {"train": pairs[n_validation:], "validation": pairs[:n_validation], "test": test}
    return parts, len(rows) - len(train) - len(test)


SPLITTERS: dict[str, Callable[[list[Row], dict[str, float], int], tuple[Parts, int]]] = {
    "group": _split_by_group,
    "study": _split_like_the_study,
}


def _draw(seed: int, name: str) -> bytes:
    """What to sort by for a random order that is the same on every machine, whatever the order of the file."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def marks_of(row: Row) -> set[Mark]:
    """What binds a row to others: its group, its normalised prompt, its normalised long answers."""
    answers = {normalise(answer) for answer in row.chosen + row.rejected}
    long_answers = {("answer", answer) for answer in answers if len(answer) > LONG_ANSWER_CHARACTERS}
    return {("group", row.group), ("prompt", prompt_key(row.prompt))} | long_answers


def bound_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows in units: two rows are in one unit when a chain of shared marks leads from one to the other (union-find)."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    holder: dict[Mark, str] = {}
    for row in rows:
        for mark in marks_of(row):
            parent[root(holder.setdefault(mark, row.id))] = root(row.id)
    units: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        units[root(row.id)].append(row)
    return list(units.values())


def find_leaks(parts: Parts) -> Leaks:
    """Every mark that is met in more than one split: prompts first, then groups, then answers."""
    holders: Leaks = defaultdict(list)
    for name, part in parts.items():
        for row in part:
            for mark in marks_of(row):
                holders[mark].append((name, row))
    leaks = {mark: held for mark, held in holders.items() if len({name for name, _ in held}) > 1}
    return {mark: leaks[mark] for mark in sorted(leaks, key=lambda mark: (KINDS.index(mark[0]), mark))}


def _leak_message(leaks: Leaks) -> str:
    places: dict[str, str] = {}
    for held in leaks.values():
        one_of_each_split = {name: (name, row) for name, row in reversed(held)}  # so that both sides are shown
        for name, row in (*one_of_each_split.values(), *held):
            places.setdefault(row.id, f"{_name(row)} in {name}")
    shown = ", ".join(list(places.values())[:ROWS_IN_A_MESSAGE]) + ", ..." * (len(places) > ROWS_IN_A_MESSAGE)
    counts = Counter(kind for kind, _ in leaks)
    kinds = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    kind, text = next(iter(leaks))
    return (
        f"the given splits leak: {len(places)} rows share {kinds} over train, validation and test: {shown}; the first "
        f"is the {kind} {show(text)}. Give rows that share a group, a prompt or an answer of over "
        f"{LONG_ANSWER_CHARACTERS} characters the same `split`, or remove `split`: then they are kept together"
    )


def _name(row: Row) -> str:
    return f"{row.id!r} ({row.where})" if row.where else repr(row.id)
