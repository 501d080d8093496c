"""Where the records of a stage come from: the user's files, or the embedded corpus if it is asked for by name."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_jax.errors import UserError

EMBEDDED = "embedded"


def wants_embedded(field: str, paths: Sequence[str], expected: str) -> bool:
    """True for the embedded corpus, False for files.

    Args:
      field: name of the setting.
      paths: its value.
      expected: kind of records, for the error.

    Raises:
      UserError: if neither is given, or both are.
    """
    if not paths:
        flag = "--" + field.replace("_", "-")
        raise UserError(
            f"{field}: expected files of {expected}, got nothing; use {flag} FILE.jsonl, or {flag} {EMBEDDED} for "
            "Python's own documentation"
        )
    if EMBEDDED in paths and len(paths) > 1:
        raise UserError(
            f"{field}: expected files or {EMBEDDED}, got {' and '.join(paths)}; use ./{EMBEDDED} for a file so named"
        )
    return paths[0] == EMBEDDED
