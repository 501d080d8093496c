"""Settings of the film task's data and evaluation; nothing here imports JAX."""

from __future__ import annotations

import dataclasses

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How sentences and comparisons are divided, and what is made of them."""

    train: float = 0.55
    """Share of the sentences, or of the prompts, that SFT, reward model and PPO learn from."""
    judge: float = 0.3
    """Share that the judge learns from; the rest is held out."""
    ranking_size: int = 8
    """Sentences in a ranking of the reward model's, K, 4 to 9."""
    passes: int = 1
    """Rankings that each sentence is in, each time with other sentences."""
    judge_passes: int = 4
    """The same for the judge."""
    opening_words: int = 2
    """Words of a sentence that the policy is given, where the data has no prompts."""
    least_gap: float = 0.3
    """Least difference of the mean ratings of two held-out sentences that people's ratings are compared on."""

    def __post_init__(self) -> None:
        for field in ("train", "judge"):
            if not 0 < vars(self)[field] < 1:
                raise UserError(f"{field}: expected a share between 0 and 1, got {vars(self)[field]}")
        if not self.train + self.judge < 1:
            raise UserError(
                f"judge: expected less than {1 - self.train:g}, so that some are held out, got {self.judge}"
            )
        if not 4 <= self.ranking_size <= 9:
            raise UserError(f"ranking_size: expected 4 to 9, got {self.ranking_size}")
        for field in ("passes", "judge_passes", "opening_words"):
            at_least(self, field, 1)
        at_least(self, "least_gap", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How the models are compared at the end."""

    prompts: int = 512
    """Held-out prompts that each model answers once."""
    best_of: int = 16
    """Further answers of the SFT model to each prompt, of which the reward model chooses one."""
    batch: int = 64
    """Rows sampled and scored at a time."""
    watched: int = 64
    """Training prompts that the policy answers during PPO, for the judge's curve."""

    def __post_init__(self) -> None:
        for field in ("prompts", "batch", "watched"):
            at_least(self, field, 1)
        at_least(self, "best_of", 2)
