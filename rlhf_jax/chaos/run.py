"""The trials by name."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.chaos import damage, disk, guards, kills, restarts, rows, scripts, signals
from rlhf_jax.chaos.outcome import Command, Outcome

# The rest of what went wrong is of the same kinds.
SHOWN = 20


class Trial(NamedTuple):
    """A trial: (command, n, seed, an empty folder) -> its outcome; and the n that shows the guarantee."""

    run: Callable[[Command, int, int, Path], Outcome]
    n: int


TRIALS = {
    "kill": Trial(kills.kill, 100),
    "pipeline": Trial(kills.pipeline, 20),
    "sigterm": Trial(signals.sigterm, 24),
    "flip": Trial(damage.flip, 500),
    "fallback": Trial(damage.fallback, 100),
    "disk": Trial(disk.disk, 44),
    "lock": Trial(signals.lock, 10),
    "mismatch": Trial(restarts.mismatch, len(restarts.MISMATCHES)),
    "elastic": Trial(restarts.elastic, len(restarts.DEVICES) ** 2),
    "peer": Trial(scripts.peer, 20),
    "data": Trial(rows.data, 1000),
    "tokens": Trial(rows.tokens, 10_000),
    "guards": Trial(guards.guards, 20),
    "labels": Trial(scripts.labels, 50),
}


def try_out(command: Command, name: str, n: int | None, seed: int, folder: str) -> dict[str, Any]:
    """Runs a trial.

    Args:
      command: runs a command of the command line.
      name: one of TRIALS.
      n: number of faults; None for the trial's own.
      seed: random seed of the faults.
      folder: where to make a folder for its runs, which is removed; "" for the system's.

    Returns:
      Its outcome as plain JSON; "holds" says whether the guarantee does.
    """
    trial, began = TRIALS[name], time.monotonic()
    number = trial.n if n is None else n
    with tempfile.TemporaryDirectory(prefix="chaos_", dir=folder or None) as work:
        outcome = trial.run(command, number, seed, Path(work))
    return {
        "name": name,
        "n": number,
        "seed": seed,
        **outcome.counts,
        "seconds": round(time.monotonic() - began, 1),
        "holds": not outcome.wrong,
        "wrong": outcome.wrong[:SHOWN],
    }
