"""How cost grows with width, depth, batch, context and response length: measured times and fitted exponents.

python benchmarks/scaling.py --json scaling.json

A training step, or sampling, is timed at a few values of one size, the others fixed; the exponent is the slope of
log time against log size. Beside it stands the slope of the floating-point operations, counted from the shapes: what a
machine would show that does nothing else. Small sizes lie below it, since a step has fixed costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from scripts.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import TokenBatch
from rlhf_jax.generate import generate
from rlhf_jax.model import ModelConfig, Transformer, init_params
from rlhf_jax.optim import OptimConfig, make_optimizer, new_state
from rlhf_jax.parallel import jit_update, make_mesh, place
from rlhf_jax.stages import pretrain

BASE = {"width": 256, "layers": 4, "batch": 16, "context": 256, "response": 64}
VALUES = {
    "width": (128, 256, 512),
    "layers": (2, 4, 8),
    "batch": (8, 16, 32),
    "context": (128, 256, 512),
    "response": (32, 64, 128),
}
VOCABULARY = 4096


def model(size: dict[str, int]) -> Transformer:
    shape = {"width": size["width"], "layers": size["layers"], "heads": size["width"] // 64}
    return Transformer(ModelConfig.gpt2(vocab_size=VOCABULARY, context=max(size["context"], 512), **shape))


def training(size: dict[str, int]) -> tuple[Callable[[], Any], float]:
    """(one training step, its operations)."""
    network = model(size)
    params = init_params(network, jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(), 1000)
    mesh = make_mesh()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    found = {}
    print("| job | size | seconds | exponent | of the operations |\n|---|---|---|---|---|")
    for job, make, names in (
        ("training step", training, ("width", "layers", "batch", "context")),
        ("sampling", sampling, ("width", "layers", "batch", "response")),
    ):
        for name in names:
            times, operations = [], []
            for value in VALUES[name]:
                run, work = make(BASE | {name: value})
                times.append(seconds(run, given.repeats))
                operations.append(work)
            exponents = (slope(VALUES[name], times), slope(VALUES[name], operations))
            found[f"{job}, {name}"] = {"sizes": VALUES[name], "seconds": times, "exponents": exponents}
            shown = ", ".join(f"{value}: {taken:.3f}" for value, taken in zip(VALUES[name], times, strict=True))
            print(f"| {job} | {name} | {shown} | {exponents[0]:.2f} | {exponents[1]:.2f} |", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
