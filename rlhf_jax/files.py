"""The one way in which this library writes a file: whole or not at all, also across a crash or a full disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

UNFINISHED = ".unfinished"
"""Ending of the name under which a file or folder is written before it is renamed."""
LEFTOVERS = (UNFINISHED, ".partial")
"""Endings of what a killed process may leave; earlier versions used the second."""


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, syncs it, renames it and syncs the folder.

    The other name is `path` and UNFINISHED; one that a killed process has left is overwritten. If the file has
    this content, nothing is written. A link is followed, and a device or pipe is written to directly.

    Args:
      path: the file.
      content: text is written as UTF-8, unchanged.

    Raises:
      OSError: with the file's name; the file is then as it was, and nothing else is left.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # A relative path through a link would be renamed over the link itself.
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        # What is there already needs no room on a full disk.
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            unfinished.unlink(missing_ok=True)
            return
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        # The error of a write or a sync does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_folder(path: Path) -> None:
    """Syncs the entries of a folder to disk: without it a rename may be lost in a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
