"""The sharding table: which logical axes of each array are sharded over which mesh axes."""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rlhf_jax.arrays import Array

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)

# Logical axis -> mesh axes. Rows are sharded over both axes of data parallelism; the width over fsdp, where each device
# stores a shard and gathers a layer when it needs it; heads, hidden units and vocabulary over tensor, where each device
# computes its shard.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    # For arrays whose rows are independent and whose other axes shard badly: sampling, some KV caches.
    "rows": (DATA, FSDP, TENSOR),
    "width": (FSDP,),
    "heads": (TENSOR,),
    "hidden": (TENSOR,),
    "vocabulary": (TENSOR,),
    "none": (),
}

# End of a parameter's path -> its last axes; the first match counts. Leading axes (stacked layers) are not sharded. The
# paths of the optimizer's moments end in the same way.
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"position_embedding", ("none", "width")),
    (r"unembedding", ("width", "vocabulary")),
    (r"embedding", ("vocabulary", "width")),
    (r"(query|key|value)\.kernel", ("width", "heads")),
    (r"(query|key|value)\.bias", ("heads",)),
    (r"out\.kernel", ("heads", "width")),
    (r"(up|gate)\.kernel", ("width", "hidden")),
    (r"(up|gate)\.bias", ("hidden",)),
    (r"down\.kernel", ("hidden", "width")),
    (r"(query|key|value|up|gate)\.lora_a", ("width", "none")),
    (r"(query|key|value)\.lora_b", ("none", "heads")),
    (r"(up|gate)\.lora_b", ("none", "hidden")),
    (r"out\.lora_a", ("heads", "none")),
    (r"down\.lora_a", ("hidden", "none")),
    (r"(out|down)\.lora_b", ("none", "width")),
)


def parameter_axes(path: str, rank: int) -> tuple[str, ...]:
    """Logical axes of a parameter, or of a moment of it, by its dotted path; all "none" if the table has no match."""
    for pattern, axes in PARAMETERS:
        if re.search(rf"(^|\.){pattern}$", path) and rank >= len(axes):
            return ("none",) * (rank - len(axes)) + axes
    return ("none",) * rank


def spec(
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: dict[str, int],
    table: dict[str, tuple[str, ...]] = MESH_AXES,
) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes; an axis not divisible by its mesh axes is not sharded.

    Args:
      sizes: sizes of the mesh axes.
    """
    parts: list[Any] = []
    for axis, length in zip(axes, shape, strict=True):
        used = tuple(name for name in table[axis] if name in sizes and sizes[name] > 1)
        count = 1
        for name in used:
            count *= sizes[name]
        parts.append(used if used and length % count == 0 else None)
    return PartitionSpec(*parts)


def on_a_mesh() -> bool:
    """True while tracing a program that jit shards over several devices."""
    return any(size > 1 for size in dict(jax.sharding.get_abstract_mesh().shape).values())


def constrain(x: Array, *axes: str) -> Array:
    """Constrains the array's sharding to its logical axes on the current mesh (`jax.set_mesh`), if there is one.

    The compiler derives most shardings from those of the parameters. This fixes it where a wrong choice is expensive:
    rows stay sharded over the devices, rather than widths.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, dict(mesh.shape))))


def parts_are_known() -> bool:
    """True if `on_each_device` can tell each device's shard: a mesh is set, or the program is per device (pmap)."""
    return _mesh() is not None or bool(jax.sharding.get_abstract_mesh().manual_axes)


def on_each_device(
    function: Callable[..., Array], arrays: Sequence[tuple[Array, tuple[str, ...]]], *, out: int
) -> Array:
    """Applies function(*arrays) to each device's shards, for operations that the compiler cannot partition.

    Without a mesh it is function(*arrays).

    Args:
      arrays: (array, its logical axes).
      out: index of the array whose sharding and number of axes the result has.
    """
    mesh = _mesh()
    given = [x for x, _ in arrays]
    if mesh is None:
        return function(*given)
    places = tuple(spec(axes, x.shape, dict(mesh.shape)) for x, axes in arrays)
    # check_vma needs kernels to declare which outputs vary between devices; ours do not.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=places[out], check_vma=False)
    result: Array = mapped(*given)
    return result


