"""A small run that kills itself amid a save or a deletion, for test_fit.py.

python -m tests.kill_me FOLDER save|delete
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import Checkpoints
from tests import test_fit

real = checkpoint.shutil.rmtree


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("still alive")


def remove(path: Path, **how: Any) -> None:
    """Dies at a step no longer kept; what the kill before left unfinished is removed."""
    if path.suffix == ".deleted":
        die()
    real(path, **how)


class Fatal(Checkpoints):
    """Checkpoints during whose work at step 6 the process is killed."""

    def save(self, step: int, *rest: Any) -> None:
        if step == 6 and sys.argv[2] == "save":
            checkpoint.seal = die
        if step == 6 and sys.argv[2] == "delete":
            checkpoint.shutil.rmtree = remove  # type: ignore[assignment]
        super().save(step, *rest)


if __name__ == "__main__":
    test_fit.run(Path(sys.argv[1]), Fatal)
