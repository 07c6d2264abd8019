"""What may be said from verdicts: accuracies, intervals, paired tests. Numpy only, every function pure.

Letters: R judged pairs, G groups (rows that share requests or answers: the independent unit), F flips or resamples.
Two readings of the same 2R single-order verdicts stand always side by side:
  consistent  right when both orders name the chosen answer; a verdict that flips is a tie and counts as wrong;
  averaged    right when the A-B log-odds, averaged over both orders, favour the chosen answer: position cancels.
Two judges are compared on the same pairs: the exact test takes pairs as independent, the clustered one only groups.
Read next: dpo/judge/calibration.py.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from dpo.judge.calibration import (
    LEAST_CLUSTERS,
    Floats,
    agreement,
    agreement_interval,
    brier,
    confidence,
    expected_calibration_error,
    selective_accuracy,
)

LEAST_TO_SHOW = 6  # groups that must differ for a p below 5 %
BLOCK = 100  # flips or resamples drawn at once: a [BLOCK, G] array stays small whatever G is
Values = Sequence[float] | Floats


@dataclass(frozen=True)
class Verdict:
    """One pair, judged in both orders; log-odds in nats, NaN where the judge gave no usable verdict."""

    id: str
    subset: str
    group: str
    pair: tuple[int, int]  # (index into chosen, index into rejected)
    first: float  # log p("A") - log p("B") with the chosen answer shown first (as A): > 0 is right
    second: float  # the same with the chosen answer shown second (as B): < 0 is right


class Summary(TypedDict):
    """One judge's figures, as they stand in results.json; shares are of all n pairs, invalid ones included."""

    n: int
    wins: int
    losses: int
    ties: int
    invalid: int
    accuracy: float
    accuracy_interval: list[float]
    averaged_accuracy: float
    averaged_interval: list[float]
    position_consistency: float
    raw_a_rate: float
    tie_half_accuracy: float  # a tie counts one half; accuracy counts it as wrong
    tie_half_interval: list[float]
    decided_accuracy: float | None  # of the pairs with neither a tie nor an invalid verdict; None without any
    decided_interval: list[float] | None
    kappa: float | None  # Cohen's, both-orders verdict against the label (agreement)
    brier: float | None  # of the order-averaged probabilities of the valid verdicts, as the next two; None without any:
    # a letter alone (log-odds of 1, 0 or -1) has none, nor what is no log-odds of a pair (summarise)
    calibration_error: float | None
    selective_accuracy: list[float]  # of the surest tenth, the surest two tenths, ... all of the valid verdicts
    intervals: NotRequired[dict[str, list[float]]]  # 95 %, by key, of position_consistency, raw_a_rate, brier, kappa,
    # where there is one; results.json of before has none of them
    subsets: NotRequired[dict[str, "Summary"]]


class PairedTest(TypedDict):
    """Judge a against judge b on the same pairs; `wins_only_a` counts the pairs on which a scores higher."""

    p: float  # exact McNemar, pairs taken as independent
    p_clustered: float  # sign flips of whole groups
    p_holm: NotRequired[float]
    difference: float  # a - b, a share
    interval: list[float]  # paired_interval's
    wins_only_a: int
    wins_only_b: int
    minimum_detectable: float


class Comparison(TypedDict):
    """Both readings of one comparison, and how far the two judges agree."""

    consistent: PairedTest
    averaged: PairedTest
    same_verdict: float  # share of the pairs with the same both-orders verdict
    same_verdict_interval: NotRequired[list[float]]  # results.json of before has none of the intervals
    kappa: float | None
    kappa_interval: NotRequired[list[float] | None]


class Bin(TypedDict):
    """The pairs on which a judge is about equally sure."""

    n: int
    confidence: float  # their mean probability of the answer that the judge prefers
    accuracy: float  # the share of them on which it is right
    interval: list[float]  # Wilson's


# ---- verdicts


