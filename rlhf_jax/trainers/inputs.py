"""Where the records of a stage come from, the user's files or the embedded corpus, and prompts from them to show."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_jax.data import Demonstration, Dialogue, Prompt, Text, render_prompt
from rlhf_jax.errors import UserError

EMBEDDED = "embedded"
# Prompts to show answers to: enough for a few that fit the context.
EXAMPLES = 32


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


def prompts_of(records: Sequence[Demonstration | Dialogue]) -> list[Prompt]:
    """Prompts of the first demonstrations; of a dialogue, the messages before the assistant's last."""
    prompts = []
    for record in records[:EXAMPLES]:
        if isinstance(record, Demonstration):
            prompts.append(Prompt(record.prompt, record.where, record.turns))
            continue
        places = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        if places and places[-1]:
            turns = record.messages[: places[-1]]
            prompts.append(Prompt(render_prompt(turns), record.where, turns))
    return prompts


def beginnings(texts: Sequence[Text]) -> list[Prompt]:
    """The first words of the first texts, as prompts."""
    short = [text.text[:24] for text in texts[:EXAMPLES]]
    return [Prompt(text[: text.rfind(" ")] if " " in text.strip() else text) for text in short if text.strip()]
