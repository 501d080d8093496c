"""Preference optimization: raise the probability of chosen responses over rejected ones, without a reward model.

A method is data (config/preference.py): a loss of losses.py, what it reads of the responses, and its coefficients. For
every method:

  1 read        of each response: log π(y|x) and, with a reference model, log π_ref(y|x), [B, K]
  2 compare     the method's loss of each ordered pair of a prompt's responses, averaged per prompt, [B]
  3 optimize    the mean over prompts, one Adam step

Source:
  Rafailov et al. 2023 (arXiv:2305.18290) and the sources of the losses.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses
from rlhf_jax.arrays import Array, Params, PreferenceBatch, TokenBatch, TrainState, pytree
from rlhf_jax.config import METHODS, PreferenceConfig
from rlhf_jax.logprobs import sequence_logps
from rlhf_jax.lora import attach
from rlhf_jax.losses import ordered_pairs
from rlhf_jax.masked import masked_mean
from rlhf_jax.model import Transformer
from rlhf_jax.optim import global_count, gradient_step
from rlhf_jax.packing import by_parts

STAGE = "preference"
Config = PreferenceConfig


@pytree
class Frozen:
    """Frozen networks of preference optimization.

    Attributes:
      reference: parameters of the reference model, an adapter to `backbone` or full parameters; None for a method
        without one.
      backbone: base parameters of the adapters, None if the policy trains all parameters.
    """

    reference: Params | None
    backbone: Params | None = None


def ranked_logps(model: Transformer, params: Params, batch: PreferenceBatch) -> tuple[Array, Array]:
    """Step 1: log-probability of each response in nats, and its number of tokens, [B, K] each."""
    shape, rows = batch.loss_mask_BKT.shape[:2], batch.ranking
    flat = (x.reshape(-1, x.shape[2]) for x in (rows.tokens_BKT, rows.mask_BKT.astype(jnp.int32), batch.loss_mask_BKT))
    logp, tokens = sequence_logps(model, params, TokenBatch(*flat))
    return logp.reshape(shape), tokens.reshape(shape)


def preference_losses(
    logp_BK: Array,
    ref_logp_BK: Array | None,
    tokens_BK: Array,
    ranks_BK: Array,
    mask_BK: Array,
    config: Config,
    baseline: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Step 2: loss of each prompt, the mean over its ordered pairs, and its metrics: ([B], [B] each).

    Args:
      logp_BK: log π of each response in nats.
      ref_logp_BK: log π_ref, likewise; None for a method without a reference model.
      tokens_BK: number of tokens of each response.
      ranks_BK: ranks, 1 is best.
      mask_BK: True where a response exists.
      config: settings of the stage.
      baseline: z of `kto_loss`, for that method.
    """
    method, wins_BKK = METHODS[config.method], ordered_pairs(ranks_BK, mask_BK)
    mean_BK = logp_BK / jnp.maximum(tokens_BK, 1)
    number_BK = logp_BK if ref_logp_BK is None else logp_BK - ref_logp_BK
    if method.per_token:
        number_BK = number_BK / jnp.maximum(tokens_BK, 1)
    win_BKK, lose_BKK = jnp.broadcast_arrays(number_BK[:, :, None], number_BK[:, None, :])
    loss: Callable[..., Array] = getattr(losses, method.loss)
    if method.unpaired:
        halves = [
            loss(x, jnp.full(x.shape, good), baseline, **config.coefficients)
            for x, good in ((win_BKK, True), (lose_BKK, False))
        ]
        loss_BKK = 0.5 * sum(halves[1:], halves[0])
    else:
        loss_BKK = loss(win_BKK, lose_BKK, **config.coefficients)
    if config.likelihood_weight:
        loss_BKK = loss_BKK - config.likelihood_weight * mean_BK[:, :, None]

    def over_pairs(x_BKK: Array) -> Array:
        count_B = jnp.maximum(jnp.sum(wins_BKK, axis=(1, 2)), 1)
        return jnp.sum(jnp.where(wins_BKK, x_BKK, 0.0), axis=(1, 2)) / count_B

    metrics = {
        "accuracy": over_pairs(win_BKK > lose_BKK),
        "margin": over_pairs(config.coefficients["beta"] * (win_BKK - lose_BKK)),
        "chosen_logp": over_pairs(jnp.broadcast_to(logp_BK[:, :, None], wins_BKK.shape)),
        "rejected_logp": over_pairs(jnp.broadcast_to(logp_BK[:, None, :], wins_BKK.shape)),
    }
    return over_pairs(loss_BKK), metrics


