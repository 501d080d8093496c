"""Batches are a pure function of (seed, step, process), padded as they say."""

import math

import numpy as np
import pytest

from rlhf_jax.data.batches import (
    PromptRows,
    RaggedRows,
    RankingRows,
    TokenRows,
    batch_at,
    bucket_length,
    default_buckets,
    global_indices,
)
from rlhf_jax.errors import UserError
from tests.cases import case

pytestmark = pytest.mark.core


def numbered_rows(count: int) -> TokenRows:
    """Row i is [i, i]."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], 2, axis=1)
    return TokenRows(tokens, np.ones_like(tokens), np.array([[False, True]] * count))


def test_every_row_once_an_epoch_across_batch_boundaries() -> None:
    rows = numbered_rows(7)
    seen = [int(i) for s in range(7) for i in batch_at(rows, batch_size=3, seed=0, step=s).tokens_BT[:, 0]]
    epochs = [seen[:7], seen[7:14], seen[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(7))


def test_an_epoch_leaves_no_row_out() -> None:
    # The last batch of an epoch is filled up with rows of the next, which go on from there.
    for rows, batch in ((63, 32), (64, 32), (65, 32), (5, 32), (1, 4), (7, 3)):
        with case((rows, batch)):
            steps = math.ceil(rows / batch)
            assert (steps - 1) * batch < rows <= steps * batch
            drawn = [global_indices(rows, batch_size=batch, seed=1, step=step) for step in range(3 * steps)]
            stream = np.concatenate(drawn).tolist()
            assert set(stream[: steps * batch]) == set(range(rows))
            epochs = [stream[at : at + rows] for at in range(0, len(stream) - rows + 1, rows)]
            assert len(epochs) >= 3 and all(sorted(epoch) == list(range(rows)) for epoch in epochs)


def test_batches_depend_on_seed_and_step_alone() -> None:
    one = global_indices(100, batch_size=8, seed=3, step=50)
    assert global_indices(100, batch_size=8, seed=3, step=50).tolist() == one.tolist()
    assert global_indices(100, batch_size=8, seed=4, step=50).tolist() != one.tolist()
    # The same place in the data, whatever the batch size: 50 batches of 8 are 100 of 4.
    assert global_indices(100, batch_size=4, seed=3, step=100).tolist() == one[:4].tolist()


def test_processes_share_a_batch_and_its_bucket() -> None:
    lengths = [3, 40, 5, 6, 70, 8, 9, 10]
    rows = RaggedRows([([i] * n, [True] * n) for i, n in enumerate(lengths)], limit=128)
    whole = batch_at(rows, batch_size=8, seed=1, step=0)
    shares = [batch_at(rows, batch_size=8, seed=1, step=0, process=p, processes=4) for p in range(4)]
    assert whole.tokens_BT.shape == (8, 80) and all(share.tokens_BT.shape == (2, 80) for share in shares)
    np.testing.assert_array_equal(np.concatenate([share.tokens_BT for share in shares]), whole.tokens_BT)


def test_no_rows_and_uneven_shares_are_named() -> None:
    with pytest.raises(UserError, match="no rows to train on"):
        batch_at(RaggedRows([], limit=8), batch_size=4, seed=0, step=0)
    with pytest.raises(ValueError, match="batch 10 is not divisible by 4 processes; use --batch 8"):
        batch_at(numbered_rows(9), batch_size=10, seed=0, step=0, processes=4)
    with pytest.raises(ValueError, match="process: expected 0 to 3, got 4"):
        batch_at(numbered_rows(9), batch_size=8, seed=0, step=0, process=4, processes=4)


def test_buckets() -> None:
    assert default_buckets(600) == (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512, 600)
    assert default_buckets(64) == (16, 32, 48, 64)
    assert default_buckets(10) == (10,)
    assert [bucket_length(n, default_buckets(600)) for n in (1, 16, 17, 129, 513, 600)] == [16, 16, 32, 192, 600, 600]
    with pytest.raises(ValueError, match="row length: expected at most 600 tokens, the longest bucket, got 601"):
        bucket_length(601, default_buckets(600))


def test_ragged_rows() -> None:
    rows = RaggedRows([([5, 6, 7], [False, True, True]), ([8], [False])], limit=6, pad_id=9)
    batch = rows.batch(np.array([1, 0]))
    assert batch.tokens_BT.tolist() == [[8, 9, 9, 9, 9, 9], [5, 6, 7, 9, 9, 9]]
    assert batch.segment_ids_BT.tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask_BT.tolist() == [[False] * 6, [False, True, True, False, False, False]]
    assert [a.dtype.name for a in vars(batch).values()] == ["int32", "int32", "bool"]
    assert rows.targets == 2
    with pytest.raises(ValueError, match="row 0: expected ids and mask of one length, at most 6, got 7"):
        RaggedRows([([1] * 7, [True] * 7)], limit=6)


def test_ranking_rows() -> None:
    rows = RankingRows([([[1, 2], [3]], (2, 1)), ([[4], [5, 6, 7], [8]], (1, 2, 2))], limit=4, pad_id=9)
    batch = rows.batch(np.array([0, 1]))
    assert batch.tokens_BKT.tolist() == [
        [[1, 2, 9, 9], [3, 9, 9, 9], [9, 9, 9, 9]],
        [[4, 9, 9, 9], [5, 6, 7, 9], [8, 9, 9, 9]],
    ]
    assert batch.mask_BKT.sum(-1).tolist() == [[2, 1, 0], [1, 3, 1]]
    assert batch.mask_BKT[1, 1].tolist() == [True, True, True, False]
    assert batch.ranks_BK.tolist() == [[2, 1, 0], [1, 2, 2]]
    assert batch.mask_BK.tolist() == [[True, True, False], [True, True, True]]
    # K belongs to the data set, so that a batch of pairs has the shape of any other.
    assert rows.batch(np.array([0])).tokens_BKT.shape == (1, 3, 4)
    with pytest.raises(ValueError, match="expected 2 or more"):
        RankingRows([([[1]], (1,))], limit=4)


def test_prompts_are_left_padded_to_one_width() -> None:
    rows = PromptRows([[1], [2, 3, 4]], width=4, pad_id=9)
    batch = rows.batch(np.array([0, 1, 0]))
    assert batch.tokens_BP.tolist() == [[9, 9, 9, 1], [9, 2, 3, 4], [9, 9, 9, 1]]
    assert batch.mask_BP.tolist() == [
        [False, False, False, True],
        [False, True, True, True],
        [False, False, False, True],
    ]
    with pytest.raises(ValueError, match="prompt 0: expected 1 to 4 ids, got 5"):
        PromptRows([[1] * 5], width=4)
