"""Episodes of several turns: the policy's turns, with an environment's observations between them.

An episode is laid out as a response is, in R tokens after the prompt. The mask of the response has the policy's tokens
alone, so that nothing else has a loss, a KL penalty or an advantage; observations are context.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.arrays import Array, pytree


@pytree
class Turns:
    """What an environment adds to B responses.

    Attributes:
      mask_BR: True for real tokens, those of observations included.
      reward_BR: weighted reward of each turn but the last, at the turn's last token; 0 elsewhere.
      ended_B: True if the environment ended the episode, and its last turn has an end token.
      count_B: int32, number of the policy's turns.
    """

    mask_BR: Array
    reward_BR: Array
    ended_B: Array
    count_B: Array


@pytree
class NextTurn:
    """Says that the prompts of a batch are episodes so far, of which the next turn is to be sampled.

    Attributes:
      number_B: int32, number of the turn, from 1, the same in all rows.
      over_B: True for episodes that are over: nothing is sampled.
    """

    number_B: Array
    over_B: Array


def rewards_by_turn(reward_BR: Array, turns: Turns, last_B1: Array, kept_B: Array) -> Array:
    """Move the rewards of earlier turns, which the score at the last token contains, to the turns that they are of.

    Args:
      reward_BR: reward of each token.
      turns: the turns.
      last_B1: place of the policy's last token.
      kept_B: False where the score was replaced, and contains no rewards.
    """
    earlier_BR = jnp.where(kept_B[:, None], turns.reward_BR, 0.0)
    is_last_BR = jnp.arange(reward_BR.shape[1])[None] == last_B1
    return reward_BR + earlier_BR - jnp.where(is_last_BR, jnp.sum(earlier_BR, axis=1, keepdims=True), 0.0)


def over_gaps(
    function: Callable[[Array, Array, Array], tuple[Array, ...]],
) -> Callable[[Array, Array, Array], tuple[Array, ...]]:
    """Make a function of (reward, value, mask) [B, R] whose tokens come first take tokens with gaps between them.

    The state after a turn is then the one before the next turn, whatever is observed in between.
    """

    def gapped(reward_BR: Array, value_BR: Array, mask_BR: Array) -> tuple[Array, ...]:
        order_BR = jnp.argsort(~mask_BR, axis=1, stable=True)
        back_BR = jnp.argsort(order_BR, axis=1)
        found = function(*(jnp.take_along_axis(x_BR, order_BR, axis=1) for x_BR in (reward_BR, value_BR, mask_BR)))
        return tuple(jnp.take_along_axis(x_BR, back_BR, axis=1) for x_BR in found)

    return gapped
