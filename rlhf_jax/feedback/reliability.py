"""Labeller reliability, estimated jointly with the preferences, without gold answers.

Rankings: a labeller with precision β = 1/τ ranks responses with scores s by Plackett-Luce with utilities β s, so pairs
follow Bradley-Terry: P(a before b) = σ(β (s_a - s_b)). Scores are N(0, 1) a priori and integrated out: with few
labellers per item, point estimates of the scores would overestimate every labeller's precision. Flags: the model of
Dawid and Skene. Intervals come from the curvature of the marginal posterior at its maximum.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, logsumexp, ndtri  # type: ignore[import-untyped]
from scipy.stats import qmc  # type: ignore[import-untyped]

from rlhf_jax.feedback.agreement import Table
from rlhf_jax.feedback.judged import Judged

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_UNIT = 1.2  # β at which label noise is about as wide as the scores: 1.70 / √2 (logistic for normal)
_STEEPEST = 1.55  # maximum angle; π/2 would be noiseless, which no number of judgements can show
POINTS = 256  # quadrature points of the integral over an item's scores; Sobol points require a power of two
_WIDEN = 1.15  # scale of the points' spread, since the Laplace approximation has too short tails
_PART = 2**7  # items whose points are in memory at a time
_Z = 1.959964


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Estimated reliability of a labeller.

    Attributes:
      precision: β; 0 for guessing, negative for reversed preferences.
      right: share of random pairs that a labeller of this precision orders as the scores do.
      judgements: number of judgements that the estimate is based on.
    """

    precision: Interval
    right: Interval
    judgements: int


@dataclasses.dataclass(frozen=True)
class Estimated:
    """Labellers' reliabilities and responses' scores.

    Attributes:
      labellers: reliability by name.
      scores: posterior (mean, standard deviation) of each response's score, by the item's id.
    """

    labellers: dict[str, Reliability]
    scores: dict[str, tuple[Floats, Floats]]


def estimate(judged: Judged, *, points: int = POINTS) -> Estimated:
    """Estimate labellers' precisions with all scores integrated out, and the scores given these precisions.

    β = 1.2 tan θ, and the maximum of the posterior over θ is taken under the prior cos θ (for β, Student's t with two
    degrees of freedom): agreement is nearly linear in θ, while β is unbounded for precise labellers. The sign of all β
    is not identified by the judgements alone; labellers are assumed to be right more often than wrong.

    The integral over an item's scores is an adaptive quadrature, with points spread as the posterior of the scores.
    Equal ranks carry no information about each other: each is chosen before all responses that are ranked lower.

    Args:
      judged: items and judgements.
      points: quadrature points per item, a power of two.

    Source: Bock and Aitkin 1981, Marginal maximum likelihood estimation of item parameters; Chen et al. 2013, Pairwise
      ranking aggregation in a crowdsourced setting, for one precision per labeller.
    """
    rankings = _Rankings.of(judged)
    if not len(rankings.item):
        return Estimated({}, {})
    angle = np.full(len(rankings.labellers), np.pi / 4)
    modes = np.zeros((len(rankings.ids), rankings.first.shape[1]))
    base = ndtri(qmc.Sobol(modes.shape[1], seed=0).random(points))
    for _ in range(30):
        modes, roots = _modes(rankings, _UNIT * np.tan(angle), modes)
        before = angle
        # With fixed points the posterior is smooth in θ: take two Newton steps, then move the points.
        for _ in range(2):
            tangent, secant = np.tan(angle), 1 / np.cos(angle) ** 2
            gradient, curvature = _derivatives(rankings, _UNIT * tangent, modes, roots, base)
            bend = 2 * _UNIT * secant * tangent
            curvature = np.outer(_UNIT * secant, _UNIT * secant) * curvature + np.diag(secant - gradient * bend)
            gradient = _UNIT * secant * gradient - tangent
            step = np.linalg.solve(_positive(curvature), gradient)
            angle = np.clip(angle + step * min(1.0, 0.3 / np.max(np.abs(step))), -_STEEPEST, _STEEPEST)
        if np.max(np.abs(angle - before)) < 1e-4:  # a hundredth of a standard error with thousands of judgements
            break
    precision = _UNIT * np.tan(angle)
    deviation = np.sqrt(np.diag(np.linalg.inv(_positive(curvature))))
    low, high = (_UNIT * np.tan(np.clip(angle + z * deviation, -_STEEPEST, _STEEPEST)) for z in (-_Z, _Z))
    counts = np.bincount(rankings.labeller, minlength=len(precision))
    found = {}
    for place, name in enumerate(rankings.labellers):
        own = [float(beta[place]) for beta in (precision, low, high)]
        found[name] = Reliability(Interval(*own), Interval(*map(share_right, own)), int(counts[place]))
    return Estimated(found, _scores(rankings, precision, modes, roots, base))


