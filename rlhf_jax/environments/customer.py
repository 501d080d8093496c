"""A simulated user by rules, who has a goal and says of it what is asked for."""

from __future__ import annotations

import re
from typing import Any

from rlhf_jax.errors import UserError


def customer(
    state: dict[str, Any], text: str, *, price: float = 0.05
) -> tuple[dict[str, Any], str | None, float, bool]:
    """An environment: a question about a part of the goal is answered with it; a turn without a question is the offer.

    The row's `goal` has the parts by name, such as {"drink": "tea", "size": "large"}. A question asks for a part by its
    name, "Which size?"; the reward of an offer is the share of the goal that it names, 1 for all of it.

    Args:
      state: the prompt's row.
      text: what the policy said.
      price: subtracted from the reward for each question.

    Raises:
      UserError: for a row without a goal.
    """
    goal = state.get("goal")
    if not isinstance(goal, dict) or not goal:
        raise UserError(f"field 'goal': expected an object of what the user wants, got {goal!r}")
    if "?" not in text:
        met = [_names(text, str(value)) for value in goal.values()]
        return state, None, sum(met) / len(met), True
    asked = [str(value) for part, value in goal.items() if _names(text, part)]
    return state, ", ".join(asked) or "I do not understand.", -price, False


def _names(text: str, phrase: str) -> bool:
    """True if the text has the phrase in whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None
