"""The controls on hand-made rows, and the conclusion that they allow."""

import json
import math
import time

import numpy as np
import pytest

from dpo.judge.controls import Pair, _logistic_fit, _surface_features, conclude, control_verdicts, surface_scorer
from dpo.judge.statistics import Verdict, averaged_scores, consistent_scores, outcomes, summarise
from dpo.rows import Row

WORDS = ["river", "stone", "lamp", "garden", "window", "train", "paper", "cloud", "bridge", "silver", "violin", "port"]
NAMES = ["always A", "consistent coin", "longer answer", "overlap with the request", "surface classifier"]
NAMES += ["calibrated base", "blind"]


def make_row(id: str, chosen: str | tuple[str, ...], rejected: str | tuple[str, ...], prompt: str = "Say it.") -> Row:
    chosen = (chosen,) if isinstance(chosen, str) else chosen
    rejected = (rejected,) if isinstance(rejected, str) else rejected
    return Row(id, "Math", ({"role": "user", "content": prompt},), chosen, rejected, group=id)


def first_pairs(rows: list[Row]) -> list[Pair]:
    return [(row, (0, 0)) for row in rows]


def random_text(rng: np.random.Generator, low: int = 4, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(low, high))))


def plain_verdicts(pairs: list[Pair], first: float = 0.5, second: float = 0.25) -> list[Verdict]:
    return [Verdict(row.id, row.subset, row.group, pair, first, second) for row, pair in pairs]


def controls_of(rows: list[Row], train: list[Row] | None = None, seed: int = 0) -> dict[str, list[Verdict]]:
    pairs = first_pairs(rows)
    base = plain_verdicts(pairs)
    return control_verdicts(train or rows, pairs, base, base, None, seed)


def counterfactual_groups(rng: np.random.Generator, count: int, per_row: int = 3) -> list[Row]:
    """Four requests and the same four answers, each right for exactly one: closed under exchange for per_row = 3."""
    rows = []
    for g in range(count):
        answers = [f"{word} {random_text(rng)}" for word in rng.permutation(WORDS)[:4]]
        for i in range(4):
            rejected = tuple(answers[(i + step) % 4] for step in range(1, per_row + 1))
            prompt = ({"role": "user", "content": f"Begin with {answers[i].split()[0]}."},)
            rows.append(Row(f"g{g}-{i}", "Focus", prompt, (answers[i],), rejected, group=f"g{g}"))
    return rows


def test_all_controls_judge_the_same_pairs_and_one_that_lacks_its_verdicts_is_left_out() -> None:
    rows = [make_row("a", ("one two", "three"), ("four", "five six seven")), make_row("b", "x", "y y")]
    pairs: list[Pair] = [(rows[0], (1, 1)), (rows[1], (0, 0)), (rows[0], (0, 1))]
    base, blind = plain_verdicts(pairs), plain_verdicts(pairs, 3.0, 2.0)
    controls = control_verdicts(rows, pairs, base, base, blind, seed=0)
    assert list(controls) == NAMES
    for verdicts in controls.values():
        assert [(v.id, v.pair, v.subset, v.group) for v in verdicts] == [
            (v.id, v.pair, v.subset, v.group) for v in base
        ]
    assert controls["blind"] == blind
    for without, validation, given in (
        ("blind", base, None),
        ("calibrated base", [], blind),
        ("calibrated base", plain_verdicts(pairs, math.nan), blind),
    ):
        found = control_verdicts(rows, pairs, base, validation, given, seed=0)
        assert list(found) == [name for name in NAMES if name != without]


def test_always_a_is_consistent_never_and_averaged_exactly_one_half() -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(str(i), random_text(rng), random_text(rng)) for i in range(33)]
    summary = summarise(controls_of(rows)["always A"])
    assert summary["accuracy"] == 0.0 and summary["averaged_accuracy"] == 0.5
    assert summary["raw_a_rate"] == 1.0 and summary["position_consistency"] == 0.0


def test_the_coin_is_fair_consistent_and_the_same_for_a_seed_whatever_the_order_of_rows() -> None:
    rows = [make_row(f"row-{i}", "a", "b") for i in range(2000)]
    coin = controls_of(rows[:2000])["consistent coin"]
    wins = int(consistent_scores(coin).sum())
    assert abs(wins - 1000) < 4 * math.sqrt(500) and not (outcomes(coin) == "tie").any()
    assert {v.id: v for v in controls_of(rows[::-1])["consistent coin"]} == {v.id: v for v in coin}
    agree = np.mean(consistent_scores(controls_of(rows, seed=1)["consistent coin"]) == consistent_scores(coin))
    assert abs(agree - 0.5) < 4 * math.sqrt(0.25 / 2000)  # another seed, another coin


