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
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import LENGTH, PROMPT, ReviewModels, RLHFSizes, demonstrations
from rlhf_jax.experiments.reviews import BAD, TOPICS, WELL_FORMED, WORDS, review
from rlhf_jax.experiments.toy import Fit, fresh, with_head
from rlhf_jax.stages import ppo, preference

COLUMNS = (
    ("acceptable", "acceptable"),
    ("different", "different acceptable answers"),
    ("entropy", "entropy, nats"),
    ("kl", "KL to the start"),
)


@dataclasses.dataclass(frozen=True)
class Sizes(RLHFSizes):
    """Sizes of the experiment, whose demonstrations are as often bad as good.

    Attributes:
      each: acceptable demonstrations of a topic, for SFT.
      betas: values of β, for PPO.
      steps: updates of SFT and DPO on answers of the start, of 32 answers or pairs each.
      answers: to each topic in the measurement.
    """

    each: tuple[int, ...] = (1, 4, 64)
    betas: tuple[float, ...] = (0.0, 0.05)
    iterations: int = 40
    steps: int = 64
    answers: int = 256


SHORT = Sizes.short(each=(1, 2), comparisons=32, steps=3, answers=8)


def acceptable(topic: str, text: str) -> bool:
    """True for an answer about the topic that people could have written, with good words alone."""
    words = text.split()
    return words[:2] == ["the", topic] and WELL_FORMED.fullmatch(text) is not None and not set(words) & set(BAD)


def judged(texts: Sequence[str]) -> np.ndarray:
    """Which answers are acceptable, of as many to each topic, those to a topic after each other, [B]."""
    each = len(texts) // len(TOPICS)
    return np.array([acceptable(TOPICS[at // each], text) for at, text in enumerate(texts)])


class Experiment:
    """The experiment on diversity and negative feedback."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._begin = models.tuning(sizes.sft_steps, pretrained=False)
        self._tune = models.tuning(sizes.steps, pretrained=True)
        self._compare = models.comparing(sizes.reward_steps)
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
                "kl": answers.kl,
            }
            say(f"  {name}: acceptable {good.mean():.2f}, different {found[name]['different']:.0f} a topic")

        measured("start", start)
        for each in sizes.each:
            pairs = [(topic, written(topic, draws)) for topic in TOPICS for _ in range(each)]
            rows = [pairs[place % len(pairs)] for place in range(max(sizes.each) * len(TOPICS))]
            measured(f"SFT, {each} of a topic", self._tune(start, WORDS.rows(rows, LENGTH), seed=seed)[0])
        for beta in sizes.betas:
            measured(f"PPO, 1 for acceptable, β {beta:g}", self.rewarded(start, head, seed, beta))
        for name, params in self.by_feedback(start, seed).items():
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

    def by_feedback(self, start: Params, seed: int) -> dict[str, Params]:
        """Three ways to learn from the same answers of the start, each called acceptable or not."""
        sizes, models = self.sizes, self._models
        pairs = models.ranked(start, 2 * sizes.comparisons, seed=seed + 3)
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
        judge = models.judge(self._compare, start, compared, answers=sizes.answers, seed=seed)
        said = compared.mask_BKT & (jnp.arange(tokens.shape[1]) >= PROMPT)[None, None]
        decided = _decided(PreferenceBatch(compared, said))
        return {
            "SFT on the acceptable": start if rows is None else self._tune(start, rows, seed=seed)[0],
            "DPO": self._prefer(start, decided, preference.Frozen(start), seed=seed)[0],
            "reward model and PPO, β 0.05": models.rlhf(self._by_judge, start, judge, seed=seed, kl_coef=0.05),
        }

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        figures = by_arm(found)
        outcome = Outcome(figures, COLUMNS, "", [], bounded={"acceptable"})
        series = []
        for colour, name in enumerate(figures):
            x, y = (outcome.estimate(name, measure) for measure in ("acceptable", "different"))
            series.append(Series.of(name, [(x.value, y)], colour=colour))
        picture = curves(
            "Acceptable answers, and how many different ones",
            [Panel("different ones, of a topic", "acceptable", series)],
        )

        one, ruled = f"SFT, {self.sizes.each[0]} of a topic", f"PPO, 1 for acceptable, β {self.sizes.betas[-1]:g}"
        best, judged_by = "SFT on the acceptable", "reward model and PPO, β 0.05"
        sentences = [
            f"{ruled} against {one}: acceptable {outcome.change(ruled, one, 'acceptable')}, entropy "
            f"{outcome.change(ruled, one, 'entropy')} nats",
            *(
                f"{name} against {best}: acceptable {outcome.change(name, best, 'acceptable')}, entropy "
                f"{outcome.change(name, best, 'entropy')} nats"
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
