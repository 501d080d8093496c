"""One PPO rollout as a pure function: sample responses, score them, turn scores into advantages."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp

from rlhf_jax.arrays import Array, Params, PromptBatch, Rollout, pytree
from rlhf_jax.config import EpisodeConfig
from rlhf_jax.generate import Generation, generate
from rlhf_jax.kl import kl_estimate
from rlhf_jax.logprobs import (
    last_token_scores,
    packed_losses,
    packed_scores,
    packed_values,
    response_losses,
    state_values,
)
from rlhf_jax.masked import masked_mean, masked_whiten
from rlhf_jax.model import Transformer
from rlhf_jax.packing import PackedEpisodes, by_parts, over_rows, pack_episodes, unpack
from rlhf_jax.returns import generalized_advantages, kl_penalized_reward


class Networks(NamedTuple):
    """The architectures of PPO's four networks; all read the same token ids.

    policy is also the reference's; scorer, with the scalar head, is the reward model's and the value network's.
    """

    policy: Transformer
    scorer: Transformer


@pytree
class Frozen:
    """The networks that PPO reads and never changes, and the scale of scores.

    reference: parameters of the SFT model. reward: parameters of the reward model. score_mean, score_scale: scalars;
    a score counts as (score - mean) / scale.
    backbone: parameters that policy and reference are adapters to, and the scorers too where scorer_backbone is None;
      None where each network has all of its own. `collect` wants whole networks.
    """

    reference: Params
    reward: Params
    score_mean: Array
    score_scale: Array
    backbone: Params | None = None
    scorer_backbone: Params | None = None


def end_ids(eos_id: int | tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a response: end of text, and with some chat templates the end of a turn."""
    return (eos_id,) if isinstance(eos_id, int) else eos_id


def collect(
    networks: Networks,
    params: dict[str, Params],
    frozen: Frozen,
    prompts: PromptBatch,
    key: Array,
    kl_coef: Array,
    config: EpisodeConfig,
    *,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    parts: int = 1,
    axis_name: str | None = None,
) -> tuple[Rollout, dict[str, Array]]:
    """Samples an episode for each prompt and scores it.

    The log-probabilities are computed by the forward pass that the update uses, not by the sampler, so that the ratio
    before the first update is 1, also where the sampler's cache is rounded. Nothing is decoded or tokenised again: all
    networks read the sampled ids.

    Args:
      params: {"policy": …, "critic": …}.
      key: typed; of this iteration (and device) alone.
      kl_coef: β, scalar.
      parts: a divisor of the prompts: so many parts of them are scored one after the other, which bounds memory.
      axis_name: a mapped axis over which the prompts are spread.
    Returns: (rollout, metrics); the metrics are shares, to be summed over the axis.
    """
    sampled = sample(networks.policy, params["policy"], prompts, key, config, eos_id=eos_id, pad_id=pad_id)
    return score(
        networks, params, frozen, prompts, sampled, kl_coef, config, eos_id=eos_id, parts=parts, axis_name=axis_name
    )


def sample(
    policy: Transformer,
    params: Params,
    prompts: PromptBatch,
    key: Array,
    config: EpisodeConfig,
    *,
    eos_id: int | tuple[int, ...],
    pad_id: int,
) -> Generation:
    """The first half of `collect`: a response to each prompt."""
    return generate(
        policy,
        params,
        prompts.tokens_BP,
        prompts.mask_BP,
        key,
        max_new_tokens=config.response_length,
        stop_ids=end_ids(eos_id),
        pad_id=pad_id,
        temperature=config.temperature,
        decode_parts=config.decode_parts,
        slots=config.slots,
        segments=config.segments,
        cache_dtype=config.cache_dtype,
    )


