"""Runs of a few seconds for the trials: a little data, and the command of each stage on it."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.chaos.forks import End, start
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.errors import UserError
from rlhf_jax.runs.checkpoint import fingerprint, load_params
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import read_rows

STAGES = ("pretrain", "sft", "reward", "ppo")
STEPS = 12
WORDS = ("red", "blue", "green", "cat", "dog")
SHAPE: tuple[str, ...] = ("--tokenizer", "bytes", "--model.width", "16", "--model.layers", "1", "--model.heads", "2")
SHAPE += ("--model.context", "48")
# Each of these is saved, evaluated and deleted several times in a run.
OFTEN = ("--log-every", "1", "--save-every", "2", "--keep-last", "1")
# Figures of how fast a run was.
TIMES = ("time", "tokens_per_second", "peak_share")


def write_data(folder: Path) -> None:
    """Writes the data of all stages."""
    pairs = list(itertools.product(WORDS, WORDS))
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "texts": ({"text": f"{a} and {b}, {b} and {a}. " * 3} for a, b in pairs),
        "answers": ({"prompt": f"{a} {b} ->", "response": f" {b}."} for a, b in pairs),
        "pairs": ({"prompt": f"{a} {b} ->", "chosen": f" {b}.", "rejected": f" {a}{a}"} for a, b in pairs),
        "prompts": ({"prompt": f"{a} {b} ->"} for a, b in pairs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def arguments(stage: str, data: Path, runs: Path, *, out: Path | None = None, model: bool = True) -> list[str]:
    """The command of a stage.

    Args:
      stage: its name.
      data: folder of `write_data`.
      runs: folder of the runs that it starts from, named like their stages.
      out: its own folder; in `runs` if None.
      model: PPO with the reward model in one program; False for a reward function, between sampling and the updates.
    """
    given = ["--out", str(out or runs / stage), "--steps", str(STEPS), *OFTEN]
    tuned = ["--init", str(runs / "sft")]
    heldout = ["--heldout-fraction", "0.2", "--eval-every", "4", "--batch", "4", "--buckets", "48"]
    if stage == "pretrain":
        return [stage, "--data", str(data / "texts.jsonl"), *SHAPE, "--row-length", "24", "--batch", "4", *given]
    if stage == "sft":
        return [stage, "--init", str(runs / "pretrain"), "--data", str(data / "answers.jsonl"), *heldout, *given]
    if stage == "reward":
        return [stage, *tuned, "--data", str(data / "pairs.jsonl"), *heldout, *given]
    own = ["--reward", str(runs / "reward")]
    if not model:
        own = ["--reward-function", "rlhf_jax.rewards:too_long(most=3)"]
    lengths = ["--prompt-length", "16", "--episode.response-length", "8", "--alarms", "warn"]
    sizes = ["--batch", "8", "--minibatches", "2", "--epochs", "2"]
    return [stage, *tuned, *own, "--data", str(data / "prompts.jsonl"), *lengths, *sizes, *given]


def facts(run: Path) -> dict[str, Any]:
    """What a finished run hands on, and its metrics but for the times, as plain JSON. Starts JAX."""
    opened = RunFolder.open(run, stages=STAGES)
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read_rows(opened.metrics)]
    torn = [line for line in opened.metrics.read_text(encoding="utf-8").splitlines() if not line.endswith("}")]
    params = fingerprint(load_params(opened.checkpoints))
    return {"finished": opened.finished, "handed on": opened.fingerprint, "params": params, "rows": rows, "torn": torn}


def finish(command: Command, given: list[str]) -> tuple[End, dict[str, Any] | None]:
    """Starts a command and leaves it in peace; its end, and the facts of its run if it succeeds."""
    out = Path(given[given.index("--out") + 1])
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "facts.json"
        end = start(_tell, command, given, out, told)
        return end, json.loads(told.read_text(encoding="utf-8")) if end.status == 0 else None


def _tell(command: Command, given: list[str], out: Path, told: Path) -> None:
    """Runs a command to its end and writes the facts of its run, in one process."""
    try:
        command(given)
    except SystemExit as end:
        if end.code:
            raise
    told.write_text(json.dumps(facts(out)), encoding="utf-8")


def undisturbed(command: Command, stage: str, data: Path, runs: Path, **options: Any) -> dict[str, Any]:
    """Facts of a run that is left in peace.

    Raises:
      UserError: if it fails.
    """
    end, found = finish(command, arguments(stage, data, runs, **options))
    if found is None:
        raise UserError(f"chaos: {stage}, left in peace, ended with {end.status}: {end.last_line}")
    return found


def expect_the_same(outcome: Outcome, command: Command, given: list[str], expected: dict[str, Any], case: str) -> None:
    """Starts a run again, which must end as the undisturbed one did."""
    end, found = finish(command, given)
    if outcome.expect(found is not None, f"{case}: started again, ended with {end.status}: {end.last_line}") and found:
        unequal = difference(found, expected)
        outcome.expect(not unequal, f"{case}: {unequal}")


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs between the facts of two runs, in words; empty if nothing does."""
    for name in ("finished", "torn", "params", "handed on"):
        if found[name] != expected[name]:
            return f"{name}: expected {str(expected[name])[:12]}, got {str(found[name])[:12]}"
    steps = [[row["step"] for row in facts["rows"]] for facts in (found, expected)]
    if steps[0] != steps[1]:
        return f"steps of the metrics: expected {steps[1]}, got {steps[0]}"
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        for name in sorted({*row, *other}):
            if row.get(name) != other.get(name):
                return f"{name} of step {row['step']}: expected {other.get(name)}, got {row.get(name)}"
    return ""
