"""Pytrees passed between data, model and stages, and the key to array names.

Shape key, used as a suffix of array names wherever the rank is fixed:
  B rows, T tokens, P prompt tokens, R response tokens, V vocabulary, D width, H heads,
  K responses to one prompt.

A mask is named after what True keeps. Every pytree here is a frozen dataclass of arrays (or pytrees of them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

Array = jax.Array
Params = Any
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and register it as a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class TokenBatch:
    """Rows of tokens for a language-modeling loss.

    Attributes:
      tokens_BT: int32 token ids.
      segment_ids_BT: int32, 0 for padding, 1, 2, … for the documents of a row; a token attends to its own segment only.
      loss_mask_BT: bool, True where the token is a *target*, predicted from the preceding tokens of its segment. The
        first token of a segment is never a target. The shift by one is done in `shifted` only.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    loss_mask_BT: Array

    def shifted(self) -> tuple[Array, Array, Array, Array]:
        """Shift by one: (inputs, segment ids of the inputs, targets, target mask), each [B, T-1]."""
        return self.tokens_BT[:, :-1], self.segment_ids_BT[:, :-1], self.tokens_BT[:, 1:], self.loss_mask_BT[:, 1:]


@pytree
class RankingBatch:
    """K ranked responses to each of B prompts; prompt and response form one right-padded row.

    Attributes:
      tokens_BKT: int32 token ids.
      mask_BKT: bool, True for real tokens.
      ranks_BK: int32, 1 is best; equal ranks are ties.
      mask_BK: bool, True where a response exists; a prompt has 2 to 9 responses.
    """

    tokens_BKT: Array
    mask_BKT: Array
    ranks_BK: Array
    mask_BK: Array


@pytree
class PackedRankingBatch:
    """K ranked responses to each of M prompts in a row: of each prompt their common prefix, then the rest of each.

    Attributes:
      tokens_BT: int32 token ids.
      segment_ids_BT: int32, 0 for padding; for the prompt m = 0, 1, … of a row, m (K + 1) + 1 is the common prefix, and
        m (K + 1) + k + 2 the rest of response k.
      at_BMK: int32, column of each response's last token.
      ranks_BMK: as ranks_BK in `RankingBatch`.
      mask_BMK: as mask_BK in `RankingBatch`.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    at_BMK: Array
    ranks_BMK: Array
    mask_BMK: Array

    @property
    def ranks_BK(self) -> Array:
        """Ranks with one row per prompt."""
        return self.ranks_BMK.reshape(-1, self.ranks_BMK.shape[-1])

    @property
    def mask_BK(self) -> Array:
        """Mask of the responses with one row per prompt."""
        return self.mask_BMK.reshape(-1, self.mask_BMK.shape[-1])


@pytree
class PreferenceBatch:
    """K ranked responses to each of B prompts for a loss on their log-probabilities.

    Attributes:
      ranking: the rows and their ranks.
      loss_mask_BKT: bool, True for the response's own tokens, whose log-probabilities are summed.
      unrelated: for KTO's baseline, a row for each prompt with a response to another prompt, or padding alone where
        there is none; None for other methods.
    """

    ranking: RankingBatch
    loss_mask_BKT: Array
    unrelated: TokenBatch | None = None


@pytree
class PromptBatch:
    """Left-padded prompts to sample responses for.

    Attributes:
      tokens_BP: int32 token ids.
      mask_BP: bool, True for real tokens.
    """

    tokens_BP: Array
    mask_BP: Array


@pytree
class Rollout:
    """B sampled episodes of one PPO iteration. All float arrays are float32.

    Attributes:
      tokens_BT: prompt (left-padded, P), then response (right-padded, R), T = P + R.
      mask_BT: True for real tokens.
      response_mask_BR: True for real response tokens, EOS included.
      logp_BR: log-probability of each response token under the policy that sampled it, in nats.
      ref_logp_BR: the same under the reference model.
      value_BR: value of the state before each response token.
      advantage_BR: whitened advantage.
      target_BR: value target.
      score_B: score of the episode, the reward model's normalized one or a sum with reward functions, with the
        missing-end penalty applied.
    """

    tokens_BT: Array
    mask_BT: Array
    response_mask_BR: Array
    logp_BR: Array
    ref_logp_BR: Array
    value_BR: Array
    advantage_BR: Array
    target_BR: Array
    score_B: Array


@pytree
class TrainState:
    """Training state: everything that determines the next step; saved in checkpoints by Orbax.

    Attributes:
      step: int32 scalar, number of updates done; together with the seed it is also the position in the data.
      params: parameters being trained.
      opt_state: optax state.
      key: typed random key of the run; each step folds in its number, so no key is used twice.
      extras: further state of a stage (PPO: KL coefficient, moving average of the policy), {} for the others.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array
    extras: dict[str, Any]


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested dicts into one dict of dotted paths."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(tree, ""))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return tree
