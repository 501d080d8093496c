"""Rewards as weighted sums of terms: a reward model's score, and functions of text.

A reward function is f(prompts, completions, **columns) -> one number for each completion, as in TRL. It runs on the
host, between sampling and the update: `RewardFunctions` calls the functions and checks what they return, `compose` adds
the terms up inside the compiled update.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import reprlib
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array
from rlhf_jax.errors import UserError
from rlhf_jax.masked import masked_mean

RewardFunction = Callable[..., Any]
MODEL = "model"
"""Name of the reward model's term."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Terms(NamedTuple):
    """Terms of a composed reward; the reward model's, if there is one, comes first.

    Attributes:
      names: names in the metrics, each once.
      weights: factors of the terms in the sum.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]


def compose(
    terms: Terms, model_B: Array | None, value_BN: Array, axis_name: str | None = None
) -> tuple[Array, dict[str, Array]]:
    """The reward of each response, Σ_n w_n r_n over the terms that apply to it, and the mean of each term.

    Args:
      terms: names and weights.
      model_B: normalized score of the reward model, or None without one.
      value_BN: value of each function; NaN where the function does not apply.
      axis_name: mapped axis over which the rows are split; the means are then shares, to be summed over it.

    Returns:
      (reward [B], {"reward/NAME": mean of the term over the responses that it applies to, 0 if to none}).
    """
    columns = [] if model_B is None else [(model_B, jnp.ones(model_B.shape, bool))]
    columns += [(value_BN[:, n], ~jnp.isnan(value_BN[:, n])) for n in range(value_BN.shape[1])]
    reward_B = jnp.zeros(value_BN.shape[0], jnp.float32)
    metrics = {}
    for name, weight, (term_B, applies_B) in zip(terms.names, terms.weights, columns, strict=True):
        reward_B += weight * jnp.where(applies_B, term_B, 0.0)
        metrics[f"reward/{name}"] = masked_mean(term_B, applies_B, axis_name)
    return reward_B, metrics


def make_terms(functions: Sequence[RewardFunction], weights: Sequence[float], *, model: bool) -> Terms:
    """Names and weights of the terms; a name that occurs again gets a number.

    Args:
      functions: the reward functions.
      weights: one for each term, or none for 1 each.
      model: True if a reward model's score is the first term.

    Raises:
      UserError: if the number of weights is another.
    """
    names: list[str] = [MODEL] if model else []
    for function in functions:
        name, number = _name(function), 2
        while name in names:
            name, number = f"{_name(function)}_{number}", number + 1
        names.append(name)
    if weights and len(weights) != len(names):
        raise UserError(
            f"reward_weights: expected {len(names)}, one for each of {', '.join(names)}, got {len(weights)}"
        )
    return Terms(tuple(names), tuple(weights) or (1.0,) * len(names))


def load_function(spec: str) -> RewardFunction:
    """The function FILE.py:NAME or package.module:NAME.

    Raises:
      UserError: if there is none, or if its module cannot be imported.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f"reward_function: expected FILE.py:NAME or package.module:NAME, got {spec!r}")
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise UserError(f"reward_function {spec}: expected a Python file, got no such file as {where}")
    # A file may import its neighbours, as a script does; a module is also looked for in the working directory.
    beside = str(Path(where).resolve().parent if is_file else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)
    with _Outcome() as outcome:
        outcome.value = _import_file(Path(where)) if is_file else importlib.import_module(where)
    if outcome.error is not None:
        raise UserError(f"reward_function {spec}: importing {where} failed: {_one_line(outcome.error)}") from (
            outcome.error
        )
    found = vars(outcome.value).get(name)
    if not callable(found):
        defined = [key for key, value in vars(outcome.value).items() if inspect.isfunction(value)]
        got = "no such name" if found is None else f"{reprlib.repr(found)}"
        raise UserError(
            f"reward_function {spec}: expected a function {name} in {where}, got {got}; its functions are "
            f"{', '.join(defined) or 'none'}"
        )
    if isinstance(found, types.FunctionType) and found.__qualname__ == "<lambda>":
        found.__qualname__ = name  # by which its term is logged
    return found


def spec_of(function: RewardFunction) -> str:
    """Name of a function in a run's config.json: module:NAME."""
    inner = _unwrapped(function)
    if isinstance(inner, types.FunctionType | types.MethodType | type | types.BuiltinFunctionType):
        return f"{inner.__module__}:{inner.__qualname__}"
    return f"{type(inner).__module__}:{type(inner).__qualname__}"