def score(
    networks: Networks,
    params: dict[str, Params],
    frozen: Frozen,
    prompts: PromptBatch,
    sampled: Generation,
    kl_coef: Array,
    config: EpisodeConfig,
    *,
    eos_id: int | tuple[int, ...],
    parts: int = 1,
    axis_name: str | None = None,
) -> tuple[Rollout, dict[str, Array]]:
    """The second half of `collect`: what the four networks say of the responses."""
    tokens_BT = jnp.concatenate([prompts.tokens_BP, sampled.tokens], axis=1)
    mask_BT = jnp.concatenate([prompts.mask_BP, sampled.mask], axis=1)
    mask_BR = sampled.mask
    ends_BR = functools.reduce(jnp.logical_or, [sampled.tokens == end for end in end_ids(eos_id)])
    ended_B = jnp.any(ends_BR & mask_BR, axis=1)

    if config.pack:
        said = _said_packed(networks, params, frozen, tokens_BT, mask_BT, mask_BR, config)
    else:
        rows = (tokens_BT, mask_BT, mask_BR)
        said = by_parts(lambda part: _said(networks, params, frozen, part[0], part[1], part[2], config), rows, parts)
    logp_BR, entropy_BR, ref_logp_BR, value_BR, raw_B = said
    score_B = (raw_B - frozen.score_mean) / frozen.score_scale
    if config.missing_end == "replace":
        score_B = jnp.where(ended_B, score_B, config.missing_end_score)
    elif config.missing_end == "subtract":
        score_B = jnp.where(ended_B, score_B, score_B + config.missing_end_score)
    reward_BR = kl_penalized_reward(logp_BR, ref_logp_BR, score_B, mask_BR, kl_coef=kl_coef)
    if config.whiten_rewards:
        reward_BR = masked_whiten(reward_BR, mask_BR, axis_name, keep_mean=True)
    advantage_BR, target_BR = generalized_advantages(
        reward_BR, value_BR, mask_BR, gamma=config.gamma, lam=config.gae_lambda
    )
    rollout = Rollout(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        response_mask_BR=mask_BR,
        logp_BR=logp_BR,
        ref_logp_BR=ref_logp_BR,
        value_BR=value_BR,
        advantage_BR=masked_whiten(advantage_BR, mask_BR, axis_name),
        target_BR=target_BR,
        score_B=score_B,
    )
    everyone_B = jnp.ones_like(ended_B)

    def over_episodes(x_B: Array) -> Array:
        return masked_mean(x_B, everyone_B, axis_name)

    kl_BR = jnp.where(mask_BR, kl_estimate(logp_BR, ref_logp_BR), 0.0)
    metrics = {
        "score": over_episodes(score_B),
        "kl": over_episodes(jnp.sum(kl_BR, axis=1)),
        "reward": over_episodes(jnp.sum(reward_BR, axis=1)),
        "response_tokens": over_episodes(jnp.sum(mask_BR, axis=1)),
        "missing_end": over_episodes(~ended_B),
        "entropy": masked_mean(entropy_BR, mask_BR, axis_name),
        "sampler_logp_error": masked_mean(jnp.abs(sampled.logp - logp_BR), mask_BR, axis_name),
    }
    return rollout, metrics


Said = tuple[Array, Array, Array, Array, Array]


def _said(
    networks: Networks,
    params: dict[str, Params],
    frozen: Frozen,
    tokens_BT: Array,
    mask_BT: Array,
    mask_BR: Array,
    config: EpisodeConfig,
) -> Said:
    """(log-probability, entropy, the reference's log-probability, value), each [B, R], and the raw score [B]."""
    length = config.response_length

    def log_probabilities(network_params: Params) -> tuple[Array, Array]:
        loss_BR, entropy_BR = response_losses(
            networks.policy, network_params, tokens_BT, mask_BT, response_length=length, temperature=config.temperature
        )
        return jnp.where(mask_BR, -loss_BR, 0.0), entropy_BR

    logp_BR, entropy_BR = log_probabilities(params["policy"])
    ref_logp_BR, _ = log_probabilities(frozen.reference)
    value_BR = state_values(networks.scorer, params["critic"], tokens_BT, mask_BT, response_length=length)
    return (
        logp_BR,
        entropy_BR,
        ref_logp_BR,
        value_BR,
        last_token_scores(networks.scorer, frozen.reward, tokens_BT, mask_BT),
    )


def _said_packed(
    networks: Networks,
    params: dict[str, Params],
    frozen: Frozen,
    tokens_BT: Array,
    mask_BT: Array,
    mask_BR: Array,
    config: EpisodeConfig,
) -> Said:
    """The same from packed rows."""
    packed, places = pack_episodes(tokens_BT, mask_BT, mask_BR, None)

    def all_four(part: PackedEpisodes) -> tuple[Array, ...]:
        loss_BR, entropy_BR = packed_losses(networks.policy, params["policy"], part, temperature=config.temperature)
        ref_loss_BR, _ = packed_losses(networks.policy, frozen.reference, part, temperature=config.temperature)
        value_BR = packed_values(networks.scorer, params["critic"], part)
        return -loss_BR, entropy_BR, -ref_loss_BR, value_BR, packed_scores(networks.scorer, frozen.reward, part)

    found = over_rows(all_four, packed, places.rows, config.pack)
    logp_BR, entropy_BR, ref_logp_BR, value_BR, score_BR = (unpack(x, places, mask_BR) for x in found)
    last_B1 = jnp.maximum(jnp.sum(mask_BR, axis=1, keepdims=True) - 1, 0)
    return logp_BR, entropy_BR, ref_logp_BR, value_BR, jnp.take_along_axis(score_BR, last_B1, axis=1)[:, 0]
