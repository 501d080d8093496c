"""Seal of a run folder: SHA-256 of each file that a later stage reads.

manifest.json lists config.json, tokenizer.json, scores.json, summary.json, and the manifests of the checkpoints and the
released parameters, which list their own files. A run that is opened is checked against it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.runs.atomic_files import MANIFEST, Damaged, hash_of, hash_of_file, read_manifest, write_json

FORMAT_VERSION = 1
CHECKPOINTS, RELEASED, SUMMARY = "checkpoints", "released", "summary.json"
FILES = ("config.json", "tokenizer.json", "scores.json", SUMMARY)
AGAIN = "copy the whole folder again, or start its command again"
_log = logging.getLogger("rlhf_jax")
_told: set[Path] = set()


def seal_run(
    folder: Path,
    names: Iterable[str] = (),
    *,
    content: Mapping[str, str] | None = None,
    parts: Iterable[str] = (),
) -> None:
    """Adds files to the seal of a run folder; without a seal that is whole, all that it should list.

    Args:
      folder: the run's folder.
      names: files to list as they are.
      content: files to list that are written after this. One that is listed and missing marks an interrupted end.
      parts: folders of checkpoints to list as they are, in place of what is listed of them.
    """
    files = sealed_files(folder, fresh=True)
    if files is None:
        files, names, parts = {}, [name for name in FILES if (folder / name).exists()], [RELEASED]
        parts += [CHECKPOINTS] if SUMMARY in names else []
    files |= {name: hash_of_file(folder / name) for name in names}
    files |= {name: hashlib.sha256(text.encode("utf-8")).hexdigest() for name, text in (content or {}).items()}
    for part in parts:
        files = {name: sha256 for name, sha256 in files.items() if not name.startswith(f"{part}/")}
        files |= {name: hash_of_file(folder / name) for name in _manifests(folder, part)}
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, {**manifest, "sha256": hash_of(manifest)})


def sealed_files(folder: Path, *, fresh: bool = False) -> dict[str, str] | None:
    """The sealed files of a run folder and their SHA-256; None for a run of an earlier version, which has no seal.

    Args:
      folder: the run's folder.
      fresh: True to take a damaged seal for none, since it will be written anew.

    Raises:
      UserError: for a damaged seal.
    """
    if not (folder / MANIFEST).exists():
        return None
    try:
        files: dict[str, str] = read_manifest(folder)["files"]
    except Damaged as damage:
        if fresh:
            return None
        raise UserError(f"{folder}: {damage}; {AGAIN}") from None
    return files


def check_run(folder: Path) -> None:
    """Checks the files of a run that a later stage reads.

    The arrays of checkpoints are checked when they are read. Once a run is finished, its checkpoints are listed; all
    but the newest may be missing.

    Raises:
      UserError: naming the first file that is missing, differs from what was written, or belongs to another run.
    """
    files = sealed_files(folder)
    if files is None:
        if folder not in _told:
            _told.add(folder)
            _log.warning("%s: made by an earlier version, without a seal: damage to its files is not noticed", folder)
        return
    newest = max((name for name in files if name.startswith(f"{CHECKPOINTS}/")), default="")
    for name in files:
        if (folder / name).exists() or not name.startswith(f"{CHECKPOINTS}/") or name == newest:
            check_file(folder, name, files)
    found = [*_manifests(folder, RELEASED), *(_manifests(folder, CHECKPOINTS) if newest else [])]
    found += [SUMMARY] if (folder / SUMMARY).exists() else []
    for name in found:
        if name not in files:
            raise UserError(f"{folder}: {_shown(name)} is not of this run; {AGAIN}")


def check_file(folder: Path, name: str, files: Mapping[str, str] | None) -> None:
    """Checks one file, if the seal lists it.

    Args:
      folder: the run's folder.
      name: path in it.
      files: result of `sealed_files`.

    Raises:
      UserError: if it is missing or differs from what was written.
    """
    if files is None or name not in files:
        return
    try:
        actual = hash_of_file(folder / name)
    except FileNotFoundError:
        raise UserError(f"{folder}: {_shown(name)} is missing; {AGAIN}") from None
    if actual != files[name]:
        raise UserError(f"{folder}: {name} differs from what was written; {AGAIN}")


def _shown(name: str) -> str:
    return name.removesuffix(f"/{MANIFEST}")


def _manifests(folder: Path, part: str) -> list[str]:
    """Manifests of the checkpoints in a folder of a run."""
    found = sorted((folder / part).glob(f"*/{MANIFEST}"))
    return [path.relative_to(folder).as_posix() for path in found if path.parent.name.isdecimal()]
