"""Entry point of `rlhf-jax`: looks up the command, parses its flags, and only then imports JAX and runs it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import shlex
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlhf_jax.errors import UserError

C = TypeVar("C")

COMMANDS = {
    "recipe": "Run all four stages on the embedded default corpus and measure the improvement.",
    "pretrain": "Stage 1: pretrain a language model on text.",
    "sft": "Stage 2: fine-tune the pretrained model on demonstrations or dialogues.",
    "reward": "Stage 3.1: train a reward model on comparisons or rankings.",
    "preference": "Train the fine-tuned model on comparisons directly: DPO, IPO, KTO, ORPO, SimPO and more.",
    "ppo": "Stage 3.2: optimise the fine-tuned model against the reward model.",
    "generate": "Complete prompts, or chat, with a trained or published model.",
    "score": "Score answers, or check comparisons, with a reward model.",
    "report": "Put runs side by side in one HTML report.",
    "evaluate": "Compare models: win rates, KL, perplexity, diversity, best-of-n, reward-model accuracy.",
    "compare-methods": "Train PPO, RLOO, GRPO, DPO and more from one recipe, and compare them at the same KL.",
    "doctor": "Diagnose a run on its own data: what is wrong, by which metric, and what to try.",
    "experiment": "Run an experiment on a claim about RLHF in a small world, from the stages to hallucination.",
    "chaos": "Inject faults (kills, damage, a full disk) into small runs here, and check what becomes of them.",
    "convert": "Export a run to the Hugging Face format, or import a published model.",
    "sample": "Sample answers and keep the best, pairs or all of them as training data.",
    "task": "Write the data of a task whose answers are verified: sums, or one of reasoning-gym.",
    "label": "Serve the web page on which people rate and rank responses.",
    "feedback": "Measure agreement, export, add AI labels, or choose the next items to label.",
    "plan": "Estimate memory, time and cost of a stage on a TPU pod, without a TPU.",
}
TRAINING = ("recipe", "pretrain", "sft", "reward", "preference", "ppo")


def console(name: str | None = None) -> NoReturn:
    """Runs the command given on this process's command line and exits.

    Args:
      name: the command, for a program that runs only that one (scripts/NAME.py).
    """
    _check_environment()
    arguments = sys.argv[1:] if name is None else [name, *sys.argv[1:]]
    if arguments and arguments[0] in TRAINING:
        # Before the imports, which take seconds on a busy machine.
        from rlhf_jax.parallel import stopping

        stopping.answer_sigterm(_again(arguments))
    try:
        main(arguments, own_process=True)
    except KeyboardInterrupt:  # while JAX is being imported; `process.run` catches all later ones
        print("interrupted before the start", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain once more when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def main(arguments: Sequence[str], *, own_process: bool = False) -> NoReturn:
    """Runs one command and exits: 0 on success, 2 on a user error, 130 on Ctrl-C, 143 on SIGTERM.

    Args:
      arguments: the command and its flags, such as ["sft", "--init", "runs/base"].
      own_process: True if the process runs nothing but this command; see `execute`.
    """
    try:
        name, command, rest = _find(list(arguments))
    except UserError as error:
        _refuse(error)
    execute(
        command.Config,
        command.run,
        rest,
        description=_description(name, command),
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
    """Parses the flags into a config, runs the command with it and exits.

    Args:
      program: the program's name in usage and error messages.
      again: the command line that resumes it; `program` with the arguments if empty.
      own_process: True if the process runs nothing but this command, so that the compilation cache may be set.
      training: True to also set the memory allocator and XLA flags, which restarts the process under the same id.
    """
    from rlhf_jax.cli.flags import parse_command

    try:
        config, cluster = parse_command(config_class, description, arguments, program=program)
    except UserError as error:
        _refuse(error)
    again = again or shlex.join([*program.split(), *arguments])
    with contextlib.ExitStack() as held:
        if own_process and training:
            _begin_training(config, cluster.distributed, again, held)
        from rlhf_jax.cli import process

        if own_process:
            process.use_compilation_cache()
        process.run(run, config, cluster, again=again)


def _begin_training(config: Any, distributed: bool, again: str, held: contextlib.ExitStack) -> None:
    """Answers SIGTERM from now on, takes the lock of the run's folder, and restarts with the fast settings.

    With several processes, jax has its own handler of SIGTERM, and only the first of them locks, once it knows that it
    is the first.
    """
    from rlhf_jax.cli.startup import use_fast_settings
    from rlhf_jax.parallel import stopping
    from rlhf_jax.runs.locks import hold

    if distributed:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        use_fast_settings()
        return
    stopping.answer_sigterm(again)
    try:
        # Tried before the restart, which gives the lock back, so that a refusal does not wait for it.
        if config.name or config.out:
            with hold(config.folder):
                pass
        use_fast_settings()
        if config.name or config.out:
            held.enter_context(hold(config.folder))
    except UserError as error:
        _refuse(error)


def _refuse(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _check_environment() -> None:
    """Exits with a one-line error if Python is too old or the required packages are not installed."""
    # The user's Python, which may be older than the one the project requires.
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
        remedy = "pip to install the wheel of rlhf_jax again, with Python 3.11 or newer"
    print(f"error: {problem}; use {remedy}", file=sys.stderr)
    sys.exit(2)


def module_of(name: str) -> Any:
    """The module of a command, with its Config and run."""
    return importlib.import_module(f"rlhf_jax.cli.{name.replace('-', '_')}")


def _find(arguments: list[str]) -> tuple[str, Any, list[str]]:
    """Returns (command name, object with Config and run, remaining arguments). Exits after --help and --version."""
    found = arguments[0] if arguments else ""
    if found in ("-h", "--help"):
        _print_commands("rlhf-jax", "The recipe behind ChatGPT in JAX.", COMMANDS)
    if found == "--version":
        from rlhf_jax import __version__

        print(f"rlhf-jax {__version__}")
        sys.exit(0)
    _refuse_unknown("rlhf-jax", found, COMMANDS)
    command = module_of(found)
    if not hasattr(command, "COMMANDS"):
        return found, command, arguments[1:]
    inner = arguments[1] if len(arguments) > 1 else ""
    if inner in ("-h", "--help"):
        texts = {name: one.Config.__doc__ for name, one in command.COMMANDS.items()}
        _print_commands(f"rlhf-jax {found}", COMMANDS[found], texts)
    _refuse_unknown(f"rlhf-jax {found}", inner, command.COMMANDS)
    return f"{found} {inner}", command.COMMANDS[inner], arguments[2:]


def _description(name: str, command: Any) -> str:
    """What --help says of a command: the text of its module, or of its settings with the examples of its module."""
    if isinstance(command, types.ModuleType):
        return command.__doc__ or ""
    module = importlib.import_module(command.Config.__module__)
    examples = [line for line in (module.__doc__ or "").splitlines() if line.startswith(f"rlhf-jax {name} ")]
    return "\n\n".join([command.Config.__doc__ or "", *examples])


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
    """The shell command that resumes this run, in the form in which it was started."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", "rlhf_jax", *arguments])
    if program.suffix == ".py" and program.stem == arguments[0]:
        return shlex.join(["python", sys.argv[0], *arguments[1:]])
    return shlex.join(["rlhf-jax", *arguments])
