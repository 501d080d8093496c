"""One table: which axes of which array lie along which axis of the device mesh. It knows no device."""

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

# Logical axis -> mesh axes. Rows are spread over both axes of data parallelism; a width is cut by fsdp, where each
# device keeps a part and gathers a layer when it needs it; heads, hidden units and vocabulary by tensor, where each
# device computes its part.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    # Of what no device needs to see two rows of, and whose other axes are cut badly: sampling, some caches.
    "rows": (DATA, FSDP, TENSOR),
    "width": (FSDP,),
    "heads": (TENSOR,),
    "hidden": (TENSOR,),
    "vocabulary": (TENSOR,),
    "none": (),
}

# End of a parameter's path -> its last axes; the first that fits counts. An axis before them (stacked layers) is whole.
# The optimizer's moments end with the same paths.
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
    """Logical axes of a parameter (or of a moment of it) by its dotted path; what the table does not name is whole."""
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
    """Where an array of these logical axes lies; an axis whose length the mesh axes do not divide stays whole.

    Args:
      sizes: of the mesh's axes.
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
    """Whether the program being traced is for several devices by jit."""
    return any(size > 1 for size in dict(jax.sharding.get_abstract_mesh().shape).values())


def constrain(x: Array, *axes: str) -> Array:
    """The array, laid out by its logical axes on the mesh that is set (`jax.set_mesh`); itself without one.

    The compiler chooses most layouts from those of the parameters. This says it where a wrong choice costs: rows stay
    spread over the devices, rather than widths.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, dict(mesh.shape))))


def parts_are_known() -> bool:
    """Whether `on_each_device` knows each device's part: a mesh is set, or each device computes for itself (pmap)."""
    return _mesh() is not None or bool(jax.sharding.get_abstract_mesh().manual_axes)


def on_each_device(
    function: Callable[..., Array], arrays: Sequence[tuple[Array, tuple[str, ...]]], *, out: int
) -> Array:
    """function(*arrays), on the part that each device has by their logical axes: for what the compiler cannot cut.

    The result lies as the array of number `out`, with as many axes. Without a mesh it is function(*arrays).
    """
    mesh = _mesh()
    given = [x for x, _ in arrays]
    if mesh is None:
        return function(*given)
    places = tuple(spec(axes, x.shape, dict(mesh.shape)) for x, axes in arrays)
    # The check of what varies between devices wants kernels to say so of their results; theirs do not.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=places[out], check_vma=False)
    result: Array = mapped(*given)
    return result


def constrain_rows(x: Array) -> Array:
    """The array with its first axis spread over all devices, and the others whole; over fewer where it must."""
    mesh = _mesh()
    devices = 1 if mesh is None else math.prod(mesh.shape[name] for name in MESH_AXES["rows"])
    return constrain(x, "batch" if x.shape[0] % devices else "rows", *("none",) * (x.ndim - 1))


def constrain_cache(x: Array, key_heads: int | None = None) -> Array:
    """Keys or values of a cache, [..., B, key heads, S, head]: rows as in a batch, key heads over the axis `tensor`.

    Where the key heads do not divide, rows are spread over that axis as well rather than held by all of it.

    Args:
      key_heads: where `x` are queries instead, which lie as their keys do.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    rows, heads = x.shape[-4], x.shape[-3] if key_heads is None else key_heads
    return constrain(x, *("none",) * (x.ndim - 4), *cache_axes(rows, heads, dict(mesh.shape)))


def cache_axes(rows: int, heads: int, sizes: dict[str, int]) -> tuple[str, str, str, str]:
    """Logical axes of keys or values [B, key heads, S, head] on a mesh of these sizes."""
    if heads % sizes[TENSOR] and not rows % math.prod(sizes[name] for name in MESH_AXES["rows"]):
        return "rows", "none", "none", "none"
    return "batch", "heads", "none", "none"


@contextlib.contextmanager
def decoding(parts: int) -> Iterator[None]:
    """Within it, `parts` neighbours of the axis fsdp count as that many of the axis tensor; 0 changes nothing."""
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
    """Parameters for `decoding`: those that are cut in `dtype`, a whole copy for every `parts` × tensor devices.

    What fsdp cuts is gathered once, here, and not at each token. First the parts of a group change from a part of the
    width to a part of the heads, by an exchange, so that no device ever holds a whole matrix.
    Raises: ValueError where parts does not divide the axis fsdp.
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
# The mesh of `decoding`; JAX's own stays set, for arrays that came in under it may not meet another.
_REGROUPED: contextvars.ContextVar[AbstractMesh | None] = contextvars.ContextVar("regrouped", default=None)


def _regrouped(sizes: dict[str, int], parts: int, *, named: bool) -> AbstractMesh:
    """The same devices with fsdp cut in two, the parts an axis of their own (`named`) or of tensor."""
    data, fsdp, tensor = (sizes[name] for name in AXES)
    if fsdp % parts:
        raise ValueError(f"decode_parts {parts} does not divide the axis fsdp of {fsdp} devices")
    if named:
        return AbstractMesh(
            (data, fsdp // parts, parts, tensor), (DATA, FSDP, _PART, TENSOR), axis_types=(AxisType.Auto,) * 4
        )
    return AbstractMesh((data, fsdp // parts, parts * tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh() -> AbstractMesh | None:
    """The mesh that is set, None where there is none of ours or each device computes for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.manual_axes:
        return None
    regrouped = _REGROUPED.get()
    return mesh if regrouped is None else regrouped
