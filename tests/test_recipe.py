"""The recipe's command line and what its stages read; its figures are those of `rlhf-jax recipe` itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Demonstration, Prompt, PromptRows, RankingRows, Text
from rlhf_jax.demo.python_docs import Corpus, HeldOut
from rlhf_jax.recipe import run as recipe
from rlhf_jax.recipe.labels import Judge, some
from rlhf_jax.recipe.settings import RecipeConfig
from rlhf_jax.recipe.sizes import SIZES
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case

pytestmark = pytest.mark.demo

MISTAKES = [
    ("--seeds", "0", "seeds: expected 1 or more, got 0"),
    ("--seed", "-1", "seed: expected 0 or more, got -1"),
    ("--devices", "0", "devices: expected 1 or more, got 0"),
    ("--name", "../x", "name: expected a name below runs/, got '../x'"),
    ("--size", "huge", "invalid choice 'huge' for argument '--size'"),
    ("--sizes", "small", "unknown flag --sizes; did you mean --size?"),
]


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for row in MISTAKES:
        with case(row) as (flag, value, message):
            with pytest.raises(SystemExit) as end:
                main(["recipe", flag, value])
            said = capsys.readouterr()
            assert end.value.code == 2 and not said.out
            assert message in said.err and said.err.count("\n") == 1


def test_sizes_are_possible() -> None:
    for size in SIZES.values():
        with case(size):
            # A demonstration fits a packed row, and a row the context.
            assert size.prompt_tokens + size.response_tokens <= size.row_length <= size.model.context
            assert size.episodes % size.minibatches == 0
            assert size.pack == 0 or size.episodes // size.minibatches % size.pack == 0


def test_prompts_are_asked_again_from_the_first_where_there_are_fewer() -> None:
    prompts = PromptRows([[1], [2, 3]], 4, 0, [Prompt("a", "x:1"), Prompt("b", "x:2")])
    again = some(prompts, 3)
    assert again.rows == [[1], [2, 3], [1]] and [p.prompt for p in again.sources] == ["a", "b", "a"]
    assert some(prompts, 1).rows == [[1]]


def test_the_judge_counts_what_answers_have() -> None:
    tokenizer = Tokenizer.bytes()
    nothing = HeldOut([], [], [], {})
    corpus = Corpus([Text("return the path of it", "x")], [], [], [], nothing, nothing)
    judge = Judge(corpus, tokenizer)

    def said(text: str, ended: bool = True) -> list[int]:
        return [*tokenizer.encode(text), *([tokenizer.eos_id] if ended else [])]

    prompts = [Prompt(" open path ->", "x:1"), Prompt(" close ->", "x:2")]
    responses = [
        [said(" Return the path of it."), said(" Return the path of it.", ended=False), said(" Open path of path.")],
        [said(" Return it."), said(" No."), said(" Close it.")],
    ]
    np.testing.assert_allclose(judge.scores(prompts, responses), [[7.0, 5.8, 5.8], [4.6, 3.4, 5.8]], atol=1e-12)
    shares = judge.shares(prompts, responses)
    assert shares == {
        "finished_share": 5 / 6,
        "topic_share": 4 / 6,
        "known_share": 5 / 6,
        "concise_share": 3 / 6,
        "fluent_share": 5 / 6,
        "sensible_share": 3 / 6,
        "sensible_fluent_share": 2 / 6,
    }


class Sealed:
    """A part of the corpus that nothing may read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test part was read: {name}")


def test_no_stage_reads_the_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.bytes()
    seen: dict[str, Any] = {}
    text, shown = Text("return the path", "x:1"), Demonstration(" a ->", " Return the path.", "x:1")
    part = HeldOut([Text("held", "x:2")], [Demonstration(" b ->", " Held.", "x:2")], [Prompt(" b ->", "x:2")], {})
    sealed: Any = Sealed()
    corpus = Corpus([text], [shown], [Prompt(" a ->", "x:1")], [], part, sealed)
    finished = SimpleNamespace(run=SimpleNamespace(path=tmp_path, tokenizer=tokenizer), summary={})

    def stage(name: str) -> Any:
        def run(config: Any, **given: Any) -> Any:
            seen[name] = given
            if "evaluate" in given:
                seen["gold"] = given["evaluate"](SimpleNamespace(params={"policy": {}}))
            return finished

        return run

    def sampler(model: Any, tokenizer: Any, response_tokens: int) -> Any:
        def sample(params: Any, prompts: PromptRows, *rest: Any) -> list[list[list[int]]]:
            assert {prompt.prompt for prompt in prompts.sources} == {" b ->"}
            return [[tokenizer.encode(" No.")] for _ in prompts.sources]

        return sample

    rankings = RankingRows([([[1], [2]], (1, 2))], 44, tokenizer.pad_id)
    changes: dict[str, Any] = {
        "load_corpus": lambda: corpus,
        "model_of": lambda run: ModelConfig(vocab_size=300, context=64, width=8, layers=1, heads=1),
        "released_params": lambda run: {},
        "Sampler": sampler,
        "label": lambda sampler, judge, params, prompts, **more: seen.update(label=prompts) or (rankings, 1.0),
        "gold_rankings": lambda sampler, judge, params, prompts, seed: seen.update(gold_rankings=prompts) or rankings,
        "measure": lambda runs, corpus, *rest, **more: {"read": corpus.test is sealed},
        "tell": lambda config, console, clock, summary: seen.update(summary=summary),
    }
    for name, change in changes.items():
        monkeypatch.setattr(recipe, name, change)
    for name in ("pretrain", "sft", "reward", "ppo"):
        monkeypatch.setattr(getattr(recipe, name), "run", stage(name))
    recipe.run_seed(RecipeConfig(size="tiny", out=str(tmp_path / "out")))
    assert seen["pretrain"] == {"texts": [text], "heldout": part.texts}
    assert seen["sft"] == {"records": [shown], "heldout": part.demonstrations}
    assert [prompt.prompt for prompt in seen["label"].sources] == [" a ->"]
    assert [prompt.prompt for prompt in seen["gold_rankings"].sources] == [" b ->"]
    assert seen["reward"] == {"rankings": rankings, "heldout": rankings, "demonstrations": [shown]}
    assert [prompt.prompt for prompt in seen["ppo"]["prompts"]] == [" a ->"] and seen["ppo"]["texts"] == [text]
    assert set(seen["gold"]) == {"gold"} and seen["summary"]["read"]
