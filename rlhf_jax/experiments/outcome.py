"""The form in which an experiment gives its figures: rows of arms, columns of measures, a value for each seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.intervals import Estimate, over_seeds

Say = Callable[[str], None]
Rows = Mapping[str, Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Figures of an experiment.

    Attributes:
      figures: arm -> measure -> value of each seed; NaN where a seed has none.
      columns: (measure, heading) of the table on the console.
      picture: SVG.
      sentences: the results in words.
      bounded: measures that are from 0 to 1, as their intervals are then.
      more: further figures, as plain JSON with NaN for what is not there.
    """

    figures: Rows
    columns: Sequence[tuple[str, str]]
    picture: str
    sentences: Sequence[str]
    bounded: Collection[str] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def estimate(self, arm: str, measure: str) -> Estimate:
        """Mean over the seeds with its interval."""
        found = over_seeds(self.figures[arm][measure])
        if measure not in self.bounded or math.isnan(found.low):
            return found
        return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))

    def change(self, arm: str, other: str, measure: str, form: str = "+.2f") -> str:
        """Mean over the seeds of the difference between two arms, with its interval, as text."""
        one, two = (self.figures[name][measure] for name in (arm, other))
        return shown(over_seeds(np.subtract(one, two).tolist()), form)


def by_arm(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Figures of each seed, arm -> measure -> value, as arm -> measure -> values."""
    return {
        arm: {measure: [figures[arm][measure] for figures in seeds] for measure in measures}
        for arm, measures in seeds[0].items()
    }


def shown(estimate: Estimate, form: str = ".2f") -> str:
    """ "0.81 (0.78 to 0.84)"; without the interval if there is none."""
    if math.isnan(estimate.low):
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
