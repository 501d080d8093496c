"""The losses of the recipe: arrays in, arrays out, float32, unreduced.

They know no parameters, model, mask of the batch, or device. Where an input slot is NaN or infinite the loss there is
NaN and its gradient 0, so that `masked_mean` can drop the slot without a trace, and one that is kept still shows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.masked import EXP_LIMIT, at_least_float32, elementwise, same_shape


def next_token_loss(logits: Array, targets: Array) -> Array:
    """Cross-entropy of each target: -log softmax(logits)[target].

    Args:
      logits: [..., V], any float dtype; -inf marks an id that cannot occur.
      targets: [...], integer ids. An id outside [0, V) gives NaN, never a wrong number.
    Returns: nats, [...], float32.
    Raises: ValueError if the leading shapes differ.
    Source: Ouyang et al. 2022, stage 1 and 2 (arXiv:2203.02155).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"shapes differ: logits {logits.shape} without the last axis, targets {targets.shape}")
    logits, targets = at_least_float32(logits), jnp.asarray(targets)
    if targets.dtype.itemsize < 4:
        # A vocabulary of more than 256 does not fit uint8: the ids to compare with would start again at 0.
        targets = targets.astype(jnp.int32)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # max carries a NaN on, so this finds it without another pass over the vocabulary; -inf is a row of nothing else.
    undefined = ~jnp.isfinite(peak)
    shifted = jnp.where(undefined, 0.0, logits - peak)
    ids = jax.lax.broadcasted_iota(targets.dtype, shifted.shape, shifted.ndim - 1)
    # A sum over a comparison, not a gather: its gradient is no scatter, and it works where V is sharded.
    selected = jnp.sum(jnp.where(ids == targets[..., None], shifted, 0.0), axis=-1)
    loss = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - selected
    return jnp.where(undefined[..., 0] | (targets < 0) | (targets >= logits.shape[-1]), jnp.nan, loss)


def pairwise_loss(chosen: Array, rejected: Array) -> Array:
    """Reward-model loss of each comparison: -log σ(chosen - rejected).

    Args:
      chosen, rejected: scores of the winning and the losing response, the same shape.
    Returns: nats, the same shape.
    Raises: ValueError if the shapes differ.
    Source: Ouyang et al. 2022, eq. 1.
    """
    same_shape(chosen=chosen, rejected=rejected)
    return elementwise(lambda win, lose: -jax.nn.log_sigmoid(win - lose), chosen, rejected)


def ranking_loss(scores: Array, ranks: Array, mask: Array) -> Array:
    """Reward-model loss of each prompt: -log σ(r_w - r_l), mean over the pairs of its K responses that are no ties.

    Args:
      scores: r, [B, K].
      ranks: [B, K] integers, 1 is best; equal ranks are ties, whose pair is dropped.
      mask: [B, K] bool, True where a response exists; K is ragged.
    Returns: nats, [B]; 0 for a prompt without an ordered pair (leave it out of the mean with `ordered_pairs`).
    Raises: ValueError if the shapes differ.
    Source: Ouyang et al. 2022, eq. 1: all pairs of a prompt are one batch element.
    """
    same_shape(scores=scores, ranks=ranks, mask=mask)
    scores = jnp.where(mask, at_least_float32(scores), 0.0)
    wins = ordered_pairs(ranks, mask)
    loss = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
    total = jnp.sum(jnp.where(wins, loss, 0.0), axis=(1, 2))
    return total / jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1).astype(total.dtype)


def ordered_pairs(ranks: Array, mask: Array) -> Array:
    """[B, K, K] bool: True at (w, l) where both responses exist and w is ranked better than l."""
    same_shape(ranks=ranks, mask=mask)
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def clipped_surrogate(log_ratio: Array, advantage: Array, *, clip: float) -> Array:
    """PPO policy loss of each token: -min(r A, clip(r, 1-ε, 1+ε) A), r = exp(log_ratio).

    Args:
      log_ratio: log π_new(a) - log π_old(a) in nats, any shape.
      advantage: A, the same shape, treated as data.
      clip: ε, e.g. 0.2.
    Returns: loss, the same shape, unreduced.
    Raises: ValueError if the shapes differ (broadcasting would hide a bug).
    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    same_shape(log_ratio=log_ratio, advantage=advantage)

    def loss(log_ratio: Array, advantage: Array) -> Array:
        ratio = jnp.exp(jnp.minimum(log_ratio, EXP_LIMIT))
        return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))

    return elementwise(loss, log_ratio, jax.lax.stop_gradient(advantage))


def clipped_value_loss(value: Array, old_value: Array, target: Array, *, clip: float) -> Array:
    """PPO value loss of each token: 1/2 max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²).

    Args:
      value: v, the value network now, any shape.
      old_value: v_old, at the time of the rollout, the same shape, treated as data.
      target: R, the return, the same shape, treated as data.
      clip: ε, in the units of the value, e.g. 0.2.
    Returns: loss, the same shape, unreduced.
    Raises: ValueError if the shapes differ.
    Source: Ziegler et al. 2019, code openai/lm-human-preferences.
    """
    same_shape(value=value, old_value=old_value, target=target)

    def loss(value: Array, old_value: Array, target: Array) -> Array:
        near = jnp.clip(value, old_value - clip, old_value + clip)
        return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))

    return elementwise(loss, value, jax.lax.stop_gradient(old_value), jax.lax.stop_gradient(target))
