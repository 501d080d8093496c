"""The only file that knows devices: the mesh, and two ways of running one update body on many of them."""

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
    """update(state, batch, *frozen) for one mesh."""

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]: ...

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        """Compiles what a call with these arguments would, and runs nothing: no array is given away.

        Args:
          state: the arrays themselves or, from `outline`, only their shapes.
        """
        ...


def use_cpu_devices(count: int) -> None:
    """Lets a CPU count as `count` devices, which --devices asks for; other machines have the devices they have."""
    if (
        count > 1
        and processes.count() == 1
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        jax.config.update("jax_num_cpu_devices", count)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first devices: `data` replicas, `fsdp` parts of each width, `tensor` parts of heads and vocabulary.

    Raises: UserError where there are fewer devices.
    """
    found, wanted = jax.devices(), data * fsdp * tensor
    if wanted > len(found):
        hint = (
            " (on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=N)" if found[0].platform == "cpu" else ""
        )
        raise UserError(f"devices: wanted {wanted}, found {len(found)} of kind {found[0].device_kind}{hint}")
    shape = (data, fsdp, tensor)
    # Auto: the compiler places what the shardings of the inputs leave open. The default since jax 0.9 is Explicit.
    if wanted == len(found):
        # On a pod the order of the devices decides which of them are neighbours.
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    return Mesh(np.array(found[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def is_replicated(mesh: Mesh) -> bool:
    """Whether every device holds the whole model."""
    return all(size == 1 for name, size in mesh.shape.items() if name != DATA)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a parameter, or a moment of it, lies on the mesh, by its dotted path."""
    return NamedSharding(mesh, spec(parameter_axes(path, len(shape)), shape, dict(mesh.shape)))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a state, of parameters or of an optimizer's state."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        return sharding_of(jax.tree_util.keystr(path, simple=True, separator="."), tuple(leaf.shape), mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """A state, or parameters, laid out on the mesh."""
    return _put(tree, shardings(tree, mesh))


def copied(state: TrainState, mesh: Mesh) -> TrainState:
    """Arrays of their own, laid out alike: an update is given the state's, which a frozen network may share.

    By one program, since a start has to load each.
    """
    copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings(state, mesh))
    found: TrainState = copies(state)
    return found


