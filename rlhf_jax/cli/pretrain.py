"""Pretrain a language model on raw text: stage 1 of the recipe.

rlhf-jax pretrain --name words --data words.jsonl.gz
"""

from __future__ import annotations

from rlhf_jax.config import PretrainConfig as Config


def run(config: Config) -> None:
    """Runs the stage and prints its summary."""
    from rlhf_jax.cli.process import run_stage
    from rlhf_jax.trainers import pretrain

    run_stage(pretrain.run, config)
