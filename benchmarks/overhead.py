"""What is lost around the compiled programs: seconds until a script trains, and the host's share of an iteration.

python benchmarks/overhead.py --results benchmarks/OVERHEAD.md

Start-up: each stage's script is started twice on the embedded corpus, with an empty cache of compiled programs and with
the one that the first start left; the time is from the start of the process to the first row of metrics.jsonl, a
whole step. Host: each stage trains in this process at shape S (benchmarks/shapes.py); between two updates the clock
runs from the moment when the last one's arrays are there until the next program is called, its batch on the device.
All that the host does is in it: reading metrics back and writing them, the batch, its transfer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from rlhf_jax.cli.startup import use_fast_settings

if __name__ == "__main__":
    use_fast_settings()

import jax
import numpy as np
from shapes import SIZES

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.data import RankingRows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.parallel import mesh
from rlhf_jax.runs import lifecycle
from rlhf_jax.trainers import ppo, pretrain, reward, sft

STAGES = ("pretrain", "sft", "reward", "ppo")
# Iterations that are not counted: the first ones compile.
WARM = 2


class Timed:
    """An update that notes how long it ran and how long nothing ran before it, in seconds."""

    def __init__(self, update: mesh.CompiledUpdate, mesh: Any) -> None:
        self.update = update
        self.mesh = mesh
        self.ran: list[float] = []
        self.idle: list[float] = []
        self.ended: float | None = None

    def __call__(self, state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = jax.block_until_ready(mesh.shard_rows(batch, self.mesh))
        called = time.perf_counter()
        found = jax.block_until_ready(self.update(state, batch, *frozen))
        if self.ended is not None:
            self.idle.append(called - self.ended)
            self.ran.append(time.perf_counter() - called)
        self.ended = time.perf_counter()
        return found

    def prepare(self, state: TrainState, batch: Any, *frozen: Any) -> None:
        self.update.prepare(state, batch, *frozen)

    @property
    def share(self) -> float:
        """Median time without a program over the median time with one."""
        return statistics.median(self.idle[WARM:]) / statistics.median(self.ran[WARM:])


def host_shares(folder: Path, steps: int) -> dict[str, tuple[float, float]]:
    """Stage -> (share of an iteration in which no program runs, seconds of an iteration)."""
    made: list[Timed] = []
    compiled = lifecycle.jit_update

    def timed(update: mesh.Update, mesh: Any) -> Timed:
        made.append(Timed(compiled(update, mesh), mesh))
        return made[-1]

    lifecycle.jit_update = timed  # type: ignore[assignment]
    layers, width, heads, vocabulary, context = SIZES["S"]
    model = ModelConfig.gpt2(layers=layers, width=width, heads=heads, vocab_size=vocabulary, context=context)
    corpus = load_corpus()

    def out(name: str) -> dict[str, Any]:
        return {"out": str(folder / name), "steps": steps}

    pretrain.run(
        pretrain.Config(model=model, batch=16, row_length=256, **out("pretrain")), texts=corpus.texts, heldout=[]
    )
    tuned = {"init": str(folder / "pretrain")}
    sft.run(sft.Config(batch=16, **tuned, **out("sft")), records=corpus.demonstrations, heldout=[])
    random = np.random.default_rng(0)
    pairs = random.integers(4, vocabulary, (16 * steps, 2, 128)).tolist()
    rankings = RankingRows([(pair, [1, 2]) for pair in pairs], 128)
    reward.run(reward.Config(batch=16, init=str(folder / "sft"), **out("reward")), rankings=rankings, demonstrations=[])
    settings = {"batch": 32, "prompt_length": 64, "epochs": 4, "minibatches": 4}
    ppo.run(
        ppo.Config(
            init=str(folder / "sft"),
            reward=str(folder / "reward"),
            episode=EpisodeConfig(response_length=64),
            **settings,  # type: ignore[arg-type]
            **out("ppo"),
        ),
        prompts=corpus.prompts,
    )
    lifecycle.jit_update = compiled
    return {
        stage: (found.share, statistics.median(found.ran[WARM:])) for stage, found in zip(STAGES, made, strict=True)
    }


def first_row(script: str, folder: Path, cache: Path, *arguments: str) -> tuple[float, float]:
    """Seconds from the start of a script to its first row of metrics, and from that one to the next, an iteration."""
    metrics = folder / "metrics.jsonl"
    flags = ("--out", str(folder), "--steps", "3", "--log-every", "1", *arguments)
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment | {"XDG_CACHE_HOME": str(cache)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    came: list[float] = []
    while process.poll() is None and len(came) < 2:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > len(came):
            came.append(time.perf_counter() - start)
        time.sleep(0.005)
    errors = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{errors}")
    return came[0], came[1] - came[0]


def starts(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Stage -> seconds to the first row at the first start and at the second, and those of an iteration."""
    found: dict[str, list[tuple[float, float]]] = {}
    rankings = folder / "rankings.jsonl"
    demonstrations = load_corpus().demonstrations[:400]
    with rankings.open("w", encoding="utf-8") as file:
        for right, wrong in itertools.pairwise(demonstrations):
            row = {"prompt": right.prompt, "chosen": right.completion, "rejected": wrong.completion}
            file.write(json.dumps(row) + "\n")
    for turn in ("first", "second"):
        runs_of = folder / turn

        def of(name: str, runs_of: Path = runs_of) -> str:
            return str(runs_of / name)

        flags: dict[str, Callable[[], tuple[str, ...]]] = {
            "pretrain": lambda: ("--data", "embedded"),
            "sft": lambda: ("--init", of("pretrain"), "--data", "embedded"),
            "reward": lambda: ("--init", of("sft"), "--data", str(rankings)),
            "ppo": lambda: ("--init", of("sft"), "--reward", of("reward"), "--data", "embedded"),
        }
        for stage in STAGES:
            seconds = first_row(stage, runs_of / stage, folder / "cache", *flags[stage]())
            found.setdefault(stage, []).append(seconds)
    return {stage: (first, second, iteration) for stage, ((first, _), (second, iteration)) in found.items()}


def imported(statement: str) -> float:
    """Seconds of a fresh interpreter that runs a statement: median of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="iterations of each stage for the host's share")
    parser.add_argument("--results", default="", help="file for the tables, such as benchmarks/OVERHEAD.md")
    given = parser.parse_args()
    names = "import rlhf_jax; [getattr(rlhf_jax, name) for name in rlhf_jax.__all__]"
    lines = [
        "# What is lost around the programs",
        "",
        f"Made by `benchmarks/overhead.py` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}.",
        "",
        f"`import rlhf_jax`: {imported('import rlhf_jax'):.2f} s; with all its public names: {imported(names):.2f} s.",
        "",
        "| stage | first start, s | second start, s | of it an iteration, s | host, share of an iteration |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        begun, shares = starts(Path(name)), host_shares(Path(name) / "host", given.steps)
    for stage in STAGES:
        first, second, iteration = begun[stage]
        share, seconds = shares[stage]
        lines.append(
            f"| {stage} | {first:.1f} | {second:.1f} | {iteration:.2f} | {100 * share:.2f}% of {seconds:.2f} s |"
        )
    lines += [
        "",
        "A start ends with the first row of metrics, after an iteration on the embedded corpus at the script's",
        "defaults, so training began that much earlier. The host's share is the median time between two programs over",
        "that of a program, at shape S: 16 x 256 tokens, demonstrations in batches of 16, 16 pairs x 128, 32 episodes",
        "of 64 + 64 tokens, 4 epochs x 4 minibatches.",
    ]
    print("\n".join(lines))
    if given.results:
        Path(given.results).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
