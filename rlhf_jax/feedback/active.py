"""Active selection of pairs to label: pairs on which an ensemble of reward models disagrees, without near-duplicates.

The members may be reward models trained independently, or the posterior over linear heads on the frozen features of one
backbone (`Heads`). Either way a pair has a mean probability p that its first response is preferred, and deviations d
from it with covariance C = dᵀd.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_LEAST_NOISE = 1e-6


@dataclasses.dataclass(frozen=True)
class Beliefs:
    """An ensemble's predictions for N pairs.

    Attributes:
      mean: mean probability that the first response is preferred, [N].
      deviation: d, [M, N], with covariance dᵀd.
    """

    mean: Floats
    deviation: Floats

    @classmethod
    def of_members(cls, probability_MN: Floats) -> Beliefs:
        """Predictions of M members, from their probabilities [M, N]."""
        mean = probability_MN.mean(axis=0)
        return cls(mean, (probability_MN - mean) / np.sqrt(len(probability_MN)))

    @property
    def disagreement(self) -> Floats:
        """Variance of the probability of each pair, [N]."""
        return np.einsum("mn,mn->n", self.deviation, self.deviation)

    @property
    def noise(self) -> Floats:
        """Variance p (1 - p) of one person's answer if p were known, [N]."""
        return np.maximum(self.mean * (1 - self.mean), _LEAST_NOISE)

    def take(self, places: NDArray[np.int64]) -> Beliefs:
        """Predictions for a subset of the pairs."""
        return Beliefs(self.mean[places], self.deviation[:, places])


def preference_probabilities(scores_first: NDArray[np.floating], scores_second: NDArray[np.floating]) -> Floats:
    """σ(r_a - r_b), the Bradley-Terry probability that a is preferred, in float64.

    Raises:
      ValueError: if the shapes differ.
    """
    if scores_first.shape != scores_second.shape:
        raise ValueError(f"shapes differ: {scores_first.shape} and {scores_second.shape}")
    return _sigmoid(np.asarray(scores_first, np.float64) - np.asarray(scores_second, np.float64))


def choose(
    beliefs: Beliefs,
    count: int,
    *,
    targets: Beliefs | None = None,
    responses: NDArray[np.int64] | None = None,
    used: NDArray[np.int64] | None = None,
    candidates: int | None = None,
) -> NDArray[np.int64]:
    """Choose a batch of pairs to label, greedily, the most informative first.

    Without targets: the next pair n maximises v_n / (p_n (1 - p_n)), its disagreement v_n = C_nn over its label noise.
    With targets t: it maximises Σ_t C_nt² / (v_n + p_n (1 - p_n)), the reduction of their summed variance by its label;
    an outlier, which is informative about nothing else, is not chosen.
    After each choice c: C ← C - C_c C_cᵀ / (v_c + p_c (1 - p_c)), the covariance once c is labelled, so that no two
    chosen pairs carry the same information. Ties go to the first pair.

    Args:
      beliefs: predictions for N pairs.
      count: number of pairs to choose.
      targets: predictions, by the same members, for the pairs that the reward model should get right.
      responses: ids of the two responses of each pair, [N, 2]. No response is chosen twice while others are left: the
        part of a response that no member models is in all its labels, so a second label is worth less than predicted.
      used: ids of responses that were labelled before.
      candidates: consider only this many pairs, the best before the first choice; by default all.

    Returns:
      Indices of the chosen pairs, [count].

    Raises:
      ValueError: if there are fewer pairs than `count`.

    Source: MacKay 1992, Information-based objective functions for active data selection; for the targets, Cohn,
      Ghahramani and Jordan 1996, Active learning with statistical models.
    """
    if not 0 <= count <= len(beliefs.mean):
        raise ValueError(f"count: expected 0 to {len(beliefs.mean)}, the number of pairs, got {count}")
    # Σ_t (d_n · d_t)² = d_nᵀ (Σ_t d_t d_tᵀ) d_n: the targets only enter through this [M, M] sum.
    target = None if targets is None else targets.deviation @ targets.deviation.T
    places = np.arange(len(beliefs.mean))
    fresh: NDArray[np.bool_] = np.ones(len(places), bool)
    if responses is not None and used is not None:
        fresh = np.all(~np.isin(responses, used), axis=1)
    if candidates is not None and candidates < len(places):
        worth = _worth(beliefs.deviation, beliefs.noise, target)
        places = np.sort(np.lexsort((-worth, ~fresh))[: max(candidates, count)])
    beliefs, fresh, left = beliefs.take(places), fresh[places], np.ones(len(places), bool)
    deviation, noise = beliefs.deviation.copy(), beliefs.noise
    chosen = np.zeros(count, np.int64)
    for turn in range(count):
        free = left & fresh if np.any(left & fresh) else left
        best = int(np.argmax(np.where(free, _worth(deviation, noise, target), -np.inf)))
        chosen[turn], left[best] = places[best], False
        if responses is not None:
            fresh &= ~np.isin(responses[places], responses[places[best]]).any(axis=1)
        column = deviation[:, best].copy()
        v = float(column @ column)
        if v > 0:
            # Square-root form of the update: the deviations stay [M, N] and C is never formed.
            shrink = (1 - np.sqrt(noise[best] / (v + noise[best]))) / v
            deviation -= np.outer(shrink * column, column @ deviation)
            if target is not None:
                along = target @ column
                target = target - shrink * (np.outer(column, along) + np.outer(along, column))
                target += shrink**2 * float(column @ along) * np.outer(column, column)
    return chosen


