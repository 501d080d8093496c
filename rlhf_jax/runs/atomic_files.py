"""Files that are whole, on the disk, and as they were written, whenever the process or the machine dies.

A file is written under another name, synced and renamed. A sealed folder holds a manifest with the SHA-256 of each of
its files and of the manifest itself, so that no flipped bit, cut or missing file goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"


class Damaged(Exception):
    """A sealed folder whose files are not those that were written."""


def user_cache() -> Path:
    """The folder for what can be made again: rlhf_jax below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises: ValueError for an infinite or undefined number, TypeError for what JSON cannot hold.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises: UserError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Syncs every file and folder below to the disk and writes their manifest, with `about` in it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = _sha256(path)
    manifest = {**about, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _hash_of(manifest)})


def verify(folder: Path, part: str = "") -> dict[str, Any]:
    """Checks a sealed folder, or the files in one folder of it, against the manifest, which it returns.

    Raises: Damaged, with the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, sha256 in manifest["files"].items():
        if part and not name.startswith(part + "/"):
            continue
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
        if found != sha256:
            raise Damaged(f"{name} has other content than was written")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, proven by its own hash. Raises: Damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{MANIFEST} is unreadable") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _hash_of(manifest):
        raise Damaged(f"{MANIFEST} has other content than was written")
    return manifest


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk: without it a rename may be forgotten."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
