"""What is made of a judge's replies: verdicts on pairs, and the score of the benchmark that asks so.

Letters: Q questions of a row (dpo/judge/prompts.py), L labels of the template. Whoever judges, a model or an endpoint,
gives each row `reply_QL`: log p (nats) of each label as the reply to each question, NaN where there was none. A verdict
of `choose` or `rate` has no order: its second log-odds is the first's negative. Read next: dpo/judge/statistics.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpo.judge.benchmarks import choice_score, mean_of_subsets, rating_score, ties_score
from dpo.judge.calibration import Floats
from dpo.judge.prompts import TIES_ID, Pairs, Template, chosen_slot
from dpo.judge.statistics import Verdict
from dpo.logprobs import TreeLogps
from dpo.rows import Row, pairs_of
from dpo.trees import Tree, TreeSettings


def replies_of(tree: Tree, logps: TreeLogps) -> Floats:
    """reply_QL from a local model's log-probs of a verdict tree.

    A label that longer ones begin with, as 1 begins 10, is replied where none of these follows.
    """
    whole = [float(logp.sum()) for logp in logps]
    labels = sum(completion.branch == 0 for completion in tree.completions)
    targets = [completion.targets for completion in tree.completions[:labels]]
    reply_QL = np.array(whole).reshape(-1, labels)
    if len(set(map(len, targets))) == 1:
        return reply_QL
    share_QL = np.exp(reply_QL)
    for short, begin in enumerate(targets):
        longer = [label for label, one in enumerate(targets) if len(one) > len(begin) and one[: len(begin)] == begin]
        share_QL[:, short] -= share_QL[:, longer].sum(axis=1)
    return np.log(np.maximum(share_QL, 1e-300))


def ratings(template: Template, reply_QL: Floats) -> Floats:
    """The expected rating of each question's answer [Q], or the probability of the labels that pass; NaN unreplied."""
    value_L = np.array([label in template.passing if template.passing else float(label) for label in template.labels])
    share_QL = np.exp(reply_QL - reply_QL.max(axis=1, keepdims=True))
    return (share_QL @ value_L.astype(float)) / share_QL.sum(axis=1)


# ---- verdicts of a row


def _compare(row: Row, pairs: Pairs, reply_QL: Floats, settings: TreeSettings) -> list[Verdict]:
    odds = (reply_QL[:, 0] - reply_QL[:, 1]).tolist()
    both = zip(pairs, odds[0::2], odds[1::2], strict=True)
    return [Verdict(row.id, row.subset, row.group, pair, first, second) for pair, first, second in both]


def _choose(row: Row, pairs: Pairs, reply_QL: Floats, settings: TreeSettings) -> list[Verdict]:
    """One verdict, under the pair (0, 0): the right answer's log-odds against the best other one."""
    slot = chosen_slot(row, settings.seed)
    lead = float(reply_QL[0, slot] - np.delete(reply_QL[0], slot).max())
    lead = math.copysign(1.0, lead) if math.isinf(lead) else lead  # a verdict in words has no odds
    return [Verdict(row.id, row.subset, row.group, (0, 0), lead, -lead)]


def _rate(row: Row, pairs: Pairs, reply_QL: Floats, settings: TreeSettings) -> list[Verdict]:
    """By how much the chosen answer is rated higher, in the ratings' unit."""
    rating_Q = ratings(settings.template, reply_QL)
    leads = [float(rating_Q[i] - rating_Q[len(row.chosen) + j]) for i, j in pairs]
    return [Verdict(row.id, row.subset, row.group, p, lead, -lead) for p, lead in zip(pairs, leads, strict=True)]


# ---- scores of all rows


def _best_of_four(rows: Sequence[Row], replies: Sequence[Floats], settings: TreeSettings) -> dict[str, float]:
    """RewardBench 2's ranking mode, without Ties."""
    labels, scores = settings.template.labels, []
    for row, reply_QL in zip(rows, replies, strict=True):
        choice = None if np.isnan(reply_QL).any() else labels[int(reply_QL[0].argmax())]
        scores.append((row.subset, choice_score(choice, labels[chosen_slot(row, settings.seed)])))
    return mean_of_subsets(scores)


def _by_rating(rows: Sequence[Row], replies: Sequence[Floats], settings: TreeSettings) -> dict[str, float]:
    """RewardBench 2's ratings mode: the rows of Ties have one score together."""
    scores, ties = [], {}
    for row, reply_QL in zip(rows, replies, strict=True):
        rating_Q = ratings(settings.template, reply_QL)
        sides = rating_Q[: len(row.chosen)].tolist(), rating_Q[len(row.chosen) :].tolist()
        if TIES_ID.fullmatch(row.id):
            ties[row.id] = sides
        else:
            scores.append((row.subset, rating_score(*sides)))
    return mean_of_subsets([*scores, *([("Ties", ties_score(ties))] if ties else [])])


class Protocol(NamedTuple):
    """One way to judge; RewardBench 2 has three, of which `benchmark` is the name and `score` the rule."""

    verdicts: Callable[[Row, Pairs, Floats, TreeSettings], list[Verdict]]
    score: Callable[[Sequence[Row], Sequence[Floats], TreeSettings], dict[str, float]] | None = None
    benchmark: str = ""


PROTOCOLS = {
    "compare": Protocol(_compare),
    "choose": Protocol(_choose, _best_of_four, "RewardBench 2, best of four"),
    "rate": Protocol(_rate, _by_rating, "RewardBench 2, ratings"),
    "ties": Protocol(_rate, _by_rating, "RewardBench 2, Ties"),
}
"""judge.protocol -> how it is read."""


def verdicts_of(rows: Sequence[Row], replies: Sequence[Floats], settings: TreeSettings) -> list[Verdict]:
    """The verdicts on the first settings.pairs_per_row pairs (0: all) of each row."""
    read = PROTOCOLS[settings.protocol].verdicts
    return [
        verdict
        for row, reply_QL in zip(rows, replies, strict=True)
        for verdict in read(row, pairs_of(row, settings.pairs_per_row), reply_QL, settings)
    ]
