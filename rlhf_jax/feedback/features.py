"""Features for active selection: a language model's hidden states at half depth, computed once.

At half depth the states represent the text; later layers specialise in predicting the next token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rlhf_jax.arrays import Array, Params
from rlhf_jax.data.batches import bucket_length, default_buckets
from rlhf_jax.data.encode import prompt_ids, ranking_rows, response_ids
from rlhf_jax.data.records import Prompt
from rlhf_jax.feedback.active import Floats
from rlhf_jax.feedback.records import Item
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.source import Source
from rlhf_jax.runs.lifecycle import say
from rlhf_jax.tokenizers.protocol import TextTokenizer

ROWS = 32
_EVERY = 50


def rows_of(item: Item, tokenizer: TextTokenizer, *, ended: bool) -> list[list[int]]:
    """Token ids of the prompt with each response; with `ended`, with the end token of those that were not cut."""
    # A response to a prompt given as messages follows a space, as everywhere in data/.
    texts = [f" {text}" for text in item.responses] if item.turns else item.responses
    ends = [ended and of_one for of_one in item.ended or [True] * len(texts)]
    answers = [response_ids(text, tokenizer, turns=item.turns, ended=end) for text, end in zip(texts, ends)]
    return ranking_rows(prompt_ids(Prompt(item.prompt, turns=item.turns), tokenizer), answers)


def hidden_states(source: Source, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Hidden states after half of the blocks, [N, 2 D]: the mean over each row, and the state of its last token."""
    model, params = lower_half(source.network(), source.params())
    order = np.argsort([len(row) for row in ids], kind="stable")
    states = np.zeros((len(ids), 2 * source.model.width), np.float32)
    for start in range(0, len(order), ROWS):
        part = order[np.minimum(np.arange(start, start + ROWS), len(order) - 1)]
        width = bucket_length(max(len(ids[i]) for i in part), default_buckets(source.model.context))
        tokens, mask = np.full((ROWS, width), source.tokenizer.pad_id, np.int32), np.zeros((ROWS, width), bool)
        for place, i in enumerate(part):
            tokens[place, : len(ids[i])], mask[place, : len(ids[i])] = ids[i], True
        states[part] = np.asarray(_mean_and_last(model, params, jnp.asarray(tokens), jnp.asarray(mask)))
        if start // ROWS % _EVERY == _EVERY - 1:
            say(f"features of {start + ROWS:,} of {len(ids):,} responses")
    return states


def lower_half(model: Transformer, params: Params) -> tuple[Transformer, Params]:
    """The first half of the blocks, rounded up, with the same final norm."""
    config = model.config
    layers = (config.layers + 1) // 2
    if "blocks" in params:
        params = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])}
    config = dataclasses.replace(config, layers=layers, windows=config.windows[:layers])
    return Transformer(config, scalar=model.scalar), params


def _mean_and_last_impl(model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array) -> Array:
    hidden_BTD = model.apply({"params": params}, tokens_BT, mask_BT, method="hidden")
    length_B1 = jnp.sum(mask_BT, axis=1)[:, None]
    mean_BD = jnp.sum(jnp.where(mask_BT[:, :, None], hidden_BTD, 0.0), axis=1) / length_B1
    last_BD = jnp.take_along_axis(hidden_BTD, length_B1[:, :, None] - 1, axis=1)[:, 0]
    return jnp.concatenate([mean_BD, last_BD], axis=1)


_mean_and_last: Callable[..., Array] = jax.jit(_mean_and_last_impl, static_argnums=0)


def standardized(states_ND: NDArray[np.floating], dimensions: int = 0) -> Floats:
    """Standardise each feature and divide by √D, so that a row's squared norm is 1 on average.

    Args:
      states_ND: features.
      dimensions: number of leading principal components to keep; 0 for all features unchanged.
    """
    features = np.asarray(states_ND, np.float64)
    features = features - features.mean(axis=0)
    features /= np.maximum(features.std(axis=0), 1e-6) * np.sqrt(features.shape[1])
    return principal(features, dimensions)


def principal(features_ND: Floats, dimensions: int) -> Floats:
    """Leading principal components without centring, the largest first; for 0 all features unchanged."""
    if not 0 < dimensions < features_ND.shape[1]:
        return features_ND
    if len(features_ND) < features_ND.shape[1]:
        # The Gram matrix is smaller here and has the same non-zero eigenvalues.
        squares, axes = np.linalg.eigh(features_ND @ features_ND.T)
        leading = axes * np.sqrt(np.maximum(squares, 0.0))
        return np.asarray(leading[:, : -dimensions - 1 : -1])
    _, axes = np.linalg.eigh(features_ND.T @ features_ND)
    return np.asarray(features_ND @ axes[:, : -dimensions - 1 : -1])
