"""Sampling: one jitted program of prefill and a loop over the KV cache that ends when every row has."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, Params
from rlhf_jax.masked import at_least_float32
from rlhf_jax.model import MASKED, Cache, Transformer, empty_cache
from rlhf_jax.sharding import constrain, constrain_rows, decoding, decoding_params


class Generation(NamedTuple):
    """Sampled responses of B rows.

    tokens: [B, R] int32, padded behind a row's end.
    mask: [B, R] bool, True for sampled tokens, the ending one included.
    logp: [B, R] float32, nats of each sampled token under the distribution it was drawn from, 0 where masked.
    """

    tokens: Array
    mask: Array
    logp: Array


def filter_logits(logits_BV: Array, *, temperature: float, top_k: int, top_p: float) -> Array:
    """log-probabilities [B, V] of the distribution that is drawn from.

    Args:
      logits_BV: float.
      temperature: divides the logits; greater than 0.
      top_k: keep the k most likely ids (ties with the k-th kept); 0 keeps all.
      top_p: keep the smallest set of most likely ids whose probability reaches p (Holtzman et al. 2019,
        arXiv:1904.09751); 1 keeps all.
    """
    logits_BV = at_least_float32(logits_BV) / temperature
    if top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, MASKED)
    if top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        inside_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < top_p
        least_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, MASKED)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def draw(logp_BV: Array, key: Array) -> Array:
    """One id a row, [B] int32, from log-probabilities [B, V], by the inverse of the distribution function.

    It takes one uniform number a row; a Gumbel number for every entry of the vocabulary would cost a third of the
    sampling time.
    """
    probability_BV = jnp.exp(logp_BV)
    # The parallel sum of float32 moves by its last bit also where nothing is added: such ids must not catch a draw.
    cumulative_BV = jnp.where(probability_BV > 0.0, jnp.cumsum(probability_BV, axis=-1), 0.0)
    # In (0, 1], so that the target is above 0 and is reached.
    uniform_B1 = 1.0 - jax.random.uniform(key, (logp_BV.shape[0], 1), logp_BV.dtype)
    reached_BV = cumulative_BV >= uniform_B1 * jnp.max(cumulative_BV, axis=-1, keepdims=True)
    ids_1V = jnp.arange(logp_BV.shape[-1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(reached_BV, ids_1V, logp_BV.shape[-1] - 1), axis=-1)


def extend(model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, cache: Cache) -> tuple[Array, Cache]:
    """(logits [B, V] behind the last of these tokens, the cache that holds them too)."""
    hidden_BTD, cache = model.apply({"params": params}, tokens_BT, mask_BT, cache=cache, method="hidden")
    logits_BV = model.apply({"params": params}, hidden_BTD[:, -1], method="head")
    # A row's vocabulary is summed and sorted in one place: every device draws for its own rows.
    return constrain_rows(logits_BV), cache


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "stop_ids", "pad_id", "temperature", "top_k", "top_p", "decode_parts"),
)
def generate(
    model: Transformer,
    params: Params,
    tokens_BP: Array,
    mask_BP: Array,
    key: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    decode_parts: int = 0,
) -> Generation:
    """Samples a response to each prompt; a row ends with its first stop token, the batch with its last row.

    Args:
      model: language-head transformer.
      params: its parameters.
      tokens_BP: prompts, left-padded, int32.
      mask_BP: True for real tokens.
      key: typed random key; not used again by the caller.
      max_new_tokens: R, the most that is sampled a row.
      stop_ids: ids that end a row (the end-of-text token); the stop token is part of the response.
      pad_id: written behind a row's end.
      temperature: 0 is greedy. top_k, top_p: see `filter_logits`. PPO leaves all three at their defaults or the
        probability ratio and the KL would be of another distribution than the one that was sampled.
      decode_parts: of the axis fsdp, devices among which one copy of the weights lies while sampling, gathered once and
        not at each token; 0 leaves them where they are.
    Returns: Generation of R columns.
    Raises: ValueError where P + R exceeds the context, or for a temperature, top_k or top_p out of range.
    """
    params = decoding_params(params, decode_parts, model.config.dtype)
    with decoding(decode_parts):
        out = _generate(
            model,
            params,
            constrain(tokens_BP, "batch", "none"),
            constrain(mask_BP, "batch", "none"),
            key,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
    return Generation(*(constrain(x, "batch", "none") for x in out))


def _generate(
    model: Transformer,
    params: Params,
    tokens_BP: Array,
    mask_BP: Array,
    key: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Generation:
    rows, prompt_length = tokens_BP.shape
    if prompt_length + max_new_tokens > model.config.context:
        raise ValueError(
            f"prompt of {prompt_length} + {max_new_tokens} new tokens exceeds the context {model.config.context}"
        )

    if temperature < 0.0:
        raise ValueError(f"temperature {temperature}: wanted 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k {top_k}: wanted 0 or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p {top_p}: wanted above 0, at most 1")

    def next_tokens(logits_BV: Array, index: Array, ended_B: Array) -> tuple[Array, Array, Array]:
        if temperature == 0.0:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            logp_B = jnp.zeros(rows, jnp.float32)
        else:
            logp_BV = filter_logits(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
            token_B = draw(logp_BV, jax.random.fold_in(key, index))
            logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(ended_B, pad_id, token_B)
        stopped_B = functools.reduce(jnp.logical_or, [token_B == stop for stop in stop_ids], jnp.zeros(rows, bool))
        # Drawn on all devices, and back to where the model reads its rows.
        drawn = (token_B, jnp.where(ended_B, 0.0, logp_B), ended_B | stopped_B)
        token_B, logp_B, ended_B = (constrain(x_B, "batch") for x_B in drawn)
        return token_B, logp_B, ended_B

    cache = empty_cache(model.config, rows, prompt_length + max_new_tokens)
    logits_BV, cache = extend(model, params, tokens_BP, mask_BP, cache)
    token_B, logp_B, ended_B = next_tokens(logits_BV, jnp.zeros((), jnp.int32), jnp.zeros(rows, bool))
    shape = (rows, max_new_tokens)
    out = Generation(
        jnp.full(shape, pad_id, jnp.int32).at[:, 0].set(token_B),
        jnp.zeros(shape, bool).at[:, 0].set(True),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(logp_B),
    )

    Carry = tuple[Array, Cache, Array, Array, Generation]

    def unfinished(carry: Carry) -> Array:
        index, _, _, ended_B, _ = carry
        return (index < max_new_tokens) & ~jnp.all(ended_B)

    def step(carry: Carry) -> Carry:
        index, cache, token_B, ended_B, out = carry
        # A row that has ended feeds a pad; nothing reads what it computes.
        logits_BV, cache = extend(model, params, token_B[:, None], ~ended_B[:, None], cache)
        alive_B = ~ended_B
        token_B, logp_B, ended_B = next_tokens(logits_BV, index, ended_B)
        columns = zip(out, (token_B, alive_B, logp_B), strict=True)
        out = Generation(*(jax.lax.dynamic_update_slice_in_dim(a, c[:, None], index, axis=1) for a, c in columns))
        return index + 1, cache, token_B, ended_B, out

    carry = (jnp.ones((), jnp.int32), cache, token_B, ended_B, out)
    return jax.lax.while_loop(unfinished, step, carry)[-1]