def test_the_longer_answer_wins_by_characters_and_equal_lengths_tie() -> None:
    rows = [make_row("a", "four words of it", "one"), make_row("b", "x", "yy"), make_row("c", "ab", "ba")]
    assert outcomes(controls_of(rows)["longer answer"]).tolist() == ["win", "loss", "tie"]
    assert averaged_scores(controls_of(rows)["longer answer"]).tolist() == [1.0, 0.0, 0.5]


def test_overlap_counts_distinct_words_of_the_answer_that_the_request_holds() -> None:
    prompt = "Name the RIVER, then the stone."
    rows = [
        make_row("share", "River!", "river stone lamp lamp", prompt),  # 1/1 against 2/3
        make_row("less", "lamp lamp river", "stone stone", prompt),  # 1/2 against 1/1
        make_row("equal", "river lamp lamp lamp", "stone paper", prompt),  # 1/2 each, repetition is inert
        make_row("empty", "...", "cloud", prompt),  # no word and no shared word
        make_row("part", "riverside", "the", prompt),  # whole words only
    ]
    assert averaged_scores(controls_of(rows)["overlap with the request"]).tolist() == [1.0, 0.0, 0.5, 0.5, 0.0]


def test_overlap_reads_every_message_of_the_request() -> None:
    turns = ({"role": "system", "content": "lamp"}, {"role": "user", "content": "stone"})
    row = Row("r", "Math", turns, ("lamp",), ("cloud",), "r")
    assert outcomes(controls_of([row])["overlap with the request"]).tolist() == ["win"]


def test_the_surface_classifier_learns_a_planted_word() -> None:
    rng = np.random.default_rng(1)

    def planted(id: str) -> Row:
        right, wrong = random_text(rng).split(), random_text(rng).split()
        right.insert(int(rng.integers(0, len(right))), "certainly")
        return make_row(id, " ".join(right), " ".join(wrong))

    train, test = [planted(f"t{i}") for i in range(150)], [planted(f"h{i}") for i in range(100)]
    accuracy = averaged_scores(controls_of(test, train)["surface classifier"]).mean()
    assert accuracy > 0.95
    mute = [make_row(f"m{i}", random_text(rng), random_text(rng)) for i in range(400)]
    without = averaged_scores(controls_of(mute, train)["surface classifier"]).mean()
    assert abs(without - 0.5) < 4 * math.sqrt(0.25 / 400)


def test_the_surface_classifier_learns_that_shorter_is_right() -> None:
    rng = np.random.default_rng(2)
    rows = [make_row(str(i), random_text(rng, 3, 7), random_text(rng, 9, 14)) for i in range(200)]
    controls = controls_of(rows[100:], rows[:100])
    assert consistent_scores(controls["longer answer"]).mean() < 0.1
    assert consistent_scores(controls["surface classifier"]).mean() > 0.9


def test_answer_only_controls_win_as_often_as_they_lose_on_closed_counterfactual_groups() -> None:
    rng = np.random.default_rng(3)
    train = counterfactual_groups(rng, 20) + [make_row(f"n{i}", "river " + random_text(rng), "lamp") for i in range(20)]
    test = counterfactual_groups(rng, 30)
    pairs = [(row, (0, j)) for row in test for j in range(3)]
    base = plain_verdicts(pairs)
    controls = control_verdicts(train, pairs, base, base, None, seed=0)
    for name in ("surface classifier", "longer answer"):
        for g in range(30):
            found = outcomes([v for v in controls[name] if v.group == f"g{g}"])
            assert (found == "win").sum() == (found == "loss").sum(), f"{name} reads the label off the answers of g{g}"
    assert consistent_scores(controls["overlap with the request"]).mean() > 0.6  # this one does read the request


def test_a_classifier_fitted_on_closed_groups_only_learns_nothing() -> None:
    rows = counterfactual_groups(np.random.default_rng(4), 25)
    score = surface_scorer(rows)
    assert max(abs(score(row.chosen[0])) for row in rows) < 1e-12


