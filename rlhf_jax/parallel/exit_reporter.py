"""Error report for a process that dies without one, from a small process started with it.

If the coordinating process is lost, jax ends the others from C++, before Python can print an error; a process that the
system kills for its memory prints nothing either. So each process of a multi-process run starts this file, and writes
to it what it is about to do, and a full stop when it ends normally. It imports little, since every process starts it.
"""

import sys

SILENT = "."


def watch(name: str) -> None:
    """Reads lines until the end of input; unless the last was a full stop, reports what `name` was doing."""
    last = "its start"
    for line in sys.stdin:
        last = line.rstrip("\n")
    if last != SILENT:
        sys.stderr.write(f"error: {name} ended in {last}\n")


if __name__ == "__main__":
    watch(sys.argv[1])
