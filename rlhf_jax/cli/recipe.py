"""Run the full recipe: pretrain → SFT → reward model → PPO on the embedded corpus, and measure the improvement.

Each stage is a separate run under runs/NAME, the same as the stage's own command makes; if interrupted, the same
command resumes. Human labellers are simulated by a gold score with noise (rlhf_jax/demo/gold_score.py); the figures
at the end are measured with the gold score itself, on test prompts and texts that no stage has read.
"""

from __future__ import annotations

from rlhf_jax.recipe.settings import RecipeConfig as Config


def run(config: Config) -> None:
    """Runs the recipe."""
    from rlhf_jax.recipe.run import run as run_recipe

    run_recipe(config)
