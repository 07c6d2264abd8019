"""Splits of rows into training, validation and test that do not leak, and a guard that proves it.

A leak is a group, a prompt or a long answer (more than 20 characters, normalised as dpo/rows.py says) that is met in
two splits. "group" binds rows that share any of these and never parts them; "study" copies a published split and counts
its leaks. Rows are on disk and are read one at a time; of what binds them only hashes are held.
Read next: dpo/trees.py, where rows become tokens.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from dpo.rows import SPLITS, Row, Rows, keep_rows, normalise, prompt_key, values_of
from models.errors import UserError, show

LONG_ANSWER_CHARACTERS = 20  # "yes" may be met in two splits, a sentence may not
STUDY_ROWS, STUDY_TRAIN_ROWS, STUDY_TEST_ROWS = 1865, 1500, 300  # RewardBench 2, and what Together AI drew from it
ROWS_IN_A_MESSAGE = 5
KINDS = ("prompt", "group", "answer")

Parts = dict[str, Rows]
Mark = tuple[str, str]  # what two rows of different splits must not share: (kind, normalised text)
Leaks = dict[Mark, list[tuple[str, Row]]]  # what they share nevertheless, and who: (split, row)


@dataclass(frozen=True)
class Splits:
    """Rows by use, each in the order of ids, and a report of counts and leaks for results.json."""

    train: Rows
    validation: Rows
    test: Rows
    report: dict[str, object]


def split_rows(rows: Rows, *, split: str, validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Rows for training, validation and test; the same for the same rows and seed, whatever the order of the file.

    split="group" keeps together what shares a group, a prompt or a long answer, and stratifies by subset. A row with
    a `split` goes there with all that is bound to it; the fractions divide the others. Given splits that leak are an
    error. split="study" is Together's: 1500/1865 and 300/1865 of each subset's rows for training and test
    (test_fraction is not read), the rest unused; training is cut into one row per pair, "id#j": the first chosen answer
    against the rejected one j, however many are right (Ties); validation_fraction of these *pairs* validate.
    """
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids), "rows to split have ids in common"
    rows = rows.take(sorted(range(len(ids)), key=ids.__getitem__))
    del ids  # of many rows, the most that is held of them here
    train_fraction = 1 - validation_fraction - test_fraction
    fraction = {"train": train_fraction, "validation": validation_fraction, "test": test_fraction}
    parts, unused_rows = SPLITTERS[split](rows, fraction, seed)
    leaks = find_leaks(parts)
    if split == "group" and leaks:
        raise UserError(_leak_message(leaks))
    for name, part in parts.items():
        if not part and (fraction[name] > 0 or (split == "study" and name == "test")):
            way_out = f", or set data.{name}_fraction=0" if split == "group" and name != "train" else ""
            counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
            raise UserError(f"data.split={split}: no row is left for {name} ({counts}); give more rows{way_out}")
    rows_of: Counter[tuple[str, str]] = Counter()  # by subset and split
    pairs = dict.fromkeys(SPLITS, 0)
    groups: dict[str, set[int]] = {name: set() for name in SPLITS}
    for name, part in parts.items():
        for row in part:
            rows_of[row.subset, name] += 1
            pairs[name] += len(row.chosen) * len(row.rejected)
            groups[name].add(hash(row.group))
    subsets = sorted({row.subset for row in rows})
    report: dict[str, object] = {
        "split": split,
        "rows": {name: len(part) for name, part in parts.items()},
        "pairs": pairs,
        "groups": {name: len(found) for name, found in groups.items()},
        "subsets": {subset: {name: rows_of[subset, name] for name in SPLITS} for subset in subsets},
        "unused_rows": unused_rows,
        "leaks": {kind: sum(mark[0] == kind for mark in leaks) for kind in KINDS},
    }
    return Splits(parts["train"], parts["validation"], parts["test"], report)