def verdict_record(verdict: Verdict) -> dict[str, object]:
    """The verdict as one line of verdicts.jsonl; an invalid log-odds (NaN) is written as null, which is strict JSON."""
    return {key: None if value != value else value for key, value in asdict(verdict).items()}


def log_odds(verdicts: Sequence[Verdict]) -> tuple[Floats, Floats]:
    """(first_R, second_R) as arrays, finite or NaN: an infinite log-odds has no average, and is its maker's mistake."""
    first_R, second_R = np.array([(verdict.first, verdict.second) for verdict in verdicts]).reshape(-1, 2).T
    assert not (np.isinf(first_R).any() or np.isinf(second_R).any()), "a verdict's log-odds must be finite, or NaN"
    return first_R, second_R


def gives_odds(verdicts: Sequence[Verdict]) -> bool:
    """Whether any is more than a letter alone, which is 1, 0 or -1."""
    sides = np.abs(log_odds(verdicts))
    return not np.isin(sides[~np.isnan(sides)], [0.0, 1.0]).all()


def outcomes(verdicts: Sequence[Verdict]) -> NDArray[np.str_]:
    """The both-orders verdict of each pair: "win", "loss", "tie" (it flips, or an exact 0) or "invalid" (any NaN)."""
    first_R, second_R = log_odds(verdicts)
    return np.select(
        [np.isnan(first_R) | np.isnan(second_R), (first_R > 0) & (second_R < 0), (first_R < 0) & (second_R > 0)],
        ["invalid", "win", "loss"],
        default="tie",
    )


def consistent_scores(verdicts: Sequence[Verdict]) -> Floats:
    """1 for a win, 0 for a loss, a tie or an invalid verdict (the study's accuracy is the mean)."""
    return np.where(outcomes(verdicts) == "win", 1.0, 0.0)


def averaged_scores(verdicts: Sequence[Verdict]) -> Floats:
    """1, 0 or 1/2 by the sign of (first - second) / 2; an invalid verdict scores 0 and is counted by `outcomes`."""
    first_R, second_R = log_odds(verdicts)
    # Compared, not subtracted: a sign must not depend on rounding.
    return np.where(first_R > second_R, 1.0, np.where(first_R == second_R, 0.5, 0.0))


def says_a_scores(verdicts: Sequence[Verdict]) -> Floats:
    """0, 1/2 or 1, the share of a pair's two orders in which A is said; an invalid log-odds says nothing."""
    first_R, second_R = log_odds(verdicts)
    return ((first_R > 0).astype(np.float64) + (second_R > 0)) / 2


def chosen_probabilities(verdicts: Sequence[Verdict]) -> Floats:
    """The probability of the chosen answer by the order-averaged log-odds, of the valid verdicts only."""
    first_R, second_R = log_odds(verdicts)
    lead_R = (first_R - second_R) / 2
    return 0.5 * (1 + np.tanh(lead_R[~np.isnan(lead_R)] / 2))


# ---- one proportion or mean


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    `successes` may be fractional (half scores vary less than 0/1, so the interval is then a little wide). It takes the
    n as independent: beside it stands the clustered interval. Of n = 0 all is possible: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is exactly 0 and 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else (centre - half_width) / scale
    high = 1.0 if successes == n else (centre + half_width) / scale
    return low, high


def _group_sums(values: Values, groups: Sequence[str]) -> tuple[Floats, Floats]:
    """(sum_G, count_G) of the values, groups in sorted order (so the order of the rows never matters to a seed)."""
    _, group_R = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.bincount(group_R, weights=values).astype(np.float64), np.bincount(group_R).astype(np.float64)


def widest(*intervals: Sequence[float]) -> list[float]:
    """Of several intervals of one figure the widest, the first of equals."""
    return [*max(intervals, key=lambda ends: ends[1] - ends[0])]


