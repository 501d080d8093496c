"""Rows of episodes: one episode a row, padded, or several end to end so that their padding is not computed.

Episodes are packed inside the compiled program. How many rows that takes is a value of the program, so what follows is
a loop over the rows in use (`over_rows`, optim.summed_gradients): one compilation, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, pytree


@pytree
class Places:
    """Where each of B episodes lies.

    row_B: its row. column_B: its first column there. response_B: the place of its first response token among the R that
      a row has room for. segment_B: from 1, rising along a row.
    rows: scalar, rows in use; they come first.
    """

    row_B: Array
    column_B: Array
    response_B: Array
    segment_B: Array
    rows: Array


@pytree
class EpisodeRows:
    """Rows of episodes, each a segment of its own; a padded row is a packed one with a single episode.

    tokens_BT: int32. segment_ids_BT: int32, 0 for padding.
    at_BR: the column before each response token, whose hidden state predicts it and is the state of its value; None
      where the responses are the last R columns.
    targets_BR: the response tokens. response_mask_BR: those that are real.
    data: whatever else belongs to each response token, a pytree of [B, R].
    """

    tokens_BT: Array
    segment_ids_BT: Array
    at_BR: Array | None
    targets_BR: Array
    response_mask_BR: Array
    data: Any


def padded_episodes(tokens_BT: Array, mask_BT: Array, response_mask_BR: Array, data: Any) -> EpisodeRows:
    """Rows of one episode each: a prompt of P columns, left-padded, then a response of R, right-padded."""
    responses = response_mask_BR.shape[1]
    return EpisodeRows(tokens_BT, mask_BT.astype(jnp.int32), None, tokens_BT[:, -responses:], response_mask_BR, data)


def map_episodes(
    function: Callable[[EpisodeRows], Any],
    tokens_BT: Array,
    mask_BT: Array,
    response_mask_BR: Array,
    *,
    pack: int,
    parts: int,
) -> Any:
    """function(rows) -> a pytree of [rows, R], as [B, R] of the episodes, 0 where masked.

    Args:
      tokens_BT: prompts of P columns, left-padded, then responses of R, right-padded.
      pack: rows at a time of episodes laid end to end; 0 pads each episode.
      parts: with pack 0, equal parts of the episodes, computed one after the other.
    """
    if pack:
        rows, places = pack_episodes(tokens_BT, mask_BT, response_mask_BR, None)
        found = over_rows(function, rows, places.rows, pack)
        return jax.tree.map(lambda x_BR: unpack(x_BR, places, response_mask_BR), found)
    found = by_parts(function, padded_episodes(tokens_BT, mask_BT, response_mask_BR, None), parts)
    return jax.tree.map(lambda x_BR: jnp.where(response_mask_BR, x_BR, 0), found)


def find_places(length_B: Array, response_B: Array, *, row_length: int, most_responses: int) -> Places:
    """First-fit decreasing: the longest episode first, each into the first row that has room for it.

    Args:
      length_B: tokens of each episode, at most row_length. response_B: response tokens of it, at most most_responses.
    """
    order_B = jnp.argsort(-length_B, stable=True)
    empty_B = jnp.zeros(length_B.shape, jnp.int32)

    def put(used: tuple[Array, Array], episode: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        used_B, said_B = used
        length, said = length_B[episode], response_B[episode]
        # B rows for B episodes: there is always one left.
        row = jnp.argmax((used_B + length <= row_length) & (said_B + said <= most_responses)).astype(jnp.int32)
        place = (row, used_B[row], said_B[row])
        return (used_B.at[row].add(length), said_B.at[row].add(said)), place

    (used_B, _), places = jax.lax.scan(put, (empty_B, empty_B), order_B)
    row_B, column_B, first_B = (empty_B.at[order_B].set(place) for place in places)
    segment_B = empty_B.at[order_B].set(jnp.arange(1, len(order_B) + 1, dtype=jnp.int32))
    return Places(row_B, column_B, first_B, segment_B, jnp.sum(used_B > 0, dtype=jnp.int32))


def pack_episodes(tokens_BT: Array, mask_BT: Array, response_mask_BR: Array, data: Any) -> tuple[EpisodeRows, Places]:
    """Rows of T columns from episodes: prompts of P columns, left-padded, then responses of R, right-padded."""
    rows, width = tokens_BT.shape
    responses = response_mask_BR.shape[1]
    places = find_places(
        jnp.sum(mask_BT, axis=1, dtype=jnp.int32),
        jnp.sum(response_mask_BR, axis=1, dtype=jnp.int32),
        row_length=width,
        most_responses=responses,
    )
    seen_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1
    column_BT = places.column_B[:, None] + seen_BT
    flat_BT = jnp.where(mask_BT, places.row_B[:, None] * width + column_BT, rows * width)  # past the end: dropped
    place_BR = _response_places(places, response_mask_BR)

    def scattered(x: Array, place: Array, columns: int) -> Array:
        return jnp.zeros(rows * columns, x.dtype).at[place].set(x, mode="drop").reshape(rows, columns)

    segment_BT = jnp.broadcast_to(places.segment_B[:, None], tokens_BT.shape)
    tokens_BR = tokens_BT[:, -responses:]
    packed = EpisodeRows(
        tokens_BT=scattered(tokens_BT, flat_BT, width),
        segment_ids_BT=scattered(segment_BT, flat_BT, width),
        at_BR=scattered(column_BT[:, -responses:] - 1, place_BR, responses),
        targets_BR=scattered(tokens_BR, place_BR, responses),
        response_mask_BR=scattered(response_mask_BR, place_BR, responses),
        data=jax.tree.map(lambda x: scattered(x, place_BR, responses), data),
    )
    return packed, places


def unpack(packed_BR: Array, places: Places, response_mask_BR: Array) -> Array:
    """What a row's response tokens hold, back where the episodes have them, 0 where masked, [B, R]."""
    place_BR = _response_places(places, response_mask_BR)
    return jnp.where(response_mask_BR, packed_BR.ravel().at[place_BR].get(mode="fill", fill_value=0), 0)


def _response_places(places: Places, response_mask_BR: Array) -> Array:
    rows, responses = response_mask_BR.shape
    place_BR = (places.row_B * responses + places.response_B)[:, None] + jnp.arange(responses, dtype=jnp.int32)[None]
    return jnp.where(response_mask_BR, place_BR, rows * responses)


def take_rows(tree: Any, first: Array, size: int) -> Any:
    """Rows first … first + size - 1 of every array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), tree)


def by_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """function(batch), row by row the same, computed for `parts` equal parts of its rows one after the other.

    A part takes every parts-th row, so that rows spread over devices stay where they are.
    """
    if parts == 1:
        return function(batch)
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)
    found = jax.lax.map(function, split)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def over_rows(function: Callable[[Any], Any], batch: Any, rows: Array, size: int) -> Any:
    """function(`size` rows of the batch) -> arrays of `size` rows, for the first `rows` of it; 0 in the others.

    The number of rows is a value of the program. `size` divides the rows of the batch.
    """
    whole = jax.tree.leaves(batch)[0].shape[0]
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[:size], batch))
    empty = jax.tree.map(lambda s: jnp.zeros((whole, *s.shape[1:]), s.dtype), shapes)

    def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        first, out = carry
        part = function(take_rows(batch, first, size))
        out = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=0), out, part)
        return first + size, out

    return jax.lax.while_loop(lambda carry: carry[0] < rows, step, (jnp.zeros((), jnp.int32), empty))[1]
