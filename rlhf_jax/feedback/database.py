"""The SQLite database of a labelling folder: schema, connections, and the lock that limits it to one process.

Every commit is flushed to disk before it returns (write-ahead log, synchronous=FULL), so that an answer confirmed to a
labeller survives a crash of the process or the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.runs.locks import locked

FILE = "labels.sqlite"
LOCK = "label.lock"
APPLICATION_ID = 0x524C4846  # "RLHF"
SCHEMA_VERSION = 2

# `held` counts an item's judgements by people (without skips) and its live leases; once it reaches the number of
# labellers per task, the item is not given to anybody else. `cursor`: every task up to this number is full, or the
# labeller has seen it. The lease with the highest number is the one on the labeller's page. A lease that is not live
# has lapsed: it no longer blocks others, but its draft is kept for its labeller. `more` has the fields of a judgement
# that are texts, where they are not empty. `withdrawn` keeps judgements that were undone, or rejected by the admin.
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE items (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE CHECK (length(id) > 0),
  kind TEXT NOT NULL CHECK (kind IN ('task', 'calibration', 'quiz')),
  responses INTEGER NOT NULL CHECK (responses BETWEEN 0 AND 9),
  content TEXT NOT NULL CHECK (json_valid(content)),
  held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0)
) STRICT;
CREATE INDEX items_in_order ON items (kind, number, held);
CREATE TABLE labellers (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 80),
  role TEXT NOT NULL CHECK (role IN ('labeller', 'admin', 'model')),
  screening TEXT NOT NULL DEFAULT 'open' CHECK (screening IN ('open', 'passed', 'failed')),
  cursor INTEGER NOT NULL DEFAULT 0,
  added REAL NOT NULL,
  paused INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1))
) STRICT;
CREATE TABLE tokens (
  sha256 TEXT PRIMARY KEY CHECK (length(sha256) = 64),
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  added REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE leases (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  item INTEGER NOT NULL REFERENCES items (number),
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  started REAL NOT NULL,
  expires REAL NOT NULL,
  live INTEGER NOT NULL CHECK (live IN (0, 1)),
  draft TEXT CHECK (draft IS NULL OR json_valid(draft)),
  revision INTEGER NOT NULL DEFAULT 0,
  UNIQUE (item, labeller)
) STRICT;
CREATE INDEX leases_that_lapse ON leases (expires) WHERE live = 1;
CREATE INDEX leases_of ON leases (labeller, number);
CREATE TABLE judgements (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  item INTEGER NOT NULL REFERENCES items (number),
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  ranks TEXT NOT NULL CHECK (json_valid(ranks)),
  ratings TEXT NOT NULL CHECK (json_valid(ratings)),
  flags TEXT NOT NULL CHECK (json_valid(flags)),
  skip TEXT NOT NULL,
  seconds REAL NOT NULL CHECK (seconds >= 0),
  at REAL NOT NULL,
  more TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(more)),
  UNIQUE (item, labeller),
  CHECK (ranks = '[]' OR skip = '')
) STRICT;
CREATE INDEX judgements_of ON judgements (labeller, number, skip);
CREATE TABLE withdrawn (
  number INTEGER PRIMARY KEY,
  item INTEGER NOT NULL REFERENCES items (number),
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  ranks TEXT NOT NULL,
  ratings TEXT NOT NULL,
  flags TEXT NOT NULL,
  skip TEXT NOT NULL,
  seconds REAL NOT NULL,
  at REAL NOT NULL,
  withdrawn REAL NOT NULL,
  more TEXT NOT NULL DEFAULT '{}',
  why TEXT NOT NULL DEFAULT 'undone'
) STRICT;
CREATE TABLE requests (
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  request TEXT NOT NULL CHECK (length(request) BETWEEN 1 AND 64),
  sha256 TEXT NOT NULL,
  answer TEXT NOT NULL,
  PRIMARY KEY (labeller, request)
) STRICT, WITHOUT ROWID;
"""


