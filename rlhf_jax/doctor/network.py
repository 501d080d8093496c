"""Checks of the network: what may not depend on padding, packing or devices, and where scores are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from rlhf_jax import logprobs
from rlhf_jax.arrays import PackedRankingBatch, RankingBatch, TokenBatch
from rlhf_jax.data import Ledger, RaggedRows, RankingRows, encode_rankings, packing
from rlhf_jax.data.batches import PackedRankingRows
from rlhf_jax.doctor.checks import Check, LeftOut, Measured
from rlhf_jax.doctor.patient import AMONG, ROWS, Patient
from rlhf_jax.model import count_parameters
from rlhf_jax.optim import new_state
from rlhf_jax.packing import padded_episodes
from rlhf_jax.parallel.mesh import copied, jit_update, make_mesh, place, pmap_update
from rlhf_jax.parallel.sharding import DATA
from rlhf_jax.stages import reward, sft

# Nats, or units of a score of size 1: float32 differs by 1e-5 at most where only the order of a sum does.
ROUNDING = 1e-3
# Relative difference of two gradients of the same batch.
GRADIENT = 1e-3
# Larger models take most of a minute for two gradients on a CPU, and four times their memory.
MOST_PARAMETERS = 2**26


def laid_out(patient: Patient, *, left: bool, garbage: bool) -> tuple[np.ndarray, np.ndarray]:
    """The patient's rows as (tokens, mask) [ROWS, T], with room for two of the longest.

    Args:
      left: padding before a row, else after it.
      garbage: random tokens as padding.
    """
    longest = max(len(ids) for ids, _ in patient.rows)
    shape = (len(patient.rows), 2 * longest)
    tokens, mask = np.full(shape, patient.tokenizer.pad_id, np.int32), np.zeros(shape, np.bool_)
    if garbage:
        tokens[:] = np.random.default_rng(1).choice(patient.usual_ids, shape)
    for row, (ids, _) in enumerate(patient.rows):
        start = shape[1] - len(ids) if left else 0
        tokens[row, start : start + len(ids)], mask[row, start : start + len(ids)] = ids, True
    return tokens, mask


def token_losses(patient: Patient, tokens_BT: np.ndarray, segment_ids_BT: np.ndarray) -> np.ndarray:
    """Loss of each token but the first, [B, T-1] in nats."""
    targets: Any = np.concatenate([segment_ids_BT[:, :1] * 0, segment_ids_BT[:, 1:]], axis=1) > 0
    arrays: list[Any] = [tokens_BT, segment_ids_BT.astype(np.int32), targets]
    return np.asarray(patient.losses(patient.params, TokenBatch(*arrays)))


def row_losses(patient: Patient, *, left: bool, garbage: bool) -> list[np.ndarray]:
    """Losses of the tokens of each row but its first, laid out alone."""
    tokens, mask = laid_out(patient, left=left, garbage=garbage)
    losses = token_losses(patient, tokens, mask)
    starts = [tokens.shape[1] - len(ids) if left else 0 for ids, _ in patient.rows]
    return [
        losses[row, start : start + len(ids) - 1]
        for row, (start, (ids, _)) in enumerate(zip(starts, patient.rows, strict=True))
    ]


def most(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Largest difference; infinite if a number is not finite."""
    gaps = [float(np.abs(a - b).max(initial=0.0)) for a, b in zip(first, second, strict=True)]
    return max(gaps) if all(map(np.isfinite, gaps)) else float("inf")


def parameters(patient: Patient) -> Measured:
    """Whether the parameters can be read, and are finite."""
    if patient.source is None:
        if patient.run is None or not patient.run.finished:
            raise LeftOut(patient.unread)
        return Measured(False, patient.unread)
    leaves = jax.tree.leaves(patient.params)
    finite = all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves)
    return Measured(
        finite, f"{sum(leaf.size for leaf in leaves):,} numbers, {'all finite' if finite else 'not all finite'}"
    )


def left_padding(patient: Patient) -> Measured:
    """Log-probabilities, or scores, with padding of random tokens before the rows."""
    if patient.scalar:
        first, second = (scores(patient, *laid_out(patient, left=left, garbage=left)) for left in (False, True))
        gap = most([first], [second]) / max(1.0, float(np.abs(first).max()))
        return Measured(gap <= ROUNDING, f"scores differ by {gap:.2g}")
    gap = most(*(row_losses(patient, left=left, garbage=left) for left in (False, True)))
    return Measured(gap <= ROUNDING, f"log-probabilities differ by {gap:.2g} nats")


