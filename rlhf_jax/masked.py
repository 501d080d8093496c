"""Masked mean and whitening, the only reducers of the library, and helpers that make masked slots harmless."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array

# exp of anything larger overflows float32, and the gradient of a masked or clipped token would be 0 · inf = NaN.
EXP_LIMIT = 88.0


def at_least_float32(x: Array) -> Array:
    """Cast x to float32, or leave it unchanged if it is wider (float64 under x64)."""
    x = jnp.asarray(x)
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def same_shape(**arrays: Array) -> None:
    """Check that all shapes are equal, since broadcasting would hide a bug.

    Raises:
      ValueError: if they differ.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def elementwise(function: Callable[..., Array], **inputs: Array) -> Array:
    """Apply a function in float32, with NaN and zero gradient wherever an input is NaN or infinite.

    A masked slot may therefore hold anything: 0 times a finite slope is 0.

    Args:
      function: of arrays of any one shape, in the order of the inputs.
      **inputs: arrays of one shape, by the names that an error has.

    Raises:
      ValueError: if the shapes differ.
    """
    same_shape(**inputs)
    arrays = [at_least_float32(x) for x in inputs.values()]
    defined = jnp.ones(arrays[0].shape, bool)
    for x in arrays:
        defined &= jnp.isfinite(x)
    safe = [jnp.where(defined, x, 0.0) for x in arrays]
    return jnp.where(defined, function(*safe), jnp.nan)


def masked_mean(x: Array, mask: Array, axis_name: str | None = None, *, count: Array | None = None) -> Array:
    """Exact mean of x over the True slots of the global batch: sum(x[mask]) / count.

    Args:
      x: any shape. Values in masked slots, NaN included, change neither value nor gradient.
      mask: the same shape, bool.
      axis_name: mapped axis over which the batch is split. Only the count is summed over it, so the result is this
        device's *share* of the mean; sum shares (and gradients) over the axis to get the mean (and its gradient).
      count: number of True slots in the global batch, if x is one microbatch of it; the result is then this
        microbatch's share.

    Returns:
      The mean or share, float32 scalar; 0 where the mask is empty.

    Raises:
      ValueError: if the shapes differ.
    """
    same_shape(x=x, mask=mask)
    total = jnp.sum(jnp.where(mask, at_least_float32(x), 0.0))
    if count is None:
        count = jnp.sum(mask)
        if axis_name is not None:
            # The count has no gradient, so a psum of it is safe under pmap; a psum of the total would not be.
            count = jax.lax.psum(count, axis_name)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def masked_whiten(
    x: Array, mask: Array, axis_name: str | None = None, *, keep_mean: bool = False, epsilon: float = 1e-8
) -> Array:
    """Whiten x over the True slots of the global batch: (x - mean) / sqrt(variance + ε), with the population variance.

    Args:
      x: any shape; masked slots may hold anything.
      mask: the same shape, bool.
      axis_name: mapped axis whose devices share one mean and one variance.
      keep_mean: add the mean back, as for rewards, whose zero is meaningful.
      epsilon: ε, in units of x squared.

    Returns:
      The whitened values, float32, the shape of x, 0 in masked slots.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ziegler et al. 2019, code openai/lm-human-preferences.
    """
    same_shape(x=x, mask=mask)
    x = jnp.where(mask, at_least_float32(x), 0.0)

    def over_all(array: Array) -> Array:
        share = masked_mean(array, mask, axis_name)
        return share if axis_name is None else jax.lax.psum(share, axis_name)

    mean = over_all(x)
    variance = over_all(jnp.square(x - mean))
    whitened = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return jnp.where(mask, whitened + mean if keep_mean else whitened, 0.0)
