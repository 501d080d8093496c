"""The trials of `rlhf-jax chaos` in short form, each again with its guarantee broken, for test_chaos.py.

python -m tests.chaos_short

Prints a line of JSON for each: the trial, whether it is broken, and its outcome. First those that fork, which must not
have started JAX.
"""

import contextlib
import functools
import importlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rlhf_jax.chaos import kills, restarts, rows, signals, small
from rlhf_jax.chaos.run import try_out
from rlhf_jax.cli import process
from rlhf_jax.cli.app import main
from rlhf_jax.runs import checkpoint, loop
from rlhf_jax.runs.atomic_files import read_manifest
from rlhf_jax.runs.metrics import JsonLines
from rlhf_jax.tokenizers.bpe import Tokenizer

UNDISTURBED = small.undisturbed
KEPT: dict[Path, dict[str, Any]] = {}


def undisturbed(kept: Path, command: Any, stage: str, data: Path, runs: Path, **options: Any) -> dict[str, Any]:
    """A run that is left in peace is made once, for all trials, and copied; before anything is broken, too."""
    run = kept / (f"{stage} {options}" if stage == "ppo" else stage)
    if run not in KEPT:
        KEPT[run] = UNDISTURBED(command, stage, data, runs, **options)
        shutil.copytree(runs / stage, run)
    else:
        shutil.copytree(run, runs / stage)
    return KEPT[run]


# Only the first stage, which is compiled soonest.
ONE_STAGE: dict[Any, dict[str, Any]] = {
    small: {"OFTEN": (*small.OFTEN, "--examples", "0")},
    kills: {"TURNS": ("pretrain",), "STAGES": ("pretrain",)},
    signals: {
        "PHASES": {
            "step": ("pretrain", ("waiting for the devices",)),
        },
        # Bars of quiet machines.
        "REFUSED": 60.0,
        "ANSWERED": 60.0,
    },
    restarts: {"DEVICES": (2,)},
}


def uncut(self: JsonLines, step: int, steps: int) -> None:
    """Keeps the rows that a killed run wrote after its last checkpoint."""
    self.close()


@contextlib.contextmanager
def deaf() -> Iterator[loop._Received]:
    """The training loop's handlers, which do not hear SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield loop._Received()


def unchecked(folder: Any, part: str = "") -> Any:
    """Believes every file."""
    return read_manifest(folder)


def resumable(data: Any, runs: Any) -> list[str]:
    """A start that fits what is there."""
    return restarts._resumed(data, runs)


READ, DECODE = rows.read_records, Tokenizer.decode
FITS = {"stage": restarts.Mismatch(restarts._nothing, resumable, "stage")}
# (name, n, what is broken: module or class, name, in its place)
SHORT: list[tuple[str, int, tuple[Any, str, Any] | None]] = [
    ("kill", 2, (JsonLines, "start", uncut)),
    ("pipeline", 1, None),
    ("sigterm", 1, (loop, "_signals", deaf)),
    ("mismatch", 1, (restarts, "MISMATCHES", FITS)),
    ("elastic", 1, None),
    ("data", 40, (rows, "read_records", lambda *given: READ(*given)[1:])),
    ("tokens", 60, (Tokenizer, "decode", lambda self, ids: DECODE(self, ids).rstrip())),
    ("lock", 1, (signals, "REFUSED", 0.0)),
    ("disk", 4, None),
    ("fallback", 3, (checkpoint, "verify", unchecked)),
    ("flip", 12, (checkpoint, "verify", unchecked)),
]


# One kill is enough to see that rows are doubled.
N_OF_BROKEN = {"kill": 1}


def run(name: str, n: int, broken: bool) -> None:
    """Prints the outcome of a trial."""
    print(json.dumps({"trial": name, "broken": broken} | try_out(main, name, n, 0, "")), flush=True)


if __name__ == "__main__":
    for stage in ("pretrain", "sft", "reward", "ppo"):
        importlib.import_module(f"rlhf_jax.trainers.{stage}")
    process.use_compilation_cache()
    with contextlib.ExitStack() as short:
        kept = functools.partial(undisturbed, Path(short.enter_context(tempfile.TemporaryDirectory())))
        for module, changes in ONE_STAGE.items():
            for name, value in (changes | ({"undisturbed": kept} if module is not small else {})).items():
                short.enter_context(patch.object(module, name, value))
        for name, n, broken in SHORT:
            run(name, n, False)
            if broken is not None:
                with patch.object(*broken):
                    run(name, N_OF_BROKEN.get(name, n), True)
