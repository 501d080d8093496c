"""The recipe's command line; its figures are those of `rlhf-jax recipe` itself."""

import numpy as np
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.data import Prompt, PromptRows, Text
from rlhf_jax.demo.python_docs import Corpus, HeldOut
from rlhf_jax.recipe.labels import Judge, some
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