def share_right(precision: float) -> float:
    """Share of random pairs that are ordered as their scores: E σ(β |d|), with d ~ N(0, 2) the difference of scores."""
    gap = np.sqrt(2.0) * ndtri((np.arange(1000) + 0.5) / 1000)
    return float(np.mean(expit(precision * np.abs(gap))))


@dataclasses.dataclass(frozen=True)
class _Rankings:
    """J rankings of I items, each as up to K Plackett-Luce choices; choice k picks response k.

    Attributes:
      ids: of the items.
      labellers: names.
      sizes: number of responses of each item, [I].
      item: index of each ranking's item, [J].
      labeller: index of each ranking's labeller, [J].
      first: True if choice k is made, [J, K].
      among: responses that choice k is made among, [J, K, K].
    """

    ids: tuple[str, ...]
    labellers: tuple[str, ...]
    sizes: Ints
    item: Ints
    labeller: Ints
    first: NDArray[np.bool_]
    among: NDArray[np.bool_]

    @classmethod
    def of(cls, judged: Judged) -> _Rankings:
        kept = [(item, judgement) for item, judgement in judged.judgements if judgement.ranks]
        sizes = {item.id: len(item.responses) for item, _ in kept}
        ids, names = tuple(sizes), tuple(sorted({judgement.labeller for _, judgement in kept}))
        item_at, name_at = ({key: place for place, key in enumerate(keys)} for keys in (ids, names))
        most = max(sizes.values(), default=0)
        ranks = np.zeros((len(kept), most))
        for row, (_, judgement) in enumerate(kept):
            ranks[row, : len(judgement.ranks)] = judgement.ranks
        real = ranks > 0
        lower = (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None]
        return cls(
            ids,
            names,
            np.array(list(sizes.values()), np.int64),
            np.array([item_at[item.id] for item, _ in kept], np.int64),
            np.array([name_at[judgement.labeller] for _, judgement in kept], np.int64),
            np.asarray(lower.any(axis=2)),
            lower | (np.eye(most, dtype=bool) & real[:, :, None]),
        )

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """(items, their rankings) in parts; rankings are sorted by item."""
        ends = np.searchsorted(self.item, np.arange(0, len(self.ids) + _PART, _PART))
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            yield slice(number * _PART, (number + 1) * _PART), slice(int(start), int(end))


def _choices(rankings: _Rankings, rows: slice, utility: Floats) -> tuple[Floats, Floats]:
    """(log-probability [J, …], choice probabilities [J, …, K, K]) of some rankings, from utilities [J, …, K]."""
    extra = (1,) * (utility.ndim - 2)
    first = rankings.first[rows].reshape(-1, *extra, utility.shape[-1])
    among = rankings.among[rows].reshape(-1, *extra, *rankings.among.shape[1:])
    masked = np.where(among, utility[..., None, :], -np.inf)
    # Choices that are not made get finite utilities, so that nothing below is undefined.
    masked = np.where(among.any(axis=-1, keepdims=True), masked, 0.0)
    total = logsumexp(masked, axis=-1)
    logp = np.sum(np.where(first, utility - total, 0.0), axis=-1)
    return logp, np.where(first[..., None], np.exp(masked - total[..., None]), 0.0)


