"""Stage 3.2, PPO: maximise r(x, y) - β log(π(y|x) / π_SFT(y|x)), plus γ log π(x) on pretraining text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.arrays import Array, Params, PromptBatch, Rollout, TokenBatch, TrainState, pytree
from rlhf_jax.config import PPOConfig
from rlhf_jax.kl import adapt_kl_coef
from rlhf_jax.logprobs import packed_losses, packed_values, response_losses, state_values, target_losses
from rlhf_jax.lora import attach
from rlhf_jax.losses import clipped_surrogate, clipped_value_loss
from rlhf_jax.masked import masked_mean
from rlhf_jax.optim import (
    apply_gradient,
    global_count,
    looped_gradients,
    make_optimizer,
    new_state,
    summed_gradients,
)
from rlhf_jax.packing import PackedEpisodes, pack_episodes
from rlhf_jax.stages.rollout import Frozen, Networks, collect

STAGE = "ppo"
Config = PPOConfig


@pytree
class Batch:
    """What one iteration reads: prompts, and rows of pretraining text (None without the mix)."""

    prompts: PromptBatch
    pretraining: TokenBatch | None


@pytree
class Then:
    """What the rollout said of each response token, [B, R], where episodes are packed."""

    logp_BR: Array
    value_BR: Array
    advantage_BR: Array
    target_BR: Array


def objective(
    networks: Networks, params: dict[str, Params], part: Rollout | PackedEpisodes, count: Array, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Clipped surrogate plus weighted clipped value loss of a part of the episodes, as a share of the mean over tokens.

    Args:
      params: {"policy": …, "critic": …}.
      part: episodes, or packed rows of them whose data is a `Then`.
      count: response tokens of the whole minibatch.
    """
    mask_BR = part.response_mask_BR
    temperature = config.episode.temperature
    if isinstance(part, PackedEpisodes):
        then = part.data
        loss_BR, _ = packed_losses(networks.policy, params["policy"], part, temperature=temperature)
        value_BR = packed_values(networks.scorer, params["critic"], part)
    else:
        then = part
        rows, length = (part.tokens_BT, part.mask_BT), mask_BR.shape[1]
        loss_BR, _ = response_losses(
            networks.policy, params["policy"], *rows, response_length=length, temperature=temperature
        )
        value_BR = state_values(networks.scorer, params["critic"], *rows, response_length=length)
    log_ratio_BR = jnp.where(mask_BR, -loss_BR - then.logp_BR, 0.0)

    def mean(x_BR: Array) -> Array:
        return masked_mean(x_BR, mask_BR, count=count)

    policy_loss = mean(clipped_surrogate(log_ratio_BR, then.advantage_BR, clip=config.clip))
    value_loss = mean(clipped_value_loss(value_BR, then.value_BR, then.target_BR, clip=config.value_clip))
    error_BR = jnp.abs(jnp.expm1(jax.lax.stop_gradient(log_ratio_BR)))
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clipped": mean(error_BR > config.clip),
        "ratio_error": mean(error_BR),
    }
    return policy_loss + config.value_coef * value_loss, metrics


def whole(networks: dict[str, Params], frozen: Frozen, scale: float) -> dict[str, Params]:
    """Parameters of whole networks from what is trained of them, {"policy": …, "critic": …}."""
    scorer_base = frozen.backbone if frozen.scorer_backbone is None else frozen.scorer_backbone
    bases = {"policy": frozen.backbone, "critic": scorer_base}
    return {name: attach(bases[name], params, scale) for name, params in networks.items()}


def unfrozen(frozen: Frozen, scale: float) -> Frozen:
    """The same with whole networks in place of adapters."""
    both = whole({"policy": frozen.reference, "critic": frozen.reward}, frozen, scale)
    return Frozen(both["policy"], both["critic"], frozen.score_mean, frozen.score_scale)


def make_optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """One optimizer for the policy and one for the critic, over all optimizer steps of the run."""
    return {
        "policy": make_optimizer(config.policy, config.optimizer_steps),
        "critic": make_optimizer(config.critic, config.optimizer_steps),
    }


def initial_state(config: Config, policy: Params, critic: Params) -> TrainState:
    """The state before the first iteration: the policy from SFT, the critic from the reward model."""
    params = {"policy": policy, "critic": critic}
    optimizers = make_optimizers(config)
    opt_state = {name: jax.jit(optimizers[name].init)(params[name]) for name in optimizers}
    extras: dict[str, Any] = {"kl_coef": jnp.asarray(config.kl_coef, jnp.float32)}
    if config.ema_decay:
        extras["ema"] = jax.tree.map(jnp.copy, policy)
    return new_state(params, opt_state, config.seed, **extras)


