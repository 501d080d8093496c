"""Strict streaming reader of JSONL files, plain or gzipped, in bounded memory whatever the file contains."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf_jax.errors import UserError

MAX_LINE_BYTES = 8 * 2**20  # longer than any document we use; a line is read up to this size before it is refused
MOST_NESTED = 100  # lists and objects within each other; a schema of a tool has ten
MAX_BRACKETS = 500_000  # lists and objects per line, each about 60 bytes once parsed
MAX_KEYS = 100_000  # keys of objects per line, each about 250 bytes while it is parsed
MAX_COMMAS = 1_000_000  # of lists, each number about 40 bytes, and of text
# How files of other formats begin, and what to do with each.
_PANDAS = "write it as JSON Lines, with pandas: read_{}(FILE).to_json(NEW, orient='records', lines=True)"
_OTHERS = (
    (b"\x1f\x8b", "a gzip file", "give it a name that ends in .gz, or unpack it: gunzip FILE"),
    (b"PAR1", "a Parquet file", _PANDAS.format("parquet")),
    (b"ARROW1", "an Arrow file", _PANDAS.format("feather")),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        "write it as JSON Lines, with datasets: Dataset.from_file(FILE).to_json(NEW)",
    ),
    (b"\xff\xfe\0\0", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"{\0", "text in UTF-16", "convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW"),
    (b"\0{", "text in UTF-16", "convert it: iconv -f UTF-16BE -t UTF-8 FILE > NEW"),
    (b"(\xb5/\xfd", "a zstd file", "unpack it: zstd -d FILE"),
    (b"\xfd7zXZ", "an xz file", "unpack it: xz -d FILE"),
    (b"BZh", "a bzip2 file", "unpack it: bzip2 -d FILE"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it: unzip FILE, or save the sheet as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"\x89HDF", "an HDF5 file", "write it as JSON Lines"),
    (b"ORC\x08", "an ORC file", _PANDAS.format("orc")),
    (b"Obj\x01", "an Avro file", "write it as JSON Lines"),
    (b"SQLite format 3", "an SQLite database", "write it as JSON Lines"),
)
_KEY, _COMMA = re.compile(rb'"\s*:'), re.compile(rb",")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for each line that is not blank; only a line feed ends a line.

    Raises:
      UserError: with file and line for anything that is not one JSON object in UTF-8: bad bytes, NaN, a number too
        large, a lone surrogate, a duplicate key, too deep nesting, a line of more than MAX_LINE_BYTES, a damaged gzip;
        for a file of another format, with what to do about it.
    """
    begun = False
    for number, line in lines_of(path):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
        if not begun and line.strip():
            begun = True
            refuse_other_format(line, path)
            if line.lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise UserError(
                    f"{path}: expected one JSON object on each line, got an HTML page; download the file itself"
                )
        where = f"{path}:{number}"
        refuse_long(line, where)
        if line.strip():
            yield where, parse_row(line, where)


def lines_of(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) for each line of a file, plain or gzipped; only a line feed ends a line.

    Of a line of more than MAX_LINE_BYTES it yields that and one more, for `refuse_long`.

    Raises:
      UserError: for a file that cannot be read.
    """
    number = 0
    try:
        # Read as bytes: text mode splits at U+2028 and similar, and reads a full line before its length is known.
        with _open(Path(path)) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if number else str(path)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, gzip.BadGzipFile) and not number:
            reason = "Not a gzipped file, though its name ends in .gz; rename it"
        raise UserError(f"{place}: cannot be read: {reason}") from None


def refuse_long(line: bytes, where: str) -> None:
    """Raises UserError for a line of more than MAX_LINE_BYTES."""
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: a line of more than {MAX_LINE_BYTES:,} bytes; split the document it holds")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Parses the JSON object of a line.

    Raises:
      UserError: starting with `where`, see `read_rows`.
    """
    if line.count(b"[") + line.count(b"{") > MAX_BRACKETS:
        raise UserError(f"{where}: more than {MAX_BRACKETS:,} brackets in a line; split the document it holds")
    for what, most, mark in (("keys", MAX_KEYS, _KEY), ("commas", MAX_COMMAS, _COMMA)):
        # Only in a line that is long enough, as a search takes longer than a count.
        if len(line) > most and sum(1 for _ in itertools.islice(mark.finditer(line), most + 1)) > most:
            raise UserError(f"{where}: more than {most:,} {what} in a line; split the document it holds")
    try:
        row = _decoded(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        got = f"byte {line[error.start]:#04x} at byte {error.start + 1} of the line"
        raise UserError(f"{where}: bad UTF-8: expected a file in UTF-8, got {got}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON: {error.msg} at character {error.pos + 1}; expected one JSON object on each line"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: not usable JSON: nested too deeply; expected at most {MOST_NESTED} levels") from None
    except ValueError as error:
        raise UserError(f"{where}: not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": …}}, got {describe(row)}')
    if _SURROGATE_ESCAPE.search(line):
        _refuse_surrogates(row, where)
    return row


def _decoded(text: str) -> Any:
    """The JSON value of a text.

    Raises:
      RecursionError: for more than MOST_NESTED lists and objects within each other, whatever this Python could read, as
        what walks through them later may not.
    """
    value = _DECODER.decode(text)
    if text.count("[") + text.count("{") > MOST_NESTED:
        inside = [(value, 1)]
        while inside:
            one, depth = inside.pop()
            if isinstance(one, list | dict):
                if depth > MOST_NESTED:
                    raise RecursionError
                inside += [(each, depth + 1) for each in (one.values() if isinstance(one, dict) else one)]
    return value


def parse_value(text: str) -> Any:
    """Parses JSON within a text field, as strictly as a line.

    Raises:
      ValueError: for anything that is not JSON; RecursionError for too deep nesting is one of them here.
    """
    try:
        return _decoded(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def describe(value: object) -> str:
    """Describes a JSON value for an error message: its type and its beginning, in printable ASCII."""
    match value:
        case None:
            return "null"
        case bool():
            return f"the truth value {str(value).lower()}"
        case str():
            return f"the text {_begin(value)}"
        case int() | float():
            return f"the number {_begin(value)}"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _begin(value: str | float) -> str:
    shown = json.dumps(value[:40] if isinstance(value, str) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def refuse_other_format(first: bytes, path: str | Path) -> None:
    """Raises UserError if a file that begins with this line is in another format that people keep rows in."""
    got, advice = next(((name, do) for begin, name, do in _OTHERS if first.startswith(begin)), ("", ""))
    text = first.strip()
    if not got and text.startswith(b"[") and (text == b"[" or text[1:].lstrip()[:1] in (b"{", b"]", b"")):
        got, advice = "one JSON array", "write its objects one to a line: jq -c '.[]' FILE > NEW"
    if not got and text == b"{":
        got, advice = "an object over several lines", "write each on one line: jq -c . FILE > NEW"
    if got:
        raise UserError(f"{path}: expected one JSON object on each line, got {got}; {advice}")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _refuse_surrogates(row: dict[str, Any], where: str) -> None:
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            lone = f"U+{ord(error.object[error.start]):04X}"
            raise UserError(
                f"{where}: field {_begin(name)}: expected complete characters, got the lone surrogate {lone}"
            ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_begin(twice)} is given twice")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"expected a JSON number, got {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