def _modes(rankings: _Rankings, precision: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """Posterior mode [I, K] of each item's scores given β, and the Cholesky factor [I, K, K] of their covariance."""
    beta = precision[rankings.labeller]
    eye = np.eye(scores.shape[1])
    everything = slice(None)
    for _ in range(100):
        _, shares = _choices(rankings, everything, beta[:, None] * scores[rankings.item])
        slope = beta[:, None] * (rankings.first - shares.sum(axis=1))
        spread = np.einsum("jck,kl->jkl", shares, eye) - np.einsum("jck,jcl->jkl", shares, shares)
        gradient, hessian = -scores, np.tile(eye, (len(scores), 1, 1))
        np.add.at(gradient, rankings.item, slope)
        np.add.at(hessian, rankings.item, beta[:, None, None] ** 2 * spread)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        scores = scores + step * np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        if np.max(np.abs(step)) < 1e-8:
            break
    return scores, np.linalg.cholesky(np.linalg.inv(hessian))


def _points(modes: Floats, roots: Floats, base: Floats) -> tuple[Floats, Floats]:
    """Quadrature points [I, M, K] of each item's scores, and the log of prior over sampling density, [I, M]."""
    scores = modes[:, None, :] + _WIDEN * np.einsum("ikl,ml->imk", roots, base)
    density = -0.5 * np.sum(base**2, axis=1) - np.log(np.einsum("ikk->ik", roots)).sum(axis=1)[:, None]
    return scores, -0.5 * np.sum(scores**2, axis=2) - density


def _shares(
    rankings: _Rankings, items: slice, rows: slice, precision: Floats, points: tuple[Floats, Floats]
) -> tuple[Floats, Floats, Floats]:
    """Posterior weight of each point [I, M], and first and second derivative in β of each ranking's log p [J, M]."""
    scores, weight = points
    own = scores[rankings.item[rows] - items.start]
    logp, chosen = _choices(rankings, rows, precision[rankings.labeller[rows], None, None] * own)
    mean = np.einsum("jmck,jmk->jmc", chosen, own)
    slope = np.sum(np.where(rankings.first[rows, None], own - mean, 0.0), axis=2)
    bend = np.sum(mean**2, axis=2) - np.einsum("jmck,jmk->jm", chosen, own**2)
    total = weight.copy()
    np.add.at(total, rankings.item[rows] - items.start, logp)
    return np.exp(total - logsumexp(total, axis=1, keepdims=True)), slope, bend


def _derivatives(
    rankings: _Rankings, precision: Floats, modes: Floats, roots: Floats, base: Floats
) -> tuple[Floats, Floats]:
    """Gradient [L] and negative Hessian [L, L] in β of Σ_i log Σ_m w_im Π_j p_j(β, s_im)."""
    labellers = len(precision)
    gradient, curvature = np.zeros(labellers), np.zeros((labellers, labellers))
    for items, rows in rankings.parts():
        share, slope, bend = _shares(rankings, items, rows, precision, _points(modes[items], roots[items], base))
        item, labeller = rankings.item[rows] - items.start, rankings.labeller[rows]
        mean = np.sum(share[item] * slope, axis=1)
        np.add.at(gradient, labeller, mean)
        np.add.at(curvature, (labeller, labeller), -np.sum(share[item] * bend, axis=1))
        # Uncertainty of an item's scores reduces the information in its rankings, by the covariance of their slopes.
        for a, b in _neighbours(item):
            both = np.sum(share[item[a]] * slope[a] * slope[b], axis=1) - mean[a] * mean[b]
            np.add.at(curvature, (labeller[a], labeller[b]), -both)
    return gradient, curvature


def _neighbours(item: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Every ordered pair (a, b) of rankings of one item, including a = b, grouped by their distance."""
    for apart in range(int(np.bincount(item).max(initial=0))):
        a = np.flatnonzero(item[: len(item) - apart] == item[apart:])
        yield a, a + apart
        if apart:
            yield a + apart, a


def _scores(
    rankings: _Rankings, precision: Floats, modes: Floats, roots: Floats, base: Floats
) -> dict[str, tuple[Floats, Floats]]:
    found = {}
    for items, rows in rankings.parts():
        points = _points(modes[items], roots[items], base)
        share, _, _ = _shares(rankings, items, rows, precision, points)
        mean = np.einsum("im,imk->ik", share, points[0])
        deviation = np.sqrt(np.maximum(np.einsum("im,imk->ik", share, points[0] ** 2) - mean**2, 0.0))
        for id, size, m, d in zip(rankings.ids[items], rankings.sizes[items], mean, deviation):
            found[id] = (m[:size], d[:size])
    return found


def _positive(curvature: Floats) -> Floats:
    """The nearest positive definite matrix; far from a maximum the curvature may not be one."""
    values, vectors = np.linalg.eigh(curvature)
    return np.asarray((vectors * np.maximum(values, 1e-3)) @ vectors.T)


@dataclasses.dataclass(frozen=True)
class FlagReliability:
    """A labeller's sensitivity P(flagged | flag is true) and specificity P(not flagged | flag is false)."""

    sensitivity: Interval
    specificity: Interval


@dataclasses.dataclass(frozen=True)
class Flags:
    """Estimates for one flag.

    Attributes:
      labellers: reliability by name.
      share: share of responses for which the flag is true.
      probability: posterior probability for each response, [U], NaN where nobody was asked.
    """

    labellers: dict[str, FlagReliability]
    share: Interval
    probability: Floats


def dawid_skene(table: Table) -> Flags:
    """Estimate the true flags and each labeller's reliability by expectation maximisation.

    Labellers flag independently given the truth. Each labeller's sensitivity and specificity, and the share of true
    flags, have a Beta(2, 2) prior, which adds one success and one failure. EM starts from the share of labellers who
    flagged a response, which identifies the truth with the majority.

    Args:
      table: 1 flagged, 0 not flagged, NaN not asked (`agreement.flags`).

    Source: Dawid and Skene 1979, Maximum likelihood estimation of observer error-rates using the EM algorithm.
    """
    asked = ~np.isnan(table.values)
    some = asked.any(axis=1)
    probability = np.full(len(table.values), np.nan)
    if not some.any():
        return Flags({}, Interval(0.5, 0.0, 1.0), probability)
    asked_UL, flagged_UL = asked[some], np.nan_to_num(table.values[some])
    so_U = flagged_UL.sum(axis=1) / asked_UL.sum(axis=1)
    for _ in range(10_000):
        before = so_U
        # Posterior of the truth: column 0 the flag is false, column 1 true.
        side_UC = np.stack([1 - so_U, so_U], axis=1)
        share = (so_U.sum() + 1) / (len(so_U) + 2)
        rate_CL = (side_UC.T @ flagged_UL + 1) / (side_UC.T @ asked_UL + 2)
        said_UCL = np.where(flagged_UL[:, None] > 0, np.log(rate_CL), np.log1p(-rate_CL))
        logp_UC = np.log([1 - share, share]) + np.sum(np.where(asked_UL[:, None], said_UCL, 0.0), axis=2)
        so_U = expit(logp_UC[:, 1] - logp_UC[:, 0])
        if np.max(np.abs(so_U - before)) < 1e-10:
            break
    probability[some] = so_U
    # Curvature of the marginal posterior as for rankings, in the logits of the share and of the rates.
    side_UC = np.stack([1 - so_U, so_U], axis=1)
    surprise_UCL = np.where(asked_UL[:, None], flagged_UL[:, None] - rate_CL, 0.0)
    units, labellers = asked_UL.shape
    slope_UCP = np.zeros((units, 2, 1 + 2 * labellers))
    slope_UCP[:, :, 0] = np.array([0.0, 1.0]) - share
    for side in (0, 1):
        slope_UCP[:, side, 1 + side * labellers : 1 + (side + 1) * labellers] = surprise_UCL[:, side]
    mean_UP = np.einsum("uc,ucp->up", side_UC, slope_UCP)
    bend = np.concatenate(
        [[(units + 2) * share * (1 - share)], ((side_UC.T @ asked_UL + 2) * rate_CL * (1 - rate_CL)).ravel()]
    )
    spread = np.einsum("uc,ucp,ucq->pq", side_UC, slope_UCP, slope_UCP, optimize=True) - mean_UP.T @ mean_UP
    deviation = np.sqrt(np.diag(np.linalg.inv(_positive(np.diag(bend) - spread))))

    def interval(rate: float, place: int) -> Interval:
        low, value, high = expit(logit(rate) + deviation[place] * np.array([-_Z, 0.0, _Z]))
        return Interval(float(value), float(low), float(high))

    def turned(found: Interval) -> Interval:
        return Interval(1 - found.value, 1 - found.high, 1 - found.low)

    return Flags(
        {
            name: FlagReliability(
                sensitivity=interval(rate_CL[1, place], 1 + labellers + place),
                specificity=turned(interval(rate_CL[0, place], 1 + place)),
            )
            for place, name in enumerate(table.labellers)
        },
        interval(float(share), 0),
        probability,
    )
