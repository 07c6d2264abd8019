"""The benchmarks' own scoring rules, as pure functions of what a judge said. No dimension letters.

Where we differ: all are asked in our words (dpo/judge/templates), which template files replace. RewardBench 2 puts the
right answer into an unseeded slot, ours is seeded (dpo/judge/prompts.py), and reads a verdict from anywhere in the text
(`official_choice`), where we want one alone in its place. RM-Bench asks for one of five verdicts (A>>B to B>>A), we for
two in both orders, whose average decides. An expected rating is no whole number, so that it ties less often than a
written one. Read next: dpo/judge/protocols.py.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import TypedDict

import numpy as np

from dpo.judge.prompts import TIES_ID
from dpo.judge.statistics import LEAST_CLUSTERS, Verdict, outcomes
from models.errors import UserError

BLOCKS, T_49 = 50, 2.0096  # and Student's 97.5 % point of one degree less
MOST_ROWS = 20_000  # for an interval: it takes BLOCKS scores, and of so many rows it is narrow

WHOLE = ("score", "score_by_its_parser")  # of RewardBench 2's figures those that are of no one subset

Score = Callable[[Sequence[int]], Mapping[str, float]]
"""A benchmark's figures for the rows at these places."""


class Benchmark(TypedDict):
    """A benchmark's own score of a judge, and the parts of it; shares, but for RewardBench 2's Ties up to 1.01."""

    name: str
    figures: dict[str, float]  # "score" is the whole
    intervals: dict[str, list[float]]  # 95 %, of those that have one


# ---- RewardBench 2


def official_choice(text: str) -> str | None:
    """Its parser: the first of [[A]], [[B]], [[C]], [[D]], in this order, that is anywhere in the text."""
    return next((label for label in "ABCD" if f"[[{label}]]" in text), None)


def choice_score(choice: str | None, right: str) -> float:
    """Ranking mode: 1 where the right one of four is chosen; 1/4 where nothing can be read."""
    return 0.25 if choice is None else float(choice == right)


def rating_score(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Ratings mode: the share of chosen answers among those rated highest; NaN is -1, and no rating at all is 1/4."""
    right, wrong = (np.nan_to_num(np.array(side), nan=-1.0) for side in (chosen, rejected))
    best = max(right.max(), wrong.max())
    if best == -1:
        return 0.25
    return float((right == best).sum() / ((right == best).sum() + (wrong == best).sum()))


def ties_score(ratings: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> float:
    """Its Ties score, from (chosen, rejected) ratings by id, ref:N and tied:N.

    .30 accurate(tied) + .30 accurate(ref) + .20 mean(gap_tied > spread) + .20 mean(min gap > spread)
    + .01 mean tanh(min gap / spread - 1); gap: worst right less best wrong; spread: best less worst right of tied;
    0/0 counts as 0. NaN is -1. The last three are over the questions that have both rows.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spread = {}
    for name, sides in ratings.items():
        right, wrong = (np.nan_to_num(np.array(side), nan=-1.0) for side in sides)
        match = TIES_ID.fullmatch(name)
        assert match, f"{name} is no row of Ties"
        gaps[match[1]][match[2]] = float(right.min() - wrong.max())
        if match[1] == "tied":
            spread[match[2]] = float(right.max() - right.min())
    both = sorted(gaps["ref"].keys() & gaps["tied"].keys())
    ref, tied, spreads = (np.array([values[name] for name in both]) for values in (gaps["ref"], gaps["tied"], spread))
    accurate = [fmean(gap > 0 for gap in side.values()) if side else 0.0 for side in (gaps["tied"], gaps["ref"])]
    if not both:
        return 0.30 * sum(accurate)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(np.minimum(ref, tied) / spreads - 1), nan=0.0)
    clear, hard = np.mean(tied > spreads), np.mean(np.minimum(ref, tied) > spreads)
    return float(0.30 * sum(accurate) + 0.20 * clear + 0.20 * hard + 0.01 * margin.mean())


