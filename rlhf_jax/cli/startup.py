"""Memory allocator and XLA flags for a training process on a CPU, set before anything is loaded.

Without huge pages a training step spends a third of its time on page faults: XLA takes the memory of a step's
intermediate arrays anew at each step, and glibc hands blocks of that size back to the system in between, so that every
page faults again. glibc reads its settings when a process starts, hence the restart. docs/lab-notebook.md has the
figures.
"""

from __future__ import annotations

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
        "glibc.malloc.trim_threshold=8589934592",  # which keeps up to 8 GiB at its top;
        "glibc.malloc.arena_max=1",  # and all threads share it: a heap of another thread holds no more than 64 MiB.
    )
)
# A tenth less time for a training step: YNNPACK computes products, and XLA's own loops what stands between them; fewer
# copies of arrays that an update changes.
XLA_FLAGS = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
)
# The cheapest thing that reads XLA_FLAGS; jaxlib ends the process at a flag that it does not know.
PROBE = "import jaxlib.xla_client as c; c.make_cpu_client()"


def known_flags(flags: Iterable[str]) -> list[str]:
    """Those XLA flags that this jaxlib knows on this processor, in their order.

    A child process tries all of them at once, and one by one if it dies. The answers are kept in the user's cache
    folder, for each jaxlib and processor. Where jaxlib does not start even without flags, none is known.
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept | {machine: answers})
    return [flag for flag in wanted if answers[flag]]


def _starts(flags: list[str]) -> bool:
    """Whether jaxlib's CPU client starts under these flags."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    tried = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True)
    return tried.returncode == 0


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def use_fast_settings() -> None:
    """Restarts this process, under the same id, with malloc's huge pages; returns where that changes nothing.

    That is on a system other than Linux with glibc, and where GLIBC_TUNABLES is set already. XLA_FLAGS get those of
    `XLA_FLAGS` that this jaxlib knows, before what the user has set, so that the user's count.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys((*known_flags(XLA_FLAGS), *given)))
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})
