"""benchmarks/RESULTS.md: one section for each benchmark, which writes its own and leaves the others."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TITLE = "# Speed, measured"
ORDER = ("Ours beside the peers", "What the machine can do", "How cost grows")


def write_section(path: str | Path, title: str, lines: Sequence[str]) -> None:
    """Puts the section `## title` into the page, in the place of the one that it had."""
    file = Path(path)
    sections: dict[str, str] = {}
    if file.exists():
        for part in file.read_text(encoding="utf-8").split("\n## ")[1:]:
            name, _, rest = part.partition("\n")
            sections[name] = rest.strip("\n")
    sections[title] = "\n".join(lines).strip("\n")
    names = [name for name in ORDER if name in sections] + [name for name in sections if name not in ORDER]
    file.write_text("\n\n".join([TITLE, *(f"## {n}\n\n{sections[n]}" for n in names)]) + "\n", encoding="utf-8")


def made_by(script: str, versions: Mapping[str, Mapping[str, str]]) -> str:
    """The sentence that says where and with what a section was made."""
    said = "; ".join(
        f"{side}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for side, found in versions.items()
    )
    return (
        f"Made by `benchmarks/{script}` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores of {_processor()}, "
        f"Python {platform.python_version()}; {said}."
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
