"""Sampled answers as data to train on: the best of K, the best against the worst, all in order, or all as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import Ledger, Prompt
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.evaluation.intervals import Floats

Keep = Literal["best", "pairs", "rankings", "all"]


def chosen_rows(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
    scores_PK: Floats | None,
    keep: Keep,
    ledger: Ledger,
    *,
    at_least: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of data from K answers to each prompt; the ledger gets the prompts without one, with the reason.

    Args:
      prompts: prompts.
      answers: K answers to each.
      scores_PK: their scores, NaN for none; None for "all" alone.
      keep: "best": a demonstration with the best answer, as in rejection sampling and expert iteration. "pairs": a
        comparison of the best and the worst, as in iterated DPO. "rankings": all answers in order. "all": a
        demonstration for each answer, as in distillation.
      ledger: of the prompts; empty answers, which no stage learns from, are left out.
      at_least: lowest score of a best answer.
    """
    for at, (prompt, several) in enumerate(zip(prompts, answers, strict=True)):
        row_K = np.zeros(len(several)) if scores_PK is None else scores_PK[at]
        kept = [(score, answer) for score, answer in zip(row_K.tolist(), several, strict=True) if answer.text.strip()]
        known = [(score, answer) for score, answer in kept if not np.isnan(score)]
        reason = _reason(known, kept, keep, at_least)
        if reason:
            ledger.drop(prompt.where, reason)
            continue
        ledger.keep(prompt.where)
        asked = prompt_row(prompt.turns) if prompt.turns else {"prompt": prompt.prompt}
        # The first of equals, as sorting is stable.
        known.sort(key=lambda pair: -pair[0])
        best, worst = known[0][1], known[-1][1]
        if keep == "pairs":
            ends = {
                f"ended_{name}": False for name, one in (("chosen", best), ("rejected", worst)) if one.ended is False
            }
            yield asked | {"chosen": _said(prompt, best), "rejected": _said(prompt, worst)} | ends
        elif keep == "rankings":
            values = sorted({score for score, _ in known}, reverse=True)
            ranks = [values.index(score) + 1 for score, _ in known]
            ended = [answer.ended is not False for _, answer in known]
            yield asked | {"responses": [_said(prompt, one) for _, one in known], "ranks": ranks, "ended": ended}
        else:
            for _, one in known[:1] if keep == "best" else known:
                yield asked | {"completion": _said(prompt, one)} | ({"ended": False} if one.ended is False else {})


def _reason(known: Sequence[Any], kept: Sequence[Any], keep: Keep, at_least: float | None) -> str:
    """Why a prompt gives no row, "" if it gives one."""
    if not kept:
        return "only empty answers"
    if not known:
        return "no answer has a score"
    scores = [score for score, _ in known]
    if at_least is not None and max(scores) < at_least:
        return f"no answer scores {at_least:g} or more"
    texts = {answer.text for _, answer in known}
    if keep in ("pairs", "rankings") and (len(texts) == 1 or max(scores) == min(scores)):
        return "all answers are the same" if len(texts) == 1 else "all answers score the same"
    return ""


def _said(prompt: Prompt, answer: Answer) -> Any:
    """The answer as files have it: text after a prompt that is text, else the assistant's message."""
    return [{"role": "assistant", "content": answer.text}] if prompt.turns else answer.text
