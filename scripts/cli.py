"""Command lines from config dataclasses, and how a script ends.

Every field is a flag with the text under it as help. `--config FILE` (YAML or JSON) gives defaults that flags override.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import resource
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import tyro
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_jax import distributed
from rlhf_jax.config import RunConfig, coerce_fields, over_defaults
from rlhf_jax.durable import user_cache
from rlhf_jax.errors import UserError
from rlhf_jax.fit import Stopped
from rlhf_jax.runs import Finished
from scripts.huge_pages import give_back_what_compiling_took

C = TypeVar("C")
S = TypeVar("S", bound=RunConfig)
INTERRUPTED = "interrupted; the same command starts again, from its last checkpoint if it keeps any"


def main(
    run: Callable[[C], object], config_class: type[C], description: str = "", argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the command line, runs, and exits: 0 done, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM.

    Args:
      run: the script's work on a config.
      argv: the arguments, without the program's name; None for those of this process.
    """
    try:
        with _interrupted_anywhere():
            config, cluster = _parse(config_class, description, argv)
            if cluster.distributed:
                cluster.join(config)
            run(config)
    except UserError as error:
        _exit(2, f"error: {error}")
    except BrokenPipeError:
        # Whoever read the output has gone, such as `head`; nothing is left to be said to them at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None:
            raise
        # A file that the user named, or a disk that is full: the system's words say it.
        _exit(2, f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        _exit(130, INTERRUPTED)
    except Stopped as stop:
        saved = f"saved after step {stop.step}; to go on:" if stop.saved else "nothing was saved; to start again:"
        arguments = sys.argv[1:] if argv is None else argv
        _exit(128 + stop.signal, f"stopped, {saved} {shlex.join(['python', sys.argv[0], *arguments])}", together=True)
    sys.exit(0)


def reported(run: Callable[[S], Finished]) -> Callable[[S], None]:
    """A stage's run that prints the figures of its summary when it is done."""

    def work(config: S) -> None:
        again = distributed.from_first((config.folder / "summary.json").exists)
        use_cpu_devices(config.device_count)
        finished = run(config)
        if not distributed.is_first():
            return
        state = "was finished before; nothing was trained" if again else "finished"
        table = Table("figure", box=box.SIMPLE)
        table.add_column("value", justify="right")
        for name, value in finished.summary.items():
            shown = "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
            table.add_row(name.replace("_", " "), shown)
        table.add_row("peak resident memory", f"{peak_memory() / 2**30:.2f} GiB")
        print(f"{finished.run.path}: {finished.run.stage} {state}")
        Console(highlight=False).print(table)

    return work


def peak_memory() -> int:
    """Most bytes that this process has held in the host's memory so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def use_cpu_devices(count: int) -> None:
    """Lets a CPU count as `count` devices, which --devices asks for; other machines have the devices they have."""
    if (
        count > 1
        and distributed.count() == 1
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        jax.config.update("jax_num_cpu_devices", count)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start of a script need not compile them again.

    They lie in JAX_COMPILATION_CACHE_DIR if that is set, else below the user's cache folder. The memory that compiling
    took goes back to the system.
    """
    give_back_what_compiling_took()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def parse(config_class: type[C], description: str = "", argv: Sequence[str] | None = None) -> C:
    """A config from flags, over the defaults of `--config FILE`, over the class's own. See `_parse`."""
    return _parse(config_class, description, argv)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Flags that say where the other processes are; they are no part of a run's settings."""

    distributed: bool = False
    """One of several processes that run this command; on a TPU pod, under Slurm or MPI they find each other."""
    coordinator: str = ""
    """With --distributed elsewhere: HOST:PORT of process 0, the same for all."""
    processes: int | None = None
    """With --distributed elsewhere: how many processes there are."""
    process: int | None = None
    """With --distributed elsewhere: number of this one, from 0."""

    def join(self, config: Any) -> None:
        """Finds the other processes. config: of the script; a CPU then counts as a part of its devices."""
        if self.processes:
            wanted: int = config.device_count if isinstance(config, RunConfig) else config.devices
            use_cpu_devices(wanted // self.processes)
        distributed.initialize(self.coordinator, self.processes, self.process)


def _parse(config_class: type[C], description: str, argv: Sequence[str] | None) -> tuple[C, Cluster]:
    """What the script is told, and where the other processes are, for scripts whose settings have devices.

    A list may be given as `--data a b` or as `--data a --data b`; it replaces the default.

    Raises: UserError for a file that does not fit and for a wrong flag or value; SystemExit for --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    fields = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    bases = (config_class, Cluster) if "devices" in fields else (config_class,)
    flags = {flag: many for base in bases for flag, many in _flags(base).items()}
    _refuse_unknown(arguments, {*flags, "--config", "--help"})
    arguments = _join_repeated(arguments, [flag for flag, is_list in flags.items() if is_list])
    file = _config_file(arguments)
    values: dict[str, Any] = {}
    if file:
        values = coerce_fields(config_class, _read(Path(file)), where=file)
    with_file = dataclasses.make_dataclass(
        config_class.__name__,
        [("config", Annotated[str, tyro.conf.arg(help="YAML or JSON file of defaults; flags override them.")], "")],
        bases=bases,
        # tyro would put a refused config into its own words; the checks run below, and `main` prints their line.
        namespace={"__post_init__": lambda self: None},
        frozen=True,
        kw_only=True,
    )
    default = over_defaults(with_file, values, _unchecked)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = tyro.cli(
                with_file, args=arguments, default=default, description=description or config_class.__doc__
            )
    except SystemExit as end:
        if end.code:
            raise UserError(_without_box(said.getvalue())) from None
        raise
    config = config_class(**{name: getattr(given, name) for name in fields})
    if Cluster not in bases:
        return config, Cluster()
    cluster = Cluster(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Cluster)})
    if cluster != Cluster() and not cluster.distributed:
        raise UserError("coordinator, processes, process: found one of them alone, wanted --distributed beside it")
    return config, cluster


@contextlib.contextmanager
def _interrupted_anywhere() -> Iterator[None]:
    """Ends the process where Ctrl-C falls into a callback, such as JAX's of the garbage collector.

    Python would print a traceback there and go on.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        sys.stderr.write(INTERRUPTED + "\n")
        sys.stderr.flush()
        os._exit(130)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _exit(status: int, line: str, *, together: bool = False) -> NoReturn:
    distributed.leave(status, line, together=together)


def _without_box(text: str) -> str:
    """What tyro says in a box of several lines, as one line; a rule in the box ends what matters."""
    words: list[str] = []
    for line in text.splitlines()[text.startswith("╭") :]:
        inside = line.strip("│╰╯ ")
        if words and inside and not inside.strip("─"):
            break
        words += inside.split()
    said = " ".join(words).removeprefix("Error parsing ")
    # Python's own words for what is no number.
    said = re.sub(r"invalid literal for int\(\) with base 10: (.+)", r"found \1, wanted a whole number", said)
    return re.sub(r"could not convert string to float: (.+)", r"found \1, wanted a number", said)


def _unchecked(cls: type, fields: Mapping[str, Any], prefix: str) -> Any:
    """An instance whose own checks are left to the finished config: flags may still change it."""
    instance: Any = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, tyro.MISSING if value is dataclasses.MISSING else value)
    return instance


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; hyphens in names are underscores."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: {error}") from None
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path}: unreadable: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: found {type(values).__name__}, wanted fields and their values")
    return _underscored(values)


