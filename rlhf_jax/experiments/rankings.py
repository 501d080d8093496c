"""Experiment: the comparisons of a ranking as one element of a batch, against all of them shuffled.

InstructGPT trains on all pairs of a prompt's answers at once, because a model over-fits in one pass where they are
shuffled: each answer is then in K − 1 updates of a pass (Ouyang et al. 2022, section 3.4, arXiv:2203.02155).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import RankingBatch
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.experiments import review_models
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import ReviewModels, demonstrations
from rlhf_jax.experiments.toy import fresh, with_head

COLUMNS = (
    ("train_loss", "loss, training"),
    ("loss", "loss, held out"),
    ("accuracy", "accuracy, held out"),
    ("gold_accuracy", "accuracy by gold"),
)
KINDS = ("rankings", "shuffled pairs")


@dataclasses.dataclass(frozen=True)
class Sizes(review_models.Sizes):
    """Sizes of the experiment.

    Attributes:
      rankings: rankings to train on.
      size: answers in each, K.
      noise: standard deviation of what a labeller adds to the rank of an answer by gold score.
      batch: rankings in an update; the pairs of as many are in an update of shuffled pairs.
      passes: passes over the data.
      heldout: rankings of the test.
    """

    rankings: int = 256
    size: int = 8
    noise: float = 2.0
    batch: int = 8
    passes: tuple[int, ...] = (1, 2, 4, 8)
    heldout: int = 512


SHORT = Sizes.short(rankings=16, size=4, batch=4, passes=(1, 2, 3), heldout=16)


def judged(rankings: RankingBatch, noise: float, draws: np.random.Generator) -> RankingBatch:
    """Rankings by somebody who misplaces each answer by `noise` ranks, of rankings by gold score."""
    ranks_BK = np.asarray(rankings.ranks_BK)
    value_BK = -ranks_BK + noise * draws.normal(size=ranks_BK.shape)
    found_BK = 1 + (value_BK[:, None, :] > value_BK[:, :, None]).sum(axis=2)
    return dataclasses.replace(rankings, ranks_BK=jnp.asarray(found_BK, jnp.int32))


def pairs_of(rankings: RankingBatch) -> RankingBatch:
    """All pairs of each ranking, as rankings of two."""
    one, other = (list(x) for x in zip(*itertools.combinations(range(rankings.ranks_BK.shape[1]), 2), strict=True))

    def paired(x: Any) -> Any:
        both = jnp.stack([x[:, jnp.array(one)], x[:, jnp.array(other)]], axis=2)
        return both.reshape(-1, *both.shape[2:])

    return RankingBatch(*(paired(x) for x in vars(rankings).values()))


def pair_loss(score_BK: Floats, ranks_BK: Floats) -> float:
    """Mean of −log σ(r_w − r_l) over the ordered pairs."""
    better = ranks_BK[:, :, None] < ranks_BK[:, None, :]
    margin = (score_BK[:, :, None] - score_BK[:, None, :])[better]
    return float(np.logaddexp(0.0, -margin).mean())


class Experiment:
    """The experiment on rankings as one element."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._tune = models.tuning(sizes.sft_steps, pretrained=False)
        pairs = sizes.batch * sizes.size * (sizes.size - 1) // 2
        self._compare = {
            arm(kind, passes): models.comparing(
                passes * sizes.rankings // sizes.batch, batch=sizes.batch if kind == "rankings" else pairs
            )
            for kind in KINDS
            for passes in sizes.passes
        }

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: kind and passes -> measures."""
        sizes, models, draws = self.sizes, self._models, np.random.default_rng(seed)
        start, _ = self._tune(fresh(models.model, seed), demonstrations(sizes.demonstrations, draws), seed=seed)
        answers = sizes.rankings * sizes.size, sizes.heldout * sizes.size
        gold = [models.ranked(start, n, seed=seed + 3 + i, size=sizes.size) for i, n in enumerate(answers)]
        train, heldout = (judged(rankings, sizes.noise, draws) for rankings in gold)
        data = dict(zip(KINDS, (train, pairs_of(train)), strict=True))
        found = {}
        for (kind, passes), (name, compare) in zip(
            itertools.product(KINDS, sizes.passes), self._compare.items(), strict=True
        ):
            judge, _ = compare(with_head(start, models.scorer, seed), data[kind], seed=seed)
            own, other = models.scores(judge, train), models.scores(judge, heldout)
            found[name] = {
                "train_loss": pair_loss(own, np.asarray(train.ranks_BK)),
                "loss": pair_loss(other, np.asarray(heldout.ranks_BK)),
                "accuracy": models.accuracy(judge, heldout),
                "gold_accuracy": models.accuracy(judge, gold[1]),
                "passes": float(passes),
            }
            say(f"  {name}: held-out loss {found[name]['loss']:.3f}, training {found[name]['train_loss']:.3f}")
        return found

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        outcome = Outcome(by_arm(found), COLUMNS, "", [], bounded={"accuracy", "gold_accuracy"})
        panels = []
        for title, names in (("loss", ("loss", "train_loss")), ("accuracy by gold", ("gold_accuracy",))):
            series = []
            for colour, kind in enumerate(KINDS):
                for name in names:
                    places = [(float(n), outcome.estimate(arm(kind, n), name)) for n in self.sizes.passes]
                    label = f"{kind}{', training' if name == 'train_loss' else ''}"
                    series.append(Series.of(label, places, dashed=name == "train_loss", colour=colour))
            panels.append(Panel(title, "passes over the data", series))
        sentences = []
        for passes in self.sizes.passes:
            one, other = (arm(kind, passes) for kind in KINDS)
            loss, accuracy = (outcome.change(other, one, name, "+.3f") for name in ("loss", "gold_accuracy"))
            sentences.append(
                f"shuffled pairs against rankings, passes {passes}: held-out loss {loss}, accuracy by gold {accuracy}"
            )
        picture = curves("A ranking as one element, and its pairs shuffled", panels)
        return dataclasses.replace(outcome, picture=picture, sentences=sentences)


def arm(kind: str, passes: int) -> str:
    """Name of a row."""
    return f"{kind}, {passes} pass{'es' * (passes > 1)}"
