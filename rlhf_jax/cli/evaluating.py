"""Tables of an evaluation on the console, for `rlhf-jax evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.evaluation import compare_models
from rlhf_jax.evaluation.evaluation_tables import (
    REWARD_HEAD,
    WIN_HEAD,
    fit_lines,
    model_rows,
    reward_rows,
    win_rows,
)
from rlhf_jax.evaluation.report.evaluation import headline
from rlhf_jax.runs.lifecycle import say

if TYPE_CHECKING:
    from rlhf_jax.cli.evaluate import Config


def run(config: Config) -> None:
    """Compares the models, prints the tables and writes the files."""
    content = compare_models.run(config, say=say)
    show(content, Console(highlight=False))
    for note in content["notes"]:
        say(f"note: {note}")
    print(headline(content))
    print(f"report: {config.folder / compare_models.REPORT}")


def show(content: Mapping[str, Any], console: Console) -> None:
    """Prints the tables of evaluation.json."""
    names = [model["name"] for model in content["models"]]
    _print(console, ("figure", *names), [(title, *cells) for title, cells in model_rows(content)], words=1)
    _print(console, WIN_HEAD, win_rows(content), words=3)
    _print(console, REWARD_HEAD, reward_rows(content), words=1)
    for one in content["reward_models"]:
        for verdict in one["verdicts"]:
            console.print(Text(f"{one['model']}: {verdict}"))
    for line in fit_lines(content):
        console.print(Text(line))


def _print(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
