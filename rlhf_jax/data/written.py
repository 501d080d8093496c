"""Messages that a file has as text, as JSON or as Python shows them: tables and CSV files make that of lists."""

from __future__ import annotations

import re

from rlhf_jax.data.jsonl import describe, parse_value
from rlhf_jax.data.rows import Row

_MESSAGES = re.compile(
    r"""\s*\[?\s*\{\s*['"](?:role['"]\s*:.*?['"]content|content['"]\s*:.*?['"]role|from['"]\s*:.*?['"]value"""
    r"""|value['"]\s*:.*?['"]from)['"]\s*:""",
    re.DOTALL,
)
_LIST = re.compile(r'\s*\[\s*".*"\s*\]\s*', re.DOTALL)


def is_written(text: str) -> bool:
    """True for messages that are text, which would be learned or answered letter by letter."""
    return _MESSAGES.match(text) is not None


def refuse_written(row: Row, name: str, value: object, *, asked: bool = False) -> None:
    """Raises UserError for messages that are text, and for a prompt that is a list of texts as JSON.

    Args:
      asked: the field is a prompt. As an answer, a list of texts is what some prompts ask for.
    """
    if isinstance(value, str) and (is_written(value) or (asked and _LIST.fullmatch(value) and _is_list(value))):
        raise row.wrong(name, describe(value), "text or a list of messages, and no list as text; parse it first")


def _is_list(text: str) -> bool:
    try:
        return isinstance(parse_value(text), list)
    except ValueError:
        return False
