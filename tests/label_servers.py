"""Labelling servers that start in a moment: forks of a process that has imported what the command does.

python -m tests.label_servers SOCKET: for each message, the arguments of `rlhf-jax label` as JSON with the pipe that it
writes to, forks a server and answers its process id.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import IO, Any

from tests.stress.label_stress import Server


class ForkedServer(Server):
    """What `Server` is, without the seconds in which Python imports."""

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(folder, *flags)
        self._arguments = self._command[2:]
        self._process_id = 0
        self._said: IO[str] | None = None

    def start(self) -> None:
        """Returns once it serves. Raises: RuntimeError with what it said if it ended instead."""
        reading, writing = os.pipe()
        socket.send_fds(_forker(), [json.dumps(self._arguments).encode()], [writing])
        os.close(writing)
        self._process_id = int(_forker().recv(100))
        self._said = os.fdopen(reading, encoding="utf-8")
        said = []
        for line in self._said:
            said.append(line)
            name, _, link = line.rstrip().partition(": http")
            self.links[name] = f"http{link}"
            if line.startswith("serving"):
                return
        raise RuntimeError("".join(said))

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is closed."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._said is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process_id, number)
            with self._said:
                self._said.read()  # to its end, which is that of the process
            self._said = None


@functools.cache
def _forker() -> socket.socket:
    """A connection to the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.label_servers", f"{theirs.fileno()}"]
    root = Path(__file__).parents[1]
    process: subprocess.Popen[bytes] = subprocess.Popen(command, cwd=root, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(arguments: list[str], out: int) -> None:
    from rlhf_jax.cli.app import main

    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code: Any = 1
    try:
        main(["label", *arguments])
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _fork_forever(descriptor: int) -> None:
    import uvicorn  # noqa: F401

    import rlhf_jax.cli.app
    import rlhf_jax.cli.labelling
    import rlhf_jax.feedback.server  # noqa: F401

    warnings.simplefilter("ignore")  # JAX warns of any fork; here it has no thread yet
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 100_000, 1)
        if not message:
            return
        process = os.fork()
        if not process:
            asked.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _serve(json.loads(message), descriptors[0])
        os.close(descriptors[0])
        asked.send(f"{process}".encode())


if __name__ == "__main__":
    _fork_forever(int(sys.argv[1]))
