"""Commands for a user to paste into a shell, quoted for it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def program() -> str:
    """The command that starts `rlhf-jax` in the user's shell, in the form in which this process was started."""
    started = Path(sys.argv[0])
    if started.name == "rlhf-jax" and shutil.which("rlhf-jax") is None:
        return shlex.quote(sys.argv[0])  # the environment is not activated
    if started.suffix != ".py" or started.parent.name not in ("rlhf_jax", "scripts"):
        return "rlhf-jax"
    known = shutil.which("python")
    same = known is not None and os.path.realpath(known) == os.path.realpath(sys.executable)
    # Not resolved: an environment's Python is a link, which decides what it imports.
    return f"{'python' if same else shlex.quote(os.path.relpath(sys.executable))} -m rlhf_jax"


def path_word(path: str | os.PathLike[str]) -> str:
    """A path as a word of a command, which does not begin as a flag does."""
    word = os.fspath(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def generate_command(run: str | os.PathLike[str], prompts: Sequence[str] = (), *, chat: bool = False) -> str:
    """The command that samples from a run.

    Args:
      run: its folder.
      prompts: prompts that it was trained for, of which one is in the command. In one with a control character, a shell
        would take a tab or an escape sequence for a key, so another is used.
      chat: the run was trained on messages.
    """
    start = f"{program()} generate {path_word(run)}"
    if chat:
        return f"{start} --chat"
    fitting = [prompt for prompt in prompts if all(c.isprintable() or c == "\n" for c in prompt) and prompt.strip()]
    prompt = min(fitting, key=lambda prompt: "\n" in prompt, default="Hello")
    # With = a prompt that begins with a hyphen is no flag.
    return f"{start} --prompt{'=' if prompt.startswith('-') else ' '}{shlex.quote(prompt)}"
