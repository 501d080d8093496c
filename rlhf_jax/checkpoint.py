"""Checkpoints: a run's state on disk, complete and proven, or not there at all.

A step is a folder `00000200/` that holds Orbax's `params/` (what a later stage takes) and `training/` (the rest of the
state), and `manifest.json` with the shape of every array and the SHA-256 of every file. The folder is written under
another name, synced and renamed, so a killed save leaves the step before; deletion renames first, for the same reason.
Orbax finds neither a flipped bit nor a wrong dtype, so the manifest is checked before it reads.
One process writes; several processes are the business of a later issue.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_UNFINISHED, _DELETED, _DAMAGED = ".unfinished", ".deleted", ".damaged"
log = logging.getLogger("rlhf_jax")


class Damaged(Exception):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The checkpoints of one run: the last few and the best.

    Args:
      folder: where the steps are.
      keep_last: how many of the newest steps stay.
      best_metric: name of the metric by which one more step stays, the best; None for no such step.
      best_mode: whether the best is the lowest ("min") or the highest ("max").
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; a run needs at least 1 checkpoint to go on from")
        self.folder = Path(folder).absolute()
        self.keep_last = keep_last
        self.best_metric = best_metric
        self.best_mode = best_mode

    def steps(self) -> list[int]:
        """The finished steps, oldest first; a damaged one is among them until something reads it."""
        return saved_steps(self.folder)

    def latest(self) -> int | None:
        """The newest finished step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best value of `best_metric`, the newest of equals; None if no step has a value."""
        return best_step(self.folder)

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Writes a step, then deletes those no longer kept. Returns when everything is on the disk.

        Raises: UserError if the disk is full or refuses; the steps before are then untouched.
        """
        params, training = _params_of(state), _training_of(state)
        bytes_needed = sum(leaf.nbytes for leaf in (*params.values(), *training.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if free < bytes_needed:
            raise UserError(
                f"{self.folder}: no room for the checkpoint of step {step}: {free:,} bytes free, {bytes_needed:,} "
                f"needed; make room and start the same command again"
            )
        unfinished = self.folder / (_name(step) + _UNFINISHED)
        try:
            arrays = {"params": params, "training": training}
            for part, tree in arrays.items():
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                    checkpointer.save(unfinished / part, args=ocp.args.StandardSave(tree))
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "metrics": {k: float(v) for k, v in metrics.items() if math.isfinite(v)},
                "best": {"metric": self.best_metric, "mode": self.best_mode},
                "arrays": {part: _describe(tree) for part, tree in arrays.items()},
                "files": _seal(unfinished),
            }
            _write_synced(unfinished / MANIFEST, _with_own_hash(manifest))
            _sync_folder(unfinished)
            final = self.folder / _name(step)
            if final.exists():
                final.rename(self.folder / (_name(step) + _DELETED))
            unfinished.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written: {error.strerror or error}; "
                f"last good checkpoint: {self.latest()}"
            ) from error
        finally:
            self._sweep()
        self._prune()

    def restore(self, template: TrainState, step: int | None = None) -> TrainState:
        """The saved state, laid out over devices as the template is; the template itself if nothing is saved yet.

        A damaged newest step is set aside, named in a warning, and the one before is used.

        Args:
          template: a state of the wanted structure, shapes, dtypes and shardings; its values do not matter.
          step: a certain step, instead of the newest; then damage is an error.
        Raises: UserError if no saved step is intact, or if the state saved has other leaves, shapes or dtypes.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.folder}: no checkpoint of step {step}; there are {steps}")
        if not steps:
            return template
        for candidate in [step] if step is not None else reversed(steps):
            path = self.folder / _name(candidate)
            try:
                manifest = verify(path)
            except Damaged as damage:
                if step is not None:
                    raise UserError(f"{path}: damaged checkpoint: {damage}") from None
                log.warning(
                    "warning: checkpoint of step %d is damaged (%s); set aside as %s, using the one before",
                    candidate,
                    damage,
                    path.name + _DAMAGED,
                )
                _set_aside(path)
                continue
            return _restore(path, manifest, template)
        raise UserError(
            f"{self.folder}: none of the checkpoints {steps} is intact; to start from the beginning, use another "
            f"--name or remove the folder"
        )

    def close(self) -> None:
        """Removes what deletions left behind."""
        if self.folder.exists():
            self._sweep()

    def _prune(self) -> None:
        steps = self.steps()
        keep = {*steps[-self.keep_last :], self.best()}
        for step in steps:
            if step not in keep:
                path = self.folder / _name(step)
                path.rename(path.with_name(path.name + _DELETED))
        self._sweep()

    def _sweep(self) -> None:
        for path in self.folder.iterdir():
            if path.name.endswith((_UNFINISHED, _DELETED)):
                shutil.rmtree(path, ignore_errors=True)


def saved_steps(folder: Path) -> list[int]:
    """The finished steps in a folder of checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def best_step(folder: Path) -> int | None:
    """The best step by the metric that the newest readable manifest names; None if there is none."""
    manifests = {}
    for step in saved_steps(folder):
        try:
            manifests[step] = read_manifest(folder / _name(step))
        except Damaged:
            continue
    if not manifests:
        return None
    rule = manifests[max(manifests)]["best"]
    sign = -1.0 if rule["mode"] == "min" else 1.0
    scored = [
        (sign * m["metrics"][rule["metric"]], step) for step, m in manifests.items() if rule["metric"] in m["metrics"]
    ]
    return max(scored)[1] if scored else None


