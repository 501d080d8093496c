"""The new start of a process with malloc's huge pages."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.cli import startup
from rlhf_jax.cli.startup import TUNABLES, known_flags
from tests.cases import case

pytestmark = pytest.mark.core

SCRIPT = """
import os, sys
from rlhf_jax.cli.startup import use_fast_settings
pid = os.getpid()
print(pid, flush=True)
use_fast_settings()
print(pid, os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.dont_write_bytecode)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_same_process_with_the_same_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-B", str(script), "a b", "--c"]
    for given in (None, "glibc.malloc.arena_max=2"):
        with case(given):
            environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
            environment |= {"PYTHONPATH": os.getcwd()} | ({} if given is None else {"GLIBC_TUNABLES": given})
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            lines = done.stdout.splitlines()
            # What the user has set stays, and the process goes on as it is; else it starts once more, under its old id.
            assert len(lines) == (3 if given is None else 2) and {line.split()[0] for line in lines} == {lines[0]}
            assert lines[-1] == f"{lines[0]} {given or TUNABLES} ['a b', '--c'] 1"


HEAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
libc.sbrk.argtypes, libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t], [ctypes.c_void_p]
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
BLOCK, start = 64 << 20, libc.sbrk(0)
for step in range(100):
    work = libc.aligned_alloc(64, BLOCK)
    packed = [libc.malloc(size) for size in (688_192, 1_474_624, 131_135)]
    for address in (*packed, work):
        libc.free(address)
print((libc.sbrk(0) - start) / BLOCK)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_step_takes_the_memory_that_the_last_one_gave_back() -> None:
    """What XLA asks for in a step, a hundred times; what is cut off a block for its alignment must not stay taken."""
    command = [sys.executable, "-c", HEAP]
    environment = os.environ | {"GLIBC_TUNABLES": TUNABLES}
    blocks = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert 1 <= blocks <= 10  # 99 with tcache_count=1000


def test_a_flag_that_jaxlib_does_not_know_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = "--xla_force_host_platform_device_count=2"
    flags = ("--xla_no_such_flag=1", known)
    assert known_flags(flags) == [known]
    # The answer is cached for this jaxlib and processor; another one is probed again.
    probed: list[list[str]] = []

    def starts(flags: list[str]) -> bool:
        probed.append(flags)
        return True

    monkeypatch.setattr(startup, "_starts", starts)
    assert known_flags(flags) == [known] and not probed
    monkeypatch.setattr(startup, "processor", lambda: "another one")
    assert known_flags(flags) == list(flags) and probed == [list(flags)]
    # No folder to cache in is no reason not to start.
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert known_flags(flags) == list(flags)
    # Where jaxlib does not start at all, nothing is known, and nothing is cached.
    monkeypatch.setattr(startup, "processor", lambda: "a broken one")
    monkeypatch.setattr(startup, "_starts", lambda flags: False)
    assert known_flags(flags) == [] and "a broken one" not in (tmp_path / "rlhf_jax" / "xla_flags.json").read_text()
