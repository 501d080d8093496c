"""What `generate --chat` and `evaluate` ask a model, as token ids, without a model that answers."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.cli import completion
from rlhf_jax.cli.generate import Config as GenerateConfig
from rlhf_jax.config import ModelConfig
from rlhf_jax.evaluation import answers, evaluate
from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from tests.made_params import random_params
from tests.made_runs import write_run


class Heard:
    """A model that gives the next of its answers, or none, and keeps the ids that `generate --chat` asks it."""

    def __init__(self, path: Path, tokenizer: TextTokenizer, *answers: str, room: int = 999) -> None:
        self.config = GenerateConfig(run="runs/model", chat=True, start=str(path))
        self.tokenizer, self.room, self.next = tokenizer, room, iter(answers)
        self.ids: list[list[int]] = []

    def refuse(self, ids: list[int], where: str) -> None:
        assert ids and where

    def answers(self, prompts: list[list[int]]) -> list[str]:
        self.ids += prompts
        return [next(self.next, "")]

    def spoken(self, ids: list[int]) -> list[str]:
        return self.answers([ids])


def asked_by_chat(path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of the file's only row as `generate --chat --start` asks the model."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    speaker = Heard(path, tokenizer)
    completion.chat(speaker)  # type: ignore[arg-type]
    return speaker.ids


def asked_by_evaluate(
    rows: Sequence[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: TextTokenizer
) -> set[tuple[int, ...]]:
    """Ids of the distinct prompts of the rows as `evaluate` asks a model with the tokenizer."""
    asked: set[tuple[int, ...]] = set()

    def heard(language: Any, reference: Any, asking: Any, *_: Any) -> list[Answer]:
        asked.update(map(tuple, asking.rows))
        return [Answer("", True, 1)] * len(asking.rows)

    monkeypatch.setattr(answers, "_one_round", heard)
    model = ModelConfig(vocab_size=tokenizer.vocab_size, context=512, width=2, layers=1, heads=1)
    run = write_run(folder / tokenizer.name, "pretrain", random_params(model), model, tokenizer)
    (folder / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    evaluate([str(run.path)], folder / "all.jsonl", out=str(folder / f"of {tokenizer.name}"), max_new_tokens=1)
    return asked
