"""Estimates for TPU pods as tables on the console, for `rlhf-jax plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_jax.cli.process import peak_memory
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.pods.chips import Topology, read_topology, written
from rlhf_jax.pods.estimate import GIB, TooLarge, bill, make_plan, pod_devices
from rlhf_jax.pods.models import read_model
from rlhf_jax.pods.programs import Work

# Fastest first: --search tries both, --remat auto falls back to the next if one does not fit.
REMAT: tuple[Literal["dots", "full"], ...] = ("dots", "full")

if TYPE_CHECKING:
    from rlhf_jax.cli.plan import Config


def work_of(config: Config, mesh: dict[str, int], remat: Literal["none", "full", "dots"]) -> Work:
    """The work to estimate on a mesh."""
    model = dataclasses.replace(
        read_model(config.model),
        dtype="bfloat16",
        scan_layers=True,
        remat=remat,
        head_chunk=config.head_chunk,
        dropout=0.0,
    )
    same = {field.name for field in dataclasses.fields(Work)} - {"model", "stage", "mesh"}
    settings = {name: value for name, value in vars(config).items() if name in same}
    return Work(model=model, stage=config.stage, mesh=mesh, **settings)


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Meshes worth trying: fsdp over all chips, tensor parallelism over a few neighbours, or full replicas."""
    for tensor in (1, 4, 8):
        for data in (1, 4, 16):
            if chips % (tensor * data) == 0 and chips // (tensor * data) >= 1:
                yield {"data": data, "fsdp": chips // (tensor * data), "tensor": tensor}


def run(config: Config) -> None:
    """Prints the estimate."""
    topology = read_topology(config.topology)
    chosen = RunConfig(batch=1, steps=1).mesh_shape | {"fsdp": topology.chips}
    if config.mesh:
        chosen = _mesh(config.mesh)
    if config.search:
        search(config, topology)
        return
    started = time.monotonic()
    remat, found = first_that_fits(config, chosen, topology)
    plan: dict[str, Any] = {"model": config.model, "remat": remat, "head_chunk": config.head_chunk} | found
    if config.tokens and config.only != "memory":
        plan |= bill(plan, config.tokens, config.price)
    plan["wall_seconds"] = time.monotonic() - started
    plan["host_peak_bytes"] = peak_memory()
    _show(plan)
    if config.json:
        write_file(Path(config.json), json.dumps(plan, indent=1) + "\n")
    if not plan["fits"]:
        worst = max(plan["programs"], key=lambda name: plan["programs"][name]["hbm_bytes"])
        found = plan["programs"][worst]["hbm_bytes"] / GIB
        raise UserError(
            f"{worst}: expected at most {topology.chip.memory / GIB:.0f} GiB per chip, got {found:.1f}; use "
            f"--microbatches {2 * config.microbatches}, --remat full, a smaller --batch, or more chips"
        )


def first_that_fits(config: Config, mesh: dict[str, int], topology: Topology) -> tuple[str, dict[str, Any]]:
    """Returns (rematerialisation, plan) of the requested setting, or of the first that fits, else of the last.

    Without memory estimates there is nothing to compare: the last is taken, which needs least memory.
    """
    tried = REMAT if config.remat == "auto" else (config.remat,)
    if config.only == "time":
        tried = tried[-1:]
    for remat in tried[:-1]:
        try:
            plan = make_plan(work_of(config, mesh, remat), topology, only=config.only, while_it_fits=True, say=_say)
            if plan["fits"]:
                return remat, plan
            reason = f"{_most(plan) / GIB:.1f} GiB a chip"
        except TooLarge as error:
            reason = str(error).partition(";")[0]
        _say(f"--remat {remat} does not fit ({reason}); continuing with --remat {tried[-1]}")
    return tried[-1], make_plan(work_of(config, mesh, tried[-1]), topology, only=config.only, say=_say)


def search(config: Config, topology: Topology) -> None:
    """Estimates each mesh and rematerialisation, and prints those that fit, fastest first.

    Raises:
      UserError: without the TPU compiler; if no mesh fits, or none is possible with these settings.
    """
    pod_devices(topology)
    found: list[tuple[float, str, dict[str, Any]]] = []
    impossible: UserError | None = None
    estimated = 0
    for mesh in meshes(topology.chips):
        for remat in REMAT if config.remat == "auto" else (config.remat,):
            label = f"{written(mesh)} remat={remat}"
            try:
                plan = make_plan(work_of(config, mesh, remat), topology, only=config.only)
            except UserError as error:
                _say(f"{label}: {error}")
                if isinstance(error, TooLarge):
                    estimated += 1
                else:
                    impossible = impossible or error
                continue
            estimated += 1
            most = _most(plan)
            _say(f"{label}: {'fits' if plan['fits'] else 'does not fit'}, {most / GIB:.1f} GiB a chip")
            if plan["fits"]:
                found.append((-plan.get("tokens_per_second", -most), label, {"mesh": mesh, "remat": remat} | plan))
    if impossible is not None and not estimated:
        raise impossible
    if not found:
        raise UserError(f"{config.model} {config.stage}: nothing tried fits {topology.name}; use more chips")
    found.sort(key=lambda one: one[0])
    table = Table("mesh and remat", "tokens/s", "utilisation", "GiB a chip", box=box.SIMPLE)
    for _, label, plan in found:
        most = _most(plan)
        speed, share = plan.get("tokens_per_second"), plan.get("utilisation")
        table.add_row(
            label,
            "-" if speed is None else f"{speed:,.0f}",
            "-" if share is None else f"{share:.1%}",
            f"{most / GIB:.1f}",
        )
    Console(highlight=False).print(table)
    if config.json:
        text = json.dumps([plan for _, _, plan in found], indent=1)
        write_file(Path(config.json), text + "\n")


def _mesh(text: str) -> dict[str, int]:
    """Devices along each axis, parsed by the rules of a run's --mesh."""
    config: Any = object.__new__(RunConfig)
    object.__setattr__(config, "mesh", text)
    object.__setattr__(config, "devices", 1)
    shape: dict[str, int] = config.mesh_shape
    return shape


def _most(plan: dict[str, Any]) -> float:
    """Bytes per chip of the program that needs most."""
    return max((row["hbm_bytes"] for row in plan["programs"].values() if "hbm_bytes" in row), default=0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(plan: dict[str, Any]) -> None:
    """Prints two tables and the figures per step."""
    console = Console(highlight=False)
    held = ", ".join(
        f"{name} {plan[f'{name}_bytes'] / GIB:.2f}"
        for name in ("parameters", "optimizer", "frozen")
        if plan[f"{name}_bytes"]
    )
    console.print(
        f"{plan['model']} {plan['stage']} on {plan['topology']}, mesh {written(plan['mesh'])}: "
        f"{plan['parameters']:,} parameters; GiB a chip all the time: {held}",
        soft_wrap=True,
    )
    table = Table("program", box=box.SIMPLE)
    for name in ("GiB a chip", "limit", "temporaries", "cache", "compiled in s", "seconds", "roofline", "utilisation"):
        table.add_column(name, justify="right")
    for name, row in plan["programs"].items():
        sizes = [f"{row[key] / GIB:.2f}" if key in row else "-" for key in ("temporaries_bytes", "cache_bytes")]
        timed = [f"{row[key]:.3g}" if key in row else "-" for key in ("estimate_seconds", "roofline_seconds")]
        table.add_row(
            name,
            f"{row['hbm_bytes'] / GIB:.2f}" if "hbm_bytes" in row else "-",
            f"{plan['limit_bytes'] / GIB:.0f}",
            *sizes,
            f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "-",
            *timed,
            f"{row['utilisation']:.1%}" if "utilisation" in row else "-",
        )
    console.print(table)
    if not plan["pieces"]:
        return
    table = Table("piece", box=box.SIMPLE)
    for name in ("times", "TFLOP", "GB of HBM", "GB received", "ms: roofline", "compiler", "links", "utilisation"):
        table.add_column(name, justify="right")
    for name, row in plan["pieces"].items():
        table.add_row(
            name,
            str(row["times"]),
            f"{row['flops'] / 1e12:.4g}",
            f"{row['bytes'] / 1e9:.4g}",
            f"{row['collective_bytes'] / 1e9:.4g}",
            *(f"{row[key] * 1e3:.4g}" for key in ("roofline_seconds", "compiler_seconds", "wire_seconds")),
            f"{row['utilisation']:.1%}",
        )
    console.print(table)
    if "decode" in plan["pieces"]:
        row = plan["pieces"]["decode"]
        print(
            f"decoding: {row['estimate_seconds'] * 1e3:.2f} ms a token, {row['over_limit']:.2f} times the "
            f"{row['limit_seconds'] * 1e3:.2f} ms that reading weights and cache takes"
        )
    print(
        f"a step: {plan['step_seconds']:.3g} s (roofline {plan['roofline_seconds']:.3g}), "
        f"{plan['tokens_per_second']:,.0f} tokens/s, {plan['utilisation']:.1%} of the chips' peak"
    )
    if "bill" in plan:
        print(f"{plan['tokens']:.3g} tokens: {plan['chip_hours']:,.0f} chip-hours, {plan['bill']:,.2f} in all")
