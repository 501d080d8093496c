"""Settings as frozen dataclasses: the fields every stage shares, and their way from and to plain JSON.

Nothing here parses a command line; scripts/cli.py does, and files of defaults come through `from_plain` as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, Union

from rlhf_jax.errors import UserError

T = TypeVar("T")

# Fields that change neither the data nor the arithmetic of a step: a resumed run may give other values.
# `devices` and `pmap` are among them: the rows and their order stay, the last bits of a sum may not.
MAY_CHANGE = frozenset(
    {"name", "out", "devices", "mesh", "pmap", "log_every", "save_every", "eval_every", "keep_last", "tensorboard"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage's run is told besides its own settings."""

    name: str = ""
    """Name of the run; its folder is runs/NAME."""
    out: str = ""
    """Folder of the run, instead of runs/NAME."""
    seed: int = 0
    """Seed of the parameters, the order of the data and everything sampled."""
    devices: int = 1
    """How many devices share a batch, each with the whole model; short for --mesh data=N."""
    mesh: str = ""
    """Axes of devices, such as data=2,fsdp=4,tensor=1: fsdp cuts every parameter into parts that are gathered layer by
    layer, tensor gives each device a part of the heads, hidden units and vocabulary."""
    pmap: bool = False
    """Replicate by pmap instead of sharding by jit; for models that fit on one device."""
    batch: int
    """Rows in a batch, over all devices."""
    steps: int
    """Updates until the run is complete."""
    microbatches: int = 1
    """Parts a batch is cut into, one after the other, to save memory; the gradients stay the same."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    save_every: int = 200
    """Steps between two checkpoints; 0 saves at the end only."""
    eval_every: int = 0
    """Steps between two evaluations on held-out data; 0 evaluates at the end only."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    tensorboard: bool = False
    """Write TensorBoard event files too; needs the extra: pip install 'rlhf_jax[tensorboard]'."""

    def __post_init__(self) -> None:
        for field in ("devices", "batch", "microbatches", "log_every", "keep_last"):
            at_least(self, field, 1)
        for field in ("seed", "steps", "save_every", "eval_every"):
            at_least(self, field, 0)
        if self.mesh and self.devices != 1:
            raise UserError(f"devices: found {self.devices} beside mesh {self.mesh!r}, wanted one of the two")
        if self.pmap and self.mesh_shape["data"] != self.device_count:
            raise UserError(
                f"pmap: found it with mesh {self.mesh!r}, wanted axis data alone: pmap replicates the model"
            )
        shares = self.row_devices * self.microbatches
        if self.batch % shares:
            raise UserError(
                f"batch {self.batch} is not divisible by devices {self.row_devices} x microbatches "
                f"{self.microbatches}; use --batch {max(shares, self.batch - self.batch % shares)}"
            )
        parts = PurePosixPath(self.name)
        if self.name and (parts.is_absolute() or ".." in parts.parts):
            raise UserError(f"name: found {self.name!r}, wanted a name below runs/; give any other folder with --out")

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Devices along the axes data, fsdp and tensor."""
        shape = {"data": self.devices, "fsdp": 1, "tensor": 1}
        if not self.mesh:
            return shape
        given = [part.partition("=") for part in self.mesh.replace(" ", "").split(",")]
        for name, equals, size in given:
            if name not in shape or not equals or not size.isdecimal() or int(size) < 1:
                raise UserError(
                    f"mesh: found {self.mesh!r}, wanted axes of {', '.join(shape)} with a size each, such as "
                    "data=2,fsdp=4"
                )
        if len({name for name, _, _ in given}) < len(given):
            raise UserError(f"mesh: found {self.mesh!r}, wanted each axis once")
        return shape | {name: int(size) for name, _, size in given}

    @property
    def device_count(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh_shape.values())

    @property
    def row_devices(self) -> int:
        """Devices over which the rows of a batch are spread."""
        return self.mesh_shape["data"] * self.mesh_shape["fsdp"]

    @property
    def folder(self) -> Path:
        """The run's own folder: `out`, or runs/NAME."""
        if self.out:
            return Path(self.out)
        if self.name:
            return Path("runs") / self.name
        raise UserError("the run has no folder: give --name NAME (for runs/NAME) or --out FOLDER")


def at_least(config: Any, field: str, low: float) -> None:
    """Raises UserError if the number in a config's field is below `low`."""
    value = getattr(config, field)
    if not value >= low:
        raise UserError(f"{field}: found {value}, wanted {low} or more")


