"""Range checks for settings; each raises a `UserError` that names the field."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

from rlhf_jax.errors import UserError

HINT = "hint"


def hinted(default: Any, hint: str = "required") -> Any:
    """Field whose help on the command line ends in "(hint)" in place of its default.

    "required" marks what a command needs, though a program may give records in its place.
    """
    return dataclasses.field(default=default, metadata={HINT: hint})


def at_least(config: Any, field: str, low: float) -> None:
    """Check that a numeric field is at least `low`, or None.

    Raises:
      UserError: if it is not.
    """
    value = getattr(config, field)
    if value is not None and not value >= low:
        raise UserError(f"{field}: expected {low} or more, got {value}")


def within(config: Any, field: str, low: float, below: float) -> None:
    """Check that a numeric field is at least `low` and less than `below`.

    Raises:
      UserError: if it is not.
    """
    value = getattr(config, field)
    if not low <= value < below:
        raise UserError(f"{field}: expected {low} or more and less than {below}, got {value}")


def columns_setting(config: Any) -> None:
    """Check that columns are FIELD=COLUMN, each field once.

    Raises:
      UserError: if one is not.
    """
    fields = []
    for entry in config.columns:
        field, equals, column = entry.partition("=")
        if not (field and equals and column):
            raise UserError(f"columns: expected FIELD=COLUMN, such as prompt=task, got {entry!r}")
        fields.append(field)
    if len(set(fields)) < len(fields):
        raise UserError(f"columns: expected each field once, got {', '.join(config.columns)}")


def ceil_product(factor: float, count: int) -> int:
    """Returns factor × count rounded up, with the factor as it is written: 0.1 × 30 is 3, not 3.0000000000000004."""
    return math.ceil(Fraction(repr(float(factor))) * count)


def row_settings(config: Any) -> None:
    """Check columns, epochs, held-out share, max_tokens and buckets of a stage with rows of different lengths.

    Raises:
      UserError: if one of them is out of range.
    """
    columns_setting(config)
    if config.epochs is not None:
        within(config, "epochs", 0, math.inf)
        if config.steps is not None:
            raise UserError(
                f"epochs: expected epochs or steps, got {config.epochs:g} epochs and {config.steps} steps; use one of "
                "the two"
            )
    within(config, "heldout_fraction", 0, 1)
    if config.max_tokens is not None:
        at_least(config, "max_tokens", 1)
    if any(bucket < 1 for bucket in config.buckets):
        raise UserError(f"buckets: expected lengths of 1 or more, got {min(config.buckets)}")
