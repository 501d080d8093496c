"""Run an experiment on a claim about RLHF in a small world: figures with intervals over seeds, and a picture.

rlhf-jax experiment hallucination

rlhf-jax experiment kl --seeds 3 --out runs/kl
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlhf_jax.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run an experiment on a claim about RLHF in a small world.

    stages: the three stages in a row, and with each skipped; reward-start: a reward model from SFT, pretraining or
    scratch, by the number of comparisons and the quality of their labels; rankings: as one element of a batch, or as
    shuffled pairs; kl: reward and gold score for β from 0 to large, and for best-of-n; pretraining-mix: γ against what
    PPO forgets; hallucination: made-up answers after pretraining, SFT and RLHF, with rewards that do or do not price
    them; diversity: different acceptable answers after SFT and PPO, and what negative feedback adds.
    """

    experiment: tyro.conf.Positional[
        Annotated[
            Literal["stages", "reward-start", "rankings", "kl", "pretraining-mix", "hallucination", "diversity"],
            tyro.conf.arg(metavar="NAME"),
        ]
    ]
    """stages, reward-start, rankings, kl, pretraining-mix, hallucination or diversity."""
    seed: int = 0
    """Random seed of the first repetition: the same seeds give the same figures."""
    seeds: int = 5
    """Number of repetitions, each with a seed of its own."""
    out: str = ""
    """Folder for result.json and picture.svg, instead of runs/experiment-NAME."""
    short: bool = False
    """Run in a tiny size, in seconds; its figures mean nothing."""

    def __post_init__(self) -> None:
        at_least(self, "seed", 0)
        at_least(self, "seeds", 1)

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return Path(self.out) if self.out else Path("runs") / f"experiment-{self.experiment}"


def run(config: Config) -> None:
    """Runs the experiment, prints its table and writes its files."""
    from rlhf_jax.cli.experimenting import show
    from rlhf_jax.experiments import run as experiments
    from rlhf_jax.runs.lifecycle import say

    started, used = time.monotonic(), time.process_time()
    outcome = experiments.run(
        config.experiment, config.folder, seed=config.seed, seeds=config.seeds, short=config.short, say=say
    )
    show(outcome, config)
    minutes, busy = (time.monotonic() - started) / 60, (time.process_time() - used) / 60
    print(f"{minutes:.1f} minutes, {busy:.1f} of one processor core; files: {config.folder}")
