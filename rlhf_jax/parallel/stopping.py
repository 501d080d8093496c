"""SIGTERM is answered within seconds in any phase of a training command. Imports no JAX.

Python runs a signal's handler only between two of its own instructions, so a process that compiles, or computes a long
step, would not answer. A thread is told by the system at once, and ends the process after GRACE seconds: every file is
whole at any time, so the same command resumes from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

GRACE = 8.0
"""Seconds from SIGTERM until the process ends, if it has not finished its step and saved by then."""
SAVING = 60.0
"""The same while it saves, also in the background."""
READING = "reading models and data"


class _Now:
    """The phase of this process, and whether it is ending by itself."""

    def __init__(self) -> None:
        self.phase = READING
        self.beside = ""
        self.listener: Callable[[str, int | None], None] = lambda phase, step: None
        self.ending = False
        self.again = ""
        self.pipe: tuple[int, int] | None = None


_now = _Now()


def answer_sigterm(again: str) -> None:
    """Has this process answer SIGTERM; called in the main thread before anything takes long.

    Args:
      again: the command line that resumes the work.
    """
    _now.again = again
    if _now.pipe is None:
        _now.pipe = os.pipe()
        os.set_blocking(_now.pipe[1], False)
        signal.set_wakeup_fd(_now.pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_wait, args=(_now.pipe[0],), name="stopping", daemon=True).start()
    signal.signal(signal.SIGTERM, _end)


def phase(what: str, step: int | None = None) -> None:
    """Says what the process is about to do, for the message, and in which step."""
    _now.phase = what
    _now.listener(what, step)


def beside(what: str) -> None:
    """Says what is done for a checkpoint beside the training loop; nothing if empty."""
    _now.beside = what
    _now.listener(f"beside: {what}", None)


def listen(listener: Callable[[str, int | None], None]) -> None:
    """Has a function called with each phase and its step, and with "beside: …", in the thread that enters it."""
    _now.listener = listener


def outside() -> None:
    """Says that the training loop is over."""
    phase("evaluating")


def ending() -> None:
    """Says that the process is about to exit with its own message."""
    _now.ending = True


def _end(number: int = 0, frame: Any = None) -> None:
    """Ends the process at once. An exception would turn up in the middle of an import or of foreign code."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    os.write(2, f"stopped while {_now.phase}; to start or resume: {_now.again}\n".encode())
    os._exit(128 + signal.SIGTERM)


def _wait(pipe: int) -> None:
    while signal.SIGTERM not in os.read(pipe, 64):
        pass
    since = time.monotonic()
    while time.monotonic() - since < (SAVING if _now.beside or _now.phase == "saving" else GRACE):
        time.sleep(0.05)
        if _now.ending:
            return
    if not _now.ending:
        _end()
