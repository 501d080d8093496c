"""Stage 3.2, PPO: maximize r(x, y) - β log(π(y|x) / π_SFT(y|x)), plus γ log π(x) on pretraining text.

One iteration, `make_update`, has four steps:

  1 sample      prompts [B, P] → responses [B, R]
  2 score       of each response token: log π, log π_ref and V, [B, R]; of each response: r, [B]
  3 advantages  reward = r at the last token - β (log π - log π_ref), then GAE and whitening, [B, R]
  4 optimize    epochs × minibatches: clipped surrogate + value loss + γ pretraining loss, one Adam step each

Other estimators than GAE compare the K responses to a prompt and need no V. r is the reward model's normalized score,
or a sum of it and of reward functions (rewards.py). Functions need the text: the host has `make_sampling` do step 1,
decodes the responses, and gives them to the update with the functions' values. With an environment a response is an
episode of several turns, which `make_sampling` samples one at a time; its R tokens are those of the policy, which alone
are trained on, and the environment's observations between them.

The layout of rows (padded or packed) and of the sampler's KV cache is handled in packing.py and generate.py; results do
not depend on it.

Source:
  Ouyang et al. 2022 (arXiv:2203.02155); Schulman et al. 2017 (arXiv:1707.06347).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.arrays import Array, Params, PromptBatch, Rollout, TokenBatch, TrainState, pytree
from rlhf_jax.config import EpisodeConfig, PPOConfig
from rlhf_jax.generate import Generation, generate
from rlhf_jax.kl import adapt_kl_coef, kl_estimate
from rlhf_jax.logprobs import response_losses, response_scores, state_values, target_losses
from rlhf_jax.lora import attach, merged_kernels
from rlhf_jax.losses import asymmetric_surrogate, cispo_loss, clipped_value_loss, importance_weight, sequence_log_ratio
from rlhf_jax.masked import masked_mean, masked_whiten
from rlhf_jax.model import Transformer
from rlhf_jax.optim import apply_gradients, global_count, make_optimizer, new_state, summed_gradients
from rlhf_jax.packing import EpisodeRows, map_episodes, pack_episodes, padded_episodes
from rlhf_jax.returns import (
    generalized_advantages,
    greedy_baseline_advantages,
    group_advantages,
    kl_penalized_reward,
    leave_one_out_advantages,
)
from rlhf_jax.rewards import Terms, compose
from rlhf_jax.stages.answers import collapse_signs
from rlhf_jax.stages.turns import NextTurn, Turns, over_gaps, rewards_by_turn

STAGE = "ppo"
Config = PPOConfig
# Estimators of token advantages, which are whitened over the batch.
WHITENED = ("gae", "reinforce_pp")


class Networks(NamedTuple):
    """Architectures of PPO's four networks, which share one vocabulary.

    Attributes:
      policy: the policy's and the reference model's.
      scorer: the reward model's and the value network's, with a scalar head.
      teacher: the reference model's if it is not the policy's, as that of a larger model to distil.
    """

    policy: Transformer
    scorer: Transformer
    teacher: Transformer | None = None


@pytree
class Frozen:
    """Frozen networks of PPO and the normalization of scores.

    Attributes:
      reference: parameters of the reference model, i.e. the SFT model; an adapter to `backbone`, or full parameters.
      reward: parameters of the reward model; None if reward functions alone make the reward.
      score_mean: scalar; scores are normalized to (score - mean) / scale.
      score_scale: scalar.
      backbone: base parameters of the adapters of policy and reference, and of the scorers too if scorer_backbone is
        None; None if no network is an adapter. A rollout takes full parameters (`attach_frozen`).
      scorer_backbone: base parameters of the adapters of reward model and value network, if not `backbone`.
    """

    reference: Params
    reward: Params | None
    score_mean: Array
    score_scale: Array
    backbone: Params | None = None
    scorer_backbone: Params | None = None


@pytree
class ScoredResponses:
    """Responses that were sampled ahead of the update, with what N reward functions say of them.

    Attributes:
      sampled: the responses.
      value_BN: value of each function; NaN where it does not apply. The sum of an environment's rewards is one.
      turns: the environment's part; None without one.
    """

    sampled: Generation
    value_BN: Array
    turns: Turns | None = None


@pytree
class Batch:
    """Batch of one iteration.

    Attributes:
      prompts: the prompts.
      pretraining: rows of pretraining text; None without the pretraining mix.
      row_B: int32, row of each prompt in the data, by which the host finds its text; None without reward functions.
      scored: responses to the prompts; None if the update itself samples them.
      turn: of a batch to sample the next turn for; None otherwise.
    """

    prompts: PromptBatch
    pretraining: TokenBatch | None
    row_B: Array | None = None
    scored: ScoredResponses | None = None
    turn: NextTurn | None = None


@pytree
class RolloutScores:
    """Outputs of the four networks at each response token, [B, R] each.

    Attributes:
      logp_BR: log-probability under the policy, in nats.
      entropy_BR: entropy of the policy, in nats.
      ref_logp_BR: log-probability under the reference model, in nats.
      value_BR: value of the state before the token.
      score_BR: reward model score read at the token; 0 without a reward model.
    """

    logp_BR: Array
    entropy_BR: Array
    ref_logp_BR: Array
    value_BR: Array
    score_BR: Array


@pytree
class OldPolicyStats:
    """Statistics of the policy that sampled, as used by an optimizer step, [B, R] each.

    weight_BR is None where all tokens have the same weight, ref_logp_BR where the loss has no KL penalty.
    """

    logp_BR: Array
    value_BR: Array
    advantage_BR: Array
    target_BR: Array
    weight_BR: Array | None = None
    ref_logp_BR: Array | None = None


def make_update(
    networks: Networks,
    config: Config,
    *,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    axis_name: str | None = None,
    terms: Terms | None = None,
) -> Callable[[TrainState, Batch, Frozen], tuple[TrainState, dict[str, Array]]]:
    """Make one PPO iteration as a pure function: update(state, batch, frozen) -> (state, metrics).

    Args:
      networks: architectures of the four networks.
      config: settings of the stage.
      eos_id: token id that ends a response, or a tuple of such ids.
      pad_id: token id of padding.
      axis_name: mapped axis over which the prompts are split.
      terms: terms of the reward, with reward functions; every batch must then have scored responses.
    """
    # As many parts as an optimizer step computes, which needs more memory per row than scoring does.
    rollout = make_rollout(
        networks,
        config.episode,
        eos_id=eos_id,
        pad_id=pad_id,
        parts=config.minibatches * config.microbatches,
        axis_name=axis_name,
        terms=terms,
        estimator=config.estimator,
        samples=config.samples_per_prompt,
        importance_max=config.importance_bound,
    )
    optimize = make_optimization(networks, config, axis_name)
    scale = config.lora.scale

    def update(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, dict[str, Array]]:
        sample_key, order_key = iteration_keys(state, axis_name)
        kl_coef = state.extras["kl_coef"]

        # 1, 2, 3. Sample, score, compute advantages: prompts [B / K, P] → episodes [B, P + R].
        episodes, metrics = rollout(
            attach_adapters(state.params, frozen, scale),
            attach_frozen(frozen, scale, teacher=networks.teacher is not None),
            batch.prompts,
            sample_key,
            kl_coef if config.kl_in == "reward" else jnp.zeros_like(kl_coef),
            batch.scored,
        )
        if axis_name is not None:
            metrics = jax.lax.psum(metrics, axis_name)

        # 4. Optimize: epochs × minibatches of [B / minibatches, P + R]. One bad number would reach all episodes by the
        #    whitening, so a rollout that has one makes no step at all.
        sound = metrics["nonfinite"] == 0
        params, opt_state, history = optimize(state, episodes, batch.pretraining, frozen, order_key, sound)
        stepped = jnp.any(history["policy_skipped"] == 0)

        metrics |= {name: jnp.mean(values) for name, values in history.items()}
        metrics["first_ratio_error"] = history["ratio_error"][0, 0]
        if batch.pretraining is not None:
            metrics["ppo_over_pretraining"] = metrics["ppo_norm"] / metrics["pretraining_norm"]
        metrics["kl_coef"] = kl_coef
        metrics["tokens"] = global_count(episodes.mask_BT, axis_name)
        extras = next_extras(config, state.extras, metrics["kl"], params["policy"], frozen.backbone)
        extras = jax.tree.map(lambda new, old: jnp.where(stepped, new, old), extras, state.extras)
        return TrainState(state.step + 1, params, opt_state, state.key, extras), metrics

    return update


def iteration_keys(state: TrainState, axis_name: str | None) -> tuple[Array, Array]:
    """Random keys of this iteration and device: (of sampling, of the order of episodes)."""
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    sample_key, order_key = jax.random.split(key)
    return sample_key, order_key


def make_rollout(
    networks: Networks,
    config: EpisodeConfig,
    *,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    parts: int = 1,
    axis_name: str | None = None,
    terms: Terms | None = None,
    estimator: str = "gae",
    samples: int = 1,
    importance_max: float | None = None,
) -> Callable[..., tuple[Rollout, dict[str, Array]]]:
    """Make steps 1 to 3: rollout(params, frozen, prompts, key, kl_coef, scored=None) -> (episodes, metrics).

    params is {"policy": …, "critic": …}, without a critic where the estimator has none, and, like frozen, holds full
    parameters, not adapters; key must be unique to this iteration and device; kl_coef is β; scored holds the responses
    if they were sampled before. The metrics are shares, to be summed over the mapped axis.

    Args:
      networks: architectures of the four networks.
      config: settings of sampling and rewards.
      eos_id: token id that ends a response, or a tuple of such ids.
      pad_id: token id of padding.
      parts: number of equal parts of the prompts that are scored one after the other, to bound memory; a divisor of
        the number of episodes.
      axis_name: mapped axis over which the prompts are split.
      terms: terms of the reward, with reward functions.
      estimator: advantage estimator, as in `PPOConfig`.
      samples: number of responses to each prompt, K.
      importance_max: bound on the tokens' importance weights; None for no weights.
    """

    def rollout(
        params: dict[str, Params],
        frozen: Frozen,
        prompts: PromptBatch,
        key: Array,
        kl_coef: Array,
        scored: ScoredResponses | None = None,
    ) -> tuple[Rollout, dict[str, Array]]:
        if scored is None:
            sampled = sample(
                networks.policy,
                params["policy"],
                prompts,
                key,
                config,
                eos_id=eos_id,
                pad_id=pad_id,
                samples=samples,
                greedy_first=estimator == "remax",
            )
        else:
            sampled = scored.sampled
        return score(
            networks,
            params,
            frozen,
            prompts,
            sampled,
            kl_coef,
            config,
            eos_id=eos_id,
            parts=parts,
            axis_name=axis_name,
            terms=terms,
            value_BN=None if scored is None else scored.value_BN,
            turns=None if scored is None else scored.turns,
            estimator=estimator,
            samples=samples,
            importance_max=importance_max,
        )

    return rollout


def sample(
    policy: Transformer,
    params: Params,
    prompts: PromptBatch,
    key: Array,
    config: EpisodeConfig,
    *,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    samples: int = 1,
    greedy_first: bool = False,
    over_B: Array | None = None,
) -> Generation:
    """Step 1: sample K responses to each prompt from the full distribution at the given temperature.

    The responses [B, R] to a prompt follow each other. With `greedy_first`, the first of them is the greedy one. Rows
    where `over_B` is True get none.
    """
    sampling = dataclasses.replace(config.sampling(_ends(eos_id), pad_id), samples=samples - greedy_first)
    sampled = generate(policy, params, prompts.tokens_BP, prompts.mask_BP, key, sampling, over_B=over_B)
    if not greedy_first:
        return sampled
    # Nothing is drawn in it, so the key is not used twice.
    sampling = dataclasses.replace(sampling, samples=1, temperature=0.0)
    greedy = generate(policy, params, prompts.tokens_BP, prompts.mask_BP, jax.random.fold_in(key, 1), sampling)

    def joined(first: Array, rest: Array) -> Array:
        groups = rest.reshape(first.shape[0], samples - 1, *first.shape[1:])
        return jnp.concatenate([first[:, None], groups], axis=1).reshape(-1, *first.shape[1:])

    return Generation(*map(joined, greedy, sampled))


def make_sampling(
    networks: Networks, config: Config, *, eos_id: int | tuple[int, ...], pad_id: int, axis_name: str | None = None
) -> Callable[[TrainState, Batch, Frozen], Generation]:
    """Make step 1 of the update alone: the responses that update(state, batch, frozen) would sample.

    With an environment they are the first turns of the episodes, or those that a batch with a `NextTurn` asks for.
    """
    episode = dataclasses.replace(config.episode, response_length=config.turn_tokens)

    def sampling(state: TrainState, batch: Batch, frozen: Frozen) -> Generation:
        key, _ = iteration_keys(state, axis_name)
        policy = attach(frozen.backbone, state.params["policy"], config.lora.scale)
        how: dict[str, Any] = {"samples": config.samples_per_prompt, "greedy_first": config.estimator == "remax"}
        if batch.turn is not None:
            key, how = jax.random.fold_in(key, batch.turn.number_B[0]), {"over_B": batch.turn.over_B}
        return sample(networks.policy, policy, batch.prompts, key, episode, eos_id=eos_id, pad_id=pad_id, **how)

    return sampling


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
    terms: Terms | None = None,
    value_BN: Array | None = None,
    turns: Turns | None = None,
    estimator: str = "gae",
    samples: int = 1,
    importance_max: float | None = None,
) -> tuple[Rollout, dict[str, Array]]:
    """Steps 2 and 3: score the sampled token ids, without decoding them, and compute rewards and advantages [B, R].

    The values of reward functions, and an environment's part, come from the host, which decoded the responses.
    """
    if samples > 1:
        prompts = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
    mask_BR = sampled.mask
    tokens_BT = jnp.concatenate([prompts.tokens_BP, sampled.tokens], axis=1)
    mask_BT = jnp.concatenate([prompts.mask_BP, mask_BR if turns is None else turns.mask_BR], axis=1)
    ended_B = has_end(sampled, eos_id) if turns is None else turns.ended_B
    # The greedy responses of remax are a baseline, not samples of the policy.
    counted_B = (jnp.arange(len(mask_BR)) % samples > 0) | (estimator != "remax")

    # 2. Forward passes: log π, log π_ref, V and r at each response token, [B, R]; r at the last one is the score [B].
    #    log π is that of the update's forward pass, not the sampler's, so that the ratio before the first update is 1
    #    even if the sampler's KV cache is rounded.
    read = functools.partial(score_rows, networks, params, frozen, temperature=config.temperature)
    found: RolloutScores = map_episodes(read, tokens_BT, mask_BT, mask_BR, pack=config.pack, parts=parts)
    last_B1 = jnp.max(jnp.where(mask_BR, jnp.arange(mask_BR.shape[1])[None], 0), axis=1, keepdims=True)
    raw_B = jnp.take_along_axis(found.score_BR, last_B1, axis=1)[:, 0]
    score_B = (raw_B - frozen.score_mean) / frozen.score_scale
    term_metrics: dict[str, Array] = {}
    if terms is not None and value_BN is not None:
        model_B = None if frozen.reward is None else score_B
        score_B, term_metrics = compose(terms, model_B, value_BN, axis_name, counted_B)
    score_B = with_missing_end(score_B, ended_B, config)

    # 3. Reward of each token, [B, R]: minus β times the log-ratio, and the score at the last one; GAE; whitening over
    #    the global batch.
    reward_BR = kl_penalized_reward(found.logp_BR, found.ref_logp_BR, score_B, mask_BR, kl_coef=kl_coef)
    if turns is not None:
        reward_BR = rewards_by_turn(reward_BR, turns, last_B1, ended_B | (config.missing_end != "replace"))
    if config.whiten_rewards:
        reward_BR = masked_whiten(reward_BR, mask_BR, axis_name, keep_mean=True)
    estimate = functools.partial(advantages, config=config, estimator=estimator, samples=samples)
    advantage_BR, target_BR = (estimate if turns is None else over_gaps(estimate))(reward_BR, found.value_BR, mask_BR)
    mask_BR = mask_BR & counted_B[:, None]
    used_BR = masked_whiten(advantage_BR, mask_BR, axis_name) if estimator in WHITENED else advantage_BR
    of_tokens = {"entropy": found.entropy_BR, "sampler_logp_error": jnp.abs(sampled.logp - found.logp_BR)}
    # Responses of an older policy, or of a sampler that rounds: a factor of the advantage is one of the policy loss.
    if importance_max is not None:
        weight_BR = importance_weight(jnp.where(mask_BR, found.logp_BR - sampled.logp, 0.0), most=importance_max)
        used_BR, of_tokens["importance_weight"] = used_BR * weight_BR, weight_BR
    outputs_BR = (found.logp_BR, found.ref_logp_BR, found.value_BR)
    episodes = Rollout(tokens_BT, mask_BT, mask_BR, *outputs_BR, used_BR, target_BR, score_B)

    # Metrics: means over episodes and over response tokens.
    finite_BR = (jnp.isfinite(advantage_BR) & jnp.isfinite(target_BR)) | ~mask_BR
    kl_BR = jnp.where(mask_BR, kl_estimate(found.logp_BR, found.ref_logp_BR), 0.0)
    of_episodes = {
        "score": score_B,
        "kl": jnp.sum(kl_BR, axis=1),
        "reward": jnp.sum(reward_BR, axis=1),
        "response_tokens": jnp.sum(mask_BR, axis=1),
        "missing_end": ~ended_B,
        "nonfinite": ~(jnp.isfinite(raw_B) & jnp.all(finite_BR, axis=1)),
    }
    of_episodes |= {} if turns is None else {"turns": turns.count_B}
    of_tokens |= {"value": found.value_BR} if "critic" in params else {}
    metrics = {name: masked_mean(x_B, counted_B, axis_name) for name, x_B in of_episodes.items()}
    metrics |= {name: masked_mean(x_BR, mask_BR, axis_name) for name, x_BR in of_tokens.items()}
    # One sampled response to each prompt: those to one prompt may well be the same.
    one = slice(int(estimator == "remax"), None, samples)
    signs = collapse_signs(sampled.tokens, mask_BR, one, axis_name)
    return episodes, metrics | term_metrics | signs


def score_rows(
    networks: Networks, params: dict[str, Params], frozen: Frozen, rows: EpisodeRows, *, temperature: float
) -> RolloutScores:
    """Step 2: forward passes over rows of episodes; scores are 0 without a reward model, values without a critic."""
    loss_BR, entropy_BR = response_losses(networks.policy, params["policy"], rows, temperature=temperature)
    reference = networks.policy if networks.teacher is None else networks.teacher
    ref_loss_BR, _ = response_losses(reference, frozen.reference, rows, temperature=temperature)
    value_BR = jnp.zeros_like(loss_BR)
    if "critic" in params:
        value_BR = state_values(networks.scorer, params["critic"], rows)
    without = frozen.reward is None
    return RolloutScores(
        logp_BR=-loss_BR,
        entropy_BR=entropy_BR,
        ref_logp_BR=-ref_loss_BR,
        value_BR=value_BR,
        score_BR=jnp.zeros_like(value_BR) if without else response_scores(networks.scorer, frozen.reward, rows),
    )


def has_end(sampled: Generation, eos_id: int | tuple[int, ...]) -> Array:
    """True for the responses [B] that have an end token."""
    ends_BR = functools.reduce(jnp.logical_or, [sampled.tokens == end for end in _ends(eos_id)])
    return jnp.any(ends_BR & sampled.mask, axis=1)


def with_missing_end(score_B: Array, ended_B: Array, config: EpisodeConfig) -> Array:
    """Scores [B], replaced or lowered where the response has no end, as the settings say."""
    if config.missing_end == "replace":
        return jnp.where(ended_B, score_B, config.missing_end_score)
    if config.missing_end == "subtract":
        return jnp.where(ended_B, score_B, score_B + config.missing_end_score)
    return score_B


def advantages(
    reward_BR: Array, value_BR: Array, mask_BR: Array, config: EpisodeConfig, estimator: str, samples: int
) -> tuple[Array, Array]:
    """Step 3: advantage and value target [B, R] of each token, unwhitened, by the estimator; 0 in masked slots.

    Without a value network the values are 0, and REINFORCE++ is GAE with λ = 1. The other estimators take the sum of a
    response's rewards, and give all of its tokens the same advantage.
    """
    if estimator in WHITENED:
        lam = config.gae_lambda if estimator == "gae" else 1.0
        return generalized_advantages(reward_BR, value_BR, mask_BR, gamma=config.gamma, lam=lam)
    return_B = jnp.sum(reward_BR, axis=1)
    if estimator == "rloo":
        advantage_B = leave_one_out_advantages(return_B, samples=samples)
    elif estimator == "remax":
        advantage_B = greedy_baseline_advantages(return_B, samples=samples)
    else:
        advantage_B = group_advantages(return_B, samples=samples, scale=estimator == "grpo")
    return jnp.where(mask_BR, advantage_B[:, None], 0.0), jnp.zeros_like(reward_BR)


def make_optimization(networks: Networks, config: Config, axis_name: str | None = None) -> Callable[..., Any]:
    """Make step 4: optimize(state, episodes, text, frozen, key, sound) -> (params, opt_state, history).

    Each epoch has a new random order of the episodes, and of the rows of the pretraining text, if there is any. The
    history has the metrics of each optimizer step, [epochs, minibatches]. For `sound` see `make_optimizer_step`.
    """
    optimizer_step = make_optimizer_step(networks, config, axis_name)

    def minibatched(tree: Any, key: Array) -> Any:
        order = jax.random.permutation(key, jax.tree.leaves(tree)[0].shape[0])
        return jax.tree.map(lambda x: x[order].reshape(config.minibatches, -1, *x.shape[1:]), tree)

    def optimize(
        state: TrainState, episodes: Rollout, text: TokenBatch | None, frozen: Frozen, key: Array, sound: Array
    ) -> tuple[dict[str, Params], dict[str, Any], dict[str, Array]]:
        step = functools.partial(optimizer_step, frozen=frozen, sound=sound, kl_coef=state.extras["kl_coef"])

        def epoch(carry: Any, key: Array) -> Any:
            episodes_key, text_key, steps_key = jax.random.split(key, 3)
            parts = minibatched(episodes, episodes_key)
            rows = None if text is None else minibatched(text, text_key)
            return jax.lax.scan(step, carry, (parts, rows, jax.random.split(steps_key, config.minibatches)))

        start = (state.params, state.opt_state)
        (params, opt_state), history = jax.lax.scan(epoch, start, jax.random.split(key, config.epochs))
        return params, opt_state, history

    return optimize


def make_optimizer_step(networks: Networks, config: Config, axis_name: str | None = None) -> Callable[..., Any]:
    """Make one optimizer step of step 4.

    step((params, opt_state), (episodes, text, key), frozen, sound=True, kl_coef=0.0) -> ((params, opt_state), metrics),
    where sound is False for episodes with a score, value or log-probability that is not finite: neither network makes a
    step. kl_coef is that of a KL penalty in the loss.
    """
    optimizers = make_optimizers(config)
    text_gradient = make_text_gradient(networks, config, axis_name)

    def optimizer_step(
        carry: tuple[dict[str, Params], dict[str, Any]],
        inputs: tuple[Rollout, TokenBatch | None, Array],
        frozen: Frozen,
        sound: Array | bool = True,
        kl_coef: Array | float = 0.0,
    ) -> tuple[tuple[dict[str, Params], dict[str, Any]], dict[str, Array]]:
        params, opt_state = carry
        episodes, text, key = inputs
        key, text_key = jax.random.split(key)
        count = global_count(episodes.response_mask_BR, axis_name)
        responses = global_count(jnp.any(episodes.response_mask_BR, axis=1), axis_name)
        rows, in_use = episode_rows(
            episodes,
            packed=config.episode.pack > 0,
            reduction=config.policy_reduction,
            with_reference=config.kl_in == "loss",
        )

        def ppo_objective(p: dict[str, Params], part: EpisodeRows, _: Array) -> tuple[Array, dict[str, Array]]:
            full = attach_adapters(p, frozen, config.lora.scale)
            return objective(networks, full, part, count, config, responses=responses, kl_coef=kl_coef)

        gradient, metrics = summed_gradients(
            ppo_objective,
            params,
            rows,
            key,
            microbatches=config.microbatches,
            rows_in_use=in_use,
            rows_at_a_time=config.episode.pack,
            axis_name=axis_name,
        )
        if text is not None:
            of_text, metrics["pretraining_loss"] = text_gradient(params["policy"], frozen.backbone, text, text_key)
            metrics["ppo_norm"] = optax.tree.norm(gradient["policy"])
            metrics["pretraining_norm"] = optax.tree.norm(of_text)
            gradient["policy"] = jax.tree.map(jnp.add, gradient["policy"], of_text)
            sound &= jnp.isfinite(metrics["pretraining_loss"])
        sound &= jnp.isfinite(metrics["loss"])
        params, opt_state, facts = apply_gradients(optimizers, gradient, opt_state, params, sound=sound)
        metrics |= {f"{name}_{fact}": value for name, found in facts.items() for fact, value in found.items()}
        return (params, opt_state), metrics

    return optimizer_step


def make_text_gradient(networks: Networks, config: Config, axis_name: str | None = None) -> Callable[..., Any]:
    """Make the pretraining mix: text_gradient(policy, backbone, text, key) -> (γ times the gradient, loss in nats)."""

    def text_gradient(policy: Params, backbone: Params | None, text: TokenBatch, key: Array) -> tuple[Params, Array]:
        targets = global_count(text.shifted()[3], axis_name)

        def language_objective(p: Params, part: TokenBatch, _: Array) -> tuple[Array, dict[str, Array]]:
            loss, mask = target_losses(networks.policy, attach(backbone, p, config.lora.scale), part)
            return masked_mean(loss, mask, count=targets), {}

        gradient, metrics = summed_gradients(
            language_objective, policy, text, key, microbatches=config.microbatches, axis_name=axis_name
        )
        return jax.tree.map(lambda g: config.pretraining_coef * g, gradient), metrics["loss"]

    return text_gradient


def objective(
    networks: Networks,
    params: dict[str, Params],
    rows: EpisodeRows,
    count: Array,
    config: Config,
    *,
    responses: Array | None = None,
    kl_coef: Array | float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Policy loss plus weighted clipped value loss, as a share of the mean over response tokens.

    Args:
      networks: architectures of the four networks.
      params: {"policy": …, "critic": …}, full parameters; without a critic, there is no value loss.
      rows: rows of episodes whose data is an `OldPolicyStats`.
      count: number of response tokens in the global minibatch.
      config: settings of the stage.
      responses: number of responses in the global minibatch, for a reduction other than over tokens.
      kl_coef: β of a KL penalty in the loss, for rows with reference log-probabilities.

    Returns:
      (share of the loss, shares of the metrics).
    """
    old, mask_BR = rows.data, rows.response_mask_BR
    loss_BR, _ = response_losses(networks.policy, params["policy"], rows, temperature=config.episode.temperature)
    log_ratio_BR = jnp.where(mask_BR, -loss_BR - old.logp_BR, 0.0)

    def mean(x_BR: Array) -> Array:
        return masked_mean(x_BR, mask_BR, count=count)

    def reduced(x_BR: Array) -> Array:
        return mean(x_BR) if old.weight_BR is None else masked_mean(x_BR * old.weight_BR, mask_BR, count=responses)

    if config.policy_loss == "gspo":
        log_ratio_BR = sequence_log_ratio(log_ratio_BR, mask_BR)
    high = config.clip if config.clip_high is None else config.clip_high
    if config.policy_loss == "cispo":
        losses_BR = cispo_loss(log_ratio_BR, -loss_BR, old.advantage_BR, ratio_max=1.0 + high)
    else:
        losses_BR = asymmetric_surrogate(
            log_ratio_BR, old.advantage_BR, clip_low=config.clip, clip_high=high, dual_clip=config.dual_clip
        )
    policy_loss = reduced(losses_BR)
    off_BR = jnp.expm1(jax.lax.stop_gradient(log_ratio_BR))
    metrics = {
        "policy_loss": policy_loss,
        "clipped": mean((off_BR > high) | (off_BR < -config.clip)),
        "ratio_error": mean(jnp.abs(off_BR)),
    }
    loss = policy_loss
    if "critic" in params:
        value_BR = state_values(networks.scorer, params["critic"], rows)
        value_loss = mean(clipped_value_loss(value_BR, old.value_BR, old.target_BR, clip=config.value_clip))
        metrics["value_loss"] = value_loss
        loss = policy_loss + config.value_coef * value_loss
    if old.ref_logp_BR is not None:
        loss = loss + kl_coef * reduced(kl_estimate(-loss_BR, old.ref_logp_BR, estimator="k3"))
    return loss, metrics