def test_exchanging_chosen_and_rejected_negates_the_fixed_controls_and_a_refitted_classifier() -> None:
    rng = np.random.default_rng(5)
    rows = [make_row(str(i), random_text(rng), random_text(rng), random_text(rng)) for i in range(60)]
    exchanged = [make_row(row.id, row.rejected, row.chosen, row.prompt[0]["content"]) for row in rows]
    one, other = controls_of(rows, rows), controls_of(exchanged, rows)
    refitted = controls_of(rows, exchanged)["surface classifier"]
    for name in ("longer answer", "overlap with the request", "surface classifier"):
        assert [v.first for v in one[name]] == [-v.first for v in other[name]], name
        assert [v.second for v in one[name]] == [-v.first for v in one[name]], name
    assert [v.first for v in refitted] == pytest.approx([-v.first for v in one["surface classifier"]], abs=1e-9)


def test_of_many_rows_the_surface_classifier_takes_so_many_drawn_with_the_seed(monkeypatch) -> None:
    rng = np.random.default_rng(4)
    rows = [make_row(str(i), random_text(rng), random_text(rng)) for i in range(300)]
    text = random_text(rng)
    whole = [surface_scorer(rows, seed)(text) for seed in (0, 1)]
    monkeypatch.setattr("dpo.judge.controls.SURFACE_ROWS", 200)
    drawn = [surface_scorer(rows, seed)(text) for seed in (0, 1, 0)]
    assert whole[0] == whole[1] and drawn[0] == drawn[2] and len({whole[0], *drawn}) == 3


def test_surface_features_are_unit_length_tf_idf_in_the_column_of_their_word() -> None:
    features = _surface_features(["lamp river", "lamp cloud", "river lamp"], words=2)
    columns, values = features("river lamp river cloud")
    dense_W = np.zeros(2 + 3)  # lamp, river (by number of answers; "cloud" is past the two words), the three lengths
    dense_W[columns] = values
    lamp, river = 1.0 + math.log(4 / 4), (1 + math.log(2)) * (1 + math.log(4 / 3))
    assert dense_W[:2] == pytest.approx(np.array([lamp, river]) / math.hypot(lamp, river), rel=1e-14)
    assert len(columns) == len(set(columns)) == 5


def test_the_logistic_fit_reaches_the_optimum_and_ignores_an_unseen_word() -> None:
    rng = np.random.default_rng(6)
    answers = [random_text(rng) for _ in range(80)]
    label_S = (rng.random(80) < [0.8 if "river" in answer else 0.3 for answer in answers]).astype(float)
    weight_S = rng.choice([1.0, 1 / 3], size=80)
    sparse = [_surface_features(answers, 2000)(answer) for answer in answers]
    answer_E = np.repeat(np.arange(80), [len(columns) for columns, _ in sparse])
    column_E, value_E = (np.concatenate(parts) for parts in zip(*sparse, strict=True))
    n_features = column_E.max() + 1
    dense_SW = np.zeros((80, n_features))
    dense_SW[answer_E, column_E] = value_E
    theta_W = _logistic_fit(answer_E, column_E, value_E, label_S, weight_S, l2=0.0125, steps=300)
    # Newton's method on the dense problem, as an oracle.
    full_SW, oracle_W = np.hstack([dense_SW, np.ones((80, 1))]), np.zeros(n_features + 1)
    ridge_W = np.append(np.full(n_features, 0.0125), 0.0)
    for _ in range(30):
        p_S = 1 / (1 + np.exp(-full_SW @ oracle_W))
        gradient_W = full_SW.T @ (weight_S * (p_S - label_S)) / weight_S.sum() + ridge_W * oracle_W
        hessian_WW = (full_SW * (weight_S * p_S * (1 - p_S) / weight_S.sum())[:, None]).T @ full_SW + np.diag(ridge_W)
        oracle_W -= np.linalg.solve(hessian_WW, gradient_W)
    assert np.abs(gradient_W).max() < 1e-12 < 0.1 < np.abs(oracle_W).max()
    assert np.abs(theta_W - oracle_W[:-1]).max() < 1e-3 * np.abs(oracle_W).max()
    score = surface_scorer([make_row("a", "river", "lamp")])
    assert score("river unseen") != score("river") and np.isfinite([score(text) for text in ("", "??", "unseen")]).all()


