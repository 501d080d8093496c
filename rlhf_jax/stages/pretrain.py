"""Stage 1, pretraining: minimize -log p(next token) over all tokens of raw text."""

from __future__ import annotations

from collections.abc import Callable

import optax

from rlhf_jax.arrays import Array, Params, TokenBatch, TrainState
from rlhf_jax.config import PretrainConfig
from rlhf_jax.logprobs import target_losses
from rlhf_jax.lora import attach
from rlhf_jax.masked import masked_mean
from rlhf_jax.model import Transformer
from rlhf_jax.optim import global_count, gradient_step

STAGE = "pretrain"
Config = PretrainConfig


def objective(
    model: Transformer, params: Params, batch: TokenBatch, count: Array, dropout_key: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Mean of -log p(token | preceding tokens of its document) over the loss mask, as this batch's share.

    Args:
      model: the language model.
      params: its full parameters.
      batch: the global batch or a part of it.
      count: number of target tokens in the global batch.
      dropout_key: key that enables dropout.

    Returns:
      (share of the loss, no metrics).
    """
    loss_BT, mask_BT = target_losses(model, params, batch, dropout_key)
    return masked_mean(loss_BT, mask_BT, count=count), {}


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
    lora_scale: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make the update as a pure function: update(state, batch, base=None) -> (state, metrics).

    With a base, the state's parameters are an adapter to it, and the product A B is scaled by `lora_scale`.
    """

    def update(state: TrainState, batch: TokenBatch, base: Params | None = None) -> tuple[TrainState, dict[str, Array]]:
        count = global_count(batch.shifted()[3], axis_name)
        state, metrics = gradient_step(
            state,
            lambda params, part, key: objective(
                model, attach(base, params, lora_scale), part, count, key if model.config.dropout else None
            ),
            batch,
            optimizer,
            microbatches=microbatches,
            axis_name=axis_name,
        )
        return state, metrics | {"tokens": count}

    return update
