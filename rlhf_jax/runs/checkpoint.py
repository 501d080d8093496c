"""Checkpoints of a run's state, written atomically and verified when restored.

A step is a sealed folder `00000200/` (atomic_files.py) with two Orbax checkpoints: `params/`, which later stages read,
and `training/`, the rest of the state. It is written under another name and renamed, and a deletion renames first:
whenever the process is killed, every listed step is complete. Orbax itself detects neither a flipped bit nor a changed
dtype, so the manifest is checked before it reads. Only one run writes; each of its processes writes the shards of its
own devices, and the first process does the rest. The training loop waits only for the arrays to be copied; the writing,
the seal, the rename and the deletions run beside it, one save at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.files import UNFINISHED, sync_folder
from rlhf_jax.parallel import processes, stopping
from rlhf_jax.runs.atomic_files import Damaged, read_manifest, seal, verify
from rlhf_jax.runs.background import Background, collect_reports, quiet, refusal, saving_limit
from rlhf_jax.runs.saved_arrays import described, leaves_of, read_params, read_state, write

FORMAT_VERSION = 1
_DELETED, _REPLACED, _DAMAGED = ".deleted", ".replaced", ".damaged"
_log = logging.getLogger("rlhf_jax")


class Checkpoints:
    """The checkpoints of one run: the last few and the best.

    Args:
      folder: folder of the steps.
      keep_last: number of newest steps to keep.
      best_metric: metric by which the best step is kept as well; None to keep only the newest.
      best_mode: "min" if a lower metric is better, "max" if a higher one is.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: expected at least 1, to resume from, got {keep_last}")
        self.folder = Path(folder).absolute()
        self.keep_last = keep_last
        self.best_metric = best_metric
        self.best_mode = best_mode
        # If not None: later states may be bad, so the newest step up to this one is kept too.
        self.beyond_doubt: int | None = None
        self._background = Background()
        self._saving: int | None = None
        self._quiet = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """The saved steps, oldest first; a damaged one is included until `restore` detects it."""
        return saved_steps(self.folder)

    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.steps(), default=None)

    def newest_until(self, step: int) -> int | None:
        """The newest saved step that is not later than `step`, or None."""
        return max((saved for saved in self.steps() if saved <= step), default=None)

    def best(self) -> int | None:
        """The step with the best metric, the newest among equals; None if no step has the metric."""
        return best_step(self.folder)

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Saves a step, replacing an earlier one of that number, then deletes those no longer kept.

        Called by all processes. Returns when everything is on disk.

        Raises:
          UserError: if the disk is full or refuses the write; earlier steps are then unchanged.
        """
        self.save_in_background(step, state, metrics)
        self.finish()

    def save_in_background(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to save a step as `save` does, and returns as soon as the state may be donated to an update.

        A save that is still running is finished first. The step is listed once all of it is on disk. An error that
        occurs after the return is raised by the next call of `check`, `wait`, `finish` or this function.
        """
        self.wait()
        leaves = leaves_of(state)
        size = sum(leaf.nbytes for leaf in leaves.values())
        unfinished = self.folder / (_name(step) + UNFINISHED)
        about = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            "best": {"metric": self.best_metric, "mode": self.best_mode},
            "arrays": described(leaves),
        }
        # By the time this step is written, a later one may be in doubt.
        beyond_doubt = self.beyond_doubt
        self._saving = step
        self._quiet.enter_context(quiet())
        with self._refused_in_one_line():
            processes.by_first(lambda: self._make_room(size))
            arrays = write(unfinished, leaves, seconds=saving_limit(size))

        def finish() -> None:
            # Returns when the arrays of all processes are written.
            arrays.close()
            if processes.is_first():
                self._commit(unfinished, about)
                stopping.beside("deleting")
                self._prune(beyond_doubt)

        self._background.start(finish)

    def check(self) -> None:
        """Raises the error of a save in the background, if it has failed.

        Raises:
          UserError: as `save`.
        """
        if self._saving is not None and not self._background.running:
            self.wait()

    def wait(self) -> None:
        """Waits until this process has done its part of a save in the background.

        Raises:
          UserError: as `save`.
        """
        if self._saving is not None:
            with self._refused_in_one_line():
                self._background.join()
            self._quiet.close()
            self._saving = None

    def finish(self) -> None:
        """Waits until a save in the background is on disk. Called by all processes.

        Raises:
          UserError: as `save`.
        """
        self.wait()
        processes.barrier("saved")

    def _make_room(self, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: step {self._saving} needs {needed:,} bytes, the disk has {free:,} free; free disk "
                "space"
            )

    def _commit(self, unfinished: Path, about: Mapping[str, Any]) -> None:
        """Seals a written step and gives it its name."""
        seal(unfinished, about)
        final = unfinished.with_suffix("")
        if final.exists():
            final.rename(final.with_name(final.name + _REPLACED))
        unfinished.rename(final)
        sync_folder(self.folder)

    @contextlib.contextmanager
    def _refused_in_one_line(self) -> Iterator[None]:
        """Reports a write that the system refused as a UserError; after an error, removes what was written."""
        step, refused, written = self._saving, None, False
        try:
            yield
            written = True
        except (OSError, ValueError) as error:
            refused = refusal(error)
            if refused is None:
                raise
        finally:
            # A second Ctrl-C may interrupt the waiting, but not the save.
            if not written and not self._background.running:
                if refused is not None:
                    collect_reports()
                self._quiet.close()
                self._saving = None
                if processes.is_first():
                    self._sweep()
        if refused is not None:
            latest = self.latest()
            last = "there is no earlier one" if latest is None else f"the last checkpoint is that of step {latest}"
            raise UserError(f"{self.folder}: step {step} could not be saved: {refused}; {last}")

    def restore(self, template: TrainState, step: int | None = None) -> TrainState:
        """Restores the saved state, sharded like the template.

        A damaged newest step is renamed with a warning, and the step before it is used.

        Args:
          template: a state with the expected structure, shapes, dtypes and shardings; its values do not matter.
          step: a specific step instead of the newest; damage is then an error.

        Returns:
          The restored state, or the template itself if nothing is saved yet.

        Raises:
          UserError: if no saved step is intact, or if the saved state has other leaves, shapes or dtypes.
        """
        self.wait()
        chosen = processes.from_first(lambda: self._intact(step))
        if chosen is None:
            return template
        path = self.folder / _name(chosen)
        return read_state(path, _manifest(path)["arrays"], template)

    def _intact(self, step: int | None) -> int | None:
        """The newest intact step, or the requested one; None if nothing is saved yet. See `restore`."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.folder}: step: expected one of the saved steps {steps}, got {step}")
        if not steps:
            return None
        for candidate in [step] if step is not None else reversed(steps):
            path = self.folder / _name(candidate)
            try:
                verify(path)
            except Damaged as damage:
                if step is not None:
                    raise UserError(f"{path}: damaged: {damage}") from None
                aside = path.with_name(path.name + _DAMAGED)
                _log.warning(
                    "warning: %s is damaged (%s); renamed to %s, trying the one before", path, damage, aside.name
                )
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                continue
            return candidate
        raise UserError(
            f"{self.folder}: none of the checkpoints {steps} is intact; remove the run's folder to start from the "
            f"beginning, or give another --name"
        )

    def close(self) -> None:
        """Finishes a save in the background, and removes the unfinished files of killed processes."""
        self.wait()
        if self.folder.is_dir() and processes.is_first():
            self._sweep()

    def _prune(self, beyond_doubt: int | None) -> None:
        steps = self.steps()
        good = None if beyond_doubt is None else self.newest_until(beyond_doubt)
        for step in {*steps[: -self.keep_last]} - {self.best(), good}:
            path = self.folder / _name(step)
            path.rename(path.with_name(path.name + _DELETED))
        self._sweep()

    def _sweep(self) -> None:
        for path in self.folder.glob("*" + _REPLACED):
            # The process was killed between the two renames, before the new step got its name: restore the old one.
            whole = path.with_suffix("")
            path.rename(path.with_suffix(_DELETED) if whole.exists() else whole)
        for path in self.folder.iterdir():
            if path.name.endswith((UNFINISHED, _DELETED)):
                shutil.rmtree(path, ignore_errors=True)


def saved_steps(folder: Path) -> list[int]:
    """The saved steps in a folder of checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def best_step(folder: Path) -> int | None:
    """The best step by the metric named in the newest readable manifest, the newest among equals; None without one."""
    manifests = []
    for step in saved_steps(folder):
        try:
            manifests.append(_manifest(folder / _name(step)))
        except Damaged:
            continue
    if not manifests:
        return None
    metric, mode = manifests[-1]["best"]["metric"], manifests[-1]["best"]["mode"]
    sign = -1.0 if mode == "min" else 1.0
    values = [(sign * m["metrics"][metric], int(m["step"])) for m in manifests if metric in m["metrics"]]
    return max(values)[1] if values else None


