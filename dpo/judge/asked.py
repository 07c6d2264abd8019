"""Verdicts of a judge that writes: the `compare` protocol asked in words, its answers read strictly.

Read next: dpo/judge/protocols.py, which reads the same verdicts from a local model's log-probs.
"""

import math
import re
from collections.abc import Sequence

from dpo.judge.endpoint import Answer, Ask
from dpo.judge.prompts import LABELS, judge_messages
from dpo.judge.statistics import Verdict
from dpo.rows import Row, pairs_of

VERDICT = re.compile(
    r"[\W_]*(?:(?i:(?:the )?(?:better |best )?(?:answer|verdict|choice|winner)(?: is)?)[\W_]+)?([AB])[\W_]*"
)


def compare_asked(
    rows: Sequence[Row], pairs_per_row: int, ask: Ask, *, sighted: bool
) -> tuple[list[Verdict], list[Answer]]:
    """Verdicts on the first `pairs_per_row` pairs of each row (0: all), and the two answers that each is read from."""
    pairs = [(row, i, j) for row in rows for i, j in pairs_of(row, pairs_per_row)]
    prompts = [
        judge_messages(row.prompt, first, second, sighted=sighted)
        for row, i, j in pairs
        for first, second in ((row.chosen[i], row.rejected[j]), (row.rejected[j], row.chosen[i]))
    ]
    answers = ask(prompts, lambda answer: not math.isnan(verdict_odds(answer)))
    odds = [verdict_odds(answer) for answer in answers]
    verdicts = [
        Verdict(row.id, row.subset, row.group, (i, j), first, second)
        for (row, i, j), first, second in zip(pairs, odds[0::2], odds[1::2], strict=True)
    ]
    return verdicts, answers


def verdict_odds(answer: Answer) -> float:
    """log p("A") - log p("B") (nats) where the answer gives its verdict; NaN where it gives none.

    The verdict is a letter on a line of its own, the first or the last. Its odds are from what the endpoint says of the
    tokens in that place, whatever spaces and marks they have; a letter that it does not name is as likely as it can be:
    as the least likely one named, or as all that are not. Without such tokens the odds are 1 or -1.
    """
    place = _verdict_place(answer.text) if answer.finish != "error" else None
    if place is None:
        return math.nan
    at = "".join(token for token, _ in answer.tokens).rfind(answer.text) + place
    for token, top in answer.tokens:
        if 0 <= at < len(token) and top:
            unnamed = min(*top.values(), math.log(max(1e-9, 1 - sum(map(math.exp, top.values())))))
            a, b = (_log_sum([p for other, p in top.items() if _letters(other) == label], unnamed) for label in LABELS)
            if a != b:
                return a - b
        at -= len(token)
    return 1.0 if answer.text[place] == LABELS[0] else -1.0


def _verdict_place(text: str) -> int | None:
    lines = [line.span() for line in re.finditer(r"\S.*", text)]
    found = [match for match in (VERDICT.fullmatch(text, *line) for line in lines[:1] + lines[-1:]) if match]
    return found[0].start(1) if len({match[1] for match in found}) == 1 else None


def _letters(token: str) -> str:
    return re.sub(r"[\W_]", "", token)


def _log_sum(log_p: Sequence[float], empty: float) -> float:
    total = sum(map(math.exp, log_p))
    return math.log(total) if total else empty
