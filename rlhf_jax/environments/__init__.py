"""Environments for episodes of several turns: `--environment` and `ppo.run(config, environment=f)`.

    rlhf-jax ppo … --environment rlhf_jax.environments:calculator
    rlhf-jax ppo … --environment my.py:game --max-turns 6 --turn-length 24 --episode.response-length 200

An environment is a function (state, text) -> (state, observation, reward, done). It is called after each turn of the
policy; the observation is appended to the episode, and the policy goes on. Two are ready-made: a tool that computes,
and a user whose wishes must be asked for.
"""

from rlhf_jax.environments.calculator import calculator
from rlhf_jax.environments.calling import Environment
from rlhf_jax.environments.customer import customer

__all__ = ["Environment", "calculator", "customer"]