def load_params(folder: Path, which: Literal["last", "best"] | int = "last") -> dict[str, Any]:
    """The parameters of the last, the best or a given step: `load_step` without the number of the step."""
    return load_step(folder, which)[1]


def load_step(folder: Path, which: Literal["last", "best"] | int = "last") -> tuple[int, dict[str, Any]]:
    """Loads the parameters of the last, the best or a given step: (step, parameters as nested dicts of numpy arrays).

    A damaged step is reported in a warning, and the newest intact one is used, but not in place of a given step.
    Without a best step the last is used.

    Raises:
      UserError: if there is no intact step.
    """
    folder = folder.absolute()
    steps = saved_steps(folder)
    best = best_step(folder) if which == "best" else None
    wanted = [*([] if best is None else [best]), *(step for step in reversed(steps) if step != best)]
    for step in [which] if isinstance(which, int) else wanted:
        path = folder / _name(step)
        try:
            verify(path, "params")
            arrays = _manifest(path)["arrays"]
        except Damaged as damage:
            _log.warning("warning: %s is damaged (%s); trying another", path, damage)
            continue
        return step, read_params(path, arrays)
    raise UserError(f"{folder}: no intact checkpoint to take parameters from; the steps there are {steps}")


def fingerprint(tree: Any) -> str:
    """Hex SHA-256 over the path, dtype, shape and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def first_bad(value: np.ndarray) -> str | None:
    """The first entry of an array that is not finite, with its index; None if all are finite."""
    finite = np.isfinite(value)
    if finite.all():
        return None
    place = np.unravel_index(int(np.argmin(finite)), value.shape)
    return f"{float(value[place])} at {list(map(int, place))}"


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {manifest.get('format_version')}; use the "
            f"release of rlhf_jax that wrote it"
        )
    return manifest


def _name(step: int) -> str:
    return f"{step:08d}"
