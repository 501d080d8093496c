"""Over-optimisation: how the gold score first rises and then falls as a policy moves away from where it started.

With d = √KL(π, π₀), the gold score less that of π₀ follows d(α − βd) for best-of-n and d(α − β log d) for RL.

Source: Gao et al. 2022, section 3 (arXiv:2210.10760).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.intervals import RESAMPLES, Estimate, Floats, percentile_interval, resample_counts

Form = Literal["best-of-n", "rl"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted curve of gold score against d = √KL.

    Attributes:
      form: "best-of-n" for d(α − βd), "rl" for d(α − β log d).
      alpha: α, in units of the score per √nat.
      beta: β.
      turn: d at which the gold score is highest; infinite if β is 0 or less, as it then does not turn.
      turned: True if the whole interval of the turn is within the measured d.
      residual: root mean square difference of the points from the curve.
      units: seeds or prompts whose resamples the 95% intervals are over.
    """

    form: Form
    alpha: Estimate
    beta: Estimate
    turn: Estimate
    turned: bool
    residual: float
    units: int

    def gold(self, d: Floats) -> Floats:
        """The curve at d."""
        x_2 = _regressors(np.asarray(d, np.float64), self.form)
        return self.alpha.value * x_2[0] + self.beta.value * x_2[1]


def _regressors(d: Floats, form: Form) -> Floats:
    """The columns of α and of β, [2, ...]; both are 0 at d = 0."""
    if form == "best-of-n":
        return np.stack([d, -(d**2)])
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))])


def turn_of(form: Form, alpha: Floats, beta: Floats) -> Floats:
    """d at which a curve is highest: α / 2β for best-of-n, exp(α / β − 1) for RL; infinite for β ≤ 0, 0 for α ≤ 0.

    For RL with α ≤ 0 it is small but not 0, as d log d falls at first.
    """
    rising = np.where(beta > 0, beta, 1.0)
    with np.errstate(over="ignore"):
        turn = np.maximum(alpha, 0.0) / (2 * rising) if form == "best-of-n" else np.exp(alpha / rising - 1)
    return np.where(beta > 0, turn, math.inf)


def fit_gold(form: Form, d: Floats, gold: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit α and β by least squares, with 95% bootstrap intervals over seeds or prompts.

    Args:
      form: "best-of-n" or "rl".
      d: √KL in √nats at each of D points, [D]; or [S, D] for units with points of their own.
      gold: mean gold score less that of the initial policy, [S, D] for S seeds or prompts, or [D] for one. NaN where a
        unit has no such point.
      resamples: bootstrap resamples of the units. With fewer than about 10 units the intervals are too narrow, with one
        they have no width.
      seed: of the resamples.

    Raises:
      UserError: for a negative d, and with fewer than two different d above 0.
    """
    gold_SD = np.atleast_2d(np.asarray(gold, np.float64))
    d_SD = np.broadcast_to(np.asarray(d, np.float64), gold_SD.shape)
    known_SD = np.isfinite(gold_SD) & np.isfinite(d_SD)
    if (d_SD[known_SD] < 0).any():
        raise UserError(f"d: expected a square root of a KL divergence, 0 or more, got {d_SD[known_SD].min():g}")
    if len(set(d_SD[known_SD & (d_SD > 0)].tolist())) < 2:
        raise UserError("d: expected two or more points with different KL above 0, for two parameters, got fewer")
    d_SD, gold_SD = np.where(known_SD, d_SD, 0.0), np.where(known_SD, gold_SD, 0.0)
    x_SD2 = np.moveaxis(_regressors(d_SD, form), 0, -1)
    # The normal equations of each unit: those of a resample are their sum, as often as each unit was drawn.
    left_S22, right_S2 = np.einsum("sdk,sdl->skl", x_SD2, x_SD2), np.einsum("sdk,sd->sk", x_SD2, gold_SD)
    best_2 = np.linalg.solve(left_S22.sum(axis=0), right_S2.sum(axis=0))
    drawn = [
        # A resample may lack the points for two parameters: of all curves through its points, the smallest.
        np.linalg.pinv(np.einsum("rs,skl->rkl", counts, left_S22), hermitian=True) @ (counts @ right_S2)[..., None]
        for counts in resample_counts(len(gold_SD), resamples=resamples, seed=seed)
    ]
    alphas, betas = np.concatenate(drawn)[..., 0].T
    turns = turn_of(form, alphas, betas)
    turn = Estimate(float(turn_of(form, best_2[:1], best_2[1:])[0]), *percentile_interval(turns))
    error = (x_SD2 @ best_2 - gold_SD)[known_SD]
    return Fit(
        form=form,
        alpha=Estimate(float(best_2[0]), *percentile_interval(alphas)),
        beta=Estimate(float(best_2[1]), *percentile_interval(betas)),
        turn=turn,
        turned=turn.high <= float(d_SD.max()),
        residual=float(np.sqrt(np.mean(error**2))),
        units=len(gold_SD),
    )
