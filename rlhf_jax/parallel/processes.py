"""Multi-process runs: initialization, barriers, values from the first process, and exit.

Without `initialize`, all functions behave as in a single process, at no cost. All processes run the same program with
the same settings and see the same folders; only the first writes there, except for the arrays of a checkpoint.
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
from rlhf_jax.parallel import stopping
from rlhf_jax.parallel.watchdog import BEAT, FIRST_TIME, STUCK, Watchdog

T = TypeVar("T")

PEER_LOST = 75
"""Exit status of a process that ends because another is lost: restart all (EX_TEMPFAIL)."""
HEARTBEAT = 15
"""Timeout in seconds of jax's own heartbeats, which do not need Python."""
_FOREVER = 24 * 3600 * 1000  # milliseconds; the watchdog ends a wait sooner


class _Cluster:
    """The connected processes."""

    def __init__(self) -> None:
        # The key-value store has no public API; Orbax and others use it in the same way.
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
        leave(PEER_LOST, f"error: {why}; restart all processes to resume from the last checkpoint")


_cluster: _Cluster | None = None


def initialize(coordinator: str = "", processes: int | None = None, process: int | None = None) -> None:
    """Connects to the other processes; must be called before anything else asks jax for devices.

    Args:
      coordinator: host and port of process 0. On a TPU pod, under Slurm or MPI all three are detected.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      UserError: if an argument is missing or invalid, or the connection fails.
    """
    global _cluster
    given = (bool(coordinator), processes is not None, process is not None)
    if any(given) and not all(given):
        raise UserError(
            f"distributed: expected all three of coordinator, processes and process, or none on a pod, got "
            f"{coordinator or None}, {processes} and {process}"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"process: expected a number from 0 to {processes - 1}, got {process}")
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"coordinator: expected HOST:PORT, got {coordinator!r}")
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
            f"distributed: {error} Detected no pod, Slurm or MPI; give --coordinator HOST:PORT --processes N "
            f"--process I"
        ) from None
    except RuntimeError as error:
        raise UserError(f"distributed: {coordinator}: {str(error).splitlines()[0]}") from None
    _cluster = _Cluster()
    sys.excepthook = _last_words
    atexit.register(_finish)
    _cluster.watchdog.start()


def count() -> int:
    """Number of processes."""
    return 1 if _cluster is None else _cluster.processes


def is_first() -> bool:
    """True in the first process, the one that writes files."""
    return _cluster is None or _cluster.process == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached this point."""
    if _cluster is not None:
        _cluster.calls += 1
        with _cluster.watchdog.waiting(name):
            _cluster.client.wait_at_barrier(f"rlhf_jax/{_cluster.calls}/{name}", _FOREVER)


def from_first(make: Callable[[], T]) -> T:
    """Returns in all processes the value that `make` returns in the first; it must be plain JSON."""
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
    """Runs `work` in the first process while the others wait."""
    from_first(lambda: [work(), None][1])


def slowest(seconds: float | None) -> float:
    """Time limit in seconds for work of a known duration.

    Args:
      seconds: the duration; None if unknown.
    """
    return FIRST_TIME if seconds is None else max(STUCK, 10 * seconds)


def phase(what: str, step: int, *, waits: bool = False, limit: float | None = None, may_compile: bool = False) -> None:
    """Reports to the watchdogs what this process is about to do in a step; see Watchdog.enter."""
    stopping.phase(what, step)
    if _cluster is not None:
        _cluster.watchdog.enter(what, step, waits=waits, limit=limit, may_compile=may_compile)


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Context of a training loop; after it the watchdogs impose no time limits."""
    try:
        yield
    finally:
        stopping.outside()
        if _cluster is not None and sys.exc_info()[0] is None:
            _cluster.watchdog.outside()


def stop_asked(step: int) -> bool:
    """True if any process has received SIGTERM; all processes get the same answer at the same step.

    Args:
      step: one more than in the previous call; every process must call it at every step.
    """
    if _cluster is None:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def everywhere(leaf: jax.Array) -> jax.Array:
    """Makes an array local to each process a replicated global array, as Orbax needs; global arrays are unchanged."""
    if _cluster is None or not leaf.is_fully_addressable:
        return leaf
    mesh = Mesh(np.array(jax.devices()), ("everyone",))
    return spread(leaf, NamedSharding(mesh, PartitionSpec()))


def spread(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Shards a value that every process holds in full over the devices of all processes."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = spread(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: jax.Array) -> np.ndarray:
    """Copies a full array to the host, even if other processes hold parts of it; called by all processes."""
    if _cluster is None or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def leave(status: int, line: str = "", *, together: bool = False) -> NoReturn:
    """Ends this process at once with a message, and notifies the others, which end too.

    Python's normal exit would wait for the others, and they might wait for this one.

    Args:
      status: exit status.
      line: message, printed to standard error.
      together: True if all processes leave for the same reason; only the first prints it.
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
        # The key-value store ends with process 0, and jax then ends the others silently: let them read it first.
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
