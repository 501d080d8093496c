"""Settings of malloc and of XLA for this process, on a CPU: without huge pages, it spends a third of a training step on
page faults.

XLA takes the memory of a step's intermediate arrays anew at each step. glibc hands blocks of that size back to the
system in between, so that every page of theirs faults again, unless it is told to keep them; and huge pages are few. It
reads its settings when a process starts: hence the new start, before anything is loaded. docs/lab-notebook.md has the
figures.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys

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
COMPILER = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
)
# Versions of jaxlib that were seen to know these and those of tests/conftest.py; another one would end the process.
KNOWN_TO = ((0, 10), (0, 12))


def flags_known() -> bool:
    """Whether this jaxlib knows the flags."""
    release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    return KNOWN_TO[0] <= release <= KNOWN_TO[1]


def use_huge_pages() -> None:
    """Starts this process anew, under the same id, with malloc's huge pages; returns where that changes nothing.

    That is on another system than Linux with glibc, and where GLIBC_TUNABLES is set already. XLA's settings stand
    before what the user has set in XLA_FLAGS, so that the user's count.
    """
    if flags_known():
        given = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys((*COMPILER, *given)))
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})


def give_back_what_compiling_took() -> None:
    """After each longer compilation, hands the memory that XLA's compiler has freed back to the system.

    With the settings above malloc would keep it, and arrays would come on top of it: a third of a small run's memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    import jax

    trim = ctypes.CDLL("libc.so.6").malloc_trim

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.3:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
