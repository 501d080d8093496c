"""Programs that a model writes, run against unit tests in a process of their own with limits."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from rlhf_jax.rewards import text_of
from rlhf_jax.verifiers.answers import listed, unfenced

# The limits are set by the child itself: code between fork and exec is not safe in a process with JAX's threads. The
# word is written only at the end, so that a program that exits early has not passed. What a program prints goes
# nowhere: one that prints without end would fill the memory of the process that reads.
_CHILD = """
import json, os, resource, sys
given = json.loads(sys.stdin.buffer.read())
verdict = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name, most in given["limits"].items():
    resource.setrlimit(getattr(resource, name), (most, most))
space = {"__name__": "__main__"}
exec(compile(given["program"], "answer.py", "exec"), space)
for test in given["tests"]:
    exec(compile(test, "tests.py", "exec"), space)
os.write(verdict, given["word"].encode())
"""


def unit_tests(
    completions: Sequence[Any], tests: Sequence[Any], *, seconds: float = 5.0, megabytes: int = 512
) -> list[float | None]:
    """1 where the Python program in a completion runs and passes the row's tests, else 0.

    Each program runs in a fresh Python process, in an empty folder that is deleted, without the environment's
    variables, with limits of time, memory and file size; the processes that it starts are killed with it. That stops
    accidents, not attacks: it has the user's rights and the network. Run models that you do not trust in a container.

    Args:
      completions: programs; a block fenced as Python is taken out of its fence.
      tests: column of tests, each a text of Python, such as "assert add(1, 2) == 3", or a list of them, of which all
        must pass; None for no verdict.
      seconds: limit of a program's running time.
      megabytes: limit of its memory.
    """

    def verdict(pair: tuple[Any, Any]) -> float | None:
        completion, several = pair
        if several is None:
            return None
        return float(passes(unfenced(text_of(completion), "python"), listed(several), seconds, megabytes))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(verdict, zip(completions, tests, strict=True)))


def passes(program: str, tests: Sequence[str], seconds: float, megabytes: int) -> bool:
    """True if the program and then all tests run to their end within the limits."""
    word = secrets.token_hex(16)
    limits = {
        "RLIMIT_AS": megabytes << 20,
        "RLIMIT_CPU": max(int(seconds) + 1, 1),
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    content = json.dumps({"program": program, "tests": list(tests), "word": word, "limits": limits}).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(content, timeout=seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            # The whole group: what the program has started lives on otherwise.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Not read to their end, which a process that has left the group may hold open.
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
    return said.decode(errors="replace") == word