def objective(
    model: Transformer,
    params: Params,
    reference: Params | None,
    batch: PreferenceBatch,
    count: Array,
    config: Config,
    baseline: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean over prompts of the method's loss, as this batch's share.

    Args:
      model: the language model.
      params: full parameters of the policy.
      reference: full parameters of the reference model; None for a method without one.
      batch: the global batch or a part of it.
      count: number of prompts with an ordered pair in the global batch.
      config: settings of the stage.
      baseline: z of `kto_loss`, for that method.

    Returns:
      (share of the loss, shares of the metrics).
    """
    ranks_BK, mask_BK = batch.ranking.ranks_BK, batch.ranking.mask_BK
    logp_BK, tokens_BK = ranked_logps(model, params, batch)
    ref_logp_BK = None if reference is None else ranked_logps(model, reference, batch)[0]
    loss_B, metrics = preference_losses(logp_BK, ref_logp_BK, tokens_BK, ranks_BK, mask_BK, config, baseline)
    useful_B = jnp.any(ordered_pairs(ranks_BK, mask_BK), axis=(1, 2))
    metrics = {name: masked_mean(x_B, useful_B, count=count) for name, x_B in metrics.items()}
    return masked_mean(loss_B, useful_B, count=count), metrics


def kl_baseline(log_ratio_B: Array, exists_B: Array, axis_name: str | None = None) -> Array:
    """KTO's z: mean log π - log π_ref of responses to other prompts, over the global batch; 0 if it is negative."""
    share = masked_mean(log_ratio_B, exists_B, axis_name)
    return jnp.maximum(share if axis_name is None else jax.lax.psum(share, axis_name), 0.0)


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: Config,
    *,
    axis_name: str | None = None,
) -> Callable[[TrainState, PreferenceBatch, Frozen], tuple[TrainState, dict[str, Array]]]:
    """Make the update as a pure function: update(state, batch, frozen) -> (state, metrics).

    With a backbone in frozen, the state's parameters are an adapter to it.
    """

    def update(state: TrainState, batch: PreferenceBatch, frozen: Frozen) -> tuple[TrainState, dict[str, Array]]:
        def full(params: Params) -> Params:
            return attach(frozen.backbone, params, config.lora.scale)

        reference = None if frozen.reference is None else full(frozen.reference)
        ordered = ordered_pairs(batch.ranking.ranks_BK, batch.ranking.mask_BK)
        count = global_count(jnp.any(ordered, axis=(1, 2)), axis_name)
        baseline, extra = None, {}
        if batch.unrelated is not None:

            def log_ratio(rows: TokenBatch) -> tuple[Array, Array]:
                logp_B, tokens_B = sequence_logps(model, full(state.params), rows)
                return logp_B - sequence_logps(model, reference, rows)[0], tokens_B > 0

            log_ratio_B, exists_B = by_parts(log_ratio, batch.unrelated, config.microbatches)
            baseline = kl_baseline(log_ratio_B, exists_B, axis_name)
            extra = {"kl_baseline": baseline}
        state, metrics = gradient_step(
            state,
            lambda params, part, _: objective(model, full(params), reference, part, count, config, baseline),
            batch,
            optimizer,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        return state, metrics | extra | {"tokens": global_count(batch.ranking.mask_BKT, axis_name)}

    return update
