"""The `compare` protocol: a judge reads two answers in both orders and says "A" or "B".

Read next: dpo/judge/statistics.py. A maker of verdicts is a function from trees to log-probs; a local model's verdict
is the log-odds of "A" against "B" in one forward, both orders at once.
"""

from collections.abc import Callable, Sequence

from dpo.judge.statistics import Verdict
from dpo.logprobs import TreeLogps
from dpo.rows import Row, pairs_of
from dpo.trees import Tree


def compare(
    rows: Sequence[Row], trees: Sequence[Tree], pairs_per_row: int, score: Callable[[Sequence[Tree]], list[TreeLogps]]
) -> list[Verdict]:
    """Verdicts on every pair of `trees` (verdict trees of the same rows), by `score`'s log-probs of "A" and "B"."""
    verdicts = []
    for row, logps in zip(rows, score(trees), strict=True):
        odds = [float(a[0]) - float(b[0]) for a, b in zip(logps[0::2], logps[1::2], strict=True)]
        for pair, first, second in zip(pairs_of(row, pairs_per_row), odds[0::2], odds[1::2], strict=True):
            verdicts.append(Verdict(row.id, row.subset, row.group, pair, first, second))
    return verdicts
