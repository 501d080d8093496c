"""Losses of the recipe: arrays in, arrays out, float32, unreduced.

They are independent of parameters, model, batch mask and device. Where an input is NaN or infinite, the loss is NaN and
its gradient 0, so that `masked_mean` can drop the slot without a trace, while a slot that is kept still gives NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.masked import EXP_LIMIT, at_least_float32, elementwise, same_shape


def next_token_loss(logits: Array, targets: Array) -> Array:
    """Cross-entropy loss of each target: -log softmax(logits)[target].

    Args:
      logits: [..., V], any float dtype; -inf excludes an id.
      targets: [...], integer ids. An id outside [0, V) gives NaN.

    Returns:
      The loss in nats, [...], float32.

    Raises:
      ValueError: if the leading shapes differ.

    Source:
      Ouyang et al. 2022, stages 1 and 2 (arXiv:2203.02155).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"shapes differ: logits {logits.shape} without the last axis, targets {targets.shape}")
    logits, targets = at_least_float32(logits), jnp.asarray(targets)
    if targets.dtype.itemsize < 4:
        # The ids compared with below take this dtype; in uint8 they would wrap around at 256.
        targets = targets.astype(jnp.int32)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # max propagates NaN, so this finds it without another pass over the vocabulary; -inf means that all logits are.
    undefined = ~jnp.isfinite(peak)
    shifted = jnp.where(undefined, 0.0, logits - peak)
    ids = jax.lax.broadcasted_iota(targets.dtype, shifted.shape, shifted.ndim - 1)
    # A masked sum instead of a gather: its gradient needs no scatter, and it works where V is sharded.
    selected = jnp.sum(jnp.where(ids == targets[..., None], shifted, 0.0), axis=-1)
    loss = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - selected
    return jnp.where(undefined[..., 0] | (targets < 0) | (targets >= logits.shape[-1]), jnp.nan, loss)


def pairwise_loss(chosen: Array, rejected: Array) -> Array:
    """Reward model loss of each comparison: -log σ(chosen - rejected).

    Args:
      chosen, rejected: scores of the winning and the losing response, the same shape.

    Returns:
      The loss in nats, the same shape.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ouyang et al. 2022, eq. 1 (arXiv:2203.02155).
    """
    same_shape(chosen=chosen, rejected=rejected)
    return elementwise(lambda win, lose: -jax.nn.log_sigmoid(win - lose), chosen, rejected)


def ranking_loss(scores: Array, ranks: Array, mask: Array) -> Array:
    """Reward model loss of each prompt: -log σ(r_w - r_l), averaged over the untied pairs of its K responses.

    Args:
      scores: r, [B, K].
      ranks: [B, K] integers, 1 is best; pairs with equal ranks are ties and are dropped.
      mask: [B, K] bool, True where a response exists; prompts may have fewer than K responses.

    Returns:
      The loss in nats, [B]; 0 for a prompt without an ordered pair (exclude it from the mean with `ordered_pairs`).

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ouyang et al. 2022, eq. 1 (arXiv:2203.02155): all pairs of a prompt form one batch element.
    """
    same_shape(scores=scores, ranks=ranks, mask=mask)
    scores = jnp.where(mask, at_least_float32(scores), 0.0)
    wins = ordered_pairs(ranks, mask)
    loss = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
    total = jnp.sum(jnp.where(wins, loss, 0.0), axis=(1, 2))
    return total / jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1).astype(total.dtype)


def ordered_pairs(ranks: Array, mask: Array) -> Array:
    """Ordered pairs of responses, [B, K, K] bool: True at (w, l) where both exist and w is ranked better than l."""
    same_shape(ranks=ranks, mask=mask)
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def clipped_surrogate(log_ratio: Array, advantage: Array, *, clip: float) -> Array:
    """PPO policy loss of each token: -min(r A, clip(r, 1-ε, 1+ε) A), r = exp(log_ratio).

    Args:
      log_ratio: log π_new(a) - log π_old(a) in nats, any shape.
      advantage: A, the same shape, treated as data.
      clip: ε, e.g. 0.2.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ (broadcasting would hide a bug).

    Source:
      Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    same_shape(log_ratio=log_ratio, advantage=advantage)

    def loss(log_ratio: Array, advantage: Array) -> Array:
        ratio = jnp.exp(jnp.minimum(log_ratio, EXP_LIMIT))
        return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))

    return elementwise(loss, log_ratio, jax.lax.stop_gradient(advantage))


def clipped_value_loss(value: Array, old_value: Array, target: Array, *, clip: float) -> Array:
    """PPO value loss of each token: 1/2 max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²).

    Args:
      value: v, current output of the value network, any shape.
      old_value: v_old, the value at rollout time, the same shape, treated as data.
      target: R, the return, the same shape, treated as data.
      clip: ε, in units of the value, e.g. 0.2.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ziegler et al. 2019, code openai/lm-human-preferences.
    """
    same_shape(value=value, old_value=old_value, target=target)

    def loss(value: Array, old_value: Array, target: Array) -> Array:
        near = jnp.clip(value, old_value - clip, old_value + clip)
        return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))

    return elementwise(loss, value, jax.lax.stop_gradient(old_value), jax.lax.stop_gradient(target))
