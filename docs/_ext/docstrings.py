"""Docstrings are plain text with `code`; the characters that mean something else to Sphinx are escaped."""

import re
from typing import Any

CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")
FIELDS = ("attribute", "data", "property", "type")
kept: dict[str, list[str]] = {}


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape all but code, before the sections are parsed."""
    for number, line in enumerate(lines):
        parts = CODE.split(line)
        parts[::2] = [SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = "".join(parts)
    if what in FIELDS:
        kept[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The text of a field has no sections: napoleon would take what is before its first colon for a type."""
    if what in FIELDS:
        lines[:] = kept.pop(name)


def setup(app: Any) -> dict[str, bool]:
    """Run before and after napoleon, which listens with the default priority of 500."""
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
