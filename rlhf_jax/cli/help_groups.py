"""Order and groups of a stage's flags in --help: the basics first, then the method, the run, and the devices."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from rlhf_jax.config import RunConfig
from rlhf_jax.config.checks import HINT

BASICS = ("help", "init", "reward", "data", "name", "epochs", "steps", "batch", "learning_rate", "config")
RUN = (
    "out",
    "seed",
    "microbatches",
    "log_every",
    "save_every",
    "eval_every",
    "keep_last",
    "tensorboard",
    "wandb",
    "examples",
)
DEVICES = ("devices", "mesh", "pmap", "distributed", "coordinator", "processes", "process")
# Titles of the groups below the basics, from which tyro makes one box.
TITLES = ("data and method", "run and checkpoints", "devices and processes")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def rate_owner(cls: type) -> str:
    """Name of the nested optimizer that --learning-rate is short for; "" without one."""
    names = [field.name for field in dataclasses.fields(cls)]
    if not issubclass(cls, RunConfig) or "learning_rate" in names:
        return ""
    return next((name for name in ("optimizer", "policy") if name in names), "")


def expand_rate(arguments: Sequence[str], owner: str) -> list[str]:
    """The arguments with --learning-rate written in full, such as --optimizer.learning-rate."""

    def expanded(argument: str) -> str:
        flag, equals, value = argument.partition("=")
        is_rate = owner and flag.replace("_", "-") == "--learning-rate"
        return f"--{owner}.learning-rate{equals}{value}" if is_rate else argument

    return [expanded(argument) for argument in arguments]


def shown_fields(cls: type) -> list[tuple[str, Any, Any]]:
    """Fields for `make_dataclass` that --help shows in another way: those with a hint, and --learning-rate."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    shown: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        if HINT in field.metadata:
            hint = tyro.conf.arg(help_behavior_hint=f"({field.metadata[HINT]})")
            shown.append((field.name, Annotated[kinds[field.name], hint], field.default))
        if field.name == rate_owner(cls) and field.default_factory is not dataclasses.MISSING:
            hint = tyro.conf.arg(
                help=f"Peak learning rate; short for --{field.name}.learning-rate.",
                help_behavior_hint=f"(default: {field.default_factory().learning_rate})",
                metavar="FLOAT",
            )
            shown.append(("learning_rate", Annotated[float | None, hint], None))
    return shown


def ordered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stage's flags in the order of their groups."""
    return {name: fields[name] for _, names in _groups(list(fields)) for name in names}


def with_titles(text: str, fields: Sequence[str]) -> str:
    """The help text with a titled rule before each group of flags inside tyro's first box."""
    first = {names[0]: title for title, names in _groups(fields) if title and names}
    lines: list[str] = []
    for line in text.splitlines():
        plain = _COLOR.sub("", line)
        flag = re.match(r"[│ ] --([a-z0-9-]+)(?![.\w-])", plain)
        title = first.pop(flag[1].replace("-", "_"), None) if flag else None
        if title is not None:
            # tyro draws with hyphens where the terminal has no box characters.
            left, rule, right = "├─┤" if plain.startswith("│") else " - "
            lines.append(f"{left}{rule} {title} {rule * (len(plain) - len(title) - 5)}{right}".rstrip())
        lines.append(line)
    return "\n".join(lines)


def _groups(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, fields) of each group; nested configs, which have boxes of their own, are in the second."""
    method = [name for name in names if name not in (*BASICS, *RUN, *DEVICES)]
    titles = ("", *TITLES)
    return [
        (title, [name for name in group if name in names])
        for title, group in zip(titles, (BASICS, method, RUN, DEVICES), strict=True)
    ]