def _worth(deviation: Floats, noise: Floats, target: Floats | None) -> Floats:
    variance = np.einsum("mn,mn->n", deviation, deviation)
    if target is None:
        return variance / noise
    return np.einsum("mn,mn->n", deviation, target @ deviation) / (variance + noise)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Laplace posterior over linear reward heads r(x) = w · φ(x) given comparisons: w ~ N(mean, H⁻¹).

    Attributes:
      mean: minimum of Σ_n -log σ(w · (φ_chosen - φ_rejected)) + λ/2 |w|², [D].
      root: lower Cholesky factor of the Hessian H at the minimum, [D, D].

    Source: MacKay 1992, The evidence framework applied to classification networks.
    """

    mean: Floats
    root: Floats

    @classmethod
    def fit(cls, gap_ND: NDArray[np.floating], *, precision: float, start: Floats | None = None) -> Heads:
        """Fit by Newton's method, to a gradient below 1e-8.

        Args:
          gap_ND: φ_chosen - φ_rejected of each comparison.
          precision: λ of the prior, more than 0.
          start: initial head, e.g. the mean from fewer comparisons; by default zeros.
        """
        gap = np.asarray(gap_ND, np.float64)
        head = np.zeros(gap.shape[1]) if start is None else start.copy()

        def loss(head: Floats) -> float:
            return float(np.sum(np.logaddexp(0.0, -gap @ head)) + 0.5 * precision * head @ head)

        while True:
            right = _sigmoid(gap @ head)
            gradient = precision * head - (1 - right) @ gap
            hessian = (gap * (right * (1 - right))[:, None]).T @ gap
            hessian.flat[:: len(head) + 1] += precision
            root = np.asarray(np.linalg.cholesky(hessian), np.float64)
            if np.max(np.abs(gradient), initial=0.0) < 1e-8:
                return cls(head, root)
            step = np.linalg.solve(root.T, np.linalg.solve(root, gradient))
            size, now = 1.0, loss(head)
            # The loss is convex: if only a tiny step still lowers it, the rest of the gradient is rounding error.
            while loss(head - size * step) > now and size > 1e-6:
                size /= 2
            if size <= 1e-6:
                return cls(head, root)
            head = head - size * step

    def beliefs(self, gap_ND: NDArray[np.floating]) -> Beliefs:
        """Predictions for pairs: p = σ(w · gap), d = p (1 - p) R⁻¹ gap, with R Rᵀ = H.

        To first order this is the ensemble of all heads. With 30 sampled heads, each variance would have a standard
        error of about a quarter, and the maximum over many pairs would mostly pick noise.

        Args:
          gap_ND: φ of the first response minus φ of the second.
        """
        gap = np.asarray(gap_ND, np.float64)
        mean = _sigmoid(gap @ self.mean)
        return Beliefs(mean, np.linalg.solve(self.root, gap.T) * (mean * (1 - mean)))

    def draw(self, members: int, random: np.random.Generator) -> Floats:
        """Sample heads from the posterior, [M, D]."""
        noise = random.standard_normal((len(self.mean), members))
        return self.mean + np.linalg.solve(self.root.T, noise).T


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(x / 2)))
