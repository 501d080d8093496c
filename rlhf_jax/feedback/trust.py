"""Trust in AI judges: a model's judgements count once they agree with people's on items that both judged."""

from __future__ import annotations

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.agreement import Estimate, agreement_with_others, preferences
from rlhf_jax.feedback.judged import Judged
from rlhf_jax.feedback.store import AI

LEAST_AGREEMENT = 0.65
"""Minimum agreement with people on pairs that both ordered; InstructGPT's labellers agreed with each other on 0.73."""
LEAST_PAIRS = 100
"""Minimum number of distinct pairs of responses that the model and at least one person ordered."""


def agreement_with_people(judged: Judged, model: str, *, resamples: int = 1000) -> tuple[Estimate | None, int]:
    """Agreement of a model with people, and the number of distinct pairs that both ordered.

    A pair that several people judged counts once per person in the agreement, and once in the number of pairs.
    """
    table = preferences(judged)
    people = [name for name in table.labellers if not name.startswith(AI)]
    both = table.of(model, *people)
    ordered = np.nan_to_num(both.values) != 0
    pairs = int(np.sum(ordered[:, 0] & ordered[:, 1:].any(axis=1)))
    return agreement_with_others(both, model, resamples=resamples), pairs


def trusted(judged: Judged, *, agreement: float = LEAST_AGREEMENT, pairs: int = LEAST_PAIRS) -> dict[str, Estimate]:
    """Check all models among the labellers against people.

    Args:
      judged: items and judgements.
      agreement: minimum agreement with people.
      pairs: minimum number of distinct pairs that the model and people ordered.

    Returns:
      Agreement with people, by model.

    Raises:
      UserError: for the first model below either minimum.
    """
    shares = {}
    for name in judged.labellers:
        if not name.startswith(AI):
            continue
        share, shared = agreement_with_people(judged, name)
        if share is None or shared < pairs:
            raise UserError(
                f"labeller {name}: expected {pairs} or more pairs that people ordered too before its judgements count, "
                f"got {shared}; let people judge some of its items, or let it judge some of theirs"
            )
        if share.value < agreement:
            raise UserError(
                f"labeller {name}: expected agreement with people of {agreement:.3f} or more before its judgements "
                f"count, got {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] on {shared} pairs; leave them out, "
                f"or try another model or principle"
            )
        shares[name] = share
    return shares
