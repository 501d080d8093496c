"""The pytrees that travel between data, model and stages, and the key to array names.

Shape key, used as a suffix wherever the rank is fixed:
  B rows, T tokens, P prompt tokens, R response tokens, V vocabulary, D width, H heads,
  K responses to one prompt.
A mask says what True keeps. Every pytree here is a frozen dataclass whose fields are all arrays (or pytrees of them).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

Array = jax.Array
Params = Any
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass that JAX sees as a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class TokenBatch:
    """Rows of tokens for a language-model loss.

    tokens_BT: int32 token ids.
    segment_ids_BT: int32, 0 for padding, 1, 2, … for the documents of a row; a token attends to its own segment only.
    loss_mask_BT: bool, True where the token is a *target*, predicted from the tokens before it in its segment. The
      first token of a segment is never a target. The shift by one lives in `shifted`, nowhere else.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    loss_mask_BT: Array

    def shifted(self) -> tuple[Array, Array, Array, Array]:
        """(inputs, their segment ids, targets, target mask), each [B, T-1]."""
        return self.tokens_BT[:, :-1], self.segment_ids_BT[:, :-1], self.tokens_BT[:, 1:], self.loss_mask_BT[:, 1:]


@pytree
class RankingBatch:
    """K ranked responses to each of B prompts; prompt and response are one right-padded row.

    tokens_BKT: int32. mask_BKT: bool, True for real tokens. ranks_BK: int32, 1 is best, equal ranks are ties.
    mask_BK: bool, True where a response exists (K is ragged: 2 to 9).
    """

    tokens_BKT: Array
    mask_BKT: Array
    ranks_BK: Array
    mask_BK: Array


@pytree
class SharedRankingBatch:
    """The same with each prompt written once: a row is what its K responses have in common, then the rest of each.

    tokens_BT: int32. segment_ids_BT: int32, 1 for the common part, k + 2 for the rest of response k, 0 for padding.
    at_BK: the column of each response's last token. ranks_BK, mask_BK: as above.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    at_BK: Array
    ranks_BK: Array
    mask_BK: Array


@pytree
class PromptBatch:
    """Prompts to sample responses for, left-padded. tokens_BP: int32. mask_BP: bool, True for real tokens."""

    tokens_BP: Array
    mask_BP: Array


@pytree
class Rollout:
    """What one PPO iteration knows of its B sampled episodes. All float arrays are float32.

    tokens_BT: prompt (left-padded, P) then response (right-padded, R), T = P + R. mask_BT: real tokens.
    response_mask_BR: real response tokens, the end-of-text token included.
    logp_BR, ref_logp_BR: nats of each response token under the sampling policy and the reference.
    value_BR: value of the state before each response token. advantage_BR: whitened. target_BR: value target.
    score_B: reward-model score of the episode, the missing-end penalty applied.
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
    """Everything that decides the next step; what Orbax saves.

    step: int32 scalar, updates done; with the seed it is also the position in the data.
    params: the networks being trained. opt_state: optax's.
    key: typed random key of the run; a step folds its number in, so no key is used twice.
    extras: what else a stage carries (PPO: KL coefficient, moving average of the policy), {} for the others.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array
    extras: dict[str, Any]
