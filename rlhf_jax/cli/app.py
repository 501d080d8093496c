"""The program `rlhf-jax`: finds the command, parses its flags, and only then imports JAX and runs it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlhf_jax.errors import UserError

C = TypeVar("C")

COMMANDS = {
    "recipe": "The four stages on the embedded default, and what they gained.",
    "pretrain": "Stage 1: pretrain a language model on text.",
    "sft": "Stage 2: fine-tune it on demonstrations or dialogues.",
    "reward": "Stage 3.1: train a reward model on comparisons or rankings.",
    "ppo": "Stage 3.2: optimise the fine-tuned model against the reward model.",
    "generate": "Complete prompts, or chat, with the model of a run or a published one.",
    "convert": "Export a run to Hugging Face's format, or import a published model.",
    "label": "Serve the page where people judge answers.",
    "feedback": "Agreement, export, AI labels and active choice on those judgements.",
    "plan": "Memory, time and cost of a stage on a TPU pod, without a TPU.",
}
TRAINING = ("recipe", "pretrain", "sft", "reward", "ppo")


def console(name: str | None = None) -> NoReturn:
    """Runs the command of this process's own command line and exits.

    Args:
      name: the command, where the program stands for one alone (scripts/NAME.py).
    """
    _check_environment()
    try:
        main(sys.argv[1:] if name is None else [name, *sys.argv[1:]], own_process=True)
    except KeyboardInterrupt:  # while JAX is being imported; `process.run` catches all later ones
        print("interrupted before the start", file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str], *, own_process: bool = False) -> NoReturn:
    """Runs one command and exits: 0 done, 2 a mistake of the user's, 130 Ctrl-C, 143 SIGTERM.

    Args:
      arguments: the command and its flags, such as ["sft", "--init", "runs/base"].
      own_process: whether the process is this command's alone; see `execute`.
    """
    try:
        name, command, rest = _find(list(arguments))
    except UserError as error:
        _refuse(error)
    execute(
        command.Config,
        command.run,
        rest,
        description=command.__doc__ or "",
        program=f"rlhf-jax {name}",
        again=_again(list(arguments)),
        own_process=own_process and name != "plan",
        training=name in TRAINING,
    )


def execute(
    config_class: type[C],
    run: Callable[[C], object],
    arguments: Sequence[str],
    *,
    description: str,
    program: str,
    again: str = "",
    own_process: bool = True,
    training: bool = False,
) -> NoReturn:
    """Parses the flags of a config, runs it and exits.

    Args:
      program: what usage and errors call the program.
      again: the command line that starts it again; `program` with the arguments if not given.
      own_process: whether the process is this command's alone, so that the cache of compiled programs may be set.
      training: whether memory allocator and XLA's flags are set as well, for which the process restarts under its id.
    """
    from rlhf_jax.cli.flags import parse_command

    try:
        config, cluster = parse_command(config_class, description, arguments, program=program)
    except UserError as error:
        _refuse(error)
    if own_process and training:
        from rlhf_jax.cli.startup import use_fast_settings

        use_fast_settings()
    from rlhf_jax.cli import process

    if own_process:
        process.use_compilation_cache()
    process.run(run, config, cluster, again=again or shlex.join([*program.split(), *arguments]))


def _refuse(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _check_environment() -> None:
    """Exits with one line where Python is too old or the project's packages are not installed for it."""
    # The reader's Python, not the project's.
    if sys.version_info < (3, 11):  # noqa: UP036
        problem = f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old, expected 3.11 or newer"
    else:
        missing = [name for name in ("jax", "flax", "tyro") if importlib.util.find_spec(name) is None]
        if not missing:
            return
        problem = f"{missing[0]} is not installed for {sys.executable}"
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "Makefile").exists():
        remedy = f"in {checkout}: make setup, then source .venv/bin/activate"
    else:
        remedy = "pip install rlhf_jax with Python 3.11 or newer"
    print(f"error: {problem}; use {remedy}", file=sys.stderr)
    sys.exit(2)


def _find(arguments: list[str]) -> tuple[str, Any, list[str]]:
    """(name of the command, object with Config and run, the rest of the arguments). Exits after --help, --version."""
    found = arguments[0] if arguments else ""
    if found in ("-h", "--help"):
        _print_commands("rlhf-jax", "The recipe behind ChatGPT in JAX.", COMMANDS)
    if found == "--version":
        from rlhf_jax import __version__

        print(f"rlhf-jax {__version__}")
        sys.exit(0)
    _refuse_unknown("rlhf-jax", found, COMMANDS)
    command: Any = importlib.import_module(f"rlhf_jax.cli.{found}")
    if not hasattr(command, "COMMANDS"):
        return found, command, arguments[1:]
    inner = arguments[1] if len(arguments) > 1 else ""
    if inner in ("-h", "--help"):
        texts = {name: one.Config.__doc__ for name, one in command.COMMANDS.items()}
        _print_commands(f"rlhf-jax {found}", COMMANDS[found], texts)
    _refuse_unknown(f"rlhf-jax {found}", inner, command.COMMANDS)
    return f"{found} {inner}", command.COMMANDS[inner], arguments[2:]


def _print_commands(program: str, description: str, commands: Any) -> NoReturn:
    width = max(map(len, commands))
    print(f"usage: {program} COMMAND …\n\n{description}\n")
    for name, text in commands.items():
        print(f"  {name:<{width}}  {text.partition(chr(10))[0]}")
    print(f"\n{program} COMMAND --help explains every flag of a command.")
    sys.exit(0)


def _refuse_unknown(program: str, found: str, known: Any) -> None:
    if found in known:
        return
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    raise UserError(f"{program}: {f'unknown command {found!r}' if found else 'no command given'}; {expected}")


def _again(arguments: list[str]) -> str:
    """The command that starts this one again, as a shell reads it, by the way in which it was started."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", "rlhf_jax", *arguments])
    if program.suffix == ".py" and program.stem == arguments[0]:
        return shlex.join(["python", sys.argv[0], *arguments[1:]])
    return shlex.join(["rlhf-jax", *arguments])
