"""The directive `flags`: every flag of a command, from the dataclass that the command parses its flags into.

```{flags} sft              the flags of `rlhf-jax sft`
```{flags} ModelConfig      those that other settings hold: --model.width and so on
"""

import dataclasses
import functools
import importlib
import re
import types
import typing
from typing import Any

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from rlhf_jax.cli.app import COMMANDS, module_of
from rlhf_jax.cli.flags import Cluster

NESTED = ("ModelConfig", "RopeScaling", "OptimConfig", "EpisodeConfig", "LoraConfig")
NAMES = {int: "N", float: "X", str: "TEXT"}


class Flags(SphinxDirective):
    """The flags of a command, or of settings that are nested in those of commands."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A definition list: flag, its text, its default."""
        name = " ".join(self.arguments)
        if name in (*NESTED, "Cluster"):
            cls: Any = Cluster if name == "Cluster" else getattr(importlib.import_module("rlhf_jax.config"), name)
        else:
            cls = config_of(name)
        found = nodes.definition_list(classes=["flags"])
        for field in dataclasses.fields(cls):
            found += definition(name, cls, field)
        if "devices" in {field.name for field in dataclasses.fields(cls)}:
            found += also(Cluster, "--distributed, --coordinator, --processes, --process", "Several processes")
        return [found]


def config_of(name: str) -> Any:
    """The settings of a command, such as "sft" or "feedback export"."""
    command, _, inner = name.partition(" ")
    if command not in COMMANDS:
        raise ValueError(f"expected one of {', '.join(COMMANDS)}, got {command!r}")
    module = module_of(command)
    return module.COMMANDS[inner].Config if inner else module.Config


def definition(owner: str, cls: Any, field: Any) -> nodes.definition_list_item:
    """One flag."""
    kind = typing.get_type_hints(cls, include_extras=True)[field.name]
    positional = False
    while typing.get_origin(kind) is typing.Annotated:
        kind, *marks = typing.get_args(kind)
        positional |= any("Positional" in repr(mark) or "POSITIONAL" in repr(mark) for mark in marks)
    if dataclasses.is_dataclass(kind):
        return also(kind, f"--{field.name.replace('_', '-')}.…", kind.__name__, difference(kind, field))
    label = field.name.upper() if positional else f"--{field.name.replace('_', '-')} {written(kind)}".strip()
    text = help_of(cls, field.name)
    default = standard(field)
    if default not in (None, "", (), dataclasses.MISSING) and not isinstance(default, bool):
        text += f" Default: `{' '.join(map(str, default)) if isinstance(default, tuple) else default}`."
    elif default is True:
        text += f" On by default; `--no-{field.name.replace('_', '-')}` turns it off."
    term = nodes.term("", "", nodes.literal(text=label))
    term["ids"] = [nodes.make_id(f"{owner}-{field.name}")]
    return nodes.definition_list_item("", term, nodes.definition("", paragraph(text)))


def also(cls: Any, label: str, title: str, changed: str = "") -> nodes.definition_list_item:
    """Flags that are listed in a section of their own."""
    link = nodes.reference("", title, refid=nodes.make_id("settings-" + cls.__name__), internal=True)
    text = nodes.paragraph("", "", nodes.Text("See "), link, nodes.Text(f".{changed}"))
    return nodes.definition_list_item("", nodes.term("", "", nodes.literal(text=label)), nodes.definition("", text))


def standard(field: Any) -> Any:
    """The default of a field."""
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def difference(kind: Any, field: Any) -> str:
    """How a command's defaults of nested settings differ from those of the section about them."""
    found, usual = dataclasses.asdict(standard(field)), dataclasses.asdict(kind())
    parts = [f"{name.replace('_', '-')} {found[name]}" for name in usual if found[name] != usual[name]]
    return f" Defaults here: {', '.join(parts)}." if parts else ""


def written(kind: Any) -> str:
    """The value of a flag: N, X, TEXT, or its choices."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(choice for choice in map(str, arguments) if choice)
    if origin in (types.UnionType, typing.Union):
        return written(next(one for one in arguments if one is not type(None)))
    if origin is tuple:
        return f"{written(arguments[0])} …"
    return "" if kind is bool else NAMES[kind]


@functools.cache
def texts(module: str) -> dict[tuple[str, str], list[str]]:
    """The docstrings of a module's attributes."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    return analyzer.attr_docs


def help_of(cls: Any, name: str) -> str:
    """The docstring of a field, which the command line shows too."""
    for base in cls.__mro__:
        if found := base.__module__ != "builtins" and texts(base.__module__).get((base.__name__, name)):
            return " ".join(found).strip()
    raise ValueError(f"{cls.__name__}.{name} has no docstring")


def paragraph(text: str) -> nodes.paragraph:
    """A paragraph with `code` and --flags in it."""
    found = nodes.paragraph()
    for part in re.split(r"(`[^`]+`|(?<![\w-])--[a-z][\w.-]*\w)", text):
        code = part.startswith(("`", "--"))
        found += nodes.literal(text=part.strip("`")) if code else nodes.Text(part)
    return found


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("flags", Flags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
