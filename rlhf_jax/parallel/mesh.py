"""Device meshes, placement of arrays on them, and two ways (jit, pmap) to run an update on many devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.sharding import AXES, DATA, FSDP, parameter_axes, spec

Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


class CompiledUpdate(Protocol):
    """A compiled update(state, batch, *frozen) for one mesh."""

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]: ...

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        """Compiles for these arguments without running: no array is donated.

        Args:
          state: the arrays, or only their shapes from `outline`.
        """
        ...


def use_cpu_devices(count: int) -> None:
    """Makes a CPU count as `count` devices, as --devices requests; other platforms are unaffected."""
    if (
        count > 1
        and processes.count() == 1
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        jax.config.update("jax_num_cpu_devices", count)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Makes a mesh of the first devices: `data` replicas, widths in `fsdp` shards, heads and vocabulary in `tensor`.

    Raises:
      UserError: if there are fewer devices.
    """
    devices, needed = jax.devices(), data * fsdp * tensor
    if needed > len(devices):
        hint = (
            "; on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=N" if devices[0].platform == "cpu" else ""
        )
        raise UserError(f"devices: expected {needed}, got {len(devices)} of kind {devices[0].device_kind}{hint}")
    shape = (data, fsdp, tensor)
    # Auto: the compiler chooses shardings that the inputs leave open. The default since jax 0.9 is Explicit.
    if needed == len(devices):
        # On a pod, make_mesh orders the devices so that neighbours on the mesh are neighbours on the pod.
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    return Mesh(np.array(devices[:needed]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def is_replicated(mesh: Mesh) -> bool:
    """True if every device holds the full model."""
    return all(size == 1 for name, size in mesh.shape.items() if name != DATA)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of a parameter, or of a moment of it, on the mesh, by its dotted path."""
    return NamedSharding(mesh, spec(parameter_axes(path, len(shape)), shape, dict(mesh.shape)))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of all leaves of a training state, of parameters or of an optimizer state."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        return sharding_of(jax.tree_util.keystr(path, simple=True, separator="."), tuple(leaf.shape), mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Places a state, or parameters, on the mesh by `shardings`."""
    return _put(tree, shardings(tree, mesh))


def copied(state: TrainState, mesh: Mesh) -> TrainState:
    """Copies the arrays of a state: an update donates them, and a frozen network may share some.

    One program copies all, since every program has to be loaded at start-up.
    """
    copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings(state, mesh))
    copy: TrainState = copies(state)
    return copy


def outline(make: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """The shapes of `place(make(), mesh)` without its arrays, except for the step; for `CompiledUpdate.prepare`."""
    state = jax.eval_shape(make)

    def one(leaf: Any, layout: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    shapes: TrainState = jax.tree.map(one, state, shardings(state, mesh))
    return dataclasses.replace(shapes, step=replicate(jnp.zeros((), jnp.int32), mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicates every array of a tree over all devices of the mesh."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def near(tree: Any, mesh: Mesh) -> Any:
    """Copies of replicated arrays on one device of this process, which is all that evaluation needs."""
    if processes.count() == 1:
        return jax.device_put(tree, mesh.devices.flat[0])
    return jax.tree.map(lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0), tree)


def _put(tree: Any, layout: Any) -> Any:
    """`jax.device_put` that also works with several processes; each passes the same values."""
    if processes.count() == 1:
        return jax.device_put(tree, layout)

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return processes.spread(leaf, sharding)

    return jax.tree.map(one, tree, layout)


def use_all(mesh: Mesh) -> None:
    """Checks that a multi-process mesh uses all devices.

    Raises:
      UserError: if some device of a process is not in the mesh.
    """
    idle = set(jax.devices()) - set(mesh.devices.flat)
    if processes.count() > 1 and idle:
        raise UserError(
            f"mesh: expected all {len(jax.devices())} devices of {processes.count()} processes, got "
            f"{mesh.devices.size} in {dict(mesh.shape)}; use --devices {len(jax.devices())}"
        )


def row_layout(mesh: Mesh) -> NamedSharding:
    """Layout of a batch, whose rows are sharded over the axes `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def row_places(mesh: Mesh) -> Callable[[int], np.ndarray] | None:
    """Returns batch rows -> sorted places of the rows on this process's devices; None with a single process."""
    if processes.count() == 1:
        return None

    def places(rows: int) -> np.ndarray:
        parts = row_layout(mesh).addressable_devices_indices_map((rows,)).values()
        return np.unique(np.concatenate([np.arange(rows)[part] for part in parts if part is not None]))

    return places


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """Shards a batch by rows over the axes `data` and `fsdp`; each process passes its own rows (`row_places`).

    Raises:
      UserError: if the number of rows is not divisible.
    """
    if processes.count() > 1:
        return _gather_rows(batch, mesh)
    rows, devices = jax.tree.leaves(batch)[0].shape[0], mesh.shape[DATA] * mesh.shape[FSDP]
    if rows % devices:
        raise UserError(
            f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
        )
    return jax.device_put(batch, row_layout(mesh))


def _gather_rows(batch: Any, mesh: Mesh) -> Any:
    """Assembles the global batch from the rows that each process passes."""
    shards, places = mesh.shape[DATA] * mesh.shape[FSDP], row_places(mesh)
    own = range(shards) if places is None else places(shards).tolist()

    def one(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        size = local.shape[0] // len(own)
        shape = (size * shards, *local.shape[1:])

        def part(index: Any) -> np.ndarray:
            # The shard's index among all, then its position among those that this process has read.
            at = own.index((index[0].start or 0) // size) * size
            return local[at : at + size]

        return jax.make_array_from_callback(shape, row_layout(mesh), part)

    return jax.tree.map(one, batch)


class _Jitted:
    """The result of `jit_update`."""

    def __init__(self, update: Update, mesh: Mesh) -> None:
        self._update = update
        self._mesh = mesh
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(self._mesh):
            result: tuple[TrainState, dict[str, jax.Array]] = self._jit(state)(
                state, shard_rows(batch, self._mesh), *frozen
            )
            return result

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        with jax.set_mesh(self._mesh):
            self._jit(state).lower(state, shard_rows(batch, self._mesh), *frozen).compile()

    def _jit(self, state: TrainState) -> Any:
        if self._compiled is None:
            # Otherwise the compiler might return a state with other shardings, and the next step would recompile.
            out = (shardings(state, self._mesh), None)
            self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return self._compiled


def jit_update(update: Update, mesh: Mesh) -> CompiledUpdate:
    """Compiles update(state, batch, *frozen) for a mesh: the state is sharded by the table, the batch by rows.

    The arrays of `state` are donated: use the returned state. The update sees the global batch, so it needs no axis
    name.
    """
    return _Jitted(update, mesh)


class _Mapped:
    """The result of `pmap_update`."""

    def __init__(self, update: Update, mesh: Mesh) -> None:
        self._update = update
        self._mesh = mesh
        self._compiled: dict[int, Any] = {}

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = self._pmap(len(frozen))(state, split_rows(batch, self._mesh.devices.size), *frozen)
        # Same sharding as the first state: pmap recompiles for another one.
        return replicate(state, self._mesh), metrics

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        self._pmap(len(frozen)).lower(state, split_rows(batch, self._mesh.devices.size), *frozen).compile()

    def _pmap(self, frozen: int) -> Any:
        if frozen not in self._compiled:
            self._compiled[frozen] = jax.pmap(
                self._update,
                axis_name=DATA,
                in_axes=(None, 0, *(None,) * frozen),
                out_axes=(None, None),
                devices=list(self._mesh.devices.flat),
            )
        return self._compiled[frozen]


def split_rows(batch: Any, devices: int) -> Any:
    """Splits the rows of a batch for pmap: [devices, rows / devices, …].

    Raises:
      UserError: if the number of rows is not divisible.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % devices:
        raise UserError(
            f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
        )
    return jax.tree.map(lambda x: np.asarray(x).reshape(devices, -1, *x.shape[1:]), batch)


def pmap_update(update: Update, devices: int) -> CompiledUpdate:
    """Compiles update(state, batch, *frozen), made with axis_name="data", for one model replica per device.

    Takes and returns the same unmapped state as `jit_update`, so that checkpoints do not depend on which of them ran.

    Raises:
      UserError: if there are fewer devices, or the number of rows is not divisible.
    """
    return _Mapped(update, make_mesh(devices))
