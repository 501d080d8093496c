"""Ours and the peer in turn, in one run: the same shapes, threads and allocator; ratios with their spread.

python benchmarks/compare.py --job sample --peer-python .peers/bin/python --json out.json

Two workers, each in its own environment, hold the job ready; a sample of the one is followed by a sample of the other,
so that the machine's drift meets both. A sample is quiet where everything else used less than 0.2 cores meanwhile. The
speed of a job is the median of its quiet samples, or of all where fewer than three were quiet, which is then said.
Without --job all of them run; --results benchmarks/RESULTS.md writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from page import ORDER, made_by, write_section
from shapes import JOBS, SIZES

from rlhf_jax.cli.startup import TUNABLES

QUIET = 0.2
IN_A_ROW = 3
# Where each side is as installed: our scripts start themselves anew with huge pages, torch's and TRL's do not.
AS_INSTALLED = ("lm_installed",)


class Side:
    """One worker process."""

    def __init__(self, command: Sequence[str], huge_pages: bool) -> None:
        threads = str(len(os.sched_getaffinity(0)))
        environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS", "PYTHONPATH")}
        environment |= {"OMP_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = TUNABLES
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        os.set_blocking(self.process.stderr.fileno(), False)  # type: ignore[union-attr]
        self.facts = self._answer()["ready"]

    def sample(self) -> dict[str, float]:
        """Runs one: {"work", "wall", "cpu", "others"}."""
        self._tell("go")
        return self._answer()

    def end(self) -> float:
        """Peak resident memory, MiB."""
        self._tell("end")
        peak = float(self._answer()["peak_mib"])
        self.process.wait()
        return peak

    def _tell(self, word: str) -> None:
        self.process.stdin.write(word + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            said = self.process.stderr.read() or ""  # type: ignore[union-attr]
            raise SystemExit(f"{' '.join(self.process.args)} ended:\n{said[-3000:]}")  # type: ignore[arg-type]
        with contextlib.suppress(TypeError):
            # Read what was said meanwhile, so that its pipe never fills.
            self.process.stderr.read()  # type: ignore[union-attr]
        return json.loads(line)  # type: ignore[no-any-return]


def speeds(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Work per second of the quiet samples, or of all where fewer than three are quiet."""
    quiet = [s for s in samples if s["others"] < QUIET]
    used = quiet if len(quiet) >= 3 else samples
    rates = sorted(s["work"] / s["wall"] for s in used)
    return {
        "min": rates[0],
        "median": statistics.median(rates),
        "max": rates[-1],
        "samples": len(samples),
        "quiet": len(quiet),
        "only_quiet": len(quiet) >= 3,
    }


def compare(job: str, size: str, peer_python: str, samples: int, rows: str) -> dict[str, Any]:
    """Both sides' speeds and their ratio."""
    given = ["--job", job, "--size", size, "--rows", rows]
    ours = Side([sys.executable, str(HERE / "ours.py"), *given], huge_pages=True)
    peer = Side([peer_python, str(HERE / "peer.py"), *given], huge_pages=job not in AS_INSTALLED)
    taken: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    while len(taken["peer"]) < samples:
        for name, side in (("ours", ours), ("peer", peer)):
            # Training does not pause, and after a pause a step can take three times as long: memory that was handed
            # back to the system has gone to others meanwhile.
            side.sample()
            taken[name] += [side.sample() for _ in range(min(IN_A_ROW, samples - len(taken[name])))]
    found = {name: speeds(rows) for name, rows in taken.items()}
    pairs = sorted(
        (a["work"] / a["wall"]) / (b["work"] / b["wall"])
        for a, b in zip(taken["ours"], taken["peer"], strict=True)
        if max(a["others"], b["others"]) < QUIET or not (found["ours"]["only_quiet"] and found["peer"]["only_quiet"])
    )
    memory = {"ours": ours.end(), "peer": peer.end()}
    return {
        "job": job,
        "size": size,
        "shape": JOBS[job],
        "unit": f"{JOBS[job]['unit']}/s",
        **found,
        "ratio": {"min": pairs[0], "median": found["ours"]["median"] / found["peer"]["median"], "max": pairs[-1]},
        "peak_mib": memory,
        "memory_ratio": memory["ours"] / memory["peer"],
        "versions": {"ours": ours.facts, "peer": peer.facts},
        "samples": taken,
    }


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    spread = "{min:.2f} / **{median:.2f}** / {max:.2f}".format(**found["ratio"])
    quiet = " and ".join(f"{found[side]['quiet']}" for side in ("ours", "peer"))
    loud = "" if found["ours"]["only_quiet"] and found["peer"]["only_quiet"] else " (all used)"
    ours, peer = (f"{found[side]['median']:.1f}" for side in ("ours", "peer"))
    return (
        f"| {found['job']} | {found['unit']} | {ours} | {peer} | {spread} "
        f"| {found['peak_mib']['ours']:.0f} / {found['peak_mib']['peer']:.0f} = {found['memory_ratio']:.2f} "
        f"| {quiet} of {found['ours']['samples']}{loud} |"
    )


