"""Experiment: from which model to start a reward model, against the number of comparisons and how good the labels are.

The comparisons are of answers of the fine-tuned model, for all starts alike. A label agrees with the gold score with a
given probability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, RankingBatch
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import PretrainedSizes, ReviewModels, demonstrations, pages
from rlhf_jax.experiments.toy import fresh, with_head

STARTS = ("SFT", "pretrained", "scratch")
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Sizes(PretrainedSizes):
    """Sizes of the experiment.

    Attributes:
      comparisons: numbers of pairs that a reward model is trained on.
      agreements: probabilities that a label agrees with the gold score.
      tested: pairs of the test, with the gold score's labels.
      fewest_steps: updates of a reward model, of 32 pairs each, at least; else two passes.
      most_steps: at most.
    """

    comparisons: tuple[int, ...] = (100, 500, 2500, 20_000)
    agreements: tuple[float, ...] = (0.6, 0.75, 0.95)
    tested: int = 4096
    fewest_steps: int = 32
    most_steps: int = 625


SHORT = Sizes.short(comparisons=(32, 64), agreements=(0.6, 0.95), tested=64, fewest_steps=2, most_steps=3)


def labelled(pairs: RankingBatch, count: int, agreement: float, seed: int) -> RankingBatch:
    """So many of the pairs at random, each with its order reversed with probability 1 − agreement.

    Pairs of equal gold score stay ties, which the loss leaves out.
    """
    draws = np.random.default_rng(seed)
    places = draws.permutation(len(pairs.ranks_BK))[:count]
    some = jax.tree.map(lambda x: x[places], pairs)
    wrong_B1 = draws.random((count, 1)) >= agreement
    return dataclasses.replace(some, ranks_BK=jnp.where(wrong_B1, some.ranks_BK[:, ::-1], some.ranks_BK))


class Experiment:
    """The experiment on the start of a reward model."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._pretrain, self._tune = models.pretraining(sizes), models.tuning(sizes.sft_steps, pretrained=True)
        self._compare = {
            count: models.comparing(min(max(2 * count // BATCH, sizes.fewest_steps), sizes.most_steps), batch=BATCH)
            for count in sizes.comparisons
        }

    def starts(self, seed: int) -> dict[str, Params]:
        """Initial parameters of each start, with a score head of zeros."""
        sizes, models, draws = self.sizes, self._models, np.random.default_rng(seed)
        base, _ = self._pretrain(fresh(models.model, seed), pages(sizes.pages, draws), seed=seed)
        tuned, _ = self._tune(base, demonstrations(sizes.demonstrations, draws), seed=seed)
        return dict(zip(STARTS, (tuned, base, fresh(models.model, seed + 1)), strict=True))

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: start and number of comparisons -> agreement -> accuracy."""
        sizes, models, starts = self.sizes, self._models, self.starts(seed)
        pairs = models.ranked(starts["SFT"], 2 * max(sizes.comparisons), seed=seed + 3)
        test = models.ranked(starts["SFT"], 2 * sizes.tested, seed=seed + 4)
        found: dict[str, dict[str, float]] = {}
        for start, params in starts.items():
            for count, compare in self._compare.items():
                found[arm(start, count)] = figures = {}
                for agreement in sizes.agreements:
                    rows = labelled(pairs, count, agreement, seed + 5)
                    judge, _ = compare(with_head(params, models.scorer, seed), rows, seed=seed)
                    figures[f"{agreement:g}"] = models.accuracy(judge, test)
                say(f"  {arm(start, count)}: {', '.join(f'{value:.3f}' for value in figures.values())}")
        return found

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        figures, measures = by_arm(found), [f"{agreement:g}" for agreement in self.sizes.agreements]
        outcome = Outcome(figures, [(name, f"agreement {name}") for name in measures], "", [], bounded=set(measures))
        panels = [
            Panel(
                f"labels that agree in {float(name):.0%}",
                "comparisons, log10",
                [
                    Series.of(
                        start,
                        [(math.log10(n), outcome.estimate(arm(start, n), name)) for n in self.sizes.comparisons],
                        colour=colour,
                    )
                    for colour, start in enumerate(STARTS)
                ],
            )
            for name in measures
        ]
        picture = curves("Accuracy of a reward model by its start", panels, wide=300)
        sentences = [
            f"SFT's gain over {other}, {count:,} pairs at {name}: "
            f"{outcome.change(arm('SFT', count), arm(other, count), name, '+.3f')}"
            for other in STARTS[1:]
            for name in measures
            for count in self.sizes.comparisons
        ]
        return dataclasses.replace(outcome, picture=picture, sentences=sentences)


def arm(start: str, count: int) -> str:
    """Name of a row."""
    return f"{start}, {count:,} pairs"
