"""Intervals hold the truth as often as they say: against published figures, exact sums and draws of known truth."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dpo.judge.local import read_verdicts
from dpo.judge.statistics import (
    cluster_bootstrap,
    cluster_interval,
    consistent_scores,
    paired_interval,
    share_interval,
    sign_flip_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("wins", "low", "high"),
    [(183, 56.0, 67.0), (172, 52.2, 63.4), (186, 57.0, 67.9), (182, 55.6, 66.6), (149, 44.5, 55.8)],
)
def test_wilson_gives_the_published_intervals_of_297_rows(wins: int, low: float, high: float) -> None:
    assert tuple(round(100 * bound, 1) for bound in wilson_interval(wins, 297)) == (low, high)


def test_wilson_bounds_solve_the_score_equation_and_hold_the_corners() -> None:
    for successes, n in [(1, 10), (7.5, 10), (0.5, 3), (183, 297)]:
        share = successes / n
        for bound in wilson_interval(successes, n):
            assert (share - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, rel=1e-12)
    (low, below), (above, high) = wilson_interval(0, 5), wilson_interval(5, 5)
    assert (low, high) == (0.0, 1.0) and below == 1 - above == pytest.approx(1.96**2 / (5 + 1.96**2), rel=1e-15)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_covers_a_true_share_about_95_times_in_100() -> None:
    n, share = 60, 0.7
    covered = sum(
        math.comb(n, k) * share**k * (1 - share) ** (n - k)
        for k in range(n + 1)
        if wilson_interval(k, n)[0] <= share <= wilson_interval(k, n)[1]
    )
    assert 0.93 < covered < 0.97  # an exact sum, no draw


def test_bootstrap_quantiles_equal_those_of_every_possible_resample() -> None:
    values, groups = [1.0, 0.0, 1.0, 0.5, 0.0, 1.0], ["a", "a", "b", "c", "c", "c"]
    sums = {"a": (1.0, 2), "b": (1.0, 1), "c": (1.5, 3)}
    means = sorted(
        sum(sums[g][0] for g in draw) / sum(sums[g][1] for g in draw) for draw in itertools.product("abc", repeat=3)
    )
    # 27 resamples: the extremes (each at 1/27 = 3.7 %) reach past the 2.5 % tails, so they are the bounds.
    assert cluster_bootstrap(values, groups, seed=1) == (means[0], means[-1])


def test_bootstrap_by_group_is_wider_where_rows_of_a_group_agree_and_order_of_rows_is_inert() -> None:
    rng = np.random.default_rng(3)
    values = np.repeat(rng.integers(0, 2, size=80), 4).astype(float)
    groups = [f"g{i // 4}" for i in range(320)]
    low, high = cluster_bootstrap(values, groups, seed=0)
    row_low, row_high = cluster_bootstrap(values, [str(i) for i in range(320)], seed=0)
    assert (high - low) / (row_high - row_low) == pytest.approx(2, rel=0.1)  # design effect 4
    order = rng.permutation(320)
    assert cluster_bootstrap(values[order], [groups[i] for i in order], seed=0) == (low, high)
    assert cluster_bootstrap(values, groups, seed=0) == (low, high)
    uneven = values + rng.random(320)
    assert cluster_bootstrap(uneven, groups, seed=0) != cluster_bootstrap(uneven, groups, seed=1)


def test_bootstrap_covers_the_true_mean_under_clustering() -> None:
    rng = np.random.default_rng(5)
    groups, covered, runs = [f"g{i // 4}" for i in range(160)], 0, 200
    for run in range(runs):
        share_G = rng.choice([0.3, 0.9], size=40)  # the mean is .6; rows of a group go together
        values = (rng.random(160) < np.repeat(share_G, 4)).astype(float)
        low, high = cluster_bootstrap(values, groups, seed=run, samples=600)
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / runs <= 0.985  # 95 % less the small-sample loss, +- 3 standard errors of 200 runs


def test_few_groups_say_nothing() -> None:
    assert cluster_interval([1.0, 1.0], ["g", "g"], seed=0) == (0.0, 1.0)
    assert cluster_interval([1.0, 0.0, 1.0, 1.0, 1.0], list("abcde"), seed=0, bounds=(-1.0, 1.0)) == (-1.0, 1.0)
    assert cluster_interval([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], list("abcdef"), seed=0) == (0.0, 1.0)  # the extreme halves


def test_the_bootstrap_is_offered_from_100_groups_up_and_below_the_exact_tests_interval() -> None:
    values = np.random.default_rng(0).random(300)
    for groups, interval in ((100, cluster_bootstrap), (99, sign_flip_interval)):
        names = [str(i % groups) for i in range(300)]
        assert cluster_interval(values, names, 4) == interval(values, names, 4)
        other = sign_flip_interval if interval is cluster_bootstrap else cluster_bootstrap
        assert cluster_interval(values, names, 4) != other(values, names, 4)


def coverages(runs: int) -> dict[str, float]:
    """How often each interval holds the truth, averaged over p: true shares drawn evenly, rows correlated in groups."""
    rng = np.random.default_rng(7)
    covered = {"wilson": 0, "bootstrap": 0, "sign flips": 0}
    for run in range(runs):
        share, n = rng.uniform(0.05, 0.95), int(rng.integers(30, 400))
        low, high = wilson_interval(int(rng.binomial(n, share)), n)
        covered["wilson"] += low <= share <= high
        difference, rows = rng.uniform(-0.3, 0.3), 4
        for name, groups in (("bootstrap", int(rng.integers(100, 200))), ("sign flips", int(rng.integers(8, 100)))):
            tilt_G1 = rng.uniform(-0.15, 0.15, size=(groups, 1))  # a group's rows lean to one judge together
            chance = rng.random((groups, rows))
            won, lost = chance < 0.2 + difference / 2 + tilt_G1 / 2, chance > 0.8 + difference / 2 + tilt_G1 / 2
            values = (won.astype(float) - lost).ravel()
            names = [str(i // rows) for i in range(groups * rows)]
            interval = {"bootstrap": cluster_bootstrap, "sign flips": sign_flip_interval}[name]
            low, high = interval(values, names, run, samples=1000)
            covered[name] += low <= difference <= high
    return {name: count / runs for name, count in covered.items()}


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    for name, share in coverages(300).items():
        assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300), name


@pytest.mark.long
def test_intervals_cover_93_to_97_times_in_100_over_2000_runs() -> None:
    for name, share in coverages(2000).items():
        assert 0.93 <= share <= 0.97, (name, share)


def paired_coverages(runs: int, sizes: Sequence[int], shares: Sequence[float]) -> dict[tuple[int, float, int], float]:
    """How often the interval of a paired difference holds the truth, by pairs, their discordant share, pairs a group.

    Of the discordant pairs judge a wins a share that is drawn evenly; half the pairs of a group of two are one pair.
    """
    rng, covered = np.random.default_rng(8), {}
    for pairs, share, per_group in itertools.product(sizes, shares, (1, 2)):
        names, hits = [f"g{i // per_group}" for i in range(pairs)], 0
        for run in range(runs):
            wins, chance = share * rng.random(), rng.random(pairs)
            chance = np.where(rng.random(pairs) < 0.5, chance, np.repeat(chance[::per_group], per_group))
            low, high = paired_interval((chance < wins) - (chance > 1 - share + wins) * 1.0, names, run, samples=600)
            hits += low <= 2 * wins - share <= high
        covered[pairs, share, per_group] = hits / runs
    return covered


def test_paired_intervals_cover_the_truth_where_few_pairs_are_discordant() -> None:
    shares = paired_coverages(100, [150], [0.02, 0.04]).values()
    assert sum(shares) / len(shares) >= 0.93, shares  # over whole groups alone it is .84


@pytest.mark.long
def test_paired_intervals_cover_93_to_97_times_in_100_over_2000_runs() -> None:
    shares = paired_coverages(2000, [150, 400], [0.02, 0.04, 0.1, 0.4])
    assert 0.93 <= sum(shares.values()) / len(shares) <= 0.97, shares
    assert min(shares.values()) >= 0.93, shares  # of three discordant pairs it may be too wide, never too narrow


def test_without_a_discordant_pair_a_paired_interval_has_a_width() -> None:
    ids = [str(i) for i in range(150)]
    half_width = 1.96 * math.sqrt(2 / 152 / 152)
    assert paired_interval([0.0] * 150, ids, seed=0) == pytest.approx([-half_width, half_width])
    p12, p21 = 3 / 152, 1 / 152  # Bonett & Price's own form, two against none
    half_width = 1.96 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 152)
    expected = pytest.approx([p12 - p21 - half_width, p12 - p21 + half_width])
    assert paired_interval([1.0, 1.0, *[0.0] * 148], ids, seed=0) == expected
    twice = [name for name in ids for _ in range(2)]  # two copies of a pair say no more than one
    assert paired_interval([*[1.0] * 4, *[0.0] * 296], twice, seed=0) == expected
    half_width = 1.96 * math.sqrt(2) / 302  # of pairs alike, and where groups cancel, a pair is one
    for values in ([0.0] * 300, [1.0, -1.0] * 150):
        assert paired_interval(values, twice, seed=0) == pytest.approx([-half_width, half_width])
    assert paired_interval([1.0] * 150, ids, seed=0)[1] == 1.0


def test_a_share_of_pairs_in_closed_groups_is_covered_where_wilsons_interval_is_not() -> None:
    """Groups of four of what four seeds' judges are right on in both orders, 80 at a time, as a run has them."""
    results = Path(__file__).resolve().parents[1] / "experiments" / "results" / "quickstart"
    of_groups: dict[str, list[float]] = {}
    for path in sorted(results.glob("seed=*.jsonl.gz")):
        trained = read_verdicts(path)["trained"]
        for verdict, score in zip(trained, consistent_scores(trained), strict=True):
            of_groups.setdefault(f"{path.name} {verdict.group}", []).append(float(score))
    scores_G4 = np.array([scores for scores in of_groups.values() if len(scores) == 4])
    rng, groups, truth = np.random.default_rng(0), [str(i // 4) for i in range(320)], scores_G4.mean()
    wilsons, ours = 0, 0
    for _ in range(200):
        scores = scores_G4[rng.integers(0, len(scores_G4), 80)].ravel()
        (low, high), (lower, higher) = wilson_interval(scores.sum(), 320), share_interval(scores, groups, 0)
        wilsons, ours = wilsons + (low <= truth <= high), ours + (lower <= truth <= higher)
    assert wilsons < 0.85 * 200 and ours > 0.91 * 200