HEAD = (
    "| job | unit | ours | peer | ratio, min / median / max | peak MiB | quiet samples |\n|---|---|---|---|---|---|---|"
)


def section(results: Sequence[dict[str, Any]]) -> list[str]:
    """The section of benchmarks/RESULTS.md."""
    versions = results[0]["versions"] | {"peer": {k: v for r in results for k, v in r["versions"]["peer"].items()}}
    return [
        made_by("compare.py", versions),
        "",
        f"Ratio: ours / peer in work per second, of samples taken in turn in one run, {IN_A_ROW} of a side at a time;",
        "the one before them, after the other side's turn, is not counted. A sample is quiet where everything else",
        f"used less than {QUIET} cores meanwhile. Both sides have the same threads and malloc's huge pages, but in",
        "`lm_installed`, where the peer starts as it is installed. Sizes: `benchmarks/shapes.py`.",
        "",
        HEAD,
        *map(row, results),
        "",
        "What the peer is: `lm` torch and transformers without a trainer; `lm_installed` and `sft_varied` TRL's",
        "SFTTrainer, the latter with packing; `reward` and `rankings` TRL's RewardTrainer, which takes pairs, so that",
        "`rankings` counts each response once, in one pair, where ours learns from all six pairs of four; `sample*`",
        "transformers' generate; `ppo*` TRL's PPOTrainer. float32 and no gradient checkpointing on both sides.",
    ]


@contextlib.contextmanager
def prepared(data: str, size: str) -> Iterator[str]:
    """The rows of sft_varied in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.jsonl")
        given = ["--prepare", path, "--data", data, "--size", size]
        subprocess.run([sys.executable, str(HERE / "ours.py"), *given], check=True)
        yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, action="append", help="repeatable; all if not given")
    parser.add_argument("--peer-python", required=True, help="an interpreter with torch, transformers, TRL, datasets")
    parser.add_argument("--size", choices=SIZES, default="S", help="S: 4.3M parameters, M: 91.5M")
    parser.add_argument("--samples", type=int, default=9, help="of each side")
    parser.add_argument("--data", default="", help="demonstrations for sft_varied; the embedded corpus if not given")
    parser.add_argument("--json", default="", help="file for everything that was measured")
    parser.add_argument("--results", default="", help="file for the table, such as benchmarks/RESULTS.md")
    given = parser.parse_args()
    results = []
    print(HEAD)
    for job in given.job or list(JOBS):
        with prepared(given.data, given.size) if job == "sft_varied" else contextlib.nullcontext("") as rows:
            results.append(compare(job, given.size, given.peer_python, given.samples, rows))
        print(row(results[-1]), flush=True)
        if given.json:
            machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
            whole = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "python": platform.python_version()}
            Path(given.json).write_text(json.dumps(whole | {"results": results}, indent=1) + "\n", encoding="utf-8")
    if given.results:
        write_section(given.results, ORDER[0], section(results))


if __name__ == "__main__":
    main()
