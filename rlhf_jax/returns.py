"""KL-penalized rewards and generalized advantage estimation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.kl import kl_estimate
from rlhf_jax.masked import at_least_float32, same_shape


def kl_penalized_reward(logp: Array, ref_logp: Array, score: Array, mask: Array, *, kl_coef: float | Array) -> Array:
    """Reward of each token: r_t = -β (log π(a_t) - log π_ref(a_t)), plus the score on the response's last token.

    Args:
      logp: log π of the sampled tokens in nats, [B, R].
      ref_logp: log π_ref of the sampled tokens in nats, [B, R].
      score: reward of the complete response, [B], any dtype.
      mask: [B, R] bool, True for response tokens.
      kl_coef: β, in reward units per nat.

    Returns:
      The reward, [B, R] float32, 0 in masked slots. The score of a row without response tokens is dropped.

    Raises:
      ValueError: if the shapes do not match.

    Source:
      Ouyang et al. 2022, eq. 2; Ziegler et al. 2019, eq. 2.
    """
    same_shape(logp=logp, ref_logp=ref_logp, mask=mask)
    if score.shape != mask.shape[:1]:
        raise ValueError(f"shapes differ: score {score.shape}, rows of mask {mask.shape[:1]}")
    logp = jnp.where(mask, at_least_float32(logp), 0.0)
    ref_logp = jnp.where(mask, at_least_float32(ref_logp), 0.0)
    penalty = kl_coef * kl_estimate(logp, ref_logp, estimator="k1")
    seen = jnp.cumsum(mask, axis=1)
    last = mask & (seen == seen[:, -1:])
    return jnp.where(mask, jnp.where(last, at_least_float32(score)[:, None], 0.0) - penalty, 0.0)


def generalized_advantages(
    reward: Array, value: Array, mask: Array, *, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Generalized advantage estimation and value targets.

    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, where V is 0 after the last token; value target
    R_t = A_t + V_t.

    Args:
      reward: r of each token, [B, R].
      value: V of the state before each token, [B, R].
      mask: [B, R] bool, True for response tokens, which come first in a row.
      gamma: γ, the discount factor; 1 in the recipe.
      lam: λ; 0.95 in the recipe.

    Returns:
      (advantage, target), both [B, R] float32, unwhitened, 0 in masked slots.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Schulman et al. 2015, eq. 16 (arXiv:1506.02438).
    """
    same_shape(reward=reward, value=value, mask=mask)
    reward = jnp.where(mask, at_least_float32(reward), 0.0)
    value = jnp.where(mask, at_least_float32(value), 0.0)
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    delta = reward + gamma * next_value - value

    def step(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_B, mask_B = now
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * later, 0.0)
        return advantage_B, advantage_B

    _, advantage_RB = jax.lax.scan(step, jnp.zeros_like(delta[:, 0]), (delta.T, mask.T), reverse=True)
    advantage = advantage_RB.T
    return advantage, advantage + value
