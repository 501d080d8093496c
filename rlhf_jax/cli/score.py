"""Score answers with a reward model.

rlhf-jax score runs/judge --data comparisons.jsonl --out scored.jsonl
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Score answers with a reward model: JSONL with the scores, normalized as PPO sees them."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Reward model: a run's folder, or a published model as hf:FOLDER."""
    data: tuple[str, ...] = ()
    """Files of comparisons or rankings, whose order is checked against the scores, or of demonstrations."""
    out: str = ""
    """File to write, which must not exist yet; standard output by default."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError(
                "data: expected comparisons, rankings or demonstrations, got nothing; use --data FILE.jsonl"
            )


def run(config: Config) -> None:
    """Writes the scores, and prints how often they agree with the comparisons."""
    from rlhf_jax.cli import scoring

    scoring.run(config)
