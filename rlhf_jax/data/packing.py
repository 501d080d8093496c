"""Packing of documents and demonstrations into rows of one length, with block-diagonal attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.data.batches import IGNORED, RaggedRows, TokenRows


def pack_text(
    docs: Iterable[Sequence[int]], *, length: int, start_ids: Sequence[int], eos_id: int, pad_id: int = IGNORED
) -> TokenRows:
    """Packs documents, each as bos … eos, into rows of `length` tokens; every token but a document's first is a target.

    Each document is a separate segment (1, 2, … in a row; 0 is padding). One that reaches the end of a row continues in
    the next, which repeats the last token as its first, since the first token of a segment is not a target. Only the
    end of a row is padded: in the last row, and in a single last position, where no target would fit.

    Args:
      docs: token ids without special ids.
      length: tokens per row, at least 2.
      start_ids: ids at the start of every document: bos, or empty for a model without one.
      eos_id: id at the end of every document.

    Raises:
      ValueError: if length is less than 2.
    """
    if length < 2:
        raise ValueError(f"length: expected at least 2, as the first token is not a target, got {length}")
    tokens: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    used, segment = length, 0  # tokens and segments in the current row; starts as if a full row came before
    for doc in docs:
        ids = np.array([*start_ids, *doc, eos_id], np.int32)
        start = 0
        while start < len(ids) - 1:
            if length - used < 2:
                tokens.append(np.full(length, pad_id, np.int32))
                segments.append(np.zeros(length, np.int32))
                used, segment = 0, 0
            part = ids[start : start + length - used]
            segment += 1
            tokens[-1][used : used + len(part)] = part
            segments[-1][used : used + len(part)] = segment
            used += len(part)
            start += len(part) - 1
    shape = (len(tokens), length)
    tokens_NT = np.stack(tokens) if tokens else np.zeros(shape, np.int32)
    segment_ids_NT = np.stack(segments) if segments else np.zeros(shape, np.int32)
    loss_mask_NT = np.zeros(shape, np.bool_)
    loss_mask_NT[:, 1:] = (segment_ids_NT[:, 1:] == segment_ids_NT[:, :-1]) & (segment_ids_NT[:, 1:] > 0)
    return TokenRows(tokens_NT, segment_ids_NT, loss_mask_NT)


def pack_rows(rows: RaggedRows, *, length: int) -> TokenRows:
    """Packs whole rows into rows of `length` tokens, each a separate segment: best fit, longest first.

    Nothing is cut; rows of equal length keep the order of the data.

    Raises:
      ValueError: for a row longer than `length`.
    """
    room: list[list[int]] = [[] for _ in range(length + 1)]  # by tokens left: the rows with that many
    packed: list[list[int]] = []
    order = sorted(range(len(rows)), key=lambda i: -len(rows.rows[i][0]))
    for index in order:
        size = len(rows.rows[index][0])
        if size > length:
            raise ValueError(f"row {index}: expected at most {length} tokens, got {size}")
        left = next((left for left in range(size, length + 1) if room[left]), None)
        if left is None:
            packed.append([])
            left, place = length, len(packed) - 1
        else:
            place = room[left].pop(0)
        packed[place].append(index)
        room[left - size].append(place)
    tokens = np.full((len(packed), length), rows.pad_id, np.int32)
    segment_ids = np.zeros(tokens.shape, np.int32)
    loss_mask = np.zeros(tokens.shape, np.bool_)
    for place, members in enumerate(packed):
        used = 0
        for segment, index in enumerate(members, start=1):
            ids, mask = rows.rows[index]
            part = slice(used, used + len(ids))
            tokens[place, part], segment_ids[place, part], loss_mask[place, part] = ids, segment, mask
            # The first token of a segment has no preceding token to be predicted from.
            loss_mask[place, used] = False
            used += len(ids)
    return TokenRows(tokens, segment_ids, loss_mask)
