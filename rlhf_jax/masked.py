"""What makes masked slots harmless, and the only reducers: means and whitening over what a mask keeps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array

# exp of more overflows float32, and the gradient of a token that is masked or clipped would be 0 · inf = NaN.
EXP_LIMIT = 88.0


def at_least_float32(x: Array) -> Array:
    """x as float32, or unchanged where it is wider (float64 under x64)."""
    x = jnp.asarray(x)
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def same_shape(**arrays: Array) -> None:
    """Raises ValueError unless all shapes are equal: broadcasting would hide a bug."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def elementwise(function: Callable[..., Array], *inputs: Array) -> Array:
    """function(*inputs) in float32, with NaN and no gradient wherever an input is NaN or infinite.

    A masked slot may then hold anything: 0 times the slope there is 0.
    """
    inputs = tuple(at_least_float32(x) for x in inputs)
    defined = jnp.ones(inputs[0].shape, bool)
    for x in inputs:
        defined &= jnp.isfinite(x)
    safe = [jnp.where(defined, x, 0.0) for x in inputs]
    return jnp.where(defined, function(*safe), jnp.nan)


def masked_mean(x: Array, mask: Array, axis_name: str | None = None, *, count: Array | None = None) -> Array:
    """Exact mean of x over the True slots of the global batch: sum(x[mask]) / count.

    Args:
      x: any shape. What stands in masked slots, NaN included, changes neither value nor gradient.
      mask: the same shape, bool.
      axis_name: a mapped axis over which the batch is spread. The count alone is summed over it, so that the result is
        this device's *share* of the mean; sum shares (and gradients) over the axis to get the mean (and its gradient).
      count: kept slots of the whole batch, where x is one microbatch of it; then the result is this microbatch's share.
    Returns: float32 scalar; 0 where nothing is kept.
    Raises: ValueError if the shapes differ.
    """
    same_shape(x=x, mask=mask)
    total = jnp.sum(jnp.where(mask, at_least_float32(x), 0.0))
    if count is None:
        count = jnp.sum(mask)
        if axis_name is not None:
            # The count carries no gradient, so a psum here is safe under pmap; one of the sum would not be.
            count = jax.lax.psum(count, axis_name)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def masked_whiten(
    x: Array, mask: Array, axis_name: str | None = None, *, keep_mean: bool = False, epsilon: float = 1e-8
) -> Array:
    """(x - mean) / sqrt(variance + ε) over the True slots of the global batch, population variance.

    Args:
      x: any shape; masked slots may hold anything.
      mask: the same shape, bool.
      axis_name: a mapped axis whose devices share one mean and one variance.
      keep_mean: add the mean back, as for rewards, whose zero has a meaning.
      epsilon: ε, in the units of x squared.
    Returns: float32, the shape of x, 0 in masked slots.
    Raises: ValueError if the shapes differ.
    Source: Ziegler et al. 2019, code openai/lm-human-preferences.
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
