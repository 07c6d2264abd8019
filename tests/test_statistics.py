"""Verdict statistics against published figures, hand-made cases and brute-force oracles."""

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from dpo.judge.calibration import agreement, agreement_interval, cohens_kappa
from dpo.judge.statistics import (
    Verdict,
    averaged_scores,
    chosen_probabilities,
    cluster_bootstrap,
    compare,
    compare_subsets,
    consistent_scores,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    outcomes,
    reliability,
    share_interval,
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
    assert detectable(100, 0.05) == 0.0 < detectable(100, 0.06)  # five groups flipped give p = 2 / 2^5 at least


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
    groups = [verdict.group for verdict in verdicts]
    assert summary["accuracy"] == 2 / 8
    assert summary["accuracy_interval"] == share_interval([1, 1, 0, 0, 0, 0, 0, 0], groups, 0)
    assert summary["averaged_accuracy"] == (1 + 1 + 0 + 0.5 + 1 + 0 + 0 + 0.5) / 8
    assert summary["averaged_interval"] == share_interval([1, 1, 0, 0.5, 1, 0, 0, 0.5], groups, 0)
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


def test_every_accuracys_interval_is_as_wide_as_its_groups_are_few() -> None:
    """Four pairs a group that stand or fall together: Wilson's would take them for four times as much."""
    verdicts = [make(*(WIN if group % 2 else LOSS), f"r{i}", f"g{group}") for group in range(20) for i in range(4)]
    summary, narrow = summarise(verdicts, seed=0), np.diff(wilson_interval(40, 80))[0]
    for key in ("accuracy_interval", "averaged_interval", "tie_half_interval", "decided_interval"):
        assert np.diff(summary[key])[0] > 1.6 * narrow  # type: ignore[literal-required]


def test_a_summary_gives_all_three_tie_conventions() -> None:
    summary = summarise(make_all([WIN] * 5 + [LOSS] * 2 + [ALWAYS_A] * 2 + [INVALID]))
    assert (summary["accuracy"], summary["tie_half_accuracy"], summary["decided_accuracy"]) == (0.5, 0.6, 5 / 7)
    scores, alone = [1.0] * 5 + [0.0] * 2 + [0.5] * 2 + [0.0], [f"g{i}" for i in range(10)]
    assert summary["tie_half_interval"] == share_interval(scores, alone, 0)
    assert summary["decided_interval"] == share_interval(scores[:7], alone[:7], 0)
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


def test_the_interval_of_kappa_covers_it_and_has_a_width_where_all_agree() -> None:
    rng, names, shares = np.random.default_rng(9), [f"g{i // 2}" for i in range(240)], [0.5, 0.2, 0.3]
    label, kappa, covered = np.full(240, "win"), (0.5 - 0.2) / (2 - 0.5 - 0.2), 0  # 0.7 of both sides are decided
    for run in range(300):
        own, shared = (rng.choice(["win", "loss", "tie"], n, p=shares) for n in (240, 120))
        told = np.where(rng.random(240) < 0.5, own, np.repeat(shared, 2))
        low, high = agreement_interval(told, label, names, run) or (1.0, 0.0)
        covered += low <= kappa <= high
    assert abs(covered / 300 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)
    low, high = agreement_interval(label, label, names, 0) or (1.0, 1.0)
    assert 0.9 < low < high == 1
    low, high = agreement_interval(np.full(240, "tie"), label, names, 0) or (0.0, 0.0)
    assert -0.1 < low < 0 < high < 0.1
    assert agreement_interval(label, label, [str(i % 99) for i in range(240)], 0) is None
    assert agreement_interval(np.full(240, "tie"), np.full(240, "tie"), names, 0) is None


def test_a_summarys_intervals_are_those_of_the_scores_by_group() -> None:
    rng = np.random.default_rng(10)
    verdicts = [*make_all([(a, b) for a, b in rng.normal(size=(240, 2))], per_group=2), make(NAN, 1.0, "x", "g0")]
    summary, groups = summarise(verdicts, seed=3), [verdict.group for verdict in verdicts]
    decided = [float(verdict.first * verdict.second < 0) for verdict in verdicts]
    says_a = [(float(verdict.first > 0) + float(verdict.second > 0)) / 2 for verdict in verdicts]
    assert summary["raw_a_rate"] == np.mean(says_a) and says_a[-1] == 0.5
    losses = (1 - chosen_probabilities(verdicts)) ** 2
    assert summary["intervals"] == {
        "position_consistency": share_interval(decided, groups, 3),
        "raw_a_rate": share_interval(says_a, groups, 3),
        "brier": list(cluster_bootstrap(losses, groups[:-1], 3)),
        "kappa": agreement_interval(outcomes(verdicts), np.full(241, "win"), groups, 3),
    }
    same = compare(verdicts, verdicts[:240] + [make(1.0, -1.0, "x", "g0")], seed=3)
    assert same["same_verdict_interval"] == share_interval([1.0] * 240 + [0.0], groups, 3)
    low, high = same["kappa_interval"] or (0.0, 0.0)
    assert low < (same["kappa"] or 0.0) <= high


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
