"""Range checks for settings; each raises a `UserError` that names the field."""

from __future__ import annotations

from typing import Any

from rlhf_jax.errors import UserError


def at_least(config: Any, field: str, low: float) -> None:
    """Check that a numeric field is at least `low`.

    Raises:
      UserError: if it is not.
    """
    value = getattr(config, field)
    if not value >= low:
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


def row_settings(config: Any) -> None:
    """Check columns, heldout_fraction, max_tokens and buckets of a stage that trains on rows of different lengths.

    Raises:
      UserError: if one of them is out of range.
    """
    columns_setting(config)
    within(config, "heldout_fraction", 0, 1)
    if config.max_tokens is not None:
        at_least(config, "max_tokens", 1)
    if any(bucket < 1 for bucket in config.buckets):
        raise UserError(f"buckets: expected lengths of 1 or more, got {min(config.buckets)}")
