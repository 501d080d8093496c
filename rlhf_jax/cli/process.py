"""Running a command: exit status and final message, the compilation cache, and the summary table of a stage."""

from __future__ import annotations

import contextlib
import ctypes
import errno
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

from rlhf_jax.cli.before_after import lines_of, next_command, samples_of
from rlhf_jax.cli.flags import Cluster
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.report.run import write_run_report
from rlhf_jax.parallel import processes, stopping
from rlhf_jax.parallel.mesh import use_cpu_devices
from rlhf_jax.runs.atomic_files import user_cache
from rlhf_jax.runs.lifecycle import Finished, say
from rlhf_jax.runs.locks import hold
from rlhf_jax.runs.loop import Stopped

C = TypeVar("C")
S = TypeVar("S", bound=RunConfig)
# Errors of a disk: full, over its quota, read-only, broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
INTERRUPTED = "interrupted; the same command starts again, from its last checkpoint if it keeps any"


def run(work: Callable[[C], object], config: C, cluster: Cluster | None = None, *, again: str = "") -> NoReturn:
    """Runs a command's work and exits: 0 on success, 2 on a user error, 130 on Ctrl-C, 143 on SIGTERM.

    Args:
      again: the command line that resumes it.
    """
    try:
        with _interrupted_anywhere():
            if cluster is not None and cluster.distributed:
                join(cluster, config)
            work(config)
    except UserError as error:
        _exit(2, f"error: {error}")
    except BrokenPipeError:
        # The reader of the output, such as `head`, has exited; devnull avoids a second error at the flush on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # A file that the user named, or a full disk: the system's message is clear.
        if error.filename is None and error.errno not in FULL:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        _exit(2, f"error: {where}{error.strerror}")
    except KeyboardInterrupt:
        _exit(130, INTERRUPTED)
    except Stopped as stop:
        saved = f"saved after step {stop.step}; to resume:" if stop.saved else "nothing was saved; to start again:"
        if not stop.saved and stop.last is not None:
            saved = f"step {stop.step} was not saved, as it was a bad one; to resume from step {stop.last}:"
        _exit(128 + stop.signal, f"stopped, {saved} {again}", together=True)
    sys.exit(0)


def run_stage(work: Callable[[S], Finished], config: S) -> None:
    """Runs a stage and prints its summary as a table."""
    with hold(config.folder) if processes.is_first() else contextlib.nullcontext():
        again = processes.from_first((config.folder / "summary.json").exists)
        use_cpu_devices(config.device_count)
        finished = work(config)
        if processes.is_first():
            _tell(finished, config, again)


def _tell(finished: Finished, config: RunConfig, again: bool) -> None:
    """Prints the summary of a stage, samples, its report and the next command; `again` if it was finished before."""
    state = "was finished before; nothing was trained" if again else "finished"
    table = Table("figure", box=box.SIMPLE)
    table.add_column("value", justify="right")
    for name, value in finished.summary.items():
        if name != "warnings":
            table.add_row(name.replace("_", " "), _shown(value))
    table.add_row("peak resident memory", f"{peak_memory() / 2**30:.2f} GiB")
    # Before the table, which is what the user looks for: with several processes, the others have ended already.
    samples = samples_of(finished, config) if processes.count() == 1 else []
    print(f"{finished.run.path}: {finished.run.stage} {state}")
    Console(highlight=False).print(table)
    for line in lines_of(samples):
        print(line)
    if again:  # otherwise the trainer has just said them
        for warning in finished.summary.get("warnings", ()):
            say(f"warning: {warning}")
    following = next_command(finished.run, config, samples)
    print(f"report: {write_run_report(finished.run, samples, following)}")
    print(f"next: {following}")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_shown, value))
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes of host memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def use_compilation_cache() -> None:
    """Enables the persistent compilation cache, so that the next start does not recompile.

    It is in JAX_COMPILATION_CACHE_DIR if that is set, else below the user's cache folder. The memory used by
    compilation is returned to the system.
    """
    give_back_what_compiling_took()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def give_back_what_compiling_took() -> None:
    """Returns the memory that XLA's compiler has freed to the system, after each longer compilation.

    With the settings of `rlhf_jax.cli.startup` malloc would keep it, in addition to the arrays: a third of the memory
    of a small run.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim = ctypes.CDLL("libc.so.6").malloc_trim

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.3:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def join(cluster: Cluster, config: Any) -> None:
    """Connects to the other processes.

    Args:
      cluster: the flags that locate them.
      config: the command's config; on a CPU each process gets an equal share of its devices.
    """
    if cluster.processes:
        devices: int = config.device_count if isinstance(config, RunConfig) else config.devices
        use_cpu_devices(devices // cluster.processes)
    processes.initialize(cluster.coordinator, cluster.processes, cluster.process)


@contextlib.contextmanager
def _interrupted_anywhere() -> Iterator[None]:
    """Exits on a Ctrl-C that arrives inside a callback, such as JAX's garbage collection callback.

    Python would print a traceback there and continue.
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
    stopping.ending()
    processes.leave(status, line, together=together)
