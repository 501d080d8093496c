"""Estimators of KL(π, π_ref) from samples of π, and the adaptive KL coefficient."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.masked import EXP_LIMIT, at_least_float32, elementwise


def kl_estimate(logp: Array, ref_logp: Array, *, estimator: str = "k1") -> Array:
    """Estimate KL(π, π_ref) at each sampled token.

    With d = log π_ref - log π: k1 = -d, k2 = d²/2, k3 = e^d - 1 - d. k1 is unbiased and may be
    negative; k2 is biased with low variance; k3 is unbiased and never negative.

    Args:
      logp: log π of the sampled token in nats, any shape.
      ref_logp: log π_ref of the sampled token in nats, the same shape.
      estimator: "k1", "k2" or "k3".

    Returns:
      The estimate in nats, the same shape, float32.

    Raises:
      ValueError: for any other estimator, or if the shapes differ.

    Source:
      Schulman, joschu.net/blog/kl-approx.html.
    """

    def estimate(logp: Array, ref_logp: Array) -> Array:
        d = ref_logp - logp
        if estimator == "k1":
            return -d
        if estimator == "k2":
            return 0.5 * jnp.square(d)
        if estimator == "k3":
            return jnp.expm1(jnp.minimum(d, EXP_LIMIT)) - d
        raise ValueError(f"estimator: expected 'k1', 'k2' or 'k3', got {estimator!r}")

    return elementwise(estimate, logp=logp, ref_logp=ref_logp)


def adapt_kl_coef(kl_coef: Array, kl: Array, *, target: float, horizon: float, episodes: int) -> Array:
    """Adapt the KL coefficient: β (1 + clip(KL/target - 1, -0.2, 0.2) n / horizon).

    Args:
      kl_coef: β, scalar.
      kl: KL of the batch, the sum over a response averaged over episodes, in nats, scalar.
      target: target KL in nats per response, e.g. 6.
      horizon: horizon in episodes, e.g. 10,000; larger is slower.
      episodes: n, the number of episodes that kl was measured on.

    Returns:
      The next β, float32 scalar.

    Source:
      Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """
    error = jnp.clip(at_least_float32(kl) / target - 1.0, -0.2, 0.2)
    return at_least_float32(kl_coef) * (1.0 + error * (episodes / horizon))
