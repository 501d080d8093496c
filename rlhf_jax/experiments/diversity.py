"""Experiment: two reasons why RLHF may do better than SFT, diversity and negative feedback.

An answer is acceptable if people could have written it, and it names its topic and has good words alone. Diversity: SFT
on one acceptable demonstration of a topic or several, against PPO with 1 for each acceptable answer. Negative feedback:
one set of sampled answers, of which the acceptable ones become demonstrations, or all of them comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, PreferenceBatch, RankingBatch
from rlhf_jax.config import PreferenceConfig
from rlhf_jax.evaluation.intervals import over_seeds
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm, shown
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import LENGTH, PROMPT, ReviewModels, demonstrations
from rlhf_jax.experiments.reviews import BAD, TOPICS, WELL_FORMED, WORDS, review
from rlhf_jax.experiments.toy import Fit, fresh, with_head
from rlhf_jax.stages import ppo, preference, reward, sft

COLUMNS = (
    ("acceptable", "acceptable"),
    ("different", "different acceptable answers"),
    ("entropy", "entropy, nats"),
    ("kl", "KL to the start"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    Attributes:
      each: acceptable demonstrations of a topic, for SFT.
      betas: values of β, for PPO.
      width: of the models.
      layers: of the models.
      demonstrations: answers, as often bad as good, that the starting model has learned from.
      start_steps: updates on them, of 64 answers each.
      steps: updates of SFT and DPO, of 32 answers or pairs each.
      sampled: answers of the start that feedback is given on.
      reward_steps: updates of the reward model, of 32 pairs each.
      iterations: of PPO, of 128 answers each.
      answers: to each topic in the measurement.
    """

    each: tuple[int, ...] = (1, 4, 64)
    betas: tuple[float, ...] = (0.0, 0.05)
    width: int = 64
    layers: int = 2
    demonstrations: int = 4096
    start_steps: int = 250
    steps: int = 64
    sampled: int = 2048
    reward_steps: int = 64
    iterations: int = 40
    answers: int = 256


SHORT = Sizes(
    each=(1, 2),
    width=32,
    layers=1,
    demonstrations=64,
    start_steps=4,
    steps=3,
    sampled=64,
    reward_steps=3,
    iterations=2,
    answers=8,
)


def acceptable(topic: str, text: str) -> bool:
    """True for an answer about the topic that people could have written, with good words alone."""
    words = text.split()
    return words[:2] == ["the", topic] and WELL_FORMED.fullmatch(text) is not None and not set(words) & set(BAD)


