"""How cost grows with width, depth, batch, context, response length and devices: times and fitted exponents.

python benchmarks/scaling.py --json scaling.json --results benchmarks/RESULTS.md

A training step, or sampling, is timed at a few values of one size, the others fixed; the exponent is the slope of
log time against log size. Beside it stands the slope of the floating-point operations, counted from the shapes: what a
machine would show that does nothing else. Small sizes lie below it, since a step has fixed costs. A CPU's devices share
its cores: there the same batch on more of them costs the same at best, and the exponent is what spreading it costs.
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

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from rlhf_jax.cli.startup import use_fast_settings

if __name__ == "__main__":
    use_fast_settings()

import jax
import jax.numpy as jnp
import numpy as np
from page import ORDER, made_by, write_section

from rlhf_jax.arrays import TokenBatch
from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.generate import generate
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.parallel.mesh import jit_update, make_mesh, place
from rlhf_jax.stages import pretrain

BASE = {"width": 256, "layers": 4, "batch": 16, "context": 256, "response": 64, "devices": 1}
VALUES = {
    "width": (128, 256, 512),
    "layers": (2, 4, 8),
    "batch": (8, 16, 32),
    "context": (128, 256, 512),
    "response": (32, 64, 128),
    "devices": (1, 2, 4, 8),
}
JOBS = (
    ("training step", ("width", "layers", "batch", "context", "devices")),
    ("sampling", ("width", "layers", "batch", "response")),
)
VOCABULARY = 4096
VERSIONS = {"ours": {"jax": jax.__version__}}


def model(size: dict[str, int]) -> Transformer:
    shape = {"width": size["width"], "layers": size["layers"], "heads": size["width"] // 64}
    return Transformer(ModelConfig.gpt2(vocab_size=VOCABULARY, context=max(size["context"], 512), **shape))


def training(size: dict[str, int]) -> tuple[Callable[[], Any], float]:
    """(one training step, its operations)."""
    network = model(size)
    params = init_params(network, jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(), 1000)
    mesh = make_mesh(size["devices"])
    state = place(new_state(params, optimizer.init(params), 0), mesh)
    update = jit_update(pretrain.make_update(network, optimizer), mesh)
    shape = (size["batch"], size["context"] + 1)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, shape).astype(np.int32)
    batch = TokenBatch(*(tokens, np.ones(shape, np.int32), np.ones(shape, bool)))  # type: ignore[arg-type]

    def step() -> None:
        nonlocal state
        state, metrics = update(state, batch)
        float(metrics["loss"])

    return step, 3 * network.config.flops_per_token(size["context"]) * size["batch"] * size["context"]


def sampling(size: dict[str, int]) -> tuple[Callable[[], Any], float]:
    """(sampling a response to each of `batch` prompts of 64 tokens, its operations)."""
    network = model(size)
    params = init_params(network, jax.random.key(0))
    prompts, prompt = jnp.ones((size["batch"], 64), jnp.int32), 64

    def run() -> None:
        key = jax.random.key(0)
        mask = jnp.ones(prompts.shape, bool)
        out = generate(network, params, prompts, mask, key, max_new_tokens=size["response"], stop_ids=(), pad_id=0)
        out.tokens.block_until_ready()

    slots = prompt + size["response"]
    return run, network.config.flops_per_token(slots) * size["batch"] * slots


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of a few runs, the first, which compiles, left out."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Of log value against log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measured(job: str, name: str, repeats: int) -> dict[str, Any]:
    """Times at the sizes of one name, and the exponents of time and of operations."""
    make = {"training step": training, "sampling": sampling}[job]
    times, operations = [], []
    for value in VALUES[name]:
        run, work = make(BASE | {name: value})
        times.append(seconds(run, repeats))
        operations.append(work)
    exponents = (slope(VALUES[name], times), slope(VALUES[name], operations))
    return {"sizes": VALUES[name], "seconds": times, "exponents": exponents}


def in_a_child(job: str, name: str, repeats: int) -> dict[str, Any]:
    """The same, in a process whose CPU is as many devices as are asked for."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(VALUES['devices'])}"
    command = [sys.executable, __file__, "--repeats", f"{repeats}", "--one", job, name]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="")
    parser.add_argument("--results", default="", help="page for the table, such as benchmarks/RESULTS.md")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "SIZE"), help="one line of JSON for this one")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one, given.repeats)))
        return
    found = {}
    lines = ["| job | size | seconds | exponent | of the operations |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for job, names in JOBS:
        for name in names:
            on_cpu = jax.default_backend() == "cpu"
            take = in_a_child if name == "devices" and on_cpu else measured
            if name == "devices" and not on_cpu and jax.device_count() < max(VALUES[name]):
                print(f"{job}, {name}: left out, found {jax.device_count()} of {max(VALUES[name])}", file=sys.stderr)
                continue
            result = found[f"{job}, {name}"] = take(job, name, given.repeats)
            pairs = zip(result["sizes"], result["seconds"], strict=True)
            shown = ", ".join(f"{value}: {taken:.3f}" for value, taken in pairs)
            time_, operations = result["exponents"]
            lines.append(f"| {job} | {name} | {shown} | {time_:.2f} | {operations:.2f} |")
            print(lines[-1], flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.results:
        base = ", ".join(f"{name} {value}" for name, value in BASE.items())
        said = [
            f"One size is changed at a time; the others are {base}.",
            "The devices of a CPU share its cores. A sampled token costs its reading of weights and cache more than",
            "its operations, of which the last column counts a prompt of 64 tokens' too: time follows tokens sampled.",
        ]
        write_section(given.results, ORDER[2], [made_by("scaling.py", VERSIONS), "", *said, "", *lines])


if __name__ == "__main__":
    main()
