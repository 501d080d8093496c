"""Inject faults into small runs on this machine, and check what becomes of them; exits with 1 if a guarantee fails.

rlhf-jax chaos kill

rlhf-jax chaos flip --n 500 --out flip.json
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError

Name = Literal[
    "kill",
    "pipeline",
    "sigterm",
    "flip",
    "fallback",
    "disk",
    "lock",
    "mismatch",
    "elastic",
    "peer",
    "data",
    "tokens",
    "guards",
    "labels",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Inject faults into small runs on this machine, and check what becomes of them.

    Prints one JSON object with counts, each case that went wrong, and whether the guarantee holds.
    """

    trial: tyro.conf.Positional[Annotated[Name, tyro.conf.arg(metavar="NAME")]]
    """kill: SIGKILL in any phase of a stage; pipeline: of the whole recipe; sigterm: SIGTERM in each phase; flip:
    damaged files of a finished run; fallback: a damaged checkpoint; disk: a full disk; lock: a second command;
    mismatch: a start that does not fit; elastic: other devices; peer: one process of two (in a checkout); data: hostile
    rows; tokens: hostile text; guards: settings that destroy a run; labels: the labelling server (in a checkout)."""
    n: int | None = None
    """Number of faults; by default as many as the guarantee promises."""
    seed: int = 0
    """Random seed of the faults."""
    out: str = ""
    """JSON file for the result as well."""
    folder: str = ""
    """Folder on the disk to try; by default the system's for temporary files."""

    def __post_init__(self) -> None:
        at_least(self, "n", 1)
        at_least(self, "seed", 0)
        if self.folder and not Path(self.folder).is_dir():
            raise UserError(f"folder: expected an existing folder, got {self.folder}")


def run(config: Config) -> None:
    """Runs the trial, prints its result and exits with 1 if the guarantee does not hold."""
    # What the processes that are struck need, which begin with what this one has imported.
    for name in ("pretrain", "sft", "reward", "ppo"):
        importlib.import_module(f"rlhf_jax.trainers.{name}")
    from rlhf_jax.chaos.run import try_out
    from rlhf_jax.cli.app import main
    from rlhf_jax.cli.startup import processor
    from rlhf_jax.files import write_file

    gc.collect()
    gc.freeze()
    result = try_out(main, config.trial, config.n, config.seed, config.folder)
    text = json.dumps(result | {"processor": processor()}, indent=1, ensure_ascii=False) + "\n"
    if config.out:
        write_file(Path(config.out), text)
    sys.stdout.write(text)
    sys.exit(0 if result["holds"] else 1)
