"""Reward functions called on prompts and completions, between sampling and the update; what they return is checked."""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.reward_functions.loading import RewardFunction
from rlhf_jax.reward_functions.user_code import Outcome, one_line, run_limited

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class RewardFunctions:
    """Reward functions on the prompts of a data set; calling it returns their values for some rows, [B, N] float32.

    Args:
      functions: N functions f(prompts, completions, **columns) -> one number for each completion, or None where the
        function does not apply. A function without **columns gets only the columns that it names.
      names: name of each in errors.
      prompts: prompt of each row: text, or messages {"role": …, "content": …}.
      columns: further fields of each row; a function gets None for a field that a row lacks.
      places: "file:line" of each row, for errors.
      required: True if a row needs a value of at least one function.
      timeout: time limit of a call in seconds, which then runs in a thread of its own; 0 for no limit and a call in the
        calling thread, as functions that use signals need.

    Raises:
      UserError: if a function has a required parameter that no row has a field for.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        names: Sequence[str],
        *,
        prompts: Sequence[str | list[dict[str, str]]],
        columns: Sequence[Mapping[str, Any]],
        places: Sequence[str],
        required: bool = True,
        timeout: float = 60.0,
    ) -> None:
        self.functions = tuple(functions)
        self.names = tuple(names)
        self.prompts = prompts
        self.columns = columns
        self.places = [place or f"prompt {row + 1}" for row, place in enumerate(places)]
        self.required = required
        self.timeout = timeout
        fields = list(dict.fromkeys(field for row in columns for field in row))
        self._taken = [_taken(function, name, fields) for function, name in zip(functions, names, strict=True)]

    def __call__(self, rows: Sequence[int], completions: Sequence[str]) -> np.ndarray:
        """Values of the functions for one completion of each row; NaN where a function does not apply.

        Raises:
          UserError: naming the function and the row, if a function raises, takes too long, or returns anything but a
            finite number or None for each completion; and if no function applies to a row.
        """
        values = [self._values(n, rows, completions) for n in range(len(self.functions))]
        for row, of_row in zip(rows, zip(*values, strict=True), strict=True):
            if self.required and all(value is None for value in of_row):
                raise UserError(
                    f"reward function {' and '.join(map(repr, self.names))}: {self.places[row]}: expected a number "
                    "from at least one, as there is no reward model, got None"
                )
        return np.array([[math.nan if value is None else value for value in of] for of in values], np.float32).T

    def _values(self, n: int, rows: Sequence[int], completions: Sequence[str]) -> list[float | None]:
        name, first = f"reward function {self.names[n]!r}", self.places[rows[0]]
        outcome = self._call(n, rows, completions)
        if outcome is None:
            raise UserError(
                f"{name}: expected an answer within {self.timeout:g} s for {len(rows)} completions, the first to "
                f"{first}, got none; make it faster, or allow more with --reward-timeout (0: no limit)"
            )
        if outcome.error is not None:
            raise UserError(f"{name}: {self._culprit(n, rows, completions, outcome.error)}") from outcome.error
        values = _as_list(outcome.value)
        if values is None or len(values) != len(rows):
            got = reprlib.repr(outcome.value) if values is None else f"{len(values)} values"
            raise UserError(
                f"{name}: expected a list of {len(rows)} numbers, one for each completion (the first to {first}), got "
                f"{got}"
            )
        for row, completion, value in zip(rows, completions, values, strict=True):
            if not (value is None or (isinstance(value, int | float) and abs(value) <= _FLOAT32_MAX)):
                raise UserError(
                    f"{name}: {self.places[row]}: expected a finite number or None, got {reprlib.repr(value)} for the "
                    f"completion {reprlib.repr(completion)}"
                )
        return [None if value is None else float(value) for value in values]

    def _call(self, n: int, rows: Sequence[int], completions: Sequence[str]) -> Outcome | None:
        """Calls a function; None if it took longer than the time limit."""
        prompts = [self.prompts[row] for row in rows]
        # TRL's forms: text to text, and to messages a list with the assistant's message.
        answers = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        given: dict[str, Any] = {"prompts": prompts, "completions": answers}
        arguments = {
            field: given[field] if field in given else [self.columns[row].get(field) for row in rows]
            for field in self._taken[n]
        }
        return run_limited(lambda: self.functions[n](**arguments), self.timeout)

    def _culprit(self, n: int, rows: Sequence[int], completions: Sequence[str], error: BaseException) -> str:
        """The row on which the function raises alone, if one does, and the error."""
        stop = time.monotonic() + (self.timeout or math.inf)
        for row, completion in zip(rows, completions, strict=True):
            alone = self._call(n, [row], [completion])
            if alone is None or time.monotonic() > stop:
                break
            if alone.error is not None:
                return f"{self.places[row]}: {one_line(alone.error)}, for the completion {reprlib.repr(completion)}"
        return f"{self.places[rows[0]]} and the {len(rows) - 1} next prompts together: {one_line(error)}"


def _taken(function: RewardFunction, name: str, fields: Sequence[str]) -> list[str]:
    """The arguments that a function is given: those that it names, or all if it has **columns."""
    # An option that functools.partial gives is none of the columns.
    given = function.keywords if isinstance(function, functools.partial) else {}
    offered = [field for field in ("prompts", "completions", *fields) if field not in given]
    for field in ("prompts", "completions"):
        if field in fields:
            raise UserError(
                f"reward function {name!r}: field {field!r} of the prompts: expected another name, as the {field} are "
                "given under this one"
            )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have no signature
        return offered
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if parameter.kind is parameter.VAR_KEYWORD or not required:
            continue
        if parameter.name not in offered or parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(
                f"reward function {name!r}: parameter {parameter.name!r}: expected one of prompts, completions and the "
                f"fields of the prompts, by name; the fields are {', '.join(fields) or 'none but prompt'}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    named = {parameter.name for parameter in parameters}
    return [field for field in offered if field in named]


def _as_list(result: Any) -> list[Any] | None:
    """The values as a list; None for anything that is not a row of values. Arrays and tensors have `tolist`."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return None
    return [value.item() if hasattr(value, "item") and not np.ndim(value) else value for value in result]
