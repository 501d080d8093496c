"""A diagnosis on the console, for `rlhf-jax doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.text import Text

from rlhf_jax.cli.comparing import runs_below
from rlhf_jax.doctor.answers import shown_rows
from rlhf_jax.doctor.diagnosis import diagnosis_of
from rlhf_jax.doctor.patient import open_patient
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.model import count_parameters
from rlhf_jax.parallel.mesh import use_cpu_devices
from rlhf_jax.pretrained.source import with_prefix

if TYPE_CHECKING:
    from rlhf_jax.cli.doctor import Config

# Parameters of a model that takes longer to compile than to run.
SMALL = 2**24
MARKS = {"healthy": ("✓", "green"), "finding": ("✗", "bold red"), "left out": ("–", "dim")}


def run(config: Config) -> None:
    """Examines the runs one after the other, prints what was found, and writes the file."""
    if not Path(config.out).parent.is_dir():
        raise UserError(f"out: expected a file in a folder that exists, got {config.out!r}")
    use_cpu_devices(2)  # two devices to split a gradient over
    names = [name for given in config.runs for name in _names(given)]
    console, found = Console(highlight=False, soft_wrap=True), []
    for name in names:
        patient = open_patient(name, data=config.data, columns=config.columns)
        if patient.source is not None and count_parameters(patient.params) <= SMALL:
            # Compiling is most of the time for a small model, and without XLA's optimisations a third less.
            jax.config.update("jax_disable_most_optimizations", True)
        diagnosis = diagnosis_of(patient)
        found.append(diagnosis)
        show(diagnosis, shown_rows(patient), console)
    healthy = all(diagnosis["healthy"] for diagnosis in found)
    write_file(Path(config.out), json.dumps({"healthy": healthy, "runs": found}, indent=1, ensure_ascii=False) + "\n")
    print(f"diagnosis: {config.out}")
    if not healthy:
        sys.exit(1)


def _names(given: str) -> list[str]:
    """A published model or a run by itself, a folder of runs by its runs."""
    spec, path = with_prefix(given), Path(given)
    if spec != given or not path.is_dir() or (path / "config.json").exists():
        return [given]
    return [str(run) for run in runs_below(path)]


def show(diagnosis: Mapping[str, Any], rows: list[Text], console: Console) -> None:
    """Prints a line for each check, then some rows of demonstrations with their targets in colour."""
    console.print(Text(f"{diagnosis['run']}: {diagnosis['stage']}, on {diagnosis['data']}", style="bold"))
    for check in diagnosis["checks"]:
        mark, style = MARKS[check["status"]]
        line = Text(f"{mark} {check['check']}: ", style=style)
        line.append(check["found"], style="" if check["status"] == "finding" else style)
        if check["status"] == "finding":
            line.append(f" (healthy: {check['metric']} {check['healthy']}); try: {check['remedy']}", style="")
        console.print(line)
    if rows:
        console.print(Text("rows of the demonstrations; the targets are between ⟦ and ⟧:"))
    for row in rows:
        console.print(Text("  ") + row)
    counts = {status: sum(check["status"] == status for check in diagnosis["checks"]) for status in MARKS}
    seconds = sum(check["seconds"] for check in diagnosis["checks"])
    console.print(
        f"findings: {counts['finding']}; healthy: {counts['healthy']}; left out: {counts['left out']}; {seconds:.0f} s"
    )
