"""Accuracy and calibration of a reward model on comparisons: by margin, by length, and against "the longer wins"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.evaluation.intervals import Floats, wilson

BANDS = (
    ("TL;DR summaries, reward models of 1B / 2.8B / 6.9B", "0.63 / 0.67 / 0.69", "arXiv:2403.17031"),
    ("HH harmlessness, reward model of 1.4B", "0.61", "trlx#257"),
    ("HH harmlessness, “the longer answer”", "0.55", "trlx#257"),
    ("agreement of InstructGPT’s labellers with each other", "0.73", "arXiv:2203.02155"),
)
"""Accuracies on people's comparisons to expect: (what, accuracy, source)."""
USUAL = (0.6, 0.7)
"""Usual accuracy of a reward model on people's comparisons."""
LEAST = 0.55
"""Accuracy that "the longer answer" reaches on people's comparisons: a reward model below it is nothing to climb."""


@dataclasses.dataclass(frozen=True)
class MarginBin:
    """Pairs whose predicted probability is in one bin.

    Attributes:
      low: lower end of the bin.
      high: upper end.
      predicted: mean predicted probability that the answer with the higher score is the better one, σ(|margin|).
      observed: share of the pairs in which it is, equal scores counting half.
      pairs: number of pairs.
      interval: Wilson's 95% interval of `observed`.
    """

    low: float
    high: float
    predicted: float
    observed: float
    pairs: int
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class LengthBucket:
    """Pairs with a similar difference in length.

    Attributes:
      low: least difference, better answer minus worse, in the unit of the lengths.
      high: largest difference.
      accuracy: share of pairs whose better answer has the higher score, equal scores counting half.
      longer: the same of the rule that the longer answer is better.
      pairs: number of pairs.
      interval: Wilson's 95% interval of `accuracy`.
    """

    low: float
    high: float
    accuracy: float
    longer: float
    pairs: int
    interval: tuple[float, float]


def right(margins: Floats) -> Floats:
    """1 where a margin, better minus worse, is above 0, ½ where it is 0, else 0."""
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))


def by_margin(margins: Floats, bins: int = 5) -> tuple[list[MarginBin], float]:
    """Calibration of a reward model that was trained with −log σ(margin): predicted against observed accuracy.

    Args:
      margins: score of the better answer minus that of the worse one, [M], in nats, as the model gives them and not
        normalised.
      bins: number of bins of equal width over the predicted probabilities from ½ to 1; empty ones are left out.

    Returns:
      (the bins, ECE: expected calibration error Σ_b n_b / M |observed_b − predicted_b|).

    Source: Guo et al. 2017, section 2 (arXiv:1706.04599).
    """
    predicted_M, right_M = 1 / (1 + np.exp(-np.abs(margins))), right(margins)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place_M = np.minimum(((predicted_M - 0.5) * 2 * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for place in range(bins):
        inside = place_M == place
        count = int(inside.sum())
        if count:
            predicted, observed = float(predicted_M[inside].mean()), float(right_M[inside].mean())
            ends = (float(edges[place]), float(edges[place + 1]))
            found.append(MarginBin(*ends, predicted, observed, count, wilson(observed, count)))
            error += count / len(margins) * abs(observed - predicted)
    return found, error


def by_length(margins: Floats, better: Floats, worse: Floats, buckets: int = 4) -> list[LengthBucket]:
    """Accuracy by difference in length, in buckets of about equally many pairs; equal differences share a bucket.

    A model that only counts words is right where the better answer is the longer one, and wrong where it is shorter.

    Args:
      margins: score of the better answer minus that of the worse one, [M].
      better: length of the better answer.
      worse: length of the worse answer.
      buckets: most buckets.
    """
    difference = np.asarray(better, np.float64) - worse
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, buckets + 1)[1:-1], method="lower"))
    place_M = np.searchsorted(edges, difference, side="left")
    found = []
    for place in np.unique(place_M):
        inside = place_M == place
        accuracy, count = float(right(margins[inside]).mean()), int(inside.sum())
        found.append(
            LengthBucket(
                low=float(difference[inside].min()),
                high=float(difference[inside].max()),
                accuracy=accuracy,
                longer=float(right(difference[inside]).mean()),
                pairs=count,
                interval=wilson(accuracy, count),
            )
        )
    return found


def verdicts(
    accuracy: float, interval: tuple[float, float], longer: float, bins: Sequence[MarginBin], error: float
) -> list[str]:
    """What an accuracy on comparisons says of a reward model, in sentences.

    Args:
      accuracy: of the reward model.
      interval: its 95% interval.
      longer: accuracy of the rule that the longer answer is better.
      bins: calibration by margin.
      error: expected calibration error.
    """
    low, high = interval
    said = []
    if low <= 0.5:
        said.append("it may be no better than chance: do not optimise against it")
    elif high < USUAL[0]:
        said.append("below what people's comparisons usually give: more comparisons, or a larger model to start from")
    elif low > 0.75:
        said.append(
            "above the agreement of people with each other: expected of generated labels and of easy pairs; otherwise "
            "look for training rows among these comparisons"
        )
    elif low <= USUAL[1]:
        said.append("in the usual range on people's comparisons")
    if accuracy <= longer:
        said.append('no better than the rule "the longer answer wins"')
    count = sum(one.pairs for one in bins)
    claimed = sum(one.pairs * one.predicted for one in bins) / max(count, 1)
    if error > 0.1:
        what = "over-confident: its margins promise more than is right" if claimed > accuracy else "under-confident"
        said.append(what)
    return said
