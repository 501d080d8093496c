"""Token ids in the configs of published models: one, several, or none in one of several spellings."""

from __future__ import annotations

from rlhf_jax.errors import UserError

_NONE = (None, -1, "", "none", "null")


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
