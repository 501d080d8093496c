"""Measures of experiments: intervals over seeds, calibration of probabilities, and how well a score separates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax.evaluation.intervals import Estimate, Floats

# 97.5% points of Student's t for 1, 2, … degrees of freedom; above, the next smaller one of these is on the safe side.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with its 95% interval, mean ± t s / √n; a bootstrap of so few units would be too narrow.

    One seed has no interval: its ends are NaN. So is a mean of values of which one is NaN.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    half = _T[min(count - 1, len(_T)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def calibration_error(probability: Floats, right: Floats, bins: int = 10) -> float:
    """Expected calibration error: Σ_b n_b / N |share right in b − mean probability in b|.

    Args:
      probability: that the answer is right, by the model, [N].
      right: 1 where it is, else 0, [N].
      bins: bins of equal width over [0, 1].

    Source: Guo et al. 2017, section 2 (arXiv:1706.04599).
    """
    place = np.minimum((probability * bins).astype(int), bins - 1)
    difference = np.bincount(place, right - probability, minlength=bins)
    return float(np.abs(difference).sum() / len(probability))


def auroc(score: Floats, positive: Floats) -> float:
    """Probability that a positive's score is above a negative's, equal scores counting half; NaN without both kinds.

    Args:
      score: [N].
      positive: True or 1 for positives, [N].
    """
    positive = np.asarray(positive, bool)
    count = int(positive.sum())
    if count in (0, len(positive)):
        return math.nan
    _, place, sizes = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2  # 1-based, the mean of equal ones
    total = float(ranks[place][positive].sum())
    return (total - count * (count + 1) / 2) / (count * (len(positive) - count))
