"""Notices a process that is lost, dead or alive but stuck, where one of several waits for ever otherwise.

Every process tells all others once a second where it is: in which step, at what, since when, and how long that may
take. Each of them judges by itself. To wait for the devices, or for another process, is no fault: a process is stuck
that keeps the others waiting, at something of its own that takes too long. How long is too long is learned, ten times
the longest so far; what happens for the first time may compile, and has an hour.
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
"""Seconds between two beats."""
SILENT = 10.0
"""Seconds without a beat after which a process within a step is lost."""
STUCK = 20.0
"""The least number of seconds after which a process is stuck."""
FIRST_TIME = 3600.0
"""Seconds for what may have to compile."""
OUTSIDE = "the work outside its steps"


class Board(Protocol):
    """What all processes write on and read from, such as the coordinator's table of keys and values."""

    def write(self, key: str, text: str) -> None:
        """Puts a text under a key, over the one before. Raises: RuntimeError if the board is lost."""

    def read(self, folder: str) -> Mapping[str, str]:
        """All texts under keys `folder/NAME`, by NAME. Raises: RuntimeError if the board is lost."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where a process is.

    what: it does. step: None outside the training loop. waits: for others or the devices. age: seconds so far.
    limit: seconds this may take. compiles: Python may stand still meanwhile.
    """

    what: str = OUTSIDE
    step: int | None = None
    waits: bool = False
    age: float = 0.0
    limit: float = math.inf
    compiles: bool = True

    @property
    def where(self) -> str:
        """For a person."""
        return self.what if self.step is None else f"step {self.step} ({self.what})"


def verdict(beats: Mapping[int, Beat], silence: Mapping[int, float]) -> str | None:
    """What is wrong with which process, in words; None as long as nothing is.

    Args:
      beats: process -> its last beat.
      silence: process -> seconds since that came.
    """
    for process, seconds in silence.items():
        # Where Python may stand still there are jax's own heartbeats, which need none.
        if seconds > SILENT and not beats[process].compiles:
            return f"process {process} has said nothing for {seconds:.0f} s, the last thing in {beats[process].where}"
    late = {process: beat for process, beat in beats.items() if beat.age > beat.limit}
    for process, beat in late.items():
        if not beat.waits:
            return f"process {process} is stuck in {beat.where} for {beat.age:.0f} s, wanted {beat.limit:.0f} or less"
    if late and all(beat.waits for beat in beats.values()):
        process, beat = min(late.items(), key=lambda item: item[1].step or 0)
        return f"the devices are stuck in {beat.where} of process {process} for {beat.age:.0f} s"
    return None


class Watchdog:
    """Beats for this process, and calls `lost` from a thread of its own when the verdict on any process is not None.

    Args:
      process, processes: this one's number, and of how many.
    """

    def __init__(self, board: Board, process: int, processes: int, lost: Callable[[str], object]) -> None:
        self.board, self.process, self.processes, self._lost = board, process, processes, lost
        self._now, self._since = Beat(), time.monotonic()
        self._longest: dict[str, float] = {}
        self._answered = time.monotonic()
        self._over = threading.Event()
        name = f"process {process} of {processes}"
        # Not by import: it starts with each process, and shall cost a few milliseconds.
        self._witness = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(exit_reporter.__file__)), name],
            stdin=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self) -> None:
        """Begins to beat and to listen."""
        for work in (self._beat, self._listen_to_the_board):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """The process ends as it should, or has said why not."""
        self._over.set()
        self._write_down(exit_reporter.SILENT)
        with contextlib.suppress(OSError):
            if self._witness.stdin is not None:
                self._witness.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._witness.wait(1.0)

    @property
    def now(self) -> Beat:
        """Where this process is."""
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
        """This process turns to something else.

        Args:
          what: it is about to do; what has the same name takes about as long.
          waits: for other processes or the devices.
          limit: seconds that it may take; None for what is learned.
          may_compile: and Python may stand still meanwhile.
        """
        before, now = self._now, time.monotonic()
        # What was done for the first time took longer than it will again; that it was done counts all the same.
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
        """Within it, this process waits for others, for as long as they need."""
        before, since = self._now, self._since
        self._now = Beat(f"waits: {what}", before.step, True, 0.0, math.inf, compiles=before.compiles)
        self._since = time.monotonic()
        self._write_down(self._now.where)
        yield
        # What was interrupted goes on, without the time that others took.
        self._now, self._since = before, since + time.monotonic() - self._since

    def outside(self) -> None:
        """This process is in no step: how long anything takes there is nobody's business."""
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
        """A coordinator that is stopped answers no call, and a call may wait for ever."""
        while not self._over.wait(BEAT):
            seconds = time.monotonic() - self._answered
            if seconds > SILENT and not self._now.compiles:
                self._end(f"process 0, which coordinates, has not answered for {seconds:.0f} s")

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._lost(why)


def _written(number: int, beat: Beat) -> str:
    """JSON, which knows no infinity."""
    limit = beat.limit if math.isfinite(beat.limit) else None
    return json.dumps(dataclasses.asdict(beat) | {"limit": limit, "age": round(beat.age, 1), "number": number})


def _read(text: str) -> Beat:
    fields = json.loads(text)
    del fields["number"]
    return Beat(**fields | {"limit": math.inf if fields["limit"] is None else fields["limit"]})
