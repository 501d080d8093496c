"""A full disk of any size: one line, nothing left over, and the same command resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import TrainState
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.errors import UserError
from rlhf_jax.files import LEFTOVERS
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import JsonLines
from rlhf_jax.tokenizers.bpe import Tokenizer

# A tmpfs in a namespace of its own: a disk that is full at will, and no file of the user's is near.
MOUNT = 'mount -t tmpfs -o size=1200k disk "$1" && exec "$2" -m rlhf_jax.chaos.disk "$1" "$3"'


def disk(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Starts and saves a run on a small disk with n different amounts of room.

    Raises:
      UserError: where the system has no mount namespaces for users.
    """
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        raise UserError("chaos disk: expected a system with mount namespaces for users (unshare -rm), got none")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(folder), sys.executable, str(n)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode != 0:
        raise UserError(
            f"chaos disk: the process on the small disk ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    found = json.loads(done.stdout)
    outcome = Outcome({name: found[name] for name in ("sizes", "saved", "refused")}, found["wrong"])
    outcome.at_least({"saved": 1, "refused": 1})
    return outcome


def _state(step: int) -> TrainState:
    kernel = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return TrainState(jnp.int32(step), {"kernel": kernel}, {"mu": kernel + 1}, jax.random.key(step), {})


def _start(disk: Path) -> None:
    """What a command does that starts or resumes, and trains one step."""
    run = RunFolder.create(disk / "run", stage="sft", config={}, model={}, tokenizer=Tokenizer.bytes(), inputs={})
    with run.lock():
        checkpoints, lines = Checkpoints(run.checkpoints), JsonLines(run.metrics)
        step = int(checkpoints.restore(_state(0)).step) if checkpoints.steps() else 0
        lines.start(step, step + 1)
        lines.row(step + 1, {"loss": 1.0})
        lines.close()
        checkpoints.save(step + 1, _state(step + 1), {})


def _fill(disk: Path, n: int) -> dict[str, Any]:
    """Fills the disk but for 0 to 400 KB, in n steps, and starts a run each time."""
    _start(disk)
    found: dict[str, Any] = {"sizes": n, "saved": 0, "refused": 0, "wrong": []}
    checkpoints = Checkpoints(disk / "run" / "checkpoints")
    for number in range(n):
        room = 400 * 1024 * number // max(n - 1, 1)
        stat = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * max(stat.f_bavail * stat.f_bsize - room, 0))
        before = checkpoints.latest() or 0
        try:
            _start(disk)
            found["saved"] += 1
        except UserError as error:
            found["refused"] += 1
            if "\n" in str(error):
                found["wrong"].append(f"{room} bytes left: several lines: {error}")
        except OSError as error:
            found["refused"] += 1
            if not error.filename or error.strerror != os.strerror(28):
                found["wrong"].append(f"{room} bytes left: {error!r}")
        (disk / "filler").unlink()
        latest = checkpoints.latest() or 0
        state = checkpoints.restore(_state(0))
        if latest < before or not np.array_equal(state.params["kernel"], _state(latest).params["kernel"]):
            found["wrong"].append(f"{room} bytes left: step {before} was the last, now step {latest} is")
        left = [path.name for path in disk.rglob("*") if path.name.endswith(LEFTOVERS)]
        if left:
            found["wrong"].append(f"{room} bytes left: left over: {left}")
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_fill(Path(sys.argv[1]), int(sys.argv[2]))))
