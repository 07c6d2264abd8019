"""How far a judge's probabilities can be trusted, and how far two judges agree. Numpy only, every function pure.

Letters: R judged pairs (with a verdict), L classes. `chosen_R` is the probability that the judge gives the chosen
answer (a share, the sigmoid of the order-averaged log-odds); it prefers what it gives more than one half, and is as
confident as that. An exact half prefers nothing and scores 1/2. Read next: dpo/judge/controls.py.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _confidence(chosen_R: Floats) -> tuple[Floats, Floats]:
    """(confidence_R, score_R): the preferred answer's probability, and 1, 1/2 or 0 for whether it is the chosen one."""
    return np.maximum(chosen_R, 1 - chosen_R), (1 + np.sign(chosen_R - 0.5)) / 2


def brier(chosen_R: Floats) -> float:
    """Mean squared error of the probabilities (Brier 1950): 1/4 for a judge that always says one half."""
    return float(np.mean((1 - chosen_R) ** 2))


def expected_calibration_error(chosen_R: Floats, bins: int = 10) -> float:
    """sum_bins n / R |accuracy - mean confidence| (Naeini 2015), `bins` of one width from one half to 1."""
    confidence_R, score_R = _confidence(chosen_R)
    bin_R = np.minimum(((confidence_R - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = np.bincount(bin_R, score_R - confidence_R)
    return float(np.abs(gap).sum() / len(chosen_R))


def selective_accuracy(chosen_R: Floats) -> Floats:
    """Accuracy of the judge's surest k verdicts, for k = 1 .. R: 1 - risk over coverage k / R.

    Among equally sure ones each counts with their mean score: their order says nothing.
    """
    confidence_R, score_R = _confidence(chosen_R)
    _, level_R = np.unique(-confidence_R, return_inverse=True)
    mean = np.bincount(level_R, score_R) / np.bincount(level_R)
    return np.cumsum(mean[np.sort(level_R)]) / np.arange(1, len(chosen_R) + 1)


def cohens_kappa(counts_LL: Floats) -> float:
    """(p_o - p_e) / (1 - p_e) (Cohen 1960) of a table of counts, one judge's classes by another's; NaN at p_e = 1."""
    share_LL = counts_LL / counts_LL.sum()
    by_chance = float(share_LL.sum(axis=0) @ share_LL.sum(axis=1))
    return (float(np.trace(share_LL)) - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")
