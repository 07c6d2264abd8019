"""Judges that have learnt nothing about judging, on the same pairs: what a trained judge must beat to count.

Letters: R judged pairs, S answers (of the surface classifier), E non-zero entries of its sparse features, W features.
A control gives Verdicts like any judge, so intervals, tests and tables are the same code. One that prefers an answer
by a score says score(chosen) - score(rejected) in the first order, its negative in the second: no flips; equal = tie.
Read next: dpo/judge/statistics.py.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from dpo.judge.calibration import Floats
from dpo.judge.statistics import PairedTest, Verdict, averaged_scores, compare, consistent_scores, holm, log_odds
from dpo.rows import Row, normalise, prompt_key

Pair = tuple[Row, tuple[int, int]]
Ints = NDArray[np.int64]
CONTROLS = (
    "always A",
    "consistent coin",
    "longer answer",
    "overlap with the request",
    "surface classifier",
    "calibrated base",
    "blind",
)
SURFACE_ROWS = 10_000  # that the surface classifier is fitted on at most: its memory and time do not grow beyond


class Control(TypedDict):
    """One control's accuracies, and the trained judge (a) against it (b)."""

    accuracy: float
    averaged_accuracy: float
    averaged: PairedTest
    consistent: PairedTest


class Conclusion(TypedDict):
    """`judge.controls` and `judge.conclusion` of results.json, with the rule that was applied."""

    controls: dict[str, Control]
    conclusion: str
    alpha: float
    correction: str


def control_verdicts(
    train_rows: Sequence[Row],
    test_pairs: Sequence[Pair],
    base: Sequence[Verdict],
    base_validation: Sequence[Verdict],
    blind: Sequence[Verdict] | None,
    seed: int,
) -> dict[str, list[Verdict]]:
    """Every control's verdicts on the test pairs, by name. None reads a test label.

    `base`: the untrained judge's, on the test and on the validation pairs; `blind`: the trained judge's without the
    request. Left out: "blind" where it is None, "calibrated base" without a valid validation verdict.
    """
    coin = [random.Random(f"{seed} {row.id} {pair}").choice((1.0, -1.0)) for row, pair in test_pairs]
    surface = surface_scorer(train_rows, seed)
    controls = {
        # Consistent 0, order-averaged exactly one half.
        "always A": [Verdict(row.id, row.subset, row.group, pair, 1.0, 1.0) for row, pair in test_pairs],
        # About 50 % on both readings, and no skill.
        "consistent coin": preferring(test_pairs, coin),
        "longer answer": _by_score(test_pairs, lambda row, answer: float(len(answer))),
        "overlap with the request": _by_score(test_pairs, _overlap),
        "surface classifier": _by_score(test_pairs, lambda row, answer: surface(answer)),
    }
    bias_R = sum(log_odds(base_validation)) / 2
    if not np.isnan(bias_R).all():
        # What training gained beyond a constant: consistent accuracy can change, order-averaged cannot.
        bias = float(np.nanmean(bias_R))
        controls["calibrated base"] = [replace(v, first=v.first - bias, second=v.second - bias) for v in base]
    if blind is not None:
        controls["blind"] = list(blind)
    return controls


def preferring(pairs: Sequence[Pair], leads: Sequence[float]) -> list[Verdict]:
    """Verdicts of a judge that ignores the place: by how much it prefers each pair's chosen answer."""
    given = zip(pairs, leads, strict=True)
    return [Verdict(row.id, row.subset, row.group, pair, lead, -lead) for (row, pair), lead in given]


def _by_score(pairs: Sequence[Pair], score: Callable[[Row, str], float]) -> list[Verdict]:
    return preferring(pairs, [score(row, row.chosen[i]) - score(row, row.rejected[j]) for row, (i, j) in pairs])


def _overlap(row: Row, answer: str) -> float:
    """Share of the answer's distinct words that occur in the request (all its messages)."""
    words, request = set(normalise(answer).split()), set(prompt_key(row.prompt).split())
    return len(words & request) / len(words) if words else 0.0


# ---- the surface classifier: is the label written on the answer itself?


