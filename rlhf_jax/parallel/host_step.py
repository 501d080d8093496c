"""Work of the host in the middle of a step: the devices compute rows, the host adds to the batch, the update follows.

Two compiled programs with Python between them, rather than one with a callback: compiled programs stay in the cache,
the host's code may itself use JAX, and its exceptions are Python's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.arrays import TrainState
from rlhf_jax.parallel import stopping
from rlhf_jax.parallel.mesh import CompiledUpdate, row_layout, shard_rows, split_rows
from rlhf_jax.parallel.sharding import DATA


class HostStep(NamedTuple):
    """What happens before the update.

    Attributes:
      make: axis name (None under jit) -> rows(state, batch, *frozen), a pure function whose arrays have one entry for
        each row of the batch.
      fill: (batch, those arrays in this process's memory) -> the update's batch.
      outline: batch -> an update's batch of the same shapes, to compile for.
      continued: (batch, those arrays, again) -> what `fill` gets in place of the arrays, where the host needs the
        devices several times: again(batch) are the arrays of another batch in the same state. All processes must call
        it as often as each other.
      further: batch -> a batch of the shapes that `again` is called with, to compile for.
      ahead: step -> its batch, None after the last step; with it, the devices compute the rows of the next step in this
        step's state, before its update, and the host fills them in while the update runs and those after them are
        computed. state.extras[AHEAD] holds the rows between two steps, so that a resumed run goes on with the same.
    """

    make: Callable[[str | None], Callable[..., Any]]
    fill: Callable[[Any, Any], Any]
    outline: Callable[[Any], Any]
    continued: Callable[[Any, Any, Callable[[Any], Any]], Any] | None = None
    further: Callable[[Any], Any] | None = None
    ahead: Callable[[int], Any | None] | None = None


AHEAD = "ahead"


def with_host_step(update: CompiledUpdate, step: HostStep, mesh: Mesh, *, pmap: bool) -> CompiledUpdate:
    """The update on the batch that the host has filled; several processes each fill their own rows.

    Args:
      update: result of `jit_update` for the mesh, or of `pmap_update`.
      step: the work before it.
      mesh: the mesh.
      pmap: True if the update is mapped; rows cannot be computed ahead then.
    """
    return _Stepped(update, step, mesh, pmap) if step.ahead is None else _Ahead(update, step, mesh, step.ahead)


class _Stepped:
    """The result of `with_host_step`."""

    def __init__(self, update: CompiledUpdate, step: HostStep, mesh: Mesh, pmap: bool) -> None:
        self._update = update
        self._step = step
        self._mesh = mesh
        self._pmap = pmap
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        stopping.phase("sampling")
        rows = self._rows(state, batch, *frozen)
        if self._step.continued is not None:
            rows = self._step.continued(batch, rows, lambda other: self._rows(state, other, *frozen))
        stopping.phase("computing rewards")
        filled = self._step.fill(batch, rows)
        stopping.phase("updating")
        return self._update(state, filled, *frozen)

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        for one in (batch,) if self._step.further is None else (batch, self._step.further(batch)):
            if self._pmap:
                self._program(len(frozen)).lower(state, split_rows(one, self._mesh.devices.size), *frozen).compile()
            else:
                with jax.set_mesh(self._mesh):
                    self._program(len(frozen)).lower(state, shard_rows(one, self._mesh), *frozen).compile()
        self._update.prepare(state, self._step.outline(batch), *frozen)

    def _rows(self, state: TrainState, batch: Any, *frozen: Any) -> Any:
        if self._pmap:
            found = self._program(len(frozen))(state, split_rows(batch, self._mesh.devices.size), *frozen)
            return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), found)
        return jax.tree.map(_own_rows, self._dispatched(state, batch, *frozen))

    def _dispatched(self, state: TrainState, batch: Any, *frozen: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._program(len(frozen))(state, shard_rows(batch, self._mesh), *frozen)

    def _program(self, frozen: int) -> Any:
        if self._compiled is None and self._pmap:
            self._compiled = jax.pmap(
                self._step.make(DATA),
                axis_name=DATA,
                in_axes=(None, 0, *(None,) * frozen),
                devices=list(self._mesh.devices.flat),
            )
        elif self._compiled is None:
            self._compiled = jax.jit(self._step.make(None), out_shardings=row_layout(self._mesh))
        return self._compiled


class _Ahead(_Stepped):
    """The result of `with_host_step` where rows are computed a step ahead."""

    def __init__(self, update: CompiledUpdate, step: HostStep, mesh: Mesh, ahead: Callable[[int], Any | None]) -> None:
        super().__init__(update, step, mesh, pmap=False)
        self._ahead = ahead
        # The step that comes next, and its batch once the host has filled it; None before the first.
        self._coming: tuple[int, Future[Any]] | None = None

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        bare, rows = _without_ahead(state), state.extras[AHEAD]
        if self._coming is None:
            # A run's first rows are computed in its initial state, those of a resumed one are in its state.
            step = int(state.step)
            self._coming = step, self._filled(batch, rows if step else self._dispatched(bare, batch, *frozen))
        step, filling = self._coming
        following = self._ahead(step + 1)
        stopping.phase("sampling")
        if following is not None:
            # The state that samples is that of this step, and draws as the next one would.
            rows = self._dispatched(dataclasses.replace(bare, step=bare.step + 1), following, *frozen)
        stopping.phase("computing rewards")
        filled = filling.result()
        stopping.phase("updating")
        new, metrics = self._update(bare, filled, *frozen)
        if following is not None:
            self._coming = step + 1, self._filled(following, rows)
        return dataclasses.replace(new, extras={**new.extras, AHEAD: rows}), metrics

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        super().prepare(_without_ahead(state), batch, *frozen)

    def _filled(self, batch: Any, rows: Any) -> Future[Any]:
        """The batch that the host fills in a thread: a daemon, as the program must not wait for a user's function."""
        future: Future[Any] = Future()

        def told(kind: Any, error: BaseException | None, trace: Any) -> bool:
            # Raised where the result is asked for.
            if error is not None:
                future.set_exception(error)
            return True

        def work() -> None:
            with contextlib.ExitStack() as stack:
                stack.push(told)
                future.set_result(self._step.fill(batch, jax.tree.map(_own_rows, rows)))

        threading.Thread(target=work, daemon=True, name="rewards ahead").start()
        return future


def _without_ahead(state: TrainState) -> TrainState:
    """The state that the programs get: rows ahead are not theirs, and would be donated while the host reads them."""
    return dataclasses.replace(state, extras={name: leaf for name, leaf in state.extras.items() if name != AHEAD})


def _own_rows(x: jax.Array) -> np.ndarray:
    """The rows on this process's devices, in the order of the batch that it passes to `shard_rows`."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
