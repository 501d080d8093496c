"""How a command runs and ends: exit status and last line, compiled programs kept, the table of a stage's figures."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_jax.cli.flags import Cluster
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import use_cpu_devices
from rlhf_jax.runs.atomic_files import user_cache
from rlhf_jax.runs.lifecycle import Finished
from rlhf_jax.runs.loop import Stopped

C = TypeVar("C")
S = TypeVar("S", bound=RunConfig)
INTERRUPTED = "interrupted; the same command starts again, from its last checkpoint if it keeps any"


def run(work: Callable[[C], object], config: C, cluster: Cluster | None = None, *, again: str = "") -> NoReturn:
    """Runs a command's work and exits: 0 done, 2 a mistake of the user's, 130 Ctrl-C, 143 SIGTERM.

    Args:
      again: the command line that starts it again.
    """
    try:
        with _interrupted_anywhere():
            if cluster is not None and cluster.distributed:
                join(cluster, config)
            work(config)
    except UserError as error:
        _exit(2, f"error: {error}")
    except BrokenPipeError:
        # Whoever read the output has gone, such as `head`; nothing is left to be said to them at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None:
            raise
        # A file that the user named, or a disk that is full: the system's words say it.
        _exit(2, f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        _exit(130, INTERRUPTED)
    except Stopped as stop:
        saved = f"saved after step {stop.step}; to resume:" if stop.saved else "nothing was saved; to start again:"
        _exit(128 + stop.signal, f"stopped, {saved} {again}", together=True)
    sys.exit(0)


def run_stage(work: Callable[[S], Finished], config: S) -> None:
    """Runs a stage and prints the figures of its summary."""
    again = processes.from_first((config.folder / "summary.json").exists)
    use_cpu_devices(config.device_count)
    finished = work(config)
    if not processes.is_first():
        return
    state = "was finished before; nothing was trained" if again else "finished"
    table = Table("figure", box=box.SIMPLE)
    table.add_column("value", justify="right")
    for name, value in finished.summary.items():
        shown = "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    table.add_row("peak resident memory", f"{peak_memory() / 2**30:.2f} GiB")
    print(f"{finished.run.path}: {finished.run.stage} {state}")
    Console(highlight=False).print(table)


def peak_memory() -> int:
    """Most bytes that this process has held in the host's memory so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start need not compile them again.

    They lie in JAX_COMPILATION_CACHE_DIR if that is set, else below the user's cache folder. The memory that compiling
    took goes back to the system.
    """
    give_back_what_compiling_took()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def give_back_what_compiling_took() -> None:
    """After each longer compilation, returns the memory that XLA's compiler has freed to the system.

    With the settings of `rlhf_jax.cli.startup` malloc would keep it, and arrays would come on top of it: a third of a
    small run's memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim = ctypes.CDLL("libc.so.6").malloc_trim

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.3:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def join(cluster: Cluster, config: Any) -> None:
    """Finds the other processes. config: the command's; a CPU then counts as a part of its devices."""
    if cluster.processes:
        devices: int = config.device_count if isinstance(config, RunConfig) else config.devices
        use_cpu_devices(devices // cluster.processes)
    processes.initialize(cluster.coordinator, cluster.processes, cluster.process)


@contextlib.contextmanager
def _interrupted_anywhere() -> Iterator[None]:
    """Ends the process where Ctrl-C falls into a callback, such as JAX's of the garbage collector.

    Python would print a traceback there and go on.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        sys.stderr.write(INTERRUPTED + "\n")
        sys.stderr.flush()
        os._exit(130)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _exit(status: int, line: str, *, together: bool = False) -> NoReturn:
    processes.leave(status, line, together=together)
