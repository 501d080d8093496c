"""Trials that are scripts of a checkout: they start clusters and servers, and print JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.errors import UserError

STRESS = Path(__file__).resolve().parents[2] / "tests" / "stress"


def _said_by(script: str, *arguments: str) -> Any:
    """The JSON that a script of the checkout prints.

    Raises:
      UserError: if this is no checkout, or the script fails.
    """
    path = STRESS / script
    if not path.exists():
        raise UserError(f"chaos: expected a checkout of rlhf_jax with {path}, got an installed package; clone it")
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise UserError(f"chaos: {path} ended with {done.returncode}: {done.stderr[-1000:]}") from None


def peer(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Kills, stops or blocks one of two processes: the other ends within 30 s, and a relaunch gives the same bits."""
    return judge_strikes(_said_by("cluster_stress.py", "--strikes", str(n), "--seed", str(seed), "--json"))


def judge_strikes(found: list[dict[str, Any]]) -> Outcome:
    """The outcome of what `cluster_stress.py` prints."""
    outcome = Outcome({"strikes": len(found), "slowest seconds": max(strike["seconds"] for strike in found)})
    for strike in found:
        outcome.expect(strike["ended_well"], f"the other process: {strike}")
        outcome.expect(strike["same"], f"started again, other bits: {strike}")
    return outcome


def labels(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Kills the labelling server n times under 16 labellers: no judgement lost, changed or doubled."""
    return judge_labels(
        _said_by("label_stress.py", "--kills", str(n), "--items", str(20 * n), "--stored", "100", "--requests", "1")
    )


def judge_labels(found: dict[str, Any]) -> Outcome:
    """The outcome of what `label_stress.py` prints."""
    kills = found["kills"]
    outcome = Outcome(kills)
    for name in ("lost", "changed", "doubled", "different_replies"):
        outcome.expect(kills[name] == 0, f"{name}: {kills[name]}")
    outcome.expect(kills["rows"] == kills["wanted"], f"rows: expected {kills['wanted']}, got {kills['rows']}")
    outcome.expect(kills["integrity"] == "ok", f"the database: {kills['integrity']}")
    outcome.expect(not kills["other_answers"], f"answers of the server: {kills['other_answers']}")
    return outcome
