"""Signs of collapse in sampled responses: one answer to every prompt, and the same words again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.masked import masked_mean

# Fewest prompts of an iteration whose answers are compared with each other: few tell nothing.
FEWEST_PROMPTS = 4


def collapse_signs(tokens_BR: Array, mask_BR: Array, one: slice, axis_name: str | None = None) -> dict[str, Array]:
    """Metrics of both signs; `one` takes the response to each prompt that `same_answer` compares."""
    signs = {"repeated_pairs": repeated_pairs(tokens_BR, mask_BR, axis_name)}
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    if len(tokens_BR[one]) * devices >= FEWEST_PROMPTS:
        signs["same_answer"] = same_answer(tokens_BR[one], mask_BR[one], axis_name)
    return signs


def same_answer(tokens_BR: Array, mask_BR: Array, axis_name: str | None = None) -> Array:
    """Share of the batch's responses that are equal to the most common one.

    Args:
      tokens_BR: sampled token ids, [B, R].
      mask_BR: True for tokens of the response.
      axis_name: mapped axis over which the responses are split.

    Returns:
      A scalar from 1 / batch to 1; under a mapped axis its share, to be summed over the axis.
    """
    # Two hashes of 32 bits: that of different responses is equal by chance once in 2^64.
    place_R = jnp.arange(1, tokens_BR.shape[1] + 1, dtype=jnp.uint32)
    ids_BR = jnp.where(mask_BR, tokens_BR.astype(jnp.uint32) + jnp.uint32(1), jnp.uint32(0))
    hashes = []
    for seed in (0x9E3779B1, 0x85EBCA6B):
        mixed_BR = (ids_BR ^ (place_R * jnp.uint32(seed))[None]) * jnp.uint32(0xC2B2AE35)
        mixed_BR = (mixed_BR ^ (mixed_BR >> 15)) * jnp.uint32(seed)
        hashes.append(jnp.sum(mixed_BR ^ (mixed_BR >> 13), axis=1, dtype=jnp.uint32))
    hash_2B = jnp.stack(hashes)
    rows = hash_2B.shape[1]
    if axis_name is not None:
        hash_2B = jax.lax.all_gather(hash_2B, axis_name, axis=1, tiled=True)
    equal_BB = jnp.all(hash_2B[:, :, None] == hash_2B[:, None, :], axis=0)
    return jnp.max(jnp.mean(equal_BB.astype(jnp.float32), axis=1)) * (rows / hash_2B.shape[1])


def repeated_pairs(tokens_BR: Array, mask_BR: Array, axis_name: str | None = None) -> Array:
    """Share of a response's pairs of neighbouring tokens that have occurred earlier in it, over all responses.

    "of the of the of the" has 5 pairs, of which 3 have occurred earlier.

    Args:
      tokens_BR: sampled token ids, [B, R].
      mask_BR: True for tokens of the response, which are its first ones.
      axis_name: mapped axis over which the responses are split.

    Returns:
      A scalar from 0 to below 1; under a mapped axis its share, to be summed over the axis. 0 without any pair.
    """
    if tokens_BR.shape[1] < 2:
        return jnp.zeros((), jnp.float32)
    mask_BQ = mask_BR[:, 1:] & mask_BR[:, :-1]
    first_BQ, second_BQ = (
        jnp.where(mask_BQ, x_BQ.astype(jnp.int32), -1) for x_BQ in (tokens_BR[:, :-1], tokens_BR[:, 1:])
    )
    # Sorted, equal pairs are neighbours; the padding comes first.
    first_BQ, second_BQ = jax.lax.sort((first_BQ, second_BQ), dimension=1, num_keys=2)
    again_BQ = (first_BQ[:, 1:] == first_BQ[:, :-1]) & (second_BQ[:, 1:] == second_BQ[:, :-1])
    again_BQ = jnp.pad(again_BQ, ((0, 0), (1, 0)))
    return masked_mean(again_BQ.astype(jnp.float32), first_BQ >= 0, axis_name)
