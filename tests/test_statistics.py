"""Verdict statistics against published figures, hand-made cases and brute-force oracles."""

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from dpo.judge.calibration import cohens_kappa
from dpo.judge.statistics import (
    Verdict,
    agreement,
    averaged_scores,
    chosen_probabilities,
    cluster_bootstrap,
    cluster_interval,
    compare,
    compare_subsets,
    consistent_scores,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    outcomes,
    paired_interval,
    reliability,
    sign_flip_interval,
    sign_flip_p,
    summarise,
    verdict_record,
    wilson_interval,
)

NAN = float("nan")


def make(first: float, second: float, id: str = "r", group: str = "", subset: str = "Math") -> Verdict:
    return Verdict(id, subset, group or id, (0, 0), first, second)


def make_all(log_odds: Sequence[tuple[float, float]], per_group: int = 1) -> list[Verdict]:
    return [make(first, second, f"r{i}", f"g{i // per_group}") for i, (first, second) in enumerate(log_odds)]


WIN, LOSS, ALWAYS_A, ALWAYS_B, INVALID = (2.0, -1.0), (-2.0, 1.0), (1.0, 1.0), (-1.0, -1.0), (NAN, 1.0)


# ---- verdicts


def test_a_verdict_is_one_line_of_strict_json_an_invalid_log_odds_null() -> None:
    line = json.dumps(verdict_record(Verdict("ü", "Focus", "g", (1, 2), -1 / 3, NAN)), allow_nan=False)
    expected = {"id": "ü", "subset": "Focus", "group": "g", "pair": [1, 2], "first": -1 / 3, "second": None}
    assert json.loads(line) == expected


def test_outcomes_and_scores_follow_the_signs_of_both_orders() -> None:
    cases = [
        (WIN, "win", 1.0),
        (LOSS, "loss", 0.0),
        (ALWAYS_A, "tie", 0.5),
        (ALWAYS_B, "tie", 0.5),
        ((2.0, 1.0), "tie", 1.0),  # flips, but leans to the chosen answer
        ((1.0, 2.0), "tie", 0.0),
        ((0.0, -1.0), "tie", 1.0),  # an exact 0 decides nothing
        ((1.0, 0.0), "tie", 1.0),
        ((0.0, 1.0), "tie", 0.0),
        ((0.0, 0.0), "tie", 0.5),
        ((1e300, 1e300 * (1 + 1e-15)), "tie", 0.0),
        (INVALID, "invalid", 0.0),
        ((1.0, NAN), "invalid", 0.0),
    ]
    verdicts = make_all([case[0] for case in cases])
    assert outcomes(verdicts).tolist() == [case[1] for case in cases]
    assert averaged_scores(verdicts).tolist() == [case[2] for case in cases]
    assert consistent_scores(verdicts).tolist() == [float(case[1] == "win") for case in cases]


def test_exchanging_chosen_and_rejected_exchanges_wins_with_losses() -> None:
    rng = np.random.default_rng(0)
    verdicts = make_all([(a, b) for a, b in rng.normal(size=(200, 2))])
    exchanged = [make(-v.first, -v.second, v.id, v.group) for v in verdicts]
    one, other = summarise(verdicts), summarise(exchanged)
    assert (one["wins"], one["losses"], one["ties"]) == (other["losses"], other["wins"], other["ties"])
    assert one["wins"] > 0 and one["averaged_accuracy"] == pytest.approx(1 - other["averaged_accuracy"], abs=1e-15)


def test_an_infinite_log_odds_and_a_summary_of_nothing_are_refused() -> None:
    with pytest.raises(AssertionError, match="finite"):
        averaged_scores([make(math.inf, -1.0)])
    with pytest.raises(AssertionError, match="at least one"):
        summarise([])


# ---- intervals


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


def test_the_sign_flip_interval_leaves_out_what_the_sign_flip_test_rejects() -> None:
    rng = np.random.default_rng(4)
    rejected = 0
    for run in range(200):
        names = [f"g{i // 2}" for i in range(2 * rng.integers(6, 12))]
        differences = rng.choice([-1, 0, 1, 2], size=len(names)).astype(float)  # whole numbers: no rounding
        low, high = sign_flip_interval(differences, names, run, bounds=(-2.0, 2.0))
        rejects = brute_force_p(differences.tolist(), names) <= 0.05
        assert rejects == (low > 0 or high < 0)
        rejected += rejects
    assert 20 < rejected < 180


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


