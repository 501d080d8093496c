"""Run folder: config.json, tokenizer.json, metrics.jsonl, ledger.json, checkpoints/ and, once finished, summary.json.

PPO adds scores.json, the mean and scale by which it normalizes scores.

A later stage takes the folder of an earlier one by path. The folder is self-describing: it holds its stage, its
settings, and the fingerprints of all its inputs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.config import MAY_CHANGE
from rlhf_jax.errors import UserError
from rlhf_jax.files import LEFTOVERS
from rlhf_jax.runs.atomic_files import json_text, read_json, write_json
from rlhf_jax.runs.locks import LOCK, lock
from rlhf_jax.runs.sealed import CHECKPOINTS, RELEASED, SUMMARY, check_run, seal_run
from rlhf_jax.tokenizers.load import load_tokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer

FORMAT_VERSION = 1
_ABSENT = "nothing"
# Files that a killed start may have left in a folder without config.json.
_BEFORE_CONFIG = {LOCK, "tokenizer.json", "manifest.json"}
_BEFORE_CONFIG |= {name + ending for name in ("tokenizer.json", "config.json", "manifest.json") for ending in LEFTOVERS}


class RunFolder:
    """A run on disk, made by `create` (for the run itself) or `open` (to read its results)."""

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
        defaults: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Creates the folder of a new run, or opens that of the same run to resume it.

        Args:
          config, model: the full config of the stage and of the model as plain JSON (`config.to_plain`).
          inputs: name -> fingerprint of every other input: data files, folders of earlier stages.
          origin: description of the published model that the run started from (huggingface.py), for exporting it in the
            same form.
          base: location of the base parameters of the run's adapter (pretrained/source.py); None for a full network.
          may_change: config fields that may differ when a run resumes.
          defaults: the stage's config as it is by default: what a setting that a later version added was before.

        Raises:
          UserError: if the folder is in use, or belongs to another stage or to a run with other settings or inputs; the
            message names the first field that differs. If the run is finished and its files are damaged.
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
            raise UserError(f"{path}: expected a run folder, got a file; give another --name or --out")
        path.mkdir(parents=True, exist_ok=True)
        # Checked before the lock too, which would leave its file in a folder that is not a run.
        _refuse_foreign(path)
        run = cls(path, about)
        with run.lock():
            _refuse_foreign(path)
            if (path / "config.json").exists():
                saved = _read(path)
                _refuse_other_stage(path, saved, (stage,))
                for field, earlier, now in _differences(saved, about, may_change, defaults or {}):
                    raise UserError(
                        f"{path}: {field}: expected {earlier} as in the earlier run, got {now}; give the same settings "
                        f"to resume it, or another --name to start a new run"
                    )
            for left in [child for child in path.iterdir() if child.name.endswith(LEFTOVERS) and child.is_file()]:
                left.unlink()
            # The tokenizer first: a folder with a config.json is complete.
            tokenizer.save(path / "tokenizer.json")
            write_json(path / "config.json", about)
            seal_run(path, ["config.json", "tokenizer.json"])
            if run.finished:
                check_run(path)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, stages: tuple[str, ...]) -> RunFolder:
        """Opens the folder of an earlier run of one of the given stages.

        Raises:
          UserError: if it is not a run folder, is of another stage, is incomplete or damaged, or has parameters of
            another run.
        """
        path = Path(path)
        if not path.is_dir():
            got = "a file" if path.exists() else "no such folder"
            raise UserError(f"{path}: expected the folder of a {' or '.join(stages)} run, got {got}")
        if not (path / "config.json").exists():
            raise UserError(f"{path}: expected the folder of a {' or '.join(stages)} run, got one without config.json")
        about = _read(path)
        _refuse_other_stage(path, about, stages)
        if not (path / "tokenizer.json").exists():
            raise UserError(f"{path}: tokenizer.json is missing; the folder is incomplete, copy it again")
        run = cls(path, about)
        if run.tokenizer.fingerprint != about["tokenizer"]:
            raise UserError(
                f"{path}: tokenizer.json: expected fingerprint {about['tokenizer'][:12]} as in config.json, got "
                f"{run.tokenizer.fingerprint[:12]}; the folder is incomplete, copy it again"
            )
        check_run(path)
        return run

    @property
    def stage(self) -> str:
        """Name of the stage that made the folder."""
        return str(self._about["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The stage's full config as plain JSON."""
        return dict(self._about["config"])

    @property
    def model(self) -> dict[str, Any]:
        """The model's config as plain JSON."""
        return dict(self._about["model"])

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the inputs."""
        return dict(self._about["inputs"])

    @property
    def origin(self) -> dict[str, Any] | None:
        """Description of the published model that the run started from, directly or through earlier runs; else None."""
        return dict(self._about["origin"]) if "origin" in self._about else None

    @property
    def base(self) -> dict[str, Any] | None:
        """Location of the base parameters of the run's adapter; None for a full network."""
        return dict(self._about["base"]) if "base" in self._about else None

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer stored in the folder."""
        return load_tokenizer(self.path / "tokenizer.json")

    def find(self, path: str) -> str | None:
        """A path in the run's settings, as it is or from the folder that the run was started in; None if not there."""
        out = str(self.config.get("out") or f"runs/{self.config.get('name', '')}").rstrip("/")
        absolute = str(self.path.absolute())
        started = absolute.removesuffix(out) if absolute.endswith(f"/{out}") else ""
        return next((str(at) for at in (Path(path), Path(started, path)) if at.exists()), None)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """Path of the metrics file."""
        return self.path / "metrics.jsonl"

    def load_params(self, which: Literal["last", "best"] = "last") -> dict[str, Any]:
        """Loads the parameters of the last or best intact checkpoint, as nested dicts of numpy arrays.

        Raises:
          UserError: if there is none.
        """
        # Imported here: Orbax takes half a second to import, which reading only a config should not cost.
        from rlhf_jax.runs import checkpoint

        return checkpoint.load_params(self.checkpoints, which)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters of the last checkpoint."""
        from rlhf_jax.runs import checkpoint

        return checkpoint.fingerprint(self.load_params())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder for this process; the system releases the lock whenever and however the process ends.

        Raises:
          UserError: immediately, with the id of the process that holds it, if the folder is locked.
        """
        with lock(self.path):
            yield

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which marks the run as complete, and seals all that later stages read."""
        seal_run(self.path, content={SUMMARY: json_text(summary)}, parts=(CHECKPOINTS, RELEASED))
        write_json(self.path / SUMMARY, summary)

    @property
    def finished(self) -> bool:
        """True if the run is complete."""
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        summary: dict[str, Any] = read_json(self.path / "summary.json")
        return summary


def _read(path: Path) -> dict[str, Any]:
    """Reads config.json and checks its version and fields."""
    about = read_json(path / "config.json")
    if not isinstance(about, dict) or "format_version" not in about:
        raise UserError(f"{path}: config.json: expected that of a run, got one without a field 'format_version'")
    if about["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {about['format_version']}; use the release of "
            f"rlhf_jax that wrote the folder"
        )
    kinds = {"stage": str, "config": dict, "model": dict, "tokenizer": str, "inputs": dict}
    for field, kind in kinds.items():
        if not isinstance(about.get(field), kind):
            raise UserError(f"{path}: config.json: field {field!r}: expected {kind.__name__}, got {about.get(field)!r}")
    return about


def _refuse_foreign(path: Path) -> None:
    """Raises UserError for a folder that is not a run but holds other files, a published model's config.json too."""
    names = {child.name for child in path.iterdir()}
    if "config.json" in names:
        _read(path)
    elif others := sorted(names - _BEFORE_CONFIG):
        raise UserError(f"{path}: expected an empty folder, got {others[0]} but no config.json; give another --name")


