"""Sampling: one jitted program of prefill and decoding with a KV cache, for static or continuous batching."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params, pytree
from rlhf_jax.config import SamplingConfig
from rlhf_jax.layers.kv_cache import Cache, empty_cache, grown
from rlhf_jax.masked import at_least_float32
from rlhf_jax.model import MASKED, Transformer
from rlhf_jax.parallel.sharding import constrain, constrain_rows, decoding, decoding_params


class Generation(NamedTuple):
    """Sampled responses of B rows.

    Attributes:
      tokens: [B, R] int32 token ids, padded after a row's end.
      mask: [B, R] bool, True for sampled tokens, the stop token included.
      logp: [B, R] float32, log-probability in nats of each sampled token under the distribution it was drawn from, 0
        where masked.
    """

    tokens: Array
    mask: Array
    logp: Array


def filter_logits(logits_BV: Array, *, temperature: float, top_k: int, top_p: float) -> Array:
    """Log-probabilities [B, V] of the sampling distribution.

    Args:
      logits_BV: logits of any float dtype.
      temperature: divisor of the logits; greater than 0.
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


def draw(logp_BV: Array, uniform_B: Array) -> Array:
    """Draw one token id per row, [B] int32, from log-probabilities [B, V] by inverse transform sampling.

    This needs one number per row, uniform in [0, 1); Gumbel noise for the whole vocabulary would cost a third of the
    sampling time. Ids are grouped into blocks of about √V: the block is drawn first, then the id within it, so that
    cumulative sums run over √V numbers. On a CPU a cumulative sum over V takes as long as all other work of a token.
    """
    rows, vocabulary = logp_BV.shape
    size = 2 ** math.ceil(math.log2(vocabulary) / 2)
    blocks = jnp.pad(jnp.exp(logp_BV), ((0, 0), (0, -vocabulary % size))).reshape(rows, -1, size)
    of_block = jnp.sum(blocks, axis=-1)
    up_to_block = jnp.cumsum(of_block, axis=-1)
    # 1 - u is in (0, 1], so the target is above 0 and is always reached.
    target_B1 = (1.0 - uniform_B)[:, None] * jnp.max(up_to_block, axis=-1, keepdims=True)
    block_B1 = _first_reaching(of_block, up_to_block, target_B1)
    before_B1 = jnp.take_along_axis(up_to_block - of_block, block_B1, axis=1)
    inside = jnp.take_along_axis(blocks, block_B1[:, :, None], axis=1)[:, 0]
    ids_B1 = _first_reaching(inside, jnp.cumsum(inside, axis=-1), target_B1 - before_B1)
    return (block_B1 * size + ids_B1)[:, 0]


def _first_reaching(weights_BN: Array, running_BN: Array, target_B1: Array) -> Array:
    """First index of a positive weight at which the running sum reaches the target, [B, 1] int32; else the last one.

    The last bit of a parallel float32 cumulative sum can change even where the weight is 0, and such an index must
    never be drawn.
    """
    places_1N = jnp.arange(weights_BN.shape[-1], dtype=jnp.int32)[None]
    reached = jnp.where((weights_BN > 0.0) & (running_BN >= target_B1), places_1N, weights_BN.shape[-1])
    last_B1 = jnp.max(jnp.where(weights_BN > 0.0, places_1N, 0), axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(reached, axis=-1, keepdims=True), last_B1)


def uniform_numbers(key: Array, rows: int, length: int) -> Array:
    """Uniform numbers in [0, 1) to draw tokens with, [N, R]; those of a row do not depend on the number of rows."""
    return jax.random.uniform(key, (rows, length), jnp.float32)


def extend(model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, cache: Cache) -> tuple[Array, Cache]:
    """Append tokens to a KV cache: (logits [B, V] after the last of them, new cache)."""
    hidden_BTD, cache = model.apply({"params": params}, tokens_BT, mask_BT, cache=cache, method="hidden")
    logits_BV = model.apply({"params": params}, hidden_BTD[:, -1], method="head")
    # Sampling sums and sorts over the vocabulary, so each device holds it in full for its own rows.
    return constrain_rows(logits_BV), cache


