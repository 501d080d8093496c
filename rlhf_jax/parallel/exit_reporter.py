"""The last word on a process that ends without one: a process beside it, which knows where it was.

Where the coordinating process is lost, jax ends the others from C++, before Python can say a word; and a process that
the system kills for its memory says nothing either. So each of several processes starts this file, writes down what it
is about to do, and a full stop when it ends as it should. It imports little, since it starts with each of them.
"""

import sys

SILENT = "."


def watch(name: str) -> None:
    """Reads lines until there are no more; unless the last was a full stop, says where `name` was."""
    last = "its start"
    for line in sys.stdin:
        last = line.rstrip("\n")
    if last != SILENT:
        sys.stderr.write(f"error: {name} ended in {last}\n")


if __name__ == "__main__":
    watch(sys.argv[1])
