"""Settings of an evaluation: the models to compare, and what they are compared by."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from rlhf_jax.config.checks import at_least, hinted
from rlhf_jax.errors import UserError

MOST_BEST_OF = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation."""

    models: tuple[str, ...] = ()
    """Models to compare, the baseline first: run folders, published models (a Hugging Face folder, gguf:FILE,
    peft:FOLDER), or JSONL files of answers, with the fields prompt and answer."""
    prompts: tuple[str, ...] = ()
    """JSONL files of prompts that every model answers; by default those of the first file of answers."""
    reward: tuple[str, ...] = ()
    """Reward models that score the answers: run folders or published models. The first scorer, before reward functions,
    chooses the answers of --best-of."""
    reward_function: tuple[str, ...] = ()
    """Functions that score the answers, FILE.py:NAME or package.module:NAME, as for `rlhf-jax ppo`."""
    reward_timeout: float = 60.0
    """Time limit in seconds of a call of a reward function, in a thread; 0 sets none."""
    reference: str = ""
    """Model to measure the KL divergence to, usually the SFT model that PPO started from."""
    text: tuple[str, ...] = ()
    """JSONL files of held-out text, for the perplexity and the bits per byte of each model."""
    comparisons: tuple[str, ...] = ()
    """JSONL files of comparisons or rankings, for the accuracy and the calibration of each reward model."""
    samples: int = 1
    """Answers per prompt from each model."""
    best_of: int = 0
    """Also evaluate each model with best-of-n sampling: the best of this many further answers by the first scorer."""
    max_new_tokens: int | None = hinted(None, "default: 128")
    """Maximum number of tokens in an answer; 128 by default, or half of the smallest context."""
    temperature: float = 1.0
    """Sampling temperature; 1 is the policy that PPO trains, 0 is greedy decoding."""
    batch: int = 32
    """Rows sampled and scored at a time."""
    seed: int = 0
    """Random seed for sampling and for the bootstrap intervals."""
    out: str = "evaluation"
    """Folder for evaluation.json, answers.jsonl and report.html; it must not have an evaluation yet."""

    def __post_init__(self) -> None:
        for field in ("samples", "max_new_tokens", "batch"):
            at_least(self, field, 1)
        for field in ("best_of", "temperature", "seed", "reward_timeout"):
            at_least(self, field, 0)
        for field, value in (("temperature", self.temperature), ("reward_timeout", self.reward_timeout)):
            if not math.isfinite(value):
                raise UserError(f"{field}: expected a finite number, got {value}")
        if self.best_of == 1 or self.best_of > MOST_BEST_OF:
            raise UserError(f"best_of: expected 2 to {MOST_BEST_OF}, or 0 for none, got {self.best_of}")
        for field in ("models", "reward", "reward_function"):
            given: tuple[str, ...] = dataclasses.asdict(self)[field]
            if twice := [one for one in given if given.count(one) > 1]:
                raise UserError(f"{field}: expected each once, got {twice[0]} twice")
        if self.temperature == 0 and (self.samples > 1 or self.best_of or self.reference):
            flag = "samples" if self.samples > 1 else "best_of" if self.best_of else "reference"
            raise UserError(f"temperature: expected above 0 with {flag}, as greedy answers are all alike, got 0")
        if not self.out:
            raise UserError("out: expected a folder, got nothing")
        self._check_parts()

    def _check_parts(self) -> None:
        """Refuses settings that would do nothing, and an evaluation of nothing."""
        if self.comparisons and not self.reward:
            raise UserError("reward: expected a reward model to check on the comparisons, got none; use --reward RUN")
        if not self.models and not self.comparisons:
            raise UserError(
                "models: expected models to compare or --comparisons, got neither; give run folders, hf:FOLDER or "
                "JSONL files of answers"
            )
        if self.models and not (self.prompts or self.text) and not any(map(is_file, self.models)):
            raise UserError(
                "prompts: expected prompts that the models answer, or --text, got neither; use --prompts FILE.jsonl"
            )
        for field in ("prompts", "text", "reference"):
            if dataclasses.asdict(self)[field] and not self.models:
                raise UserError(f"models: expected models with {field}, got none; name them first")

    @property
    def folder(self) -> Path:
        return Path(self.out)


def is_file(model: str) -> bool:
    """True for a file of answers, which ends in .jsonl, .json or .gz, in place of a model."""
    return model.endswith((".jsonl", ".json", ".gz")) and ":" not in model
