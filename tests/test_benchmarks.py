"""The benchmarks' official scores, against cases of their formulas worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dpo.judge.benchmarks import (
    Benchmark,
    choice_score,
    judgebench,
    llmbar,
    mean_of_subsets,
    official_choice,
    rating_score,
    rm_bench,
    scored,
    six_subsets,
    ties_score,
)
from dpo.judge.statistics import Verdict
from models.errors import UserError

NAN = float("nan")


def verdict(first: float, second: float, pair: tuple[int, int] = (0, 0), subset: str = "s") -> Verdict:
    return Verdict("r", subset, "g", pair, first, second)


def test_rewardbench_2_reads_the_first_letter_of_the_alphabet_that_stands_anywhere() -> None:
    assert official_choice("I weigh [[D]] against [[B]]: [[D]]") == "B"  # the judge's verdict is D
    assert official_choice("[[C]]") == "C" and official_choice("C") is None and official_choice("[[E]]") is None
    assert [choice_score(choice, "C") for choice in ("C", "A", None)] == [1, 0, 0.25]


def test_rewardbench_2_shares_the_credit_of_a_row_among_the_highest_ratings() -> None:
    assert rating_score([8], [7, 3, 1]) == 1 and rating_score([7], [8, 3, 1]) == 0
    assert rating_score([8], [8, 3, 1]) == 1 / 2 and rating_score([8], [8, 8, 8]) == 1 / 4
    assert rating_score([NAN], [NAN] * 3) == 1 / 4 and rating_score([NAN], [1, NAN, NAN]) == 0
    assert rating_score([1], [NAN] * 3) == 1


def test_the_ties_score_is_its_formula_on_hand_made_questions() -> None:
    # 1: gap_ref 5, gap_tied 3, spread 1. 2: gap_ref 1, gap_tied 3, spread 2. 3: gap_ref -1, gap_tied -2, spread 0.
    ratings = {
        "ref:1": ([9.0], [4.0, 1.0]),
        "tied:1": ([9.0, 8.0], [5.0]),
        "ref:2": ([6.0], [5.0]),
        "tied:2": ([8.0, 10.0], [5.0, 4.0]),
        "ref:3": ([4.0], [5.0]),
        "tied:3": ([3.0, 3.0], [5.0]),
    }
    margin = (math.tanh(3 - 1) + math.tanh(1 / 2 - 1) - 1) / 3
    expected = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin
    assert ties_score(ratings) == pytest.approx(expected, rel=1e-14)
    assert ties_score({"ref:1": ([5.0], [5.0]), "tied:1": ([5.0, 5.0], [5.0])}) == 0.0  # 0/0 counts as 0
    perfect = ties_score({"ref:1": ([10.0], [1.0]), "tied:1": ([10.0, 10.0], [1.0])})
    assert perfect == pytest.approx(1.01)  # as published: the weights sum to 1.01
    assert ties_score({"ref:1": ([5.0], [4.0])}) == pytest.approx(0.3)


def test_the_final_score_weighs_subsets_alike_whatever_their_size() -> None:
    assert mean_of_subsets([("a", 1.0), ("a", 1.0), ("a", 0.0), ("b", 0.0)]) == {
        "a": pytest.approx(2 / 3),
        "b": 0.0,
        "score": pytest.approx(1 / 3),
    }


def test_a_scores_interval_is_that_of_its_subsets_means() -> None:
    rng = np.random.default_rng(0)
    right = {subset: (rng.random(n) < p).astype(float) for subset, n, p in (("a", 400, 0.8), ("b", 100, 0.6))}
    items = [(subset, float(x)) for subset, values in right.items() for x in values]
    groups = [f"g{place}" for place in range(len(items))]
    of = scored("x", lambda at: mean_of_subsets([items[place] for place in at]), groups, seed=0)
    variance = {subset: x.var(ddof=1) / len(x) for subset, x in right.items()}
    for key, exact in (variance | {"score": sum(variance.values()) / 4}).items():
        low, high = of["intervals"][key]
        assert (low + high) / 2 == pytest.approx(of["figures"][key])
        assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(exact), rel=0.25)  # of 50 blocks: a tenth off
    assert scored("x", lambda at: {"score": 0.5}, groups, 0)["intervals"] == {}  # nothing moves it
    assert scored("x", lambda at: mean_of_subsets([items[p] for p in at]), groups[:1] * 500, 0)["intervals"] == {}


def test_a_scores_interval_covers_what_is_true_where_rows_come_in_groups() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        base = rng.random(120) < 0.7
        values = np.where(rng.random((120, 2)) < 0.5, base[:, None], rng.random((120, 2)) < 0.7).ravel()
        of = scored(
            "x", lambda at, v=values: {"score": float(v[list(at)].mean())}, [f"g{i // 2}" for i in range(240)], 0
        )
        hits += of["intervals"]["score"][0] <= 0.7 <= of["intervals"]["score"][1]
    assert 0.91 <= hits / 200 <= 0.99


def test_six_subsets_weigh_alike_and_their_errors_add_as_those_of_other_rows() -> None:
    four = Benchmark(name="four", figures={s: 0.8 for s in "abcde"} | {"score": 0.8, "score_by_its_parser": 0.7},
                     intervals={"score": [0.77, 0.83]})  # fmt: skip
    ties = Benchmark(name="ties", figures={"Ties": 0.5, "score": 0.5}, intervals={"score": [0.42, 0.58]})
    both = six_subsets(four, ties)
    assert both["figures"]["score"] == pytest.approx((5 * 0.8 + 0.5) / 6)
    low, high = both["intervals"]["score"]
    assert (high - low) / 2 == pytest.approx(math.hypot(5 * 0.03, 0.08) / 6)
    assert six_subsets(four, {**ties, "intervals": {}})["intervals"] == {}


def test_judgebench_counts_a_win_beside_a_tie_as_right_and_a_split_as_wrong() -> None:
    cases = {(1, -1): 1, (1, 0): 1, (1, NAN): 1, (NAN, -1): 1, (1, 1): 0, (-1, -1): 0, (0, 0): 0, (NAN, NAN): 0}
    cases |= {(-1, 0): 0, (-1, 1): 0}
    for (first, second), right in cases.items():
        assert judgebench([verdict(first, second)]) == {"score": right}, (first, second)


def test_llmbar_averages_the_orders_and_counts_the_pairs_of_one_verdict() -> None:
    judged = [verdict(1, -1), verdict(1, 1), verdict(-1, 1), verdict(NAN, -1)]
    assert llmbar(judged) == {"score": (1 + 0.5 + 0 + 0.5) / 4, "agreement": 2 / 4}


def test_rm_bench_is_hard_above_the_diagonal_and_averages_domains() -> None:
    def row(wins: list[list[int]], domain: str) -> list[Verdict]:
        nine = [verdict(2 * wins[i][j] - 1, 0, (i, j), domain) for i in range(3) for j in range(3)]
        return [replace(one, id=domain) for one in nine]

    judged = row([[1, 0, 0], [1, 1, 0], [1, 1, 1]], "chat")  # easy 1, normal 1, hard 0
    judged += row([[1, 1, 1], [1, 0, 1], [0, 1, 1]], "code")  # easy 2/3, normal 2/3, hard 1
    judged += row([[1] * 3] * 3, "safety-refuse") + row([[0] * 3] * 3, "safety-response")
    scores = rm_bench(judged)
    assert (scores["chat"], scores["code"], scores["safety"]) == pytest.approx((2 / 3, 7 / 9, 1 / 2))
    assert scores["hard"] == pytest.approx((0 + 1 + 0.5) / 3) and scores["easy"] == pytest.approx((1 + 2 / 3 + 0.5) / 3)
    assert scores["score"] == pytest.approx((2 / 3 + 7 / 9 + 1 / 2) / 3)


def test_rm_bench_needs_every_pair_of_a_row() -> None:
    with pytest.raises(UserError, match=r"all nine pairs.*pairs_per_row=0"):
        rm_bench([verdict(1, 0, pair, "chat") for pair in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))])
