"""The whole recipe with one command: pretrain → SFT → reward model → PPO on the embedded corpus, and what it gained.

Each stage is a run of its own under runs/NAME, as the stage's own command makes it; stopped at any point, the same
command resumes. People are simulated by a written-down gold score with noise (rlhf_jax/demo/gold_score.py); the
held-out figures are by the gold score itself.
"""

from __future__ import annotations

from rlhf_jax.recipe.settings import RecipeConfig as Config


def run(config: Config) -> None:
    """Runs the recipe."""
    from rlhf_jax.recipe.run import run as run_recipe

    run_recipe(config)