def cluster_interval(
    values: Values, groups: Sequence[str], seed: int, samples: int = 10_000, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """95 % interval of the mean over whole groups: cluster_bootstrap, below LEAST_CLUSTERS groups sign_flip_interval.

    `bounds` is the range that the mean can have: too few groups say nothing about the spread between them, and give it.
    """
    if len(set(groups)) < LEAST_CLUSTERS:
        return sign_flip_interval(values, groups, seed, samples, bounds)
    return cluster_bootstrap(values, groups, seed, samples)


def share_interval(scores: Values, groups: Sequence[str], seed: int) -> list[float]:
    """95 % interval of the mean of scores in 0 .. 1: the wider of Wilson's and the clustered one.

    Where all scores are equal the clustered one has no width, and Wilson's counts every group as one score.
    """
    n = len(set(groups)) if np.ptp(scores) == 0 else len(scores)
    wilson = wilson_interval(float(np.sum(scores)) * n / len(scores), n)
    return widest(wilson, cluster_interval(scores, groups, seed))


def cluster_bootstrap(values: Values, groups: Sequence[str], seed: int, samples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean, whole groups resampled with replacement (Efron 1979, by cluster).

    The resampled mean is sum of sums / sum of sizes (a ratio, so groups may differ in size).
    """
    sum_G, count_G = _group_sums(values, groups)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(samples // BLOCK):
        drawn_FG = rng.integers(0, len(sum_G), size=(BLOCK, len(sum_G)))
        means.append(sum_G[drawn_FG].sum(axis=1) / count_G[drawn_FG].sum(axis=1))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def rows_by_seeds_bootstrap(
    values: Sequence[Floats], groups: Sequence[Sequence[str]], seed: int, samples: int = 2_000
) -> tuple[float, float]:
    """95 % percentile interval of the mean over `values`, those of one training seed each, of rows in `groups`.

    Seeds and groups are both drawn anew, with replacement, and a value counts as often as both were: the pigeonhole
    bootstrap (Owen, Ann. Appl. Stat. 2007); seeds may share their rows or have their own. It is too narrow where seeds
    are few (of 3 it covers some 83 %), so that Student's interval over the seeds' means belongs beside it.
    """
    names, group_R = np.unique(np.concatenate([np.asarray(of, dtype=str) for of in groups]), return_inverse=True)
    own = np.split(group_R, np.cumsum([len(of) for of in groups])[:-1])
    sum_SG, count_SG = (
        np.array([np.bincount(g, of, minlength=len(names)) for g, of in zip(own, weights, strict=True)])
        for weights in (values, [np.ones(len(of)) for of in values])
    )
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    for _ in range(samples // BLOCK):
        seeds_FS, groups_FG = (rng.multinomial(n, [1 / n] * n, size=BLOCK) for n in sum_SG.shape)
        total_F, count_F = (((seeds_FS @ of) * groups_FG).sum(axis=1) for of in (sum_SG, count_SG))
        means.append(total_F[count_F > 0] / count_F[count_F > 0])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def student_p(values: Sequence[float], least: float = 0.0) -> float:
    """Two-sided p of Student's test that the values' mean is 0; of equal values 0, or 1 where they are 0.

    `least` is the smallest standard deviation that they can have: what each is uncertain by, by itself. P(|T| > t) is
    the share of cos^(df - 1) over [0, pi / 2] that lies beyond atan(t / sqrt(df)).
    """
    n, mean = len(values), float(np.mean(values))
    spread = max(least, float(np.std(values, ddof=1)))
    if spread <= 1e-12:
        return float(abs(mean) <= 1e-12)
    ends = math.atan(abs(mean) / spread * math.sqrt(n / (n - 1))), 0.0  # t = mean / (spread / sqrt(n))
    beyond, whole = (
        np.trapezoid(np.cos(np.linspace(begin, math.pi / 2, 2001)) ** (n - 2)) * (math.pi / 2 - begin) for begin in ends
    )
    return float(beyond / whole)


def reliability(verdicts: Sequence[Verdict], bins: int = 5) -> list[Bin]:
    """Accuracy by confidence, the sigmoid of the order-averaged log-odds; bins of one width, those empty left out."""
    confidence_R, score_R = confidence(chosen_probabilities(verdicts))
    bin_R = np.minimum(((confidence_R - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(bin_R):
        in_R = bin_R == number
        n, right = int(in_R.sum()), float(score_R[in_R].sum())
        interval = list(wilson_interval(right, n))
        found.append(Bin(n=n, confidence=float(confidence_R[in_R].mean()), accuracy=right / n, interval=interval))
    return found


def sign_flip_interval(
    values: Values, groups: Sequence[str], seed: int, samples: int = 10_000, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """95 % interval of the means that sign_flip_p, applied to values - mean, does not reject.

    Its ends are those of the middle 95 % of the means of random halves, each group in or out (Hartigan 1969: where the
    groups' sums lie evenly about their true mean, these split the line into equally likely parts). All of the 2^G - 1
    halves for at most 14 groups; 5 or fewer have less than 40 and give the `bounds`.
    """
    sum_G, count_G = _group_sums(values, groups)
    n_groups = len(sum_G)
    if n_groups <= 14:
        in_FG = (np.arange(1, 2**n_groups)[:, None] >> np.arange(n_groups)) & 1
    else:
        in_FG = np.random.default_rng(seed).integers(0, 2, size=(samples, n_groups), dtype=np.int8)
        in_FG = in_FG[in_FG.any(axis=1)]
    means = np.sort((in_FG @ sum_G) / (in_FG @ count_G))
    cut = int(0.025 * (len(means) + 1))
    return (float(means[cut - 1]), float(means[-cut])) if cut else bounds


# ---- two judges on the same pairs


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar (sign) test, b against c discordant pairs: min(1, 2 P(Bin(b + c, 1/2) <= min(b, c)))."""
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # whole numbers: no rounding before the one division
    return min(1.0, 2 * tail / 2 ** (b + c))


def paired_interval(differences: Values, groups: Sequence[str], seed: int, samples: int = 10_000) -> list[float]:
    """95 % interval of the mean of paired differences in -1 .. 1: the wider of cluster_interval's and Bonett & Price's.

    The former is too narrow where few pairs differ, and of no width where none does. The latter (J. Educ. Behav. Stat.
    2012) is Wald's after adding a pair that a wins and one that b wins; here, by group, two groups of as many pairs as
    say what one independent pair says: the design effect (Kish 1965), at least 1 (and 1 where all pairs are alike).
    """
    values_R = np.asarray(differences, dtype=np.float64)
    sum_G, count_G = _group_sums(values_R, groups)
    mean = float(values_R.mean())
    together, alone = float(((sum_G - mean * count_G) ** 2).sum()), float(((values_R - mean) ** 2).sum())
    size = max(1.0, together / alone) if alone > 0 else 1.0
    sum_G, count_G = np.append(sum_G, [size, -size]), np.append(count_G, [size, size])
    n = float(count_G.sum())
    centre = float(sum_G.sum()) / n
    half_width = 1.96 * math.sqrt(float(((sum_G - centre * count_G) ** 2).sum())) / n
    adjusted = max(-1.0, centre - half_width), min(1.0, centre + half_width)
    return widest(cluster_interval(values_R, groups, seed, samples, (-1.0, 1.0)), adjusted)


def sign_flip_p(differences: Values, groups: Sequence[str], seed: int, flips: int = 20_000) -> float:
    """Two-sided paired randomisation test, clustered: each group's whole sum may change sign (Fisher 1935).

    Exact over all 2^G signs for at most 14 groups with a non-zero sum (a zero sum changes nothing), else Monte Carlo:
    (1 + flips as far from 0 as seen) / (1 + flips), which is never 0 and stays valid (Phipson & Smyth 2010).
    """
    sum_G, _ = _group_sums(differences, groups)
    sum_G = sum_G[sum_G != 0]
    n_groups = len(sum_G)
    # Sums in another order round otherwise; what equals the seen one up to rounding counts as equal.
    reach = abs(float(sum_G.sum())) - 1e-12 * float(np.abs(sum_G).sum())
    if n_groups <= 14:
        sign_FG = ((np.arange(2**n_groups)[:, None] >> np.arange(n_groups)) & 1) * 2.0 - 1.0
        return float(np.mean(np.abs(sign_FG @ sum_G) >= reach))
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(flips // BLOCK):
        sign_FG = rng.integers(0, 2, size=(BLOCK, n_groups), dtype=np.int8) * 2.0 - 1.0
        count += int(np.count_nonzero(np.abs(sign_FG @ sum_G) >= reach))
    return (1 + count) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Scand. J. Statist. 1979), in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimum_detectable_difference(differences: Values, groups: Sequence[str]) -> float:
    """The smallest true difference of means that such differences show four times in five, at a two-sided 5 %.

    d = z sqrt(v / (1 + z^2 / G)), z = z_.975 + z_.8, v = sum_G (a group's sum)^2 / R^2: d = z SE (Miller 2411.00640)
    with SE^2 = v - d^2 / G, by group, solved for d. It is 0 where fewer than LEAST_TO_SHOW differ: that can
    never show anything.
    """
    sum_G, count_G = _group_sums(differences, groups)
    if np.count_nonzero(sum_G) < LEAST_TO_SHOW:
        return 0.0
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    return z * math.sqrt(float(sum_G @ sum_G) / float(count_G.sum()) ** 2 / (1 + z * z / len(sum_G)))


# ---- what results.json says


def _figures(verdicts: Sequence[Verdict], seed: int, odds: bool) -> Summary:
    groups, outcome_R = [verdict.group for verdict in verdicts], outcomes(verdicts)
    win_R, decided_R = consistent_scores(verdicts), np.isin(outcome_R, ["win", "loss"])
    chosen_R = chosen_probabilities(verdicts if odds else [])
    curve_R, label_R = selective_accuracy(chosen_R), np.full(len(verdicts), "win")

    def share(score_R: Floats, groups: Sequence[str] = groups) -> tuple[float, list[float]]:
        return float(score_R.mean()), share_interval(score_R, groups, seed)

    accuracy, accuracy_interval = share(win_R)
    averaged_accuracy, averaged_interval = share(averaged_scores(verdicts))
    tie_half_accuracy, tie_half_interval = share(win_R + (outcome_R == "tie") / 2)
    decided = share(win_R[decided_R], np.array(groups)[decided_R].tolist()) if decided_R.any() else None
    intervals: dict[str, list[float]] = {}
    position_consistency, intervals["position_consistency"] = share(decided_R.astype(float))
    raw_a_rate, intervals["raw_a_rate"] = share(says_a_scores(verdicts))
    if len(chosen_R):
        valid = np.array(groups)[outcome_R != "invalid"].tolist()
        intervals["brier"] = list(cluster_interval((1 - chosen_R) ** 2, valid, seed))
    if kappa := agreement_interval(outcome_R, label_R, groups, seed):
        intervals["kappa"] = kappa
    return Summary(
        n=len(verdicts),
        wins=int((outcome_R == "win").sum()),
        losses=int((outcome_R == "loss").sum()),
        ties=int((outcome_R == "tie").sum()),
        invalid=int((outcome_R == "invalid").sum()),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        averaged_accuracy=averaged_accuracy,
        averaged_interval=averaged_interval,
        position_consistency=position_consistency,
        raw_a_rate=raw_a_rate,
        tie_half_accuracy=tie_half_accuracy,
        tie_half_interval=tie_half_interval,
        decided_accuracy=decided[0] if decided else None,
        decided_interval=decided[1] if decided else None,
        kappa=agreement(outcome_R, label_R),
        brier=brier(chosen_R) if len(chosen_R) else None,
        calibration_error=expected_calibration_error(chosen_R) if len(chosen_R) else None,
        selective_accuracy=[float(curve_R[math.ceil(len(curve_R) * k / 10) - 1]) for k in range(1, 11) if len(curve_R)],
        intervals=intervals,
    )


def summarise(verdicts: Sequence[Verdict], seed: int = 0, *, odds: bool = True) -> Summary:
    """One judge's figures over all pairs (at least one) and by subset; the seed is the bootstrap's.

    `odds`: whether its log-odds are those of a pair, and not leads over three others, or differences of ratings or of
    log-probs; where all are 1, 0 or -1, letters alone, they are not.
    """
    assert verdicts, "a summary is of at least one verdict"
    odds = odds and gives_odds(verdicts)
    names = sorted({verdict.subset for verdict in verdicts})
    subsets = {name: _figures([v for v in verdicts if v.subset == name], seed, odds) for name in names}
    return {**_figures(verdicts, seed, odds), "subsets": subsets}


def _paired_test(score_a_R: Floats, score_b_R: Floats, groups: Sequence[str], seed: int) -> PairedTest:
    difference_R = score_a_R - score_b_R
    only_a, only_b = int((difference_R > 0).sum()), int((difference_R < 0).sum())
    return PairedTest(
        p=mcnemar_exact(only_a, only_b),
        p_clustered=sign_flip_p(difference_R, groups, seed),
        difference=float(difference_R.mean()),
        interval=paired_interval(difference_R, groups, seed),
        wins_only_a=only_a,
        wins_only_b=only_b,
        minimum_detectable=minimum_detectable_difference(difference_R, groups),
    )


def compare(verdicts_a: Sequence[Verdict], verdicts_b: Sequence[Verdict], seed: int) -> Comparison:
    """Judge a against judge b on the same pairs in the same order. Quote the larger p where groups hold many pairs."""
    keys_a, keys_b = ([(v.id, v.pair, v.group) for v in verdicts] for verdicts in (verdicts_a, verdicts_b))
    assert keys_a == keys_b, "the two judges' verdicts are not on the same pairs, groups or in another order"
    groups = [verdict.group for verdict in verdicts_a]
    outcome_a_R, outcome_b_R = outcomes(verdicts_a), outcomes(verdicts_b)
    same_R = (outcome_a_R == outcome_b_R).astype(np.float64)
    return Comparison(
        consistent=_paired_test(consistent_scores(verdicts_a), consistent_scores(verdicts_b), groups, seed),
        averaged=_paired_test(averaged_scores(verdicts_a), averaged_scores(verdicts_b), groups, seed),
        same_verdict=float(same_R.mean()),
        same_verdict_interval=share_interval(same_R, groups, seed),
        kappa=agreement(outcome_a_R, outcome_b_R),
        kappa_interval=agreement_interval(outcome_a_R, outcome_b_R, groups, seed),
    )


def compare_subsets(verdicts_a: Sequence[Verdict], verdicts_b: Sequence[Verdict], seed: int) -> dict[str, PairedTest]:
    """`compare`'s order-averaged test within each subset, with Holm's correction over them on the larger of its p."""
    tests = {}
    for name in sorted({verdict.subset for verdict in verdicts_a}):
        a, b = ([verdict for verdict in one if verdict.subset == name] for one in (verdicts_a, verdicts_b))
        tests[name] = _paired_test(averaged_scores(a), averaged_scores(b), [verdict.group for verdict in a], seed)
    for test, p_holm in zip(tests.values(), holm([max(t["p"], t["p_clustered"]) for t in tests.values()]), strict=True):
        test["p_holm"] = p_holm
    return tests
