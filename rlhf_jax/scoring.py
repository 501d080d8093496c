"""What a model says of given tokens: the loss of targets, the log-probability of responses, the score of a response."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, Params, RankingBatch, TokenBatch
from rlhf_jax.losses import next_token_loss
from rlhf_jax.model import Transformer


def target_losses(
    model: Transformer, params: Params, batch: TokenBatch, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """(loss, mask) of the targets of a batch: nats [B, T-1], and True where the token is a target.

    Args:
      dropout_key: turns dropout on; training of the stages 1 and 2 only.
    """
    tokens, segments, targets, mask = batch.shifted()
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits = model.apply({"params": params}, tokens, segment_ids=segments, deterministic=dropout_key is None, rngs=rngs)
    return next_token_loss(logits, targets), mask


def response_logits(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, *, response_length: int, temperature: float
) -> Array:
    """Logits [B, R, V] that predict the last R tokens of each row, divided by the temperature; float32.

    The head is computed on those positions only.
    """
    hidden_BTD = model.apply({"params": params}, tokens_BT, mask_BT, method="hidden")
    hidden_BRD = hidden_BTD[:, -response_length - 1 : -1]
    return model.apply({"params": params}, hidden_BRD, method="head") / temperature


def state_values(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, *, response_length: int
) -> Array:
    """Value [B, R] of the state before each of the last R tokens, by a scalar-head model."""
    hidden_BTD = model.apply({"params": params}, tokens_BT, mask_BT, method="hidden")
    return model.apply({"params": params}, hidden_BTD[:, -response_length - 1 : -1], method="head")


def last_token_scores(model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array) -> Array:
    """Score [B] of each row by a scalar-head model, read at the row's last real token; 0 for a row without one.

    Not at a pad behind it, which sees the same tokens but was never trained, nor one token too early or late.
    """
    hidden_BTD = model.apply({"params": params}, tokens_BT, mask_BT, method="hidden")
    last_B = mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    score_B = model.apply({"params": params}, hidden_BD, method="head")
    return jnp.where(jnp.any(mask_BT, axis=1), score_B, 0.0)


def ranking_scores(model: Transformer, params: Params, batch: RankingBatch) -> Array:
    """Scores [B, K] of the ranked responses, one forward for each."""
    rows, responses, length = batch.tokens_BKT.shape
    flat = (batch.tokens_BKT.reshape(rows * responses, length), batch.mask_BKT.reshape(rows * responses, length))
    return last_token_scores(model, params, *flat).reshape(rows, responses)


def entropy(logits: Array) -> Array:
    """Entropy in nats of softmax(logits [..., V]), [...]; -inf logits carry no probability."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0.0), axis=-1)
