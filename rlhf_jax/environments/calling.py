"""An environment of a user's own, called on the policy's turns between sampling and the update; replies are checked."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.dialogues import TOOL, Message, prompt_row
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.reward_functions.user_code import one_line, run_limited

Environment = Callable[[Any, str], tuple[Any, Any, float, bool]]
"""(state, text) -> (state, observation, reward, done).

The first state is a copy of the prompt's row: a dict with the prompt and all further fields. text is what the policy
said in its turn, without special tokens. The observation is text, a message {"role": "user" | "tool", "content": …} if
the prompt is messages, or None once the episode is done; the reward is that of the turn.
"""
ROLES = ("user", TOOL)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Reply(NamedTuple):
    """What an environment replies to a turn."""

    state: Any
    observation: Message
    reward: float
    done: bool


class Caller:
    """Calls an environment on turns of episodes.

    Args:
      environment: the environment.
      name: its name in errors.
      prompts: the prompts, by row.
      timeout: time limit in seconds of the calls for one turn of all episodes, which then run in a thread of their own;
        0 for no limit and calls in the calling thread.
    """

    def __init__(self, environment: Environment, name: str, prompts: Sequence[Prompt], timeout: float = 60.0) -> None:
        self.environment = environment
        self.name = name
        self.prompts = prompts
        self.timeout = timeout

    def start(self, row: int) -> dict[str, Any]:
        """The first state of an episode, which is its own to change."""
        prompt = self.prompts[row]
        asked = prompt_row(prompt.turns) if prompt.turns else {"prompt": prompt.prompt}
        return copy.deepcopy({**asked, **prompt.columns})

    def __call__(self, rows: Sequence[int], states: Sequence[Any], texts: Sequence[str], turn: int) -> list[Reply]:
        """Replies to what the policy said in a turn of some episodes.

        Args:
          rows: row of each episode's prompt.
          states: state of each.
          texts: what the policy said.
          turn: number of the turn, from 0, for errors.

        Raises:
          UserError: naming the row and the turn, if the environment raises, takes too long, or replies with anything
            but a state, an observation that can be rendered, a finite number, and True or False.
        """
        found: list[Any] = []

        def work() -> None:
            for state, text in zip(states, texts, strict=True):
                found.append(self.environment(state, text))

        outcome = run_limited(work, self.timeout)
        at = len(found)
        where = [f"environment {self.name!r}: {self._place(row)}: turn {turn + 1}" for row in rows]
        if outcome is None:
            raise UserError(
                f"{where[min(at, len(where) - 1)]}: expected replies to {len(rows)} texts within {self.timeout:g} s, "
                f"got {at}; make it faster, or allow more with --reward-timeout (0: no limit)"
            )
        if outcome.error is not None:
            raise UserError(f"{where[at]}: {one_line(outcome.error)}, for the text {reprlib.repr(texts[at])}") from (
                outcome.error
            )
        return [
            self._reply(value, bool(self.prompts[row].turns), place)
            for value, row, place in zip(found, rows, where, strict=True)
        ]

    def _place(self, row: int) -> str:
        return self.prompts[row].where or f"prompt {row + 1}"

    def _reply(self, value: Any, is_dialogue: bool, where: str) -> Reply:
        if not isinstance(value, tuple | list) or len(value) != 4:
            raise UserError(f"{where}: expected (state, observation, reward, done), got {reprlib.repr(value)}")
        state, observation, reward, done = value
        reward, done = (one.item() if hasattr(one, "item") and not np.ndim(one) else one for one in (reward, done))
        if not isinstance(reward, int | float) or math.isnan(reward) or abs(reward) > _FLOAT32_MAX:
            raise UserError(f"{where}: expected a finite number as reward, got {reprlib.repr(reward)}")
        if not isinstance(done, bool):
            raise UserError(f"{where}: expected True or False for done, got {reprlib.repr(done)}")
        if done:
            return Reply(state, Message("user", ""), float(reward), True)
        return Reply(state, _message(observation, is_dialogue, where), float(reward), False)


def _message(observation: Any, is_dialogue: bool, where: str) -> Message:
    if isinstance(observation, str):
        return Message("user", observation)
    if not is_dialogue:
        raise UserError(
            f"{where}: expected a text as observation, since the prompt is a text, got {reprlib.repr(observation)}"
        )
    keys = set(observation) if isinstance(observation, dict) else set()
    if keys != {"role", "content"} or not isinstance(observation["content"], str) or observation["role"] not in ROLES:
        raise UserError(
            f'{where}: expected a text or a message {{"role": "user" or "tool", "content": text}} as observation, got '
            f"{reprlib.repr(observation)}"
        )
    return Message(observation["role"], observation["content"])
