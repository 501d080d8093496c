"""Memory allocator and XLA flags for a training process on a CPU, set before anything is loaded.

Without huge pages a training step spends a third of its time on page faults: XLA allocates a step's intermediate
arrays again at each step, and glibc returns blocks of that size to the system in between, so that every page faults
again. glibc reads its settings when a process starts, hence the restart. docs/lab-notebook.md has the figures.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from rlhf_jax.runs.atomic_files import user_cache, write_json

TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # madvise(MADV_HUGEPAGE)
        "glibc.malloc.mmap_threshold=4294967296",  # blocks up to 4 GiB come from the heap,
        "glibc.malloc.trim_threshold=8589934592",  # which keeps up to 8 GiB of free memory at its top;
        "glibc.malloc.arena_max=1",  # and all threads share it: the heap of a further arena is limited to 64 MiB.
    )
)
# A training step takes a tenth less time: YNNPACK computes the matrix products and XLA's own loops the operations in
# between; and arrays that an update changes are copied less often.
XLA_FLAGS = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
)
# The cheapest program that parses XLA_FLAGS; jaxlib aborts the process on an unknown flag.
PROBE = "import jaxlib.xla_client as c; c.make_cpu_client()"


def known_flags(flags: Iterable[str]) -> list[str]:
    """Returns the XLA flags that this jaxlib accepts on this processor, in their order.

    A child process tries all of them at once, and one by one if that fails. The results are cached in the user's cache
    folder, per jaxlib version and processor. If jaxlib does not start even without flags, the untested ones are left
    out.
    """
    wanted = list(flags)
    machine = f"jaxlib {importlib.metadata.version('jaxlib')}, {processor()}"
    path = user_cache() / "xla_flags.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        answers: dict[str, bool] = dict(kept[machine]) if machine in kept else {}
    except (OSError, ValueError, TypeError):
        kept, answers = {}, {}
    unknown = [flag for flag in wanted if flag not in answers]
    if unknown:
        if _starts(unknown):
            found = dict.fromkeys(unknown, True)
        elif _starts([]):
            found = {flag: _starts([flag]) for flag in unknown}
        else:
            return [flag for flag in wanted if answers.get(flag)]
        answers |= found
        # A full disk, a read-only home, another process that renames the same file first: the next start probes again.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept | {machine: answers})
    return [flag for flag in wanted if answers[flag]]


def _starts(flags: list[str]) -> bool:
    """True if jaxlib's CPU client starts with these flags."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    tried = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True)
    return tried.returncode == 0


def processor() -> str:
    """Name of the processor, as reported by the system."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def use_fast_settings() -> None:
    """Restarts this process, under the same id, with huge pages for malloc; returns if that changes nothing.

    It changes nothing on systems without glibc, and if GLIBC_TUNABLES is set already. The environment's XLA_FLAGS get
    those of `XLA_FLAGS` that this jaxlib accepts, placed before the user's own so that the user's take precedence.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys((*known_flags(XLA_FLAGS), *given)))
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})
