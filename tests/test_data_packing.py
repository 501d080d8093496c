"""Packing keeps every token, makes each a target once, and keeps documents apart."""

import numpy as np
import pytest

from rlhf_jax.data.batches import RaggedRows
from rlhf_jax.data.packing import pack_rows, pack_text
from tests.cases import case

pytestmark = pytest.mark.core

BOS, EOS, PAD = 100, 101, 102


def test_documents_by_hand() -> None:
    rows = pack_text([[1, 2], [3, 4, 5], []], length=6, start_ids=[BOS], eos_id=EOS, pad_id=PAD)
    # The second document has room for bos and 3; 3 stands again where it goes on.
    assert rows.tokens.tolist() == [[BOS, 1, 2, EOS, BOS, 3], [3, 4, 5, EOS, BOS, EOS]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2]]
    assert rows.loss_mask.tolist() == [[False, True, True, True, False, True], [False, True, True, True, False, True]]


def test_a_last_place_that_could_show_no_target_is_padding() -> None:
    rows = pack_text([[1, 2], [3]], length=5, start_ids=[BOS], eos_id=EOS, pad_id=PAD)
    assert rows.tokens.tolist() == [[BOS, 1, 2, EOS, PAD], [BOS, 3, EOS, PAD, PAD]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert rows.loss_mask.tolist() == [[False, True, True, True, False], [False, True, True, False, False]]


def test_each_token_is_a_target_once_and_follows_its_document() -> None:
    for length in [2, 3, 7, 64]:
        with case(length):
            rng = np.random.default_rng(0)
            docs = [rng.integers(0, 100, size).tolist() for size in rng.integers(0, 40, 30)]
            rows = pack_text(docs, length=length, start_ids=[BOS], eos_id=EOS, pad_id=PAD)
            expected = [pair for doc in docs for pair in zip([BOS, *doc], [*doc, EOS])]  # (token, target) in order
            found = [
                (int(tokens[t - 1]), int(tokens[t]))
                for tokens, mask in zip(rows.tokens, rows.loss_mask)
                for t in range(1, length)
                if mask[t]
            ]
            assert found == expected and rows.targets == len(expected)
            assert not rows.loss_mask[:, 0].any()
            assert ((rows.segment_ids == 0) == (rows.tokens == PAD)).all()


def test_no_documents_and_no_room() -> None:
    assert len(pack_text([], length=8, start_ids=[BOS], eos_id=EOS)) == 0
    with pytest.raises(ValueError, match=r"length: expected at least 2, .* got 1"):
        pack_text([[1]], length=1, start_ids=[BOS], eos_id=EOS)


def row(*ids: int) -> tuple[list[int], list[bool]]:
    """The last token is a target."""
    return list(ids), [False] * (len(ids) - 1) + [True]


def test_best_fit_by_hand() -> None:
    # The longest first: 4 4 fits behind 1 2 3 only; 10 fits behind either, and takes the row that was full first.
    rows = RaggedRows([row(1, 2, 3), row(5, 6, 7, 8, 9), row(4, 4), row(10)], 6, PAD)
    packed = pack_rows(rows, length=6)
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 4, PAD]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2], [1, 1, 1, 2, 2, 0]]
    # A row of one token has nothing to be predicted from.
    assert packed.loss_mask.tolist() == [[False] * 4 + [True, False], [False, False, True, False, True, False]]
    with pytest.raises(ValueError, match="row 1: expected at most 4 tokens, got 5"):
        pack_rows(rows, length=4)


def test_packed_rows_hold_every_row_once_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    rows = [row(*rng.integers(0, 99, size).tolist()) for size in rng.integers(2, 20, 300)]
    packed = pack_rows(RaggedRows(rows, 32, PAD), length=32)
    found = []
    for tokens, segments, mask in zip(packed.tokens, packed.segment_ids, packed.loss_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            found.append((tokens[at].tolist(), mask[at].tolist()))
    assert sorted(found) == sorted(rows)
    assert np.mean(packed.segment_ids > 0) > 0.98
