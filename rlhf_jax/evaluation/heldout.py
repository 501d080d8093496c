"""Losses and reward-model accuracy over a whole held-out set."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, PackedRankingBatch, Params, RankingBatch, TokenBatch
from rlhf_jax.data.batches import PackedRankingRows, RaggedRows, RankingRows, TokenRows
from rlhf_jax.logprobs import last_token_scores, ranking_scores, target_losses
from rlhf_jax.losses import ordered_pairs
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.processes import fetch

# What two CPU cores compute while a program of another shape is compiled, a few seconds, in floating-point operations.
COMPILATION = 3e11


@functools.partial(jax.jit, static_argnames="model")
def _loss_sum(model: Transformer, params: Params, batch: TokenBatch, counted_B: Array) -> tuple[Array, Array]:
    loss_BT, mask_BT = target_losses(model, params, batch)
    mask_BT &= counted_B[:, None]
    return jnp.sum(jnp.where(mask_BT, loss_BT, 0.0)), jnp.sum(mask_BT)


@functools.partial(jax.jit, static_argnames="model")
def _scores(model: Transformer, params: Params, batch: RankingBatch | PackedRankingBatch) -> Array:
    return ranking_scores(model, params, batch)


@functools.partial(jax.jit, static_argnames="model")
def _row_scores(model: Transformer, params: Params, batch: TokenBatch) -> Array:
    return last_token_scores(model, params, batch.tokens_BT, batch.segment_ids_BT > 0)


def _in_batches(rows: Any, batch_size: int, flops: float = 0.0) -> Any:
    """Batches over all rows, short rows first: (batch, indices, False where an index only pads the last batch).

    They are padded to the longest row of all, but shorter rows to a shorter length where that saves more than the
    compilation of another shape takes.

    Args:
      rows: rows.
      batch_size: rows of a batch.
      flops: of the forward pass for a token; 0 for one shape.
    """
    order = np.arange(len(rows)) if isinstance(rows, TokenRows) else np.argsort(rows.lengths, kind="stable")
    indices_NB = np.resize(order, (-(-len(rows) // batch_size), batch_size))
    lengths = [rows.row_length(indices) for indices in indices_NB]
    longest: list[int] = []  # up to each batch, the one with the longest rows; the last is filled up with short ones
    for number, length in enumerate(lengths):
        longest.append(longest[-1] if longest and length <= lengths[longest[-1]] else number)
    among = longest[-1:] * len(lengths)
    for number in reversed(range(len(lengths))):
        saved = lengths[among[number]] - lengths[longest[number]]
        if (number + 1) * batch_size * saved * flops > COMPILATION:
            among[: number + 1] = [longest[number]] * (number + 1)
    for number, indices in enumerate(indices_NB):
        places = number * batch_size + np.arange(batch_size)
        yield rows.batch(indices, among=indices_NB[among[number]]), indices, places < len(rows)


def mean_loss(
    model: Transformer, params: Params, rows: TokenRows | RaggedRows, *, batch_size: int = 32
) -> tuple[float, int]:
    """Mean loss in nats per target token over all rows, and the number of target tokens."""
    total, count = 0.0, 0
    flops = model.config.flops_per_token(1)
    for batch, _, counted_B in _in_batches(rows, batch_size, flops):
        loss, targets = _loss_sum(model, params, batch, counted_B)
        total += float(loss)
        count += int(targets)
    return total / max(count, 1), count


def scores_of(
    model: Transformer, params: Params, rows: RankingRows | PackedRankingRows, *, batch_size: int = 32
) -> np.ndarray:
    """Reward-model scores of all rows, [N, K]; entries of missing responses are meaningless."""
    return _scored(_scores, model, params, rows, batch_size, np.zeros((len(rows), rows.responses), np.float32))


def row_scores(model: Transformer, params: Params, rows: RaggedRows, *, batch_size: int = 32) -> np.ndarray:
    """Reward-model scores of all rows, each a prompt with a response, [N]."""
    return _scored(_row_scores, model, params, rows, batch_size, np.zeros(len(rows), np.float32))


def _scored(score: Any, model: Transformer, params: Params, rows: Any, batch_size: int, out: np.ndarray) -> np.ndarray:
    flops = model.config.flops_per_token(1, language_head=False)
    for batch, indices, counted_B in _in_batches(rows, batch_size, flops):
        out[indices[counted_B]] = fetch(score(model, params, batch))[counted_B]
    return out


def pair_accuracy(scores_NK: np.ndarray, ranks_NK: np.ndarray, mask_NK: np.ndarray) -> tuple[float, int]:
    """Reward-model accuracy: share of ordered pairs whose better response scores higher, equal scores counting half.

    Args:
      scores_NK: reward-model scores.
      ranks_NK: ranks, 1 is best; equal ranks are not ordered.
      mask_NK: True for a response, False for padding.

    Returns:
      (accuracy, number of ordered pairs).
    """
    wins = np.asarray(ordered_pairs(jnp.asarray(ranks_NK), jnp.asarray(mask_NK)))
    gap = scores_NK[:, :, None] - scores_NK[:, None, :]
    right = np.where(gap > 0, 1.0, np.where(gap == 0, 0.5, 0.0))
    count = int(wins.sum())
    return float(right[wins].sum() / max(count, 1)), count
