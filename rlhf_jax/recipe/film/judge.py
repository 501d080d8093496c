"""The held-out judge: Bradley-Terry strengths of sentences from their words, of another kind than the reward model.

A sentence's score is w·x with x its TF-IDF vector of words and stems, of length 1; the weights minimise

    −mean over pairs of log σ(w·x_better − w·x_worse) + λ/2 |w|².

It shares neither a network nor a sentence with the reward model, so that what only that model likes does not win here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.diversity import words
from rlhf_jax.evaluation.intervals import Floats

MOST_FEATURES = 50_000
STEM = 5  # letters; this and λ by cross-validation within the judge's part (docs/lab-notebook.md)
PENALTY = 3e-4  # λ


@dataclasses.dataclass(frozen=True)
class WordJudge:
    """Scores of texts by their words.

    Attributes:
      columns: column of each word and of each stem.
      inverse: inverse document frequencies, [features].
      weights: w, [features].
    """

    columns: Mapping[str, int]
    inverse: Floats
    weights: Floats

    def scores(self, texts: Sequence[str]) -> Floats:
        """A score for each text; only differences mean something, in nats of the Bradley-Terry odds."""
        return np.asarray(_vectors(texts, self.columns, self.inverse) @ self.weights)


def fit_judge(rankings: Sequence[Mapping[str, Any]], *, penalty: float = PENALTY) -> WordJudge:
    """Fit a judge to rankings.

    Args:
      rankings: rows with `responses` and `ranks`, 1 for the best; every pair with different ranks counts once.
      penalty: λ.

    Raises:
      UserError: without a pair of different ranks.
    """
    texts = [text for row in rankings for text in row["responses"]]
    better, worse, first = [], [], 0
    for row in rankings:
        ranks = np.array(row["ranks"])
        above, below = np.nonzero(ranks[:, None] < ranks[None, :])
        better += (first + above).tolist()
        worse += (first + below).tolist()
        first += len(ranks)
    if not better:
        raise UserError("data: expected comparisons that order something, for the judge, got ties alone")
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    of_text = np.array([places[text] for text in texts])
    counts = Counter(feature for text in places for feature in set(_features(text)))
    # Most frequent first, equally frequent ones in the order of their letters.
    kept = sorted((f for f, count in counts.items() if count > 1), key=lambda f: (-counts[f], f))[:MOST_FEATURES]
    columns = {feature: column for column, feature in enumerate(kept)}
    inverse = np.array([math.log(len(places) / counts[feature]) + 1 for feature in kept])
    x = _vectors(list(places), columns, inverse)
    difference = x[of_text[better]] - x[of_text[worse]]

    def objective(weights: Floats) -> tuple[float, Floats]:
        margin = difference @ weights
        gradient = -(difference.T @ expit(-margin)) / len(margin) + penalty * weights
        return float(np.logaddexp(0, -margin).mean() + penalty / 2 * weights @ weights), gradient

    found = minimize(objective, np.zeros(len(kept)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return WordJudge(columns, inverse, np.asarray(found.x, np.float64))


def accuracy(scores_better: Floats, scores_worse: Floats) -> float:
    """Share of pairs whose better text has the higher score, equal scores counting half."""
    return float(np.where(scores_better == scores_worse, 0.5, scores_better > scores_worse).mean())


def _features(text: str) -> list[str]:
    """Words, and the beginnings of longer ones with a hyphen, which words of one stem have in common."""
    found = words(text)
    return [*found, *(f"{word[:STEM]}-" for word in found if len(word) > STEM)]


def _vectors(texts: Sequence[str], columns: Mapping[str, int], inverse: Floats) -> Any:
    """TF-IDF vectors of length 1, [texts, features], sparse; 0 for a text without a known word."""
    indices: list[int] = []
    values: list[float] = []
    ends = [0]
    for text in texts:
        counts = Counter(columns[feature] for feature in _features(text) if feature in columns)
        raw = np.array([(1 + math.log(count)) * inverse[column] for column, count in counts.items()])
        indices += counts
        values += (raw / (np.linalg.norm(raw) or 1.0)).tolist()
        ends.append(len(indices))
    return sparse.csr_matrix((values, indices, ends), shape=(len(texts), len(inverse)))
