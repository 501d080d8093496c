"""KV cache, in the model's dtype or rounded to fewer bytes."""

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
    """8-bit quantized array, x ≈ numbers · scale.

    Attributes:
      numbers: [..., S, head] int8, -127 to 127.
      scale: [..., S, 1] float32, one per token and key head.
    """

    numbers: Array
    scale: Array


@pytree
class Chunks:
    """Buffer split along its slots into several parts, each an array or `Int8`; writes go to the last part."""

    parts: tuple[Any, ...]


@pytree
class Cache:
    """KV cache of the tokens processed so far.

    Attributes:
      keys: tuple of buffers, one per layer; with scanned layers, one stacked buffer. A buffer is an array [B, key
        heads, S, head], an `Int8` of such arrays, or `Chunks` of those.
      values: likewise.
      places_BS: index of the real token of the row that a slot holds, from 0; -1 for none. The attention mask is
        computed from these and not from the order of the slots, so that slots can be overwritten.
      filled: scalar, slot where the next tokens are written.
    """

    keys: Any
    values: Any
    places_BS: Array
    filled: Array


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: CacheDtype = "model") -> Cache:
    """Make an empty cache with `slots` slots for each of `rows` rows."""
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
    """Grow a full cache to `slots` slots per row by adding a chunk, without copying."""
    rows, before = cache.places_BS.shape
    more = empty_cache(config, rows, slots - before, dtype)

    def extended(old: Any, new: Any) -> Any:
        if isinstance(new, tuple):
            return tuple(extended(*pair) for pair in zip(old, new, strict=True))
        return Chunks((*(old.parts if isinstance(old, Chunks) else (old,)), new))

    places_BS = jnp.concatenate([cache.places_BS, more.places_BS], axis=1)
    return Cache(extended(cache.keys, more.keys), extended(cache.values, more.values), places_BS, cache.filled)


def to_int8(x: Array) -> Int8:
    """Quantize x [..., head] to multiples of max |x| / 127 per vector; the error is at most half a step."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
    return Int8(jnp.round(x / jnp.where(scale > 0.0, scale, 1.0)).astype(jnp.int8), scale)


def write(buffer: Any, new: Array, start: tuple[Any, ...]) -> Any:
    """Write `new`, rounded like the buffer, at index `start`: one entry per axis, the slot axis last but one."""
    if isinstance(buffer, Chunks):
        *old, last = buffer.parts
        slot = start[-2] - sum(_slots(part) for part in old)
        return Chunks((*old, write(last, new, (*start[:-2], slot, start[-1]))))
    rounded = to_int8(new) if isinstance(buffer, Int8) else new.astype(buffer.dtype)
    return jax.tree.map(lambda old, x: constrain_cache(jax.lax.dynamic_update_slice(old, x, start)), buffer, rounded)


def products(query: Array, keys: Any) -> Array:
    """Queries [B, key heads, Q, head] times the keys of one block's buffer, [B, key heads, Q, S] float32.

    An int8 scale is constant over a token's vector, so it multiplies the product, without a rescaled copy of the keys.
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
