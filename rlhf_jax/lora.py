"""LoRA: the kernel W is frozen and W + s A B is used, with A [in, r] and B [r, out] trained.

An adapter is a tree like the parameters', with `lora_a` and `lora_b` in place of a kernel; anything else it contains,
such as a score head, replaces the corresponding parameters. For stacked layers, A and B are stacked too. All functions
here are pure functions of such trees.

Source:
  Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, Params
from rlhf_jax.config import LoraConfig
from rlhf_jax.errors import UserError


def init_adapter(params: Params, config: LoraConfig, key: Array) -> Params:
    """Initialize an adapter that leaves the model unchanged: A ~ N(0, 1 / in), B = 0, in the parameters' dtype.

    Raises:
      UserError: if the parameters have none of the kernels that the config names.
    """
    sites = _sites(params, config.targets)
    if not sites:
        raise UserError(f"targets: the model has none of {', '.join(config.targets)}")
    adapter: dict[str, Any] = {}
    for number, (path, kernel) in enumerate(sites):
        *layers, inside, outside = kernel.shape
        noise = jax.random.normal(jax.random.fold_in(key, number), (*layers, inside, config.rank), kernel.dtype)
        inner = adapter
        for name in path:
            inner = inner.setdefault(name, {})
        inner["lora_a"] = noise * inside**-0.5
        inner["lora_b"] = jnp.zeros((*layers, config.rank, outside), kernel.dtype)
    return adapter


def attach(base: Params | None, adapter: Params, scale: float) -> Params:
    """Attach an adapter to its base: full parameters with A and s B next to each kernel. No kernel is copied.

    Args:
      base: parameters of the base model; None if `adapter` is already full parameters, which are then returned.
      adapter: the adapter.
      scale: s.
    """
    return adapter if base is None else _overlaid(base, _scaled(adapter, scale))


def merge(base: Params | None, adapter: Params, scale: float) -> Params:
    """Merge an adapter into its base: kernels W + s A B, summed in float32."""
    if base is None:
        return adapter
    merged: Params = _overlaid(base, merged_kernels(base, adapter, scale))
    return merged


def merged_kernels(base: Params, adapter: Params, scale: float) -> Params:
    """The parameters that an adapter changes, merged: its tree with a kernel W + s A B in place of each A and B.

    They replace their base's in `attach` and `merge`, as any parameter in an adapter does. Averages are taken of these:
    the product of the averages of A and of B is not the average of A B.
    """

    def walk(node: Any, below: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if "lora_a" not in node:
            return {name: walk(value, below.get(name, {})) for name, value in node.items()}
        product = node["lora_a"].astype(jnp.float32) @ node["lora_b"].astype(jnp.float32)
        rest = {name: value for name, value in node.items() if not name.startswith("lora_")}
        kernel = below["kernel"]
        return rest | {"kernel": (kernel.astype(jnp.float32) + product).astype(kernel.dtype)}

    kernels: Params = walk(_scaled(adapter, scale), base)
    return kernels


def is_adapter(tree: Params) -> bool:
    """True if the tree has factors A and B; an average of adapters has kernels in their place."""
    return any(path[-1].key == "lora_a" for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def _sites(params: Params, targets: tuple[str, ...]) -> list[tuple[tuple[str, ...], Array]]:
    """List (path of the module, kernel) of each kernel that gets an adapter, in a fixed order."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(str(key.key) for key in path)
        if len(names) > 1 and names[-1] == "kernel" and names[-2] in targets:
            found.append((names[:-1], leaf))
    return found


def _scaled(adapter: Params, scale: float) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if path[-1].key == "lora_b" else leaf, adapter
    )


def _overlaid(base: Any, over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    below = base if isinstance(base, Mapping) else {}
    return {**below, **{name: _overlaid(below[name] if name in below else None, value) for name, value in over.items()}}
