"""Sampled answers as training data: what is kept of them, and the files as the stages read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_jax.cli import sampling
from rlhf_jax.cli.sample import Config
from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Ledger, Message, Prompt, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.evaluation.chosen import chosen_rows
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.core

NAN = float("nan")
# (texts, scores, keep, lowest score) -> what becomes of them
CHOICES: list[tuple[list[str], list[float], Any, float | None, Any]] = [
    (["a", "b", "c"], [1, 3, 2], "best", None, [{"completion": "b"}]),
    (["a", "b", "c"], [3, 3, 2], "best", 3.0, [{"completion": "a"}]),
    (["a", "b"], [1, 2], "best", 2.5, "no answer scores 2.5 or more"),
    (["a", " ", "c"], [1, 9, 0], "best", None, [{"completion": "a"}]),
    (["", " "], [1, 2], "best", None, "only empty answers"),
    (["a", "b"], [NAN, 0], "best", None, [{"completion": "b"}]),
    (["a", "b"], [NAN, NAN], "best", None, "no answer has a score"),
    (["a", "b", "cut"], [1, 3, 2], "pairs", None, [{"chosen": "b", "rejected": "a"}]),
    (["a", "cut"], [1, 3], "pairs", None, [{"chosen": "cut", "rejected": "a", "ended_chosen": False}]),
    (["a", "cut"], [3, 1], "pairs", None, [{"chosen": "a", "rejected": "cut", "ended_rejected": False}]),
    (["a", "b"], [1, 1], "pairs", None, "all answers score the same"),
    (["a", "a"], [1, 2], "pairs", None, "all answers are the same"),
    (["a", "b", "cut"], [1, 3, 1], "rankings", None,
     [{"responses": ["b", "a", "cut"], "ranks": [1, 2, 2], "ended": [True, True, False]}]),
    (["a", "cut"], [], "all", None, [{"completion": "a"}, {"completion": "cut", "ended": False}]),
]  # fmt: skip


def test_what_is_kept_of_the_answers_to_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for one in CHOICES:
        for turns in ((), (Message("user", "q"),)):
            with case((turns, one)) as (_, (texts, scores, keep, least, wanted)):
                prompt = Prompt("q", "prompts.jsonl:1", turns)
                answers = [[Answer(text, text != "cut") for text in texts]]
                scores_PK = np.array([scores]) if scores else None
                ledger = Ledger()
                rows = list(chosen_rows([prompt], answers, scores_PK, keep, ledger, at_least=least))
                if isinstance(wanted, str):
                    assert not rows and ledger.decisions[0].reason == wanted
                    continue

                def said(value: Any, turns: Any = turns) -> Any:
                    if isinstance(value, list):
                        return [said(each) for each in value]
                    return [{"role": "assistant", "content": value}] if turns and isinstance(value, str) else value

                asked = {"prompt": [{"role": "user", "content": "q"}] if turns else "q"}
                assert rows == [asked | {name: said(value) for name, value in row.items()} for row in wanted]
                assert ledger.accepted == 1
                # The stage that they are for reads them.
                kind: Any = {"pairs": "comparisons", "rankings": "rankings"}.get(keep, "demonstrations")
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                records = read_records(path, kind, read := Ledger())
                assert len(records) == len(wanted) and not read.decisions
                assert all(record.turns == turns for record in records)


def test_the_command_writes_what_a_stage_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=24, width=8, layers=1, heads=1)
    for name, stage, scalar in (("model", "sft", False), ("judge", "reward", True)):
        write_run(tmp_path / name, stage, random_params(model, scalar=scalar), model, Tokenizer.bytes())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n{"prompt": "' + "long" * 9 + '"}\n')
    (tmp_path / "count.py").write_text(
        "def size(completions, **_): return [len(text.encode()) for text in completions]"
    )

    def sample(name: str, **more: Any) -> list[dict[str, Any]]:
        paths = {"run": str(tmp_path / "model"), "prompts": (str(tmp_path / "prompts.jsonl"),)}
        settings: dict[str, Any] = {"samples": 4, "max_new_tokens": 6, "out": str(tmp_path / name)} | paths | more
        sampling.run(Config(**settings))
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    judged = sample("best.jsonl", reward=str(tmp_path / "judge"))
    said = capsys.readouterr()
    assert [row["prompt"] for row in judged] == ["ab", "cd"] and "longer than 18 tokens" in said.err
    assert said.out == f"{tmp_path / 'best.jsonl'}: 2 rows\n"
    every = sample("all.jsonl", keep="all")
    answers = [row["completion"] for row in every if row["prompt"] == "ab"]
    assert judged[0]["completion"] in answers and len(answers) == 4
    longest = sample("long.jsonl", reward_function=f"{tmp_path / 'count.py'}:size")
    assert len(longest[0]["completion"].encode()) == max(len(answer.encode()) for answer in answers)
    (pair,) = sample("pairs.jsonl", reward=str(tmp_path / "judge"), keep="pairs", prompts=_only(tmp_path, "ab"))
    assert pair["chosen"] == judged[0]["completion"] and pair["rejected"] in answers
    with pytest.raises(UserError, match=r"best.jsonl; give another --out"):
        sample("best.jsonl", reward=str(tmp_path / "judge"))
    with pytest.raises(UserError, match=r"model: expected an answer to keep, got none"):
        sample("none.jsonl", reward_function=f"{tmp_path / 'count.py'}:size", at_least=1e6)
    assert not (tmp_path / "none.jsonl").exists()


def _only(folder: Path, prompt: str) -> tuple[str]:
    (folder / "one.jsonl").write_text(json.dumps({"prompt": prompt}))
    return (str(folder / "one.jsonl"),)


def test_settings_that_do_not_fit_are_refused() -> None:
    good: dict[str, Any] = {"run": "m", "prompts": ("p",), "out": "o", "reward": "j"}
    for changes, message in (
        ({"out": ""}, "out: expected a file, got nothing"),
        ({"reward": ""}, "keep best: expected one scorer, got none"),
        ({"reward_function": "f.py:f"}, "keep best: expected one scorer, got a reward model and a reward function"),
        ({"keep": "all"}, "keep all: expected no scorer, as all answers are kept, got one"),
        ({"samples": 1}, "samples: expected 2 or more to choose from with keep best, got 1"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"at_least": NAN}, "at_least: expected a finite score"),
    ):
        with case(changes), pytest.raises(UserError, match=message):
            Config(**(good | changes))
    Config(**(good | {"keep": "all", "reward": "", "samples": 1}))
