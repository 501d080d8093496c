"""Rows of data files by the ending of their names: JSONL, tables in CSV or TSV, and plain text.

A column of a table is a field, and an empty cell counts as absent. A cell is text, but for fields that are never text:
those hold JSON, such as the messages of a dialogue or the ranks of a ranking. A text file is a document to pretrain on.
A file whose first line begins with { is JSONL, whatever its name.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data import jsonl
from rlhf_jax.data.jsonl import MAX_LINE_BYTES, describe
from rlhf_jax.data.rows import WEIGHTS
from rlhf_jax.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Fields that are JSON in a cell, and fields with a verdict, which may also be text.
JSON_CELLS = ("messages", "conversations", "responses", "ranks")
VERDICTS = ("label", "ended", "ended_chosen", "ended_rejected", "weight", "train", *WEIGHTS)
# Characters after which a text file goes on in another row, so that a part of one file can be held out.
PIECE = 20_000


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", fields) for each row of a file.

    Raises:
      UserError: with file and line for a row that cannot be read with certainty; as `jsonl.read_rows`.
    """
    name = Path(str(path).removesuffix(".gz"))
    kind = name.suffix.lower()
    if kind not in (*DELIMITERS, ".txt") or _first_line(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from jsonl.read_rows(path)
    elif kind == ".txt":
        yield from _documents(path)
    else:
        yield from _table(path, DELIMITERS[kind])


def _first_line(path: str | Path) -> bytes:
    """The first line that is not blank."""
    return next((line for _, line in jsonl.lines_of(path) if line.strip()), b"")


def _text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (number, line) with its line ending, of a file in UTF-8."""
    for number, line in jsonl.lines_of(path):
        if number == 1:
            jsonl.refuse_other_format(line, path)
        jsonl.refuse_long(line, f"{path}:{number}")
        try:
            yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"byte {line[error.start]:#04x} at byte {error.start + 1} of the line"
            raise UserError(f"{path}:{number}: bad UTF-8: expected a file in UTF-8, got {got}") from None


def _documents(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The text of a file in pieces of at least PIECE characters that end at a blank line; a short file is one piece."""
    first, size, lines = 1, 0, list[str]()
    for number, line in _text_lines(path):
        if size >= PIECE and (not line.strip() or size >= 2 * PIECE):
            yield f"{path}:{first}", {"text": "".join(lines).strip("\n")}
            first, size, lines = number, 0, []
        if lines or line.strip():
            lines.append(line.replace("\r\n", "\n"))
            size += len(line)
        else:
            first = number + 1
    if lines:
        yield f"{path}:{first}", {"text": "".join(lines).strip("\n")}


def _table(path: str | Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # The limit is the module's; its default is 128 KiB.
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (line for _, line in _text_lines(path))
    rows = _numbered(csv.reader(lines, delimiter=delimiter, strict=True), path)
    head: list[str] = []
    for number, cells in rows:
        where = f"{path}:{number}"
        if not head:
            head = _header(where, cells, delimiter)
        elif len(cells) != len(head):
            raise UserError(
                f"{where}: expected {len(head)} cells, as many as the header has columns, got {len(cells)}; put a cell "
                "with a separator or a line break in it between double quotes"
            )
        else:
            # A column without a name is an index.
            yield where, {name: _value(where, name, cell) for name, cell in zip(head, cells, strict=True) if name}


def _numbered(reader: Any, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its first line, cells) for each row that is not blank."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{number}: not a table: {error}; expected cells as a spreadsheet writes them"
            ) from None
        if any(cell.strip() for cell in cells):
            yield number, cells


def _header(where: str, cells: Iterable[str], delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for place, name in enumerate(names) if name and name in names[:place]), None)
    if twice is not None:
        raise UserError(f"{where}: expected each column once, got {twice!r} twice")
    if len(names) == 1 and any(other in names[0] for other in ",;\t" if other != delimiter):
        shown = {",": "commas (.csv)", "\t": "tabs (.tsv)"}[delimiter]
        raise UserError(f"{where}: expected a header with columns separated by {shown}, got one column {names[0]!r}")
    return names


def _value(where: str, name: str, cell: str) -> Any:
    if not cell.strip():
        return None
    if name not in (*JSON_CELLS, *VERDICTS):
        return cell
    text = cell.strip().lower() if cell.strip().lower() in ("true", "false") else cell
    try:
        return json.loads(text)
    except ValueError:
        if name in VERDICTS:
            return cell
        raise UserError(f"{where}: field {name!r}: expected JSON in the cell, got {describe(cell)}") from None
