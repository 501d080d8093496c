"""One table: which axes of which array lie along which axis of the device mesh. It knows no device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rlhf_jax.arrays import Array

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)

# Logical axis -> mesh axes. Rows are spread over both axes of data parallelism; a width is cut by fsdp, where each
# device keeps a part and gathers a layer when it needs it; heads, hidden units and vocabulary by tensor, where each
# device computes its part.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
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


def spec(axes: Sequence[str], shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """Where an array of these logical axes lies; an axis whose length the mesh axes do not divide stays whole.

    Args:
      sizes: of the mesh's axes.
    """
    parts: list[Any] = []
    for axis, length in zip(axes, shape, strict=True):
        used = tuple(name for name in MESH_AXES[axis] if name in sizes and sizes[name] > 1)
        count = 1
        for name in used:
            count *= sizes[name]
        parts.append(used if used and length % count == 0 else None)
    return PartitionSpec(*parts)


def constrain(x: Array, *axes: str) -> Array:
    """The array, laid out by its logical axes on the mesh that is set (`jax.set_mesh`); itself without one.

    The compiler chooses most layouts from those of the parameters. This says it where a wrong choice costs: rows stay
    spread over the devices, rather than widths.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, dict(mesh.shape)))