def generate(
    model: Transformer,
    params: Params,
    tokens_BP: Array,
    mask_BP: Array,
    key: Array,
    sampling: SamplingConfig | None = None,
    *,
    uniform_BR: Array | None = None,
    over_B: Array | None = None,
    **settings: Any,
) -> Generation:
    """Sample responses to each prompt; a row ends with its first stop token, the batch with its last row.

    The sample of a row depends on its prompt, its row number and the key, not on the other rows.

    Args:
      model: language-head transformer.
      params: its parameters.
      tokens_BP: prompts, left-padded, int32.
      mask_BP: True for real tokens.
      key: typed random key; the caller must not use it again.
      sampling: sampling settings; or pass its fields as keyword arguments, such as max_new_tokens, stop_ids and pad_id.
      uniform_BR: uniform numbers to draw with, in place of `uniform_numbers` of the key, for rows with other numbers.
      over_B: True for prompts that get no tokens; not with slots.
      **settings: fields of `SamplingConfig`, if sampling is not given.

    Returns:
      Generation of B n rows, with the n responses to a prompt adjacent, and R columns.

    Raises:
      ValueError: if P + R exceeds the context, or for a setting out of range.
    """
    sampler = _Sampler(model, sampling or SamplingConfig(**settings))
    if over_B is not None and sampler.config.slots:
        raise ValueError(f"slots: expected 0 with prompts that get no tokens, got {sampler.config.slots}")
    return _generate(sampler, params, tokens_BP, mask_BP, key, uniform_BR, over_B)


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    sampler: _Sampler,
    params: Params,
    tokens_BP: Array,
    mask_BP: Array,
    key: Array,
    uniform_BR: Array | None,
    over_B: Array | None,
) -> Generation:
    config = sampler.config
    sampler.check(tokens_BP.shape[1])
    params = decoding_params(params, config.decode_parts, sampler.model.config.dtype)
    if uniform_BR is None:
        uniform_BR = uniform_numbers(key, tokens_BP.shape[0] * config.samples, config.max_new_tokens)
    prompts = (constrain(tokens_BP, "batch", "none"), constrain(mask_BP, "batch", "none"))
    with decoding(config.decode_parts):
        if config.slots:
            out = _sample_in_slots(sampler, params, *prompts, uniform_BR)
        else:
            out = _sample_together(sampler, params, *prompts, uniform_BR, over_B)
    return Generation(*(constrain(x, "batch", "none") for x in out))


