"""Train PPO and its alternatives from the same recipe, and compare gold scores at the same KL, time and memory.

rlhf-jax compare-methods runs/recipe --out runs/methods

rlhf-jax compare-methods runs/r0 runs/r1 runs/r2 --methods ppo grpo dpo best-of-n --out runs/methods
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare methods on finished recipes: each is trained by its own command, which is printed."""

    recipes: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE [RECIPE …]")]] = ()
    """Folders of finished recipes, one for each seed; each gives the SFT model, the reward model and the rankings."""
    methods: tuple[Literal["ppo", "rloo", "grpo", "dpo", "kto", "orpo", "simpo", "best-of-n"], ...] = (
        "ppo",
        "rloo",
        "grpo",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "best-of-n",
    )
    """Methods to compare. ppo, rloo and grpo sample as many responses as the preference methods read."""
    size: Literal["tiny", "small", "base", "large"] = "small"
    """Size of the recipes."""
    kl_coef: float = 0.04
    """KL coefficient β of ppo, rloo and grpo, low enough that they pass the KL at which methods are compared."""
    preference_rate: float = 3e-4
    """Learning rate of the preference methods; β is each method's default."""
    share: float = 1.0
    """Share of the full length of training, for a short try."""
    out: str = ""
    """Folder for the runs, methods.json and report.html; the same command goes on where it was stopped."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise UserError("recipes: expected folders of finished recipes, got none; see rlhf-jax recipe")
        if not self.out:
            raise UserError("out: expected a folder, got nothing; use --out FOLDER")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods: expected one or more, each once, got {' '.join(self.methods) or 'none'}")
        for field in ("kl_coef", "preference_rate", "share"):
            value = vars(self)[field]
            if not 0 < value < float("inf") or (field == "share" and value > 1):
                raise UserError(f"{field}: expected more than 0{' and at most 1' * (field == 'share')}, got {value}")


def run(config: Config) -> None:
    """Trains and measures what is not finished yet, and prints the table."""
    from rich.console import Console

    from rlhf_jax.recipe import methods
    from rlhf_jax.recipe.methods_report import table, write_methods_report
    from rlhf_jax.runs.lifecycle import say

    folder = Path(config.out)
    content = methods.compare(
        [Path(recipe) for recipe in config.recipes],
        folder,
        config.methods,
        config.size,
        say,
        methods.in_process_of_its_own,
        kl_coef=config.kl_coef,
        rate=config.preference_rate,
        share=config.share,
    )
    Console(highlight=False).print(table(content))
    print(f"report: {write_methods_report(folder, content)}")
