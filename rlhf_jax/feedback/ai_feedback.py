"""AI feedback: a language model judges which of two responses is better by a written principle, in both orders.

The comparisons are those of Constitutional AI: the judge reads the dialogue, the principle and both responses as (A)
and (B), and the log-probabilities of the answers A and B are its judgement. Averaging over both orders removes the
judge's bias towards a letter or a position. Its judgements count once they agree with people's (trust.py).

Source: Bai et al. 2022, section 4.1 (arXiv:2212.08073).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rlhf_jax.arrays import Array, Params
from rlhf_jax.data.batches import PromptRows, bucket_length, default_buckets
from rlhf_jax.data.dialogues import Message, render
from rlhf_jax.data.encode import chat_ids, response_ids
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import PRINCIPLE, Item, Judgement
from rlhf_jax.feedback.store import AI
from rlhf_jax.logprobs import response_logits
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.source import LANGUAGE, Source

STAGES = LANGUAGE
TOO_LONG = "longer than the judge's context"
Floats = NDArray[np.float64]


def question(item: Item, first: str, second: str, principle: str) -> str:
    """The message that asks the judge about two responses."""
    asked = render(item.turns).strip() if item.turns else item.prompt.strip()
    before = f"Here is what was said so far:\n\n{asked}\n\n" if asked else ""
    return (
        f"{before}Two responses follow.\n\n(A) {first.strip()}\n\n(B) {second.strip()}\n\n"
        f"{principle}\n\nAnswer with one letter, A or B."
    )


class Judge:
    """A language model that answers A or B to a question about two responses."""

    def __init__(self, source: Source, *, batch: int = 8, max_tokens: int | None = None) -> None:
        """Prepare a model as judge.

        Args:
          source: a language model, from `open_source(spec, stages=STAGES)`.
          batch: questions per forward pass.
          max_tokens: maximum length of a question with its answer, in tokens; by default the model's context.

        Raises:
          UserError: if the two answers differ in more than one token.
        """
        self.tokenizer = source.tokenizer
        self.model, self.params = source.network(), source.params()
        self.batch = batch
        self.limit = min(max_tokens or source.model.context, source.model.context)
        turns = (Message("user", "A or B?"),)
        a, b = (response_ids(f" {letter}", self.tokenizer, turns=turns, ended=False) for letter in "AB")
        if len(a) != len(b) or a[:-1] != b[:-1] or a == b:
            raise UserError(
                f"{source.where}: expected answers A and B whose token ids differ in the last only, got {a} and {b} "
                f"from its tokenizer; use another model as judge"
            )
        self.lead, self.answers = a[:-1], (a[-1], b[-1])

    def log_odds(self, questions: Sequence[str]) -> Floats:
        """log p(A) - log p(B) of each question's answer in nats, [N]; NaN for a question longer than the context."""
        rows = [
            [*chat_ids((Message("user", text),), self.tokenizer), *self.lead, self.answers[0]] for text in questions
        ]
        odds_N = np.full(len(rows), np.nan)
        fitting = sorted((i for i, row in enumerate(rows) if len(row) <= self.limit), key=lambda i: len(rows[i]))
        for start in range(0, len(fitting), self.batch):
            part = fitting[start : start + self.batch]
            width = bucket_length(len(rows[part[-1]]), default_buckets(self.limit))
            batch = PromptRows([rows[i] for i in part], width, self.tokenizer.pad_id).batch(
                np.arange(self.batch) % len(part)
            )
            odds = _log_odds(self.model, self.params, batch.tokens_BP, batch.mask_BP, answers=self.answers)
            odds_N[part] = np.asarray(odds, np.float64)[: len(part)]
        return odds_N


@dataclasses.dataclass(frozen=True)
class Answers:
    """The judgements of an AI judge.

    Attributes:
      judgements: one per item.
      pairs: number of pairs compared.
      turned: share of the pairs whose better response changed with the order.
    """

    judgements: list[Judgement]
    pairs: int
    turned: float


def judge_items(
    items: Sequence[Item],
    log_odds: Callable[[Sequence[str]], Floats],
    name: str,
    *,
    principle: str = PRINCIPLE,
) -> Answers:
    """Judge each item from all pairs of its responses, in both orders.

    P(first better) = σ((o_1 - o_2) / 2), with o_1 and o_2 the log-odds of A with the first response as (A) and as (B)

    Responses are ranked by the sums of these probabilities (Borda count).

    Args:
      items: to judge.
      log_odds: `Judge.log_odds`.
      name: of the judge; the labeller is named "ai:" followed by this.
      principle: the criterion, as text.

    Returns:
      One judgement per item, skipped where a question did not fit the context.
    """
    asked = [
        (place, first, second)
        for place, item in enumerate(items)
        for first, second in itertools.permutations(range(len(item.responses)), 2)
    ]
    texts = [
        question(items[place], items[place].responses[first], items[place].responses[second], principle)
        for place, first, second in asked
    ]
    started = time.monotonic()
    odds = dict(zip(asked, log_odds(texts).tolist()))
    seconds = round((time.monotonic() - started) / max(len(items), 1), 3)
    labeller = name if name.startswith(AI) else AI + name
    judgements, turned = [], []
    for place, item in enumerate(items):
        better = np.full((len(item.responses), len(item.responses)), 0.5)
        for first, second in itertools.permutations(range(len(item.responses)), 2):
            here, there = odds[place, first, second], odds[place, second, first]
            better[first, second] = 0.5 + 0.5 * np.tanh((here - there) / 4)
            if first < second and not np.isnan(here + there):
                turned.append((here > 0) == (there > 0))
        known = not np.isnan(better).any()
        judgements.append(
            Judgement(
                item.id,
                labeller,
                ranks_of(better) if known else (),
                skip="" if known else TOO_LONG,
                seconds=seconds,
                at=round(time.time(), 3),
            )
        )
    return Answers(judgements, len(turned), float(np.mean(turned)) if turned else 0.0)


def ranks_of(better: Floats) -> tuple[int, ...]:
    """Ranks by the sums Σ_k p(j is better than k), 1 for the largest; sums rounded to 1e-6 decide ties."""
    _, places = np.unique(-np.round(better.sum(axis=1), 6), return_inverse=True)
    return tuple((places + 1).tolist())


@functools.partial(jax.jit, static_argnames=("model", "answers"))
def _log_odds(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, *, answers: tuple[int, int]
) -> Array:
    logits_BV = response_logits(model, params, tokens_BT, mask_BT, response_length=1, temperature=1.0)[:, 0]
    return jnp.asarray(logits_BV[:, answers[0]] - logits_BV[:, answers[1]])
