"""Sample answers from a model and keep them as training data: rejection sampling, iterated DPO, distillation.

rlhf-jax sample runs/answers --prompts prompts.jsonl --reward runs/judge --keep best --out best.jsonl

rlhf-jax sample runs/answers --prompts prompts.jsonl --reward runs/judge --keep pairs --out pairs.jsonl

rlhf-jax sample runs/teacher --prompts prompts.jsonl --samples 4 --keep all --out taught.jsonl
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a file of data that a stage trains on."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Model to sample from: a run's folder, or a published model as hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    prompts: tuple[str, ...] = ()
    """Files of prompts."""
    reward: str = ""
    """Reward model that scores the answers: a run's folder or a published model."""
    reward_function: str = ""
    """Function that scores the answers in its place, FILE.py:NAME or package.module:NAME, as for `rlhf-jax ppo`."""
    reward_timeout: float = 60.0
    """Time limit in seconds of a call of the reward function, in a thread; 0 sets none."""
    samples: int = 8
    """Answers per prompt."""
    keep: Literal["best", "pairs", "rankings", "all"] = "best"
    """What becomes data. best: a demonstration with the best answer, for rejection sampling and expert iteration;
    pairs: a comparison of the best and the worst, for iterated DPO; rankings: all answers in order; all: a
    demonstration for each answer, for distillation, without a score."""
    at_least: float | None = None
    """Lowest score of a best answer; prompts whose answers all score less are left out. 1 keeps what a verifier found
    right."""
    max_new_tokens: int | None = None
    """Maximum number of tokens in an answer; 128 by default, or half of the model's context."""
    temperature: float = 1.0
    """Sampling temperature."""
    batch: int = 32
    """Rows sampled and scored at a time."""
    seed: int = 0
    """Random seed for sampling."""
    out: str = ""
    """File to write, which must not exist yet."""

    def __post_init__(self) -> None:
        for field in ("samples", "max_new_tokens", "batch"):
            at_least(self, field, 1)
        for field in ("seed", "reward_timeout"):
            at_least(self, field, 0)
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature: expected more than 0, as greedy answers are all alike, got {self.temperature}"
            )
        for field in ("prompts", "out"):
            if not dataclasses.asdict(self)[field]:
                raise UserError(f"{field}: expected a file, got nothing; use --{field} FILE.jsonl")
        scorers = bool(self.reward) + bool(self.reward_function)
        wanted = 0 if self.keep == "all" else 1
        if scorers != wanted:
            given = "a reward model and a reward function" if scorers == 2 else "one" if scorers else "none"
            expected = "no scorer, as all answers are kept" if not wanted else "one scorer"
            raise UserError(f"keep {self.keep}: expected {expected}, got {given}; see --reward and --reward-function")
        if self.keep != "all" and self.samples < 2:
            raise UserError(f"samples: expected 2 or more to choose from with keep {self.keep}, got {self.samples}")
        if self.at_least is not None and (self.keep == "all" or not math.isfinite(self.at_least)):
            raise UserError(f"at_least: expected a finite score, and none with keep all, got {self.at_least}")


def run(config: Config) -> None:
    """Samples, scores and writes the file."""
    from rlhf_jax.cli import sampling

    sampling.run(config)
