"""Arms of a comparison: answers of one model to the same prompts, their scores, and figures of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.evaluation.best_of_n import best_of_n, best_of_n_kl
from rlhf_jax.evaluation.diversity import distinct_n, repetition, self_bleu, words
from rlhf_jax.evaluation.intervals import Estimate, Floats, mean_estimate
from rlhf_jax.evaluation.preferences import compare

ORDERS = (1, 2, 3)  # of distinct-n


@dataclasses.dataclass(frozen=True)
class Arm:
    """Answers of one model.

    Attributes:
      name: in tables.
      model: as the user named it.
      kind: a model that was sampled, a file of answers, or the best of n answers of such a model or file.
      answers: K answers to each of P prompts.
      scores: [P, K] by the name of each scorer, NaN for an answer without a score.
      best_of: n of a best-of-n arm, else 0.
      text: figures on held-out text.
    """

    name: str
    model: str
    kind: Literal["model", "file", "best-of-n"]
    answers: Sequence[Sequence[Answer]]
    scores: Mapping[str, Floats]
    best_of: int = 0
    text: Mapping[str, float] | None = None

    @property
    def lengths(self) -> Floats:
        """Characters of each answer, [P, K]."""
        return np.array([[len(answer.text) for answer in several] for several in self.answers], np.float64)

    def columns(self, first: int, count: int) -> Arm:
        """The arm with `count` of the answers to each prompt."""
        return dataclasses.replace(
            self,
            answers=[several[first : first + count] for several in self.answers],
            scores={name: x[:, first : first + count] for name, x in self.scores.items()},
        )


def best_arm(pool: Arm, scorer: str) -> Arm:
    """The arm of the best answer of each prompt by a scorer; an answer without a score is never the best of several."""
    count = len(pool.answers[0])
    best_P = best_of_n(np.where(np.isnan(pool.scores[scorer]), -np.inf, pool.scores[scorer]))
    return dataclasses.replace(
        pool,
        name=f"{pool.name}, best of {count}",
        kind="best-of-n",
        answers=[[several[best]] for several, best in zip(pool.answers, best_P, strict=True)],
        scores={name: np.take_along_axis(x, best_P[:, None], axis=1) for name, x in pool.scores.items()},
        best_of=count,
        text=None,
    )


def figures(arm: Arm, scored: Mapping[str, np.ndarray], *, seed: int) -> dict[str, Any]:
    """Figures of one arm; None where an arm has no such figure.

    Args:
      arm: the arm.
      scored: by scorer, True for the prompts whose answers all arms have a score for.
      seed: of the bootstrap.
    """
    flat = [answer for several in arm.answers for answer in several]
    texts = [answer.text for answer in flat]
    ended = [answer.ended for answer in flat if answer.ended is not None]
    own = [self_bleu([answer.text for answer in several]) for several in arm.answers]
    within = [bleu for bleu in own if bleu is not None]
    return {
        "name": arm.name,
        "model": arm.model,
        "kind": arm.kind,
        "best_of": arm.best_of,
        "answers": len(flat),
        "scores": {
            name: None if not mask.any() else mean_estimate(arm.scores[name][mask].mean(axis=1), seed=seed)
            for name, mask in scored.items()
        },
        "kl": _of_answers(arm, "kl", seed),
        # Of best-of-n sampling from its own model; its answers alone do not show it.
        "kl_to_own_model": best_of_n_kl(arm.best_of) if arm.best_of else None,
        "entropy": None if arm.best_of else _of_answers(arm, "entropy", seed),
        "tokens": _of_answers(arm, "tokens", seed),
        "characters": float(arm.lengths.mean()),
        "words": float(np.mean([len(words(text)) for text in texts])),
        "missing_end": 1 - sum(ended) / len(ended) if ended else None,
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        **{f"distinct_{n}": distinct_n([several[0].text for several in arm.answers], n) for n in ORDERS},
        "self_bleu": self_bleu([several[0].text for several in arm.answers]),
        "self_bleu_same_prompt": float(np.mean(within)) if within else None,
        "text": arm.text,
    }


def _of_answers(arm: Arm, field: Literal["kl", "entropy", "tokens"], seed: int) -> dict[str, float] | None:
    """Mean over prompts of a number of each answer, with its standard error and interval; None if one lacks it."""
    if arm.best_of and field == "kl":
        return None
    values = [[vars(answer)[field] for answer in several] for several in arm.answers]
    if any(value is None for several in values for value in several):
        return None
    of_prompt = np.array(values, np.float64).mean(axis=1)
    estimate = mean_estimate(of_prompt, seed=seed)
    error = float(of_prompt.std(ddof=1)) / math.sqrt(len(of_prompt)) if len(of_prompt) > 1 else math.nan
    return dataclasses.asdict(estimate) | {"standard_error": error}


def scored_prompts(arms: Sequence[Arm]) -> dict[str, np.ndarray]:
    """By scorer, True for the prompts whose answers all have a score in all arms, so that all figures are of these."""
    return {
        name: np.all([np.isfinite(arm.scores[name]).all(axis=1) for arm in arms], axis=0) for name in arms[0].scores
    }


def win_rates(arms: Sequence[Arm], scored: Mapping[str, np.ndarray], *, seed: int) -> list[dict[str, Any]]:
    """Win rate of each arm over each arm before it, by each scorer."""
    found = []
    for name, mask in scored.items():
        if not mask.any():
            continue
        for first, second in itertools.combinations(arms, 2):
            rate = compare(
                *(arm.scores[name][mask] for arm in (second, first)),
                *(arm.lengths[mask] for arm in (second, first)),
                seed=seed,
            )
            difference = second.scores[name][mask].mean(axis=1) - first.scores[name][mask].mean(axis=1)
            gained: Estimate = mean_estimate(difference, seed=seed)
            pair = {"scorer": name, "first": second.name, "second": first.name}
            found.append(pair | dataclasses.asdict(rate) | {"score_difference": dataclasses.asdict(gained)})
    return found
