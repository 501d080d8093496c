"""What test_distributed.py runs in each of two processes: gradients and a step of three objectives.

Each process compares half of them with one device of its own, and says in one line what it found; with the bits of all
of them, by which the two are compared.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.config import OptimConfig
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import jit_update, make_mesh, place, row_places
from rlhf_jax.runs.checkpoint import fingerprint
from tests import test_parallel

MESH = {"data": 2, "fsdp": 2, "tensor": 2}  # `data` between the processes, the others within each
# ε large: where a gradient is 0 but for rounding, Adam would blow the rounding up.
ADAM = make_optimizer(OptimConfig(learning_rate=0.01, warmup_steps=0, epsilon=1e-3), 4)
# Takes a step, and keeps the gradient in its state.
BOTH = optax.GradientTransformation(
    lambda params: (jax.tree.map(jnp.zeros_like, params), ADAM.init(params)),
    lambda gradient, state, params=None: (
        (taken := ADAM.update(gradient, state[1], params))[0],
        (gradient, taken[1]),
    ),
)


def host(tree: Any) -> Any:
    return jax.tree.map(processes.fetch, tree)


def found(name: str, compares: bool) -> tuple[float | None, int, str]:
    """Of an objective, (error, rows, bits).

    error: the largest difference of a gradient, a metric or a parameter after the step, from those of one device; None
    if it is not to be compared. rows: read by this process. bits: a fingerprint of all that was found.
    """
    make, make_batch, part_of = test_parallel.OBJECTIVES[name]
    batch = jax.tree.map(np.asarray, make_batch(np.random.default_rng(0)))
    own = part_of(test_parallel.params())
    start = new_state(own, jax.jit(BOTH.init)(own), 0)
    mesh = make_mesh(**MESH)
    places = row_places(mesh)
    assert places is not None
    mine = places(test_parallel.ROWS)
    state, facts = jit_update(make(), mesh)(place(start, mesh), jax.tree.map(lambda x: x[mine], batch))
    gradient, rest = host((state.opt_state[0], (state.params, state.opt_state[1])))
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(gradient))
    numbers = {key: float(value) for key, value in facts.items()}
    bits = fingerprint((gradient, rest, {key: np.float32(value) for key, value in numbers.items()}))
    if not compares:
        return None, len(mine), bits
    alone, right = jax.jit(make())(start, batch)
    worst = max(abs(numbers[key] - float(right[key])) / (1 + abs(float(right[key]))) for key in right)
    there = (alone.opt_state[0], (alone.params, alone.opt_state[1]))
    pairs = zip(jax.tree.leaves(host(there)), jax.tree.leaves((gradient, rest)), strict=True)
    return max(worst, *(float(np.abs(a - b).max()) for a, b in pairs)), len(mine), bits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    arguments = parser.parse_args()
    processes.initialize(arguments.coordinator, arguments.processes, arguments.process)
    test_parallel.RECORDER = BOTH
    # By turns. Not SFT, whose update is pretraining's with another mask.
    names = enumerate(("pretrain", "reward", "ppo"))
    print(json.dumps({name: found(name, i % 2 == arguments.process) for i, name in names}), flush=True)


if __name__ == "__main__":
    main()
