"""Runs that go wrong end with the cause and a good checkpoint, and healthy runs are not stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.chaos.forks import result, start
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.chaos.small import arguments, undisturbed, write_data
from rlhf_jax.runs.checkpoint import load_params, saved_steps
from rlhf_jax.runs.metrics import read_rows

UPDATES = 10
"""Updates within which a run must end."""


class Wrong(NamedTuple):
    """A run that must end. stage: its stage. more: its flags. says: one of these is in the error."""

    stage: str
    more: tuple[str, ...]
    says: tuple[str, ...]


def absurd(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """A reward function whose rewards make no sense."""
    return [1e9 * (1 + len(completion)) for completion in completions]


_ALARMS = ("--alarms", "stop")
WRONG = {
    "learning rate": Wrong("pretrain", ("--optimizer.learning-rate", "1e6"), ("exploded", "not finite", "absurd")),
    # A response without an end would get the score of such ones in place of its own.
    "rewards": Wrong(
        "ppo",
        ("--reward-function", "rlhf_jax.chaos.guards:absurd", "--episode.missing-end", "keep"),
        ("absurd",),
    ),
    "collapse": Wrong(
        "ppo", ("--policy.learning-rate", "3", "--policy.schedule", "constant", *_ALARMS), ("alarm", "exploded")
    ),
}


def guards(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Starts runs with settings that destroy them, and n healthy ones, which no alarm may stop."""
    outcome, ended = Outcome(), dict[str, int]()
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    for stage in ("pretrain", "sft"):
        undisturbed(command, stage, data, peace)
    for name, wrong in WRONG.items():
        out = folder / "wrong"
        given = [*arguments(wrong.stage, data, peace, out=out, model=False), *wrong.more]
        end = start(command, given)
        found = result(_left, out)
        named = end.status == 2 and any(word in end.last_line for word in wrong.says)
        outcome.expect(named, f"{name}: ended with {end.status}: {end.last_line}")
        outcome.expect(found["updates"] <= UPDATES, f"{name}: ended after {found['updates']} updates")
        outcome.expect(found["finite"], f"{name}: a checkpoint is not finite")
        ended[name] = found["updates"]
        shutil.rmtree(out)
    stopped = 0
    for number in range(n):
        out = folder / "healthy"
        given = [*arguments("ppo", data, peace, out=out, model=False), *_ALARMS, "--seed", str(seed + number)]
        end = start(command, given)
        stopped += not outcome.expect(end.status == 0, f"healthy, seed {seed + number}: {end.last_line}")
        shutil.rmtree(out)
    outcome.counts = {"updates until the end": ended, "healthy": n, "stopped": stopped}
    return outcome


def _left(run: Path) -> dict[str, Any]:
    """Updates that a run has made, and whether the parameters of all its checkpoints are finite."""
    steps = saved_steps(run / "checkpoints")
    leaves = [leaf for step in steps for leaf in jax.tree.leaves(load_params(run / "checkpoints", step))]
    updates = max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)
    return {"updates": updates, "finite": all(bool(np.isfinite(leaf).all()) for leaf in leaves)}
