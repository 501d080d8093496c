"""Write the data of a task whose answers are verified, for PPO and its relatives with a reward function.

rlhf-jax task sums --out data/sums

rlhf-jax task calculator --out data/products

rlhf-jax task gym:leg_counting --out data/legs
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write prompts.jsonl to train on, test.jsonl to measure on and demonstrations.jsonl for SFT."""

    task: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]
    """sums of two numbers below 100; calculator, products that are dialogues with a tool; or gym:NAME, a task of
    reasoning-gym."""
    out: str = ""
    """Folder that gets the files."""
    train: int = 2000
    """Prompts to train on."""
    test: int = 500
    """Prompts to measure on, none of which is in another file."""
    demonstrations: int = 1000
    """Training prompts that have a demonstration as well."""
    seed: int = 0
    """Random seed of the questions."""

    def __post_init__(self) -> None:
        for field in ("train", "test"):
            at_least(self, field, 1)
        for field in ("demonstrations", "seed"):
            at_least(self, field, 0)
        if not self.out:
            raise UserError("out: expected a folder for the files, got nothing; use --out FOLDER")


def run(config: Config) -> None:
    """Writes the files."""
    from rlhf_jax.verifiers.tasks import write_task

    folder = Path(config.out)
    counts = write_task(
        config.task,
        folder,
        train=config.train,
        test=config.test,
        demonstrations=config.demonstrations,
        seed=config.seed,
    )
    for file, rows in counts.items():
        print(f"{folder / file}: {rows:,} rows")
