"""Specifications of TPU chips and the topology of a pod."""

from __future__ import annotations

import dataclasses
import math
import re

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by Google's published figures.

    Attributes:
      name: e.g. "v5e".
      flops: peak bfloat16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: of HBM, bytes/s.
      wire: one-way bytes/s of all links between chips together, the published Gbit/s / 8.
      links: number of these links.
      dimensions: of the torus.
      wrap: an axis is closed to a ring if its length is a multiple of this.
      clock: Hz, to convert the compiler's cycles: peak FLOP/s over FLOPs per cycle (v4: 8 units of 128 x 128
        multipliers); for v6e, whose units are not all published, v5p's.

    Source: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "system architecture"; for rings also "TPU
      configurations" there, and jax-ml.github.io/scaling-book/tpus.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    wire: float
    links: int
    dimensions: int
    wrap: int
    clock: float

    @property
    def link(self) -> float:
        """One-way bytes/s of one link."""
        return self.wire / self.links


CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1228e9, 2400e9 / 8, 6, 3, 4, 1.05e9),
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 1600e9 / 8, 4, 2, 16, 1.5e9),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 4800e9 / 8, 6, 3, 4, 1.75e9),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 3584e9 / 8, 4, 2, 16, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A block of chips of one kind; `shape` is the number of chips along each axis of the torus."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Total number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The topology in Google's notation, e.g. v5e:16x16."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def links(self, coordinates: list[tuple[int, ...]]) -> int:
        """Number of links over which a chip of a group receives: per axis two if the group fills a ring, else one.

        Args:
          coordinates: of the group's chips.
        """
        count = 0
        for axis, length in enumerate(self.shape):
            seen = len({place[axis] for place in coordinates})
            ring = seen == length and length % self.chip.wrap == 0
            count += 0 if seen <= 1 else 2 if ring else 1
        return max(count, 1)


def read_topology(text: str) -> Topology:
    """Parse a topology such as `v5e:16x16`.

    Raises:
      UserError: for a kind or a shape that libtpu does not support, with the nearest one.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"topology: expected one of {', '.join(CHIPS)} with its chips along each axis, such as v5e:16x16 or "
            f"v5p:4x4x8, got {text!r}"
        )
    chip = CHIPS[match[1]]
    shape = tuple(int(n) for n in match[2].split("x"))
    if len(shape) != chip.dimensions:
        usual = "4x4x4" if chip.dimensions == 3 else "8x8"
        raise UserError(f"topology: expected {chip.dimensions} axes, such as {chip.name}:{usual}, got {text!r}")
    # A host has 2 x 2 chips; libtpu does not describe blocks that are not made of whole hosts.
    whole = tuple(max(n + n % 2, 2) for n in shape[:2]) + tuple(max(n, 1) for n in shape[2:])
    if shape != whole:
        raise UserError(
            f"topology: expected whole hosts of 2x2 chips, got {text!r}; use {chip.name}:{'x'.join(map(str, whole))}"
        )
    return Topology(chip, shape)


def check_mesh(mesh: dict[str, int], topology: Topology) -> None:
    """Check that the mesh uses every chip.

    Raises:
      UserError: if it does not, with the nearest mesh that does.
    """
    devices = math.prod(mesh.values())
    if devices == topology.chips:
        return
    tensor = math.gcd(mesh["tensor"], topology.chips)
    data = math.gcd(mesh["data"], topology.chips // tensor)
    near = {"data": data, "fsdp": topology.chips // (data * tensor), "tensor": tensor}
    raise UserError(
        f"mesh: expected the {topology.chips} devices of {topology.name}, got {written(mesh)}, {devices} devices; "
        f"use --mesh {written(near)}"
    )


def written(mesh: dict[str, int]) -> str:
    """Format a mesh as for --mesh, without axes of size 1."""
    return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "data=1"
