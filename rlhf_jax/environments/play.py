"""Episodes of a trained model in an environment, without training: to measure the model, or to try the environment."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params
from rlhf_jax.config import SamplingConfig
from rlhf_jax.environments.episodes import Episode, Table
from rlhf_jax.generate import generate, uniform_numbers
from rlhf_jax.model import Transformer


def play(
    model: Transformer,
    params: Params,
    table: Table,
    rows: Sequence[int],
    key: Array,
    *,
    temperature: float = 1.0,
    batch: int = 32,
) -> list[Episode]:
    """Play an episode for each of some rows of prompts.

    Args:
      model: language-head transformer.
      params: its parameters.
      table: environment, prompts and limits.
      rows: rows of the prompts, one for each episode.
      key: typed random key.
      temperature: sampling temperature; 0 is greedy.
      batch: episodes sampled at a time.
    """
    sampling = SamplingConfig(
        max_new_tokens=table.turn_length,
        stop_ids=table.tokenizer.stop_ids,
        pad_id=table.tokenizer.pad_id,
        temperature=temperature,
    )
    episodes = table.start(rows)
    for turn in range(table.turns):
        over_B = np.array([episode.is_over for episode in episodes], bool)
        if over_B.all():
            break
        prompts = table.so_far(episodes)
        uniform_BR = uniform_numbers(jax.random.fold_in(key, turn), len(rows), table.turn_length)
        parts = []
        for first in range(0, len(rows), batch):
            # The last batch is filled up with episodes from the start, since all have one shape.
            at = np.arange(first, first + batch) % len(rows)
            tokens, mask = prompts.tokens_BP[at], prompts.mask_BP[at]
            given = {"uniform_BR": uniform_BR[at], "over_B": jnp.asarray(over_B[at])}
            parts.append(generate(model, params, tokens, mask, key, sampling, **given))
        table.take(episodes, [np.concatenate(column)[: len(rows)] for column in zip(*parts, strict=True)], turn)
    return episodes
