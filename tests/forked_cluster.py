"""A cluster whose processes start in a moment: forks of a process that has imported what a run does.

That process is multiprocessing's fork server, which imports this file before its first fork.
"""

import atexit
import gc
import multiprocessing
import os
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import rlhf_jax.cli.process
import rlhf_jax.trainers.pretrain  # noqa: F401
from scripts.local_cluster import Cluster
from tests.stress import cluster_stress

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class Child:
    """What `Cluster` uses of a subprocess.Popen."""

    def __init__(self, process: ForkServerProcess, out: Connection, err: Connection) -> None:
        self._process = process
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno()), errors="replace") for pipe in (out, err))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)


class ForkedCluster(Cluster):
    """The processes of one start of `cluster_stress.py --be-struck`."""

    def _start(self, command: list[str], environment: dict[str, str]) -> Any:
        (out, its_out), (err, its_err) = (CONTEXT.Pipe(duplex=False) for _ in range(2))
        process = CONTEXT.Process(target=_run, args=(command[2:], environment, its_out, its_err), daemon=True)
        process.start()
        its_out.close()
        its_err.close()
        return Child(process, out, err)


def _run(arguments: list[str], environment: dict[str, str], out: Connection, err: Connection) -> None:
    """What a fork does, with the end that a Python of its own would have."""
    os.environ.update(environment)
    os.setsid()
    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    status: Any = 0
    try:
        cluster_stress.be_struck(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as error:  # noqa: BLE001  # as the interpreter does
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if "pytest" not in sys.modules:  # the fork server
    warnings.simplefilter("ignore")  # JAX warns of any fork; here it has no thread yet
    gc.collect()
    gc.freeze()
