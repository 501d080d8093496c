"""Detection of a dead or hung process in a multi-process run, where the others would wait forever.

Once a second every process publishes its state: its step, its activity, since when, and for how long that may last.
Each process evaluates the states by itself. Waiting for the devices or for another process is not a fault: a process is
hung if its own work keeps the others waiting for too long. The limit is learned, as ten times the longest duration so
far; an activity that happens for the first time may compile, and has an hour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from rlhf_jax.parallel import exit_reporter

BEAT = 1.0
"""Seconds between two heartbeats."""
SILENT = 10.0
"""Seconds without a heartbeat after which a process within a step counts as lost."""
STUCK = 20.0
"""Minimum number of seconds after which a process counts as hung."""
FIRST_TIME = 3600.0
"""Time limit in seconds for work that may have to compile."""
OUTSIDE = "the work outside its steps"


class Board(Protocol):
    """Key-value store shared by all processes, such as that of the coordinator."""

    def write(self, key: str, text: str) -> None:
        """Stores a text under a key, replacing the previous one.

        Raises:
          RuntimeError: if the store is lost.
        """

    def read(self, folder: str) -> Mapping[str, str]:
        """Returns all texts under keys `folder/NAME`, by NAME.

        Raises:
          RuntimeError: if the store is lost.
        """


@dataclasses.dataclass(frozen=True)
class Beat:
    """The state of a process.

    what: its activity. step: None outside the training loop. waits: True while it waits for other processes or the
    devices. age: seconds so far. limit: seconds it may take. compiles: True if Python threads may be blocked meanwhile.
    """

    what: str = OUTSIDE
    step: int | None = None
    waits: bool = False
    age: float = 0.0
    limit: float = math.inf
    compiles: bool = True

    @property
    def where(self) -> str:
        """Human-readable description."""
        return self.what if self.step is None else f"step {self.step} ({self.what})"


def verdict(beats: Mapping[int, Beat], silence: Mapping[int, float]) -> str | None:
    """Returns a message about a lost or hung process; None if all are well.

    Args:
      beats: process -> its last heartbeat.
      silence: process -> seconds since that arrived.
    """
    for process, seconds in silence.items():
        # While Python may be blocked, jax's own heartbeats, which do not need it, do the job.
        if seconds > SILENT and not beats[process].compiles:
            return (
                f"process {process} has sent no heartbeat for {seconds:.0f} s, the last one in {beats[process].where}"
            )
    late = {process: beat for process, beat in beats.items() if beat.age > beat.limit}
    for process, beat in late.items():
        if not beat.waits:
            return (
                f"process {process} is stuck in {beat.where}: expected {beat.limit:.0f} s or less, got {beat.age:.0f} s"
            )
    if late and all(beat.waits for beat in beats.values()):
        process, beat = min(late.items(), key=lambda item: item[1].step or 0)
        return f"the devices are stuck in {beat.where} of process {process} for {beat.age:.0f} s"
    return None


class Watchdog:
    """Sends the heartbeats of this process, and calls `lost` from a separate thread when the verdict is not None.

    Args:
      board: the store shared by all processes.
      process: index of this process.
      processes: number of processes.
      lost: called with the message; expected to end the process.
    """

    def __init__(self, board: Board, process: int, processes: int, lost: Callable[[str], object]) -> None:
        self.board, self.process, self.processes, self._lost = board, process, processes, lost
        self._now, self._since = Beat(), time.monotonic()
        self._longest: dict[str, float] = {}
        self._answered = time.monotonic()
        self._over = threading.Event()
        name = f"process {process} of {processes}"
        # Run as a file and not with -m, which would import the package: it should start in a few milliseconds.
        self._witness = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(exit_reporter.__file__)), name],
            stdin=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self) -> None:
        """Starts the heartbeat and listener threads."""
        for work in (self._beat, self._listen_to_the_board):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stops the threads and the exit reporter: the process ends normally, or has reported why not."""
        self._over.set()
        self._write_down(exit_reporter.SILENT)
        with contextlib.suppress(OSError):
            if self._witness.stdin is not None:
                self._witness.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._witness.wait(1.0)

    @property
    def now(self) -> Beat:
        """The current state of this process."""
        return dataclasses.replace(self._now, age=time.monotonic() - self._since)

    def enter(
        self,
        what: str,
        step: int | None = None,
        *,
        waits: bool = False,
        limit: float | None = None,
        may_compile: bool = False,
    ) -> None:
        """Starts a new activity of this process.

        Args:
          what: its name; activities with the same name are expected to take about as long.
          step: the training step; None outside the loop.
          waits: True if it waits for other processes or the devices.
          limit: seconds that it may take; None for the learned limit.
          may_compile: True if it may compile, during which Python threads may be blocked.
        """
        before, now = self._now, time.monotonic()
        # A first time, which may have compiled, counts as 0 s: it took longer than later ones will.
        self._longest[before.what] = max(
            self._longest.get(before.what, 0.0), 0.0 if before.compiles else now - self._since
        )
        first = may_compile or (limit is None and what not in self._longest)
        if limit is None:
            limit = FIRST_TIME if first else max(STUCK, 10 * self._longest[what])
        self._since = now
        self._now = Beat(what, step, waits, 0.0, limit, compiles=first)
        self._write_down(self._now.where)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Context in which this process waits for others, without a limit."""
        before, since = self._now, self._since
        self._now = Beat(f"waits: {what}", before.step, True, 0.0, math.inf, compiles=before.compiles)
        self._since = time.monotonic()
        self._write_down(self._now.where)
        yield
        # The interrupted activity resumes; the time spent waiting is not counted.
        self._now, self._since = before, since + time.monotonic() - self._since

    def outside(self) -> None:
        """Marks this process as outside any step, where nothing has a time limit."""
        self.enter(OUTSIDE, limit=math.inf, may_compile=True)

    def _write_down(self, where: str) -> None:
        if self._witness.stdin is not None and not self._witness.stdin.closed:
            with contextlib.suppress(OSError):
                self._witness.stdin.write(where + "\n")

    def _beat(self) -> None:
        seen: dict[int, str] = {}
        heard: dict[int, float] = {}
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            try:
                self.board.write(f"beat/{self.process}", _written(number, self.now))
                texts, farewells = self.board.read("beat"), self.board.read("farewell")
            except RuntimeError as error:
                self._end(f"process 0, which coordinates, is lost: {str(error).splitlines()[0]}")
                return
            now = self._answered = time.monotonic()
            for other, text in texts.items():
                if seen.get(int(other)) != text:
                    seen[int(other)], heard[int(other)] = text, now
            for other, text in farewells.items():
                if int(other) != self.process:
                    self._end(f"process {other} has ended: {text}")
                    return
            beats = {other: _read(text) for other, text in seen.items()}
            wrong = verdict(beats, {other: now - at for other, at in heard.items()})
            if wrong is not None:
                self._end(wrong)
                return

    def _listen_to_the_board(self) -> None:
        """Detects a suspended coordinator: it answers no call, so `_beat` may wait forever."""
        while not self._over.wait(BEAT):
            seconds = time.monotonic() - self._answered
            if seconds > SILENT and not self._now.compiles:
                self._end(f"process 0, which coordinates, has not answered for {seconds:.0f} s")

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._lost(why)


def _written(number: int, beat: Beat) -> str:
    """A heartbeat as JSON, with an infinite limit as null, since JSON has no infinity."""
    limit = beat.limit if math.isfinite(beat.limit) else None
    return json.dumps(dataclasses.asdict(beat) | {"limit": limit, "age": round(beat.age, 1), "number": number})


def _read(text: str) -> Beat:
    fields = json.loads(text)
    del fields["number"]
    return Beat(**fields | {"limit": math.inf if fields["limit"] is None else fields["limit"]})