def mean_of_subsets(scores: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each subset, and "score": their unweighted mean."""
    subsets = defaultdict(list)
    for subset, score in scores:
        subsets[subset].append(score)
    means = {name: fmean(subsets[name]) for name in sorted(subsets)}
    return means | {"score": fmean(means.values())}


def six_subsets(best_of_four: Benchmark, ties: Benchmark) -> Benchmark:
    """RewardBench 2's score: the unweighted mean of five subsets and Ties, which are judged apart, on other rows."""
    name, parts = best_of_four["name"], (best_of_four, ties)
    weights = np.array([sum(key not in WHOLE for key in best_of_four["figures"]), 1])
    score = float(weights @ [of["figures"]["score"] for of in parts]) / weights.sum()
    intervals = [of["intervals"].get("score") for of in parts]
    if None in intervals:
        return Benchmark(name=name, figures={"score": score}, intervals={})
    reach = float(np.linalg.norm(weights * np.ptp(np.array(intervals), axis=1) / 2)) / weights.sum()
    return Benchmark(name=name, figures={"score": score}, intervals={"score": [score - reach, score + reach]})


# ---- benchmarks of pairs, judged in both orders


def judgebench(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """JudgeBench: a game is +1 for the label, -1 for its opposite, 0 for neither; right where the two sum to > 0.

    So one right game beside a tie or an unreadable one is right, a verdict that flips is not; a share of all pairs.
    """
    games = [(np.sign(verdict.first), -np.sign(verdict.second)) for verdict in verdicts]
    return {"score": fmean(float(np.nansum(both) > 0) for both in games)}


def llmbar(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """LLMBar: Acc, the mean accuracy of the two orders, and Agr, the share of pairs with one verdict in both."""
    right = [fmean((verdict.first > 0, verdict.second < 0)) for verdict in verdicts]
    agreeing = np.isin(outcomes(verdicts), ["win", "loss"])
    return {"score": fmean(right), "agreement": float(agreeing.mean())}


def rm_bench(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """RM-Bench: a row is the 3 x 3 wins of its chosen over its rejected styles (concise, detailed, detailed markdown).

    Hard: chosen in a plainer style than rejected (above the diagonal); normal: in the same; easy: below. A domain is
    the mean of the three, "score" of the domains; what stands behind a dash (safety-refuse) is averaged into one.
    """
    subsets: dict[str, dict[int, list[float]]] = defaultdict(lambda: {-1: [], 0: [], 1: []})
    pairs = Counter(verdict.id for verdict in verdicts)
    if few := next((row for row, count in pairs.items() if count != 9), ""):
        raise UserError(f"{few}: RM-Bench's score needs all nine pairs of a row; set judge.pairs_per_row=0")
    for verdict in verdicts:
        i, j = verdict.pair
        subsets[verdict.subset][(i > j) - (i < j)].append(float(verdict.first > verdict.second))
    domains = defaultdict(list)
    for name, wins in sorted(subsets.items()):
        domains[name.partition("-")[0]].append([fmean(wins[level]) for level in (-1, 0, 1)])
    means = {name: np.mean(parts, axis=0) for name, parts in domains.items()}
    levels = dict(zip(("hard", "normal", "easy"), np.mean(list(means.values()), axis=0).tolist(), strict=True))
    return {name: float(mean.mean()) for name, mean in means.items()} | levels | {"score": fmean(levels.values())}


# ---- how sure a score is


def scored(name: str, score: Score, groups: Sequence[str], seed: int) -> Benchmark:
    """The score of all rows, of which `groups` has the group of each, and the 95 % interval of each figure.

    It is x +- t s by the delete-a-group jackknife (Kott, J. Off. Stat. 2001): groups are dealt to B blocks at random,
    x_k is x without block k, s^2 = (B - 1) / B sum_k (x_k - mean)^2. It fits any figure, where a bootstrap would show a
    row of Ties twice. None below LEAST_CLUSTERS groups, above MOST_ROWS rows, and where no block moves it.
    """
    figures, intervals = dict(score(range(len(groups)))), {}
    names = sorted(set(groups))
    if len(names) < LEAST_CLUSTERS or len(groups) > MOST_ROWS:
        return Benchmark(name=name, figures=figures, intervals={})
    block = dict(zip(np.random.default_rng(seed).permutation(names).tolist(), cycle(range(BLOCKS)), strict=False))
    without = [score([place for place, name in enumerate(groups) if block[name] != k]) for k in range(BLOCKS)]
    for key, figure in figures.items():
        spread = math.sqrt(BLOCKS - 1) * float(np.std([left.get(key, figure) for left in without]))
        if spread > 1e-12:
            intervals[key] = [max(0.0, figure - T_49 * spread), min(1.0, figure + T_49 * spread)]
    return Benchmark(name=name, figures=figures, intervals=intervals)


OF_PAIRS: dict[str, tuple[str, Callable[[Sequence[Verdict]], dict[str, float]]]] = {
    "judgebench": ("JudgeBench", judgebench),
    "llmbar": ("LLMBar", llmbar),
    "rmbench": ("RM-Bench", rm_bench),
}
"""The rows' format (dpo/formats.py) -> name, and how a benchmark of pairs scores the `compare` verdicts on its rows."""
