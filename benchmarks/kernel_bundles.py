"""Length of the compiler's schedule for one block of splash attention, by block and kernel: plan/kernels.py's table.

.venv-pods/bin/python benchmarks/kernel_bundles.py v5e:2x4

The listings of all passes take some hundred MB of a temporary folder, for as long as a block is looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp(prefix='bundles_')}"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.layers import attention
from rlhf_jax.parallel.sharding import AXES, DATA, FSDP
from rlhf_jax.pods.chips import read_topology
from rlhf_jax.pods.estimate import pod_devices
from rlhf_jax.pods.kernels import BUNDLES, PHASES

LISTINGS = Path(os.environ["LIBTPU_INIT_ARGS"].rpartition("=")[2])


def loop_length(text: str) -> int:
    """Bundles from the body of a listing's loop to its exit."""
    begins = [int(found, 16) for found in re.findall(r"^\s*0x([0-9a-f]+) LB:", text, re.MULTILINE)]
    ends = [int(found, 16) for found in re.findall(r"^\s*0x([0-9a-f]+)\s*:.*loop exit test", text, re.MULTILINE)]
    return max(ends) - min(begins)


def bundles(topology: str, block: int, head: int = 128) -> tuple[int, ...]:
    """Of one block of the scores, in the order of PHASES."""
    devices = pod_devices(read_topology(topology))
    mesh = jax.make_mesh((1, len(devices), 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    attention.BLOCK = block
    rows, length = len(devices), 4 * block
    there = NamedSharding(mesh, PartitionSpec((DATA, FSDP)))

    def array(*shape: int, dtype: object = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(attention.splash(query, key, value, segments, scale=1.0).astype(jnp.float32))

    heads = [array(rows, number, length, head) for number in (8, 2, 2)]
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(*heads, array(rows, length, dtype=jnp.int32)).compile()
    found = {}
    for file in LISTINGS.glob("*splash*-final_bundles.txt"):
        phase = re.search(r"splash_\w*?_(fwd|dkv|dq)_.*\d\d-final_bundles", file.name)
        if phase is not None:
            found[phase[1]] = loop_length(file.read_text(encoding="utf-8"))
    for file in LISTINGS.iterdir():
        file.unlink()
    return tuple(found[phase] for phase in PHASES)


def main() -> None:
    """Prints a line for each block."""
    if len(sys.argv) != 2:
        raise SystemExit("found no topology, wanted one such as v5e:2x4; use benchmarks/kernel_bundles.py v5e:2x4")
    try:
        chip = read_topology(sys.argv[1]).chip.name
        for block, known in BUNDLES[chip].items():
            print(f"{chip} {block}: {bundles(sys.argv[1], block)}, in the table {known}", flush=True)
    except UserError as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(LISTINGS, ignore_errors=True)


if __name__ == "__main__":
    main()