def packed_rows(patient: Patient) -> Measured:
    """Log-probabilities, or scores, of rows that share a row of the batch with others."""
    if patient.scalar:
        return packed_rankings(patient)
    rows, alone = patient.rows, row_losses(patient, left=False, garbage=False)
    packed = packing.pack_rows(
        RaggedRows(rows, patient.width, patient.tokenizer.pad_id), length=2 * max(map(_length, rows))
    )
    batch = packed.batch(np.arange(ROWS) % len(packed))
    tokens, segments = np.asarray(batch.tokens_BT), np.asarray(batch.segment_ids_BT)
    losses = token_losses(patient, tokens, segments)
    first, second, left = [], [], list(range(ROWS))
    for row in range(len(packed)):
        start, end = 0, int(np.count_nonzero(segments[row]))
        while start < end:
            # The longest, as one row may begin like another.
            fits = [at for at in left if tokens[row, start : start + _length(rows[at])].tolist() == list(rows[at][0])]
            if not fits:
                return Measured(False, f"row {row} of the packed ones has no whole row at token {start}")
            at = max(fits, key=lambda at: _length(rows[at]))
            left.remove(at)
            first.append(alone[at])
            second.append(losses[row, start : start + len(alone[at])])
            start += _length(rows[at])
    gap = most(first, second)
    shared = f"{len(rows)} rows in {len(packed)}"
    return Measured(gap <= ROUNDING, f"log-probabilities of {shared} differ by {gap:.2g} nats")


def packed_rankings(patient: Patient) -> Measured:
    """Scores of ranked responses that share their prompt, and a row with another prompt."""
    rankings = some_rankings(patient)
    both: list[RankingBatch | PackedRankingBatch] = [
        rows.batch(np.arange(len(rankings))) for rows in (rankings, PackedRankingRows(rankings, 2))
    ]
    score = jax.jit(lambda params, batch: logprobs.ranking_scores(patient.network, params, batch))
    alone, together = (np.asarray(score(patient.params, batch)) for batch in both)
    exists = np.asarray(both[0].mask_BK)
    gap = most([alone[exists]], [together[exists]]) / max(1.0, float(np.abs(alone[exists]).max()))
    return Measured(
        gap <= ROUNDING, f"scores of {len(rankings)} prompts in {len(rankings) // 2} rows differ by {gap:.2g}"
    )


def some_rankings(patient: Patient) -> RankingRows:
    """Four prompts with two or three short responses each, from the data or made of the patient's rows."""
    pad, width = patient.tokenizer.pad_id, patient.width
    found = encode_rankings(
        patient.records.comparisons[:AMONG], patient.tokenizer, max_tokens=width, ledger=Ledger()
    ).rows
    rows = [(responses[:3], (1, 2, 3)[: len(responses)]) for responses, _ in found[:4]]
    pairs = [(patient.rows[at][0], patient.rows[at + 1][0]) for at in range(0, ROWS, 2)]
    rows += [(pair, (1, 2)) for pair in pairs[len(rows) :]]
    return RankingRows(rows, width, pad)


