"""Settings to and from plain JSON, each value checked against the type of its field.

Files of defaults (`--config`) and the config.json of a run folder both come through here.
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
    """A config as plain JSON: nested dicts, lists, strings, numbers, booleans and nulls.

    Raises: TypeError for a field that JSON cannot hold, ValueError for an infinite or undefined number.
    """
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)))


def from_plain(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A config from plain JSON, each value checked against its field's type.

    Args:
      values: what `to_plain` gives; fields with defaults may be missing.
      where: what messages call the source, e.g. a file's name.
    Raises: UserError for an unknown or missing field and for a value of another type, naming `where` and the field.
    """

    def build(nested: type, fields: Mapping[str, Any], prefix: str) -> Any:
        for name, value in fields.items():
            if value is dataclasses.MISSING:
                raise UserError(f"{where}: field {prefix + name!r} is missing")
        return nested(**fields)

    return typing.cast(T, over_defaults(cls, coerce_fields(cls, values, where=where), build))


@dataclasses.dataclass(frozen=True)
class Partial:
    """Some fields of a nested config, not yet made into one."""

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
    """A config of `values` where given and of the defaults elsewhere.

    Args:
      values: what `coerce_fields` gives.
      build: makes a config from its class, the values of all its fields (dataclasses.MISSING where there is neither
        value nor default) and the dotted prefix of their names.
      base: the config that is the default here; a stage's default may differ from that of the class.
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
    """The given fields with values of their declared types; nested configs come as `Partial`.

    Raises: UserError as `from_plain`.
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
    """`value` as the type `kind`, or UserError. YAML reads 1e-3 as a string, so numbers may come as text."""
    wrong = UserError(f"{where}: field {name!r}: found {value!r}, wanted {_type_name(kind)}")
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
            # One file where several may stand is meant as a list of one.
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
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
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
    if kind is str and isinstance(value, str):
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
