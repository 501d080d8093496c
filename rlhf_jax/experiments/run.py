"""Runs an experiment by name and writes result.json and picture.svg."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.experiments.outcome import Outcome, Say
from rlhf_jax.files import write_file
from rlhf_jax.runs.atomic_files import write_json

RESULT, PICTURE = "result.json", "picture.svg"
_MODULES = {"hallucination": "hallucination", "kl": "overoptimised"}


def seeds_from(seed: int, count: int) -> list[int]:
    """Seeds of the repetitions, far enough from each other for the numbers that each of them adds to its own."""
    return [1000 * seed + 10 * number for number in range(count)]


def run(name: str, folder: Path, *, seed: int, seeds: int, short: bool, say: Say) -> Outcome:
    """Run an experiment and write its files; the same seed gives the same files.

    Args:
      name: of the experiment.
      folder: of the files; made if it does not exist.
      seed: of the first repetition.
      seeds: number of repetitions.
      short: in a tiny size, whose figures mean nothing.
      say: told what is done.
    """
    module: Any = importlib.import_module(f"rlhf_jax.experiments.{_MODULES[name]}")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = seeds_from(seed, seeds)
    outcome: Outcome = module.run(drawn, short=short, say=say)
    figures = {
        arm: {
            measure: dataclasses.asdict(outcome.estimate(arm, measure)) | {"per_seed": list(values)}
            for measure, values in measures.items()
        }
        for arm, measures in outcome.figures.items()
    }
    result = {"experiment": name, "seeds": drawn, "short": short, "sentences": list(outcome.sentences)}
    write_json(folder / RESULT, _plain(result | {"figures": figures} | dict(outcome.more)))
    write_file(folder / PICTURE, outcome.picture)
    return outcome


def _plain(value: Any) -> Any:
    """The value with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
