"""Token ids in the configs of published models: one, several, or none in one of several spellings."""

from __future__ import annotations

from rlhf_jax.errors import UserError

_NONE = (None, -1, "", "none", "null")


def as_ids(value: object, where: str) -> list[int]:
    """A field of a config as a list of ids, empty for what means that there is no such token."""
    listed = value if isinstance(value, list | tuple) else [value]
    ids = [id for id in listed if (id.lower() if isinstance(id, str) else id) not in _NONE]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise UserError(f"{where}: expected an id or a list of ids, got {value!r:.100}")
    return ids
