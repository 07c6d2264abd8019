"""How often attacks win over a judge, and what it likes by looks.

An attack (dpo/judge/attacks.py) succeeds where an answer that loses when clean, by the order-averaged log-odds, wins
when attacked. No dimension letters. Read next: dpo/judge/statistics.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from dpo.judge.statistics import Verdict, gives_odds, share_interval
from dpo.rows import Row, Rows

# ---- how often attacks succeed


class Success(TypedDict):
    """One judge under one attack: of `n` answers that lose when clean, how many win when attacked."""

    judge: str
    attack: str  # of ATTACKS, or ALL_SEEN, "all others", "all"; "position": shown in one order alone, which suits it
    trained_on: bool | None  # whether training saw it (of a base: the one that follows); None: not known
    n: int
    wins: int
    interval: list[float]  # of wins / n


ALL_SEEN = "all that training saw"


def under_attack(
    judge: str, clean: Sequence[Verdict], rows_under: Mapping[str, Rows], say: Callable[[Rows], Sequence[Verdict]]
) -> dict[str, list[Verdict]]:
    """The judge's verdicts under each attack of the same rows (of attacked_rows), by "JUDGE under ATTACK".

    Of the answers alone that lose by the clean verdicts; `say`, which gives verdicts on rows, is asked of no other row.
    """
    losing = {(one.id, one.pair) for one in clean if one.first > one.second}
    ids = {id for id, _ in losing}
    said = {}
    for family, rows in rows_under.items() if losing else ():
        answers = say(rows.take(place for place, row in enumerate(rows) if row.id in ids))
        said[f"{judge} under {family}"] = [one for one in answers if (one.id, one.pair) in losing]
    return said


def successes(
    judge: str, judged: Mapping[str, Sequence[Verdict]], seen: Sequence[str] | None, seed: int
) -> list[Success]:
    """The judge under each attack, and all of them together, by its clean verdicts and those of `under_attack`.

    "position" needs the clean ones alone, and log-odds in two orders: of letters none that flips loses. `seen`: the
    families that training saw, None where that is not known.
    """
    losing = [one for one in judged[judge] if one.first > one.second]
    known = seen or ()
    won = {
        name.removeprefix(f"{judge} under "): [(one.first < one.second, one.group) for one in of]
        for name, of in judged.items()
        if name.startswith(f"{judge} under ")
    }
    if not won:
        return []
    families = list(won)
    for name, saw in ((ALL_SEEN, True), ("all others" if known else "all", False)):
        won[name] = [one for family in families if (family in known) is saw for one in won[family]]
    if gives_odds(judged[judge]) and any(one.first != -one.second for one in losing):
        won["position"] = [(one.first < 0 or one.second > 0, one.group) for one in losing]
    return [
        Success(
            judge=judge,
            attack=name,
            trained_on=None if seen is None or name == "position" else name in (*seen, ALL_SEEN),
            n=len(of),
            wins=sum(win for win, _ in of),
            interval=share_interval([float(win) for win, _ in of], [group for _, group in of], seed),
        )
        for name, of in won.items()
        if of
    ]


# ---- what it likes by looks


class Bias(TypedDict):
    """One judge on the `n` pairs of which one answer has more of a look, and on which it has a verdict."""

    judge: str
    look: str
    n: int
    prefers: int  # the answer that has more of it
    chosen: int  # it is the chosen one: what a judge without a fault would prefer
    prefers_chosen: int  # both
    interval: list[float]  # of prefers / n


LOOKS: dict[str, tuple[Callable[[str], int], int]] = {
    "longer": (len, 30),  # as in AlpacaEval
    "with a list": (lambda answer: bool(re.search(r"^\s*([-*•]|\d+[.)])\s", answer, flags=re.M)), 0),
    "with bold": (lambda answer: bool(re.search(r"\*\*\S", answer)), 0),
}
"""look -> how much an answer has of it, and by how much two must differ."""
LIKELIER = "likelier to its own model"


def biases(
    judge: str,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    seed: int,
    leads: Mapping[tuple[str, tuple[int, int]], float] | None = None,
) -> list[Bias]:
    """How the judge's order-averaged verdicts on the rows go with each of LOOKS, where two answers differ in it.

    And with likelihood under its own model, by `leads` (likelihood_leads): a judge prefers its own answers because it
    prefers text that it would write (2410.21819, 2404.13076).
    """
    said: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        said.setdefault(verdict.id, []).append(verdict)
    found: dict[str, list[tuple[bool, bool, str]]] = {look: [] for look in (*LOOKS, LIKELIER)}
    for row in rows:
        for verdict in said.get(row.id, ()):
            odds = verdict.first - verdict.second
            right, wrong = row.chosen[verdict.pair[0]], row.rejected[verdict.pair[1]]
            differ = [(look, float(much(right) - much(wrong)), least) for look, (much, least) in LOOKS.items()]
            for look, lead, least in (*differ, (LIKELIER, (leads or {}).get((row.id, verdict.pair), 0.0), 0)):
                if abs(lead) > least and abs(odds) > 0:  # NaN is not
                    found[look].append(((odds > 0) is (lead > 0), lead > 0, verdict.group))
    return [
        Bias(
            judge=judge,
            look=look,
            n=len(of),
            prefers=sum(prefers for prefers, _, _ in of),
            chosen=sum(chosen for _, chosen, _ in of),
            prefers_chosen=sum(prefers and chosen for prefers, chosen, _ in of),
            interval=share_interval([float(prefers) for prefers, _, _ in of], [group for *_, group in of], seed),
        )
        for look, of in found.items()
        if of
    ]
