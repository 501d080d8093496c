"""Pretraining documents laid end to end in rows of one length, without one attending to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.data.batches import IGNORED, TokenRows


def pack_text(
    docs: Iterable[Sequence[int]], *, length: int, start_ids: Sequence[int], eos_id: int, pad_id: int = IGNORED
) -> TokenRows:
    """Packs documents, each as bos … eos, into rows of `length` tokens; every token but a document's first is a target.

    Each document is a segment of its own (1, 2, … in a row; 0 is padding). One that reaches the end of a row goes on in
    the next; the last token there stands again as the first here, since the first token of a segment is no target.
    A row is padded only at its end: the last row, and a last place where a document could show no target.

    Args:
      docs: token ids without special ids.
      length: tokens of a row, at least 2.
      start_ids: what every document begins with: bos, or nothing for a model that knows none.
    """
    if length < 2:
        raise ValueError(f"rows of {length} tokens hold no target; wanted length 2 or more")
    tokens: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    used, segment = length, 0  # of the row being filled; no row yet counts as a full one
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