def episode_rows(
    episodes: Rollout, *, packed: bool, reduction: str = "token", with_reference: bool = False
) -> tuple[EpisodeRows, Array | None]:
    """Lay out episodes as rows for `objective`: (rows, number of rows in use, or None for all).

    Args:
      episodes: the episodes.
      packed: pack several episodes into a row.
      reduction: mean of the policy loss, as in `PPOConfig`.
      with_reference: keep the reference log-probabilities, for a KL penalty in the loss.
    """
    mask_BR, weight_BR = episodes.response_mask_BR, None
    if reduction != "token":
        most = mask_BR.shape[1]
        tokens_B1 = jnp.sum(mask_BR, axis=1, keepdims=True) if reduction == "sequence" else jnp.full((1, 1), most)
        weight_BR = mask_BR / jnp.maximum(tokens_B1, 1)
    old = OldPolicyStats(
        episodes.logp_BR,
        episodes.value_BR,
        episodes.advantage_BR,
        episodes.target_BR,
        weight_BR,
        episodes.ref_logp_BR if with_reference else None,
    )
    layout = (episodes.tokens_BT, episodes.mask_BT, episodes.response_mask_BR, old)
    if not packed:
        return padded_episodes(*layout), None
    rows, places = pack_episodes(*layout)
    return rows, places.rows