# ---- tests


def test_mcnemar_gives_hand_made_figures() -> None:
    assert mcnemar_exact(3, 0) == 0.25  # the published headline, 186 against 183, at its very best
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 4) == 0.125
    assert mcnemar_exact(1, 5) == mcnemar_exact(5, 1) == 2 * (1 + 6) / 64
    # 172 -> 186: below .05 only with at most 44 discordant pairs, and .09 at 60.
    assert mcnemar_exact(29, 15) < 0.05 < mcnemar_exact(30, 16)
    assert round(mcnemar_exact(37, 23), 2) == 0.09
    assert 0 < mcnemar_exact(3000, 2000) < 1e-40  # large counts neither overflow nor vanish


def test_mcnemar_equals_the_enumeration_of_every_coin_sequence() -> None:
    for n in range(1, 9):
        heads = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        for b in range(n + 1):
            extreme = sum(abs(2 * h - n) >= abs(2 * b - n) for h in heads)
            assert mcnemar_exact(b, n - b) == extreme / 2**n


def brute_force_p(differences: Sequence[float], groups: Sequence[str]) -> float:
    names = sorted(set(groups))
    sums = [math.fsum(d for d, g in zip(differences, groups, strict=True) if g == name) for name in names]
    draws = [
        math.fsum(s * t for s, t in zip(sums, signs, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    return sum(abs(draw) >= abs(math.fsum(sums)) - 1e-12 for draw in draws) / len(draws)


def test_sign_flip_enumerates_all_signs_of_few_groups() -> None:
    rng = np.random.default_rng(7)
    for n_groups in (1, 2, 5, 9):
        groups = [f"g{i % n_groups}" for i in range(3 * n_groups)]
        for differences in (
            rng.normal(size=len(groups)).tolist(),
            rng.choice([-1, -0.5, 0, 0.5, 1], len(groups)).tolist(),
        ):
            assert sign_flip_p(differences, groups, seed=0) == brute_force_p(differences, groups)


def test_sign_flip_of_single_rows_is_mcnemar() -> None:
    ids = [str(i) for i in range(40)]
    differences = [1.0] * 9 + [-1.0] * 3 + [0.0] * 28
    assert sign_flip_p(differences, ids, seed=0) == mcnemar_exact(9, 3)
    many = [1.0] * 28 + [-1.0] * 12  # 40 groups: by Monte Carlo
    p, exact = sign_flip_p(many, ids, seed=0), mcnemar_exact(28, 12)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)
    assert sign_flip_p([1.0] * 40, ids, seed=0) == 1 / 20_001  # never 0
    assert sign_flip_p([0.0] * 40, ids, seed=0) == 1.0


def test_sign_flip_counts_groups_not_rows() -> None:
    differences, groups = [1.0] * 16, [f"g{i // 4}" for i in range(16)]
    assert mcnemar_exact(16, 0) < 1e-4
    assert sign_flip_p(differences, groups, seed=0) == 2 / 2**4


def test_sign_flip_keeps_its_level_where_the_row_wise_test_does_not() -> None:
    rng = np.random.default_rng(11)
    groups, runs = [f"g{i // 4}" for i in range(80)], 300
    by_group, by_row = 0, 0
    for run in range(runs):
        differences = np.repeat(rng.choice([-1.0, 1.0], size=20), 4)  # no difference in truth, four copies of each
        by_group += sign_flip_p(differences, groups, seed=run, flips=400) < 0.05
        by_row += mcnemar_exact(int((differences > 0).sum()), int((differences < 0).sum())) < 0.05
    assert by_group / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert by_row / runs > 0.2


def test_holm_gives_the_textbook_case_and_never_sorts_its_output() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def detectable(n: int, discordance: float, copies: int = 1) -> float:
    """Of n groups of `copies` equal pairs, this share of them discordant."""
    discordant = round(n * discordance)
    differences = np.repeat([1.0] * (discordant // 2) + [-1.0] * (discordant - discordant // 2), copies)
    differences = np.append(differences, np.zeros(n * copies - len(differences)))
    return minimum_detectable_difference(differences, [f"g{i // copies}" for i in range(n * copies)])


def test_minimum_detectable_difference_gives_the_published_sizes() -> None:
    for difference, n in {0.01: 15_700, 0.02: 3_900, 0.03: 1_700}.items():  # at 20 % discordance
        assert detectable(n, 0.2) == pytest.approx(difference, rel=0.02)
    assert detectable(620, 0.2) == pytest.approx(0.05, rel=0.001)
    assert round(100 * detectable(297, 0.2)) == 7
    assert round(100 * detectable(1865, 0.2)) == 3
    assert detectable(100, 0.0) == 0.0


def test_four_copies_of_a_pair_detect_no_more_than_one() -> None:
    assert detectable(80, 0.2, copies=4) == pytest.approx(detectable(80, 0.2), rel=1e-14)


def test_minimum_detectable_difference_is_found_with_the_power_it_names() -> None:
    n, discordance, rng = 400, 0.2, np.random.default_rng(2)
    difference = detectable(n, discordance)
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    draws = rng.multinomial(n, shares, size=2000)
    power = np.mean([mcnemar_exact(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert 0.72 < power < 0.84  # the exact test gives some points away for being exact


# ---- summaries and comparisons


def test_a_summary_holds_the_figures_of_a_hand_made_judge() -> None:
    verdicts = [
        *make_all([WIN, WIN, LOSS, ALWAYS_A, (2.0, 1.0)]),
        make(0.5, 3.0, "x", "g0", "Focus"),
        make(NAN, 1.0, "y", "g1", "Focus"),
        make(0.0, 0.0, "z", "g1", "Focus"),
    ]
    summary = summarise(verdicts, seed=0)
    counts = ("n", "wins", "losses", "ties", "invalid")
    assert [summary[name] for name in counts] == [8, 2, 1, 4, 1]  # type: ignore[literal-required]
    assert summary["accuracy"] == 2 / 8 and summary["accuracy_interval"] == list(wilson_interval(2, 8))
    assert summary["averaged_accuracy"] == (1 + 1 + 0 + 0.5 + 1 + 0 + 0 + 0.5) / 8
    assert summary["averaged_interval"] == list(wilson_interval(4, 8))
    assert summary["position_consistency"] == 3 / 8
    assert summary["raw_a_rate"] == (2 + 1 + 2 + 2 + 2 + 1) / 16
    assert list(summary["subsets"]) == ["Focus", "Math"] and "subsets" not in summary["subsets"]["Math"]
    assert summary["subsets"]["Math"]["accuracy"] == 2 / 5 and summary["subsets"]["Focus"]["invalid"] == 1
    json.dumps(summary, allow_nan=False)


def test_a_summary_of_invalid_verdicts_only_is_still_strict_json() -> None:
    summary = summarise([make(NAN, NAN)])
    assert summary["accuracy"] == summary["averaged_accuracy"] == 0.0 and summary["invalid"] == 1
    json.dumps(summary, allow_nan=False)


def test_comparison_of_a_hand_made_pair_of_judges() -> None:
    a = make_all([WIN] * 6 + [ALWAYS_A] * 2 + [LOSS] * 2, per_group=2)
    b = make_all([LOSS] * 3 + [WIN] * 3 + [(1.0, 2.0)] * 2 + [LOSS, WIN], per_group=2)
    result = compare(a, b, seed=0)
    consistent, averaged = result["consistent"], result["averaged"]
    assert (consistent["wins_only_a"], consistent["wins_only_b"]) == (3, 1)
    assert consistent["difference"] == 2 / 10 and consistent["p"] == mcnemar_exact(3, 1)
    assert (averaged["wins_only_a"], averaged["wins_only_b"]) == (5, 1)  # two of them by half a score
    assert averaged["difference"] == pytest.approx((3 + 2 * 0.5 - 1) / 10, abs=1e-15)
    assert averaged["p"] == mcnemar_exact(5, 1)
    assert averaged["p_clustered"] == brute_force_p([1, 1, 1, 0, 0, 0, 0.5, 0.5, 0, -1], [v.group for v in a])
    assert averaged["interval"][0] <= averaged["difference"] <= averaged["interval"][1]
    json.dumps(result, allow_nan=False)


def test_exchanging_the_judges_negates_the_difference_and_keeps_p() -> None:
    rng = np.random.default_rng(1)
    a, b = (make_all([(x, y) for x, y in rng.normal(size=(60, 2))], per_group=4) for _ in range(2))
    forth, back = compare(a, b, seed=0), compare(b, a, seed=0)
    for one, other in ((forth["averaged"], back["averaged"]), (forth["consistent"], back["consistent"])):
        assert one["difference"] == -other["difference"]
        assert (one["p"], one["p_clustered"]) == (other["p"], other["p_clustered"])
        assert one["interval"] == pytest.approx([-other["interval"][1], -other["interval"][0]], abs=1e-12)
    same = compare(a, a, seed=0)["averaged"]
    assert (same["p"], same["p_clustered"], same["difference"]) == (1.0, 1.0, 0.0)
    assert same["interval"][0] == -same["interval"][1] < 0


def test_judges_of_different_pairs_are_not_compared() -> None:
    a = make_all([WIN, LOSS])
    for b in (a[:1], a[::-1], [make(*WIN, "r0", "other"), a[1]]):
        with pytest.raises(AssertionError, match="same pairs"):
            compare(a, b, seed=0)


def test_reliability_holds_each_valid_pair_once_in_the_bin_of_its_confidence() -> None:
    odds = [(0.0, 0.0), (0.2, 0.0), (-4.0, 2.0), (4.0, -2.0), (5.0, -5.0), (50.0, -50.0), (math.nan, 1.0)]
    bins = reliability([Verdict(str(i), "s", "g", (0, 0), *one) for i, one in enumerate(odds)])
    assert [one["n"] for one in bins] == [2, 4]  # an even verdict scores one half; +-3 nats on average are 95 % sure
    assert [one["accuracy"] for one in bins] == [0.75, 0.75]
    assert bins[0]["confidence"] == pytest.approx((0.5 + 1 / (1 + math.exp(-0.1))) / 2)
    assert bins[1]["interval"] == list(wilson_interval(3, 4))
    assert reliability([Verdict("0", "s", "g", (0, 0), math.nan, 1.0)]) == []


def test_a_summary_gives_all_three_tie_conventions() -> None:
    summary = summarise(make_all([WIN] * 5 + [LOSS] * 2 + [ALWAYS_A] * 2 + [INVALID]))
    assert (summary["accuracy"], summary["tie_half_accuracy"], summary["decided_accuracy"]) == (0.5, 0.6, 5 / 7)
    assert summary["tie_half_interval"] == list(wilson_interval(6, 10))
    assert summary["decided_interval"] == list(wilson_interval(5, 7))
    undecided = summarise(make_all([ALWAYS_A, INVALID]))
    assert (undecided["decided_accuracy"], undecided["decided_interval"]) == (None, None)


def test_the_studys_counts_give_its_decided_accuracies() -> None:
    counts = {(183, 43): 81.0, (172, 57): 75.1, (186, 50): 78.8, (186, 63): 74.7, (182, 62): 74.6, (149, 54): 73.4}
    for (wins, losses), decided in counts.items():
        summary = summarise(make_all([WIN] * wins + [LOSS] * losses + [ALWAYS_A] * (297 - wins - losses)))
        assert summary["decided_accuracy"] == pytest.approx(decided / 100, abs=6e-4)


def test_holm_runs_over_the_subsets_of_a_comparison() -> None:
    names = ["Focus"] * 12 + ["Math"] * 12 + ["Safety"] * 12
    better = [make(*WIN, f"r{i}", "", name) for i, name in enumerate(names)]
    worse = [make(*(LOSS if i < 12 or 12 <= i < 20 else WIN), f"r{i}", "", name) for i, name in enumerate(names)]
    tests = compare_subsets(better, worse, seed=0)
    assert [test["p"] for test in tests.values()] == [2 / 2**12, 2 / 2**8, 1.0]
    assert [test["p_holm"] for test in tests.values()] == [3 * 2 / 2**12, 2 * 2 / 2**8, 1.0]
    assert tests["Math"] | {"p_holm": 0} == compare(better[12:24], worse[12:24], seed=0)["averaged"] | {"p_holm": 0}


def test_kappa_is_0_for_chance_and_1_for_one_mind_with_a_tie_as_a_class() -> None:
    win, loss, tie = (np.array([name]) for name in ("win", "loss", "tie"))
    coin, label = np.concatenate([win, loss] * 8), np.repeat(win, 16)
    assert agreement(coin, label) == 0.0 and agreement(np.repeat(tie, 16), label) == 0.0
    assert agreement(coin, coin) == agreement(label, label) == 1.0
    assert agreement(label, np.repeat(loss, 16)) == -1.0
    a, b = np.concatenate([win, win, tie, loss]), np.concatenate([win, loss, tie, tie])
    # Both ways round: 8 items, 4 agree; a: A 3, B 3, tie 2; b: A 2, B 2, tie 4.
    by_chance = (3 * 2 + 3 * 2 + 2 * 4) / 64
    assert agreement(a, b) == agreement(b, a) == pytest.approx((0.5 - by_chance) / (1 - by_chance), rel=1e-15)
    assert agreement(tie, tie) is None  # nothing but one class: undefined


def test_the_order_averaged_probability_is_the_sigmoid_of_the_averaged_log_odds() -> None:
    chosen_R = chosen_probabilities(make_all([(2.0, -1.0), (1.0, 1.0), INVALID, (-3.0, 800.0)]))
    assert chosen_R.tolist() == pytest.approx([1 / (1 + math.exp(-1.5)), 0.5, 0.0], abs=1e-15)


def test_a_summary_holds_calibration_of_its_valid_verdicts_only() -> None:
    sure, unsure = (math.log(9), -math.log(9)), (math.log(1.5), -math.log(1.5))
    summary = summarise(make_all([sure] * 9 + [(-sure[0], -sure[1])] + [unsure] * 6 + [(-unsure[0], -unsure[1])] * 4))
    assert summary["calibration_error"] == pytest.approx(0, abs=1e-12)  # nine in ten, six in ten: as it says
    assert summary["brier"] == pytest.approx((9 * 0.01 + 0.81 + 6 * 0.16 + 4 * 0.36) / 20)
    assert summary["selective_accuracy"] == pytest.approx(
        [0.9] * 5 + [(9 + 0.6 * more) / (10 + more) for more in (2, 4, 6, 8, 10)]
    )
    invalid = summarise([make(NAN, NAN)])
    assert (invalid["brier"], invalid["calibration_error"], invalid["selective_accuracy"]) == (None, None, [])


def test_letters_and_ratings_are_no_probabilities() -> None:
    for verdicts, odds in (
        (make_all([(1.0, -1.0), (1.0, 1.0), (0.0, -1.0), INVALID]), True),
        (make_all([(3.0, -3.0)]), False),
    ):
        summary = summarise(verdicts, odds=odds)
        assert (summary["brier"], summary["calibration_error"], summary["selective_accuracy"]) == (None, None, [])
    assert summarise(make_all([(1.0, -1.0), (1.0, 0.5)]))["brier"] is not None


def test_statistics_agree_with_scipy_and_statsmodels() -> None:
    stats = pytest.importorskip("scipy.stats")
    for b, c in [(0, 3), (5, 9), (37, 23), (300, 200)]:
        assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-12)
    for k, n in [(0, 5), (3, 25), (183, 297), (297, 297)]:
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=2e-5)  # our z is 1.96
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    p = np.random.default_rng(0).random(12) ** 3
    assert holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist(), rel=1e-14)
    counts = np.random.default_rng(1).integers(0, 20, size=(4, 4))
    assert cohens_kappa(counts.astype(float)) == pytest.approx(inter_rater.cohens_kappa(counts).kappa, rel=1e-12)
