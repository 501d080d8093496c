"""Reward functions by name: from files and modules, and for the metrics and config.json of a run."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import reprlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.reward_functions.user_code import Outcome, one_line
from rlhf_jax.rewards import MODEL, Terms

RewardFunction = Callable[..., Any]


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


def load_function(spec: str, setting: str = "reward_function") -> RewardFunction:
    """The function FILE.py:NAME or package.module:NAME, or NAME(option=value, …) for one with these options.

    Args:
      spec: the name.
      setting: name of the setting that names it, for errors.

    Raises:
      UserError: if there is none, if its module cannot be imported, or if the options are not written as literals.
    """
    spec, options = _options(spec, setting)
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f"{setting}: expected FILE.py:NAME or package.module:NAME, got {spec!r}")
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise UserError(f"{setting} {spec}: expected a Python file, got no such file as {where}")
    # A file may import its neighbours, as a script does; a module is also looked for in the working directory.
    beside = str(Path(where).resolve().parent if is_file else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)
    with Outcome() as outcome:
        outcome.value = _import_file(Path(where)) if is_file else importlib.import_module(where)
    if outcome.error is not None:
        raise UserError(f"{setting} {spec}: importing {where} failed: {one_line(outcome.error)}") from outcome.error
    found = vars(outcome.value).get(name)
    if not callable(found):
        defined = [key for key, value in vars(outcome.value).items() if inspect.isfunction(value)]
        got = "no such name" if found is None else f"{reprlib.repr(found)}"
        raise UserError(
            f"{setting} {spec}: expected a function {name} in {where}, got {got}; its functions are "
            f"{', '.join(defined) or 'none'}"
        )
    if isinstance(found, types.FunctionType) and found.__qualname__ == "<lambda>":
        found.__qualname__ = name  # by which its term is logged
    if not options:
        return found
    try:
        inspect.signature(found).bind_partial(**options)
    except TypeError as error:
        raise UserError(f"{setting} {spec}: options {', '.join(options)}: {error}") from error
    return functools.partial(found, **options)


def _options(spec: str, setting: str) -> tuple[str, dict[str, Any]]:
    """The name of a function without its options, and these."""
    if "(" not in spec:
        return spec, {}
    bare, _, written = spec.partition("(")
    try:
        call = ast.parse(f"f({written}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{setting} {spec}: expected options as in {bare}(most=40), names with numbers, texts or lists, got "
            f"({written}"
        ) from error
    return bare, options


def spec_of(function: RewardFunction) -> str:
    """Name of a function in a run's config.json: module:NAME."""
    inner, _ = _without_partials(function)
    if isinstance(inner, types.FunctionType | types.MethodType | type | types.BuiltinFunctionType):
        return f"{inner.__module__}:{inner.__qualname__}"
    return f"{type(inner).__module__}:{type(inner).__qualname__}"


def fingerprint(functions: Sequence[RewardFunction]) -> str:
    """Hex SHA-256 of the functions' own code, by which a resumed run knows them; what they call is not part of it."""
    digest = hashlib.sha256()
    for function in functions:
        digest.update(f"{spec_of(function)} {_code(function)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _name(function: RewardFunction) -> str:
    return spec_of(function).rpartition(":")[2].rpartition(".")[2].strip("<>")


def _without_partials(function: RewardFunction) -> tuple[Any, list[Any]]:
    """The function within functools.partial, and what these give it."""
    given: list[Any] = []
    while isinstance(function, functools.partial):
        given += [*function.args, *sorted(function.keywords.items())]
        function = function.func
    return function, given


def _code(function: RewardFunction) -> str:
    inner, given = _without_partials(function)
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


def _import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    # Registered, as dataclasses look their module up; never in place of a module that others have imported.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
