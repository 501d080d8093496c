"""Plans from compiled programs: bytes per chip, two estimates of the step time, and cost."""

from __future__ import annotations

import math
import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.parallel.sharding import AXES
from rlhf_jax.pods.chips import Chip, Topology, check_mesh, written
from rlhf_jax.pods.hlo import Collective, collectives
from rlhf_jax.pods.kernels import kernels
from rlhf_jax.pods.programs import Piece, Program, Programs, Work, bytes_of
from rlhf_jax.pods.traffic import cycles, hbm_bytes

# The buffers of an asynchronously fused collective are counted in every fusion around it, so this is off for counting.
COUNTABLE: dict[str, str | bool] = {"xla_tpu_enable_async_collective_fusion": "false"}
GIB = 2**30
SECONDS = ("roofline_seconds", "compiler_seconds", "kernel_seconds", "estimate_seconds")


class TooLarge(UserError):
    """A program that needs more memory than a chip has."""


def pod_devices(topology: Topology) -> Sequence[Any]:
    """Abstract devices of a pod, to compile for.

    Raises:
      UserError: without libtpu.
    """
    from jax.experimental import topologies

    # Treat both cores of a v4 chip as one device, which is the default for v5p.
    more = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **more
        ).devices
    except (RuntimeError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{topology.name}: the TPU compiler has no such pod or is not installed ({reason}); "
            "`pip install libtpu` adds it, without a TPU too; in a checkout `sh .ci/setup-pods` makes an environment "
            "with it: .venv-pods/bin/python -m rlhf_jax plan"
        ) from None
    return devices


def compiled(program: Program, mesh: Any, options: dict[str, str | bool] | None = None) -> Any:
    """Compile a program for the devices of a mesh."""
    with jax.set_mesh(mesh):
        jitted = jax.jit(program.function, donate_argnums=program.donated, out_shardings=program.out)
        return jitted.lower(*program.arguments).compile(compiler_options=options)


def resident_bytes(programs: Programs) -> dict[str, int]:
    """Bytes per chip that are always in use: trained parameters, optimizer state, frozen networks."""
    return {
        "parameters": bytes_of(programs.trained()),
        "optimizer": bytes_of(programs.opt_state()),
        "frozen": bytes_of(programs.frozen()),
    }


def check_fit(programs: Programs, topology: Topology) -> dict[str, int]:
    """Resident bytes per chip, by kind.

    Raises:
      UserError: if they alone do not fit, with the nearest mesh or pod that holds them.
    """
    held = resident_bytes(programs)
    total, limit = sum(held.values()), topology.chip.memory
    if total <= limit:
        return held
    chips, work = topology.chips, programs.work
    # Sharded over all chips, with half of the memory left for temporaries.
    everywhere = total * math.prod(work.mesh[name] for name in AXES[1:]) / chips
    if everywhere <= limit / 2:
        hint = f"use --mesh {written({**dict.fromkeys(AXES, 1), 'fsdp': chips})}"
    else:
        needed = 2 ** math.ceil(math.log2(everywhere * chips / (limit / 2)))
        hint = f"use about {needed} chips of {topology.chip.name} instead of {chips}"
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in held.items() if size)
    raise UserError(
        f"mesh {written(work.mesh)}: expected at most the {limit / GIB:.0f} GiB of {topology.chip.name}, got "
        f"{total / GIB:.1f} GiB a chip ({parts}) before any work; {hint}"
    )


def memory_of(program: Any, arguments: Any, resident: int, cache: int = 0) -> dict[str, float]:
    """Bytes per chip while a compiled program runs, including everything that is resident.

    Args:
      program: the compiled program.
      arguments: of the program.
      resident: resident bytes, which include resident arguments.
      cache: bytes of the KV cache, which the compiler counts among its temporaries.
    """
    stats = program.memory_analysis()
    own = stats.output_size_in_bytes - stats.alias_size_in_bytes
    most = max(resident, stats.argument_size_in_bytes)
    return {
        "arguments_bytes": stats.argument_size_in_bytes,
        "output_bytes": own,
        "cache_bytes": cache,
        "temporaries_bytes": stats.temp_size_in_bytes - min(cache, stats.temp_size_in_bytes),
        "code_bytes": stats.generated_code_size_in_bytes,
        "hbm_bytes": most + own + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
    }


def wire_seconds(found: list[Collective], topology: Topology, devices: Sequence[Any]) -> float:
    """Seconds that the links are busy with the collectives in sequence, each on all axes that it spans."""
    total = 0.0
    for one in found:
        places = [tuple(devices[number].coords)[: len(topology.shape)] for number in one.group if number < len(devices)]
        total += one.times * one.received / (topology.links(places) * topology.chip.link)
    return total


