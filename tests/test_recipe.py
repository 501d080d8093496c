"""The recipe's command line; its figures are those of scripts/recipe.py itself."""

import pytest

from rlhf_jax.data import Prompt, PromptRows
from scripts import cli, recipe
from scripts.recipe_labels import some
from scripts.recipe_sizes import SIZES, Size


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seeds", "0", "seeds: found 0, wanted 1 or more"),
        ("--seed", "-1", "seed: found -1, wanted 0 or more"),
        ("--devices", "0", "devices: found 0, wanted 1 or more"),
        ("--name", "../x", "name: found '../x', wanted a name below runs/"),
        ("--size", "huge", "invalid choice 'huge' for argument '--size'"),
        ("--sizes", "small", "unknown flag --sizes; did you mean --size?"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(recipe.run, recipe.Config, "", [flag, value])
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out
    assert message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes_are_possible(size: Size) -> None:
    assert size.prompt_tokens + size.response_tokens <= size.model.context and size.row_length <= size.model.context
    assert size.episodes % size.minibatches == 0


def test_prompts_are_asked_again_from_the_first_where_there_are_fewer() -> None:
    prompts = PromptRows([[1], [2, 3]], 4, 0, [Prompt("a", "x:1"), Prompt("b", "x:2")])
    again = some(prompts, 3)
    assert again.rows == [[1], [2, 3], [1]] and [p.prompt for p in again.sources] == ["a", "b", "a"]
    assert some(prompts, 1).rows == [[1]]
