"""Active selection of the next items to label, by heads on one backbone or by an ensemble of reward models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.feedback.active import Beliefs, Heads, choose, preference_probabilities
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.store import AI

PRECISION = 1.0
"""Precision of the prior of a head's weights, for features with a squared norm of 1 per row."""
Indices = NDArray[np.int64]


def asked(judgements: Iterable[Judgement]) -> set[str]:
    """Ids of the items that a person has judged or skipped."""
    return {judgement.item for judgement in judgements if not judgement.labeller.startswith(AI)}


def next_by_heads(
    items: Sequence[Item], features_RD: NDArray[np.floating], judgements: Iterable[Judgement], count: int
) -> list[Item]:
    """Choose items by a posterior over reward heads: those whose labels most reduce its variance over all pairs.

    Args:
      items: all items.
      features_RD: features of each response of each item in turn.
      judgements: labels so far; those by models or of other items are left out.
      count: maximum number of items.

    Returns:
      At most `count` tasks that no person has judged, the most informative first.
    """
    _, first_N, second_N = _pairs(items)
    start = dict(zip((item.id for item in items), _starts(items)))
    judgements = [one for one in judgements if one.item in start and not one.labeller.startswith(AI)]
    better, worse = [], []
    for one in judgements:
        for a, b in itertools.permutations(range(len(one.ranks)), 2):
            if one.ranks[a] < one.ranks[b]:
                better.append(start[one.item] + a)
                worse.append(start[one.item] + b)
    heads = Heads.fit(features_RD[better] - features_RD[worse], precision=PRECISION)
    beliefs = heads.beliefs(features_RD[first_N] - features_RD[second_N])
    return _best(items, beliefs, asked(judgements), count, targets=beliefs)


def next_by_ensemble(
    items: Sequence[Item], scores_MR: NDArray[np.floating], judgements: Iterable[Judgement], count: int
) -> list[Item]:
    """Choose items by an ensemble: tasks on which M reward models disagree.

    Args:
      items: all items.
      scores_MR: scores by each model of each response of each item in turn.
      judgements: labels so far.
      count: maximum number of items.

    Returns:
      At most `count` tasks that no person has judged, the most informative first.
    """
    _, first_N, second_N = _pairs(items)
    beliefs = Beliefs.of_members(preference_probabilities(scores_MR[:, first_N], scores_MR[:, second_N]))
    return _best(items, beliefs, asked(judgements), count)


def _best(
    items: Sequence[Item], beliefs: Beliefs, done: set[str], count: int, targets: Beliefs | None = None
) -> list[Item]:
    item_N, first_N, second_N = _pairs(items)
    open_N = np.flatnonzero([items[place].kind == "task" and items[place].id not in done for place in item_N])
    if not len(open_N):
        return []
    # Pairs are chosen, but whole items are labelled; `count` items have at most this many pairs.
    most = max(len(items[place].responses) for place in item_N[open_N])
    pairs = min(count * most * (most - 1) // 2, len(open_N))
    numbers: dict[tuple[str, str], int] = {}
    key_R = np.array(
        [numbers.setdefault((item.prompt, text), len(numbers)) for item in items for text in item.responses]
    )
    used = [numbers[item.prompt, text] for item in items if item.id in done for text in item.responses]
    texts_N2 = np.stack([key_R[first_N], key_R[second_N]], axis=1)
    order = choose(
        beliefs.take(open_N), pairs, targets=targets, responses=texts_N2[open_N], used=np.array(used, np.int64)
    )
    return [items[place] for place in dict.fromkeys(item_N[open_N[order]].tolist())][:count]


def _starts(items: Sequence[Item]) -> list[int]:
    return [0, *itertools.accumulate(len(item.responses) for item in items)][: len(items)]


def _pairs(items: Sequence[Item]) -> tuple[Indices, Indices, Indices]:
    """(item, first response, second response) of all pairs, with responses numbered across all items."""
    found = [
        (number, start + a, start + b)
        for number, (item, start) in enumerate(zip(items, _starts(items)))
        for a, b in itertools.combinations(range(len(item.responses)), 2)
    ]
    item_N, first_N, second_N = np.array(found, np.int64).reshape(-1, 3).T
    return item_N, first_N, second_N
