"""A package that reads a policy's text, in a process of its own, which alone ends if it hangs or takes all memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from rlhf_jax.errors import UserError, install_command

# What the package prints, or warns of, goes nowhere: a pipe that nobody reads would stop it. An error in `answer` is
# that of a package with a text that it did not expect, and no verdict.
_CHILD = """
import json, os, resource, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the step that is being finished needs the answers
{code}
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
out = os.fdopen(os.dup(1), "w")
for stream in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
print("null", file=out, flush=True)
for line in sys.stdin:
    try:
        said = answer(json.loads(line))
    except Exception:
        said = None
    print(json.dumps(said), file=out, flush=True)
"""


class Worker:
    """Answers questions by Python code that runs in another process, which starts with the first question.

    Args:
      name: of the function that asks, for errors.
      package: that the code imports, as pip knows it.
      code: defines `answer(question)`; both are plain JSON.
    """

    def __init__(self, name: str, package: str, code: str) -> None:
        self.name = name
        self.package = package
        self.code = code
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        atexit.register(self.close)

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer; None if the process gives none in time, which it does not survive, or fails.

        Raises:
          UserError: if the package is not installed, or the code does not start.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()  # it has died since the last answer, which says nothing of this question
            process = self._process or self._start()
            try:
                _pipe(process.stdin).write(json.dumps(question) + "\n")
                _pipe(process.stdin).flush()
                said = self._lines.get(timeout=seconds)
            except (BrokenPipeError, queue.Empty):
                said = ""
            if not said:
                self.close()
                return None
            return json.loads(said)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    _pipe(pipe).close()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        self._lines = queue.Queue()
        with tempfile.TemporaryFile("w+") as errors:
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(code=self.code)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each thread reserves memory that counts here
            )
            threading.Thread(target=_read, args=(_pipe(process.stdout), self._lines), daemon=True).start()
            said = ""
            with contextlib.suppress(queue.Empty):
                said = self._lines.get(timeout=60.0)
            if said:
                return process
            self.close()
            errors.seek(0)
            error = errors.read()
        if f"No module named '{self.package.replace('-', '_')}'" in error:
            raise UserError(f"{self.name}: requires the package {self.package}; run: {install_command('verify')}")
        reason = (error.strip().splitlines() or ["no answer in a minute"])[-1]
        raise UserError(f"{self.name}: {self.package} did not start: {reason}")


@functools.cache
def worker(name: str, package: str, code: str) -> Worker:
    """The `Worker` with these arguments, one for the whole program."""
    return Worker(name, package, code)


def _read(pipe: IO[str], lines: queue.Queue[str]) -> None:
    """Hands the lines of a process on, and "" at its end."""
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in pipe:
            lines.put(line)
    lines.put("")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise TypeError("a process without pipes")
    return pipe
