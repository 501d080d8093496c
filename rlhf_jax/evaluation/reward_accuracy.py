"""A reward model on comparisons: accuracy, calibration by margin and by length, and what to expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import Comparison, Ledger, Ranking, encode_rankings
from rlhf_jax.evaluation.calibration import by_length, by_margin, right, verdicts
from rlhf_jax.evaluation.heldout import scores_of
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.pretrained.source import Source


def reward_accuracy(
    source: Source, records: Sequence[Comparison | Ranking], ledger: Ledger, *, batch: int = 32
) -> dict[str, Any] | None:
    """Figures of a reward model on comparisons and rankings; None if none of them fits its context.

    Args:
      source: reward model.
      records: comparisons; every ordered pair of a ranking counts as one.
      ledger: of the comparisons that do not fit or order nothing.
      batch: prompts at a time.
    """
    rows = encode_rankings(records, source.tokenizer, max_tokens=source.model.context, ledger=ledger)
    if not len(rows):
        return None
    scores_NK = scores_of(source.network(), source.params(), rows, batch_size=batch)
    margins, better, worse, shares, longer_shares = [], [], [], [], []
    for record, ranks, scores_K in zip(rows.sources, rows.ranks, scores_NK.astype(np.float64), strict=True):
        texts = (record.chosen, record.rejected) if isinstance(record, Comparison) else record.responses
        lengths = [len(text.strip()) for text in texts]
        pairs = [(a, b) for a, rank in enumerate(ranks) for b, other in enumerate(ranks) if rank < other]
        gaps = np.array([scores_K[a] - scores_K[b] for a, b in pairs])
        margins += gaps.tolist()
        better += [lengths[a] for a, _ in pairs]
        worse += [lengths[b] for _, b in pairs]
        shares.append(float(right(gaps).mean()))
        longer_shares.append(float(right(np.array([lengths[a] - lengths[b] for a, b in pairs])).mean()))
    accuracy, longer = float(np.mean(shares)), float(np.mean(longer_shares))
    interval = wilson(accuracy, len(shares))
    bins, error = by_margin(np.array(margins))
    return {
        "model": source.where,
        "accuracy": {"value": accuracy, "low": interval[0], "high": interval[1]},
        "prompts": len(shares),
        "pairs": len(margins),
        "longer_wins": longer,
        "calibration_error": error,
        "by_margin": bins,
        "by_length": by_length(np.array(margins), np.array(better), np.array(worse)),
        "verdicts": verdicts(accuracy, interval, longer, bins, error),
    }
