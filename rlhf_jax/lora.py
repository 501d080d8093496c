"""LoRA (Hu et al. 2021, arXiv:2106.09685): a kernel W is kept and W + s A B is used, A [in, r] and B [r, out] trained.

An adapter is a tree like the parameters', with `lora_a` and `lora_b` where they have a kernel; what else it holds, such
as a score head, stands in place of the parameters' own. Where layers are stacked, so are their A and B. Everything here
is a pure function on such trees.
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
    """A fresh adapter that changes nothing: A ~ N(0, 1 / in), B = 0, of the parameters' dtype.

    Raises: UserError if the parameters have none of the kernels that the config names.
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
    """The parameters that a network runs with: the base's, with s B and A beside its kernels. Copies no kernel.

    Args:
      base: None where `adapter` is a whole network's parameters, which are then returned.
    """
    return adapter if base is None else _overlaid(base, _scaled(adapter, scale))


def merge(base: Params | None, adapter: Params, scale: float) -> Params:
    """The parameters of a plain network that computes the same: W + s A B, summed in float32."""
    if base is None:
        return adapter

    def walk(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if "lora_a" not in node:
            return {name: walk(value) for name, value in node.items()}
        product = node["lora_a"].astype(jnp.float32) @ node["lora_b"].astype(jnp.float32)
        kernel = (node["kernel"].astype(jnp.float32) + product).astype(node["kernel"].dtype)
        return {name: value for name, value in node.items() if not name.startswith("lora_")} | {"kernel": kernel}

    merged: Params = walk(attach(base, adapter, scale))
    return merged


def _sites(params: Params, targets: tuple[str, ...]) -> list[tuple[tuple[str, ...], Array]]:
    """(path of the module, kernel) of each kernel that gets an adapter, in a fixed order."""
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
