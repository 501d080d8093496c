"""Fine-tune a pretrained model on demonstrations: stage 2 of the recipe.

rlhf-jax sft --name answers --init runs/words --data answers.jsonl
"""

from __future__ import annotations

from rlhf_jax.config import SFTConfig as Config


def run(config: Config) -> None:
    """Runs the stage and prints its summary."""
    from rlhf_jax.cli.process import run_stage
    from rlhf_jax.trainers import sft

    run_stage(sft.run, config)