def outline(make: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """What `place(make(), mesh)` would be, for `CompiledUpdate.prepare`: its step, and else shapes without arrays."""
    state = jax.eval_shape(make)

    def one(leaf: Any, layout: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    shapes: TrainState = jax.tree.map(one, state, shardings(state, mesh))
    return dataclasses.replace(shapes, step=replicate(jnp.zeros((), jnp.int32), mesh))


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """(dotted path, host array) -> the array on the mesh: how a reader of files puts one tensor after the other."""
    return lambda path, host: _put(host, sharding_of(path, host.shape, mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array of a tree whole on every device of the mesh."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def near(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every device holds whole, on one device of this process: evaluation wants no more of them."""
    if processes.count() == 1:
        return jax.device_put(tree, mesh.devices.flat[0])
    return jax.tree.map(lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0), tree)


def _put(tree: Any, layout: Any) -> Any:
    """`jax.device_put`, where other processes may hold a part of the devices; they put the same values."""
    if processes.count() == 1:
        return jax.device_put(tree, layout)

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return processes.spread(leaf, sharding)

    return jax.tree.map(one, tree, layout)


def use_all(mesh: Mesh) -> None:
    """Raises: UserError where one of several processes has no part in the mesh, or has an idle device."""
    idle = set(jax.devices()) - set(mesh.devices.flat)
    if processes.count() > 1 and idle:
        raise UserError(
            f"mesh: found {mesh.devices.size} devices in {dict(mesh.shape)}, wanted all {len(jax.devices())} of "
            f"{processes.count()} processes; use --devices {len(jax.devices())}"
        )


def _row_layout(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def row_places(mesh: Mesh) -> Callable[[int], np.ndarray] | None:
    """Rows of the batch -> places of those that this process's devices hold, ascending; None if it is all of them."""
    if processes.count() == 1:
        return None

    def places(rows: int) -> np.ndarray:
        parts = _row_layout(mesh).addressable_devices_indices_map((rows,)).values()
        return np.unique(np.concatenate([np.arange(rows)[part] for part in parts if part is not None]))

    return places


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch spread by rows over the axes `data` and `fsdp`; of several processes, each gives its rows (`row_places`).

    Raises: UserError where the rows do not divide.
    """
    if processes.count() > 1:
        return _gather_rows(batch, mesh)
    rows, devices = jax.tree.leaves(batch)[0].shape[0], mesh.shape[DATA] * mesh.shape[FSDP]
    if rows % devices:
        raise UserError(
            f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
        )
    return jax.device_put(batch, _row_layout(mesh))


def _gather_rows(batch: Any, mesh: Mesh) -> Any:
    """The global batch of which every process gives its rows."""
    shards, places = mesh.shape[DATA] * mesh.shape[FSDP], row_places(mesh)
    own = range(shards) if places is None else places(shards).tolist()

    def one(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        size = local.shape[0] // len(own)
        shape = (size * shards, *local.shape[1:])

        def part(index: Any) -> np.ndarray:
            # The number of a shard, and where it stands among those that this process has read.
            at = own.index((index[0].start or 0) // size) * size
            return local[at : at + size]

        return jax.make_array_from_callback(shape, _row_layout(mesh), part)

    return jax.tree.map(one, batch)


class _Jitted:
    """What `jit_update` returns."""

    def __init__(self, update: Update, mesh: Mesh) -> None:
        self._update = update
        self._mesh = mesh
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(self._mesh):
            found: tuple[TrainState, dict[str, jax.Array]] = self._jit(state)(
                state, shard_rows(batch, self._mesh), *frozen
            )
            return found

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        with jax.set_mesh(self._mesh):
            self._jit(state).lower(state, shard_rows(batch, self._mesh), *frozen).compile()

    def _jit(self, state: TrainState) -> Any:
        if self._compiled is None:
            # Without this the compiler might return a state that lies otherwise, and the next step compile anew.
            out = (shardings(state, self._mesh), None)
            self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return self._compiled


def jit_update(update: Update, mesh: Mesh) -> CompiledUpdate:
    """Compiles update(state, batch, *frozen) for a mesh: state and frozen networks by the table, the batch by rows.

    The arrays of `state` are given to the program (donated): use what it returns. The batch is global here, so the body
    needs no axis name.
    """
    return _Jitted(update, mesh)


class _Mapped:
    """What `pmap_update` returns."""

    def __init__(self, update: Update, mesh: Mesh) -> None:
        self._update = update
        self._mesh = mesh
        self._compiled: dict[int, Any] = {}

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = self._pmap(len(frozen))(state, self._split(batch), *frozen)
        # Laid out as the first state was: pmap compiles anew for another layout.
        return replicate(state, self._mesh), metrics

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        self._pmap(len(frozen)).lower(state, self._split(batch), *frozen).compile()

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

    def _split(self, batch: Any) -> Any:
        rows, devices = jax.tree.leaves(batch)[0].shape[0], self._mesh.devices.size
        if rows % devices:
            raise UserError(
                f"batch {rows} is not divisible by {devices} devices; use --batch {max(rows - rows % devices, devices)}"
            )
        return jax.tree.map(lambda x: np.asarray(x).reshape(devices, -1, *x.shape[1:]), batch)


def pmap_update(update: Update, devices: int) -> CompiledUpdate:
    """Compiles update(state, batch, *frozen), made with axis_name="data", for one model replica a device.

    Takes and returns the same unmapped state as `jit_update`, so that checkpoints do not know which of them ran.
    Raises: UserError where there are fewer devices or the rows do not divide.
    """
    return _Mapped(update, make_mesh(devices))
