"""FLOPs and cycles of splash attention in a compiled program, which the compiler does not count for kernels.

Both are counted by blocks of the attention scores, without the blocks that the mask skips. A block's cycles are the
length of the compiler's schedule (bundles, one per cycle) for the body of the kernel's loop, read from its listings;
the command is in docs/pods.md. Waiting for memory is not included.
"""

from __future__ import annotations

import math
import re

from rlhf_jax.pods.hlo import computations, times_of

# Bundles per block [edge, edge] of the scores, for head sizes up to 128: (forward, gradient of keys and values,
# gradient of queries), with the libtpu of requirements-pods.lock. On v4 and v5p they are for one core and assume that
# the other is idle, since the kernel's gradients are not split between the two.
BUNDLES: dict[str, dict[int, tuple[int, int, int]]] = {
    "v4": {128: (943, 922, 714), 256: (1452, 1396, 1044), 512: (3109, 3622, 2547)},
    "v5e": {128: (630, 490, 419), 256: (1091, 1054, 718), 512: (2089, 2330, 1756)},
    "v5p": {128: (879, 677, 494), 256: (1336, 1259, 800), 512: (2303, 2564, 1879)},
    "v6e": {128: (557, 467, 361), 256: (984, 940, 657), 512: (1530, 1670, 1311)},
}
PHASES = ("fwd", "dkv", "dq")
# Matrix products per block: q k and p v; q k, p do, v do and ds q; q k, v do and ds k.
PRODUCTS = (2, 4, 3)


def kernels(text: str, chip: str) -> dict[str, float]:
    """FLOPs and cycles of all splash kernels of a program, and the number of kernel runs; loops count every iteration.

    Args:
      text: of the compiled program.
      chip: key of BUNDLES.

    Source: Dao 2023 (arXiv:2307.08691), algorithms 1 and 2, for the products.
    """
    found = {"kernel_flops": 0.0, "kernel_cycles": 0.0, "kernels": 0.0}
    bodies = computations(text)
    times = times_of(bodies)
    for line, often in ((line, times[name]) for name, lines in bodies.items() for line in lines):
        name = re.match(r"\s+(?:ROOT )?%splash_\w*?_(fwd|dkv|dq)_", line)
        if name is None or 'custom_call_target="tpu_custom_call"' not in line:
            continue
        phase = PHASES.index(name[1])
        layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)
        shapes = re.findall(r"\w+\[([\d,]*)\]", layouts[1] if layouts else "")
        steps, query, key = (tuple(map(int, shapes[number].split(","))) for number in (0, 2, 3))
        rows, heads, queries, head = (1,) * (4 - len(query)) + query
        edges = (queries // steps[-2], key[-2] // steps[-1])
        blocks = often * rows * heads * causal_blocks(queries, key[-2], *edges)
        area = math.prod(edges)
        found["kernel_flops"] += blocks * PRODUCTS[phase] * 2.0 * area * head
        found["kernel_cycles"] += blocks * BUNDLES[chip][edges[0]][phase] * math.ceil(head / 128)
        found["kernels"] += often
    return found


def causal_blocks(queries: int, keys: int, edge_q: int, edge_k: int) -> int:
    """Number of score blocks that the causal mask does not skip, with the queries at the end of the keys' tokens."""
    behind = keys - queries
    return sum(
        1
        for first_q in range(0, queries, edge_q)
        for first_k in range(0, keys, edge_k)
        if first_k <= first_q + edge_q - 1 + behind
    )