def make_optimizer_step(networks: Networks, config: Config, axis_name: str | None = None) -> Callable[..., Any]:
    """step((params, opt_state), (episodes, text, key), frozen) -> ((params, opt_state), metrics): one minibatch."""
    optimizers = make_optimizers(config)
    scale = config.lora.scale

    def optimizer_step(
        carry: tuple[dict[str, Params], dict[str, Any]],
        inputs: tuple[Rollout, TokenBatch | None, Array],
        frozen: Frozen,
    ) -> tuple[tuple[dict[str, Params], dict[str, Any]], dict[str, Array]]:
        params, opt_state = carry
        part, text, key = inputs
        key, text_key = jax.random.split(key)
        count = global_count(part.response_mask_BR, axis_name)

        def ppo_objective(p: dict[str, Params], rows: Any, _: Array) -> tuple[Array, dict[str, Array]]:
            return objective(networks, whole(p, frozen, scale), rows, count, config)

        if config.episode.pack:
            then = Then(part.logp_BR, part.value_BR, part.advantage_BR, part.target_BR)
            packed, places = pack_episodes(part.tokens_BT, part.mask_BT, part.response_mask_BR, then)
            gradient, metrics = looped_gradients(
                ppo_objective, params, packed, key, rows=places.rows, size=config.episode.pack, axis_name=axis_name
            )
        else:
            gradient, metrics = summed_gradients(
                ppo_objective, params, part, key, microbatches=config.microbatches, axis_name=axis_name
            )
        if text is not None:
            targets = global_count(text.shifted()[3], axis_name)

            def language_objective(policy: Params, rows: TokenBatch, _: Array) -> tuple[Array, dict[str, Array]]:
                loss, mask = target_losses(networks.policy, attach(frozen.backbone, policy, scale), rows)
                return masked_mean(loss, mask, count=targets), {}

            text_gradient, text_metrics = summed_gradients(
                language_objective,
                params["policy"],
                text,
                text_key,
                microbatches=config.microbatches,
                axis_name=axis_name,
            )
            text_gradient = jax.tree.map(lambda g: config.pretraining_coef * g, text_gradient)
            metrics["pretraining_loss"] = text_metrics["loss"]
            metrics["ppo_norm"] = optax.tree.norm(gradient["policy"])
            metrics["pretraining_norm"] = optax.tree.norm(text_gradient)
            gradient["policy"] = jax.tree.map(jnp.add, gradient["policy"], text_gradient)
        for name in ("policy", "critic"):
            params[name], opt_state[name], facts = apply_gradient(
                optimizers[name], gradient[name], opt_state[name], params[name]
            )
            metrics |= {f"{name}_{fact}": value for fact, value in facts.items()}
        return (params, opt_state), metrics

    return optimizer_step


def make_update(
    networks: Networks, config: Config, *, eos_id: int | tuple[int, ...], pad_id: int, axis_name: str | None = None
) -> Callable[[TrainState, Batch, Frozen], tuple[TrainState, dict[str, Array]]]:
    """One iteration as a pure function: collect → score → returns → epochs × minibatches of optimizer steps."""
    optimizer_step = make_optimizer_step(networks, config, axis_name)
    scale = config.lora.scale

    def update(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        sample_key, order_key = jax.random.split(key)
        rollout, metrics = collect(
            networks,
            whole(state.params, frozen, scale),
            unfrozen(frozen, scale),
            batch.prompts,
            sample_key,
            state.extras["kl_coef"],
            config.episode,
            eos_id=eos_id,
            pad_id=pad_id,
            # As many rows at a time as an optimizer step takes, which needs more memory for each.
            parts=config.minibatches * config.microbatches,
            axis_name=axis_name,
        )
        if axis_name is not None:
            metrics = jax.lax.psum(metrics, axis_name)
        rows = batch.prompts.tokens_BP.shape[0]

        def minibatched(tree: Any, order: Array) -> Any:
            shuffled = jax.tree.map(lambda x: x[order], tree)
            return jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), shuffled)

        def epoch(carry: Any, key: Array) -> Any:
            episodes_key, text_key, steps_key = jax.random.split(key, 3)
            parts = minibatched(rollout, jax.random.permutation(episodes_key, rows))
            text = batch.pretraining
            if text is not None:
                text = minibatched(text, jax.random.permutation(text_key, text.tokens_BT.shape[0]))
            step = functools.partial(optimizer_step, frozen=frozen)
            return jax.lax.scan(step, carry, (parts, text, jax.random.split(steps_key, config.minibatches)))

        carry, history = jax.lax.scan(
            epoch, (state.params, state.opt_state), jax.random.split(order_key, config.epochs)
        )
        params, opt_state = carry
        metrics |= {name: jnp.mean(values) for name, values in history.items()}
        metrics["first_ratio_error"] = history["ratio_error"][0, 0]
        if batch.pretraining is not None:
            metrics["ppo_over_pretraining"] = metrics["ppo_norm"] / metrics["pretraining_norm"]
        extras = dict(state.extras)
        metrics["kl_coef"] = extras["kl_coef"]
        if config.kl_target is not None:
            extras["kl_coef"] = adapt_kl_coef(
                extras["kl_coef"],
                metrics["kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                episodes=config.batch,
            )
        if config.ema_decay:
            extras["ema"] = optax.incremental_update(params["policy"], extras["ema"], 1.0 - config.ema_decay)
        metrics["tokens"] = global_count(rollout.mask_BT, axis_name)
        return TrainState(state.step + 1, params, opt_state, state.key, extras), metrics

    return update


@jax.jit
def rescaled(params: Params, mean: float, scale: float) -> Params:
    """The critic's first parameters: the reward model's, its head in units of the score that PPO uses.

    They are copies: the state's arrays are given to the compiled update, which reads the reward model's own as well.
    """
    score = {"kernel": params["score"]["kernel"] / scale, "bias": (params["score"]["bias"] - mean) / scale}
    return jax.tree.map(jnp.copy, {**params, "score": score})
