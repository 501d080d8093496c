"""A table of cases in one test: what fails says for which row."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def case(row: Any) -> Iterator[Any]:
    """A row of the table; a failure inside is reported with it."""
    try:
        yield row
    except BaseException as error:
        error.add_note(f"case: {row!r:.500}")
        raise
