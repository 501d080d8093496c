"""SIGTERM in any phase of a command, and a second command for the same run."""

from __future__ import annotations

import collections
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_jax.chaos.forks import End, Strike, start
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.chaos.small import STAGES, STEPS, arguments, finish, undisturbed, write_data
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import stopping
from rlhf_jax.runs.checkpoint import saved_steps
from rlhf_jax.runs.locks import hold

ANSWERED = 10.0
"""Seconds from SIGTERM to the end of the process."""
REFUSED = 2.0
"""Seconds from the start of a second command to its refusal, of which Python's own start is a part."""
# The stage in which each phase is struck, and the phases.
PHASES = {
    "start": ("ppo", (stopping.READING,)),
    "compiling": ("ppo", ("compiling",)),
    "rollout": ("ppo", ("sampling",)),
    "step": ("ppo", ("updating", "waiting for the devices")),
    "evaluating": ("sft", ("evaluating",)),
    "saving": ("sft", ("saving", "beside: saving", "beside: deleting")),
}


def sigterm(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Stops runs in each phase in turn: within 10 s, with one line, at most one step lost, and then the same bits."""
    outcome, landed, slowest = Outcome(), collections.Counter[str](), 0.0
    data, peace = folder / "data", folder / "peace"
    write_data(data)
    stages = {stage for stage, _ in PHASES.values()}
    wanted = {}
    for stage in STAGES:
        if stage in stages or (stage in ("pretrain", "sft") and "ppo" in stages):
            wanted[stage] = undisturbed(command, stage, data, peace, model=False)
    names = list(PHASES)
    for number in range(n):
        name = names[number % len(names)]
        stage, phases = PHASES[name]
        out = folder / f"run{number}"
        given = arguments(stage, data, peace, out=out, model=False)
        after = 0 if name in ("start", "compiling") else 1 + (seed + number) % (STEPS - 4)
        end = start(_answering, command, given, strike=Strike(signal.SIGTERM, phases, after, seed + number))
        if not outcome.expect(end.landed is not None, f"{name}: not struck, ended with {end.status}: {end.last_line}"):
            continue
        landed[name] += 1
        slowest = max(slowest, end.seconds)
        _check(outcome, name, end, max(saved_steps(out / "checkpoints"), default=0))
        again, found = finish(command, given)
        outcome.expect(found is not None, f"{name}: started again, ended with {again.status}: {again.last_line}")
        if found is not None:
            # The stop has made a row of its own.
            same = all(found[fact] == wanted[stage][fact] for fact in ("params", "handed on", "finished", "torn"))
            outcome.expect(same, f"{name}: another result after the stop at {end.landed}")
        shutil.rmtree(out, ignore_errors=True)
    outcome.counts = {"signals": sum(landed.values()), "landed": dict(landed), "slowest seconds": round(slowest, 1)}
    return outcome


def _answering(command: Command, given: list[str]) -> None:
    """What the program `rlhf-jax` does, which answers SIGTERM from its first line."""
    stopping.answer_sigterm(f"rlhf-jax {given[0]}")
    command(given)


def _check(outcome: Outcome, name: str, end: End, saved: int) -> None:
    """Checks the answer to SIGTERM."""
    where = f"{name}, {end.landed}"
    outcome.expect(end.status == 128 + signal.SIGTERM, f"{where}: ended with {end.status}: {end.last_line}")
    outcome.expect(end.seconds <= ANSWERED, f"{where}: took {end.seconds:.1f} s")
    told = [line for line in end.said.splitlines() if line.startswith(("stopped", "error", "Traceback"))]
    outcome.expect(len(told) == 1 and told[0].startswith("stopped"), f"{where}: said {told}")
    step = end.landed["step"] if end.landed else 0
    outcome.expect(saved >= step - 1, f"{where}: the last checkpoint is that of step {saved}")


def lock(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Starts a second command while another process holds the run's folder; kills the holder, and takes the lock."""
    outcome, slowest = Outcome(), 0.0
    holding = "import sys, time; from pathlib import Path; from rlhf_jax.runs.locks import hold\n"
    holding += "with hold(Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    for number in range(n):
        run = folder / f"run{number}"
        with subprocess.Popen([sys.executable, "-c", holding, str(run)], stdout=subprocess.PIPE) as holder:
            if holder.stdout is None or not holder.stdout.readline():
                raise UserError("chaos lock: the process that holds the lock did not start")
            second = [sys.executable, "-m", "rlhf_jax", "sft", "--out", str(run), "--data", "none", "--init", "none"]
            began = time.monotonic()
            done = subprocess.run(second, capture_output=True, text=True)
            seconds = time.monotonic() - began
            slowest = max(slowest, seconds)
            outcome.expect(seconds <= REFUSED, f"refused after {seconds:.1f} s")
            named = done.returncode == 2 and f"process {holder.pid} is writing" in done.stderr
            outcome.expect(
                named and done.stderr.count("\n") == 1, f"ended with {done.returncode}: {done.stderr[-300:]}"
            )
            holder.kill()
        try:
            with hold(run):
                pass
        except UserError as error:
            outcome.expect(False, f"not free after the holder was killed: {error}")
    outcome.counts = {"commands": n, "slowest seconds": round(slowest, 1)}
    return outcome
