"""Command-line flags from config dataclasses.

Every field is a flag, with the string under it as its help text. `--config FILE` (YAML or JSON) gives defaults that
flags override.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import docstring_parser
import tyro

from rlhf_jax.cli.help_groups import expand_rate, ordered, rate_owner, shown_fields, with_titles
from rlhf_jax.cli.other_names import suggestion
from rlhf_jax.config import RunConfig, coerce_fields, over_defaults
from rlhf_jax.errors import UserError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Flags that locate the other processes of a multi-process run; not part of the run's settings."""

    distributed: bool = False
    """Run as one of several processes; on a TPU pod and under Slurm or MPI they find each other automatically."""
    coordinator: str = ""
    """HOST:PORT of process 0, the same for all processes; needed where --distributed cannot detect it."""
    processes: int | None = None
    """Number of processes; needed where --distributed cannot detect it."""
    process: int | None = None
    """Index of this process, from 0; needed where --distributed cannot detect it."""


def parse(config_class: type[C], arguments: Sequence[str], description: str = "") -> C:
    """Parses flags, which override `--config FILE`, which overrides the class defaults. See `parse_command`."""
    return parse_command(config_class, description, arguments)[0]


def parse_command(
    config_class: type[C], description: str, arguments: Sequence[str], *, program: str = "rlhf-jax"
) -> tuple[C, Cluster]:
    """Parses flags into (config, cluster); the cluster flags exist only for configs with a field `devices`.

    A list may be given as `--data a b` or as `--data a --data b`; it replaces the default.

    Raises:
      UserError: for a config file that does not match, and for a wrong flag or value.
      SystemExit: for --help.
    """
    owner = rate_owner(config_class)
    arguments = expand_rate(arguments, owner)
    fields = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    grouped = issubclass(config_class, RunConfig)
    bases = (config_class, Cluster) if "devices" in fields else (config_class,)
    flags = {flag: many for base in bases for flag, many in _flags(base).items()}
    _refuse_unknown(arguments, {*flags, "--config", "--help", *(["--learning-rate"] if owner else [])})
    arguments = _join_repeated(arguments, [flag for flag, is_list in flags.items() if is_list])
    file = _config_file(arguments)
    values: dict[str, Any] = {}
    if file:
        given_in_file = _read(Path(file))
        if owner and "learning_rate" in given_in_file:
            nested = given_in_file.setdefault(owner, {})
            if not isinstance(nested, dict) or "learning_rate" in nested:
                raise UserError(
                    f"{file}: expected learning_rate or {owner}.learning_rate, got both; use one of the two"
                )
            nested["learning_rate"] = given_in_file.pop("learning_rate")
        values = coerce_fields(config_class, given_in_file, where=file)
    with_file = dataclasses.make_dataclass(
        config_class.__name__,
        [
            ("config", Annotated[str, tyro.conf.arg(help="YAML or JSON file of defaults; flags override them.")], ""),
            *(shown_fields(config_class) if grouped else []),
        ],
        bases=bases,
        # tyro would reword the error of a failed check; the checks run below, and `main` prints their message.
        namespace={"__post_init__": lambda self: None},
        frozen=True,
        kw_only=True,
    )
    shown: Any = with_file
    if grouped:
        # The order in which tyro lists them; the constructor takes keywords only.
        shown.__dataclass_fields__ = ordered(shown.__dataclass_fields__)
    default = over_defaults(with_file, values, _unchecked)
    errors, printed = io.StringIO(), _Terminal()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed), _help_in_paragraphs():
            about = description or config_class.__doc__
            given = tyro.cli(with_file, prog=program, args=arguments, default=default, description=about)
    except SystemExit as end:
        if end.code:
            raise UserError(_without_box(errors.getvalue())) from None
        text = printed.getvalue().rstrip("\n")
        print(with_titles(text, list(shown.__dataclass_fields__)) if grouped else text)
        raise
    config = config_class(**{name: getattr(given, name) for name in fields})
    if Cluster not in bases:
        return config, Cluster()
    cluster = Cluster(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Cluster)})
    if cluster != Cluster() and not cluster.distributed:
        raise UserError("coordinator, processes, process: expected --distributed with them, got no --distributed")
    return config, cluster


@contextlib.contextmanager
def _help_in_paragraphs() -> Iterator[None]:
    """Gives tyro the help text of a field without its line breaks, which it would print as they are in the source."""
    parse = docstring_parser.parse_from_object

    def joined(obj: Any, *arguments: Any, **options: Any) -> Any:
        found = parse(obj, *arguments, **options)
        for field in found.params:
            field.description = " ".join((field.description or "").split()) or None
        return found

    docstring_parser.parse_from_object = cast(Any, joined)
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse


class _Terminal(io.StringIO):
    """Collects what is printed, in the form that standard output allows."""

    def __init__(self) -> None:
        super().__init__()
        self._output = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of standard output, by which tyro decides whether to draw boxes."""
        return self._output.encoding

    def isatty(self) -> bool:
        return self._output.isatty()


def _without_box(text: str) -> str:
    """tyro's error box as one line; the text after a horizontal rule is dropped."""
    words: list[str] = []
    for line in text.splitlines()[text.startswith("╭") :]:
        inside = line.strip("│╰╯ ")
        if words and inside and not inside.strip("─"):
            break
        words += inside.split()
    message = " ".join(words).removeprefix("Error parsing ")
    # Python's messages for values that are not numbers.
    message = re.sub(r"invalid literal for int\(\) with base 10: (.+)", r"expected a whole number, got \1", message)
    return re.sub(r"could not convert string to float: (.+)", r"expected a number, got \1", message)


def _unchecked(cls: type, fields: Mapping[str, Any], prefix: str) -> Any:
    """An instance without `__post_init__` checks; they run on the finished config, as flags may still change it."""
    instance: Any = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, tyro.MISSING if value is dataclasses.MISSING else value)
    return instance


def _read(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML or JSON file; hyphens in names become underscores."""
    import yaml  # imported here: a tenth of the start-up time of --help

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
        raise UserError(f"--config {path}: expected a mapping of fields to values, got {type(values).__name__}")
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
    """Maps every flag of a config to True if it takes a list of any length."""
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
    # Runs before tyro, which reports a missing flag first and then suggests nothing.
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and flag not in known:
            ours = suggestion(flag, known)
            if ours is not None:
                raise UserError(f"unknown flag {argument.partition('=')[0]}; use {ours}")
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            near += [name for name in known if name.endswith("." + flag.removeprefix("--"))]
            hint = f"did you mean {near[0]}?" if near else "--help explains every flag"
            raise UserError(f"unknown flag {argument.partition('=')[0]}; {hint}")


def _join_repeated(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Merges `--data a --data b` into `--data a b`, at the position of the first."""
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
