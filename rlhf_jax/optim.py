"""Optimizers, schedules, and gradients that are exact over microbatches and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.arrays import Array, Params, TrainState
from rlhf_jax.config import OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.packing import take_rows


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Make the learning-rate schedule of a run with `steps` optimizer steps."""
    warmup_steps = config.warmup(steps)
    rest = max(steps - warmup_steps, 1)
    rate, final = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "constant":
        after = optax.constant_schedule(rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(rate, final, rest)
    else:
        after = optax.cosine_decay_schedule(rate, rest, config.final_fraction)
    warmup = optax.linear_schedule(rate / max(warmup_steps, 1), rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def decayed(params: Params) -> Params:
    """Weight decay mask, a tree of bools: True for kernels, embeddings and adapters, False for biases and norm scales.

    Names decide, since a scale of stacked layers is a matrix [layers, width].
    """

    def one(path: Any, leaf: Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")[2]
        return leaf.ndim > 1 and name not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(one, params)


# One object for equal settings, so that a compiled `init` is found again.
@functools.lru_cache(maxsize=64)
def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Make AdamW with gradient clipping and the schedule of a run with `steps` optimizer steps."""
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decayed))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, steps)))
    return optax.chain(*parts)


Objective = Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]


def summed_gradients(
    objective: Objective,
    params: Params,
    batch: Any,
    key: Array,
    *,
    microbatches: int = 1,
    rows_in_use: Array | None = None,
    rows_at_a_time: int = 0,
    axis_name: str | None = None,
) -> tuple[Params, dict[str, Array]]:
    """Gradient and metrics of an objective, summed over microbatches and devices.

    The objective returns shares of a global mean, not means: averaging means per device or per microbatch would be
    wrong wherever masks are uneven.

    Args:
      objective: (params, microbatch, key) -> (share of the loss, shares of the metrics), normalized by global counts.
      params: parameters to differentiate with respect to.
      batch: pytree of arrays with a leading row axis.
      key: typed random key, from which each share gets its own.
      microbatches: number of equal slices of the batch, computed one after the other to save memory.
      rows_in_use: int32 scalar, may be a traced value; only that many first rows of the batch are used, the others are
        padding. They are computed rows_at_a_time, in place of microbatches.
      rows_at_a_time: with rows_in_use, number of rows computed at a time; a divisor of the rows of the batch.
      axis_name: mapped axis over which the batch is split.

    Returns:
      (gradient, metrics with "loss"), the same on every device.

    Raises:
      UserError: if the rows are not divisible by the microbatches.
    """
    differentiate = jax.value_and_grad(objective, has_aux=True)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def shares(batch: Any, key: Array) -> tuple[Params, dict[str, Array]]:
        (loss, metrics), gradient = differentiate(params, batch, key)
        return gradient, {"loss": loss} | metrics

    if rows_in_use is not None:

        def part(first: Array) -> tuple[Params, dict[str, Array]]:
            return shares(take_rows(batch, first, rows_at_a_time), jax.random.fold_in(key, first))

        first = jnp.zeros((), jnp.int32)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, first))
        _, total = jax.lax.while_loop(
            lambda carry: carry[0] < rows_in_use,
            lambda carry: (carry[0] + rows_at_a_time, jax.tree.map(jnp.add, carry[1], part(carry[0]))),
            (first, zero),
        )
    elif microbatches == 1:
        total = shares(batch, key)
    else:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % microbatches:
            raise UserError(f"{rows} rows are not divisible by {microbatches} microbatches")
        # A microbatch takes every m-th row, so that it stays sharded over the devices like the batch.
        sliced = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, microbatches)
        shapes = jax.eval_shape(shares, jax.tree.map(lambda x: x[0], sliced), key)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(
            lambda sum, piece: (jax.tree.map(jnp.add, sum, shares(*piece)), None), zero, (sliced, keys)
        )
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def global_count(mask: Array, axis_name: str | None = None) -> Array:
    """Count the True slots of the global batch, int32 scalar."""
    count = jnp.sum(mask, dtype=jnp.int32)
    return count if axis_name is None else jax.lax.psum(count, axis_name)


def apply_gradients(
    optimizers: Mapping[str, optax.GradientTransformation],
    gradients: Mapping[str, Params],
    opt_states: Mapping[str, Any],
    params: Mapping[str, Params],
    *,
    sound: Array | bool = True,
) -> tuple[dict[str, Params], dict[str, Any], dict[str, dict[str, Array]]]:
    """Apply one optimizer step to each network, or to none of them.

    The step is skipped, and changes nothing, if the norm of a gradient or of new parameters is NaN or infinite. The
    check is part of the compiled program, so that no bad value ever reaches a parameter; all that it looks at is the
    same on every device, and so is the decision.

    Args:
      optimizers, gradients, opt_states, params: by the name of the network.
      sound: scalar, False to skip the step; such as for a loss that is NaN, whose gradient may be 0.

    Returns:
      (params, opt_states, {"grad_norm", "param_norm", "skipped"}), each by name; skipped is 0.0 or 1.0, and param_norm
      is the norm of the new parameters before the decision.
    """
    proposed, facts = {}, {}
    for name, optimizer in optimizers.items():
        updates, opt_state = optimizer.update(gradients[name], opt_states[name], params[name])
        proposed[name] = (optax.apply_updates(params[name], updates), opt_state)
        facts[name] = {"grad_norm": optax.tree.norm(gradients[name]), "param_norm": optax.tree.norm(proposed[name][0])}
    sound = jnp.asarray(sound)
    for norm in jax.tree.leaves(facts):
        sound &= jnp.isfinite(norm)
    kept = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old),
        proposed,
        {name: (params[name], opt_states[name]) for name in optimizers},
    )
    skipped = 1.0 - sound.astype(jnp.float32)
    return (
        {name: pair[0] for name, pair in kept.items()},
        {name: pair[1] for name, pair in kept.items()},
        {name: norms | {"skipped": skipped} for name, norms in facts.items()},
    )


def apply_gradient(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    opt_state: Any,
    params: Params,
    *,
    sound: Array | bool = True,
) -> tuple[Params, Any, dict[str, Array]]:
    """Apply one optimizer step to one network, or skip it: (params, opt_state, facts), as `apply_gradients`."""
    stepped = apply_gradients({"": optimizer}, {"": gradient}, {"": opt_state}, {"": params}, sound=sound)
    params, opt_state, facts = (by_name[""] for by_name in stepped)
    return params, opt_state, facts


def gradient_step(
    state: TrainState,
    objective: Objective,
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Update a stage with one network: sum gradients, apply one optimizer step, increment the step."""
    key = jax.random.fold_in(state.key, state.step)
    gradient, metrics = summed_gradients(
        objective, state.params, batch, key, microbatches=microbatches, axis_name=axis_name
    )
    params, opt_state, facts = apply_gradient(
        optimizer, gradient, state.opt_state, state.params, sound=jnp.isfinite(metrics["loss"])
    )
    return TrainState(state.step + 1, params, opt_state, state.key, state.extras), metrics | facts


def new_state(params: Params, opt_state: Any, seed: int, **extras: Any) -> TrainState:
    """Make the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key(seed), extras)


def first_key(seed: int, number: int = 0) -> Array:
    """Random key for the consumer of a number that draws before the first step, such as fresh adapters.

    A step folds its own number, which is far below 2³² - 1, into jax.random.key(seed), so no step has the same key.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2**32 - 1), number)
