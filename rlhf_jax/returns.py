"""KL-penalized rewards, generalized advantage estimation, and advantages without a value network."""

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


# Advantages of whole responses, [B], where rows g K … g K + K - 1 are the K responses to prompt g. Every token of a
# response gets the same. They are treated as data.


def leave_one_out_advantages(reward: Array, *, samples: int) -> Array:
    """RLOO: A_i = r_i - mean of the other K - 1 rewards of the prompt.

    Args:
      reward: r of each response, [B], the K responses to a prompt in a row.
      samples: K, 2 or more.

    Returns:
      The advantage, [B] float32.

    Raises:
      ValueError: if K is not a divisor of B that is 2 or more.

    Source:
      Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740); Kool et al. 2019.
    """
    reward_GK = _groups(reward, samples)
    others_GK = (jnp.sum(reward_GK, axis=1, keepdims=True) - reward_GK) / (samples - 1)
    return (reward_GK - others_GK).reshape(-1)


def group_advantages(reward: Array, *, samples: int, scale: bool = True, epsilon: float = 1e-4) -> Array:
    """GRPO: A_i = (r_i - mean) / (deviation + ε) over the K rewards of the prompt; Dr. GRPO: r_i - mean.

    Args:
      reward: r of each response, [B], the K responses to a prompt in a row.
      samples: K, 2 or more.
      scale: divide by the sample deviation (with K - 1), as GRPO does; without it easy and hard prompts keep their
        weight.
      epsilon: ε, in reward units; equal rewards give 0.

    Returns:
      The advantage, [B] float32.

    Raises:
      ValueError: if K is not a divisor of B that is 2 or more.

    Source:
      Shao et al. 2024, section 4.1 (arXiv:2402.03300); Liu et al. 2025, Dr. GRPO (arXiv:2503.20783).
    """
    reward_GK = _groups(reward, samples)
    centered_GK = reward_GK - jnp.mean(reward_GK, axis=1, keepdims=True)
    if scale:
        variance_G1 = jnp.sum(jnp.square(centered_GK), axis=1, keepdims=True) / (samples - 1)
        centered_GK = centered_GK / (jnp.sqrt(variance_G1) + epsilon)
    return centered_GK.reshape(-1)


def greedy_baseline_advantages(reward: Array, *, samples: int) -> Array:
    """ReMax: A_i = r_i - reward of the greedy response, which is the first of the K to a prompt.

    Args:
      reward: r of each response, [B], the K responses to a prompt in a row, the greedy one first.
      samples: K, 2 or more.

    Returns:
      The advantage, [B] float32; 0 for the greedy responses, which are not samples of the policy.

    Raises:
      ValueError: if K is not a divisor of B that is 2 or more.

    Source:
      Li et al. 2023, algorithm 1 (arXiv:2310.10505).
    """
    reward_GK = _groups(reward, samples)
    return (reward_GK - reward_GK[:, :1]).reshape(-1)


def _groups(reward: Array, samples: int) -> Array:
    if reward.ndim != 1 or samples < 2 or reward.shape[0] % samples:
        raise ValueError(f"samples: expected a divisor of the {reward.shape} rewards from 2 up, got {samples}")
    return at_least_float32(reward).reshape(-1, samples)
