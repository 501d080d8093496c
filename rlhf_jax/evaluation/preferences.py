"""Preferences between the answers of two models: outcomes per prompt, win rates, and the win rate at equal length."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rlhf_jax.evaluation.intervals import Estimate, Floats, Z, bootstrap_mean, wilson

# Standard deviation of the prior on the effect of length: wide, yet it keeps the effect finite when every longer answer
# wins.
PRIOR = 10.0


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often the answers of one model are preferred to those of another.

    Attributes:
      rate: mean outcome over prompts, 1 for a win, ½ for a tie, with Wilson's interval.
      bootstrap: the same with the paired bootstrap interval over prompts.
      length_controlled: win rate at equal length, `length_controlled`.
      ties: share of pairs of answers that are tied.
      longer: share of pairs of answers in which the model's own answer is the longer one, equal lengths counting half.
      prompts: number of prompts.
    """

    rate: Estimate
    bootstrap: Estimate
    length_controlled: Estimate
    ties: float
    longer: float
    prompts: int


def outcomes(scores: Floats, other: Floats) -> Floats:
    """Outcome of each pair of answers to a prompt: 1 if `scores` is higher, ½ if equal, else 0.

    Args:
      scores: [N], or [N, K] for K answers per prompt.
      other: [N], or [N, L].

    Returns:
      [N, K L].
    """
    first_NK1, second_N1L = scores.reshape(len(scores), -1, 1), other.reshape(len(other), 1, -1)
    outcomes_NKL = np.where(first_NK1 > second_N1L, 1.0, np.where(first_NK1 == second_N1L, 0.5, 0.0))
    return outcomes_NKL.reshape(len(scores), -1)


def compare(scores: Floats, other: Floats, lengths: Floats, other_lengths: Floats, *, seed: int = 0) -> WinRate:
    """Win rate of `scores` over `other`, paired by prompt.

    Args:
      scores: [N], or [N, K] for K answers per prompt.
      other: [N], or [N, L].
      lengths: of the same answers, in any unit.
      other_lengths: likewise.
      seed: of the bootstrap.
    """
    found_NP, longer_NP = outcomes(scores, other), outcomes(lengths, other_lengths)
    difference_NP = (lengths.reshape(len(lengths), -1, 1) - other_lengths.reshape(len(lengths), 1, -1)).reshape(
        found_NP.shape
    )
    per_prompt = found_NP.mean(axis=1)
    rate, (low, high) = float(per_prompt.mean()), bootstrap_mean(per_prompt, seed=seed)
    return WinRate(
        rate=Estimate(rate, *wilson(rate, len(per_prompt))),
        bootstrap=Estimate(rate, float(low), float(high)),
        length_controlled=length_controlled(found_NP, difference_NP)[0],
        ties=float((found_NP == 0.5).mean()),
        longer=float(longer_NP.mean()),
        prompts=len(per_prompt),
    )


def length_controlled(outcome: Floats, difference: Floats) -> tuple[Estimate, float]:
    """Win rate at equal length: σ(θ) of the logistic regression p(win) = σ(θ + φ tanh(Δ / s)).

    Δ is the length of the model's answer minus that of the other's, s the standard deviation of Δ, θ the effect of the
    model and φ that of length. φ has a normal prior of standard deviation `PRIOR`. Without differences in length, σ(θ)
    is the mean outcome. If all outcomes are the same, so they are at equal length, with Wilson's interval.

    It is AlpacaEval's length-controlled win rate without its third term, the difficulty of each instruction, which
    takes many models to estimate.

    Args:
      outcome: 1 for a win, ½ for a tie, 0 for a loss, [N], or [N, P] for P pairs of answers to each prompt.
      difference: Δ in any unit, the same shape.

    Returns:
      (win rate with its 95% interval, which is robust and clustered by prompt: σ(θ ± 1.96 standard errors); φ).

    Source: Dubois et al. 2024, section 3 (arXiv:2404.04475).
    """
    prompts = len(outcome)
    y_NP, delta_NP = outcome.reshape(prompts, -1), np.asarray(difference, np.float64).reshape(prompts, -1)
    mean = float(y_NP.mean())
    if np.ptp(y_NP) == 0:
        return Estimate(mean, *wilson(mean, prompts)), 0.0
    spread = float(delta_NP.std())
    length_NP = np.tanh(delta_NP / spread) if spread else np.zeros_like(delta_NP)
    x_NP2 = np.stack([np.ones_like(length_NP), length_NP], axis=-1)
    weight = 1 / y_NP.shape[1]  # a prompt counts once
    penalty = np.array([0.0, 1 / PRIOR**2])

    def objective(beta: Floats) -> float:
        logit_NP = x_NP2 @ beta
        return float(weight * (y_NP * logit_NP - np.logaddexp(0.0, logit_NP)).sum() - (penalty * beta**2).sum() / 2)

    beta = np.array([math.log(mean / (1 - mean)), 0.0])
    for _ in range(100):
        p_NP = 1 / (1 + np.exp(-(x_NP2 @ beta)))
        gradient = weight * np.einsum("np,npk->k", y_NP - p_NP, x_NP2) - penalty * beta
        curvature = weight * np.einsum("np,npk,npl->kl", p_NP * (1 - p_NP), x_NP2, x_NP2) + np.diag(penalty)
        step, before = np.linalg.solve(curvature, gradient), objective(beta)
        while objective(beta + step) < before - 1e-12 * abs(before):
            step /= 2
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    of_prompt_N2 = weight * np.einsum("np,npk->nk", y_NP - p_NP, x_NP2)
    inverse = np.linalg.inv(curvature)
    small_sample = prompts / max(prompts - 2, 1)
    error = math.sqrt((inverse @ (small_sample * of_prompt_N2.T @ of_prompt_N2) @ inverse)[0, 0])
    rate, low, high = (1 / (1 + np.exp(-(beta[0] + z * error))) for z in (0.0, -Z, Z))
    return Estimate(float(rate), float(low), float(high)), float(beta[1])
