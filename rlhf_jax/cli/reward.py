"""Train a reward model on comparisons or rankings: stage 3.1 of the recipe.

rlhf-jax reward --name judge --init runs/answers --data comparisons.jsonl
"""

from __future__ import annotations

from rlhf_jax.config import RewardConfig as Config


def run(config: Config) -> None:
    """Runs the stage and prints its summary."""
    from rlhf_jax.cli.process import run_stage
    from rlhf_jax.trainers import reward

    run_stage(reward.run, config)
