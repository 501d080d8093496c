"""Optimise the fine-tuned model against the reward model: stage 3.2 of the recipe.

rlhf-jax ppo --name aligned --init runs/answers --reward runs/judge --data prompts.jsonl
"""

from __future__ import annotations

from rlhf_jax.config import PPOConfig as Config


def run(config: Config) -> None:
    """Runs the stage and prints its summary."""
    from rlhf_jax.cli.process import run_stage
    from rlhf_jax.trainers import ppo

    run_stage(ppo.run, config)
