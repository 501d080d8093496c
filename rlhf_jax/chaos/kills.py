"""SIGKILL at any point of a stage or of the whole recipe: the run that is started again ends with the same bits."""

from __future__ import annotations

import collections
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.chaos.forks import Strike, start
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.chaos.small import STAGES, STEPS, arguments, expect_the_same, undisturbed, write_data

# Where a kill shall land: its name among the counts, and the phases of that name.
PLACES = {
    "save": ("saving", "beside: saving"),
    "delete": ("beside: deleting",),
    "rollout": ("sampling",),
    "epoch": ("updating", "waiting for the devices"),
    "any": (),
}
OF_STAGE = {
    "ppo": ("rollout", "epoch", "save", "delete", "any"),
    "pretrain": ("save", "delete", "any", "delete", "save"),
    "sft": ("delete", "save", "delete", "any", "save"),
    "reward": ("save", "any", "delete", "save", "delete"),
}
# PPO has most places.
TURNS = ("ppo", "pretrain", "ppo", "sft", "ppo", "reward")
KILLS_OF_A_RUN = 5


def place_of(phase: str, stage: str) -> str:
    """Name of the place of a phase; "other" if it has none."""
    for name, phases in PLACES.items():
        if phase in phases and (name != "epoch" or stage == "ppo"):
            return name
    return "other"


def kill(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Kills runs of the four stages, and compares each with one that was left in peace."""
    outcome, places, stages, late = Outcome(), collections.Counter[str](), collections.Counter[str](), 0
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    turns = TURNS[: -(-n // KILLS_OF_A_RUN)]
    # Those of the turns, and those that they start from.
    needed = [
        stage for stage in STAGES if stage in turns or (stage in ("pretrain", "sft") and set(turns) != {"pretrain"})
    ]
    wanted = {stage: undisturbed(command, stage, data, peace, model=False) for stage in needed}
    killed = runs = 0
    while killed < n and runs < 10 * n:
        stage, out = turns[runs % len(turns)], folder / f"run{runs}"
        given = arguments(stage, data, peace, out=out, model=False)
        runs += 1
        for landed in _kills(command, given, OF_STAGE[stage][: n - killed], seed + runs, outcome):
            killed += 1
            stages[stage] += 1
            places[place_of(landed["phase"], stage)] += 1
            late += landed["step"] > 1
        expect_the_same(outcome, command, given, wanted[stage], f"{stage}, run {runs}")
        shutil.rmtree(out, ignore_errors=True)
    outcome.counts = {"kills": killed, "after step 1": late, "runs": runs, **places, "stages": dict(stages)}
    outcome.at_least({"kills": n, "after step 1": 0.8 * n})
    outcome.at_least(dict.fromkeys(("save", "delete", "rollout", "epoch"), n // 10))
    return outcome


def _kills(
    command: Command, given: list[str], places: Sequence[str], seed: int, outcome: Outcome
) -> Iterator[dict[str, Any]]:
    """Starts a run and kills it once in each of the places, unless it ends before; where each kill landed."""
    after = 2
    for number, place in enumerate(places):
        end = start(command, given, strike=Strike(signal.SIGKILL, PLACES[place], after, 100 * seed + number))
        if end.landed is None:
            outcome.expect(end.status == 0, f"{given[0]}: ended with {end.status}: {end.last_line}")
            return
        yield end.landed
        after = min(end.landed["step"] + 1, STEPS - 2)


def pipeline(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Kills the whole recipe at random moments, and compares all that it makes with an undisturbed one."""
    outcome, dice, struck = Outcome(), random.Random(seed), collections.Counter[str]()
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    wanted = {stage: undisturbed(command, stage, data, peace) for stage in STAGES}
    killed = recipes = 0
    while killed < n and recipes < 10 * n:
        runs = folder / f"recipe{recipes}"
        recipes += 1
        for stage in STAGES:
            given = arguments(stage, data, runs)
            for _ in range(min(dice.randrange(3) or stage == STAGES[0], n - killed)):
                strike = Strike(signal.SIGKILL, (), dice.randrange(STEPS), seed + killed)
                if start(command, given, strike=strike).landed is None:
                    break
                struck[stage] += 1
                killed += 1
            expect_the_same(outcome, command, given, wanted[stage], f"recipe {recipes}, {stage}")
        shutil.rmtree(runs, ignore_errors=True)
    outcome.counts = {"kills": killed, "recipes": recipes, "stages": dict(struck)}
    outcome.at_least({"kills": n})
    return outcome
