"""An environment in PPO's trainer: its place in the reward, and episodes between sampling and the update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.arrays import PromptBatch
from rlhf_jax.data import PromptRows
from rlhf_jax.environments.calling import Caller, Environment
from rlhf_jax.environments.episodes import Episode, Table
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.host_step import HostStep
from rlhf_jax.reward_functions.loading import RewardFunction, load_function, make_terms, spec_of
from rlhf_jax.rewards import Terms
from rlhf_jax.stages.ppo import Batch, Config, ScoredResponses
from rlhf_jax.stages.turns import NextTurn, Turns
from rlhf_jax.tokenizers.protocol import TextTokenizer


def with_environment(
    config: Config,
    environment: Environment | None,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
) -> tuple[Config, list[Environment], Terms | None]:
    """The config with the environment's name, the environment, and the terms of the reward, if there is one.

    Raises:
      UserError: if there are two environments, or reward functions beside one; for its settings without one.
    """
    if environment is None and not config.environment:
        for field, default in (("max_turns", Config().max_turns), ("turn_length", None)):
            if vars(config)[field] != default:
                raise UserError(f"{field}: expected none without an environment, got one; use --environment")
        return config, [], None
    if environment is None:
        played, name = load_function(config.environment, "environment"), config.environment
    elif not callable(environment):
        raise UserError(f"environment: expected a function (state, text) -> …, got {environment!r}")
    elif config.environment and config.environment != spec_of(environment):
        raise UserError(f"environment: expected one, got {config.environment} and {spec_of(environment)}")
    else:
        played, name = environment, spec_of(environment)
    if callable(reward_funcs) or reward_funcs:
        raise UserError(
            "reward_funcs: expected none with an environment, whose rewards are the episode's, got some; call them in "
            "the environment"
        )
    terms = make_terms([played], config.reward_weights, model=bool(config.reward))
    return dataclasses.replace(config, environment=name, reward_weights=terms.weights), [played], terms


def environment_step(
    make: Callable[[str | None], Callable[..., Generation]],
    environment: Environment,
    config: Config,
    terms: Terms,
    rows: PromptRows,
    tokenizer: TextTokenizer,
) -> HostStep:
    """Between sampling of the first turns and the update: replies, and the further turns.

    Args:
      make: axis name -> the sampling of an iteration, as `make_sampling` gives it.
      environment: the environment.
      config: settings of the stage.
      terms: terms of the reward, the environment's last.
      rows: the prompts.
      tokenizer: the model's.
    """
    table = Table(
        Caller(environment, terms.names[-1], rows.sources, config.reward_timeout),
        rows,
        tokenizer,
        length=config.episode.response_length,
        turn_length=config.turn_tokens,
        turns=config.max_turns,
    )

    def next_batch(prompts: PromptBatch, over: np.ndarray, turn: int) -> Batch:
        marks: list[Any] = [np.full(len(over), turn, np.int32), over]
        return Batch(prompts, None, turn=NextTurn(*marks))

    def play(batch: Batch, sampled: Generation, again: Callable[[Batch], Generation]) -> list[Episode]:
        episodes = table.start(np.repeat(np.asarray(batch.row_B), config.samples_per_prompt).tolist())
        table.take(episodes, sampled, 0)
        for turn in range(1, config.max_turns):
            over = np.array([episode.is_over for episode in episodes])
            # Several processes compute each turn together, whoever still needs it.
            if over.all() and processes.count() == 1:
                break
            table.take(episodes, again(next_batch(table.so_far(episodes), over, turn)), turn)
        return episodes

    def fill(batch: Batch, episodes: list[Episode]) -> Batch:
        parts: tuple[Any, ...] = table.arrays(episodes, terms.weights[-1])
        return dataclasses.replace(batch, row_B=None, scored=ScoredResponses(*parts))

    def outline(batch: Batch) -> Batch:
        rows, length = config.samples_per_prompt * len(np.asarray(batch.row_B)), config.episode.response_length

        def zeros(kind: Any, *shape: int) -> Any:
            return np.zeros((rows, *shape), kind)

        sampled = Generation(zeros(np.int32, length), zeros(np.bool_, length), zeros(np.float32, length))
        turns = Turns(zeros(np.bool_, length), zeros(np.float32, length), zeros(np.bool_), zeros(np.int32))
        return dataclasses.replace(batch, row_B=None, scored=ScoredResponses(sampled, zeros(np.float32, 1), turns))

    def further(batch: Batch) -> Batch:
        count = config.samples_per_prompt * len(np.asarray(batch.row_B))
        return next_batch(table.so_far([Episode(0, None)] * count), np.zeros(count, bool), 1)

    return HostStep(make, fill, outline, play, further if config.max_turns > 1 else None)