def constrain_rows(x: Array) -> Array:
    """Shards the first axis over all devices, or over fewer if it is not divisible; the others are not sharded."""
    mesh = _mesh()
    devices = 1 if mesh is None else math.prod(mesh.shape[name] for name in MESH_AXES["rows"])
    return constrain(x, "batch" if x.shape[0] % devices else "rows", *("none",) * (x.ndim - 1))


def constrain_cache(x: Array, key_heads: int | None = None) -> Array:
    """Shards a KV cache [..., B, key heads, S, head]: rows as in a batch, key heads over the axis `tensor`.

    If the key heads are not divisible, rows are sharded over that axis as well rather than replicated over it.

    Args:
      key_heads: number of key heads if `x` are queries, which are sharded like their keys.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    rows, heads = x.shape[-4], x.shape[-3] if key_heads is None else key_heads
    return constrain(x, *("none",) * (x.ndim - 4), *cache_axes(rows, heads, dict(mesh.shape)))


def cache_axes(rows: int, heads: int, sizes: dict[str, int]) -> tuple[str, str, str, str]:
    """Logical axes of keys or values [B, key heads, S, head] on a mesh with these axis sizes."""
    if heads % sizes[TENSOR] and not rows % math.prod(sizes[name] for name in MESH_AXES["rows"]):
        return "rows", "none", "none", "none"
    return "batch", "heads", "none", "none"


@contextlib.contextmanager
def decoding(parts: int) -> Iterator[None]:
    """Context in which groups of `parts` neighbours on the fsdp axis act as tensor axis; 0 changes nothing."""
    mesh = _mesh()
    if mesh is None or not parts:
        yield
        return
    token = _REGROUPED.set(_regrouped(dict(mesh.shape), parts, named=False))
    try:
        yield
    finally:
        _REGROUPED.reset(token)


def decoding_params(params: Any, parts: int, dtype: str) -> Any:
    """Parameters for `decoding`: one full copy per `parts` × tensor devices, with sharded parameters in `dtype`.

    The fsdp shards are gathered once, here, and not at each token. First an all-to-all within each group changes the
    shards from the width to the heads, so that no device ever holds a full matrix.

    Raises:
      ValueError: if parts does not divide the fsdp axis.
    """
    mesh = _mesh()
    if mesh is None or not parts:
        return params
    finer = _regrouped(dict(mesh.shape), parts, named=True)

    def one(path: Any, leaf: Array) -> Array:
        axes = parameter_axes(jax.tree_util.keystr(path, simple=True, separator="."), leaf.ndim)
        if set(axes) - {"none"}:
            leaf = leaf.astype(dtype)
        for width in ((FSDP,), ()):
            cut = dict.fromkeys(("heads", "hidden", "vocabulary"), (_PART, TENSOR))
            there = spec(axes, leaf.shape, dict(finer.shape), {**MESH_AXES, **cut, "width": width})
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(finer, there))
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


_PART = "part"
# The mesh of `decoding`; JAX's current mesh stays set, as arrays created under it may not be mixed with another.
_REGROUPED: contextvars.ContextVar[AbstractMesh | None] = contextvars.ContextVar("regrouped", default=None)


def _regrouped(sizes: dict[str, int], parts: int, *, named: bool) -> AbstractMesh:
    """The mesh with fsdp split in two; the parts become a separate axis (`named`) or join the tensor axis."""
    data, fsdp, tensor = (sizes[name] for name in AXES)
    if fsdp % parts:
        raise ValueError(f"decode_parts: expected a divisor of the {fsdp} devices of the axis fsdp, got {parts}")
    if named:
        return AbstractMesh(
            (data, fsdp // parts, parts, tensor), (DATA, FSDP, _PART, TENSOR), axis_types=(AxisType.Auto,) * 4
        )
    return AbstractMesh((data, fsdp // parts, parts * tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh() -> AbstractMesh | None:
    """The current mesh; None if it is not one of ours, or the program is per device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.manual_axes:
        return None
    regrouped = _REGROUPED.get()
    return mesh if regrouped is None else regrouped
