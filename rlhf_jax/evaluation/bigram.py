"""Baseline for pretraining: an interpolated bigram model of tokens."""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.batches import TokenRows


def bigram_nats(training: TokenRows, heldout: TokenRows, vocab_size: int) -> float:
    """Negative log-likelihood of the held-out targets under λ₂ p(t|s) + λ₁ p(t) + λ₀ / V, summed, in nats.

    The probabilities are counted on the training rows. The λ are the best of a grid *on the held-out targets*, which
    favours the baseline.

    Args:
      training: rows to count.
      heldout: rows to evaluate.
      vocab_size: V.
    """
    previous, token = _pairs(training)
    pairs = np.zeros((vocab_size, vocab_size), np.float32)
    np.add.at(pairs, (previous, token), 1.0)
    unigram = pairs.sum(axis=0) / pairs.sum()
    conditional = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1.0)
    held_previous, held_token = _pairs(heldout)
    two, one, zero = conditional[held_previous, held_token], unigram[held_token], 1.0 / vocab_size
    best = np.inf
    for bigram_weight in np.linspace(0.3, 0.95, 14):
        for uniform_weight in (1e-4, 1e-3, 1e-2):
            weight = 1.0 - bigram_weight - uniform_weight
            mixed = bigram_weight * two + weight * one + uniform_weight * zero
            best = min(best, float(-np.log(mixed).sum()))
    return best


def _pairs(rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
    targets = rows.loss_mask[:, 1:]
    return rows.tokens[:, :-1][targets], rows.tokens[:, 1:][targets]
