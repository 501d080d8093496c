"""Arrays of a training state on disk: two Orbax checkpoints, `params/` and `training/`, of arrays by dotted name."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.arrays import TrainState, nested
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes

_PARTS = ("params", "training")
# One for each save; the same in all processes.
_numbers = itertools.count()


def leaves_of(state: TrainState) -> dict[str, jax.Array]:
    """Map names such as "params.layer.kernel" and "opt_state.0.count" to leaves; random keys become their data."""
    leaves: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = _leaf_name(path)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(f"{name}: expected an array, got {type(leaf).__name__}")
        array = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
        if array.dtype != leaf.dtype and not _is_key(leaf):
            raise TypeError(f"{name}: {leaf.dtype} would be saved as {array.dtype}")
        if array.weak_type:
            # A restored array is never weakly typed, so the resumed run would promote, and so round, differently.
            raise TypeError(f"{name}: weakly typed; make it with jnp.{array.dtype}(…)")
        if name in leaves:
            raise TypeError(f"{name}: two leaves of the state have this name")
        leaves[name] = processes.everywhere(array)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.params):
        # Later stages rebuild the parameters from these names, without a template.
        if not all(isinstance(key, jax.tree_util.DictKey) and "." not in str(key.key) for key in path):
            raise TypeError(f"params{jax.tree_util.keystr(path)}: parameters are nested dicts with no dots in the keys")
    return leaves


def write(folder: Path, leaves: Mapping[str, jax.Array], *, seconds: float) -> contextlib.ExitStack:
    """Starts to write a state's arrays, and returns when an update may overwrite them.

    Orbax copies the arrays to the host. On a CPU it keeps references to them instead, and XLA donates no array that
    something else refers to.

    Args:
      folder: a new folder for the parts.
      leaves: the arrays.
      seconds: how long all processes together may take.

    Returns:
      A context whose `close` waits until all processes have written their arrays, and raises the errors of this one.
    """
    number = next(_numbers)
    with contextlib.ExitStack() as writing:
        for part in _PARTS:
            checkpointer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.options.AsyncOptions(int(seconds), create_directories_asynchronously=False),
                # Processes meet under this name, in threads that run at the same time.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=f"rlhf_jax/{number}/{part}"
                ),
            )
            writing.enter_context(checkpointer)
            checkpointer.save(folder / part, args=ocp.args.StandardSave(_part(leaves, part)))
        return writing.pop_all()


def read_state(path: Path, saved: Mapping[str, Any], template: TrainState) -> TrainState:
    """Read a state, sharded like the template.

    Args:
      path: folder of the parts.
      saved: shape and dtype of each array there.
      template: a state with the expected structure, shapes, dtypes and shardings.

    Raises:
      UserError: if the template has other arrays.
    """
    leaves = leaves_of(template)
    expected = described(leaves)
    # Parameters first: a difference in them shows in the optimizer state too, where it is harder to understand.
    for name in sorted({*saved, *expected}, key=lambda name: (not name.startswith("params."), name)):
        if saved.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {name}: expected {_show(expected.get(name))}, got {_show(saved.get(name))}; it was saved "
                "with other settings"
            )
    restored: dict[str, jax.Array] = {}
    for part in _PARTS:
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _part(leaves, part).items()
        }
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            restored |= checkpointer.restore(path / part, args=ocp.args.StandardRestore(abstract))
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree_util.tree_unflatten(
        treedef, [_like(leaf, restored[_leaf_name(key_path)]) for key_path, leaf in paths]
    )


def read_params(path: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parameters of a state as nested dicts of numpy arrays.

    Args:
      path: folder of the parts.
      saved: shape and dtype of each array there.
    """
    abstract = {
        name: jax.ShapeDtypeStruct(about["shape"], jnp.dtype(about["dtype"]))
        for name, about in _part(saved, "params").items()
    }
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in abstract}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=as_numpy)
        flat = checkpointer.restore(path / "params", args=arguments)
    return nested({name.removeprefix("params."): np.asarray(leaf) for name, leaf in flat.items()})


def _part(leaves: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if name.startswith("params.") == (part == "params")}


def _is_key(leaf: Any) -> TypeGuard[jax.Array]:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(leaf: Any, value: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value


def _leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def described(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Shape and dtype of each array, as plain JSON."""
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}


def _show(described: Mapping[str, Any] | None) -> str:
    return "nothing" if described is None else f"{described['dtype']}{described['shape']}"
