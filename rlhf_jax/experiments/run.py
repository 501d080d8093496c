"""Runs an experiment by name and writes result.json and picture.svg; an interrupted one resumes."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_jax.errors import UserError
from rlhf_jax.experiments.outcome import Outcome, Say
from rlhf_jax.files import write_file
from rlhf_jax.runs.atomic_files import read_json, write_json

RESULT, PICTURE = "result.json", "picture.svg"
MODULES = {
    "stages": "stages",
    "reward-start": "reward_start",
    "rankings": "rankings",
    "kl": "overoptimised",
    "pretraining-mix": "pretraining_mix",
    "hallucination": "hallucination",
    "diversity": "diversity",
}


class Experiment(Protocol):
    """An experiment, whose repetitions share compiled programs; made with True, in a tiny size for tests.

    Attributes:
      sizes: a dataclass of its settings.
    """

    sizes: Any

    def one(self, seed: int, say: Say) -> Mapping[str, Any]:
        """Run one repetition: its figures as plain JSON, with NaN for what is not there."""

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine those of all seeds."""


def seeds_from(seed: int, count: int) -> list[int]:
    """Seeds of the repetitions, far enough from each other for the numbers that each of them adds to its own."""
    return [1000 * seed + 10 * number for number in range(count)]


def run(name: str, folder: Path, *, seed: int, seeds: int, short: bool, say: Say) -> Outcome:
    """Run an experiment and write its files; the same seed gives the same files.

    Each seed's figures are stored when it is done, and are not computed again.

    Args:
      name: of the experiment.
      folder: of the files; made if it does not exist.
      seed: of the first repetition.
      seeds: number of repetitions.
      short: in a tiny size, whose figures mean nothing.
      say: told what is done.

    Raises:
      UserError: if the folder has figures of other settings.
    """
    make: Callable[[bool], Experiment] = importlib.import_module(f"rlhf_jax.experiments.{MODULES[name]}").Experiment
    folder.mkdir(parents=True, exist_ok=True)
    experiment, drawn = make(short), seeds_from(seed, seeds)
    settings = plain({"experiment": name, **dataclasses.asdict(experiment.sizes)})
    found = []
    for number in drawn:
        path = folder / f"seed-{number}.json"
        if not path.exists():
            say(f"seed {number}")
            write_json(path, plain({"settings": settings, "found": experiment.one(number, say)}))
        content = read_json(path)
        if content["settings"] != settings:
            raise UserError(f"{path}: expected figures of {settings}, got {content['settings']}; use another --out")
        found.append(_numbers(content["found"]))
    outcome = experiment.outcome(found)
    figures = {
        arm: {
            measure: dataclasses.asdict(outcome.estimate(arm, measure)) | {"per_seed": list(values)}
            for measure, values in measures.items()
        }
        for arm, measures in outcome.figures.items()
    }
    result = {"experiment": name, "seeds": drawn, "short": short, "sentences": list(outcome.sentences)}
    write_json(folder / RESULT, plain(result | {"figures": figures} | dict(outcome.more)))
    write_file(folder / PICTURE, outcome.picture)
    return outcome


def plain(value: Any) -> Any:
    """The value as plain JSON, with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The inverse of `plain`: NaN for null."""
    if isinstance(value, Mapping):
        return {name: _numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return math.nan if value is None else value
