"""The lock of a run folder: one process writes in it, from its first line to its last. Imports no JAX."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rlhf_jax.errors import UserError

LOCK = "run.lock"
# Folders that this process has locked by `hold`.
_held: set[str] = set()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks an existing folder; the system releases the lock whenever and however the process ends.

    Raises:
      UserError: immediately, with the id of the process that holds it, if the folder is locked.
    """
    if os.path.realpath(folder) in _held:
        yield
        return
    with _locked_run(folder):
        yield


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks a folder, which is made if it does not exist; `lock` and `hold` within do nothing.

    A folder that holds nothing but the lock at the end is removed.

    Raises:
      UserError: immediately, if another process has locked the folder, and if it cannot be made.
    """
    real = os.path.realpath(folder)
    if real in _held:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, got a file; give another --name or --out")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    # The lock would leave its file in a folder that is not a run.
    foreign = not made and any(folder.iterdir()) and not any((folder / name).exists() for name in OWN)
    if foreign:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; give another --name or --out") from None
    with _locked_run(folder):
        _held.add(real)
        try:
            yield
        finally:
            _held.discard(real)
            if made and {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for each in made:
                        each.rmdir()


# A folder with one of these is a run's, or a recipe's, or one that a start has begun.
OWN = (LOCK, "config.json", "tokenizer.json", "seconds.json", "summary.json")


def _locked_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked(
        folder / LOCK,
        busy="is writing in this folder; wait for it or give another --name",
        instead="give another --name or --out",
    )


@contextlib.contextmanager
def locked(path: Path, *, busy: str, instead: str) -> Iterator[None]:
    """Locks a folder by a file in it; the system releases the lock whenever and however the process ends.

    Args:
      path: of the file.
      busy: what the process that holds the lock does, and what to do about it.
      instead: what to do if the file cannot be written.

    Raises:
      UserError: immediately, with the id of the process that holds it, if the folder is locked.
    """
    with _take(path, busy, instead) as file:
        # On a full disk the lock holds without the id, which is only for the message.
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


def _take(path: Path, busy: str, instead: str) -> TextIO:
    """Opens and locks the file of the lock."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; {instead}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(f"{path.parent}: process {holder} {busy}") from None
        # Another process may have removed the file between the two calls.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()
