"""Processes that are struck: forks of one that has imported all that a command needs, but has not started JAX.

A start costs the command's own work alone. The fork strikes itself when it enters a phase (`parallel.stopping`), so
that it is known where a signal landed: the line that says so is written directly before the signal is sent.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.parallel import stopping

PATIENCE = 600.0
"""Seconds after which a start counts as hung and is killed."""


@dataclasses.dataclass
class Strike:
    """A signal that a process sends to itself.

    Attributes:
      number: the signal.
      phases: phases in which it may land; any if empty.
      after: first step in which it may land.
      seed: random seed of the moment within the phase.
    """

    number: signal.Signals
    phases: tuple[str, ...] = ()
    after: int = 0
    seed: int = 0

    def arm(self, record: int) -> None:
        """Starts to listen. record: file descriptor for the line that says where it landed."""
        self._record, self._dice, self._step = record, random.Random(self.seed), 0
        self._lock, self._over = threading.Lock(), False
        # Of the loop and of what runs beside it: the phase and when it began.
        self._now: dict[bool, tuple[str, float]] = {}
        self._took: dict[str, float] = {}
        self._entered = collections.Counter[str]()
        stopping.listen(self._enter)
        self._enter(stopping.READING, None)

    def _enter(self, what: str, step: int | None) -> None:
        beside, now = what.startswith("beside: "), time.monotonic()
        before, since = self._now.get(beside, ("", now))
        self._took[before] = now - since
        self._now[beside] = (what, now)
        if not beside and step is not None:
            self._step = step
        if (not self.phases or what in self.phases) and self._step >= self.after and what != "beside: ":
            # Where in the phase, by how long it took the last time.
            delay = self._dice.random() * min(self._took.get(what, 0.05), 2.0)
            self._entered[what] += 1
            if self._entered[what] > 3 and delay < 0.002:
                # It is over before a thread has started: it is struck as it begins.
                self._strike(beside, self._now[beside], 0.0)
                return
            threading.Thread(target=self._strike, args=(beside, self._now[beside], delay), daemon=True).start()

    def _strike(self, beside: bool, entered: tuple[str, float], delay: float) -> None:
        time.sleep(delay)
        with self._lock:
            if self._over or self._now[beside] is not entered:
                return
            self._over = True
            now = time.monotonic()
            landed = {"phase": entered[0], "step": self._step, "inside": round(now - entered[1], 4), "at": now}
            os.write(self._record, json.dumps(landed).encode() + b"\n")
            os.kill(os.getpid(), self.number)
        if self.number == signal.SIGKILL:
            time.sleep(60)


@dataclasses.dataclass(frozen=True)
class End:
    """How a start ended.

    Attributes:
      status: exit status, or -N for signal N.
      said: what it wrote on standard error.
      landed: where the strike landed; None if it did not.
      seconds: from the strike, or else from the start, to the end.
    """

    status: int
    said: str
    landed: dict[str, Any] | None
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that it wrote."""
        return self.said.strip().rpartition("\n")[2]


def start(work: Callable[..., object], *arguments: Any, strike: Strike | None = None) -> End:
    """Calls work(*arguments) in a fork, which runs to its end or until the strike ends it."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as record:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of any fork; here it has not started
            child = os.fork()
        if child == 0:
            _be_struck(functools.partial(work, *arguments), strike, said.fileno(), record.fileno())
        status = _wait(child, began)
        ended = time.monotonic()
        said.seek(0)
        record.seek(0)
        lines = record.read().splitlines()
        landed = json.loads(lines[0]) if lines else None
        since = began if landed is None else landed.pop("at")
        return End(status, said.read().decode("utf-8", "replace"), landed, ended - since)


def result(work: Callable[..., Any], *arguments: Any) -> Any:
    """The plain JSON that work(*arguments) returns in a fork.

    Raises:
      UserError: with the end of what it wrote, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        end = start(lambda: path.write_text(json.dumps(work(*arguments))))
        if end.status != 0:
            raise UserError(f"chaos: a process that is left in peace ended with {end.status}: {end.said[-2000:]}")
        return json.loads(path.read_text())


def _be_struck(work: Callable[[], object], strike: Strike | None, said: int, record: int) -> None:
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(said, number)
        if strike is not None:
            strike.arm(record)
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    finally:
        if status == 70:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _wait(child: int, began: float) -> int:
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > PATIENCE:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
