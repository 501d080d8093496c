"""Log-probabilities, values and scores of given tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, PackedRankingBatch, Params, RankingBatch, TokenBatch
from rlhf_jax.config import ModelConfig
from rlhf_jax.losses import next_token_loss
from rlhf_jax.model import Transformer
from rlhf_jax.packing import EpisodeRows
from rlhf_jax.parallel.sharding import DATA, FSDP, TENSOR

# Memory for the logits that a loss computes at once on a device, unless the model's head_chunk sets the positions.
LOGITS_BYTES = 2**28


def target_losses(
    model: Transformer, params: Params, batch: TokenBatch, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """Cross-entropy losses of the targets of a batch: (loss in nats, mask of the targets), each [B, T-1].

    Args:
      model: language-head transformer.
      params: its parameters.
      batch: rows of tokens.
      dropout_key: key that enables dropout; used in training of stages 1 and 2 only.
    """
    tokens, segments, targets, mask = batch.shifted()
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden = model.apply(
        {"params": params}, tokens, segment_ids=segments, deterministic=dropout_key is None, rngs=rngs, method="hidden"
    )
    return _by_chunks(model, params, hidden, targets, lambda logits, ids: (next_token_loss(logits, ids),))[0], mask


def sequence_logps(model: Transformer, params: Params, batch: TokenBatch) -> tuple[Array, Array]:
    """Log-probability of the targets of each row, their sum in nats, and their number: [B] each."""
    loss_BT, mask_BT = target_losses(model, params, batch)
    return -jnp.sum(jnp.where(mask_BT, loss_BT, 0.0), axis=1), jnp.sum(mask_BT, axis=1)


def response_logits(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, *, response_length: int, temperature: float
) -> Array:
    """Logits [B, R, V] that predict the last R tokens of each row, divided by the temperature; float32.

    The head is computed on those positions only. Training uses `response_losses`, which never needs to hold all logits.
    """
    hidden = model.apply({"params": params}, tokens_BT, mask_BT, last=response_length + 1, method="hidden")
    return model.apply({"params": params}, hidden[:, :-1], method="head") / temperature


def response_losses(
    model: Transformer, params: Params, rows: EpisodeRows, *, temperature: float
) -> tuple[Array, Array]:
    """Losses and entropies of the response tokens at a temperature: (-log p, entropy), each [B, R] in nats.

    The head is computed only on the positions that predict them.
    """
    return _losses_at(model, params, _before_responses(model, params, rows), rows.targets_BR, temperature)


def state_values(model: Transformer, params: Params, rows: EpisodeRows) -> Array:
    """Value [B, R] of the state before each response token, from a scalar-head model."""
    return model.apply({"params": params}, _before_responses(model, params, rows), method="head")


def response_scores(model: Transformer, params: Params, rows: EpisodeRows) -> Array:
    """Score [B, R] at each response token, from a scalar-head model; an episode's score is that of its last token."""
    if rows.at_BR is None:
        columns: dict[str, Any] = {"last": rows.targets_BR.shape[1]}
    else:
        columns = {"at_BQ": jnp.minimum(rows.at_BR + 1, rows.tokens_BT.shape[1] - 1)}
    hidden_BRD = _hidden(model, params, rows, **columns)
    return model.apply({"params": params}, hidden_BRD, method="head")


def _before_responses(model: Transformer, params: Params, rows: EpisodeRows) -> Array:
    """Hidden states [B, R, D] of the column before each response token; the last block computes only these."""
    if rows.at_BR is None:
        return _hidden(model, params, rows, last=rows.targets_BR.shape[1] + 1)[:, :-1]
    return _hidden(model, params, rows, at_BQ=rows.at_BR)


def _hidden(model: Transformer, params: Params, rows: EpisodeRows, **columns: Any) -> Array:
    return model.apply({"params": params}, rows.tokens_BT, segment_ids=rows.segment_ids_BT, method="hidden", **columns)


