"""Stage 3.1, the reward model: minimize -log σ(r_w - r_l) over comparisons and rankings, averaged per prompt."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from rlhf_jax.arrays import Array, PackedRankingBatch, Params, RankingBatch, TrainState
from rlhf_jax.config import RewardConfig
from rlhf_jax.logprobs import ranking_scores
from rlhf_jax.lora import attach
from rlhf_jax.losses import ordered_pairs, ranking_loss
from rlhf_jax.masked import masked_mean
from rlhf_jax.model import Transformer
from rlhf_jax.optim import global_count, gradient_step

STAGE = "reward"
Config = RewardConfig


def objective(
    model: Transformer, params: Params, batch: RankingBatch | PackedRankingBatch, count: Array
) -> tuple[Array, dict[str, Array]]:
    """Mean over prompts of the mean of -log σ(r_w - r_l) over a prompt's ordered pairs, as this batch's share.

    Args:
      model: a scalar-head model.
      params: its full parameters.
      batch: the global batch or a part of it.
      count: number of prompts with an ordered pair in the global batch.

    Returns:
      (share of the loss, shares of the metrics).
    """
    scores_BK = ranking_scores(model, params, batch)
    wins_BKK = ordered_pairs(batch.ranks_BK, batch.mask_BK)
    counts_B = jnp.any(wins_BKK, axis=(1, 2))
    loss_B = ranking_loss(scores_BK, batch.ranks_BK, batch.mask_BK)
    right_BKK = wins_BKK & (scores_BK[:, :, None] > scores_BK[:, None, :])
    share_B = jnp.sum(right_BKK, axis=(1, 2)) / jnp.maximum(jnp.sum(wins_BKK, axis=(1, 2)), 1)
    return masked_mean(loss_B, counts_B, count=count), {"accuracy": masked_mean(share_B, counts_B, count=count)}


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
    lora_scale: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make the update as a pure function: update(state, batch, base=None) -> (state, metrics).

    With a base, the state's parameters are an adapter to it and a score head, and the product A B is scaled by
    `lora_scale`.
    """

    def update(
        state: TrainState, batch: RankingBatch | PackedRankingBatch, base: Params | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        useful_B = jnp.any(ordered_pairs(batch.ranks_BK, batch.mask_BK), axis=(1, 2))
        count = global_count(useful_B, axis_name)
        state, metrics = gradient_step(
            state,
            lambda params, part, _: objective(model, attach(base, params, lora_scale), part, count),
            batch,
            optimizer,
            microbatches=microbatches,
            axis_name=axis_name,
        )
        real = batch.segment_ids_BT > 0 if isinstance(batch, PackedRankingBatch) else batch.mask_BKT
        return state, metrics | {"tokens": global_count(real, axis_name)}

    return update
