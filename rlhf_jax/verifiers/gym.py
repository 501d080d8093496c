"""Tasks of the package reasoning-gym: generated questions with their own verdicts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.verifiers.answers import final
from rlhf_jax.verifiers.worker import worker

# Some tasks evaluate what is said as an expression, which may take for ever, or raise.
_CODE = """
import functools
import reasoning_gym

@functools.lru_cache(64)
def questions(task, seed, size):
    return reasoning_gym.create_dataset(task, seed=seed, size=size)

def answer(question):
    task, seed, size, index, said = question
    dataset = questions(task, seed, size)
    return float(dataset.score_answer(said, dataset[index]))
"""


def gym(
    completions: Sequence[Any], answer: Sequence[Any], gym: Sequence[Any], *, after: str = "", seconds: float = 10.0
) -> list[float | None]:
    """The verdict of reasoning-gym on each completion, from 0 to 1; it gives a share for some answers that are near.

    The question is generated anew from its column, so that nothing of it has to be stored.

    Args:
      completions: answers.
      answer: column of the right answers.
      gym: column that `rlhf-jax task gym:NAME` writes, {"task", "seed", "size", "index"}; None for no verdict.
      after: mark that the answer stands behind, as in `verifiers.exact`; without it in a completion the verdict is 0.
      seconds: limit of one verdict, after which it is 0, as where the package fails.

    Raises:
      UserError: if the package is not installed, or generates another question by now.
    """

    def verdict(completion: Any, right: Any, place: Any) -> float | None:
        if place is None:
            return None
        try:
            dataset = questions(place["task"], place["seed"], place["size"])
            entry = dataset[place["index"]]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"field 'gym': expected {{'task', 'seed', 'size', 'index'}} as `rlhf-jax task gym:NAME` writes, got "
                f"{place!r}"
            ) from error
        if entry["answer"] != right:
            raise UserError(
                f"field 'answer': expected {entry['answer']!r}, which reasoning-gym has for {place!r}, got {right!r}; "
                "write the task again with the version that is installed"
            )
        said = final(completion, after)
        if said is None:
            return 0.0
        question = [*(place[name] for name in ("task", "seed", "size", "index")), said.strip()]
        return float(worker("gym", "reasoning-gym", _CODE).ask(question, seconds) or 0)

    return [verdict(*each) for each in zip(completions, answer, gym, strict=True)]


@functools.lru_cache(maxsize=64)
def questions(task: str, seed: int, size: int) -> Any:
    """A data set of reasoning-gym.

    Raises:
      UserError: if the package is not installed, or has no such task.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise UserError(f"gym: requires the package reasoning-gym; run: {install_command('verify')}") from None
    if task not in DATASETS:
        raise UserError(f"gym:{task}: expected a task of reasoning-gym, got no such name; it has {', '.join(DATASETS)}")
    return reasoning_gym.create_dataset(task, seed=seed, size=size)
