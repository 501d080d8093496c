"""Damaged files: a later stage refuses them or says so, and training resumes from the checkpoint before."""

from __future__ import annotations

import collections
import contextlib
import logging
import random
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, TrainState, nested
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.config import ModelConfig, to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.huggingface import parameter_shapes
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.checkpoint import Checkpoints, fingerprint, load_params
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import release
from rlhf_jax.runs.sealed import RELEASED
from rlhf_jax.tokenizers.bpe import Tokenizer

WAYS = ("flip", "truncate", "delete")
MODEL = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=16, width=8, layers=1, heads=2)


class _Said(logging.Handler):
    """Warnings that the library gave."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects the warnings of the library, instead of printing them."""
    log, said = logging.getLogger("rlhf_jax"), _Said()
    before, log.propagate = log.propagate, False
    log.addHandler(said)
    try:
        yield said.lines
    finally:
        log.removeHandler(said)
        log.propagate = before


def _damage(path: Path, how: str, dice: random.Random) -> None:
    """Flips a bit of a file, cuts it off, or deletes it; an empty one is deleted in any case."""
    content = bytearray(path.read_bytes())
    if how == "delete" or not content:
        path.unlink()
        return
    at = dice.randrange(len(content))
    if how == "truncate":
        path.write_bytes(content[:at])
        return
    content[at] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _params(seed: int) -> Params:
    draws, shapes = np.random.default_rng(seed), parameter_shapes(MODEL, True)
    return nested({path: draws.standard_normal(shapes[path]).astype(np.float32) for path in sorted(shapes)})


def _state(step: int) -> TrainState:
    return TrainState(
        jnp.int32(step), _params(step), {"mu": jnp.full(64, float(step), jnp.float32)}, jax.random.key(step), {}
    )


def _write_run(folder: Path) -> None:
    """Writes a finished reward model whose released parameters are not those of its last checkpoint."""
    plain, tokenizer = to_plain(MODEL), Tokenizer.bytes()
    run = RunFolder.create(folder, stage="reward", config={}, model=plain, tokenizer=tokenizer, inputs={})
    Checkpoints(run.checkpoints, keep_last=1).save(0, _state(0), {})
    release(run, _params(1), 0)
    run.finish({"score_mean": 0.5, "score_scale": 2.0, "dialogues": False, "warnings": []})


def _handed_on(run: Path) -> Any:
    """All that a later stage takes of a run."""
    source = open_source(str(run), stages=("reward",))
    facts = (source.model, source.scalar, source.dialogues, source.score_mean, source.score_scale, source.warnings)
    return facts, source.tokenizer.fingerprint, source.fingerprint, fingerprint(source.own())


def flip(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Damages each file of a finished run in turn; a later stage must refuse it, say so, or get what was written."""
    outcome, found, dice = Outcome(), collections.Counter[str](), random.Random(seed)
    _write_run(folder / "run")
    files = sorted(path.relative_to(folder / "run") for path in (folder / "run").rglob("*") if path.is_file())
    # What is handed on comes first, for a small n.
    files.sort(key=lambda path: path.parts[0] != RELEASED)
    with _warnings() as said:
        whole = _handed_on(folder / "run")
        for number in range(n):
            name, how = files[number % len(files)], WAYS[number // len(files) % len(WAYS)]
            # Warnings are given once for each folder.
            copy = folder / f"copy{number}"
            shutil.copytree(folder / "run", copy)
            _damage(copy / name, how, dice)
            said.clear()
            result = _outcome_of(copy, whole, said)
            found[result] += 1
            outcome.expect(result in ("the same", "named", "refused"), f"{result}: {how} {name}")
            shutil.rmtree(copy)
    outcome.counts = {"files": len(files), **found}
    return outcome


def _outcome_of(copy: Path, whole: Any, said: list[str]) -> str:
    """What becomes of a damaged run."""
    try:
        handed_on = _handed_on(copy)
    except UserError as error:
        return "refused" if str(copy) in str(error) and "\n" not in str(error) else f"refused without a name: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"traceback: {traceback.format_exception_only(error)[-1].strip()}"
    if handed_on == whole:
        return "the same"
    return "named" if any(str(copy) in line for line in said) else "silent"


def fallback(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Damages a file of the newest checkpoint; the one before is used and the damaged one named, at one start only."""
    outcome, dice = Outcome(), random.Random(seed)
    good = folder / "good"
    for step in (1, 2):
        Checkpoints(good).save(step, _state(step), {})
    files = sorted(path.relative_to(good) for path in (good / "00000002").rglob("*") if path.is_file())
    with _warnings() as said:
        for number in range(n):
            name, how = files[number % len(files)], WAYS[number // len(files) % len(WAYS)]
            copy, case = folder / "copy", f"{how} {name}"
            shutil.copytree(good, copy)
            _damage(copy / name, how, dice)
            try:
                if name.parts[1] == "params":
                    _expect_the_one_before(outcome, load_params(copy), said, f"{case}, loaded")
                _expect_the_one_before(outcome, Checkpoints(copy).restore(_state(0)).params, said, f"{case}, resumed")
                again = Checkpoints(copy).restore(_state(0))
                outcome.expect(int(again.step) == 1 and not said, f"{case}: met again at the next start: {said}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                outcome.expect(False, f"{case}: {traceback.format_exception_only(error)[-1].strip()}")
            said.clear()
            shutil.rmtree(copy)
    outcome.counts = {"damaged": n, "files": len(files)}
    return outcome


def _expect_the_one_before(outcome: Outcome, params: Params, said: list[str], case: str) -> None:
    """Checks that the parameters are those of the checkpoint before, and that the damaged one was named, once."""
    outcome.expect(fingerprint(params) == fingerprint(_state(1).params), f"{case}: other parameters")
    outcome.expect(len(said) == 1 and "00000002" in said[0], f"{case}: not named: {said}")
    said.clear()
