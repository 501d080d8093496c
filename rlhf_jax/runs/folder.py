"""A run is a folder: config.json, tokenizer.json, metrics.jsonl, ledger.json, checkpoints/, at its end summary.json.

A later stage takes the folder of an earlier one by path, and the folder says what it is: its stage, its settings, and
the fingerprints of all that went in.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.config import MAY_CHANGE
from rlhf_jax.errors import UserError
from rlhf_jax.runs.atomic_files import UNFINISHED, read_json, write_json
from rlhf_jax.tokenizers.load import load_tokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer

FORMAT_VERSION = 1
_ABSENT = "nothing"
# What a start that was killed may have left in a folder.
_BEFORE_CONFIG = {"run.lock", "tokenizer.json", "tokenizer.json" + UNFINISHED, "config.json" + UNFINISHED}


class RunFolder:
    """One run on disk. Made by `create` (the run itself) or `open` (whoever uses its result)."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._about = about

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        stage: str,
        config: Mapping[str, Any],
        model: Mapping[str, Any],
        tokenizer: TextTokenizer,
        inputs: Mapping[str, str],
        origin: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> RunFolder:
        """The folder of a new run, or of the same run started again.

        Args:
          config, model: the stage's and the model's whole config as plain JSON (`config.to_plain`).
          inputs: name -> fingerprint of everything else that goes in: data files, folders of earlier stages.
          origin: of the published model that the run started from (huggingface.py), to write it back as it was.
          base: where the parameters are that the run's adapter stands beside (sources.py); None for a whole network.
          may_change: fields of config that a resumed run may give other values.
        Raises: UserError if the folder is of another stage or of a run with other settings or inputs, naming the
          first field, or is in use.
        """
        path = Path(path)
        about = json.loads(
            json.dumps(
                {
                    "format_version": FORMAT_VERSION,
                    "stage": stage,
                    "config": dict(config),
                    "model": dict(model),
                    "tokenizer": tokenizer.fingerprint,
                    "inputs": dict(inputs),
                    **({} if origin is None else {"origin": dict(origin)}),
                    **({} if base is None else {"base": dict(base)}),
                },
                allow_nan=False,
            )
        )
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: found a file, wanted a folder for the run; give another --name or --out")
        path.mkdir(parents=True, exist_ok=True)
        # Before the lock, whose file would stay behind in a folder of someone else's.
        _refuse_foreign(path)
        run = cls(path, about)
        with run.lock():
            _refuse_foreign(path)
            if (path / "config.json").exists():
                saved = _read(path)
                _refuse_other_stage(path, saved, (stage,))
                for field, found, wanted in _differences(saved, about, may_change):
                    raise UserError(
                        f"{path}: {field}: found {found} from an earlier run, wanted {wanted}; give the same settings "
                        f"to go on with it, or another --name to start anew"
                    )
            # The tokenizer first: a folder with a config.json is whole.
            tokenizer.save(path / "tokenizer.json")
            write_json(path / "config.json", about)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, stages: tuple[str, ...]) -> RunFolder:
        """The folder of an earlier run, if it is of one of the given stages.

        Raises: UserError if it is no run's folder, of another stage, or without something that belongs to it.
        """
        path = Path(path)
        if not path.is_dir():
            found = "found a file" if path.exists() else "no such folder"
            raise UserError(f"{path}: {found}; wanted the folder of a {' or '.join(stages)} run")
        if not (path / "config.json").exists():
            raise UserError(f"{path}: no config.json in it; wanted the folder of a {' or '.join(stages)} run")
        about = _read(path)
        _refuse_other_stage(path, about, stages)
        if not (path / "tokenizer.json").exists():
            raise UserError(f"{path}: tokenizer.json is missing; the folder is not whole, copy it again")
        run = cls(path, about)
        if run.tokenizer.fingerprint != about["tokenizer"]:
            raise UserError(
                f"{path}: tokenizer.json: found fingerprint {run.tokenizer.fingerprint[:12]}, wanted "
                f"{about['tokenizer'][:12]} as in config.json; the folder is not whole, copy it again"
            )
        return run

    @property
    def stage(self) -> str:
        """Name of the stage that made the folder."""
        return str(self._about["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The stage's whole config as plain JSON."""
        return dict(self._about["config"])

    @property
    def model(self) -> dict[str, Any]:
        """The model's config as plain JSON."""
        return dict(self._about["model"])

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what went in."""
        return dict(self._about["inputs"])

    @property
    def origin(self) -> dict[str, Any] | None:
        """What the published model was that the run started from, or its own start did."""
        return dict(self._about["origin"]) if "origin" in self._about else None

    @property
    def base(self) -> dict[str, Any] | None:
        """Where the parameters are that the run's adapter stands beside; None for a whole network."""
        return dict(self._about["base"]) if "base" in self._about else None

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer kept in the folder."""
        return load_tokenizer(self.path / "tokenizer.json")

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / "metrics.jsonl"

    def load_params(self, which: Literal["last", "best"] = "last") -> dict[str, Any]:
        """The parameters as nested dicts of numpy arrays, from the last or best intact checkpoint.

        Raises: UserError if there is none.
        """
        # Orbax takes half a second to import; who only reads a config does not wait for it.
        from rlhf_jax.runs import checkpoint

        return checkpoint.load_params(self.checkpoints, which)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters of the last checkpoint."""
        from rlhf_jax.runs import checkpoint

        return checkpoint.fingerprint(self.load_params())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process alone; the system lets go when the process ends, however it ends.

        Raises: UserError at once if another process holds it, with that process's id.
        """
        with (self.path / "run.lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
                raise UserError(
                    f"{self.path}: process {holder} is writing in this folder; wait for it or give another --name"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which marks the run as complete."""
        write_json(self.path / "summary.json", summary)

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        summary: dict[str, Any] = read_json(self.path / "summary.json")
        return summary


def _read(path: Path) -> dict[str, Any]:
    """config.json, its version and fields checked."""
    about = read_json(path / "config.json")
    if not isinstance(about, dict) or "format_version" not in about:
        raise UserError(f"{path}: config.json is not that of a run: it has no field 'format_version'")
    if about["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version: found {about['format_version']}, wanted {FORMAT_VERSION}; use the release of "
            f"rlhf_jax that wrote the folder"
        )
    kinds = {"stage": str, "config": dict, "model": dict, "tokenizer": str, "inputs": dict}
    for field, kind in kinds.items():
        if not isinstance(about.get(field), kind):
            raise UserError(f"{path}: config.json: field {field!r}: found {about.get(field)!r}, wanted {kind.__name__}")
    return about


def _refuse_foreign(path: Path) -> None:
    """Raises UserError for a folder that holds other files and is no run's."""
    found = {child.name for child in path.iterdir()}
    if "config.json" not in found and (others := sorted(found - _BEFORE_CONFIG)):
        raise UserError(f"{path}: found {others[0]} but no config.json, wanted an empty folder; give another --name")


def _refuse_other_stage(path: Path, about: Mapping[str, Any], stages: tuple[str, ...]) -> None:
    if about["stage"] not in stages:
        raise UserError(f"{path}: found the folder of a {about['stage']} run, wanted one of {' or '.join(stages)}")


def _differences(saved: Any, given: Any, may_change: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, saved value, given value) of every field that differs and is not allowed to."""

    def walk(a: Any, b: Any, field: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}):
                if not (field == "config" and key in may_change):
                    yield from walk(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{field}.{key}" if field else key)
        elif a != b or isinstance(a, bool) != isinstance(b, bool):
            yield field.removeprefix("config."), a, b

    yield from walk(saved, given, "")
