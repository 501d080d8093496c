"""Table of an experiment on the console, for `rlhf-jax experiment`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.evaluation.intervals import Estimate
from rlhf_jax.experiments.outcome import Outcome

if TYPE_CHECKING:
    from rlhf_jax.cli.experiment import Config


def cell(estimate: Estimate) -> str:
    """ "0.81 ±0.03", the wider half of the interval; without it if there is none."""
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{estimate.value:.2f}" + ("" if math.isnan(half) else f" ±{half:.2f}")


def show(outcome: Outcome, config: Config) -> None:
    """Prints the means over seeds with their 95% intervals, and what came out in sentences."""
    title = f"{config.experiment}: means over {config.seeds} seeds with 95% intervals"
    table = Table(title=title if config.seeds > 1 else config.experiment, box=box.SIMPLE, title_justify="left")
    table.add_column("", min_width=24)
    for _, heading in outcome.columns:
        table.add_column(heading, justify="right")
    for arm, measures in outcome.figures.items():
        cells = [cell(outcome.estimate(arm, name)) if name in measures else "" for name, _ in outcome.columns]
        table.add_row(Text(arm), *map(Text, cells))
    # A table is wider than the 80 columns of what is no terminal.
    Console(highlight=False, width=max(Console().width, 120)).print(table)
    for sentence in outcome.sentences:
        print(sentence)