def attach_adapters(params: dict[str, Params], frozen: Frozen, scale: float) -> dict[str, Params]:
    """Attach the trained adapters to their backbones: full parameters of the same networks."""
    scorer_base = frozen.backbone if frozen.scorer_backbone is None else frozen.scorer_backbone
    bases = {"policy": frozen.backbone, "critic": scorer_base}
    return {name: attach(bases[name], trained, scale) for name, trained in params.items()}


def attach_frozen(frozen: Frozen, scale: float, teacher: bool = False) -> Frozen:
    """Attach the frozen adapters to their backbones: a `Frozen` with full parameters and no backbone.

    Args:
      frozen: the frozen networks.
      scale: of the adapters.
      teacher: True if the reference has an architecture of its own, and so all of its parameters.
    """
    adapters = {} if teacher else {"policy": frozen.reference}
    adapters |= {} if frozen.reward is None else {"critic": frozen.reward}
    full = attach_adapters(adapters, frozen, scale)
    reference = full.get("policy", frozen.reference)
    return Frozen(reference, full.get("critic"), frozen.score_mean, frozen.score_scale)


def make_optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """Make the optimizers of policy and critic, if there is one, with schedules over all optimizer steps of the run."""
    settings = {"policy": config.policy} | ({"critic": config.critic} if config.value_network else {})
    return {name: make_optimizer(each, config.optimizer_steps) for name, each in settings.items()}