def within(config: Any, field: str, low: float, below: float) -> None:
    """Raises UserError unless the number in a config's field is at least `low` and less than `below`."""
    value = getattr(config, field)
    if not low <= value < below:
        raise UserError(f"{field}: found {value}, wanted {low} or more and less than {below}")


def row_settings(config: Any) -> None:
    """Checks heldout_fraction, max_tokens and buckets of a stage that trains on rows of different lengths."""
    within(config, "heldout_fraction", 0, 1)
    if config.max_tokens is not None:
        at_least(config, "max_tokens", 1)
    if any(bucket < 1 for bucket in config.buckets):
        raise UserError(f"buckets: found {min(config.buckets)}, wanted lengths of 1 or more")


def to_plain(config: Any) -> dict[str, Any]:
    """A config as plain JSON: nested dicts, lists, strings, numbers, booleans and nulls.

    Raises: TypeError for a field that JSON cannot hold, ValueError for an infinite or undefined number.
    """
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)))


def from_plain(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A config from plain JSON, each value checked against its field's type.

    Args:
      values: what `to_plain` gives; fields with defaults may be missing.
      where: what messages call the source, e.g. a file's name.
    Raises: UserError for an unknown or missing field and for a value of another type, naming `where` and the field.
    """

    def build(nested: type, fields: Mapping[str, Any], prefix: str) -> Any:
        for name, value in fields.items():
            if value is dataclasses.MISSING:
                raise UserError(f"{where}: field {prefix + name!r} is missing")
        return nested(**fields)

    return typing.cast(T, over_defaults(cls, coerce_fields(cls, values, where=where), build))


@dataclasses.dataclass(frozen=True)
class Partial:
    """Some fields of a nested config, not yet made into one."""

    cls: type
    values: dict[str, Any]


def over_defaults(
    cls: type,
    values: Mapping[str, Any],
    build: Callable[[type, dict[str, Any], str], Any],
    *,
    base: Any = dataclasses.MISSING,
    prefix: str = "",
) -> Any:
    """A config of `values` where given and of the defaults elsewhere.

    Args:
      values: what `coerce_fields` gives.
      build: makes a config from its class, the values of all its fields (dataclasses.MISSING where there is neither
        value nor default) and the dotted prefix of their names.
      base: the config that is the default here; a stage's default may differ from that of the class.
    """
    complete = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if base is not dataclasses.MISSING:
                default = getattr(base, field.name)
            value = values.get(field.name, default)
            if isinstance(value, Partial):
                inner = default if isinstance(default, value.cls) else dataclasses.MISSING
                value = over_defaults(value.cls, value.values, build, base=inner, prefix=f"{prefix}{field.name}.")
            complete[field.name] = value
    return build(cls, complete, prefix)


def coerce_fields(cls: type, values: Mapping[str, Any], *, where: str, prefix: str = "") -> dict[str, Any]:
    """The given fields with values of their declared types; nested configs come as `Partial`.

    Raises: UserError as `from_plain`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    types_of = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known fields: {', '.join(sorted(fields))}"
            raise UserError(f"{where}: unknown field {prefix + str(name)!r}; {hint}")
    return {name: _coerce(types_of[name], value, where=where, name=prefix + name) for name, value in values.items()}


def _coerce(kind: Any, value: Any, *, where: str, name: str) -> Any:
    """`value` as the type `kind`, or UserError. YAML reads 1e-3 as a string, so numbers may come as text."""
    wrong = UserError(f"{where}: field {name!r}: found {value!r}, wanted {_type_name(kind)}")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _coerce(arguments[0], value, where=where, name=name)
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1, cutoff=0.5)
        raise UserError(f"{wrong}{f'; did you mean {near[0]!r}?' if near else ''}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            try:
                return _coerce(argument, value, where=where, name=name)
            except UserError:
                continue
        raise wrong
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise wrong
        return Partial(kind, coerce_fields(kind, value, where=where, prefix=name + "."))
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            # One file where several may stand is meant as a list of one.
            if isinstance(value, str) and arguments[0] is str and (origin is list or arguments[-1] is Ellipsis):
                value = [value]
            else:
                raise wrong
        kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise wrong
        items = [
            _coerce(k, v, where=where, name=f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            number = float(value)
            if kind is float:
                return number
            if number != int(number):
                raise wrong
            return int(number) if isinstance(value, float) or "e" in str(value).lower() else int(value)
        except (ValueError, OverflowError):
            raise wrong from None
    if kind is str and isinstance(value, str):
        return value
    if kind is type(None) and value is None:
        return None
    if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    raise wrong


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(kind))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