def test_the_surface_classifier_fits_five_thousand_answers_in_seconds() -> None:
    rng = np.random.default_rng(7)
    vocabulary = [f"w{i}" for i in range(4000)]
    texts = [" ".join(rng.choice(vocabulary, size=80)) for _ in range(5000)]
    rows = [make_row(str(i), texts[2 * i], texts[2 * i + 1]) for i in range(2500)]
    start = time.process_time()
    first = list(map(surface_scorer(rows), texts[:50]))
    assert time.process_time() - start < 5 and np.std(first) > 0
    assert list(map(surface_scorer(rows[:200]), texts[:50])) == list(map(surface_scorer(rows[:200]), texts[:50]))


def test_the_calibrated_base_moves_the_consistent_reading_and_never_the_averaged() -> None:
    rng = np.random.default_rng(8)
    rows = [make_row(str(i), "a", "b") for i in range(200)]
    pairs = first_pairs(rows)
    skill, noise = rng.normal(0.3, 0.5, size=200), rng.normal(0, 0.05, size=200)
    base = [
        Verdict(row.id, "Math", row.group, pair, 3 + noise[i] + skill[i], 3 + noise[i] - skill[i])
        for i, (row, pair) in enumerate(pairs)
    ]
    validation = [*base[:50], Verdict("broken", "Math", "broken", (0, 0), math.nan, 9.0)]
    calibrated = control_verdicts(rows, pairs, base, validation, None, 0)["calibrated base"]
    assert consistent_scores(base).sum() == 0 and consistent_scores(calibrated).mean() > 0.5
    assert (averaged_scores(calibrated) == averaged_scores(base)).all()
    bias = np.mean([(v.first + v.second) / 2 for v in base[:50]])
    assert calibrated[7].first == pytest.approx(base[7].first - bias, abs=1e-12)


def judge_of(rights: int, n: int, per_group: int = 1) -> list[Verdict]:
    return [
        Verdict(f"r{i}", "Math", f"g{i // per_group}", (0, 0), *((1.0, -1.0) if i < rights else (-1.0, 1.0)))
        for i in range(n)
    ]


def test_a_judge_that_beats_each_control_is_said_to_and_one_that_does_not_names_them() -> None:
    controls = {"low": judge_of(100, 320), "middle": judge_of(160, 320), "near": judge_of(245, 320)}
    assert conclude(judge_of(300, 320), controls, seed=0)["conclusion"] == "better than all controls"
    found = conclude(judge_of(250, 320), controls, seed=0)
    assert found["conclusion"] == "not better than near" and list(found["controls"]) == list(controls)
    assert conclude(judge_of(120, 320), controls, seed=0)["conclusion"] == "not better than middle, near"
    near = found["controls"]["near"]
    assert near["averaged_accuracy"] == near["accuracy"] == 245 / 320
    assert near["averaged"]["difference"] == 5 / 320 and near["averaged"]["p"] == 2 / 2**5
    json.dumps(found, allow_nan=False)


def test_a_judge_far_below_a_control_is_not_better_however_small_p_is() -> None:
    found = conclude(judge_of(20, 320), {"control": judge_of(300, 320)}, seed=0)
    assert found["controls"]["control"]["averaged"]["p"] < 1e-3
    assert found["conclusion"] == "not better than control"


def test_the_larger_p_decides_so_four_copies_are_one_witness() -> None:
    controls = {"control": judge_of(160, 320)}
    assert conclude(judge_of(180, 320), controls, seed=0)["conclusion"] == "better than all controls"
    clustered = {"control": judge_of(160, 320, per_group=4)}
    found = conclude(judge_of(180, 320, per_group=4), clustered, seed=0)
    test = found["controls"]["control"]["averaged"]
    assert test["p"] == 2 / 2**20 and test["p_holm"] == test["p_clustered"] == 2 / 2**5  # 20 rows, 5 groups
    assert found["conclusion"] == "not better than control"


def test_holm_runs_over_the_controls_and_alpha_can_be_chosen() -> None:
    trained = judge_of(172, 320)
    one = {"a": judge_of(160, 320)}  # 12 to 0: p = 2 / 2**12 = 4.9e-4
    three = {**one, "b": judge_of(160, 320), "c": judge_of(160, 320)}
    assert conclude(trained, one, seed=0)["conclusion"] == "better than all controls"
    found = conclude(trained, three, seed=0)
    assert found["conclusion"] == "not better than a, b, c"
    assert found["controls"]["a"]["averaged"]["p_holm"] == 3 * 2 / 2**12
    assert conclude(trained, three, seed=0, alpha=0.01)["conclusion"] == "better than all controls"
