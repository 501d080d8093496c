"""Settings of the labelling page: instructions, question, flags and rating scale, from a YAML or JSON file.

title: Compare two answers
instructions: |
  # Guidelines
  Markdown, shown before the first item and behind a button.
question: Which answer is more helpful?
flags: {off_topic: Off topic, unsafe: Unsafe}  # name in the data: words on the page; {} for none
scale: {points: 5, labels: {1: Useless, 5: Excellent}}  # {points: 0} for no ratings
markdown: true  # false shows texts as they were written
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.data.jsonl import describe
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import FLAG_WORDS, RATINGS

MOST_POINTS = 9
MOST_FLAGS = 20
LONGEST_INSTRUCTIONS = 50_000
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclasses.dataclass(frozen=True)
class Page:
    """Settings of the page.

    Attributes:
      title: heading of the page.
      instructions: Markdown, "" for none.
      question: asked about the answers; "" for the page's own words.
      flags: words on the page by name in the data, in the order of the page.
      points: ratings are 1 to this number; 0 for no ratings.
      labels: words for some of the points.
      markdown: draw Markdown in prompts and answers.
    """

    title: str = "Label answers"
    instructions: str = ""
    question: str = ""
    flags: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(FLAG_WORDS))
    points: int = RATINGS[-1]
    labels: Mapping[int, str] = dataclasses.field(default_factory=dict)
    markdown: bool = True

    @property
    def ratings(self) -> range:
        """The ratings that a response may get."""
        return range(1, self.points + 1)

    def settings(self) -> dict[str, Any]:
        """The mapping that `parse_page` reads as this page."""
        fields = {**dataclasses.asdict(self), "flags": dict(self.flags)}
        points, labels = fields.pop("points"), {str(point): words for point, words in self.labels.items()}
        del fields["labels"]
        return fields | {"scale": {"points": points, "labels": labels}}


def read_page(path: str | Path) -> Page:
    """Read a page's settings from a YAML or JSON file.

    Raises:
      UserError: with file and line, or file and field.
    """
    import yaml  # imported here: a tenth of the start-up time of --help

    class Loader(yaml.SafeLoader):
        """Refuses keys given twice, of which the last would silently win."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise UserError(f"{path}:{line}: expected text as the name of a field, got {describe(key)}; quote it")
            if key in found:
                raise UserError(f"{path}:{line}: field {key!r}: expected it once, got it twice; leave one out")
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = Loader(Path(path).read_text(encoding="utf-8-sig")).get_single_data()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a file in UTF-8, got other bytes") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: expected YAML or JSON, got {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: expected YAML or JSON, got {' '.join(str(error).split())}") from None
    return parse_page(str(path), content)


def parse_page(where: str, content: Any) -> Page:
    """Make a page from a mapping.

    Raises:
      UserError: starting with `where`, with the field that does not fit.
    """
    fields = _mapping(where, "", content, ("title", "instructions", "question", "flags", "scale", "markdown"))
    found: dict[str, Any] = {}
    for name, most in (("title", 80), ("instructions", LONGEST_INSTRUCTIONS), ("question", 300)):
        if name in fields:
            found[name] = _text(where, name, fields[name], most, empty=name != "title")
    if "flags" in fields:
        flags = _mapping(where, "flags", fields["flags"])
        if len(flags) > MOST_FLAGS:
            raise _wrong(where, "flags", f"at most {MOST_FLAGS}", f"{len(flags)} of them")
        for name in flags:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                expected = "names of 1 to 40 small letters, digits and _, such as off_topic"
                raise _wrong(where, "flags", expected, describe(name))
        found["flags"] = {name: _text(where, f"flags.{name}", words, 80) for name, words in flags.items()}
    if "scale" in fields:
        scale = _mapping(where, "scale", fields["scale"], ("points", "labels"))
        points = scale.get("points", RATINGS[-1])
        if not _whole(points) or points not in (0, *range(2, MOST_POINTS + 1)):
            raise _wrong(where, "scale.points", f"2 to {MOST_POINTS}, or 0 for no ratings", describe(points))
        found["points"], found["labels"] = points, {}
        for point, words in _mapping(where, "scale.labels", scale.get("labels", {})).items():
            number = int(point) if isinstance(point, str) and re.fullmatch("[0-9]", point) else point
            if not _whole(number) or not 1 <= number <= points:
                raise _wrong(where, "scale.labels", f"words for points from 1 to {points}", describe(point))
            found["labels"][number] = _text(where, f"scale.labels.{number}", words, 80)
    if "markdown" in fields:
        if not isinstance(fields["markdown"], bool):
            raise _wrong(where, "markdown", "true or false", describe(fields["markdown"]))
        found["markdown"] = fields["markdown"]
    return Page(**found)


def _mapping(where: str, field: str, value: Any, names: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(value, dict):
        expected = f"a mapping with {', '.join(names)}" if names else "a mapping of names to words"
        got = describe(value) if value is not None else "nothing"
        raise _wrong(where, field, expected, got) if field else UserError(f"{where}: expected {expected}, got {got}")
    for name in value:
        if names and name not in names:
            inside = f"{field}.{name}" if field else str(name)
            raise _wrong(where, inside, f"one of the fields {', '.join(names)}", "an unknown field")
    return value


def _text(where: str, field: str, value: Any, most: int, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        got = describe(value) if isinstance(value, str | int | float | bool | list | dict) else "nothing"
        raise _wrong(where, field, "text, in quotes if YAML reads it as something else", got)
    if not empty and not value.strip():
        raise _wrong(where, field, "text", "nothing")
    if len(value) > most:
        raise _wrong(where, field, f"at most {most:,} characters", f"{len(value):,}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _wrong(where, field, "text in Unicode", "a lone surrogate") from None
    return value


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(where: str, field: str, expected: str, got: str) -> UserError:
    return UserError(f"{where}: field {field!r}: expected {expected}, got {got}")
