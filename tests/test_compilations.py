"""No program is compiled after a stage's second iteration, over 50 iterations of rows of many lengths."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.data import Demonstration, Ledger, Prompt, RankingRows, Text, encode_rankings, new_lengths
from rlhf_jax.data.batches import PackedRankingRows, RaggedRows, batch_at
from rlhf_jax.data.records import Comparison
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import JsonLines
from rlhf_jax.trainers import ppo, pretrain, reward, sft

pytestmark = pytest.mark.speed

STEPS = 50
BUCKETS = (48, 80)
MODEL = ModelConfig(width=16, layers=1, heads=2, context=96)
# Answers of 1 to 60 letters, in batches of rows of both lengths.
PROMPTS = [f"{'abcdef'[i % 6]}{i}->" for i in range(60)]
ANSWERS = ["x" * (1 + (i * i) % 60) for i in range(60)]
DEMONSTRATIONS = [Demonstration(p, a, f"here:{i}") for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """(iterations that were done when it was compiled, program), as `jax.log_compiles` tells them."""
    found: list[tuple[int, str]] = []
    done = [0]
    row, start = JsonLines.row, JsonLines.start

    def counted(self: JsonLines, step: int, values: Any) -> None:
        done[0] = step
        row(self, step, values)

    def started(self: JsonLines, step: int, steps: int) -> None:
        done[0] = step
        start(self, step, steps)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Finished XLA compilation of"):
                found.append((done[0], message.split()[4]))

    monkeypatch.setattr(JsonLines, "row", counted)
    monkeypatch.setattr(JsonLines, "start", started)
    handler, logger = Handler(), logging.getLogger("jax")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    with jax.log_compiles():
        yield found
    logger.propagate = propagates
    logger.removeHandler(handler)


def settings(folder: Path, name: str) -> dict[str, Any]:
    return {"out": str(folder / name), "steps": STEPS, "log_every": 1, "save_every": 20, "eval_every": 15}


def late(compiled: list[tuple[int, str]]) -> list[str]:
    """Programs compiled between the second iteration and the last; all of them are forgotten."""
    assert any(done == 0 for done, _ in compiled)  # the log is read at all
    found = [f"{name} after {done}" for done, name in compiled if 2 <= done < STEPS]
    compiled.clear()
    return found


def test_nothing_is_compiled_after_the_second_iteration(tmp_path: Path, compiled: list[tuple[int, str]]) -> None:
    texts = [Text("red blue green grey " * (1 + i % 7)) for i in range(40)]
    pretrain.run(
        pretrain.Config(tokenizer="bytes", model=MODEL, row_length=24, batch=4, **settings(tmp_path, "base")),
        texts=texts,
        heldout=texts[:5],
    )
    assert late(compiled) == []

    def init(name: str) -> dict[str, Any]:
        return {"init": str(tmp_path / name), "batch": 4}

    sft.run(
        sft.Config(**init("base"), buckets=BUCKETS, **settings(tmp_path, "sft")),
        records=DEMONSTRATIONS,
        heldout=DEMONSTRATIONS[:9],
    )
    lengths = {batch_at(ragged(DEMONSTRATIONS), batch_size=4, seed=0, step=s).tokens_BT.shape for s in range(STEPS)}
    assert len(lengths) == 2
    assert late(compiled) == []

    tokenizer = RunFolder.open(tmp_path / "base", stages=("pretrain",)).tokenizer
    pairs = [Comparison(p, a, b, "here:1") for p, a, b in zip(PROMPTS, ANSWERS, reversed(ANSWERS), strict=True)]
    rows: RankingRows = encode_rankings(pairs, tokenizer, max_tokens=80, ledger=Ledger(), buckets=BUCKETS)
    reward.run(reward.Config(**init("sft"), **settings(tmp_path, "judge")), rankings=rows, heldout=rows)
    assert late(compiled) == []

    ppo.run(
        ppo.Config(
            **init("sft"),
            reward=str(tmp_path / "judge"),
            prompt_length=16,
            minibatches=2,
            pretraining_coef=1.0,
            pretraining_batch=4,
            pretraining_row_length=16,
            episode=EpisodeConfig(response_length=4),
            **settings(tmp_path, "ppo"),
        ),
        prompts=[Prompt(p, "here:1") for p in PROMPTS],
        texts=texts,
    )
    assert late(compiled) == []


def ragged(records: list[Demonstration]) -> RaggedRows:
    rows = [list(range(len(r.prompt) + len(r.completion) + 2)) for r in records]
    return RaggedRows([(ids, [True] * len(ids)) for ids in rows], limit=80, buckets=BUCKETS)


def test_each_row_length_is_met_at_the_step_that_says_so() -> None:
    ranked = RankingRows([([ids, ids[:5]], [1, 2]) for ids, _ in ragged(DEMONSTRATIONS).rows], 80, buckets=BUCKETS)
    kinds: list[Any] = [ragged(DEMONSTRATIONS), ranked, PackedRankingRows(ranked)]
    for rows in kinds:
        kind = type(rows).__name__
        found = new_lengths(rows, batch_size=4, seed=3, first=7, steps=40)
        met: list[int] = []
        for step in range(7, 40):
            length = jax.tree.leaves(batch_at(rows, batch_size=4, seed=3, step=step))[0].shape[-1]
            assert (step in found) == (length not in met), (kind, step)
            met.append(length)
        assert len(found) == len(np.unique(met)) >= 2, kind
