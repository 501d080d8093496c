"""Conversion of settings to and from plain JSON, with each value checked against its field's type.

Used for files of defaults (`--config`) and for the config.json of a run folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from rlhf_jax.errors import UserError

T = TypeVar("T")


def to_plain(config: Any) -> dict[str, Any]:
    """Convert a config to plain JSON: nested dicts, lists, strings, numbers, booleans and nulls.

    Raises:
      TypeError: for a field that JSON cannot represent.
      ValueError: for an infinite number or NaN.
    """
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)))


def from_plain(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a config from plain JSON, checking each value against its field's type.

    Args:
      values: output of `to_plain`; fields with defaults may be missing.
      where: name of the source in error messages, e.g. a file name.

    Raises:
      UserError: for an unknown or missing field or a value of the wrong type; the message names `where` and the field.
    """

    def build(nested: type, fields: Mapping[str, Any], prefix: str) -> Any:
        for name, value in fields.items():
            if value is dataclasses.MISSING:
                raise UserError(f"{where}: field {prefix + name!r} is missing")
        return nested(**fields)

    return typing.cast(T, over_defaults(cls, coerce_fields(cls, values, where=where), build))


@dataclasses.dataclass(frozen=True)
class Partial:
    """Field values of a nested config that has not been built yet."""

    cls: type
    values: dict[str, Any]


def over_defaults(
    cls: type,
    values: Mapping[str, Any],
    build: Callable[[type, dict[str, Any], str], Any],
    *,
    base: Any = dataclasses.MISSING,
    prefix: str = "",
) -> Any:
    """Build a config from `values`, with defaults for all other fields.

    Args:
      values: output of `coerce_fields`.
      build: builds a config from its class, the values of all its fields (dataclasses.MISSING for a field with neither
        a value nor a default) and the dotted prefix of the field names.
      base: config that provides the defaults; a stage may override the defaults of the nested class.
      prefix: dotted prefix of the field names.
    """
    complete = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if base is not dataclasses.MISSING:
                default = getattr(base, field.name)
            value = values.get(field.name, default)
            if isinstance(value, Partial):
                inner = default if isinstance(default, value.cls) else dataclasses.MISSING
                value = over_defaults(value.cls, value.values, build, base=inner, prefix=f"{prefix}{field.name}.")
            complete[field.name] = value
    return build(cls, complete, prefix)


def coerce_fields(cls: type, values: Mapping[str, Any], *, where: str, prefix: str = "") -> dict[str, Any]:
    """Coerce the given values to the declared types of their fields; nested configs become `Partial`.

    Args:
      values: field names and plain values.
      where: name of the source in error messages.
      prefix: dotted prefix of the field names in error messages.

    Raises:
      UserError: for an unknown field or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    types_of = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known fields: {', '.join(sorted(fields))}"
            raise UserError(f"{where}: unknown field {prefix + str(name)!r}; {hint}")
    return {name: _coerce(types_of[name], value, where=where, name=prefix + name) for name, value in values.items()}


def _coerce(kind: Any, value: Any, *, where: str, name: str) -> Any:
    """Coerce `value` to the type `kind`. YAML parses 1e-3 as a string, so numbers may be given as text."""
    wrong = UserError(f"{where}: field {name!r}: expected {_type_name(kind)}, got {value!r}")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _coerce(arguments[0], value, where=where, name=name)
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1, cutoff=0.5)
        raise UserError(f"{wrong}{f'; did you mean {near[0]!r}?' if near else ''}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            try:
                return _coerce(argument, value, where=where, name=name)
            except UserError:
                continue
        raise wrong
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise wrong
        return Partial(kind, coerce_fields(kind, value, where=where, prefix=name + "."))
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            # A single file name given for a list of files means a list of one.
            if isinstance(value, str) and arguments[0] is str and (origin is list or arguments[-1] is Ellipsis):
                value = [value]
            else:
                raise wrong
        kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise wrong
        items = [
            _coerce(k, v, where=where, name=f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            number = float(value)
            if kind is float:
                return number
            if number != int(number):
                raise wrong
            return int(number) if isinstance(value, float) or "e" in str(value).lower() else int(value)
        except (ValueError, OverflowError):
            raise wrong from None
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is type(None) and value is None:
        return None
    if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    raise wrong


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(kind))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
