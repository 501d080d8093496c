"""Confidence intervals of shares."""

from __future__ import annotations

import math


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval for the mean of `count` observations between 0 and 1.

    It is conservative: outcomes between 0 and 1 have at most the variance of binary ones with the same mean.

    Source: Wilson 1927.
    """
    z2 = 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)