def fingerprint(functions: Sequence[RewardFunction]) -> str:
    """Hex SHA-256 of the functions' own code, by which a resumed run knows them; what they call is not part of it."""
    digest = hashlib.sha256()
    for function in functions:
        digest.update(f"{spec_of(function)} {_code(function)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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
            if value is not None and not _is_finite(value):
                raise UserError(
                    f"{name}: {self.places[row]}: expected a finite number or None, got {reprlib.repr(value)} for the "
                    f"completion {reprlib.repr(completion)}"
                )
        return [None if value is None else float(value) for value in values]

    def _call(self, n: int, rows: Sequence[int], completions: Sequence[str]) -> _Outcome | None:
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
        return _run(lambda: self.functions[n](**arguments), self.timeout)

    def _culprit(self, n: int, rows: Sequence[int], completions: Sequence[str], error: BaseException) -> str:
        """The row on which the function raises alone, if one does, and the error."""
        stop = time.monotonic() + (self.timeout or math.inf)
        for row, completion in zip(rows, completions, strict=True):
            alone = self._call(n, [row], [completion])
            if alone is None or time.monotonic() > stop:
                break
            if alone.error is not None:
                return f"{self.places[row]}: {_one_line(alone.error)}, for the completion {reprlib.repr(completion)}"
        return f"{self.places[rows[0]]} and the {len(rows) - 1} next prompts together: {_one_line(error)}"


class _Outcome(contextlib.AbstractContextManager["_Outcome"]):
    """What a user's code returned or raised."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool:
        self.error = error
        # Ctrl-C and sys.exit end the program.
        return isinstance(error, Exception)


def _run(call: Callable[[], Any], seconds: float) -> _Outcome | None:
    """Calls a user's function, in a thread of its own if there is a time limit; None if it is exceeded."""
    outcome = _Outcome()

    def work() -> None:
        with outcome:
            outcome.value = call()

    if not seconds:
        work()
        return outcome
    # A daemon: a thread cannot be ended from outside, and the program must not wait for one that hangs.
    thread = threading.Thread(target=work, daemon=True, name="reward function")
    thread.start()
    thread.join(seconds)
    return None if thread.is_alive() else outcome


def _taken(function: RewardFunction, name: str, fields: Sequence[str]) -> list[str]:
    """The arguments that a function is given: those that it names, or all if it has **columns."""
    offered = ["prompts", "completions", *fields]
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


def _name(function: RewardFunction) -> str:
    return spec_of(function).rpartition(":")[2].rpartition(".")[2].strip("<>")


def _unwrapped(function: RewardFunction) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _code(function: RewardFunction) -> str:
    given: list[Any] = []
    while isinstance(function, functools.partial):
        given += [*function.args, *sorted(function.keywords.items())]
        function = function.func
    inner: Any = function
    if not isinstance(inner, types.FunctionType | types.MethodType | type | types.BuiltinFunctionType):
        inner = type(inner).__call__
    inner = inspect.unwrap(inner)
    code = inner.__code__ if isinstance(inner, types.FunctionType | types.MethodType) else None
    if code is None:
        return str(list(map(_plain, given)))
    held = inner.__func__ if isinstance(inner, types.MethodType) else inner
    given += [*(held.__defaults__ or ()), *sorted((held.__kwdefaults__ or {}).items())]
    given += [cell.cell_contents for cell in held.__closure__ or () if cell != types.CellType()]
    return f"{_content(code)} {list(map(_plain, given))}"


def _plain(value: Any) -> str:
    """A value as text if it is plain, else its type alone, as the text of an object has its address."""
    if isinstance(value, tuple | list):
        return str(list(map(_plain, value)))
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _content(constant: Any) -> str:
    """Content of a constant of a function, without file names and line numbers; a set in a fixed order."""
    if isinstance(constant, types.CodeType):
        parts = (constant.co_names, constant.co_varnames[: constant.co_argcount + constant.co_kwonlyargcount])
        return f"{constant.co_code.hex()} {parts} {[_content(inner) for inner in constant.co_consts]}"
    if isinstance(constant, frozenset):
        return str(sorted(map(_content, constant)))
    return repr(constant)


def _as_list(result: Any) -> list[Any] | None:
    """The values as a list; None for anything that is not a row of values. Arrays and tensors have `tolist`."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return None
    return [value.item() if hasattr(value, "item") and not np.ndim(value) else value for value in result]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _FLOAT32_MAX


def _import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    # Registered, as dataclasses look their module up; never in place of a module that others have imported.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _one_line(error: BaseException) -> str:
    """Type and message of an error on one line, and the place in the user's code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    place = f" ({own[0].filename}:{own[0].lineno})" if own else ""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
