"""Typed access to the fields of a config.json, with clear errors for missing fields and wrong types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError


class Fields:
    """The fields of a JSON object.

    The readers return `default` for a missing key, and raise UserError if there is no default. A null counts as
    missing, unless `null` gives its meaning.

    Args:
      values: the object.
      where: the file and place of the object, which errors begin with.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, null: int | None = None, least: int = 1) -> int:
        """A whole number, at least `least` where the field is present."""
        value = self._value(name, default, null)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number")
        if name in self and value < least:
            raise self.wrong(name, f"at least {least}")
        return value

    def number(self, name: str, default: float | None = None, *, null: float | None = None) -> float:
        """A finite number."""
        value = self._value(name, default, null)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default, None)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def word(self, name: str, meanings: Mapping[str, Any], default: str | None = None) -> Any:
        """The meaning of a word, looked up in `meanings`."""
        value = self._value(name, default, None)
        if not isinstance(value, str) or value not in meanings:
            raise self.wrong(name, "one of " + ", ".join(meanings))
        return meanings[value]

    def inner(self, name: str) -> Fields:
        """A nested object, empty if missing."""
        value = self._value(name, {}, None)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def refuse(self, name: str, *, unless: Any) -> None:
        """Reject a setting that this library's transformer does not have.

        Raises:
          UserError: if the field is present and differs from `unless`.
        """
        if name in self and self.values[name] != unless:
            raise UserError(
                f"{self.where}: field {name!r}: expected {unless!r}, got {self.values[name]!r}, which is not supported"
            )

    def wrong(self, name: str, expected: str) -> UserError:
        """The error for a field's value, or for a missing field."""
        got = f"{self.values[name]!r:.100}" if name in self else "nothing"
        return UserError(f"{self.where}: field {name!r}: expected {expected}, got {got}")

    def _value(self, name: str, default: Any, null: Any) -> Any:
        if name in self:
            return self.values[name]
        return null if name in self.values and null is not None else default