def _keep_private(path: Path) -> None:
    """Makes the file for its owner alone, and takes an existing one from others; its group may keep it.

    SQLite gives the files beside it the same permissions.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    for each in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        if each.exists() and each.stat().st_uid == os.getuid() and each.stat().st_mode & 0o007:
            each.chmod(each.stat().st_mode & 0o770)


def connect(path: Path, *, read_only: bool = False, checked: bool = False) -> sqlite3.Connection:
    """Connect to the database file; a writer creates a missing one. One of an older version is brought to this one.

    Args:
      path: of the file.
      read_only: open without write access.
      checked: skip the integrity check, for a file that was just checked.

    Raises:
      UserError: if the file is not a labelling database, damaged, or of another version.
    """
    with contextlib.ExitStack() as on_error:
        try:
            if read_only:
                uri = f"{path.absolute().as_uri()}?mode=ro"
                db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10, check_same_thread=False)
            else:
                _keep_private(path)
                db = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
            on_error.callback(db.close)
            if not read_only:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
            if read_only and not checked and _version(db) == (APPLICATION_ID, 1):
                # Only a writer can bring it up to date.
                try:
                    with folder_lock(path.parent):
                        connect(path).close()
                except OSError as error:
                    raise UserError(
                        f"{path}: schema version 1: expected a folder that can be written, to bring it to version "
                        f"{SCHEMA_VERSION}, got {error.strerror}; use a copy"
                    ) from None
            if not checked:
                _check(db, path, make=not read_only)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: expected the database of a labelling folder, got {error}") from None
        on_error.pop_all()
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction that commits to disk on success and rolls back on any exception."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def folder_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a labelling folder for this process; the operating system releases the lock when the process ends.

    Raises:
      UserError: without waiting, if another process holds the lock, with that process's id.
    """
    busy = "is serving this folder; stop it first or give another folder"
    return locked(folder / LOCK, busy=busy, instead="give another folder")


def _version(db: sqlite3.Connection) -> tuple[int, int]:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return application, version


def _upgrade(db: sqlite3.Connection) -> None:
    """Bring a database of version 1 to version 2, in one transaction: four tables get columns and other checks."""
    statements = _SCHEMA.split(";\n")
    db.execute("PRAGMA foreign_keys = OFF")
    with transaction(db):
        sequence = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'judgements'").fetchone()
        for table in ("items", "labellers", "judgements", "withdrawn"):
            (make,) = (one for one in statements if one.lstrip().startswith(f"CREATE TABLE {table} "))
            columns = ", ".join(row[1] for row in db.execute(f"PRAGMA table_info({table})"))
            db.execute(make.replace(f"TABLE {table} ", f"TABLE new_{table} ", 1))
            db.execute(f"INSERT INTO new_{table} ({columns}) SELECT {columns} FROM {table}")
            db.execute(f"DROP TABLE {table}")
            db.execute(f"ALTER TABLE new_{table} RENAME TO {table}")
        for statement in statements:
            if statement.lstrip().startswith("CREATE INDEX"):
                db.execute(statement.replace("CREATE INDEX", "CREATE INDEX IF NOT EXISTS", 1))
        # Numbers of judgements are not used twice, though the one with the highest number was withdrawn.
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'judgements'")
        if sequence is not None:
            db.execute("INSERT INTO sqlite_sequence VALUES ('judgements', ?)", sequence)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("PRAGMA foreign_keys = ON")


def _check(db: sqlite3.Connection, path: Path, *, make: bool) -> None:
    application, version = _version(db)
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and make:
        with transaction(db):
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)
            # Seeds the order in which each labeller sees the responses to an item.
            db.execute("INSERT INTO about VALUES ('salt', ?)", (secrets.token_hex(16),))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif application != APPLICATION_ID:
        raise UserError(f"{path}: expected the database of a labelling folder, got another program's")
    elif version not in (1, SCHEMA_VERSION):
        raise UserError(
            f"{path}: schema version: expected 1 to {SCHEMA_VERSION}, got {version}; use the release that wrote it"
        )
    elif (result := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise UserError(f"{path}: damaged: {result.splitlines()[-1]}; restore it from a copy")
    elif version == 1:
        _upgrade(db)
