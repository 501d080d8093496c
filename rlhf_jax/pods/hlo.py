"""Collectives of a compiled program and the bytes that they transfer, read from the program's text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of KINDS.
      shapes: (type, lengths) of its results.
      times: executions per run of the program.
      group: devices of the first group, by their number in the mesh.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    group: tuple[int, ...]

    @property
    def received(self) -> float:
        """Bytes that a chip must receive from others per execution.

        All-gather: the array without the chip's own part. Reduce-scatter: as much as gathering the parts. All-reduce:
        the sum of both.
        """
        size, devices = sum(BYTES.get(kind, 4) * math.prod(shape) for kind, shape in self.shapes), len(self.group)
        others = (devices - 1) / devices if devices else 0.0
        if self.kind == "reduce-scatter":
            return size * (devices - 1)
        if self.kind == "collective-permute":
            return size
        return size * others * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program.

    A collective that the compiler spreads over several fusions has one channel and counts once. A loop that may end
    early, as in sampling, counts with its maximum number of iterations.
    """
    bodies = computations(text)
    times = times_of(bodies)
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        scattered = "all-reduce-scatter" in name
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match is None or not times[name]:
                continue
            kind = "reduce-scatter" if scattered and match[2] == "all-reduce" else match[2]
            group = _group(line)
            shapes = [
                (kind, tuple(int(n) for n in dims.split(",") if n))
                for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
                if kind in BYTES
            ]
            if match[3] and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :]  # a start's type lists its operands before its results
            if kind == "reduce-scatter" and scattered:
                # Inside such a fusion the sum has its full size; the result of the fusion is a shard.
                shapes = [(kind, (math.prod(dims) // max(len(group), 1),)) for kind, dims in shapes]
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else line
            one = Collective(kind, tuple(shapes), times[name], group)
            if key not in found or found[key].times < one.times:
                found[key] = one
    return list(found.values())


def computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation of a program; the program's own computation is "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    name = ""
    # A kernel's metadata contains line breaks, in every operation made from it.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text)
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = "ENTRY" if head[1] else head[2]
            bodies[name] = []
        elif name and line.startswith(" "):
            bodies[name].append(line)
    return bodies


def times_of(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Number of executions of each computation per run of the program."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            rounds = 1
            if " while(" in line:
                rounds = _rounds(line, bodies)
            for kind, names in re.findall(
                r"(calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)",
                line,
            ):
                for called in names.strip("{}").split(","):
                    calls[name].append((called.strip(" %"), rounds if kind in ("body", "condition") else 1))
    times: dict[str, int] = defaultdict(int)

    def walk(name: str, count: int) -> None:
        times[name] += count
        for called, rounds in calls[name]:
            if called in bodies:
                walk(called, count * rounds)

    walk("ENTRY", 1)
    return times


def _rounds(line: str, bodies: dict[str, list[str]]) -> int:
    """Iterations of a loop: the known trip count, or else the constant that its condition compares the counter with."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    names = [condition[1]] if condition else []
    found = [1]
    # On CPU the comparison is in a computation that the condition calls.
    for name in names:
        for one in bodies.get(name, []):
            found += [int(number) for number in re.findall(r"= s32\[\]\S* constant\((\d+)\)", one)]
            names += [called for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", one) if called not in names]
    return max(found)


def _group(line: str) -> tuple[int, ...]:
    """Devices of a collective's first group."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))?\s*\{(.*?)\}", line)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        used = re.findall(r"'(\w+)'", axes[3])
        order = [list(sizes).index(name) for name in used if name in sizes]
        devices = _counted(axes[2]) if axes[2] else np.arange(math.prod(sizes.values()))
        grid = devices.reshape(tuple(sizes.values()))
        size = math.prod(sizes[name] for name in used if name in sizes)
        return tuple(int(n) for n in np.moveaxis(grid, order, range(len(order))).reshape(size, -1)[:, 0])
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if counted:
        groups = tuple(int(n) for n in counted[1].split(","))
        return tuple(int(n) for n in _counted(counted[2]).reshape(groups)[0])
    return ()


def _counted(text: str) -> np.ndarray:
    """Device numbers in the notation `[2,4]T(1,0)`: enumerated over a grid, whose axes are then transposed."""
    lengths, _, order = text.partition("T")
    shape = tuple(int(n) for n in re.findall(r"\d+", lengths))
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose(tuple(int(n) for n in re.findall(r"\d+", order))) if order else grid
