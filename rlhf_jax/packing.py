"""Rows of episodes: padded, with one episode per row, or packed, so that padding is not computed.

Episodes are packed inside the compiled program. The number of packed rows is a traced value, so later computations loop
over the rows in use (`over_rows`, optim.summed_gradients): one compilation, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, pytree


@pytree
class Places:
    """Location of each of B episodes in packed rows.

    Attributes:
      row_B: row of the episode.
      column_B: its first column in the row.
      response_B: index of its first response token among the R that a row has room for.
      segment_B: segment id, from 1, ascending along a row.
      rows: scalar, number of rows in use, which come first.
    """

    row_B: Array
    column_B: Array
    response_B: Array
    segment_B: Array
    rows: Array


@pytree
class EpisodeRows:
    """Rows of episodes, one segment per episode; a padded row is a packed row with a single episode.

    Attributes:
      tokens_BT: int32 token ids.
      segment_ids_BT: int32, 0 for padding.
      at_BR: column before each response token, whose hidden state predicts the token and gives its value; None if the
        responses are the last R columns.
      targets_BR: response tokens.
      response_mask_BR: True for real response tokens.
      data: pytree of further arrays [B, R], one entry per response token.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    at_BR: Array | None
    targets_BR: Array
    response_mask_BR: Array
    data: Any


def padded_episodes(tokens_BT: Array, mask_BT: Array, response_mask_BR: Array, data: Any) -> EpisodeRows:
    """Lay out one episode per row: a prompt of P columns, left-padded, then a response of R columns, right-padded."""
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
    """Apply a function of rows to episodes, padded or packed.

    Args:
      function: maps rows of episodes to a pytree of arrays [rows, R].
      tokens_BT: prompts of P columns, left-padded, then responses of R columns, right-padded.
      mask_BT: True for real tokens.
      response_mask_BR: True for real response tokens.
      pack: number of packed rows computed at a time; 0 pads each episode.
      parts: with pack 0, number of equal parts of the episodes, computed one after the other.

    Returns:
      The pytree with arrays [B, R], one row per episode, 0 where masked.
    """
    if pack:
        rows, places = pack_episodes(tokens_BT, mask_BT, response_mask_BR, None)
        found = over_rows(function, rows, places.rows, pack)
        return jax.tree.map(lambda x_BR: unpack(x_BR, places, response_mask_BR), found)
    found = by_parts(function, padded_episodes(tokens_BT, mask_BT, response_mask_BR, None), parts)
    return jax.tree.map(lambda x_BR: jnp.where(response_mask_BR, x_BR, 0), found)


def find_places(length_B: Array, response_B: Array, *, row_length: int, most_responses: int) -> Places:
    """Assign episodes to rows by first-fit decreasing: longest first, each to the first row that has room for it.

    Args:
      length_B: number of tokens of each episode, at most row_length.
      response_B: number of response tokens of each episode, at most most_responses.
      row_length: tokens that a row has room for.
      most_responses: response tokens that a row has room for.
    """
    order_B = jnp.argsort(-length_B, stable=True)
    empty_B = jnp.zeros(length_B.shape, jnp.int32)

    def put(used: tuple[Array, Array], episode: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        used_B, placed_B = used
        length, responses = length_B[episode], response_B[episode]
        # With B rows for B episodes, an empty row is always left.
        row = jnp.argmax((used_B + length <= row_length) & (placed_B + responses <= most_responses)).astype(jnp.int32)
        place = (row, used_B[row], placed_B[row])
        return (used_B.at[row].add(length), placed_B.at[row].add(responses)), place

    (used_B, _), places = jax.lax.scan(put, (empty_B, empty_B), order_B)
    row_B, column_B, first_B = (empty_B.at[order_B].set(place) for place in places)
    segment_B = empty_B.at[order_B].set(jnp.arange(1, len(order_B) + 1, dtype=jnp.int32))
    return Places(row_B, column_B, first_B, segment_B, jnp.sum(used_B > 0, dtype=jnp.int32))


def pack_episodes(tokens_BT: Array, mask_BT: Array, response_mask_BR: Array, data: Any) -> tuple[EpisodeRows, Places]:
    """Pack episodes into rows of T columns; an episode is a left-padded prompt, then a right-padded response [R]."""
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
    """Map an array of packed response tokens back to the episodes, [B, R], 0 where masked."""
    place_BR = _response_places(places, response_mask_BR)
    return jnp.where(response_mask_BR, packed_BR.ravel().at[place_BR].get(mode="fill", fill_value=0), 0)


def _response_places(places: Places, response_mask_BR: Array) -> Array:
    rows, responses = response_mask_BR.shape
    # A count, not the column: the tokens of observations are between those of several turns.
    number_BR = jnp.cumsum(response_mask_BR, axis=1, dtype=jnp.int32) - 1
    place_BR = (places.row_B * responses + places.response_B)[:, None] + number_BR
    return jnp.where(response_mask_BR, place_BR, rows * responses)


def take_rows(tree: Any, first: Array, size: int) -> Any:
    """Take rows first … first + size - 1 of every array in a tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), tree)


def by_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Compute a row-wise function of a batch in `parts` equal parts, one after the other.

    A part takes every parts-th row, so that rows sharded over devices stay on their device.
    """
    if parts == 1:
        return function(batch)
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)
    found = jax.lax.map(function, split)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def over_rows(function: Callable[[Any], Any], batch: Any, rows: Array, size: int) -> Any:
    """Apply a row-wise function to the first `rows` rows of a batch, `size` rows at a time; other rows give 0.

    Args:
      function: maps `size` rows of the batch to a pytree of arrays with `size` rows.
      batch: pytree of arrays with a leading row axis.
      rows: int32 scalar, may be a traced value.
      size: divisor of the number of rows in the batch.
    """
    total = jax.tree.leaves(batch)[0].shape[0]
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[:size], batch))
    empty = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)

    def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        first, out = carry
        part = function(take_rows(batch, first, size))
        out = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=0), out, part)
        return first + size, out

    return jax.lax.while_loop(lambda carry: carry[0] < rows, step, (jnp.zeros((), jnp.int32), empty))[1]
