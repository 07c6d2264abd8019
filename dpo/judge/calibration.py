"""How far a judge's probabilities can be trusted, and how far two judges agree. Numpy only, every function pure.

Letters: R judged pairs (with a verdict), L classes, G groups, K kinds of group, F resamples. `chosen_R` is the
probability that the judge gives the chosen answer (a share, the sigmoid of the order-averaged log-odds); it prefers
what it gives more than one half, and is as confident as that. An exact half prefers nothing and scores 1/2.
Read next: dpo/judge/controls.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_CLUSTERS = 100  # for a bootstrap of whole groups: it is too narrow on fewer
PLACES = {"win": 0, "loss": 1, "tie": 2, "invalid": 3}  # of an outcome among the classes of an agreement


def confidence(chosen_R: Floats) -> tuple[Floats, Floats]:
    """(confidence_R, score_R): the preferred answer's probability, and 1, 1/2 or 0 for whether it is the chosen one."""
    return np.maximum(chosen_R, 1 - chosen_R), (1 + np.sign(chosen_R - 0.5)) / 2


def brier(chosen_R: Floats) -> float:
    """Mean squared error of the probabilities (Brier 1950): 1/4 for a judge that always says one half."""
    return float(np.mean((1 - chosen_R) ** 2))


def expected_calibration_error(chosen_R: Floats, bins: int = 10) -> float:
    """sum_bins n / R |accuracy - mean confidence| (Naeini 2015), `bins` of one width from one half to 1."""
    confidence_R, score_R = confidence(chosen_R)
    bin_R = np.minimum(((confidence_R - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = np.bincount(bin_R, score_R - confidence_R)
    return float(np.abs(gap).sum() / len(chosen_R))


def selective_accuracy(chosen_R: Floats) -> Floats:
    """Accuracy of the judge's surest k verdicts, for k = 1 .. R: 1 - risk over coverage k / R.

    Among equally sure ones each counts with their mean score: their order says nothing.
    """
    confidence_R, score_R = confidence(chosen_R)
    _, level_R = np.unique(-confidence_R, return_inverse=True)
    mean = np.bincount(level_R, score_R) / np.bincount(level_R)
    return np.cumsum(mean[np.sort(level_R)]) / np.arange(1, len(chosen_R) + 1)


def cohens_kappa(counts_LL: Floats) -> Floats:
    """(p_o - p_e) / (1 - p_e) (Cohen 1960) of a table of counts, one judge's classes by another's; NaN at p_e = 1.

    Of tables [..., L, L] one each.
    """
    share_LL = counts_LL / counts_LL.sum(axis=(-2, -1), keepdims=True)
    by_chance = (share_LL.sum(axis=-2) * share_LL.sum(axis=-1)).sum(axis=-1)
    beyond = np.where(by_chance < 1, 1 - by_chance, np.nan)
    return np.asarray((np.trace(share_LL, axis1=-2, axis2=-1) - by_chance) / beyond)


def _agreement_tables(
    outcome_a_R: NDArray[np.str_], outcome_b_R: NDArray[np.str_], groups: Sequence[str] | NDArray[np.str_]
) -> Floats:
    """[G, L, L]: each group's pairs by judge a's class and judge b's; a pair counts twice (agreement)."""
    a_R, b_R = (np.array([PLACES[outcome] for outcome in one_R.tolist()]) for one_R in (outcome_a_R, outcome_b_R))
    names, group_R = np.unique(groups, return_inverse=True)
    counts_GLL = np.bincount(group_R * 16 + a_R * 4 + b_R, minlength=16 * len(names)).reshape(-1, 4, 4)
    exchanged = [1, 0, 2, 3]
    return (counts_GLL + counts_GLL[:, exchanged][:, :, exchanged]).astype(np.float64)


def agreement(outcome_a_R: NDArray[np.str_], outcome_b_R: NDArray[np.str_]) -> float | None:
    """Cohen's kappa of two judges' `outcomes`, a tie and an invalid verdict classes of their own; None if undefined.

    A pair counts twice, with the chosen answer named A and named B, so that chance knows as little as the judges do
    which answer is the chosen one: against the label (all "win") a coin has 0, and so has a judge that only ties.
    """
    kappa = float(cohens_kappa(_agreement_tables(outcome_a_R, outcome_b_R, np.full(len(outcome_a_R), ""))[0]))
    return None if math.isnan(kappa) else kappa


def agreement_interval(
    outcome_a_R: NDArray[np.str_], outcome_b_R: NDArray[np.str_], groups: Sequence[str], seed: int, samples: int = 2_000
) -> list[float] | None:
    """95 % percentile interval of `agreement` over whole groups; None without it, or below LEAST_CLUSTERS groups.

    Two more groups are drawn from, one pair on which they agree and one on which they do not (as in paired_interval):
    where all agree, or only tie, the interval has a width. Groups of equal tables are drawn together, by their number.
    """
    if len(set(groups)) < LEAST_CLUSTERS or agreement(outcome_a_R, outcome_b_R) is None:
        return None
    more_GLL = np.zeros((2, 4, 4))
    more_GLL[0, [0, 1], [0, 1]] = more_GLL[1, [0, 1], [1, 0]] = 1
    counts_GLL = np.concatenate([_agreement_tables(outcome_a_R, outcome_b_R, groups), more_GLL])
    kinds_KLL, n_K = np.unique(counts_GLL, axis=0, return_counts=True)
    drawn_FK = np.random.default_rng(seed).multinomial(len(counts_GLL), n_K / len(counts_GLL), size=samples)
    # A draw of one class alone has no kappa, and is left out.
    low, high = np.nanquantile(cohens_kappa(np.tensordot(drawn_FK, kinds_KLL, axes=1)), [0.025, 0.975])
    return [float(low), float(high)]
