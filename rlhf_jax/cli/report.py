"""Put runs side by side in one HTML report.

rlhf-jax report runs/answers runs/aligned

rlhf-jax report runs/beta02 runs/beta05 runs/beta15 --data heldout.jsonl --reward runs/judge --out beta.html

rlhf-jax report runs/recipe runs/recipe2
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Put runs side by side: settings that differ, answers to the same prompts, figures, curves and warnings."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN …")]]
    """Folders of runs, of any stage; or a folder of runs, such as that of a recipe. Win rates are against the first."""
    out: str = "comparison.html"
    """File to write; an earlier report is replaced."""
    data: tuple[str, ...] = ()
    """Files of prompts to answer, best of held-out ones; by default those that the reports of the runs show."""
    columns: tuple[str, ...] = ()
    """Fields of data under other names, such as prompt=task."""
    examples: int = 64
    """Number of prompts to answer at most; 0 samples no answers."""
    max_new_tokens: int | None = None
    """Maximum number of tokens in an answer; by default 48, or a quarter of the smallest context."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy decoding. All runs sample with the same random numbers."""
    reward: str = ""
    """Reward model that scores the answers, for win rates; by default that of all PPO runs, if they share one."""

    def __post_init__(self) -> None:
        for field in ("examples", "temperature"):
            at_least(self, field, 0)
        if self.max_new_tokens is not None:
            at_least(self, "max_new_tokens", 1)
        if not self.runs:
            raise UserError("runs: expected the folders of one or more runs, got nothing; use runs/NAME")
        if not self.out.endswith((".html", ".htm")):
            raise UserError(f"out: expected a file that ends in .html, got {self.out!r}")


def run(config: Config) -> None:
    """Writes the report."""
    from rlhf_jax.cli import comparing

    comparing.run(config)
