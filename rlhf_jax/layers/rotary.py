"""Rotary position embeddings (RoPE), with the scaling methods of published models for longer contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array
from rlhf_jax.config import RopeScaling


def frequencies(width: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Scaled rotary frequencies base^(-2i / width) in radians per position, [width / 2] float32."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    plain = (1.0 / np.float32(base) ** exponent).astype(np.float32)
    if scaling.kind == "none":
        return plain
    slow = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        turns = scaling.original_context * plain / np.float32(2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        low, high = (
            width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        # A ramp of length 0 would divide by 0.
        share = 1.0 - (np.arange(width // 2) - low) / (high - low if high > low else 1e-3)
    share = np.clip(share, 0.0, 1.0).astype(np.float32)
    return share * plain + (1 - share) * slow


def turns(
    positions_BT: Array, frequency: np.ndarray | Array, amplitude: float | Array = 1.0, *, below: int = 0
) -> tuple[Array, Array]:
    """Cosine and sine of the angle of each position and frequency, times the amplitude: (cos, sin), [B, T, F] float32.

    Args:
      positions_BT: positions.
      frequency: [F], from `frequencies`.
      amplitude: factor of cos and sin.
      below: exclusive upper bound of all positions that matter, which are then looked up in a table; 0 computes them
        for any position. On a CPU a cosine takes as long as fifty products, and XLA recomputes it per head and use.
    """
    if below:
        angle = np.arange(below, dtype=np.float32)[:, None] * np.asarray(frequency, np.float32)
        cos, sin = (
            jnp.asarray((function(angle) * np.float32(amplitude)).astype(np.float32)).at[positions_BT].get(mode="clip")
            for function in (np.cos, np.sin)
        )
        return cos, sin
    angle_BTF = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)[None, None]
    cos, sin = jnp.cos(angle_BTF), jnp.sin(angle_BTF)
    if not isinstance(amplitude, float) or amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return cos, sin


def rotate(x_BHTd: Array, cos_BTF: Array, sin_BTF: Array) -> Array:
    """Rotate the first 2 F dimensions of each head, pairing the first half with the second; the rest is kept.

    Args:
      x_BHTd: queries or keys.
      cos_BTF: from `turns`; 2 F < d gives the partial rotation of Pythia and StableLM.
      sin_BTF: from `turns`.

    Source:
      Su et al. 2021 (arXiv:2104.09864), in Llama's layout.
    """
    half = cos_BTF.shape[-1]
    cos, sin = cos_BTF[:, None], sin_BTF[:, None]
    first, second = x_BHTd[..., :half].astype(jnp.float32), x_BHTd[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTd.dtype)
    return turned if 2 * half == x_BHTd.shape[-1] else jnp.concatenate([turned, x_BHTd[..., 2 * half :]], axis=-1)
