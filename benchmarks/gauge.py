"""One worker of a comparison: it makes a job ready, then runs one sample whenever it is told to.

The parent (compare.py) and its two workers, one of them in another environment, speak by lines of JSON over pipes. Only
the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Gauge:
    """Wall and own CPU seconds of a sample, and how many cores everything else used meanwhile."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        return time.perf_counter(), time.process_time(), busy / os.sysconf("SC_CLK_TCK")

    def stop(self) -> dict[str, float]:
        """Since the gauge was made: {"wall", "cpu", "others"}, seconds, seconds, cores."""
        wall, cpu, busy = (now - then for now, then in zip(self._now(), self._start))
        return {"wall": wall, "cpu": cpu, "others": max(0.0, (busy - cpu) / wall)}


class Worker:
    """This process's end of the pipes; what else it prints goes to its standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Says that the job is compiled and warm."""
        self._say({"ready": dict(facts)})

    def wait(self) -> bool:
        """Waits for the word to run a sample; False when there is none left, and says how much memory it took."""
        if sys.stdin.readline().strip() == "go":
            return True
        self._say({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
        return False

    def done(self, gauge: Gauge, work: float) -> None:
        """A sample of so much work is over."""
        self._say({"work": work, **gauge.stop()})

    def serve(self, sample: Callable[[], float], facts: Mapping[str, Any], warm_up: int = 2) -> None:
        """Runs `sample`, which returns the work it did, first to warm up and then as often as it is told to."""
        for _ in range(warm_up):
            sample()
        self.ready(facts)
        while self.wait():
            gauge = Gauge()
            self.done(gauge, sample())

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