def load_params(folder: Path, which: Literal["last", "best"] = "last") -> dict[str, Any]:
    """The parameters of the last or best intact step, as nested dicts of numpy arrays; without best, the last.

    Raises: UserError if there is no checkpoint, or none that is intact.
    """
    steps = saved_steps(folder)
    best = best_step(folder) if which == "best" else None
    order = ([best] if best is not None else []) + [step for step in reversed(steps) if step != best]
    for step in order:
        path = folder / _name(step)
        try:
            manifest = verify(path, part="params")
        except Damaged as damage:
            log.warning("warning: %s is damaged (%s); using another checkpoint", path, damage)
            continue
        described = manifest["arrays"]["params"]
        shapes = {name: jax.ShapeDtypeStruct(tuple(d["shape"]), jnp.dtype(d["dtype"])) for name, d in described.items()}
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in shapes}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            flat = checkpointer.restore(
                path / "params", args=ocp.args.PyTreeRestore(item=shapes, restore_args=as_numpy)
            )
        return _nested({name: np.asarray(flat[name]) for name in described})
    raise UserError(f"{folder}: no intact checkpoint to take parameters from (steps found: {steps})")


def fingerprint(tree: Any) -> str:
    """SHA-256 in hex over the path, dtype, shape and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data if array.size and array.ndim else array.tobytes())
    return digest.hexdigest()


def verify(path: Path, part: str = "") -> dict[str, Any]:
    """Checks the files of a step, or those of one part of it, against the manifest, which it returns.

    Raises: Damaged, with the first file that is missing or differs.
    """
    manifest = read_manifest(path)
    for name, file in manifest["files"].items():
        if part and not name.startswith(part + "/"):
            continue
        try:
            if _sha256(path / name) != file["sha256"]:
                raise Damaged(f"{name} has other content than was written")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step, proven by its own hash. Raises: Damaged."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        own = manifest.pop("sha256")
        if own != _hash_of(manifest):
            raise Damaged(f"{MANIFEST} has other content than was written")
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} is unreadable") from None
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version: found {manifest['format_version']}, wanted {FORMAT_VERSION}; "
            f"use the release of rlhf_jax that wrote it"
        )
    return manifest


def _restore(path: Path, manifest: dict[str, Any], template: TrainState) -> TrainState:
    flat = {}
    for part, wanted in (("params", _params_of(template)), ("training", _training_of(template))):
        saved = manifest["arrays"][part]
        _compare(path, saved, _describe(wanted))
        abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in wanted.items()}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            flat[part] = checkpointer.restore(path / part, args=ocp.args.StandardRestore(abstract))
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    leaves = []
    for key_path, leaf in paths:
        name = _leaf_name(key_path)
        value = flat["params" if name.startswith("params.") else "training"][name]
        leaves.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _compare(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*saved, *wanted}):
        found, want = saved.get(name), wanted.get(name)
        if found != want:
            raise UserError(
                f"{path}: {name}: found {_show(found)}, wanted {_show(want)}; the run was saved by other settings"
            )


def _show(leaf: dict[str, Any] | None) -> str:
    return "nothing" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"


def _params_of(state: TrainState) -> dict[str, jax.Array]:
    """Leaves of the parameters, "params.layer.kernel" -> array."""
    for path, _ in jax.tree_util.tree_leaves_with_path(state.params):
        if not all(isinstance(key, jax.tree_util.DictKey) and _plain(key.key) for key in path):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)}: parameters must be nested dicts, keys text without dots"
            )
    return {name: leaf for name, leaf in _flat(state).items() if name.startswith("params.")}


def _training_of(state: TrainState) -> dict[str, jax.Array]:
    """Every other leaf of the state; keys as their data."""
    return {name: leaf for name, leaf in _flat(state).items() if not name.startswith("params.")}


def _flat(state: TrainState) -> dict[str, jax.Array]:
    leaves: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = _leaf_name(path)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(f"{name}: the state holds arrays only, found {type(leaf).__name__}")
        array = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
        if array.dtype != leaf.dtype and not _is_key(leaf):
            raise TypeError(f"{name}: {leaf.dtype} would be saved as {array.dtype}")
        if array.weak_type:
            # A restored array is never weakly typed; the resumed run would promote, and so round, differently.
            raise TypeError(f"{name}: weakly typed {array.dtype}; make it with jnp.{array.dtype}(…)")
        if name in leaves:
            raise TypeError(f"{name}: two leaves of the state have this path")
        leaves[name] = array
    return leaves


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(key: Any) -> bool:
    return isinstance(key, str) and "." not in key


def _leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _describe(tree: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in tree.items()}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split(".")[1:]
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return nested


def _name(step: int) -> str:
    return f"{step:08d}"


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + _DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def _seal(folder: Path) -> dict[str, Any]:
    """Syncs every file and folder below to the disk; size and SHA-256 of each file."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _with_own_hash(manifest: dict[str, Any]) -> str:
    return json.dumps({**manifest, "sha256": _hash_of(manifest)}, indent=1, sort_keys=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
