"""The files of a published tokenizer, and the ids of special tokens in a model's configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

TOKENIZER, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE = FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
ROLES = ("eos", "bos", "pad")
_NONE = (None, -1, "", "none", "null")  # how configs say that there is no such token


def read_text(path: Path) -> str | None:
    """Reads a file without newline conversion; None if it does not exist."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file: {error}") from None


def parse(text: str | None, where: str) -> dict[str, Any]:
    """Parses the JSON object in a file; {} if it does not exist."""
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def ids_of(folder: Path) -> dict[str, list[int]]:
    """The ids "bos", "eos" and "pad" in a model's folder; generation_config.json takes precedence over config.json."""
    ids: dict[str, list[int]] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        config = parse(read_text(path), str(path))
        found = {role: as_ids(config.get(f"{role}_token_id"), f"{path}: field '{role}_token_id'") for role in ROLES}
        ids |= {role: listed for role, listed in found.items() if listed}
    return ids


def as_ids(value: object, where: str) -> list[int]:
    """A field of a config as a list of ids, empty for what means that there is no such token."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    ids: list[int] = []
    for id in listed:
        if (id.lower() if isinstance(id, str) else id) in _NONE:
            continue
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise UserError(f"{where}: expected an id or a list of ids, got {value!r:.100}")
        ids.append(id)
    return ids
