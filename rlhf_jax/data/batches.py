"""In-memory data sets, and batches as a pure function of (seed, step, process).

Nothing here keeps an iterator state: the step of the training state is the position in the data, so a run that resumes,
even with a different number of processes, sees the same rows in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.arrays import PackedRankingBatch, PromptBatch, RankingBatch, TokenBatch
from rlhf_jax.errors import UserError

Batch = TypeVar("Batch", covariant=True)
Indices = NDArray[np.int64]
IGNORED = 0  # the default pad id: padding is defined by masks and segment 0, never by the id


class Rows(Protocol[Batch]):
    """A data set with a length, and batches of given rows."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices, among: Indices | None = None) -> Batch:
        """Returns the rows at `indices`, padded to the bucket that the rows `among` (by default the same) need.

        Every process passes the full global batch as `among`, so that all compile and run the same shape.
        """
        ...

    def row_length(self, indices: Indices) -> int:
        """Padded row length, in tokens, of the batch of the rows at `indices`."""
        ...


def default_buckets(limit: int) -> tuple[int, ...]:
    """Row lengths to pad to: multiples of 16 up to 128, then 1.5 and 2 times a power of two, and `limit` itself last.

    Few enough for a run to compile each, close enough that at most a third of a long row is padding.
    """
    lengths = list(range(16, 129, 16))
    while lengths[-1] < limit:
        lengths += [lengths[-1] * 3 // 2, lengths[-1] * 2]
    return (*(length for length in lengths if length < limit), limit)


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds `length` tokens.

    Raises:
      ValueError: if none does.
    """
    for bucket in sorted(buckets):
        if length <= bucket:
            return bucket
    raise ValueError(f"row length: expected at most {max(buckets)} tokens, the longest bucket, got {length}")


def by_length(lengths: Sequence[int], rows: int) -> list[Indices]:
    """Groups row indices by similar length, `rows` to a group, so that little of a batch is padding."""
    shortest_first = np.argsort(lengths, kind="stable")
    return [shortest_first[start : start + rows] for start in range(0, len(shortest_first), rows)]


@functools.lru_cache(maxsize=8)
def order(rows: int, seed: int, epoch: int) -> Indices:
    """The permutation of 0 … rows - 1 in which an epoch visits the rows."""
    permutation = np.random.default_rng([seed, epoch]).permutation(rows).astype(np.int64)
    permutation.flags.writeable = False  # cached: a change by one caller would reach all others
    return permutation


def global_indices(rows: int, *, batch_size: int, seed: int, step: int) -> Indices:
    """Rows of a step's global batch: place g = step * batch_size + j takes order(rows, seed, g // rows)[g % rows].

    Every row is seen once before any is seen twice, even if a batch crosses the end of an epoch.
    """
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(places, rows)
    return np.array([order(rows, seed, int(e))[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)


def batch_at(
    rows: Rows[Batch],
    *,
    batch_size: int,
    seed: int,
    step: int,
    process: int = 0,
    processes: int = 1,
    places: Callable[[int], Indices] | None = None,
) -> Batch:
    """This process's share, a contiguous block, of the global batch of a step.

    Args:
      batch_size: rows of the global batch, over all processes.
      seed: seed of the row order, 0 or more.
      step: updates done so far.
      places: rows of the global batch -> the places to return instead of a contiguous block; the devices of a process
        may hold other rows (`parallel.row_places`).

    Raises:
      UserError: if there are no rows.
      ValueError: if the batch is not divisible by the number of processes.
    """
    if len(rows) == 0:
        raise UserError("no rows to train on: the data is empty, or every row was dropped; see ledger.json for why")
    if batch_size % processes:
        divisible = max(processes, batch_size - batch_size % processes)
        raise ValueError(f"batch {batch_size} is not divisible by {processes} processes; use --batch {divisible}")
    if not 0 <= process < processes:
        raise ValueError(f"process: expected 0 to {processes - 1}, got {process}")
    everyone = global_indices(len(rows), batch_size=batch_size, seed=seed, step=step)
    if places is not None:
        return rows.batch(everyone[places(batch_size)], among=everyone)
    share = batch_size // processes
    return rows.batch(everyone[process * share : (process + 1) * share], among=everyone)


def new_lengths(rows: Rows[Any], *, batch_size: int, seed: int, first: int, steps: int) -> list[int]:
    """Steps in range(first, steps) at which a padded row length occurs for the first time."""
    if isinstance(rows, TokenRows):
        return [*range(first, steps)[:1]]
    found: dict[int, int] = {}
    for step in range(first, steps):
        found.setdefault(rows.row_length(global_indices(len(rows), batch_size=batch_size, seed=seed, step=step)), step)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of one fixed length, as made by packing: int32 tokens, int32 segment ids, bool loss mask, all [N, T]."""

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {self.tokens.shape, self.segment_ids.shape, self.loss_mask.shape}
        if len(shapes) != 1 or self.tokens.ndim != 2:
            raise ValueError(f"token rows: expected three arrays of one shape [N, T], got {sorted(shapes)}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def targets(self) -> int:
        """Tokens that carry loss."""
        return int(self.loss_mask.sum())

    def row_length(self, indices: Indices) -> int:
        del indices  # one length for all
        return self.tokens.shape[1]

    def batch(self, indices: Indices, among: Indices | None = None) -> TokenBatch:
        del among
        return _token_batch(self.tokens[indices], self.segment_ids[indices], self.loss_mask[indices])


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Rows of different lengths, one segment each, right-padded to the bucket of the longest row of a batch.

    rows: (ids, loss mask) of the same length. limit: maximum row length, usually the model's context.
    buckets: lengths to pad to; default_buckets(limit) if empty. sources: the record of each row, or empty.
    """

    rows: Sequence[tuple[Sequence[int], Sequence[bool]]]
    limit: int
    pad_id: int = IGNORED
    buckets: tuple[int, ...] = ()
    sources: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for number, (ids, mask) in enumerate(self.rows):
            if len(ids) != len(mask) or len(ids) > self.limit:
                raise ValueError(
                    f"row {number}: expected ids and mask of one length, at most {self.limit}, got {len(ids)} and "
                    f"{len(mask)}"
                )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> int:
        """Tokens that carry loss."""
        return sum(sum(mask) for _, mask in self.rows)

    @functools.cached_property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        return np.array([len(ids) for ids, _ in self.rows], np.int64)

    def row_length(self, indices: Indices) -> int:
        return bucket_length(int(self.lengths[indices].max()), self.buckets or default_buckets(self.limit))

    def batch(self, indices: Indices, among: Indices | None = None) -> TokenBatch:
        shape = (len(indices), self.row_length(indices if among is None else among))
        tokens = np.full(shape, self.pad_id, np.int32)
        segment_ids = np.zeros(shape, np.int32)
        loss_mask = np.zeros(shape, np.bool_)
        for place, index in enumerate(indices):
            ids, mask = self.rows[index]
            tokens[place, : len(ids)] = ids
            segment_ids[place, : len(ids)] = 1
            loss_mask[place, : len(ids)] = mask
        return _token_batch(tokens, segment_ids, loss_mask)


def tied_ranks(responses: Sequence[Sequence[int]], ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks in which equal responses are ties: `ranks` itself, or where those differ, ranks 1, 2, … without gaps.

    A response ranked between two equal ones is above and below the same text, so it is tied with them: no order is left
    that the ranking itself contradicts.

    Args:
      responses: token ids of each response; equal ids get equal scores, whatever the model.
    """
    spans: dict[tuple[int, ...], tuple[int, int]] = {}  # lowest and highest rank of equal responses
    for ids, rank in zip(responses, ranks, strict=True):
        low, high = spans.get(tuple(ids), (rank, rank))
        spans[tuple(ids)] = min(low, rank), max(high, rank)
    if all(low == high for low, high in spans.values()):
        return tuple(ranks)
    ends: list[int] = []  # of the ties, best first
    for low, high in sorted(spans.values()):
        if ends and low <= ends[-1]:
            ends[-1] = max(ends[-1], high)
        else:
            ends.append(high)
    return tuple(next(place for place, end in enumerate(ends, start=1) if rank <= end) for rank in ranks)


@dataclasses.dataclass(frozen=True)
class RankingRows:
    """Prompts with K ranked responses each, K ragged. In batches, equal responses are ties (`tied_ranks`).

    rows: (one row of ids per response, one rank per response; 1 is best). The other fields are as in RaggedRows.
    """

    rows: Sequence[tuple[Sequence[Sequence[int]], Sequence[int]]]
    limit: int
    pad_id: int = IGNORED
    buckets: tuple[int, ...] = ()
    sources: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for number, (responses, ranks) in enumerate(self.rows):
            if len(responses) != len(ranks) or len(ranks) < 2 or min(ranks) < 1:
                raise ValueError(
                    f"row {number}: expected 2 or more responses with ranks from 1 up, got {len(responses)} with ranks "
                    f"{list(ranks)}"
                )
            if not all(0 < len(ids) <= self.limit for ids in responses):
                raise ValueError(
                    f"row {number}: expected lengths 1 to {self.limit}, got {[len(ids) for ids in responses]}"
                )

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def responses(self) -> int:
        """K: the most responses that a prompt of this data set has."""
        return max(len(ranks) for _, ranks in self.rows)

    @functools.cached_property
    def ranks(self) -> list[tuple[int, ...]]:
        """Ranks of each prompt's responses, equal responses tied."""
        return [tied_ranks(responses, ranks) for responses, ranks in self.rows]

    @property
    def ordered(self) -> int:
        """Prompts with an ordered pair: the independent observations, as the pairs of a ranking are not."""
        return sum(len(set(ranks)) > 1 for ranks in self.ranks)

    @functools.cached_property
    def padded_ranks(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ranks, True where a response exists), both [N, K]."""
        ranks, exists = np.zeros((len(self), self.responses), np.int32), np.zeros((len(self), self.responses), np.bool_)
        for place, own in enumerate(self.ranks):
            ranks[place, : len(own)], exists[place, : len(own)] = own, True
        return ranks, exists

    @functools.cached_property
    def lengths(self) -> Indices:
        """Tokens of each prompt's longest response, the prompt included."""
        return np.array([max(map(len, responses)) for responses, _ in self.rows], np.int64)

    def row_length(self, indices: Indices) -> int:
        return bucket_length(int(self.lengths[indices].max()), self.buckets or default_buckets(self.limit))

    def batch(self, indices: Indices, among: Indices | None = None) -> RankingBatch:
        shape = (len(indices), self.responses, self.row_length(indices if among is None else among))
        tokens = np.full(shape, self.pad_id, np.int32)
        mask = np.zeros(shape, np.bool_)
        for place, index in enumerate(indices):
            for k, ids in enumerate(self.rows[index][0]):
                tokens[place, k, : len(ids)] = ids
                mask[place, k, : len(ids)] = True
        arrays: list[Any] = [tokens, mask, *(x[indices] for x in self.padded_ranks)]
        return RankingBatch(*arrays)


@dataclasses.dataclass(frozen=True)
class PackedRankingRows:
    """The same prompts as a `PackedRankingBatch`: `pack` after one another in a row, each one's common prefix once.

    A batch is of a number of prompts that `pack` divides.
    """

    rankings: RankingRows
    pack: int = 1

    def __len__(self) -> int:
        return len(self.rankings)

    @property
    def responses(self) -> int:
        """K: the most responses that a prompt of this data set has."""
        return self.rankings.responses

    @functools.cached_property
    def common(self) -> list[int]:
        """Length of the common prefix of the responses to each prompt, in tokens, the prompt included."""
        return [_common(responses) for responses, _ in self.rankings.rows]

    @functools.cached_property
    def lengths(self) -> Indices:
        """Tokens of each prompt with its responses."""
        rows = zip(self.rankings.rows, self.common, strict=True)
        found = [common + sum(len(ids) - common for ids in responses) for (responses, _), common in rows]
        return np.array(found, np.int64)

    def row_length(self, indices: Indices) -> int:
        longest = int(self.lengths[indices].reshape(-1, self.pack).sum(axis=1).max())
        most, buckets = int(self.lengths.max()), self.rankings.buckets
        if self.pack > 1 and longest > max(buckets, default=0):
            # The sum of several lengths varies little: steps of an eighth waste less and are still few.
            step = max(16, 1 << (longest - 1).bit_length() >> 4)
            return -(-longest // step) * step
        if most > max(buckets, default=0):
            buckets = (*buckets, *default_buckets(most))
        return bucket_length(longest, buckets)

    def batch(self, indices: Indices, among: Indices | None = None) -> PackedRankingBatch:
        rows, length = len(indices) // self.pack, self.row_length(indices if among is None else among)
        tokens = np.full((rows, length), self.rankings.pad_id, np.int32)
        segment_ids = np.zeros(tokens.shape, np.int32)
        at = np.zeros((rows, self.pack, self.responses), np.int32)
        ranks, exists = (x[indices].reshape(at.shape) for x in self.rankings.padded_ranks)
        for row, members in enumerate(indices.reshape(rows, self.pack)):
            used = 0
            for place, index in enumerate(members):
                responses = self.rankings.rows[index][0]
                start, common, prefix = used, self.common[index], place * (self.responses + 1) + 1
                used += common
                tokens[row, start:used], segment_ids[row, start:used] = responses[0][:common], prefix
                for k, ids in enumerate(responses):
                    own = ids[common:]
                    tokens[row, used : used + len(own)] = own
                    segment_ids[row, used : used + len(own)] = prefix + 1 + k
                    used += len(own)
                    # A response that is a prefix of the others ends within the common part.
                    at[row, place, k] = used - 1 if len(own) else start + len(ids) - 1
        arrays: list[Any] = [tokens, segment_ids, at, ranks, exists]
        return PackedRankingBatch(*arrays)


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Prompts, left-padded to one width. sources: the record of each row, or empty."""

    rows: Sequence[Sequence[int]]
    width: int
    pad_id: int = IGNORED
    sources: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for number, ids in enumerate(self.rows):
            if not 0 < len(ids) <= self.width:
                raise ValueError(f"prompt {number}: expected 1 to {self.width} ids, got {len(ids)}")

    def __len__(self) -> int:
        return len(self.rows)

    def row_length(self, indices: Indices) -> int:
        del indices  # one width for all
        return self.width

    def batch(self, indices: Indices, among: Indices | None = None) -> PromptBatch:
        del among
        tokens = np.full((len(indices), self.width), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, np.bool_)
        for place, index in enumerate(indices):
            ids = self.rows[index]
            tokens[place, self.width - len(ids) :] = ids
            mask[place, self.width - len(ids) :] = True
        arrays: list[Any] = [tokens, mask]
        return PromptBatch(*arrays)


def _common(rows: Sequence[Sequence[int]]) -> int:
    columns = zip(*rows, strict=False)  # zip stops at the shortest row
    return next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, rows)))


def _token_batch(tokens: Any, segment_ids: Any, loss_mask: Any) -> TokenBatch:
    # NumPy arrays despite the type jax.Array: the batch is transferred to the device when the step is called.
    return TokenBatch(tokens, segment_ids, loss_mask)
