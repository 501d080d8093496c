"""Several processes on this machine as if each had a machine of its own: what a pod does, tried on a CPU.

python scripts/local_cluster.py --processes 2 --devices 4 -- -m rlhf_jax sft --name answers --mesh data=4,fsdp=2 …

Starts the script in each process with --distributed and the flags that go with it, puts the number of the process
before each line it prints, passes SIGTERM and Ctrl-C on, and ends all if one ends badly. With --restarts R it then
starts all of them again, up to R times; they go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rlhf_jax.parallel.processes import PEER_LOST

KEPT = 200
"""Lines of output that are remembered."""
PATIENCE = 30.0
"""Seconds that the others have to end by themselves when one has ended badly."""
# The user's mistake and a stop on demand: the same again would end the same, or is not wanted.
FINAL = {0, 2, 128 + signal.SIGTERM, 128 + signal.SIGINT}


class Cluster:
    """The processes of one start of the script.

    Args:
      echo: print what they print; it is kept in `lines`, by process, in any case.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int, *, echo: bool = True) -> None:
        self.lines: list[list[str]] = [[] for _ in range(processes)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = (f"--xla_force_host_platform_device_count={devices}",)
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
        environment = os.environ | {"XLA_FLAGS": " ".join((*kept, *flags)), "JAX_PLATFORMS": "cpu"}
        self.children: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        for process in range(processes):
            place = ("--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", f"{processes}")
            child = self._start([*command, *place, "--process", f"{process}"], environment)
            self.children.append(child)
            for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                if source is None:
                    continue
                reader = threading.Thread(target=self._read, args=(process, source, target if echo else None))
                reader.daemon = True
                reader.start()
                self._readers.append(reader)

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """One process."""
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            # Ctrl-C reaches this launcher alone, which passes it on as SIGTERM.
            start_new_session=True,
        )

    def wait(self) -> list[int]:
        """Exit statuses, -N for a signal N. When one ends badly the others have PATIENCE, and are then killed."""
        deadline: float | None = None
        while any(child.poll() is None for child in self.children):
            if deadline is None and any(child.returncode for child in self.children):
                deadline = time.monotonic() + PATIENCE
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(5.0)
        return [child.returncode for child in self.children]

    def signal(self, number: int) -> None:
        """Passes a signal on to those that still run."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def kill(self) -> None:
        """Ends all at once."""
        self.signal(signal.SIGKILL)

    def _read(self, process: int, source: IO[str], target: IO[str] | None) -> None:
        for line in source:
            # gloo counts its connections aloud, from C++, and not by whole lines.
            if "connected peer ranks" in line:
                continue
            self.lines[process] = [*self.lines[process][-KEPT:], line.rstrip("\n")]
            if target is not None:
                target.write(f"[{process}] {line}")
                target.flush()
        source.close()


def status_of(statuses: Sequence[int]) -> int:
    """One exit status for all: that of the process at fault, rather than of those that ended because of it."""
    bad = [128 - status if status < 0 else status for status in statuses if status]
    return next((status for status in bad if status != PEER_LOST), bad[0]) if bad else 0


def run(command: Sequence[str], processes: int, devices: int, restarts: int) -> int:
    """The exit status of the last start."""
    stops: list[int] = []
    cluster: Cluster | None = None

    def stop(number: int, frame: object) -> None:
        stops.append(number)
        if cluster is not None:
            cluster.signal(signal.SIGTERM if len(stops) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for left in range(restarts, -1, -1):
        cluster = Cluster(command, processes, devices)
        status = status_of(cluster.wait())
        if status in FINAL or stops or not left:
            return status
        print(f"local_cluster: ended with status {status}; starting all again, {left} left", file=sys.stderr)
    return status


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many processes (2)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process (1)")
    parser.add_argument("--restarts", type=int, default=0, help="how often all start again if one ends badly (0)")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT", help="the script and its flags")
    arguments = parser.parse_args()
    for field, least in (("processes", 1), ("devices", 1), ("restarts", 0)):
        if vars(arguments)[field] < least:
            parser.error(f"{field}: found {vars(arguments)[field]}, wanted {least} or more")
    sys.exit(run(arguments.command, arguments.processes, arguments.devices, arguments.restarts))


if __name__ == "__main__":
    main()
