"""Blind evaluation: win rates between models from people's rankings."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.feedback.records import FLAGS, Item, Judgement
from rlhf_jax.feedback.store import AI

_Shares = dict[str, list[float]]


def win_rates(
    items: Iterable[Item], judgements: Iterable[Judgement], flag_names: Sequence[str] = FLAGS
) -> list[dict[str, Any]]:
    """Win rate by people of each source over each other source.

    An item's outcome is the mean over its judgements and pairs of responses, 1 for a win, ½ for a tie; the rate is the
    mean over items. For each flag: the share of each source's responses that got it, and the win rate on the items
    where any response got it. Intervals are Wilson's, 95%, with one observation per item, because several judgements of
    an item are not independent.

    Args:
      items: items with their sources.
      judgements: of these items; judgements by models are left out.
      flag_names: flags of the page.

    Returns:
      Plain JSON, one object per pair of sources, [] if no item names its sources; a rate is {"value", "low", "high",
      "items"}, None without judgements.
    """
    known = {item.id: item for item in items if len(set(item.sources)) > 1}
    outcomes: dict[tuple[str, str], _Shares] = defaultdict(lambda: defaultdict(list))
    flagged: dict[tuple[str, str], _Shares] = defaultdict(lambda: defaultdict(list))
    with_flag: dict[str, set[str]] = defaultdict(set)
    for judgement in judgements:
        item = known.get(judgement.item)
        if item is None or not judgement.ranks or judgement.labeller.startswith(AI):
            continue
        places = {source: [k for k, name in enumerate(item.sources) if name == source] for source in set(item.sources)}
        for first, second in itertools.combinations(sorted(places), 2):
            outcomes[first, second][item.id].append(_outcome(judgement.ranks, places[first], places[second]))
        for flag in flag_names if judgement.flags else ():
            for source, own in places.items():
                flagged[source, flag][item.id].append(sum(flag in judgement.flags[k] for k in own) / len(own))
            if any(flag in names for names in judgement.flags):
                with_flag[flag].add(item.id)
    return [
        {
            "first": first,
            "second": second,
            "win_rate": _rate(by_item),
            "ties": _mean([float(outcome == 0.5) for given in by_item.values() for outcome in given]),
            "flags": {
                flag: {
                    "first": _rate(flagged[first, flag]),
                    "second": _rate(flagged[second, flag]),
                    "win_rate": _rate({id: given for id, given in by_item.items() if id in with_flag[flag]}),
                }
                for flag in flag_names
            },
        }
        for (first, second), by_item in sorted(outcomes.items())
    ]


def _outcome(ranks: Sequence[int], first: Sequence[int], second: Sequence[int]) -> float:
    return _mean([0.5 if ranks[a] == ranks[b] else float(ranks[a] < ranks[b]) for a in first for b in second])


def _rate(by_item: _Shares) -> dict[str, float] | None:
    if not by_item:
        return None
    value = _mean([_mean(given) for given in by_item.values()])
    low, high = wilson(value, len(by_item))
    return {"value": value, "low": low, "high": high, "items": len(by_item)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
