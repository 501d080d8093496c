"""Mathematical expressions compared by the package math-verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_jax.rewards import text_of
from rlhf_jax.verifiers.answers import listed
from rlhf_jax.verifiers.worker import worker

# The package limits the time of parsing and comparing by signals, which only a main thread gets, and rewards are called
# in another.
_CODE = """
from math_verify import parse, verify

def answer(question):
    said, right = question
    parsed = parse(said)
    # A right answer is often LaTeX without the signs that say so.
    return any(verify(parse(form % one), parsed) for one in right for form in ("%s", "$%s$"))
"""


def equal_expression(completions: Sequence[Any], answer: Sequence[Any], *, seconds: float = 10.0) -> list[float | None]:
    """1 where the last expression in the completion equals the right answer, such as 1/2, 0.5 and \\frac12, else 0.

    Args:
      completions: answers; LaTeX is found in \\boxed{…}, $…$ and the like.
      answer: column of the right answers, each a text or a list of texts; None for no verdict.
      seconds: limit of one comparison, after which it counts as unequal.

    Raises:
      UserError: if math-verify is not installed.
    """

    def verdict(completion: Any, right: Any) -> float | None:
        if right is None:
            return None
        question = [text_of(completion), [str(one) for one in listed(right)]]
        return float(worker("equal_expression", "math-verify", _CODE).ask(question, seconds) or 0)

    return [verdict(*each) for each in zip(completions, answer, strict=True)]
