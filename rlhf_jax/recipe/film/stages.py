"""Settings of the film task's stages, from a YAML file for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlhf_jax.config import PPOConfig, RewardConfig, SFTConfig, from_plain
from rlhf_jax.errors import UserError
from rlhf_jax.recipe.film.settings import DataConfig, MeasureConfig

C = TypeVar("C")

FOLDER = Path(__file__).parent.parent / "configs" / "film"
OWNED = ("name", "out", "init", "data", "heldout", "reward", "pretraining_data", "seed", "devices", "pmap")
"""Fields of a stage that the recipe sets."""
OPTIONAL = "layers"


class Settings:
    """Settings of the task and of its stages.

    Args:
      folder: with data.yaml, sft.yaml, reward.yaml, ppo.yaml and evaluate.yaml; those that it lacks are the task's own,
        and so are all if it is "".

    Raises:
      UserError: for a folder without any of them, and for a file that cannot be read or has other fields.
    """

    def __init__(self, folder: str = "") -> None:
        names = [f"{name}.yaml" for name in ("data", "sft", "reward", "ppo", "evaluate")]
        if folder and not any((Path(folder) / name).exists() for name in names):
            raise UserError(f"configs: expected a folder with one or more of {', '.join(names)}, got {folder!r}")
        self._folder = folder
        self._values = {name.removesuffix(".yaml"): self._read(name) for name in names}
        self.layers = self._values["reward"].pop(OPTIONAL, 0)
        if type(self.layers) is not int or self.layers < 0:
            raise UserError(f"{self._path('reward.yaml')}: field 'layers': expected 0 or more, got {self.layers!r}")
        for stage in ("sft", "reward", "ppo"):
            for field in OWNED:
                if field in self._values[stage]:
                    raise UserError(
                        f"{self._path(f'{stage}.yaml')}: field {field!r}: expected none, as the recipe sets it, got "
                        f"{self._values[stage][field]!r}"
                    )
        self.data = self._build(DataConfig, "data")
        self.measure = self._build(MeasureConfig, "evaluate")
        # Run the checks of all stages before the first one starts.
        self.sft()
        self.reward()
        self.ppo()

    def sft(self, **owned: Any) -> SFTConfig:
        """Settings of SFT, with those that the recipe sets."""
        return self._build(SFTConfig, "sft", owned)

    def reward(self, **owned: Any) -> RewardConfig:
        """Settings of the reward model."""
        return self._build(RewardConfig, "reward", owned)

    def ppo(self, **owned: Any) -> PPOConfig:
        """Settings of PPO."""
        return self._build(PPOConfig, "ppo", owned)

    def _path(self, name: str) -> Path:
        own = Path(self._folder) / name
        return own if self._folder and own.exists() else FOLDER / name

    def _build(self, cls: type[C], name: str, owned: dict[str, Any] | None = None) -> C:
        path = self._path(f"{name}.yaml")
        try:
            return from_plain(cls, self._values[name] | (owned or {}), where=str(path))
        except UserError as error:
            # The checks of the settings themselves do not know the file.
            raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None

    def _read(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path}: unreadable: {' '.join(str(error).split())}") from None
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a mapping of fields to values, got {type(values).__name__}")
        return values
