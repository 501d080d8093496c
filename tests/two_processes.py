"""What test_distributed.py runs in each of two processes: gradients and a step of the four objectives.

Each process compares with one device of its own, and says in one line what it found.
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


def errors(name: str) -> tuple[float, int]:
    """(the largest difference of a gradient or a parameter after the step, rows that this process read)."""
    make, make_batch, part_of = test_parallel.OBJECTIVES[name]
    batch = jax.tree.map(np.asarray, make_batch(np.random.default_rng(0)))
    trees = {
        "policy": test_parallel.init_params(test_parallel.MODEL, jax.random.key(0)),
        "critic": test_parallel.init_params(test_parallel.SCORER, jax.random.key(1)),
    }
    own = jax.tree.map(lambda x: 2 * x, part_of(trees))
    start = new_state(own, BOTH.init(own), 0)
    alone, facts = jax.jit(make())(start, batch)
    mesh = make_mesh(**MESH)
    places = row_places(mesh)
    assert places is not None
    mine = places(test_parallel.ROWS)
    state, other = jit_update(make(), mesh)(place(start, mesh), jax.tree.map(lambda x: x[mine], batch))
    worst = max(abs(float(other[key]) - float(facts[key])) / (1 + abs(float(facts[key]))) for key in facts)
    for tree in ("params", "opt_state"):
        pair = [jax.tree.leaves(host(getattr(side, tree))) for side in (alone, state)]
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(*pair, strict=True)))
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(host(state.opt_state[0])))
    return worst, len(mine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    arguments = parser.parse_args()
    processes.initialize(arguments.coordinator, arguments.processes, arguments.process)
    test_parallel.RECORDER = BOTH
    print(json.dumps({name: errors(name) for name in test_parallel.OBJECTIVES}), flush=True)


if __name__ == "__main__":
    main()
