"""Strikes one of two processes of a run, twenty times: what becomes of the other, and of the run started again.

python tests/stress/cluster_stress.py [--strikes 20]

A strike kills a process (SIGKILL), stops it with all its threads (SIGSTOP), or makes it stuck with its heartbeats
alive, after a random step. The other must end within 30 s, not with status 0 and with the step named; started again,
the run must end with the same bits and the same rows of metrics as the one that was left in peace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rich.console
import rich.table

from rlhf_jax.runs.checkpoint import saved_steps
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import read_rows
from scripts.local_cluster import Cluster

STRIKES = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "stuck": signal.SIGUSR1}
LIMIT = 30.0
"""Seconds that the other process may take to end."""
STEPS = 30
SAVE_EVERY = 10
SETTINGS = (
    *("--tokenizer", "bytes", "--model.width", "16", "--model.layers", "1", "--model.heads", "2"),
    *("--model.context", "32", "--row-length", "24", "--batch", "8", "--devices", "4"),
    *("--steps", f"{STEPS}", "--save-every", f"{SAVE_EVERY}", "--log-every", "1"),
)


# Fingerprint of the parameters of a finished run, and its losses by step.
Result = tuple[str, list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one strike.

    seconds: until the other process ended. status, said: its exit status, and its lines of error. struck_at: the last
    step in the metrics.
    """

    seconds: float
    status: int
    said: str
    struck_at: int

    @property
    def ended_well(self) -> bool:
        """All that is asked of the other process."""
        return self.seconds <= LIMIT and self.status != 0 and "step " in self.said and 0 < self.struck_at < STEPS


def write_data(folder: Path) -> Path:
    """A few lines to train on."""
    words = ("red", "blue", "green", "cat")
    rows = [json.dumps({"text": f"{a} and {b}, {b} and {a}. " * 3}) for a in words for b in words]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "texts.jsonl"


# What starts the processes of a run; test_distributed.py has one that starts them faster.
CLUSTER = Cluster


def start(folder: Path, name: str, *, devices: int = 2) -> Cluster:
    """The run `name` in two processes that can be made stuck."""
    me = str(Path(__file__).resolve())
    flags = ("--data", str(folder / "texts.jsonl"), "--out", str(folder / name), *SETTINGS)
    return CLUSTER([me, "--be-struck", *flags], processes=2, devices=devices, echo=False)


def steps_done(folder: Path) -> int:
    """By the metrics of a run."""
    return max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)


def result(folder: Path) -> Result:
    """Of a finished run."""
    run = RunFolder.open(folder, stages=("pretrain",))
    return run.fingerprint, [(row["step"], row["loss"]) for row in read_rows(run.metrics)]


def undisturbed(folder: Path) -> Result:
    """The result of a run that is left in peace."""
    statuses = start(folder, "undisturbed").wait()
    if any(statuses):
        raise RuntimeError(f"the undisturbed run ended with {statuses}")
    return result(folder / "undisturbed")


def strike(folder: Path, name: str, kind: str, victim: int, after: int) -> Outcome:
    """The run `name`, begun or gone on with, struck once `after` steps are done."""
    cluster = start(folder, name)
    struck, other = cluster.children[victim], cluster.children[1 - victim]
    # A checkpoint counts once it is written, some steps after its own.
    due = after // SAVE_EVERY * SAVE_EVERY
    while struck.poll() is None and (
        steps_done(folder / name) < after or max(saved_steps(folder / name / "checkpoints"), default=0) < due
    ):
        time.sleep(0.01)
    began = time.monotonic()
    struck.send_signal(STRIKES[kind])
    at = steps_done(folder / name)
    try:
        status = other.wait(LIMIT + 30)
    except subprocess.TimeoutExpired:
        status = 0
    seconds = time.monotonic() - began
    cluster.kill()
    cluster.wait()
    said = " | ".join(line for line in cluster.lines[1 - victim] if "error:" in line)
    return Outcome(seconds, status, said, at)


def finish(folder: Path, name: str) -> Result | None:
    """The result of a run started again and left in peace, None if that failed."""
    return None if any(start(folder, name).wait()) else result(folder / name)


def be_struck(arguments: list[str]) -> None:
    """The pretraining script, which SIGUSR1 makes stuck for ever, in its main thread alone."""
    from rlhf_jax.cli import process
    from rlhf_jax.cli.app import main as command

    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1e6))
    process.use_compilation_cache()
    command(["pretrain", *arguments])


def main() -> None:
    """All strikes and their table."""
    if sys.argv[1:2] == ["--be-struck"]:
        be_struck(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strikes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which it strikes")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON instead of a table")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kinds = list(STRIKES)
    table = rich.table.Table("process", "was", "after step", "the other ended in", "status", "said", "again: same bits")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        wanted = undisturbed(folder)
        good, outcomes = 0, []
        for number in range(arguments.strikes):
            kind, victim = kinds[number % 3], number // 3 % 2
            outcome = strike(folder, f"{number}", kind, victim, rng.randrange(1, STEPS - 10))
            same = finish(folder, f"{number}") == wanted
            good += outcome.ended_well and same
            struck = {"process": victim, "was": kind, "ended_well": outcome.ended_well, "same": same}
            outcomes.append({**dataclasses.asdict(outcome), **struck})
            if arguments.json:
                continue
            said = re.sub(r"^.*?error: ", "", outcome.said)[:120]
            row = (f"{victim}", kind, f"{outcome.struck_at}", f"{outcome.seconds:.1f} s", f"{outcome.status}", said)
            table.add_row(*row, "yes" if same else "NO")
            print(*row, same, flush=True)
    if arguments.json:
        print(json.dumps(outcomes))
        sys.exit(0 if good == arguments.strikes else 1)
    rich.console.Console(width=200).print(table)
    print(f"{good} of {arguments.strikes} as wanted")
    sys.exit(0 if good == arguments.strikes else 1)


if __name__ == "__main__":
    main()
