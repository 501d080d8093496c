"""Ranked responses with a loss mask: rows for preference optimization."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.arrays import PreferenceBatch, RankingBatch, TokenBatch
from rlhf_jax.data.batches import Indices, RankingRows, bucket_length, default_buckets
from rlhf_jax.data.encode import Row, dialogue_row, prompt_ids
from rlhf_jax.data.records import Comparison, Ranking
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.protocol import TextTokenizer

# Rows among which a response to another prompt is looked for; further ones would hardly fit better.
NEXT_ROWS = 16


@dataclasses.dataclass(frozen=True)
class PreferenceRows:
    """Prompts with K ranked responses each, the mask of their own tokens, and responses to other prompts for KTO.

    masks: for each prompt and response, True for the response's own tokens. unrelated: for each prompt (ids, mask) of
    itself with a response to another prompt, ([], []) where there is none; empty for other methods.
    """

    rankings: RankingRows
    masks: Sequence[Sequence[Sequence[bool]]]
    unrelated: Sequence[Row] = ()

    def __len__(self) -> int:
        return len(self.rankings)

    @functools.cached_property
    def lengths(self) -> Indices:
        """Tokens of each prompt's longest row."""
        if not self.unrelated:
            return self.rankings.lengths
        return np.maximum(self.rankings.lengths, [len(ids) for ids, _ in self.unrelated])

    def row_length(self, indices: Indices) -> int:
        rows = self.rankings
        return bucket_length(int(self.lengths[indices].max()), rows.buckets or default_buckets(rows.limit))

    def batch(self, indices: Indices, among: Indices | None = None) -> PreferenceBatch:
        width = self.row_length(indices if among is None else among)
        ranking = self.rankings.batch(indices, among)
        missing = ((0, 0), (0, 0), (0, width - ranking.tokens_BKT.shape[2]))
        tokens: Any = np.pad(ranking.tokens_BKT, missing, constant_values=self.rankings.pad_id)
        real: Any = np.pad(ranking.mask_BKT, missing)
        loss_mask: Any = np.zeros(real.shape, np.bool_)
        for place, index in enumerate(indices):
            for k, mask in enumerate(self.masks[index]):
                loss_mask[place, k, : len(mask)] = mask
        return PreferenceBatch(
            RankingBatch(tokens, real, ranking.ranks_BK, ranking.mask_BK),
            loss_mask,
            self._unrelated(indices, width) if self.unrelated else None,
        )

    def _unrelated(self, indices: Indices, width: int) -> TokenBatch:
        tokens = np.full((len(indices), width), self.rankings.pad_id, np.int32)
        segments, targets = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.bool_)
        for place, index in enumerate(indices):
            ids, mask = self.unrelated[index]
            tokens[place, : len(ids)], segments[place, : len(ids)], targets[place, : len(ids)] = ids, 1, mask
        arrays: list[Any] = [tokens, segments, targets]
        return TokenBatch(*arrays)


def preference_rows(rankings: RankingRows, tokenizer: TextTokenizer, *, unrelated: bool = False) -> PreferenceRows:
    """Adds the loss masks to encoded rankings, whose sources are their records.

    Args:
      rankings: as `encode_rankings` made them.
      tokenizer: that encoded them.
      unrelated: also pair each prompt with a response to another one, for KTO's baseline.

    Raises:
      UserError: for dialogues whose turns the tokenizer encodes in another way one by one.
    """
    masks = [
        _loss_masks(record, responses, tokenizer)
        for record, (responses, _) in zip(rankings.sources, rankings.rows, strict=True)
    ]
    return PreferenceRows(rankings, masks, _unrelated(rankings, masks) if unrelated else ())


def _loss_masks(
    record: Comparison | Ranking, responses: Sequence[Sequence[int]], tokenizer: TextTokenizer
) -> list[list[bool]]:
    """True for the tokens of each response that the model itself writes: of several messages, the assistant's."""
    if not record.rests:
        start = len(prompt_ids(record, tokenizer))
        return [[False] * start + [True] * (len(ids) - start) for ids in responses]
    given = [at for at, message in enumerate(record.turns) if message.role == "assistant"]
    masks = []
    for ids, rest in zip(responses, record.rests, strict=True):
        row, mask = dialogue_row([*record.turns, *rest], tokenizer, unlearned=given)
        if row[: len(ids)] != list(ids):
            raise UserError(
                f"{record.where}: expected turns that the tokenizer encodes alike one by one and together, got a "
                "dialogue whose answers start or end within a token; give only its last answer as 'chosen' and "
                "'rejected', with the turns before as 'prompt'"
            )
        masks.append(mask[: len(ids)])
    return masks


def _unrelated(rankings: RankingRows, masks: Sequence[Sequence[Sequence[bool]]]) -> list[Row]:
    """Each prompt with a response to one of the next prompts, the first that is another and fits."""
    starts = [list(mask).index(True) for mask, *_ in masks]
    prompts = [tuple(responses[0][:start]) for (responses, _), start in zip(rankings.rows, starts, strict=True)]
    rows: list[Row] = []
    for place, prompt in enumerate(prompts):
        found: Row = ([], [])
        for other in ((place + step) % len(prompts) for step in range(1, NEXT_ROWS + 1)):
            responses, start = rankings.rows[other][0], starts[other]
            # Good and bad responses in turn, as in the data.
            k = place % len(responses)
            ids, mask = [*prompt, *responses[k][start:]], [False] * len(prompt) + list(masks[other][k][start:])
            if prompts[other] != prompt and len(ids) <= rankings.limit:
                found = (ids, mask)
                break
        rows.append(found)
    return rows
