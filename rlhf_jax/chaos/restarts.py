"""Runs that are started again with something else: refused by the field, or the same rows on other devices."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.chaos.forks import Strike, result, start
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.chaos.small import arguments, undisturbed, write_data
from rlhf_jax.errors import UserError
from rlhf_jax.runs.atomic_files import MANIFEST, hash_of
from rlhf_jax.runs.checkpoint import load_params
from rlhf_jax.runs.metrics import read_rows

DEVICES = (1, 2, 4)
TOLERANCE = 1e-5


class Mismatch(NamedTuple):
    """A start that must be refused.

    change: folder of the runs -> nothing; changes files before the start. start: (data, runs) -> the command. field:
    what the error must name.
    """

    change: Callable[[Path], object]
    start: Callable[[Path, Path], list[str]]
    field: str


def _nothing(runs: Path) -> None:
    """No file is changed."""


def _other_version(runs: Path) -> None:
    """Gives the checkpoints another format version, under a hash that fits."""
    for path in (runs / "half" / "checkpoints").glob(f"*/{MANIFEST}"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        del manifest["sha256"]
        manifest["format_version"] = 99
        path.write_text(json.dumps({**manifest, "sha256": hash_of(manifest)}), encoding="utf-8")


def _other_config(runs: Path) -> None:
    """Gives an unsealed run another format version."""
    path = runs / "half" / "config.json"
    (runs / "half" / MANIFEST).unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format_version": 99}), encoding="utf-8")


def _resumed(data: Path, runs: Path, *more: str) -> list[str]:
    """The command of the run that was interrupted."""
    return [*arguments("pretrain", data, runs, out=runs / "half"), *more]


def _other_data(data: Path, runs: Path) -> list[str]:
    other = data / "other.jsonl"
    other.write_text((data / "texts.jsonl").read_text(encoding="utf-8").replace("red", "white"), encoding="utf-8")
    return [str(other) if word.endswith("texts.jsonl") else word for word in _resumed(data, runs)]


def _from(name: str, flag: str) -> Callable[[Path, Path], list[str]]:
    """PPO from another run in place of the one that a flag names."""

    def start(data: Path, runs: Path) -> list[str]:
        given = arguments("ppo", data, runs, out=runs / "new")
        given[given.index(flag) + 1] = str(runs / name)
        return given

    return start


MISMATCHES = {
    "stage": Mismatch(
        _nothing, lambda data, runs: arguments("sft", data, runs, out=runs / "half"), "folder of a sft run"
    ),
    "model": Mismatch(_nothing, lambda data, runs: _resumed(data, runs, "--model.width", "32"), "model.width"),
    "tokenizer": Mismatch(_nothing, lambda data, runs: _resumed(data, runs, "--tokenizer", "bpe"), "tokenizer"),
    "data": Mismatch(_nothing, _other_data, "inputs"),
    "setting": Mismatch(_nothing, lambda data, runs: _resumed(data, runs, "--seed", "7"), "seed"),
    "checkpoint's version": Mismatch(_other_version, _resumed, "format_version"),
    "folder's version": Mismatch(_other_config, _resumed, "format_version"),
    "policy from a reward model": Mismatch(_nothing, _from("reward", "--init"), "init"),
    "reward from a policy": Mismatch(_nothing, _from("sft", "--reward"), "reward"),
}


def mismatch(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Starts commands that do not fit what is there: each is refused before it compiles, with the field named."""
    outcome, refused = Outcome(), collections.Counter[str]()
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    names = list(itertools.islice(itertools.cycle(MISMATCHES), n))
    made = ["pretrain"] + (["sft", "reward"] if any(" from a " in name for name in names) else [])
    for stage in made:
        undisturbed(command, stage, data, peace)
    half = _resumed(data, peace)
    struck = start(command, half, strike=Strike(signal.SIGKILL, ("waiting for the devices",), 6, seed))
    if struck.landed is None:
        raise UserError(f"chaos mismatch: the run to resume ended with {struck.status}: {struck.last_line}")
    for name in names:
        runs = folder / "runs"
        shutil.copytree(peace, runs)
        MISMATCHES[name].change(runs)
        given = MISMATCHES[name].start(data, runs)
        # One that compiles is struck, and so ends otherwise.
        end = start(command, given, strike=Strike(signal.SIGKILL, ("compiling",), 0, seed))
        errors = [line for line in end.said.splitlines() if line.startswith(("error: ", "Traceback"))]
        found = end.status == 2 and len(errors) == 1 and MISMATCHES[name].field in errors[0]
        refused[name] += outcome.expect(found, f"{name}: ended with {end.status}, {end.landed}: {end.last_line}")
        shutil.rmtree(runs)
    outcome.counts = {"starts": n, "refused": dict(refused)}
    return outcome


def elastic(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Saves a run on 1, 2 or 4 devices and resumes it on 1, 2 or 4: the same rows, parameters within 1e-5."""
    outcome, largest = Outcome(), 0.0
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    undisturbed(command, "pretrain", data, peace)
    pairs = list(itertools.islice(itertools.cycle(itertools.product(DEVICES, DEVICES)), n))
    for first, second in pairs:
        out = folder / f"run{first}_{second}"
        given = arguments("pretrain", data, peace, out=out)
        before, after = ([*given, "--devices", str(devices)] for devices in (first, second))
        struck = start(command, before, strike=Strike(signal.SIGKILL, ("waiting for the devices",), 6, seed))
        again = start(command, after)
        where = f"saved on {first}, resumed on {second}"
        outcome.expect(struck.landed is not None, f"{where}: not struck, but ended with {struck.status}")
        if outcome.expect(again.status == 0, f"{where}: ended with {again.status}: {again.last_line}"):
            far = result(_distance, out, peace / "pretrain")
            outcome.expect(far["rows"], f"{where}: other rows")
            outcome.expect(far["params"] <= TOLERANCE, f"{where}: parameters differ by {far['params']:.2g}")
            largest = max(largest, far["params"])
        shutil.rmtree(out, ignore_errors=True)
    outcome.counts = {"pairs": [f"{first} to {second}" for first, second in pairs], "largest difference": largest}
    return outcome


def _distance(run: Path, other: Path) -> dict[str, Any]:
    """Largest difference of two runs' parameters, and whether each step had the same rows."""
    params = [jax.tree.leaves(load_params(path / "checkpoints")) for path in (run, other)]
    apart = max(float(np.max(np.abs(a - b))) for a, b in zip(*params, strict=True))
    rows, others = (read_rows(path / "metrics.jsonl") for path in (run, other))
    # Another batch has another loss, by far more than sums in another order.
    same = len(rows) == len(others) and all(
        row["step"] == other["step"] and row["tokens"] == other["tokens"] and abs(row["loss"] - other["loss"]) < 1e-4
        for row, other in zip(rows, others, strict=True)
    )
    return {"params": apart, "rows": same}
