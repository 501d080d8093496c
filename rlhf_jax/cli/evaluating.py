"""Tables of an evaluation on the console, for `rlhf-jax evaluate`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.config.evaluation import EvaluationConfig
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import compare_models, evaluation_files
from rlhf_jax.evaluation.evaluation_tables import (
    PEOPLE_HEAD,
    REWARD_HEAD,
    WIN_HEAD,
    fit_lines,
    model_rows,
    people_rows,
    reward_rows,
    win_rows,
)
from rlhf_jax.evaluation.report.evaluation import headline
from rlhf_jax.runs.lifecycle import say

if TYPE_CHECKING:
    from rlhf_jax.cli.evaluate import Config


def run(config: Config) -> None:
    """Compares the models, prints the tables and writes the files; people judge the answers before, if asked."""
    settings = EvaluationConfig(**{field.name: vars(config)[field.name] for field in fields(EvaluationConfig)})
    again = config.people and (settings.folder / evaluation_files.FILE).exists()
    content = evaluation_files.read_evaluation(settings) if again else compare_models.run(settings, say=say)
    if config.people:
        content = with_people(config, content)
    show(content, Console(highlight=False))
    for note in content["notes"]:
        say(f"note: {note}")
    print(headline(content))
    print(f"report: {config.folder / evaluation_files.REPORT}")


def with_people(config: Config, content: dict[str, Any]) -> dict[str, Any]:
    """Asks people to compare the answers, and adds the judgements that are there to the files."""
    # Imported here: the other evaluations do without the page.
    from rlhf_jax.cli.label import Config as LabelConfig
    from rlhf_jax.cli.labelling import serve
    from rlhf_jax.feedback.database import folder_lock
    from rlhf_jax.feedback.evaluated import items_of_answers, people_figures
    from rlhf_jax.feedback.store import Store

    models = [model["name"] for model in content["models"]]
    rows = evaluation_files.read_answered(config.folder)
    items = items_of_answers(rows, models)
    folder = Path(config.people)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a labelling folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder), contextlib.closing(Store(folder)) as store:
        added = store.add_items(items)
        say(f"{folder}: {len(items):,} prompts to compare, {added:,} of them new")
        if config.serve:
            serve(LabelConfig(folder=config.people, port=config.port), store)
        content |= {"people": people_figures(store, items, models)}
    if content["people"] is None:
        say(f"nobody has judged yet; to label: rlhf-jax label {shlex.quote(config.people)}, then repeat this command")
    evaluation_files.write_evaluation(config.folder, content, rows)
    return content


def show(content: Mapping[str, Any], console: Console) -> None:
    """Prints the tables of evaluation.json."""
    names = [model["name"] for model in content["models"]]
    _print(console, ("figure", *names), [(title, *cells) for title, cells in model_rows(content)], words=1)
    _print(console, WIN_HEAD, win_rows(content), words=3)
    _print(console, PEOPLE_HEAD, people_rows(content), words=2)
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