def _losses_at(
    model: Transformer, params: Params, hidden_BRD: Array, tokens_BR: Array, temperature: float
) -> tuple[Array, Array]:
    def of_logits(logits: Array, ids: Array) -> tuple[Array, Array]:
        logits = logits / temperature
        return next_token_loss(logits, ids), entropy(logits)

    loss_BR, entropy_BR = _by_chunks(model, params, hidden_BRD, tokens_BR, of_logits)
    return loss_BR, entropy_BR


def positions_at_a_time(config: ModelConfig, rows: int, length: int) -> int:
    """Number of positions per row whose logits are computed at once: head_chunk, or as many as fit in LOGITS_BYTES.

    On a mesh each device holds its shard of the rows and of the vocabulary.
    """
    if config.head_chunk is not None:
        return config.head_chunk or length
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    here = math.ceil(rows / (mesh.get(DATA, 1) * mesh.get(FSDP, 1))) * config.vocab_rows / mesh.get(TENSOR, 1)
    fit = max(1, int(LOGITS_BYTES / (4 * here)))
    # Split evenly, so that no chunk is small.
    return math.ceil(length / math.ceil(length / fit))


def _by_chunks(
    model: Transformer,
    params: Params,
    hidden_BTD: Array,
    targets_BT: Array,
    of_logits: Callable[[Array, Array], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """Apply `of_logits` to logits [B, T, V] and targets [B, T] in chunks of `positions_at_a_time`: arrays [B, T].

    With more than one chunk, all logits are never held at once, nor kept for the backward pass, which recomputes each
    chunk.
    """

    def of_hidden(params: Params, hidden_BCD: Array, targets_BC: Array) -> tuple[Array, ...]:
        return of_logits(model.apply({"params": params}, hidden_BCD, method="head"), targets_BC)

    rows, length = targets_BT.shape
    chunk = positions_at_a_time(model.config, rows, length)
    if chunk >= length:
        return of_hidden(params, hidden_BTD, targets_BT)
    once = jax.checkpoint(of_hidden, prevent_cse=not model.config.scan_layers)
    if not model.config.scan_layers:
        parts = [
            once(params, hidden_BTD[:, i : i + chunk], targets_BT[:, i : i + chunk]) for i in range(0, length, chunk)
        ]
        return tuple(jnp.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    missing = -length % chunk

    def sliced(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    _, columns = jax.lax.scan(
        lambda _, part: (None, once(params, *part)), None, (sliced(hidden_BTD), sliced(targets_BT))
    )
    return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length] for x in columns)


def last_token_scores(model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array) -> Array:
    """Score [B] of each row from a scalar-head model, read at the row's last real token; 0 for a row without one.

    The score is read at exactly that token: padding after it sees the same tokens, but its score was never trained.
    """
    last_B1 = mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1, keepdims=True)
    hidden_B1D = model.apply({"params": params}, tokens_BT, mask_BT, at_BQ=last_B1, method="hidden")
    score_B = model.apply({"params": params}, hidden_B1D[:, 0], method="head")
    return jnp.where(jnp.any(mask_BT, axis=1), score_B, 0.0)


def ranking_scores(model: Transformer, params: Params, batch: RankingBatch | PackedRankingBatch) -> Array:
    """Scores [B, K] of the ranked responses to each of B prompts, of which a packed row holds several."""
    if isinstance(batch, PackedRankingBatch):
        rows, _, responses = batch.at_BMK.shape
        hidden_BQD = model.apply(
            {"params": params},
            batch.tokens_BT,
            segment_ids=batch.segment_ids_BT,
            at_BQ=batch.at_BMK.reshape(rows, -1),
            prompt_period=responses + 1,
            method="hidden",
        )
        score_BQ = model.apply({"params": params}, hidden_BQD, method="head")
        return jnp.where(batch.mask_BK, score_BQ.reshape(-1, responses), 0.0)
    rows, responses, length = batch.tokens_BKT.shape
    flat = (batch.tokens_BKT.reshape(rows * responses, length), batch.mask_BKT.reshape(rows * responses, length))
    return last_token_scores(model, params, *flat).reshape(rows, responses)


def entropy(logits: Array) -> Array:
    """Entropy in nats of softmax(logits [..., V]), [...]; logits of -inf have probability 0."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0.0), axis=-1)
