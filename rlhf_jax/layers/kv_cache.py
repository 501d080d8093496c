"""Keys and values of the tokens already seen: as the model computes them, or rounded to fewer bytes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, pytree
from rlhf_jax.config import CacheDtype, ModelConfig
from rlhf_jax.parallel.sharding import constrain_cache


@pytree
class Int8:
    """Numbers in eight bits, x ≈ numbers · scale.

    numbers: [..., S, head] int8, -127 to 127. scale: [..., S, 1] float32, one for each token and key head.
    """

    numbers: Array
    scale: Array


@pytree
class Chunks:
    """One buffer whose slots are laid through several, each an array or `Int8`; the last is the one that is written."""

    parts: tuple[Any, ...]


@pytree
class Cache:
    """Keys and values of the tokens already seen.

    keys, values: tuples of buffers, one a layer; with scanned layers one buffer, stacked. A buffer is an array [B, key
      heads, S, head], or an `Int8` of such, or `Chunks` of those.
    places_BS: which of its row's real tokens a slot holds, counted from 0; -1 for none. What a token may see is told by
      these and not by the order of the slots, so that slots can be written anew.
    filled: scalar, the slot where the next tokens are written.
    """

    keys: Any
    values: Any
    places_BS: Array
    filled: Array


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: CacheDtype = "model") -> Cache:
    """A cache of `slots` tokens for each of `rows` rows."""
    shape = (rows, config.key_heads, slots, config.head_size)

    def empty(shape: tuple[int, ...]) -> Array | Int8:
        if dtype == "int8":
            scale = constrain_cache(jnp.zeros((*shape[:-1], 1), jnp.float32))
            return Int8(constrain_cache(jnp.zeros(shape, jnp.int8)), scale)
        return constrain_cache(jnp.zeros(shape, config.dtype if dtype == "model" else dtype))

    def every_layer() -> Any:
        if config.scan_layers:
            return empty((config.layers, *shape))
        return tuple(empty(shape) for _ in range(config.layers))

    places_BS = jnp.full((rows, slots), -1, jnp.int32)
    return Cache(every_layer(), every_layer(), places_BS, jnp.zeros((), jnp.int32))


def grown(cache: Cache, config: ModelConfig, slots: int, dtype: CacheDtype = "model") -> Cache:
    """A full cache with room for so many tokens a row, in a chunk of its own: nothing is copied."""
    rows, before = cache.places_BS.shape
    more = empty_cache(config, rows, slots - before, dtype)

    def beside(old: Any, new: Any) -> Any:
        if isinstance(new, tuple):
            return tuple(beside(*pair) for pair in zip(old, new, strict=True))
        return Chunks((*(old.parts if isinstance(old, Chunks) else (old,)), new))

    places_BS = jnp.concatenate([cache.places_BS, more.places_BS], axis=1)
    return Cache(beside(cache.keys, more.keys), beside(cache.values, more.values), places_BS, cache.filled)


def to_int8(x: Array) -> Int8:
    """[..., head] rounded to multiples of max |x| / 127, one step size a vector: wrong by half a step at most."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
    return Int8(jnp.round(x / jnp.where(scale > 0.0, scale, 1.0)).astype(jnp.int8), scale)


def write(buffer: Any, new: Array, start: tuple[Any, ...]) -> Any:
    """The buffer with `new`, rounded as the buffer is, from `start` on: a place on each axis, the slot last but one."""
    if isinstance(buffer, Chunks):
        *old, last = buffer.parts
        slot = start[-2] - sum(_slots(part) for part in old)
        return Chunks((*old, write(last, new, (*start[:-2], slot, start[-1]))))
    rounded = to_int8(new) if isinstance(buffer, Int8) else new.astype(buffer.dtype)
    return jax.tree.map(lambda old, x: constrain_cache(jax.lax.dynamic_update_slice(old, x, start)), buffer, rounded)


def products(query: Array, keys: Any) -> Array:
    """Queries [B, key heads, Q, head] times the keys of one block's buffer, [B, key heads, Q, S] float32.

    A scale is the same for a token's whole vector: it is multiplied to the product, and no rescaled copy of the keys is
    made.
    """
    if isinstance(keys, Chunks):
        return jnp.concatenate([products(query, part) for part in keys.parts], axis=-1)
    if isinstance(keys, Int8):
        return products(query, keys.numbers) * jnp.swapaxes(keys.scale, -1, -2)
    return jnp.einsum("bgqd,bgsd->bgqs", query, keys.astype(query.dtype), preferred_element_type=jnp.float32)


def mixture(weights: Array, values: Any, dtype: Any) -> Array:
    """Weights [B, key heads, Q, S] times the values of one block's buffer, [B, key heads, Q, head] of `dtype`."""
    if isinstance(values, Chunks):
        ends = list(itertools.accumulate(_slots(part) for part in values.parts))
        shares = zip(jnp.split(weights, ends[:-1], axis=-1), values.parts, strict=True)
        mixtures = [mixture(share, part, dtype).astype(jnp.float32) for share, part in shares]
        return functools.reduce(jnp.add, mixtures).astype(dtype)
    if isinstance(values, Int8):
        return mixture(weights * jnp.swapaxes(values.scale, -1, -2), values.numbers, dtype)
    return jnp.einsum("bgqs,bgsd->bgqd", weights.astype(dtype), values.astype(dtype))


def _slots(buffer: Any) -> int:
    return (buffer.numbers if isinstance(buffer, Int8) else buffer).shape[-2]