def _tokens(text: str) -> list[str]:
    """Words and single punctuation marks, lower case: list markers and emphasis are surface too."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _lengths(answer: str) -> list[float]:
    return [np.log1p(len(answer)), np.log1p(len(answer.split())), np.log1p(answer.count("\n"))]


def _surface_features(answers: Sequence[str], words: int) -> Callable[[str], tuple[list[int], list[float]]]:
    """Fits on `answers` what gives an answer's sparse features, (columns, values).

    (1 + log count) * idf of the `words` most frequent words (by number of answers, ties by spelling), of unit length;
    then the standardised lengths.
    """
    answers_with = Counter(token for answer in answers for token in set(_tokens(answer)))
    kept = sorted(answers_with, key=lambda token: (-answers_with[token], token))[:words]
    column = {token: index for index, token in enumerate(kept)}
    idf_W = np.array([1 + np.log((1 + len(answers)) / (1 + answers_with[token])) for token in kept])
    length_SW = np.array([_lengths(answer) for answer in answers])
    mean, scale = length_SW.mean(axis=0), length_SW.std(axis=0)
    scale[scale == 0] = 1.0

    def features(answer: str) -> tuple[list[int], list[float]]:
        counts = Counter(column[token] for token in _tokens(answer) if token in column)
        weights = np.array([(1 + np.log(count)) * idf_W[index] for index, count in counts.items()])
        norm = float(np.sqrt((weights**2).sum())) or 1.0
        lengths = (np.array(_lengths(answer)) - mean) / scale
        return [*counts, *range(len(kept), len(kept) + len(lengths))], [*(weights / norm), *lengths]

    return features


def _logistic_fit(
    answer_E: Ints, column_E: Ints, value_E: Floats, label_S: Floats, weight_S: Floats, l2: float, steps: int
) -> Floats:
    """Weights of an L2-regularised logistic regression with a free intercept (which a comparison of answers drops).

    Full-batch gradient descent with Nesterov's momentum for a strongly convex loss. The step is 1/L with
    L = trace(X' diag(w) X) / 4 + l2, never below the largest curvature: no line search, and the same result each time.
    """
    n_features = int(column_E.max()) + 1
    total = float(weight_S.sum())
    curvature = float((weight_S[answer_E] * value_E**2).sum() / total + 1) / 4 + l2  # + 1 is the intercept's
    momentum = (1 - np.sqrt(l2 / curvature)) / (1 + np.sqrt(l2 / curvature))
    theta_W = ahead_W = np.zeros(n_features + 1)
    for _ in range(steps):
        logit_S = np.bincount(answer_E, value_E * ahead_W[column_E], minlength=len(label_S)) + ahead_W[-1]
        residual_S = weight_S * (0.5 * (1 + np.tanh(logit_S / 2)) - label_S) / total
        pull_W = np.bincount(column_E, value_E * residual_S[answer_E], minlength=n_features + 1)
        gradient_W = pull_W + l2 * ahead_W
        gradient_W[-1] = residual_S.sum()
        previous_W, theta_W = theta_W, ahead_W - gradient_W / curvature
        ahead_W = theta_W + momentum * (theta_W - previous_W)
    return theta_W[:-1]


def surface_scorer(rows: Sequence[Row], seed: int = 0, words: int = 2_000, steps: int = 300) -> Callable[[str], float]:
    """Fits "right or wrong, from the answer alone" on the answers of `rows`; gives answer -> logit (no intercept).

    Of more than SURFACE_ROWS rows it takes so many, drawn with the seed. A row weighs the same whatever its number of
    answers, half on its chosen and half on its rejected ones. L2 is 1/S, at least 1e-3 (of the mean loss).
    """
    places = sorted(random.Random(f"surface {seed}").sample(range(len(rows)), min(len(rows), SURFACE_ROWS)))
    drawn = (rows[place] for place in places)
    sides = [(side, label) for row in drawn for side, label in ((row.chosen, 1.0), (row.rejected, 0.0))]
    answers = [answer for side, _ in sides for answer in side]
    label_S = np.array([label for side, label in sides for _ in side])
    weight_S = np.array([1 / len(side) for side, _ in sides for _ in side])
    features = _surface_features(answers, words)
    sparse = [features(answer) for answer in answers]
    answer_E = np.repeat(np.arange(len(answers)), [len(columns) for columns, _ in sparse])
    column_E, value_E = (np.concatenate(parts) for parts in zip(*sparse, strict=True))
    theta_W = _logistic_fit(answer_E, column_E, value_E, label_S, weight_S, max(1e-3, 1 / len(answers)), steps)

    def score(answer: str) -> float:
        columns, values = features(answer)
        return float(theta_W[columns] @ values)

    return score


# ---- what may be said


def conclude(
    trained: Sequence[Verdict], controls: Mapping[str, Sequence[Verdict]], seed: int, alpha: float = 1e-3
) -> Conclusion:
    """The trained judge against each control, and the sentence: "better than all controls" or "not better than X, Y".

    Better = higher order-averaged accuracy and p_holm < alpha. Holm's correction runs over the controls' averaged
    tests, each with the larger of p and p_clustered; one in the wrong direction enters as 1.
    """
    entries = {}
    for name, verdicts in controls.items():
        compared = compare(trained, verdicts, seed)
        entries[name] = Control(
            accuracy=float(consistent_scores(verdicts).mean()),
            averaged_accuracy=float(averaged_scores(verdicts).mean()),
            averaged=compared["averaged"],
            consistent=compared["consistent"],
        )
    tests = [entry["averaged"] for entry in entries.values()]
    p_values = [max(test["p"], test["p_clustered"]) if test["difference"] > 0 else 1.0 for test in tests]
    for test, p_holm in zip(tests, holm(p_values), strict=True):
        test["p_holm"] = p_holm
    unbeaten = [name for name, entry in entries.items() if entry["averaged"]["p_holm"] >= alpha]
    return Conclusion(
        controls=entries,
        conclusion=f"not better than {', '.join(unbeaten)}" if unbeaten else "better than all controls",
        alpha=alpha,
        correction=f"Holm over {len(entries)} controls, on the larger of the exact and the clustered p",
    )
