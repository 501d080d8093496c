"""The comparison of methods as a table on the console and as report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_jax.evaluation.report import html
from rlhf_jax.evaluation.report.charts import Line, line_chart
from rlhf_jax.files import write_file

Content = Mapping[str, Any]
# Methods that learn from comparisons alone are dashed.
COLOURS = {
    "ppo": "ppo", "rloo": "sft", "grpo": "reward", "best-of-n": "pretrain",
    "dpo": "ppo", "kto": "sft", "orpo": "reward", "simpo": "muted",
}  # fmt: skip
DASHED = ("dpo", "kto", "orpo", "simpo")


def table(content: Content) -> Table:
    """The table on the console."""
    shown = Table(title=f"gold score at {content['nats']:g} nats from the SFT model, and cost")
    for place, title in enumerate(_head(content)):
        shown.add_column(title, justify="right" if place else "left")
    for row in _rows(content):
        shown.add_row(*row)
    return shown


def write_methods_report(folder: Path, content: Content) -> Path:
    """Write report.html: the table, gold against √KL, and the matrix of win rates."""
    names = list(content["wins"])
    wins = [[one, *(_wins(content["wins"][one], other, one) for other in names)] for one in names]
    body = [
        html.section(
            "methods",
            "Methods beside one another",
            html.table("Gold score and cost of each method", _head(content), _rows(content)),
            lead=_lead(content),
        ),
        html.section("curve", "Gold score against the distance from the SFT model", _chart(content)),
    ]
    if len(names) > 1:
        title = f"Win rate of the row over the column, nearest {content['nats']:g} nats"
        body.append(html.section("wins", title, html.table(title, ["", *names], wins, hidden=True)))
    path = folder / "report.html"
    write_file(path, html.page("Methods beside one another", "".join(body)))
    return path


def _lead(content: Content) -> str:
    return (
        f"Of {len(content['seeds'])} recipes, each method from the same SFT model, reward model and rankings, measured "
        "on the test prompts by the gold score. ± is the 95% interval of the mean over the seeds."
    )


def _head(content: Content) -> list[str]:
    return ["method", f"gold at {content['nats']:g} nats", "best gold", "at nats", "seconds", "peak GiB"]


def _rows(content: Content) -> list[list[str]]:
    def figure(of: Content, name: str, form: str) -> str:
        if of[name] is None:
            return "–" if name != "at_nats" else f"reached by {of['reached']} of {len(content['seeds'])}"
        spread = of.get(f"{name}_spread")
        return f"{of[name]:{form}}" + (f" ± {spread:.2f}" if spread is not None and math.isfinite(spread) else "")

    forms = {"at_nats": ".2f", "best": ".2f", "best_kl": ".1f", "seconds": ".0f", "gib": ".2f"}
    return [
        [name, *(figure(of, each, form) for each, form in forms.items())] for name, of in content["methods"].items()
    ]


def _wins(row: Content, other: str, one: str) -> str:
    return "" if one == other else f"{row[other]:.2f}"


def _chart(content: Content) -> str:
    lines: list[Line] = []
    for name in content["methods"]:
        lines += _lines(name, content["seeds"])
    return line_chart(lines, title="gold score", x="√KL", y="gold", width=720, height=400)


def _lines(name: str, seeds: Sequence[Content]) -> list[Line]:
    """A curve for each seed; the first has the method's name."""
    found = []
    for place, seed in enumerate(seeds):
        points = sorted((math.sqrt(point["kl"]), point["gold"]) for point in seed["methods"][name]["points"])
        title = f"{name}, seed {seed['seed']}" if place else name
        found.append(Line(title, COLOURS[name], points, dashed=name in DASHED, dots=not place))
    return found