def _underscored(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name).replace("-", "_"): _underscored(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def _config_file(arguments: Sequence[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
    return ""


def _flags(cls: type, prefix: str = "--") -> dict[str, bool]:
    """Every flag of a config -> whether it takes a list of any length after it."""
    flags: dict[str, bool] = {}
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        marks: list[Any] = []
        if typing.get_origin(kind) is Annotated:
            kind, *marks = typing.get_args(kind)
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            flags |= _flags(kind, flag + ".")
        else:
            origin, arguments = typing.get_origin(kind), typing.get_args(kind)
            many = origin is list or (origin is tuple and arguments[-1] is ...)
            flags[flag] = many and tyro.conf.UseAppendAction not in marks
            if kind is bool:
                flags[prefix + "no-" + name.replace("_", "-")] = False
    return flags


def _refuse_unknown(arguments: Sequence[str], known: Collection[str]) -> None:
    # Before tyro does, which names what is missing first and then has no suggestion.
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            near += [name for name in known if name.endswith("." + flag.removeprefix("--"))]
            hint = f"did you mean {near[0]}?" if near else "--help explains every flag"
            raise UserError(f"unknown flag {argument.partition('=')[0]}; {hint}")


def _join_repeated(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`--data a --data b` as `--data a b`, where the first of them stood."""
    joined: dict[str, list[str]] = {}
    current: list[str] | None = None
    order: list[list[str]] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.replace("_", "-")
        if argument.startswith("--") and name in flags:
            if name not in joined:
                joined[name] = [name]
                order.append(joined[name])
            current = joined[name]
            if equals:
                current.append(value)
        elif argument.startswith("--") or current is None:
            current = None
            order.append([argument])
        else:
            current.append(argument)
    return [argument for group in order for argument in group]
