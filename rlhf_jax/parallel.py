"""The only file that knows devices: the mesh, and two ways of running one update body on many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_mesh(devices: int = 1) -> Mesh:
    """A mesh of the first `devices` devices along `data`; `fsdp` and `tensor` are there with size 1.

    Raises: UserError where there are fewer devices.
    """
    found = jax.devices()
    if devices > len(found):
        hint = (
            " (on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=N)" if found[0].platform == "cpu" else ""
        )
        raise UserError(f"devices: wanted {devices}, found {len(found)} of kind {found[0].device_kind}{hint}")
    # Auto: the compiler places what the shardings of the inputs leave open. The default since jax 0.9 is Explicit.
    return Mesh(np.array(found[:devices]).reshape(devices, 1, 1), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array of a tree whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch spread over the `data` axis by rows.

    Raises: UserError where the rows do not divide.
    """
    rows, devices = jax.tree.leaves(batch)[0].shape[0], mesh.shape[DATA]
    if rows % devices:
        raise UserError(
            f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(DATA)))


def jit_update(update: Update, mesh: Mesh) -> Update:
    """Compiles update(state, batch, *frozen) for a mesh: state and frozen networks replicated, the batch by rows.

    The arrays of `state` are given to the program (donated): use what it returns. A batch of one row set per process
    or per device is global here, so the body needs no axis name.
    """
    compiled = jax.jit(update, donate_argnums=0)

    def step(state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return compiled(state, shard_rows(batch, mesh), *frozen)

    return step


def pmap_update(update: Update, devices: int) -> Update:
    """Compiles update(state, batch, *frozen), made with axis_name="data", for one model replica a device.

    Takes and returns the same unmapped state as `jit_update`, so that checkpoints do not know which of them ran.
    Raises: UserError where there are fewer devices or the rows do not divide.
    """
    mesh = make_mesh(devices)
    compiled: dict[int, Any] = {}

    def step(state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(frozen) not in compiled:
            compiled[len(frozen)] = jax.pmap(
                update,
                axis_name=DATA,
                in_axes=(None, 0, *(None for _ in frozen)),
                out_axes=(None, None),
                devices=list(mesh.devices.flat),
            )
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % devices:
            raise UserError(
                f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
            )
        split = jax.tree.map(lambda x: np.asarray(x).reshape(devices, -1, *x.shape[1:]), batch)
        state, metrics = compiled[len(frozen)](state, split, *frozen)
        # Laid out as the first state was: pmap compiles anew for another layout.
        return replicate(state, mesh), metrics

    return step