def counted(program: Any, topology: Topology, devices: Sequence[Any]) -> dict[str, float]:
    """FLOPs, bytes and seconds per chip of a program without loops."""
    text = program.as_text()
    found, own = collectives(text), kernels(text, topology.chip.name)
    return {
        # Missing or negative for programs that only move arrays.
        "flops": max(program.cost_analysis().get("flops", 0.0), 0.0) + own["kernel_flops"],
        "bytes": hbm_bytes(text),
        "collective_bytes": sum(one.received * one.times for one in found),
        "wire_seconds": wire_seconds(found, topology, devices),
        "compiler_seconds": (cycles(text) + own["kernel_cycles"]) / topology.chip.clock,
        "kernel_seconds": own["kernel_cycles"] / topology.chip.clock,
    }


def scheduled(text: str, topology: Topology, devices: Sequence[Any]) -> dict[str, float]:
    """Seconds of a whole program by the compiler's schedule, all loop iterations included, or of its links if longer.

    In contrast to pieces, communication is assumed to overlap with computation throughout.
    """
    wire = wire_seconds(collectives(text), topology, devices)
    here = (cycles(text) + kernels(text, topology.chip.name)["kernel_cycles"]) / topology.chip.clock
    return {"wire_seconds": wire, "scheduled_seconds": max(here, wire)}


def extrapolated(one: dict[str, float], two: dict[str, float], layers: int) -> dict[str, float]:
    """Extrapolate counts to full depth, from the counts of one and of two unrolled layers."""
    return {name: max(one[name] + (layers - 1) * (two[name] - one[name]), 0.0) for name in one}


def timed(figures: dict[str, float], chip: Chip, *, hidden: bool) -> dict[str, float]:
    """Add the two time estimates of a piece, in seconds.

    roofline_seconds is the maximum of compute, memory and link time at peak rates. estimate_seconds also takes the
    compiler's cycles of all operations in sequence into account.

    Args:
      figures: counts of a piece.
      chip: the chip.
      hidden: True if communication overlaps with computation; otherwise its time is added in estimate_seconds.
    """
    here = max(figures["flops"] / chip.flops, figures["bytes"] / chip.bandwidth)
    wire = figures["wire_seconds"]
    slower = max(here, figures["compiler_seconds"])
    estimate = max(slower, wire) if hidden else slower + wire
    return {**figures, "roofline_seconds": max(here, wire), "estimate_seconds": estimate}


def piece_figures(piece: Piece, layers: int, topology: Topology) -> dict[str, float]:
    """Counts and times of a piece per execution, extrapolated from one and two layers if it depends on depth."""
    devices = list(piece.on.devices.flat)
    counts = [
        counted(compiled(piece.at(depth), piece.on, COUNTABLE), topology, devices)
        for depth in ((1, 2) if piece.deep and layers > 1 else (1,))
    ]
    figures = counts[0] if len(counts) == 1 else extrapolated(counts[0], counts[1], layers)
    # Decoding waits for every sum over heads; training gathers the next layer while the current one is computed.
    return timed(figures, topology.chip, hidden=piece.program != "rollout")


