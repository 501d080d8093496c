"""Train a reward model on comparisons or rankings: stage 3.1 of the recipe.

python scripts/reward.py --name judge --init runs/answers --data comparisons.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# The root, which holds the package `scripts`: a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from scripts.huge_pages import use_huge_pages

    use_huge_pages()

from rlhf_jax.stages import reward
from scripts import cli


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the stage and exits. argv: arguments without the program's name; None for those of this process."""
    cli.main(cli.reported(reward.run), reward.Config, __doc__, argv)


if __name__ == "__main__":
    cli.use_compilation_cache()
    main()
