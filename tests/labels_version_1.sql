-- The tables of a labelling folder of version 1.
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE items (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE CHECK (length(id) > 0),
  kind TEXT NOT NULL CHECK (kind IN ('task', 'calibration', 'quiz')),
  responses INTEGER NOT NULL CHECK (responses BETWEEN 2 AND 9),
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
  added REAL NOT NULL
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
  UNIQUE (item, labeller),
  CHECK ((ranks = '[]') = (skip <> ''))
) STRICT;
CREATE INDEX judgements_of ON judgements (labeller, number);
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
  withdrawn REAL NOT NULL
) STRICT;
CREATE TABLE requests (
  labeller INTEGER NOT NULL REFERENCES labellers (number),
  request TEXT NOT NULL CHECK (length(request) BETWEEN 1 AND 64),
  sha256 TEXT NOT NULL,
  answer TEXT NOT NULL,
  PRIMARY KEY (labeller, request)
) STRICT, WITHOUT ROWID;