def stream(
    model: Transformer,
    params: Params,
    tokens_BP: Array,
    mask_BP: Array,
    key: Array,
    sampling: SamplingConfig | None = None,
    **settings: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stream the samples of `generate` token by token, until all rows have ended.

    Compiles two programs, for the prompt and for one more token (of each segment). One response per prompt, no slots.

    Yields:
      (tokens, mask of those that belong to a response), [B] each.
    """
    sampling = sampling or SamplingConfig(**settings)
    sampler = _Sampler(model, sampling)
    sampler.check(tokens_BP.shape[1])
    uniform_BR = uniform_numbers(key, tokens_BP.shape[0], sampling.max_new_tokens)
    alive_B = np.ones(tokens_BP.shape[0], bool)
    cache, token_B, ended_B = _prefill(sampler, params, tokens_BP, mask_BP, uniform_BR[:, 0])
    for index in range(1, sampling.max_new_tokens + 1):
        yield np.asarray(token_B), alive_B
        alive_B = ~np.asarray(ended_B)
        if index == sampling.max_new_tokens or not alive_B.any():
            return
        if index - 1 in sampling.ends:
            following = sampling.ends[sampling.ends.index(index - 1) + 1]
            cache = sampler.grow(cache, tokens_BP.shape[1] + following)
        cache, token_B, ended_B = _decode(sampler, params, cache, token_B, ended_B, uniform_BR[:, index])


class _Sampler(NamedTuple):
    """A model and its sampling settings."""

    model: Transformer
    config: SamplingConfig

    def check(self, prompt_length: int) -> None:
        """Check that prompt and response fit in the context.

        Raises:
          ValueError: if they do not.
        """
        length, context = self.config.max_new_tokens, self.model.config.context
        if prompt_length + length > context:
            raise ValueError(f"prompt of {prompt_length} + {length} new tokens exceeds the context {context}")

    def grow(self, cache: Cache, slots: int) -> Cache:
        """Grow the cache to the given number of slots."""
        return grown(cache, self.model.config, slots, self.config.cache_dtype)

    def repeat_samples(self, logits_BV: Array, cache: Cache) -> tuple[Array, Cache]:
        """Repeat each row n times, copies adjacent."""
        if self.config.samples == 1:
            return logits_BV, cache

        def repeated(x: Array, axis: int) -> Array:
            return jnp.repeat(x, self.config.samples, axis=axis)

        # [(layers,) B, heads, slots, head]
        keys, values = jax.tree.map(lambda x: repeated(x, x.ndim - 4), (cache.keys, cache.values))
        return repeated(logits_BV, 0), Cache(keys, values, repeated(cache.places_BS, 0), cache.filled)

    def next_tokens(self, logits_BV: Array, uniform_B: Array, ended_B: Array) -> tuple[Array, Array, Array]:
        """Sample the next token: (token, log-probability, True if the row has ended), [B] each."""
        if self.config.temperature == 0.0:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            logp_B = jnp.zeros(token_B.shape, jnp.float32)
        else:
            logp_BV = filter_logits(
                logits_BV, temperature=self.config.temperature, top_k=self.config.top_k, top_p=self.config.top_p
            )
            token_B = draw(logp_BV, uniform_B)
            logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(ended_B, self.config.pad_id, token_B)
        stops_V = np.zeros(self.model.config.vocab_size, bool)
        stops_V[[stop for stop in self.config.stop_ids if 0 <= stop < len(stops_V)]] = True
        stopped_B = jnp.asarray(stops_V)[token_B] if stops_V.any() else jnp.zeros(token_B.shape, bool)
        # Drawn on all devices, then resharded as the model expects its rows.
        drawn = (token_B, jnp.where(ended_B, 0.0, logp_B), ended_B | stopped_B)
        token_B, logp_B, ended_B = (constrain(x_B, "batch") for x_B in drawn)
        return token_B, logp_B, ended_B


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    sampler: _Sampler, params: Params, tokens_BP: Array, mask_BP: Array, uniform_B: Array
) -> tuple[Cache, Array, Array]:
    rows, prompt_length = tokens_BP.shape
    cache = empty_cache(sampler.model.config, rows, prompt_length + sampler.config.ends[0], sampler.config.cache_dtype)
    logits_BV, cache = extend(sampler.model, params, tokens_BP, mask_BP, cache)
    token_B, _, ended_B = sampler.next_tokens(logits_BV, uniform_B, jnp.zeros(rows, bool))
    return cache, token_B, ended_B


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    sampler: _Sampler, params: Params, cache: Cache, token_B: Array, ended_B: Array, uniform_B: Array
) -> tuple[Cache, Array, Array]:
    logits_BV, cache = extend(sampler.model, params, token_B[:, None], ~ended_B[:, None], cache)
    token_B, _, ended_B = sampler.next_tokens(logits_BV, uniform_B, ended_B)
    return cache, token_B, ended_B


def _sample_together(
    sampler: _Sampler, params: Params, tokens_BP: Array, mask_BP: Array, uniform_BR: Array, over_B: Array | None
) -> Generation:
    """Sample all rows together, column by column, until the last row has ended."""
    prompts, prompt_length = tokens_BP.shape
    rows = prompts * sampler.config.samples
    cache = empty_cache(
        sampler.model.config, prompts, prompt_length + sampler.config.ends[0], sampler.config.cache_dtype
    )
    logits_BV, cache = sampler.repeat_samples(*extend(sampler.model, params, tokens_BP, mask_BP, cache))
    over_B = jnp.zeros(rows, bool) if over_B is None else jnp.repeat(over_B, sampler.config.samples)
    token_B, logp_B, ended_B = sampler.next_tokens(logits_BV, uniform_BR[:, 0], over_B)
    shape = (rows, sampler.config.max_new_tokens)
    out = Generation(
        jnp.full(shape, sampler.config.pad_id, jnp.int32).at[:, 0].set(token_B),
        jnp.zeros(shape, bool).at[:, 0].set(~over_B),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(logp_B),
    )

    Carry = tuple[Array, Cache, Array, Array, Generation]

    def until(end: int, carry: Carry) -> Array:
        index, _, _, ended_B, _ = carry
        return (index < end) & ~jnp.all(ended_B)

    def step(carry: Carry) -> Carry:
        index, cache, token_B, ended_B, out = carry
        # A row that has ended is fed padding; its results are never read.
        logits_BV, cache = extend(sampler.model, params, token_B[:, None], ~ended_B[:, None], cache)
        alive_B = ~ended_B
        uniform_B = jax.lax.dynamic_index_in_dim(uniform_BR, index, axis=1, keepdims=False)
        token_B, logp_B, ended_B = sampler.next_tokens(logits_BV, uniform_B, ended_B)
        columns = zip(out, (token_B, alive_B, logp_B), strict=True)
        out = Generation(*(jax.lax.dynamic_update_slice_in_dim(a, c[:, None], index, axis=1) for a, c in columns))
        return index + 1, cache, token_B, ended_B, out

    def decoded(segment: int, carry: Carry) -> Generation:
        """Sample the segments from this one on, stopping at the first after which all rows have ended."""
        last = segment == len(sampler.config.ends) - 1
        # A step writes the previous token to the cache, so it can sample one token more than the cache has room for.
        end = sampler.config.max_new_tokens if last else sampler.config.ends[segment] + 1
        carry = jax.lax.while_loop(functools.partial(until, end), step, carry)
        if last:
            return carry[-1]

        def longer(carry: Carry) -> Generation:
            index, cache, token_B, ended_B, out = carry
            cache = sampler.grow(cache, prompt_length + sampler.config.ends[segment + 1])
            return decoded(segment + 1, (index, cache, token_B, ended_B, out))

        return jax.lax.cond(jnp.all(carry[3]), lambda carry: carry[-1], longer, carry)

    return decoded(0, (jnp.ones((), jnp.int32), cache, token_B, ended_B, out))


@pytree
class _Slots:
    """State of continuous batching: S slots for N rows.

    Attributes:
      cache: P columns for the prompt of each slot, then a ring buffer of R columns, which all slots write at the same
        column in each step.
      token_S: newest token.
      ended_S: True if the row has ended.
      row_S: index of the row, N for none.
      count_S: number of tokens sampled so far.
      step: number of columns written to the ring buffer.
      taken: number of rows started.
      tokens_NR: sampled tokens, -1 where there is none yet.
      logp_NR: their log-probabilities in nats.
    """

    cache: Cache
    token_S: Array
    ended_S: Array
    row_S: Array
    count_S: Array
    step: Array
    taken: Array
    tokens_NR: Array
    logp_NR: Array


def _sample_in_slots(
    sampler: _Sampler, params: Params, tokens_MP: Array, mask_MP: Array, uniform_NR: Array
) -> Generation:
    """Sample the same responses as `_sample_together` with continuous batching, S rows at a time."""
    config, prompt_length = sampler.config, tokens_MP.shape[1]
    rows, longest = tokens_MP.shape[0] * config.samples, config.max_new_tokens
    slots = min(config.slots, rows)
    # Prompts are prefilled several at a time: more use the device better, but keep finished slots waiting longer.
    refill = max(slots // 4, 1)

    def uniform(row_S: Array, count_S: Array) -> Array:
        return uniform_NR[jnp.minimum(row_S, rows - 1), jnp.minimum(count_S, longest - 1)]

    def begun(row_S: Array, slots_each: int) -> tuple[Cache, Array, Array, Array]:
        """Prefill prompts: (cache, first token, log-probability, ended); rows past the last one count as ended."""
        real_S = row_S < rows
        # Rows start in order, so all rows of a prompt start together.
        place_M = jnp.minimum(row_S, rows - 1)[:: config.samples] // config.samples
        cache = empty_cache(sampler.model.config, len(place_M), slots_each, config.cache_dtype)
        logits_SV, cache = sampler.repeat_samples(
            *extend(sampler.model, params, tokens_MP[place_M], mask_MP[place_M], cache)
        )
        token_S, logp_S, ended_S = sampler.next_tokens(logits_SV, uniform(row_S, jnp.zeros_like(row_S)), ~real_S)
        return cache, token_S, logp_S, ended_S | (longest == 1)

    def first() -> _Slots:
        row_S = jnp.arange(slots, dtype=jnp.int32)
        cache, token_S, logp_S, ended_S = begun(row_S, prompt_length + longest)
        none = _Slots(
            cache=cache,
            token_S=token_S,
            ended_S=ended_S,
            row_S=row_S,
            count_S=jnp.zeros(slots, jnp.int32),
            step=jnp.zeros((), jnp.int32),
            taken=jnp.asarray(slots, jnp.int32),
            tokens_NR=jnp.full((rows, longest), -1, jnp.int32),
            logp_NR=jnp.zeros((rows, longest), jnp.float32),
        )
        return _recorded(none, (row_S, none.count_S), (token_S, logp_S), count_S=none.count_S + 1)

    def step(state: _Slots) -> _Slots:
        alive_S = ~state.ended_S
        cache = dataclasses.replace(state.cache, filled=prompt_length + state.step % longest)
        logits_SV, cache = extend(sampler.model, params, state.token_S[:, None], alive_S[:, None], cache)
        token_S, logp_S, ended_S = sampler.next_tokens(logits_SV, uniform(state.row_S, state.count_S), state.ended_S)
        row_S, count_S = jnp.where(alive_S, state.row_S, rows), state.count_S + alive_S
        return _recorded(
            state,
            (row_S, state.count_S),
            (token_S, logp_S),
            cache=cache,
            token_S=token_S,
            ended_S=ended_S | (count_S >= longest),
            count_S=count_S,
            step=state.step + 1,
        )

    def refilled(state: _Slots) -> _Slots:
        """Start the next prompts in the first slots whose rows have ended."""
        place_F = jnp.argsort(~state.ended_S, stable=True)[:refill]
        row_F = jnp.minimum(state.taken + jnp.arange(refill, dtype=jnp.int32), rows)
        fresh, token_F, logp_F, ended_F = begun(row_F, prompt_length)
        return _recorded(
            state,
            (row_F, jnp.zeros_like(row_F)),
            (token_F, logp_F),
            cache=_with_prompts(state.cache, fresh, place_F),
            token_S=state.token_S.at[place_F].set(token_F),
            ended_S=state.ended_S.at[place_F].set(ended_F),
            row_S=state.row_S.at[place_F].set(row_F),
            count_S=state.count_S.at[place_F].set(1),
            taken=state.taken + refill,
        )

    def live(state: _Slots) -> Array:
        return jnp.sum(~state.ended_S)

    def until(alive: Array | int, state: _Slots) -> _Slots:
        return jax.lax.while_loop(lambda state: live(state) > alive, step, state)

    # Each size compiles its own loop body, so there are few: a quarter of the slots is kept, then a quarter of those.
    sizes = [slots]
    while sizes[-1] > 16:
        sizes.append(sizes[-1] // 4)
    sizes.append(0)
    state = first()
    if slots < rows:

        def waits(state: _Slots) -> Array:
            return (live(state) <= slots - refill) & (state.taken < rows)

        def on(state: _Slots) -> _Slots:
            state = until(jnp.where(state.taken < rows, slots - refill, sizes[1]), state)
            return jax.lax.while_loop(waits, refilled, state)

        state = jax.lax.while_loop(lambda state: (state.taken < rows) | (live(state) > sizes[1]), on, state)
    else:
        state = until(sizes[1], state)
    for size, fewer in itertools.pairwise(sizes[1:]):
        state = until(fewer, _compact(state, size))
    mask_NR = state.tokens_NR >= 0
    return Generation(jnp.where(mask_NR, state.tokens_NR, config.pad_id), mask_NR, state.logp_NR)


def _recorded(state: _Slots, place: tuple[Array, Array], drawn: tuple[Array, Array], **changes: Any) -> _Slots:
    """The state with other changes, and with (tokens, log-probabilities) at (row, column); past the end: dropped."""
    tokens_NR, logp_NR = (
        old.at[place].set(new, mode="drop") for old, new in zip((state.tokens_NR, state.logp_NR), drawn, strict=True)
    )
    return dataclasses.replace(state, tokens_NR=tokens_NR, logp_NR=logp_NR, **changes)


def _with_prompts(cache: Cache, fresh: Cache, place_F: Array) -> Cache:
    """Put other prompts into some slots: their columns are replaced, and their ring buffer is marked as empty."""
    columns = fresh.places_BS.shape[1]

    def put(old: Array, new: Array) -> Array:
        # [(layers,) S, heads, slots, head]
        lead = (slice(None),) * (old.ndim - 4)
        return old.at[(*lead, place_F, slice(None), slice(0, columns))].set(new)

    ring = ((0, 0), (0, cache.places_BS.shape[1] - columns))
    places = jnp.pad(fresh.places_BS, ring, constant_values=-1)
    keys, values = (
        jax.tree.map(put, old, new) for old, new in ((cache.keys, fresh.keys), (cache.values, fresh.values))
    )
    return Cache(keys, values, cache.places_BS.at[place_F].set(places), cache.filled)


def _compact(state: _Slots, size: int) -> _Slots:
    """Keep `size` slots, all unfinished rows among them."""
    place = jnp.argsort(state.ended_S, stable=True)[:size]

    def rows(buffer: Array) -> Array:
        return jnp.take(buffer, place, axis=buffer.ndim - 4)

    cache = Cache(
        jax.tree.map(rows, state.cache.keys),
        jax.tree.map(rows, state.cache.values),
        state.cache.places_BS[place],
        state.cache.filled,
    )
    return dataclasses.replace(
        state,
        cache=cache,
        token_S=state.token_S[place],
        ended_S=state.ended_S[place],
        row_S=state.row_S[place],
        count_S=state.count_S[place],
    )