def check_compiled(name: str, error: Exception) -> UserError:
    """Convert a compiler error, usually about memory, to a one-line error."""
    text = " ".join(str(error).split())
    used = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm", text)
    used = used or re.search(r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", text)
    if used is None:
        return UserError(f"{name}: the compiler rejected it: {text[:300]}")
    return TooLarge(
        f"{name}: expected at most {used[2]} of HBM a chip, got {used[1]}; use a smaller --batch, more --microbatches, "
        "--remat full, a smaller --head-chunk, or more chips"
    )


def make_plan(
    work: Work,
    topology: Topology,
    *,
    only: Literal["", "memory", "time"] = "",
    while_it_fits: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Plan a stage on a pod; bytes, FLOPs and seconds are per chip.

    Args:
      work: the sizes of a step.
      topology: the pod.
      only: "memory" for whole programs only, "time" for pieces only, which take about as long to compile; "" for both.
      while_it_fits: stop at the first program that does not fit.
      say: called with a line for each compiled program.

    Returns:
      The plan as plain JSON.

    Raises:
      UserError: if the mesh, the batch or the model does not fit.
    """
    check_mesh(work.mesh, topology)
    work = work.filled()
    devices = pod_devices(topology)
    programs = Programs(work, devices)
    held = check_fit(programs, topology)
    resident, limit = sum(held.values()), topology.chip.memory
    cache = bytes_of(programs.cache()) if work.stage == "ppo" else 0
    plan: dict[str, Any] = {
        "stage": work.stage,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": work.mesh,
        "limit_bytes": limit,
        **{f"{name}_bytes": size for name, size in held.items()},
        "work": {
            name: value
            for name, value in vars(work).items()
            if name not in ("model", "mesh", "stage") and isinstance(value, int | str)
        },
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs.params())),
        "programs": {},
        "pieces": {},
    }
    whole, pieces = programs.whole(), programs.pieces()
    # The update needs the most memory, so it is compiled first to fail early.
    for name in sorted(whole, key=lambda name: name != "update") if only != "time" else ():
        row = _program_figures(name, whole[name], programs, topology, resident, cache if name == "rollout" else 0)
        row["fits"] = row["hbm_bytes"] <= limit
        plan["programs"][name] = row
        seconds = row["compile_seconds"]
        line = f"{name}: compiled in {seconds:.0f} s, {row['hbm_bytes'] / GIB:.2f} of {limit / GIB:.0f} GiB a chip"
        if name != "rollout":
            useful = sum(piece.model_flops * piece.times for piece in pieces.values() if piece.program == name)
            share = useful / work.rounds(name) / topology.chips / (row["scheduled_seconds"] * topology.chip.flops)
            row["scheduled_utilisation"] = share
            line += f"; by its schedule {row['scheduled_seconds'] * 1e3:.4g} ms, {share:.1%} of the peak"
        say(line)
        if while_it_fits and not row["fits"]:
            return {**plan, "fits": False}
    plan["programs"] = {name: plan["programs"][name] for name in whole if name in plan["programs"]}
    plan["fits"] = all(row["fits"] for row in plan["programs"].values())
    if only != "memory":
        for name, piece in pieces.items():
            figures = piece_figures(piece, work.model.layers, topology)
            figures |= {"times": piece.times, "model_flops": piece.model_flops / topology.chips}
            plan["pieces"][name] = {"program": piece.program, **figures}
            share = plan["pieces"][name]["model_flops"] / (figures["estimate_seconds"] * topology.chip.flops)
            seconds = figures["estimate_seconds"]
            say(f"{name}: {seconds * 1e3:.3g} ms, {piece.times} times a step, {share:.1%} of the peak")
        decode_limit(plan, programs, topology.chip)
        plan |= whole_step(plan, topology, work)
    elif work.stage != "ppo":
        row = plan["programs"]["update"]
        plan |= {"step_seconds": row["scheduled_seconds"], "utilisation": row["scheduled_utilisation"]}
        plan |= {"tokens_per_second": work.tokens / plan["step_seconds"]}
    return plan


def _program_figures(
    name: str, program: Program, programs: Programs, topology: Topology, resident: int, cache: int
) -> dict[str, Any]:
    """Compile a whole program: its memory, beside what is resident, its traffic and its schedule."""
    started, worked = time.monotonic(), time.process_time()
    try:
        binary = compiled(program, programs.mesh)
    except jax.errors.JaxRuntimeError as error:
        raise check_compiled(name, error) from None
    seconds = time.monotonic() - started
    text = binary.as_text()
    found = collectives(text)
    return {
        "compile_seconds": seconds,
        "compile_cpu_seconds": time.process_time() - worked,
        **memory_of(binary, program.arguments, resident, cache),
        "collective_bytes": sum(one.received * one.times for one in found),
        **scheduled(text, topology, list(programs.mesh.devices.flat)),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def decode_limit(plan: dict[str, Any], programs: Programs, chip: Chip) -> None:
    """Add the lower bound on the time of a decoded token: reading weights and KV cache once at the HBM bandwidth."""
    if "decode" in plan["pieces"]:
        read = bytes_of(programs.decoding_params()) + bytes_of(programs.cache())
        row = plan["pieces"]["decode"]
        row["limit_bytes"], row["limit_seconds"] = read, read / chip.bandwidth
        row["over_limit"] = row["estimate_seconds"] / row["limit_seconds"]


def whole_step(plan: dict[str, Any], topology: Topology, work: Work) -> dict[str, float]:
    """Time and throughput of a step from its pieces; also adds utilisation to the plan's programs and pieces.

    A program takes as long as its pieces, or as the compiler's schedule of the whole program if that is longer.
    """
    chip, total, useful = topology.chip, 0.0, 0.0
    for row in plan["pieces"].values():
        row["utilisation"] = row["model_flops"] / (row["estimate_seconds"] * chip.flops)
    for name in dict.fromkeys(row["program"] for row in plan["pieces"].values()):
        program = plan["programs"].setdefault(name, {})
        mine = [row for row in plan["pieces"].values() if row["program"] == name]
        for key in (
            "flops",
            "bytes",
            "model_flops",
            "roofline_seconds",
            "compiler_seconds",
            "kernel_seconds",
            "estimate_seconds",
        ):
            program[key] = sum(row[key] * row["times"] for row in mine)
        whole = work.rounds(name) * program.get("scheduled_seconds", 0.0)
        program["estimate_seconds"] = max(program["estimate_seconds"], whole)
        program["utilisation"] = program["model_flops"] / (program["estimate_seconds"] * chip.flops)
        total += program["estimate_seconds"]
        useful += program["model_flops"]
    return {
        "step_seconds": total,
        "roofline_seconds": sum(row["roofline_seconds"] for row in plan["programs"].values()),
        "tokens_per_step": work.tokens,
        "tokens_per_second": work.tokens / total,
        "utilisation": useful / (total * chip.flops),
    }


def bill(plan: dict[str, Any], tokens: float, price: float) -> dict[str, float]:
    """Chip-hours for this number of tokens, and their cost at `price` per chip-hour."""
    hours = tokens / plan["tokens_per_second"] * plan["chips"] / 3600
    return {"tokens": tokens, "chip_hours": hours, "price": price, "bill": hours * price}
