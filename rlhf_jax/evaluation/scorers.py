"""Scores of answers by reward models and by functions of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.arrays import Params
from rlhf_jax.data import Demonstration, Ledger, Prompt, encode_demonstrations
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.pretrained.source import Source
from rlhf_jax.reward_functions.calling import RewardFunctions
from rlhf_jax.reward_functions.loading import RewardFunction

# Answers scored at a time, to bound the memory that their rows take.
PART = 1024

Scorer = Callable[[Sequence[Prompt], Sequence[Sequence[Answer]]], Floats]
"""(prompts, K answers to each) -> scores [P, K]; NaN for an answer without one."""


def response_scores(
    source: Source, params: Params, records: Sequence[Demonstration], ledger: Ledger, *, batch: int = 32
) -> list[float | None]:
    """Scores of responses as a reward model gives them; None for one that does not fit its context.

    Args:
      source: reward model.
      params: its parameters.
      records: responses with their prompts; a response that did not end is scored as it stands.
      ledger: of the responses.
      batch: rows at a time.
    """
    found: dict[int, float] = {}
    for start in range(0, len(records), PART):
        part = records[start : start + PART]
        rows = encode_demonstrations(part, source.tokenizer, max_tokens=source.model.context, ledger=ledger)
        if len(rows):
            raw = row_scores(source.network(), params, rows, batch_size=batch)
            found |= {id(record): score for record, score in zip(rows.sources, raw.tolist(), strict=True)}
    return [found.get(id(record)) for record in records]


def normalized(source: Source, score: float | None) -> float | None:
    """A reward model's score as PPO sees it, (score − mean) / scale, by the mean and scale that it has recorded."""
    mean = 0.0 if source.score_mean is None else source.score_mean
    scale = 1.0 if source.score_scale is None else source.score_scale
    return None if score is None else (score - mean) / scale


def model_scorer(source: Source, ledger: Ledger, *, batch: int = 32) -> Scorer:
    """Scores by a reward model, normalized as in PPO; what does not fit its context is recorded in the ledger."""
    params = source.params()

    def scores(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Floats:
        records = [
            Demonstration(
                prompt.prompt,
                f" {answer.text}" if prompt.turns else answer.text,
                prompt.where,
                prompt.turns,
                answer.ended is not False,
            )
            for prompt, several in zip(prompts, answers, strict=True)
            for answer in several
        ]
        found = [normalized(source, score) for score in response_scores(source, params, records, ledger, batch=batch)]
        return np.array([np.nan if score is None else score for score in found]).reshape(len(prompts), -1)

    return scores


def function_scorer(function: RewardFunction, name: str, *, timeout: float) -> Scorer:
    """Scores by a function f(prompts, completions, **columns), called on parts of the answers as in PPO."""

    def scores(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Floats:
        call = RewardFunctions(
            [function],
            [name],
            prompts=[prompt_row(prompt.turns)["prompt"] if prompt.turns else prompt.prompt for prompt in prompts],
            columns=[prompt.columns for prompt in prompts],
            places=[prompt.where for prompt in prompts],
            required=False,
            timeout=timeout,
        )
        rows = [row for row, several in enumerate(answers) for _ in several]
        texts = [answer.text for several in answers for answer in several]
        found = [
            call(rows[start : start + PART], texts[start : start + PART])[:, 0] for start in range(0, len(rows), PART)
        ]
        return np.concatenate(found).astype(np.float64).reshape(len(prompts), -1)

    return scores
