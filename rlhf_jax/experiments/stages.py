"""Experiment: does each stage help? The three stages in a row, and with each of them skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.intervals import over_seeds
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm, shown
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import Measured, ReviewModels, demonstrations, pages
from rlhf_jax.experiments.reviews import TOPICS, WELL_FORMED
from rlhf_jax.experiments.toy import Fit, fresh, with_head
from rlhf_jax.stages import pretrain, reward, sft

COLUMNS = (
    ("gold", "gold"),
    ("relevant", "names its topic"),
    ("well_formed", "well formed"),
    ("different", "different answers"),
    ("kl", "KL to its start"),
)
STARTS = ("nothing", "pretrained", "SFT alone", "pretrained, SFT")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    Attributes:
      width: of the models.
      layers: of the models.
      pages: pages of pretraining text.
      pretrain_steps: updates on them, of 64 pages each.
      demonstrations: answers to fine-tune on.
      sft_steps: updates on them, of 32 answers each.
      comparisons: pairs of the start's answers that the reward model is trained on.
      reward_steps: updates on them, of 32 pairs each.
      iterations: of PPO, of 128 answers each.
      answers: to each topic in the measurement.
    """

    width: int = 64
    layers: int = 2
    pages: int = 20_000
    pretrain_steps: int = 600
    demonstrations: int = 64
    sft_steps: int = 60
    comparisons: int = 1024
    reward_steps: int = 64
    iterations: int = 60
    answers: int = 64


SHORT = Sizes(
    width=32,
    layers=1,
    pages=128,
    pretrain_steps=4,
    demonstrations=32,
    sft_steps=4,
    comparisons=64,
    reward_steps=3,
    iterations=2,
    answers=8,
)


class Experiment:
    """The experiment on the stages.

    Args:
      short: in a tiny size, for tests.
    """

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(width=sizes.width, layers=sizes.layers)
        self._pretrain = Fit(pretrain.make_update, models.model, rate=3e-3, steps=sizes.pretrain_steps, batch=64)
        self._tune = Fit(sft.make_update, models.model, rate=1e-3, steps=sizes.sft_steps, batch=32)
        self._compare = Fit(reward.make_update, models.scorer, rate=1e-3, steps=sizes.reward_steps, batch=32)
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
            judge, _ = self._compare(with_head(params, models.scorer, seed), pairs, seed=seed)
            before = models.measure(sizes.answers, params, params, judge, seed=seed + 1)
            mean, scale = float(before.score.mean()), float(before.score.std())
            policy = models.rlhf(self._optimise, params, judge, mean, scale, seed=seed, kl_coef=0.02)
            after = models.measure(sizes.answers, policy, params, judge, seed=seed + 2)
            for name, measured in ((start, before), (f"{start}, RLHF", after)):
                found[name], answers[name] = figures(measured), measured.texts[0]
                say(f"  {name}: gold {found[name]['gold']:.2f}   {answers[name]}")
        return {"arms": found, "answers": answers}

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Put the seeds together."""
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
                points = [(float(at), one.value) for at, one in enumerate(two)]
                series.append(Series(start, points, [(one.low, one.high) for one in two], colour=colour))
            panels.append(Panel(title, "0: before RLHF, 1: after it", series))
        whole = figures["pretrained, SFT, RLHF"]["gold"]
        sentences = [
            f"gold without {skipped}: {shown(over_seeds(np.subtract(figures[arm]['gold'], whole).tolist()), '+.2f')} "
            "against all three stages"
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
        "kl": max(float(measured.ratio.mean()), 0.0),
    }
