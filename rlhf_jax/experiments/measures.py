"""Measures of experiments: intervals over seeds, calibration of probabilities, and how well a score separates."""

from __future__ import annotations

import math

import numpy as np

from rlhf_jax.evaluation.intervals import Floats


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
