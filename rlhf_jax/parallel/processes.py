"""Several processes as one: how they start, who is the first, how they wait for each other, how one leaves.

Without `initialize`, everything here is as in the one process there is, at no cost. All processes run the same program
on the same settings and see the same folders; the first alone writes there, except for the arrays of a checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.parallel.watchdog import BEAT, FIRST_TIME, STUCK, Watchdog

T = TypeVar("T")

PEER_LOST = 75
"""Exit status of a process that ends because another is lost: start all again (EX_TEMPFAIL)."""
HEARTBEAT = 15
"""Seconds after which jax's own heartbeats, which need no Python, end the others."""
_FOREVER = 24 * 3600 * 1000  # milliseconds; the watchdog ends a wait sooner


class _Cluster:
    """The processes, once they have found each other."""

    def __init__(self) -> None:
        # The table of keys and values has no public name; Orbax and others use it in the same way.
        from jax._src import distributed

        self.process, self.processes = jax.process_index(), jax.process_count()
        self.client: Any = distributed.global_state.client
        self.calls = 0
        self.watchdog = Watchdog(self, self.process, self.processes, self._lost)

    def write(self, key: str, text: str) -> None:
        """See watchdog.Board."""
        self.client.key_value_set(f"rlhf_jax/{key}", text, allow_overwrite=True)

    def read(self, folder: str) -> Mapping[str, str]:
        """See watchdog.Board."""
        found = self.client.key_value_dir_get(f"rlhf_jax/{folder}/")
        return {key.rpartition("/")[2]: text for key, text in found}

    def _lost(self, why: str) -> NoReturn:
        leave(PEER_LOST, f"error: {why}; start all processes again to go on from the last checkpoint")


_cluster: _Cluster | None = None


def initialize(coordinator: str = "", processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes; to be called before anything else asks jax for devices.

    Args:
      coordinator: host and port of process 0. On a TPU pod, under Slurm or MPI all three are found.
      processes: how many there are.
      process: number of this one, from 0.
    Raises: UserError where something is missing or does not fit.
    """
    global _cluster
    given = (bool(coordinator), processes is not None, process is not None)
    if any(given) and not all(given):
        raise UserError(
            f"distributed: found coordinator {coordinator or None}, processes {processes}, process {process}; wanted "
            f"all three, or none on a pod"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"process: found {process}, wanted a number from 0 to {processes - 1}")
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"coordinator: found {coordinator!r}, wanted HOST:PORT")
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=120,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise UserError(
            f"distributed: {error} Found no pod, Slurm or MPI around; give --coordinator HOST:PORT --processes N "
            f"--process I"
        ) from None
    except RuntimeError as error:
        raise UserError(f"distributed: {coordinator}: {str(error).splitlines()[0]}") from None
    _cluster = _Cluster()
    sys.excepthook = _last_words
    atexit.register(_finish)
    _cluster.watchdog.start()


def count() -> int:
    """How many processes there are."""
    return 1 if _cluster is None else _cluster.processes


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _cluster is None or _cluster.process == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if _cluster is not None:
        _cluster.calls += 1
        with _cluster.watchdog.waiting(name):
            _cluster.client.wait_at_barrier(f"rlhf_jax/{_cluster.calls}/{name}", _FOREVER)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, plain JSON, in all processes."""
    if _cluster is None:
        return make()
    _cluster.calls += 1
    if _cluster.process == 0:
        value = make()
        _cluster.write(f"said/{_cluster.calls}", json.dumps(value))
        return value
    with _cluster.watchdog.waiting("for the first process"):
        text = _cluster.client.blocking_key_value_get(f"rlhf_jax/said/{_cluster.calls}", _FOREVER)
    return typing.cast(T, json.loads(text))


def by_first(work: Callable[[], object]) -> None:
    """Lets the first process do something that the others wait for."""
    from_first(lambda: [work(), None][1])


def slowest(seconds: float | None) -> float:
    """The limit, in seconds, of what is known to take some; None where it is not."""
    return FIRST_TIME if seconds is None else max(STUCK, 10 * seconds)


def phase(what: str, step: int, *, waits: bool = False, limit: float | None = None, may_compile: bool = False) -> None:
    """Tells the watchdogs what this process is about to do in a step; see Watchdog.enter."""
    if _cluster is not None:
        _cluster.watchdog.enter(what, step, waits=waits, limit=limit, may_compile=may_compile)


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Within it this process is in a training loop; behind it nobody asks how long anything takes."""
    try:
        yield
    finally:
        if _cluster is not None and sys.exc_info()[0] is None:
            _cluster.watchdog.outside()


def stop_asked(step: int) -> bool:
    """Whether any process has got SIGTERM; the answer is the same in all of them at the same step.

    Args:
      step: one more than at the call before; every process asks at every step.
    """
    if _cluster is None:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def everywhere(leaf: jax.Array) -> jax.Array:
    """An array that every process has whole, as one array over all devices, as Orbax wants them; others as they are."""
    if _cluster is None or not leaf.is_fully_addressable:
        return leaf
    mesh = Mesh(np.array(jax.devices()), ("everyone",))
    return spread(leaf, NamedSharding(mesh, PartitionSpec()))


def spread(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A value that every process has whole, laid out over devices of all processes."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = spread(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array on the host, also where other processes hold parts of it; all processes call it."""
    if _cluster is None or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def leave(status: int, line: str = "", *, together: bool = False) -> NoReturn:
    """Ends this process at once, says why, and tells the others, who end too.

    Python's own way out would wait for the others, and they might wait for this one.

    Args:
      together: all processes leave for the same reason; the first says it.
    """
    if together:
        barrier("leaving")
    if _cluster is None or together:
        if line and is_first():
            print(line, file=sys.stderr)  # noqa: T201
        sys.exit(status)
    where = _cluster.watchdog.now.where
    sys.stderr.write(
        f"{line or f'error: status {status}'} (process {_cluster.process} of {_cluster.processes}, in {where})\n"
    )
    _cluster.watchdog.stop()
    if status != PEER_LOST:
        _tell_the_others(_cluster, f"{line.removeprefix('error: ')}, in {where}")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _tell_the_others(cluster: _Cluster, text: str) -> None:
    def tell() -> None:
        with contextlib.suppress(RuntimeError):
            cluster.write(f"farewell/{cluster.process}", text)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(2.0)
    if cluster.process == 0:
        # With it goes the board, and jax ends whoever still looks at it without a word.
        time.sleep(3 * BEAT)


def _last_words(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    said = str(error)
    if not (issubclass(kind, RuntimeError) and any(word in said for word in ("Gloo", "coordination", "UNAVAILABLE"))):
        sys.__excepthook__(kind, error, trace)
    leave(1, f"error: {kind.__name__}: {said.splitlines()[0] if said else ''}")


def _finish() -> None:
    if _cluster is not None:
        barrier("the end")
        _cluster.watchdog.stop()
        jax.distributed.shutdown()
