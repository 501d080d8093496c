"""What this machine can do: matrix products and copies, by JAX and, where --peer-python is given, by torch.

python benchmarks/floor.py --peer-python .peers/bin/python

The products are those of a training step of shape S (16 x 256 tokens) and of one decoding step of 32 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from page import ORDER, made_by, write_section

SHAPES = {
    "cube": (1024, 1024, 1024),
    "train qkv": (4096, 256, 768),
    "train up": (4096, 256, 1024),
    "train head": (4096, 256, 4096),
    "decode up": (32, 256, 1024),
    "decode head": (32, 256, 4096),
}
FLOATS = 2**26  # of a copy, 256 MiB


def timed(run: Callable[[], Any], work: float, repeats: int = 9) -> float:
    """Median of work per second; each repeat takes long enough to be timed."""
    run()
    start = time.perf_counter()
    run()
    times = max(1, round(0.05 / max(time.perf_counter() - start, 1e-6)))
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            run()
        rates.append(work * times / (time.perf_counter() - start))
    return statistics.median(rates)


def by_jax() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    # In the same memory, as torch does it: fresh memory costs more than the copy.
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1.0, donate_argnums=0)
    found: dict[str, Any] = {"version": jax.__version__}
    for name, (m, k, n) in SHAPES.items():
        left, right = jnp.ones((m, k)), jnp.ones((k, n))
        found[name] = timed(lambda a=left, b=right: product(a, b).block_until_ready(), 2e-9 * m * k * n)  # type: ignore[misc]
    array = jnp.ones(FLOATS)

    def add() -> None:
        nonlocal array
        array = copy(array).block_until_ready()

    found["copy"] = timed(add, 8e-9 * FLOATS)
    return found


def by_torch() -> dict[str, Any]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: dict[str, Any] = {"version": torch.__version__}
    with torch.inference_mode():
        for name, (m, k, n) in SHAPES.items():
            left, right = torch.ones(m, k), torch.ones(k, n)
            found[name] = timed(lambda a=left, b=right: a @ b, 2e-9 * m * k * n)  # type: ignore[misc]
        array = torch.ones(FLOATS)
        found["copy"] = timed(lambda: array.add_(1.0), 8e-9 * FLOATS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="", help="an interpreter with torch")
    parser.add_argument("--only", choices=("jax", "torch"), help="one line of JSON for this one")
    parser.add_argument("--results", default="", help="page for the table, such as benchmarks/RESULTS.md")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(by_jax() if given.only == "jax" else by_torch()))
        return
    columns = {"jax": sys.executable} | ({"torch": given.peer_python} if given.peer_python else {})
    found = {}
    for name, python in columns.items():
        command = [python, __file__, "--only", name]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lines = ["| GFLOP/s (copy: GB/s), medians | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in [*SHAPES, "copy"]:
        shape = " × ".join(map(str, SHAPES[row])) if row in SHAPES else f"{FLOATS * 4 >> 20} MiB"
        lines.append(f"| {row}, {shape} | " + " | ".join(f"{found[name][row]:.1f}" for name in columns) + " |")
    print("\n".join(lines))
    if given.results:
        versions = {name: {"version": found[name]["version"]} for name in columns}
        write_section(given.results, ORDER[1], [made_by("floor.py", versions), "", *lines])


if __name__ == "__main__":
    main()
