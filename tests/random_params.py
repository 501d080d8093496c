"""Parameters drawn by numpy, for tests to which any will do: drawing by a model compiles a program for each shape."""

from typing import Any

import jax
import numpy as np

from rlhf_jax.model import Transformer, init_params

initialized = jax.jit(init_params, static_argnums=0)
"""What `init_params` draws, by one program in place of one for each of a model's operations."""


def random_params(model: Transformer, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Fresh parameters, `scale` times as large as a model begins with: matrices N(0, 1 / in), biases 0, norms 1."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if leaf.ndim == 1:
            return np.full(leaf.shape, 0 if name == "bias" else scale, leaf.dtype)
        inside = leaf.shape[-1 if name == "embedding" else -2]
        return (scale * inside**-0.5 * random.normal(size=leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params: dict[str, Any] = jax.tree_util.tree_map_with_path(draw, shapes)
    return params