def _split_by_group(rows: Rows, fraction: dict[str, float], seed: int) -> tuple[Parts, int]:
    own = ((_draw(seed, row.subset), _draw(seed, row.id), SPLITS.index(row.split) if row.split else -1) for row in rows)
    facts = np.fromiter(own, [("subset", np.uint64), ("row", np.uint64), ("split", np.int64)], len(rows))
    unit = bound_rows(rows)
    size = np.bincount(unit, minlength=len(rows))  # of the unit whose first row this is
    members, begin = np.argsort(unit, kind="stable"), size.cumsum() - size

    def of_unit(first: int) -> NDArray[np.int64]:
        return members[begin[first] : begin[first] + size[first]]

    def stratum(first: int) -> int:
        """What to sort units by: the draw of their commonest subset, then of their first row."""
        return Counter(facts["subset"][of_unit(first)].tolist()).most_common(1)[0][0] << 64 | int(facts["row"][first])

    split = facts["split"]
    given = np.flatnonzero(split >= 0)[::-1]
    bound = np.full(len(rows), -1)
    bound[unit[given]] = split[given]  # to the unit's first row that gives one
    # Where some differ each row keeps its own, and the guard names the leak.
    split = np.where(split < 0, bound[unit], split)
    # A unit goes where rows are missed most, counted over all strata: each subset is divided by the fractions to within
    # about a unit, and the roundings of many small subsets do not add up.
    seen, count = 0, dict.fromkeys(SPLITS, 0)
    for first in sorted(np.flatnonzero((size > 0) & (split < 0)).tolist(), key=stratum):
        seen += int(size[first])
        # Rounded, so that 0.7 - 0.7 is a tie. What is missed adds up to the unit, so a fraction of 0 never leads.
        name = max(SPLITS, key=lambda name: (round(fraction[name] * seen - count[name], 9), fraction[name]))
        count[name] += int(size[first])
        split[of_unit(first)] = SPLITS.index(name)
    return {name: rows.take(np.flatnonzero(split == place)) for place, name in enumerate(SPLITS)}, 0


def _split_like_the_study(rows: Rows, fraction: dict[str, float], seed: int) -> tuple[Parts, int]:
    if given := [row for row in rows if row.split is not None]:
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
        replace(row, id=f"{row.id}#{j}", chosen=row.chosen[:1], rejected=(rejected,), pair_values=values)
        for row in train
        for j, rejected in enumerate(row.rejected)
        for values in [(values_of(row, 0, j),) if row.pair_values else ()]
    ]
    pairs.sort(key=lambda row: _draw(seed, row.id))
    n_validation = round(fraction["validation"] * len(pairs))
    drawn_parts = {"train": pairs[n_validation:], "validation": pairs[:n_validation], "test": test}
    parts = {name: keep_rows(sorted(part, key=lambda row: row.id)) for name, part in drawn_parts.items()}
    return parts, len(rows) - len(train) - len(test)


SPLITTERS: dict[str, Callable[[Rows, dict[str, float], int], tuple[Parts, int]]] = {
    "group": _split_by_group,
    "study": _split_like_the_study,
}


def _draw(seed: int, name: str) -> int:
    """What to sort by for a random order that is the same on every machine, whatever the order of the file."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])


def marks_of(row: Row) -> set[Mark]:
    """What binds a row to others: its group, its normalised prompt, its normalised long answers."""
    answers = {normalise(answer) for answer in row.chosen + row.rejected}
    long_answers = {("answer", answer) for answer in answers if len(answer) > LONG_ANSWER_CHARACTERS}
    return {("group", row.group), ("prompt", prompt_key(row.prompt))} | long_answers


def _hashed_marks(rows: Iterable[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A hash of every mark of every row, in order, and the row's place."""
    marks = ((hash(mark), place) for place, row in enumerate(rows) for mark in marks_of(row))
    found = np.fromiter(marks, [("mark", np.int64), ("row", np.int64)])
    found = found[np.argsort(found["mark"], kind="stable")]
    return found["mark"], found["row"]


def bound_rows(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Of each row the place of its unit's first row: a chain of shared marks binds the rows of a unit (union-find)."""
    marks, places = _hashed_marks(rows)
    parent = array("q", range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    same = np.flatnonzero(marks[1:] == marks[:-1])  # two in 2^64 that only seem so would harm nothing
    for pair in np.stack([places[same], places[same + 1]], 1).tolist():
        first, second = sorted(map(root, pair))
        parent[second] = first
    return np.array([root(place) for place in range(len(parent))], np.int64)


def find_leaks(parts: Mapping[str, Sequence[Row]]) -> Leaks:
    """Every mark that is met in more than one split: prompts first, then groups, then answers."""
    marks, places = _hashed_marks(chain.from_iterable(parts.values()))
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    met = part_of[places]
    crossing = marks[1:][(marks[1:] == marks[:-1]) & (met[1:] != met[:-1])]
    suspects = np.unique(places[np.isin(marks, crossing)])
    holders: Leaks = defaultdict(list)
    for index, (name, part) in enumerate(parts.items()):
        for place in suspects[part_of[suspects] == index] - part_of.searchsorted(index):
            for mark in marks_of(row := part[int(place)]):
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
