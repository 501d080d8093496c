"""A small run that kills itself amid a save, and started again amid a deletion, for test_fit.py.

python -m tests.kill_me FOLDER

Says after each death, as a line of JSON, amid what it was, which signal, and what lies in the folder of checkpoints.
"""

import json
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


class DiesSaving(Checkpoints):
    """Checkpoints during whose saving of step 6 the process is killed."""

    def save_in_background(self, step: int, *rest: Any) -> None:
        self.wait()  # for the step before, which is not to die
        if step == 6:
            checkpoint.seal = die
        super().save_in_background(step, *rest)


class DiesDeleting(Checkpoints):
    """Checkpoints during whose deletion of a step, after that of 6 is saved, the process is killed."""

    def save_in_background(self, step: int, *rest: Any) -> None:
        self.wait()  # for the step before, which is not to die
        if step == 6:
            checkpoint.shutil.rmtree = remove  # type: ignore[assignment]
        super().save_in_background(step, *rest)


def killed(folder: Path, kind: type[Checkpoints]) -> int:
    """The signal that ended a run; a process of its own, which begins with what this one has imported."""
    child = os.fork()
    if child == 0:
        test_fit.run(folder, kind)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for amid, kind in (("save", DiesSaving), ("delete", DiesDeleting)):
        number = killed(folder, kind)
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        print(json.dumps({"amid": amid, "signal": number, "left": left}), flush=True)
