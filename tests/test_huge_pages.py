"""The new start of a process with malloc's huge pages."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.huge_pages import TUNABLES

SCRIPT = """
import os, sys
from scripts.huge_pages import use_huge_pages
pid = os.getpid()
print(pid, flush=True)
use_huge_pages()
print(pid, os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.dont_write_bytecode)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=2"])
def test_the_same_process_with_the_same_arguments(tmp_path: Path, given: str | None) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": os.getcwd()} | ({} if given is None else {"GLIBC_TUNABLES": given})
    command = [sys.executable, "-B", str(script), "a b", "--c"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    # What the user has set stays, and the process goes on as it is; else it starts once more, under the same id.
    assert len(lines) == (3 if given is None else 2) and {line.split()[0] for line in lines} == {lines[0]}
    assert lines[-1] == f"{lines[0]} {given or TUNABLES} ['a b', '--c'] 1"
