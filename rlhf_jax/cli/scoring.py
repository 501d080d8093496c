"""Scores of files of answers, for `rlhf-jax score`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import Comparison, Demonstration, Dialogue, Ledger, Message, Ranking, read_records, render_prompt
from rlhf_jax.data.dialogues import of_tools
from rlhf_jax.data.tables import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.inference import load
from rlhf_jax.runs.lifecycle import say

if TYPE_CHECKING:
    from rlhf_jax.cli.score import Config

COMPARED = ("chosen", "rejected", "responses", "ranks")


def run(config: Config) -> None:
    """Writes a row of JSON for each record, with its scores; null for a response that does not fit the model."""
    if config.out and Path(config.out).exists():
        raise UserError(f"out: expected a file that does not exist yet, got {config.out}; give another --out")
    judge = load(config.run)
    if not judge.source.scalar:
        raise UserError(f"{config.run}: expected a reward model, got a language model")
    ledger = Ledger()
    records: list[Any] = []
    for path in config.data:
        compared = any(row.get(name) is not None for _, row in read_rows(path) for name in COMPARED)
        records += read_records(path, "rankings" if compared else "demonstrations", ledger)
    answers = [answer for record in records for answer in _answers(record)]
    encoded = Ledger()
    scores = iter(judge.record_scores(answers, encoded))
    rows = [(record, [next(scores) for _ in _answers(record)]) for record in records]
    with _output(config.out) as file:
        for record, found in rows:
            file.write(json.dumps(_row(record, found), ensure_ascii=False) + "\n")
    for line in (*_agreement(rows), *left_out(ledger, "rows left out"), *left_out(encoded, "answers without a score")):
        say(line)


def _answers(record: Any) -> list[Demonstration]:
    """The responses of a record, each with its prompt, encoded as the stages encode them."""
    if isinstance(record, Dialogue):
        last = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
        turns = record.messages[:last]
        return [_last(turns, record.messages[last], record.where)]
    if isinstance(record, Demonstration):
        return [record]
    ends = record.ended or [True] * (2 if isinstance(record, Comparison) else len(record.responses))
    if record.rests:
        # The last answer is scored after all turns before it, those of the response too.
        before = [(*record.turns, *rest[:-1]) for rest in record.rests]
        return [
            _last(turns, rest[-1], record.where, ended)
            for turns, rest, ended in zip(before, record.rests, ends, strict=True)
        ]
    texts = (record.chosen, record.rejected) if isinstance(record, Comparison) else record.responses
    return [
        Demonstration(record.prompt, text, record.where, record.turns, ended)
        for text, ended in zip(texts, ends, strict=True)
    ]


def _last(turns: tuple[Message, ...], message: Message, where: str, ended: bool = True) -> Demonstration:
    """The last answer of a dialogue, with its calls of tools."""
    rest = (message,) if of_tools(message) else ()
    return Demonstration(render_prompt(turns), f" {message.text}", where, turns, ended, rest)


def _row(record: Any, scores: Sequence[float | None]) -> dict[str, Any]:
    answer = _answers(record)[0]
    prompt = answer.prompt if isinstance(record, Dialogue) else record.prompt
    row: dict[str, Any] = {"where": record.where, "prompt": prompt}
    if isinstance(record, Comparison):
        row |= {"chosen": record.chosen, "rejected": record.rejected}
        return row | dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
    if isinstance(record, Ranking):
        return row | {"responses": record.responses, "ranks": record.ranks, "scores": list(scores)}
    return row | {"completion": answer.completion, "score": scores[0]}


def _agreement(rows: Sequence[tuple[Any, Sequence[float | None]]]) -> list[str]:
    """How often the better response scores higher; an interval counts a prompt once, with the mean of its pairs."""
    shares = []
    for record, scores in rows:
        if not isinstance(record, Comparison | Ranking) or None in scores:
            continue
        ranks = (1, 2) if isinstance(record, Comparison) else record.ranks
        gaps = [
            better - worse
            for better, rank in zip(scores, ranks, strict=True)
            for worse, other in zip(scores, ranks, strict=True)
            if rank < other and better is not None and worse is not None
        ]
        shares.append(sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps))
    if not shares:
        return []
    share = sum(shares) / len(shares)
    low, high = wilson(share, len(shares))
    return [
        f"the better response scores higher in {share:.3f} of {len(shares):,} prompts (95% interval {low:.3f} to "
        f"{high:.3f}; 0.5 is chance)"
    ]


def left_out(ledger: Ledger, what: str) -> list[str]:
    """A line for each reason for which rows were dropped."""
    return [f"{count:,} {what}: {reason}" for reason, count in ledger.reasons().get("dropped", {}).items()]


@contextlib.contextmanager
def _output(out: str) -> Any:
    if not out:
        yield sys.stdout
        return
    with Path(out).open("x", encoding="utf-8") as file:
        yield file
