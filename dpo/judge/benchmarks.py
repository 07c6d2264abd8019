"""The benchmarks' own scoring rules, as pure functions of what a judge said. No dimension letters.

Where we differ: RewardBench 2 puts the right answer into an unseeded slot, ours is seeded (dpo/judge/prompts.py), and
reads a verdict from anywhere in the text (`official_choice`), where we read the last one. An expected rating is no
whole number, so that it ties less often than a written one. Read next: dpo/judge/protocols.py.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from dpo.judge.prompts import TIES_ID
from dpo.judge.statistics import Verdict, outcomes
from models.errors import UserError

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


OF_PAIRS: dict[str, Callable[[Sequence[Verdict]], dict[str, float]]] = {
    "judgebench": judgebench,
    "llmbar": llmbar,
    "rmbench": rm_bench,
}
"""data.format -> how a benchmark of pairs scores the `compare` verdicts on its rows."""