def _refuse_other_stage(path: Path, about: Mapping[str, Any], stages: tuple[str, ...]) -> None:
    if about["stage"] not in stages:
        raise UserError(f"{path}: expected the folder of a {' or '.join(stages)} run, got one of {about['stage']}")


def _differences(
    saved: Any, given: Any, may_change: Collection[str], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted field, saved value, given value) for every field that differs and must not.

    The place of an adapter's base may change too, as its fingerprint is compared, and so may the folder of a reward
    function's file, as its code is.
    """
    places = {f"config.{name}" for name in may_change} | {"base.init"}

    def walk(a: Any, b: Any, field: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}):
                inner = f"{field}.{key}" if field else key
                # A setting that a later version added is off, or its default, in an earlier run.
                off = ("", False, None, [], *([defaults[key]] if key in defaults else []))
                added = field == "config" and key not in a and b[key] in off
                if not added and inner not in places:
                    yield from walk(a.get(key, _ABSENT), b.get(key, _ABSENT), inner)
        elif field == "config.reward_function" and isinstance(a, list) and isinstance(b, list):
            if list(map(_without_folder, a)) != list(map(_without_folder, b)):
                yield "reward_function", a, b
        elif a != b or isinstance(a, bool) != isinstance(b, bool):
            yield field.removeprefix("config."), a, b

    yield from walk(saved, given, "")


def _without_folder(spec: str) -> str:
    """FILE.py:NAME of a reward function, with its options, without the folder of the file."""
    return re.sub(r"^[^(]*/(?=[^/(]*\.py:)", "", spec)
