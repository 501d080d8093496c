"""Reward functions in PPO's trainer: the functions of a run, and their values between sampling and the update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import PromptBatch, TrainState
from rlhf_jax.data import Prompt, PromptRows, response_text
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.host_step import AHEAD, HostStep
from rlhf_jax.reward_functions.calling import RewardFunctions
from rlhf_jax.reward_functions.loading import RewardFunction, load_function, make_terms, spec_of
from rlhf_jax.rewards import Terms
from rlhf_jax.stages.ppo import Batch, Config, ScoredResponses
from rlhf_jax.tokenizers.protocol import TextTokenizer


def reward_functions(
    config: Config, reward_funcs: RewardFunction | Sequence[RewardFunction]
) -> tuple[Config, list[RewardFunction], Terms | None]:
    """The config with the names of all functions, the functions, and the terms of the reward if there are functions."""
    given = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    for number, function in enumerate(given):
        if not callable(function):
            raise UserError(
                f"reward_funcs[{number}]: expected a function, got {function!r}; a reward model is the setting reward"
            )
    functions = [*map(load_function, config.reward_function), *given]
    if not functions:
        if config.reward_weights:
            raise UserError("reward_weights: expected none without a reward function, got some; use --reward-function")
        return config, [], None
    names = (*config.reward_function, *map(spec_of, given))
    terms = make_terms(functions, config.reward_weights, model=bool(config.reward))
    # Written out, for the run's config.json.
    return dataclasses.replace(config, reward_function=names, reward_weights=terms.weights), functions, terms


def refuse_lag(config: Config, functions: Sequence[RewardFunction]) -> None:
    """Raises UserError if nothing would work while responses are sampled ahead, or several processes would do it."""
    if not functions:
        raise UserError(
            "rollout_lag: expected 0 without reward functions, as a reward model is part of the update, got 1; use "
            "--reward-function, or leave it out"
        )
    if processes.count() > 1:
        raise UserError(f"rollout_lag: expected 0 with {processes.count()} processes, got 1")


def rewards_of(functions: Sequence[RewardFunction], terms: Terms, rows: PromptRows, timeout: float) -> RewardFunctions:
    """The functions on the prompts that were kept."""
    records: Sequence[Prompt] = rows.sources
    return RewardFunctions(
        functions,
        terms.names[-len(functions) :],
        prompts=[prompt_row(record.turns)["prompt"] if record.turns else record.prompt for record in records],
        columns=[record.columns for record in records],
        places=[record.where for record in records],
        required=len(terms.names) == len(functions),
        timeout=timeout,
    )


@dataclasses.dataclass(frozen=True)
class NumberedRows:
    """Rows of prompts with the number of each in the data."""

    rows: PromptRows

    def __len__(self) -> int:
        return len(self.rows)

    def row_length(self, indices: np.ndarray) -> int:
        return self.rows.row_length(indices)

    def batch(self, indices: np.ndarray, among: np.ndarray | None = None) -> tuple[PromptBatch, Any]:
        return self.rows.batch(indices, among), indices.astype(np.int32)


def host_step(
    make: Callable[[str | None], Callable[..., Generation]],
    rewards: RewardFunctions,
    rows: PromptRows,
    tokenizer: TextTokenizer,
    response_length: int,
    samples: int = 1,
    ahead: Callable[[int], Batch | None] | None = None,
) -> HostStep:
    """Between sampling and the update: responses to text, text to values.

    Args:
      make: axis name -> the sampling of an iteration.
      rewards: the reward functions.
      rows: the prompts.
      tokenizer: decodes.
      response_length: R.
      samples: responses to each prompt, which follow each other.
      ahead: step -> its batch, where responses are sampled a step ahead.
    """

    def text(row: int, ids: list[int]) -> str:
        decoded = response_text(rows.rows[row], ids, tokenizer)
        # The answer to messages starts with a space in the Human / Assistant template, which is not its content.
        own_space = rows.sources[row].turns and tokenizer.chat_template is None
        return decoded.removeprefix(" ") if own_space else decoded

    def scored(batch: Batch, sampled: Any, value_BN: Any) -> Batch:
        return dataclasses.replace(batch, row_B=None, scored=ScoredResponses(sampled, value_BN))

    def fill(batch: Batch, sampled: Generation) -> Batch:
        numbers = np.repeat(np.asarray(batch.row_B), samples).tolist()
        responses = zip(np.asarray(sampled.tokens), np.asarray(sampled.mask), strict=True)
        texts = [text(row, ids[mask].tolist()) for row, (ids, mask) in zip(numbers, responses, strict=True)]
        return scored(batch, sampled, rewards(numbers, texts))

    def outline(batch: Batch) -> Batch:
        shape = (samples * len(np.asarray(batch.row_B)), response_length)
        sampled: list[Any] = [np.zeros(shape, kind) for kind in (np.int32, np.bool_, np.float32)]
        return scored(batch, Generation(*sampled), np.zeros((shape[0], len(rewards.functions)), np.float32))

    return HostStep(make, fill, outline, ahead=ahead)


def with_room_ahead(state: TrainState, config: Config) -> TrainState:
    """The state with room for the responses [B, R] that are sampled a step ahead."""
    shape = (config.batch, config.episode.response_length)
    rows = Generation(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_), jnp.zeros(shape, jnp.float32))
    return dataclasses.replace(state, extras={**state.extras, AHEAD: rows})
