"""Range checks of settings, each a `UserError` that names the field."""

from __future__ import annotations

from typing import Any

from rlhf_jax.errors import UserError


def at_least(config: Any, field: str, low: float) -> None:
    """Raises UserError if the number in a config's field is below `low`."""
    value = getattr(config, field)
    if not value >= low:
        raise UserError(f"{field}: found {value}, wanted {low} or more")


def within(config: Any, field: str, low: float, below: float) -> None:
    """Raises UserError unless the number in a config's field is at least `low` and less than `below`."""
    value = getattr(config, field)
    if not low <= value < below:
        raise UserError(f"{field}: found {value}, wanted {low} or more and less than {below}")


def row_settings(config: Any) -> None:
    """Checks heldout_fraction, max_tokens and buckets of a stage that trains on rows of different lengths."""
    within(config, "heldout_fraction", 0, 1)
    if config.max_tokens is not None:
        at_least(config, "max_tokens", 1)
    if any(bucket < 1 for bucket in config.buckets):
        raise UserError(f"buckets: found {min(config.buckets)}, wanted lengths of 1 or more")
