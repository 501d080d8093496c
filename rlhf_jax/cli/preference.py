"""Train the fine-tuned model on comparisons or rankings directly, in place of a reward model and PPO.

rlhf-jax preference --name preferred --init runs/answers --data comparisons.jsonl --method dpo --beta 0.1
"""

from __future__ import annotations

from rlhf_jax.config import PreferenceConfig as Config


def run(config: Config) -> None:
    """Runs the stage and prints its summary."""
    from rlhf_jax.cli.process import run_stage
    from rlhf_jax.trainers import preference

    run_stage(preference.run, config)