def next_extras(
    config: Config, extras: dict[str, Any], kl: Array, policy: Params, backbone: Params | None
) -> dict[str, Any]:
    """The extras after an iteration: β, adapted to the KL of the batch, and the moving average of the new policy."""
    extras = dict(extras)
    if config.kl_target is not None:
        extras["kl_coef"] = adapt_kl_coef(
            extras["kl_coef"], kl, target=config.kl_target, horizon=config.kl_horizon, episodes=config.batch
        )
    if config.ema_decay:
        newest = averaged(backbone, policy, config.lora.scale)
        extras["ema"] = optax.incremental_update(newest, extras["ema"], 1.0 - config.ema_decay)
    return extras


def averaged(backbone: Params | None, policy: Params, scale: float) -> Params:
    """What the moving average is taken of: the policy's parameters, or the kernels that its adapter makes."""
    return policy if backbone is None else merged_kernels(backbone, policy, scale)


def initial_state(config: Config, policy: Params, critic: Params | None, backbone: Params | None = None) -> TrainState:
    """Initial state: the policy starts from the SFT model, the critic from the reward model, or else the policy.

    Without a value network, critic is None; backbone holds the base parameters of a policy that is an adapter.
    """
    params = {"policy": policy} | ({} if critic is None else {"critic": critic})
    optimizers = make_optimizers(config)
    opt_state = {name: jax.jit(optimizers[name].init)(params[name]) for name in optimizers}
    extras: dict[str, Any] = {"kl_coef": jnp.asarray(config.kl_coef, jnp.float32)}
    if config.ema_decay:
        start = jax.jit(averaged, static_argnums=2)(backbone, policy, config.lora.scale)
        extras["ema"] = jax.tree.map(jnp.copy, start)
    return new_state(params, opt_state, config.seed, **extras)


@jax.jit
def rescaled(params: Params, mean: float, scale: float) -> Params:
    """Initial parameters of the critic: the reward model's, with the head rescaled to normalized scores.

    All arrays are copied: the state's buffers are donated to the compiled update, which also reads the reward model.
    """
    head = {"kernel": params["score"]["kernel"] / scale, "bias": (params["score"]["bias"] - mean) / scale}
    return jax.tree.map(jnp.copy, {**params, "score": head})


def _ends(eos_id: int | tuple[int, ...]) -> tuple[int, ...]:
    """Token ids that end a response: EOS and, with some chat templates, the end of a turn."""
    return (eos_id,) if isinstance(eos_id, int) else eos_id
