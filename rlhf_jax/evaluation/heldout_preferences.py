"""Log-probabilities of ranked responses over a whole held-out set, and what a method of preferences says of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params, PreferenceBatch
from rlhf_jax.config import METHODS, PreferenceConfig
from rlhf_jax.data.preferences import PreferenceRows
from rlhf_jax.evaluation.heldout import pair_accuracy
from rlhf_jax.logprobs import sequence_logps
from rlhf_jax.losses import ordered_pairs
from rlhf_jax.masked import masked_mean
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.processes import fetch
from rlhf_jax.stages.preference import kl_baseline, preference_losses, ranked_logps


class Logps(NamedTuple):
    """Log-probabilities in nats: of ranked responses [N, K], and of responses to other prompts [N] (or NaN)."""

    ranked_NK: np.ndarray
    unrelated_N: np.ndarray


@functools.partial(jax.jit, static_argnames="model")
def _logps(model: Transformer, params: Params, batch: PreferenceBatch) -> tuple[Array, Array]:
    ranked_BK, _ = ranked_logps(model, params, batch)
    if batch.unrelated is None:
        return ranked_BK, jnp.full(ranked_BK.shape[:1], jnp.nan)
    logp_B, tokens_B = sequence_logps(model, params, batch.unrelated)
    return ranked_BK, jnp.where(tokens_B > 0, logp_B, jnp.nan)


def logps_of(model: Transformer, params: Params, rows: PreferenceRows, *, batch_size: int = 32) -> Logps:
    """Log-probabilities of all rows; entries of missing responses are meaningless."""
    out = Logps(np.zeros((len(rows), rows.rankings.responses), np.float32), np.zeros(len(rows), np.float32))
    everyone = np.arange(len(rows))
    for start in range(0, len(rows), batch_size):
        # The last batch is filled up with the first rows, so that all have one shape.
        indices = np.arange(start, start + batch_size) % len(rows)
        for all_rows, found in zip(out, _logps(model, params, rows.batch(indices, among=everyone)), strict=True):
            all_rows[indices] = fetch(found)
    return out


def evaluate_preferences(
    policy: Logps, reference: Logps | None, rows: PreferenceRows, config: PreferenceConfig
) -> tuple[float, float, int]:
    """Held-out loss of the method, accuracy of its implicit reward, and number of ordered pairs.

    Args:
      policy: log-probabilities under the policy.
      reference: those under the reference model; None for a method without one.
      rows: the rows.
      config: settings of the stage.
    """
    ranks, mask = rows.rankings.padded_ranks
    tokens = np.zeros(mask.shape, np.int32)
    for place, masks in enumerate(rows.masks):
        tokens[place, : len(masks)] = [sum(own) for own in masks]
    baseline = None
    if METHODS[config.method].unpaired and reference is not None:
        log_ratio_N = policy.unrelated_N - reference.unrelated_N
        baseline = kl_baseline(jnp.asarray(log_ratio_N), jnp.isfinite(log_ratio_N))
    given = [None if x is None else jnp.asarray(x.ranked_NK) for x in (policy, reference)]
    arrays = [jnp.asarray(x) for x in (tokens, ranks, mask)]
    loss_N, _ = jax.jit(preference_losses, static_argnames="config")(*given, *arrays, config=config, baseline=baseline)
    useful_N = jnp.any(ordered_pairs(*arrays[1:]), axis=(1, 2))
    number = policy.ranked_NK if reference is None else policy.ranked_NK - reference.ranked_NK
    if METHODS[config.method].per_token:
        number = number / np.maximum(tokens, 1)
    return float(masked_mean(loss_N, useful_N)), *pair_accuracy(number, ranks, mask)
