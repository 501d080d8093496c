"""HBM traffic of a program without loops, and the compiler's cycle estimates, read from the program's text.

The compiler's own "bytes accessed" counts a weight that is fetched in four slices four times, and also counts data that
stays in the chip's fast memory. Its "optimal_seconds" is based on that, with -1 s for each operation that it cannot
time, such as collectives. The cycle estimates that its scheduler uses are reliable.
"""

from __future__ import annotations

import math
import re

from rlhf_jax.pods.hlo import BYTES, computations, times_of

# Operations without traffic: they name existing data.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "iota"}
PARTS = {"slice", "dynamic-slice", "gather"}
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(.*)")
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?")


def cycles(text: str) -> float:
    """Cycles of all operations for which the compiler has an estimate; loops count every iteration.

    Collectives and prefetches have no estimate; operations in a fusion are included in the fusion's.
    """
    bodies = computations(text)
    times = times_of(bodies)
    return float(
        sum(
            times[name] * int(n)
            for name, lines in bodies.items()
            for line in lines
            for n in re.findall(r'"estimated_cycles":"(\d+)"', line)
        )
    )


def hbm_bytes(text: str) -> float:
    """Bytes read from and written to HBM by a program without loops.

    An operation reads its operands and writes its result, if they are in HBM; of a sliced operand it reads only the
    slice, and of an operand updated in place it writes only the update.
    """
    bodies = computations(text)
    held: dict[str, float] = {}
    total = 0.0
    for line in bodies["ENTRY"]:
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        _, name, shape, kind, operands, rest = match.groups()
        held[name] = _size(shape)
        names = re.findall(r"%([\w.\-]+)", operands)
        if kind in FREE or kind.endswith("-done"):
            continue
        if kind in ("copy-start", "slice-start"):
            # (operands, result, …) or (result, operand, …): a copy's sizes are equal; a slice is the smaller one.
            sizes = sorted((_size(part, anywhere=True) for part in _parts(shape)), reverse=True)
            moved = sizes[1] if len(sizes) > 1 else sizes[0]
            total += moved * (2 if all("S(" not in part for part in _parts(shape)[:2]) else 1)
        elif kind in PARTS:
            total += 2 * held[name]
        elif kind == "dynamic-update-slice":
            total += 2 * held.get(names[1], 0.0) if len(names) > 1 else 0.0
        elif kind == "fusion":
            called = re.search(r"calls=%([\w.\-]+)", rest)
            read, written = _fused(bodies.get(called[1], []) if called else [], [held.get(n, 0.0) for n in names])
            total += read + (held[name] if written is None else min(written, held[name]))
        else:
            total += held[name] + sum(held.get(n, 0.0) for n in names)
    return total


def _fused(lines: list[str], held: list[float]) -> tuple[float, float | None]:
    """(bytes read, bytes written or None for the whole result) of a fusion, from its operands' bytes in HBM."""
    parsed = [match.groups() for line in lines if (match := INSTRUCTION.match(line))]
    if not parsed:
        return sum(held), None
    numbers = {name: int(operands) for _, name, _, kind, operands, _ in parsed if kind == "parameter"}
    sizes = {name: _size(shape, anywhere=True) for _, name, shape, *_ in parsed}
    read, written = 0.0, None
    for name, number in numbers.items():
        users = [
            (user, kind, names)
            for _, user, _, kind, operands, _ in parsed
            if name in (names := re.findall(r"%([\w.\-]+)", operands))
        ]
        whole = held[number] if number < len(held) else 0.0
        if users and all(kind in PARTS and names[0] == name for _, kind, names in users):
            read += min(whole, sum(sizes[user] for user, _, _ in users))
        elif users and all(kind == "dynamic-update-slice" and names[0] == name for _, kind, names in users):
            change = sum(sizes.get(names[1], 0.0) for _, _, names in users)
            written = change + (0.0 if written is None else written)
        else:
            read += whole
    return read, written


def _parts(shape: str) -> list[str]:
    return [match.group(0) for match in SHAPE.finditer(shape)]


def _size(shape: str, *, anywhere: bool = False) -> float:
    """Bytes of an array or a tuple of arrays in HBM (a layout with S(n) is in another memory), or `anywhere`."""
    total = 0
    for kind, dims, layout in SHAPE.findall(shape):
        if kind in BYTES and (anywhere or "S(" not in layout):
            total += BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
    return float(total)
