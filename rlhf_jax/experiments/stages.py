"""Experiment: does each stage help? The three stages in a row, and with each of them skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.experiments.outcome import Outcome, Say, by_arm
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import (
    Measured,
    PretrainedSizes,
    ReviewModels,
    RLHFSizes,
    demonstrations,
    pages,
)
from rlhf_jax.experiments.reviews import TOPICS, WELL_FORMED
from rlhf_jax.experiments.toy import fresh

COLUMNS = (
    ("gold", "gold"),
    ("relevant", "names its topic"),
    ("well_formed", "well formed"),
    ("different", "different answers"),
    ("kl", "KL to its start"),
)
STARTS = ("nothing", "pretrained", "SFT alone", "pretrained, SFT")


@dataclasses.dataclass(frozen=True)
class Sizes(PretrainedSizes, RLHFSizes):
    """Sizes of the experiment.

    Attributes:
      answers: to each topic in the measurement.
    """

    demonstrations: int = 64
    sft_steps: int = 60
    answers: int = 64


SHORT = Sizes.short(demonstrations=32, answers=8)


class Experiment:
    """The experiment on the stages."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._pretrain, self._tune = models.pretraining(sizes), models.tuning(sizes.sft_steps, pretrained=True)
        self._compare = models.comparing(sizes.reward_steps)
        self._optimise = models.optimise(sizes.iterations)

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: start, without and with RLHF -> measures."""
        sizes, models, draws = self.sizes, self._models, np.random.default_rng(seed)
        text, shown_answers = pages(sizes.pages, draws), demonstrations(sizes.demonstrations, draws)
        nothing = fresh(models.model, seed)
        base, _ = self._pretrain(nothing, text, seed=seed)
        alone, tuned = (self._tune(params, shown_answers, seed=seed)[0] for params in (nothing, base))
        found, answers = {}, {}
        for start, params in zip(STARTS, (nothing, base, alone, tuned), strict=True):
            pairs = models.ranked(params, 2 * sizes.comparisons, seed=seed + 3)
            judge = models.judge(self._compare, params, pairs, answers=sizes.answers, seed=seed)
            policy = models.rlhf(self._optimise, params, judge, seed=seed, kl_coef=0.02)
            after = models.measure(sizes.answers, policy, params, judge.params, seed=seed + 2)
            for name, measured in ((start, judge.start), (f"{start}, RLHF", after)):
                found[name], answers[name] = figures(measured), measured.texts[0]
                say(f"  {name}: gold {found[name]['gold']:.2f}   {answers[name]}")
        return {"arms": found, "answers": answers}

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        figures = by_arm([one["arms"] for one in found])
        outcome = Outcome(
            figures,
            COLUMNS,
            "",
            [],
            bounded={"relevant", "well_formed", "different"},
            more={"answers": {arm: [one["answers"][arm] for one in found] for arm in figures}},
        )
        panels = []
        for name, title in COLUMNS[:3]:
            series = []
            for colour, start in enumerate(STARTS):
                two = [outcome.estimate(arm, name) for arm in (start, f"{start}, RLHF")]
                series.append(Series.of(start, zip((0.0, 1.0), two, strict=True), colour=colour))
            panels.append(Panel(title, "0: before RLHF, 1: after it", series))
        sentences = [
            f"gold without {skipped}: {outcome.change(arm, 'pretrained, SFT, RLHF', 'gold')} against all three stages"
            for skipped, arm in (
                ("RLHF", "pretrained, SFT"),
                ("SFT", "pretrained, RLHF"),
                ("pretraining", "SFT alone, RLHF"),
                ("pretraining and SFT", "nothing, RLHF"),
            )
        ]
        picture = curves("Each stage, with and without the others", panels, wide=300)
        return dataclasses.replace(outcome, picture=picture, sentences=sentences)


def figures(measured: Measured) -> dict[str, float]:
    """The measures of a model's answers."""
    texts = measured.texts
    each = len(texts) // len(TOPICS)
    return {
        "gold": float(measured.gold.mean()),
        "relevant": float(np.mean([text.split()[:2] == ["the", TOPICS[i // each]] for i, text in enumerate(texts)])),
        "well_formed": float(np.mean([WELL_FORMED.fullmatch(text) is not None for text in texts])),
        "different": len(set(texts)) / len(texts),
        "kl": measured.kl,
    }
