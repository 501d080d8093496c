"""Verifiable rewards: functions that check an answer, for `--reward-function` and `ppo.run(config, reward_funcs=[…])`.

    rlhf-jax ppo … --reward-function rlhf_jax.verifiers:exact
    rlhf-jax ppo … --reward-function "rlhf_jax.verifiers:unit_tests(seconds=2)"

Each is f(completions, COLUMN, …) -> a number for each completion, or None where the row has no answer to check against.
The columns are fields of the prompts' rows.
"""

from rlhf_jax.verifiers.answers import exact, follows_schema, number
from rlhf_jax.verifiers.gym import gym
from rlhf_jax.verifiers.mathematics import equal_expression
from rlhf_jax.verifiers.programs import unit_tests

__all__ = ["equal_expression", "exact", "follows_schema", "gym", "number", "unit_tests"]