def scores(patient: Patient, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Scores [B] read at the last real tokens."""
    return np.asarray(patient.scores(patient.params, tokens_BT, mask_BT))


def score_position(patient: Patient) -> Measured:
    """Scores where the tokens after the last one, and where the last one, are others; and as PPO reads them."""
    tokens, mask = laid_out(patient, left=False, garbage=False)
    plain = scores(patient, tokens, mask)
    after = most([plain], [scores(patient, *laid_out(patient, left=False, garbage=True))])
    ends, rows = mask.sum(axis=1) - 1, np.arange(len(mask))
    other = tokens.copy()
    some, another = patient.usual_ids[:2]
    other[rows, ends] = np.where(tokens[rows, ends] == some, another, some)
    changed = float(np.mean(np.abs(scores(patient, other, mask) - plain) > 0))
    in_ppo = most([plain], [episode_scores(patient)])
    size = max(1.0, float(np.abs(plain).max()))
    healthy = after / size <= ROUNDING and in_ppo / size <= ROUNDING and changed == 1
    return Measured(
        healthy,
        f"other tokens after the last change scores by {after:.2g}, another last token changes {changed:.0%} of them, "
        f"PPO reads scores that differ by {in_ppo:.2g}",
    )


def episode_scores(patient: Patient) -> np.ndarray:
    """Scores [B] as PPO reads them: of a left-padded prompt and a right-padded response, each half of a row."""
    rows = [ids for ids, _ in patient.rows]
    prompts = max(len(ids) // 2 for ids in rows)
    responses = max(len(ids) - len(ids) // 2 for ids in rows)
    tokens = np.random.default_rng(2).choice(patient.usual_ids, (len(rows), prompts + responses)).astype(np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    for row, ids in enumerate(rows):
        start = prompts - len(ids) // 2
        tokens[row, start : start + len(ids)], mask[row, start : start + len(ids)] = ids, True
    arrays: list[Any] = [tokens, mask, mask[:, prompts:], None]
    episodes = padded_episodes(*arrays)
    read = jax.jit(lambda params, rows: logprobs.response_scores(patient.network, params, rows))
    score_BR = np.asarray(read(patient.params, episodes))
    return score_BR[np.arange(len(rows)), mask[:, prompts:].sum(axis=1) - 1]


def gradients(patient: Patient) -> Measured:
    """The gradient of a batch with rows of unlike lengths on one device, and split over devices and microbatches."""
    size = count_parameters(patient.params)
    if jax.default_backend() == "cpu" and size > MOST_PARAMETERS:
        raise LeftOut(f"two gradients of {size:,} parameters take more than a minute on a CPU")
    if patient.scalar:
        batch: Any = some_rankings(patient).batch(np.arange(4))
    else:
        batch = RaggedRows(patient.rows, patient.width, patient.tokenizer.pad_id).batch(np.arange(ROWS))
    devices = min(len(jax.devices()), 2)
    whole = gradient(patient, batch)
    split = gradient(patient, batch, devices=devices, microbatches=2)
    norm = float(np.sqrt(sum(float(np.square(leaf).sum()) for leaf in whole)))
    gap = float(np.sqrt(sum(float(np.square(a - b).sum()) for a, b in zip(whole, split, strict=True))))
    share = gap / norm if norm > 0 else float("inf")
    where = f"{devices} devices with" if devices > 1 else "1 device (no other is there) with"
    return Measured(
        share <= GRADIENT, f"gradients on 1 device and on {where} 2 microbatches differ by {share:.2g} of {norm:.3g}"
    )


def gradient(patient: Patient, batch: Any, *, devices: int = 1, microbatches: int = 1) -> list[np.ndarray]:
    """Leaves of the gradient of a batch, float64; with pmap where the run used it."""
    pmap = devices > 1 and patient.run is not None and patient.run.config.get("pmap", False)
    mesh, stage = make_mesh(devices), reward if patient.scalar else sft
    optimizer = optax.trace(decay=0.0)  # its state is the gradient
    make = functools.partial(stage.make_update, patient.network, optimizer, microbatches=microbatches)
    update = pmap_update(make(axis_name=DATA), devices) if pmap else jit_update(make(), mesh)
    state = new_state(patient.params, optimizer.init(patient.params), 0)
    state, _ = update(copied(place(state, mesh), mesh), batch)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.opt_state.trace)]


def _length(row: tuple[Sequence[int], Sequence[bool]]) -> int:
    return len(row[0])


BUG = "a fault of the program or of the model's files, not of a setting: report it with this line"
NETWORK = (
    Check(
        "parameters",
        "the parameters that later stages take",
        "can be read, and are finite",
        "train the model again, or copy the whole folder again",
        ("language", "scalar"),
        parameters,
    ),
    Check(
        "left-padding",
        "largest change by random tokens in the padding before a row",
        f"at most {ROUNDING:g}",
        f"positions or the attention mask count padding: {BUG}",
        ("language", "scalar"),
        left_padding,
    ),
    Check(
        "packed-rows",
        "largest difference of packed rows from single ones",
        f"at most {ROUNDING:g}",
        f"packed rows see each other: train without --pack; {BUG}",
        ("language", "scalar"),
        packed_rows,
    ),
    Check(
        "score-position",
        "where the score is read",
        f"at the last real token: later ones change no score (at most {ROUNDING:g}), the token itself every one",
        f"the score is read elsewhere, so that padding is rewarded: {BUG}",
        ("scalar",),
        score_position,
    ),
    Check(
        "gradients",
        "relative difference of the gradient on 1 device and on several, with microbatches",
        f"at most {GRADIENT:g}",
        f"a mean of means, or another reduction that depends on the split: train on one device; {BUG}",
        ("language", "scalar"),
        gradients,
    ),
)
