"""Atomic writes and checksummed folders, safe against a crash of the process or the machine at any time.

A file is written under another name, synced and renamed. A sealed folder holds a manifest with the SHA-256 of each of
its files and of the manifest itself, so that a flipped bit, a truncated or a missing file is always detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import sync_folder, write_file

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A sealed folder whose files differ from those that were written."""


def user_cache() -> Path:
    """Cache folder, for files that can be regenerated: rlhf_jax below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically.

    Raises:
      ValueError: for an infinity or NaN.
      TypeError: for a value that JSON cannot represent.
    """
    write_file(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: naming the file, if it cannot be read or parsed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Syncs every file and folder below to disk and writes their manifest, which includes `about`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = hash_of_file(path)
    manifest = {**about, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": hash_of(manifest)})


def verify(folder: Path, part: str = "") -> dict[str, Any]:
    """Checks a sealed folder, or one subfolder of it, against its manifest.

    Args:
      part: name of a subfolder; all files if empty.

    Returns:
      The manifest.

    Raises:
      Damaged: with the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, sha256 in manifest["files"].items():
        if part and not name.startswith(part + "/"):
            continue
        try:
            actual = hash_of_file(folder / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
        if actual != sha256:
            raise Damaged(f"{name} differs from what was written")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a sealed folder and checks its own hash.

    Raises:
      Damaged: if it is missing, unreadable or differs from what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{MANIFEST} is unreadable") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != hash_of(manifest):
        raise Damaged(f"{MANIFEST} differs from what was written")
    return manifest


def hash_of_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(manifest: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a manifest without its own hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
