"""Named tensors in the safetensors files of a folder: one file, or several and their index."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.runs.atomic_files import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a folder, read one at a time.

    Raises:
      UserError: for a file that is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        single, index = folder / SINGLE, folder / INDEX
        if single.exists():
            _refuse_elsewhere(single)
            self._files = dict.fromkeys(open_file(single).keys(), single)
        elif index.exists():
            self._files = {name: folder / file for name, file in _weight_map(index).items()}
            for file in sorted(set(self._files.values())):
                if not file.exists() and not file.is_symlink():
                    raise UserError(f"{file}: missing, but named in {index.name}; copy the folder again")
                _refuse_elsewhere(file)
                held = set(open_file(file).keys())
                for name in (name for name, at in self._files.items() if at == file and name not in held):
                    raise UserError(f"{file}: tensor {name!r} is missing, but named in {index.name}")
        else:
            old = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {old[0]} is a pickle, which runs code: save it as safetensors first" if old else ""
            raise UserError(f"{folder}: expected {SINGLE} or {INDEX}, got neither{hint}")

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def tensor(self, name: str) -> np.ndarray:
        """A copy of a tensor in memory.

        Raises:
          UserError: if it cannot be read, e.g. because numpy has no such type.
        """
        file = self._files[name]
        try:
            tensor: np.ndarray = open_file(file).get_tensor(name)
        except (
            _module("safetensors").SafetensorError,
            AttributeError,
        ) as error:  # AttributeError: numpy has no such type
            raise UserError(f"{file}: tensor {name!r} is unreadable: {error}") from None
        return tensor

    def where(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return str(self._files[name])


def write_tensors(folder: Path, shards: Sequence[Sequence[str]], tensor: Callable[[str], np.ndarray]) -> None:
    """Write one file per shard, and an index if there are several shards.

    Files are flushed to disk. The host holds one shard at a time.

    Args:
      folder: to write into.
      shards: names of the tensors of each file.
      tensor: returns a tensor by its name.

    Raises:
      UserError: if a file cannot be written.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # safetensors writes an array's buffer and ignores its strides: a transposed view would come out wrong.
        values = {name: np.ascontiguousarray(tensor(name)) for name in names}
        write_file(folder / file, values)
        weight_map |= dict.fromkeys(names, file)
        total += sum(value.nbytes for value in values.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write contiguous tensors to a file and flush it to disk.

    Raises:
      UserError: if it cannot be written, e.g. because the disk is full.
    """
    try:
        _module("safetensors.numpy").save_file(tensors, file, metadata={"format": "pt"})
    except _module("safetensors").SafetensorError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None
    # safetensors makes files that only their owner can read; this file gets the folder's permissions.
    file.chmod(file.parent.stat().st_mode & 0o666)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: field 'weight_map': expected tensor names and their files, got {files!r:.100}")
    for name, file in files.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise UserError(f"{index}: tensor {name!r}: expected the name of a file in this folder, got {file!r:.100}")
    return files


def _refuse_elsewhere(file: Path) -> None:
    """Raises UserError for a link out of the model's folder, and for anything but a file, such as a pipe.

    The cache of the Hugging Face hub links from snapshots/COMMIT/ to its blobs/, which is allowed.
    """
    folder = file.parent.resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if file.resolve().parent not in (folder, blobs):
        raise UserError(f"{file}: expected a file in its folder, got a link to {file.resolve()}; copy the file there")
    if not file.is_file():
        raise UserError(
            f"{file}: unreadable: expected a file, got {'nothing' if not file.exists() else 'a pipe, device or folder'}"
        )


def open_file(path: Path) -> Any:
    """Open a file, which reads its header."""
    safetensors = _module("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path}: truncated or damaged ({size:,} bytes): {error}; copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable: {error}") from None


def _module(name: str) -> Any:
    """Import an optional package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading and writing safetensors requires the package {error.name}; run: {install_command('hf')}"
        ) from None
