"""Checkable rows: a seeded generator of preference rows whose labels a few lines of code prove; no download needed.

Rows come in counterfactual groups: four requests and the same four answers, each right for exactly one of the requests
(`check` of the subset says so for all 16 combinations). With rejected_per_row=1 the rows of a group are two couples:
where a row prefers answer a over answer b, its twin prefers b over a; with 3, every row rejects the three other
answers. So over a group each (winner, loser) comes with its mirror, and a judge that does not read the request wins
exactly as often as it loses. The splits share no topic, name, template or wording.
Read next: dpo/checkable/makers.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from dpo.checkable.makers import BANKS, SUBSETS, Request, Subset
from dpo.config import CheckableConfig
from dpo.rows import Row, normalise
from models.errors import UserError

GROUP = 4
_COUPLINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))  # the ways to make two couples of four rows
_TRIES = 1000  # draws for one group before we say that the banks are exhausted


def make_rows(config: CheckableConfig, seed: int) -> list[Row]:
    """Make the rows of all three splits; equal arguments give equal rows on every machine.

    Sizes are rounded up to whole groups of 4 and to equally many groups a subset; 0 leaves validation out. More rows
    of a split are the same rows (all knobs at 0) and then others. Three knobs act on the training split alone, within
    each subset, rounded to a whole:

    label_noise: fraction of rows whose chosen and rejected are swapped, whole couples (rejected_per_row=1) or whole
        groups (3) at a time, so that groups stay closed.
    length_confound: fraction of rows whose chosen answers are made longer than all rejected ones by filler sentences
        (where they are not already). Right answers stay right and wrong ones wrong, but these groups are no longer
        closed: length tells. A group in which no filler fits (exactly 4 words) is drawn anew.
    length_counter: fraction of rows whose rejected answers are then made longer than all chosen ones, by the same
        sentences; with a confound of 1.0 and a counter of 0.5 length tells nothing.
    """
    subsets = config.subsets
    unknown = [name for name in subsets if name not in SUBSETS]
    if unknown or len(set(subsets)) < len(subsets):
        problem = f"unknown {unknown[0]!r}" if unknown else "must be different names"
        raise UserError(f"checkable.subsets = {list(subsets)}: {problem}; choose from {', '.join(SUBSETS)}")
    least = GROUP * len(subsets)
    sizes = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}
    rows: list[Row] = []
    for split, size in sizes.items():
        if 0 < size < least:
            zero = "0 or " * (split == "validation")
            raise UserError(
                f"checkable.{split}_rows = {size}: must be {zero}at least {least}, one group "
                f"of {GROUP} rows for each of the {len(subsets)} subsets; raise it or name fewer in checkable.subsets"
            )
        for name in subsets:
            rows += _subset_rows(name, split, -(-size // least), config, seed)
    return rows


def assert_closed(rows: Sequence[Row]) -> None:
    """Each (winner, loser) pair of answers of the rows comes as often as its mirror."""
    pairs = Counter((winner, loser) for row in rows for winner in row.chosen for loser in row.rejected)
    assert pairs == Counter((loser, winner) for winner, loser in pairs.elements()), f"{rows[0].group} is not closed"


def _subset_rows(name: str, split: str, groups: int, config: CheckableConfig, seed: int) -> list[Row]:
    """All rows of one subset in one split. Seeds are strings, so that nothing depends on another subset or split."""
    subset, difficulty = SUBSETS[name], config.difficulty
    key, trains = f"{seed}/{split}/{name}/{difficulty}", split == "train"
    couplings = _COUPLINGS if config.rejected_per_row == 1 else (((0, 1, 2, 3),),)
    swapped = _nested_sample(f"{key}/noise", groups * len(couplings[0]), config.label_noise * trains)
    longer = _nested_sample(f"{key}/confound", groups * GROUP, config.length_confound * trains)
    counter = _nested_sample(f"{key}/counter", groups * GROUP, config.length_counter * trains)
    turn = Random(f"{key}/couplings").randrange(len(_COUPLINGS))
    rows: list[Row] = []
    prompts: set[str] = set()
    for g in range(groups):
        group = f"checkable-{split}-{name.lower().replace(' ', '-')}-{g}"
        couples = couplings[(turn + g) % len(couplings)]
        rng = Random(f"{key}/{g}")
        for _ in range(_TRIES):
            draft = subset.draw(rng, split, difficulty) or []
            new = {normalise(request.text) for request in draft}
            # Each answer is right for its own request and for no other.
            proved = all(subset.check(mine.spec, one.answer) == (mine is one) for mine in draft for one in draft)
            if len(new) < GROUP or new & prompts or not proved:
                continue
            draft = Random(f"{key}/{g}/order").sample(draft, GROUP)
            made = []
            for i, request in enumerate(draft):
                c, couple = next((c, couple) for c, couple in enumerate(couples) if i in couple)
                right, wrong = (request.answer,), tuple(draft[j].answer for j in couple if j != i)
                chosen, rejected = (wrong, right) if g * len(couples) + c in swapped else (right, wrong)
                message = {"role": "user", "content": request.text}
                made.append(Row(f"{group}-{i}", name, (message,), chosen, rejected, group, split))
            assert_closed(made)
            sides = [
                (i, side) for side, of in enumerate((longer, counter)) for i in range(GROUP) if g * GROUP + i in of
            ]
            if _lengthen(subset, draft, made, sides, rng):
                rows += made
                prompts |= new
                break
        else:
            raise UserError(
                f"checkable.{split}_rows: no new {name} group after {len(rows)} rows of difficulty {difficulty}, the "
                f"words of this split are used up; ask for at most {len(rows)} rows a subset"
            )
    return rows


def _nested_sample(seed: str, n: int, fraction: float) -> set[int]:
    """round(fraction * n) of n, the smaller sample inside the larger."""
    return set(Random(seed).sample(range(n), n)[: round(fraction * n)])


def _lengthen(subset: Subset, draft: list[Request], rows: list[Row], sides: list[tuple[int, int]], rng: Random) -> bool:
    """Make the answers of one side (0: chosen, 1: rejected) of these rows longer than the other's; False: can't be."""
    for i, side in sides:
        answers = [rows[i].chosen, rows[i].rejected]
        most = max(map(len, answers[1 - side]))
        answers[side] = tuple(_longer(subset, draft[i], answer, most, rng) for answer in answers[side])
        if not all(answers[side]):
            return False
        rows[i] = replace(rows[i], chosen=answers[0], rejected=answers[1])
    return True


def _longer(subset: Subset, request: Request, answer: str, most: int, rng: Random) -> str:
    """The answer with filler sentences until it has more than `most` characters, its truth kept; "" if none fits."""
    truth = subset.check(request.spec, answer)
    fillers = BANKS["train"]["filler"]
    for filler in rng.sample(fillers, len(fillers)):
        if not answer or len(answer) > most:
            break
        bullet = "\n- " if answer.startswith("- ") else " "
        ways = [
            *([f'{answer[:-1]}, "Note": "{filler}"}}'] if answer.startswith("{") else []),
            *([f"{answer[:-1]} {filler}{answer[-1]}"] if answer.endswith('"') else []),
            f"{answer}{bullet}{filler}",
            f"{filler} {answer}",
            f"{answer} {filler.lower()}",
            f"{answer} {filler.upper()}",
        ]
        answer = next((way for way in ways if subset.check(request.spec, way) == truth), "")
    return answer if len(answer) > most else ""
