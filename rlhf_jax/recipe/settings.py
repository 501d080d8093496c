"""Settings of the whole recipe; nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.config import RunConfig, at_least


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Settings of the whole recipe."""

    name: str = "recipe"
    """Name of the run; its folder is runs/NAME."""
    out: str = ""
    """Folder of the run, instead of runs/NAME."""
    seed: int = 0
    """Seed of everything: parameters, order of the data, samples, the labeller's noise."""
    seeds: int = 1
    """How many seeds to run, from seed up, each in a folder seedN below this one; medians at the end."""
    size: Literal["tiny", "small", "base", "large"] = "small"
    """tiny tries the wiring in a minute, small is for two CPU cores, base and large are for a GPU."""
    devices: int = 1
    """How many devices share a batch."""
    pmap: bool = False
    """Replicate by pmap instead of sharding by jit."""

    def __post_init__(self) -> None:
        # Refuses at once what a stage would refuse.
        RunConfig(name=self.name, out=self.out, seed=self.seed, devices=self.devices, batch=self.devices, steps=0)
        at_least(self, "seeds", 1)

    @property
    def folder(self) -> Path:
        """The recipe's folder; the stages' are below it."""
        return Path(self.out) if self.out else Path("runs") / self.name
