"""Confidence intervals of shares and means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # type: ignore[import-untyped]

Z = 1.959964
"""97.5% point of the standard normal distribution."""
RESAMPLES = 2000
_MOST_DRAWN = 2**21  # counts held at a time: 16 MiB

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval for the mean of `count` observations between 0 and 1.

    It is conservative: outcomes between 0 and 1 have at most the variance of binary ones with the same mean.

    Source: Wilson 1927.
    """
    z2 = Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def resample_counts(units: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """Yield how often each unit is drawn in bootstrap resamples, [part of the resamples, units], in bounded memory.

    A statistic of a resample is that of the data with these counts as weights.
    """
    draws, at_once = np.random.default_rng(seed), max(1, _MOST_DRAWN // units)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        yield draws.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)


def percentile_interval(statistics: Floats) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of the statistic of each resample; infinite values are at the ends.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    ordered = np.sort(statistics)
    # Quantiles that are among the values: an interpolation between a number and infinity would be infinite.
    low, high = math.floor(0.025 * (len(ordered) - 1)), math.ceil(0.975 * (len(ordered) - 1))
    return float(ordered[low]), float(ordered[high])


def bootstrap_mean(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """95% bootstrap intervals of means: percentiles over resamples of the N units.

    The values of a unit are drawn together. For a difference between two models give the differences per prompt: the
    interval is then a paired one, without the variance that the prompts have in common.

    Args:
      values: one row per statistic, [..., N].
      resamples: number of resamples.
      seed: of the resamples.

    Returns:
      Low and high ends, [2, ...].

    Source: Efron and Tibshirani 1993, chapter 13; Koehn 2004 for paired comparisons of systems.
    """
    values = np.asarray(values, np.float64)
    parts = resample_counts(values.shape[-1], resamples=resamples, seed=seed)
    means = np.concatenate([counts @ values.reshape(-1, values.shape[-1]).T for counts in parts]) / values.shape[-1]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return np.stack([low, high]).reshape(2, *values.shape[:-1])


def mean_estimate(values: Floats, *, seed: int = 0) -> Estimate:
    """Mean of N units with its bootstrap interval."""
    low, high = bootstrap_mean(values, seed=seed)
    return Estimate(float(np.mean(values)), float(low), float(high))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with its 95% interval, mean ± t s / √n; a bootstrap of so few units would be too narrow.

    One seed has no interval: its ends are NaN. So is a mean of values of which one is NaN.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)
