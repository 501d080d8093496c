"""Settings of the full recipe; nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.config import RunConfig, at_least


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Settings of the full recipe."""

    name: str = "recipe"
    """Name of the run; its folder is runs/NAME."""
    out: str = ""
    """Output folder, instead of runs/NAME."""
    seed: int = 0
    """Random seed for parameters, data order, sampling and the labeller's noise."""
    seeds: int = 1
    """Number of seeds to run, starting at --seed, each in a subfolder seedN; medians are reported at the end."""
    size: Literal["tiny", "small", "base", "large"] = "small"
    """Model and training size: tiny is a one-minute smoke test, small for two CPU cores, base and large for a GPU."""
    devices: int = 1
    """Number of devices that share a batch."""
    pmap: bool = False
    """Use pmap with a replica per device instead of jit with sharding."""

    def __post_init__(self) -> None:
        # Runs the checks of the stages' configs now, before the first stage starts.
        RunConfig(name=self.name, out=self.out, seed=self.seed, devices=self.devices, batch=self.devices, steps=0)
        at_least(self, "seeds", 1)

    @property
    def folder(self) -> Path:
        """Folder of the recipe, with those of the stages below it."""
        return Path(self.out) if self.out else Path("runs") / self.name