def judged(texts: Sequence[str]) -> np.ndarray:
    """Which answers are acceptable, of as many to each topic, those to a topic after each other, [B]."""
    each = len(texts) // len(TOPICS)
    return np.array([acceptable(TOPICS[at // each], text) for at, text in enumerate(texts)])


class Experiment:
    """The experiment on diversity and negative feedback.

    Args:
      short: in a tiny size, for tests.
    """

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(width=sizes.width, layers=sizes.layers)
        self._begin = Fit(sft.make_update, models.model, rate=3e-3, steps=sizes.start_steps, batch=64)
        self._tune = Fit(sft.make_update, models.model, rate=1e-3, steps=sizes.steps, batch=32)
        self._compare = Fit(reward.make_update, models.scorer, rate=1e-3, steps=sizes.reward_steps, batch=32)
        self._prefer = Fit(
            lambda model, optimizer: preference.make_update(model, optimizer, PreferenceConfig(method="dpo")),
            models.model,
            rate=1e-3,
            steps=sizes.steps,
            batch=32,
        )
        self._by_rule = models.optimise(sizes.iterations, by_text=True)
        self._by_judge = models.optimise(sizes.iterations)

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: arm -> measures."""
        sizes, models, draws = self.sizes, self._models, np.random.default_rng(seed)
        start, _ = self._begin(fresh(models.model, seed), demonstrations(sizes.demonstrations, draws), seed=seed)
        head = with_head(start, models.scorer, seed)
        found: dict[str, dict[str, float]] = {}

        def measured(name: str, params: Params) -> None:
            answers = models.measure(sizes.answers, params, start, head, seed=seed + 2)
            good = judged(answers.texts)
            kept = [text for text, right in zip(answers.texts, good, strict=True) if right]
            found[name] = {
                "acceptable": float(good.mean()),
                "different": len(set(kept)) / len(TOPICS),
                "entropy": float(-answers.logp.mean()),
                "kl": max(float(answers.ratio.mean()), 0.0),
            }
            say(f"  {name}: acceptable {good.mean():.2f}, different {found[name]['different']:.0f} a topic")

        measured("start", start)
        for each in sizes.each:
            pairs = [(topic, written(topic, draws)) for topic in TOPICS for _ in range(each)]
            rows = [pairs[place % len(pairs)] for place in range(max(sizes.each) * len(TOPICS))]
            measured(f"SFT, {each} of a topic", self._tune(start, WORDS.rows(rows, LENGTH), seed=seed)[0])
        for beta in sizes.betas:
            measured(f"PPO, 1 for acceptable, β {beta:g}", self.rewarded(start, head, seed, beta))
        for name, params in self.by_feedback(start, head, seed).items():
            measured(name, params)
        return found

    def rewarded(self, start: Params, head: Params, seed: int, beta: float) -> Params:
        """PPO with 1 for an acceptable answer and 0 for others."""

        def value(places: Sequence[int], texts: Sequence[str]) -> list[float]:
            return [float(acceptable(TOPICS[place], text)) for place, text in zip(places, texts, strict=True)]

        return self._by_rule(
            start,
            head,
            ppo.Frozen(start, None, jnp.float32(0), jnp.float32(1)),
            WORDS.prompts(TOPICS, PROMPT),
            lambda draws, count: draws.integers(len(TOPICS), size=count),
            seed=seed,
            kl_coef=beta,
            reward=value,
        )

    def by_feedback(self, start: Params, head: Params, seed: int) -> dict[str, Params]:
        """Three ways to learn from the same answers of the start, each called acceptable or not."""
        sizes, models = self.sizes, self._models
        pairs = models.ranked(start, sizes.sampled, seed=seed + 3)
        tokens = np.asarray(pairs.tokens_BKT).reshape(-1, pairs.tokens_BKT.shape[-1])
        mask = np.asarray(pairs.mask_BKT).reshape(tokens.shape)
        mask = mask & (np.arange(tokens.shape[1]) >= PROMPT)
        texts = WORDS.texts(tokens, mask)
        good = judged(texts)
        each = len(texts) // len(TOPICS)
        kept = [(TOPICS[at // each], text) for at, text in enumerate(texts) if good[at]]
        # Of the same shape whatever the seed.
        rows = WORDS.rows([kept[place % len(kept)] for place in range(len(texts))], LENGTH) if kept else None
        compared = dataclasses.replace(pairs, ranks_BK=jnp.asarray(2 - good.reshape(-1, 2).astype(np.int32)))
        judge, _ = self._compare(head, compared, seed=seed)
        before = models.measure(sizes.answers, start, start, judge, seed=seed + 1)
        mean, scale = float(before.score.mean()), float(before.score.std())
        said = compared.mask_BKT & (jnp.arange(tokens.shape[1]) >= PROMPT)[None, None]
        return {
            "SFT on the acceptable": start if rows is None else self._tune(start, rows, seed=seed)[0],
            "DPO": self._prefer(start, _decided(PreferenceBatch(compared, said)), preference.Frozen(start), seed=seed)[
                0
            ],
            "reward model and PPO, β 0.05": models.rlhf(
                self._by_judge, start, judge, mean, scale, seed=seed, kl_coef=0.05
            ),
        }

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Put the seeds together."""
        figures = by_arm(found)
        outcome = Outcome(figures, COLUMNS, "", [], bounded={"acceptable"})
        series = []
        for colour, name in enumerate(figures):
            x, y = (outcome.estimate(name, measure) for measure in ("acceptable", "different"))
            series.append(Series(name, [(x.value, y.value)], [(y.low, y.high)], colour=colour))
        picture = curves(
            "Acceptable answers, and how many different ones",
            [Panel("different ones, of a topic", "acceptable", series)],
        )

        def change(name: str, other: str, measure: str) -> str:
            return shown(over_seeds(np.subtract(figures[name][measure], figures[other][measure]).tolist()), "+.2f")

        one, ruled = f"SFT, {self.sizes.each[0]} of a topic", f"PPO, 1 for acceptable, β {self.sizes.betas[-1]:g}"
        best, judged_by = "SFT on the acceptable", "reward model and PPO, β 0.05"
        sentences = [
            f"{ruled} against {one}: acceptable {change(ruled, one, 'acceptable')}, entropy "
            f"{change(ruled, one, 'entropy')} nats",
            *(
                f"{name} against {best}: acceptable {change(name, best, 'acceptable')}, entropy "
                f"{change(name, best, 'entropy')} nats"
                for name in ("DPO", judged_by)
            ),
        ]
        return dataclasses.replace(outcome, picture=picture, sentences=sentences)


def written(topic: str, draws: np.random.Generator) -> str:
    """An acceptable answer as people write them."""
    while not acceptable(topic, text := review(topic, draws)):
        pass
    return text


def _decided(batch: PreferenceBatch) -> PreferenceBatch:
    """The batch with its undecided pairs replaced by decided ones, in turn, so that each update has as many."""
    ranks = np.asarray(batch.ranking.ranks_BK)
    places = np.flatnonzero(ranks[:, 0] != ranks[:, 1])
    if not len(places):
        return batch
    taken = np.resize(places, len(ranks))
    ranking = RankingBatch(*(x[taken] for x in vars(batch.ranking).values()))
    return PreferenceBatch(ranking, batch.loss_mask_BKT[taken])
