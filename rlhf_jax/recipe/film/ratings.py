"""Reader of people's ratings of film-review sentences, from the source package of vaderSentiment.

The package (MIT) holds an archive with 10,605 sentences and about 18 ratings of each, from −4 to 4. Archives are read
in memory, within limits of size; nothing is written to disk.

Source: Hutto and Gilbert 2014, VADER (ICWSM).
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import statistics
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.data import Ledger
from rlhf_jax.data.jsonl import describe, parse_value
from rlhf_jax.errors import UserError

PACKAGE = "vaderSentiment-3.3.2.tar.gz"
INNER = "hutto_ICWSM_2014.tar.gz"
SENTENCES, RATINGS = "movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt"
GET_IT = "get it with: pip download --no-binary :all: --no-deps vaderSentiment==3.3.2"
ARCHIVES = (".tar.gz", ".tgz", ".tar")
MOST_BYTES = 64 * 2**20  # of an archive, packed and unpacked; the published one has 2.4 and 7 MiB
MOST_MEMBERS = 10_000
MOST_RATING = 4
_MEAN_ERROR = 0.005  # the file rounds means to 9 digits or more


@dataclasses.dataclass(frozen=True)
class RatedSentence:
    """A sentence and what people gave it.

    Attributes:
      text: the sentence.
      ratings: whole numbers, −4 (extremely negative) to 4 (extremely positive), one of each rater.
      where: "file:line", for the ledger and for errors.
    """

    text: str
    ratings: tuple[int, ...]
    where: str = dataclasses.field(default="", compare=False)

    @property
    def mean(self) -> float:
        """Mean rating."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def error(self) -> float:
        """Standard error of the mean rating."""
        return statistics.stdev(self.ratings) / math.sqrt(len(self.ratings))


def is_archive(path: str) -> bool:
    """True for the name of an archive, which ends in .tar.gz, .tgz or .tar."""
    return path.endswith(ARCHIVES)


def read_ratings(path: str, ledger: Ledger) -> list[RatedSentence]:
    """Read the rated sentences from the source package, or from the archive within it.

    Args:
      path: vaderSentiment-3.3.2.tar.gz, as pip has downloaded it.
      ledger: gets every sentence; one that occurs again is dropped.

    Raises:
      UserError: for another file, a damaged or too large archive, and a line of another form.
    """
    files = _members(path, _read_file(path))
    if SENTENCES not in files:
        if INNER not in files:
            raise UserError(
                f"{path}: expected an archive with {INNER}, got {len(files)} other files; use the source package of "
                f"vaderSentiment: {GET_IT}"
            )
        path = f"{path}:{INNER}"
        files = _members(path, files[INNER])
    for name in (SENTENCES, RATINGS):
        if name not in files:
            raise UserError(f"{path}: expected {name} in it, got an archive without it; {GET_IT}")
    texts = {key: (where, fields) for where, key, fields in _lines(path, SENTENCES, files[SENTENCES], 3)}
    ratings = {key: (where, fields) for where, key, fields in _lines(path, RATINGS, files[RATINGS], 4)}
    for one, (where, _) in texts.items():
        if one not in ratings:
            raise UserError(f"{where}: field 'id': expected ratings of sentence {one} in {RATINGS}, got none")
    for one, (where, _) in ratings.items():
        if one not in texts:
            raise UserError(f"{where}: field 'id': expected a sentence {one} in {SENTENCES}, got none")
    found: list[RatedSentence] = []
    seen: set[str] = set()
    for key, (where, fields) in texts.items():
        sentence = RatedSentence(_text(where, fields[1]), _ratings(*ratings[key]), where)
        _check_mean(where, fields[0], sentence)
        ledger.read(where)
        if (same := " ".join(sentence.text.split())) in seen:
            ledger.drop(where, "the same sentence as in an earlier row")
            continue
        seen.add(same)
        ledger.keep(where)
        found.append(sentence)
    return found


def _read_file(path: str) -> bytes:
    file = Path(path)
    if not file.exists():
        raise UserError(f"data: expected the ratings, got {path}, which does not exist; {GET_IT}")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: expected at most {MOST_BYTES:,} bytes, got {file.stat().st_size:,}; {GET_IT}")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {GET_IT}") from None


def _members(path: str, packed: bytes) -> dict[str, bytes]:
    """The regular files of a tar archive, plain or gzipped, by the last part of their name."""
    try:
        # Unpacked at once, so that the limit holds for whatever the archive says of its members.
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(MOST_BYTES + 1) if packed[:1] == b"\x1f" else packed
        if len(unpacked) > MOST_BYTES:
            raise UserError(f"{path}: expected at most {MOST_BYTES:,} bytes once unpacked, got more; {GET_IT}")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number == MOST_MEMBERS:
                    raise UserError(f"{path}: expected at most {MOST_MEMBERS:,} files, got more; {GET_IT}")
                # A sparse file may claim any size.
                opened = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if opened is not None:
                    found.setdefault(member.name.rpartition("/")[2], opened.read())
        return found
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: expected a tar archive, got one that cannot be read: {error}; {GET_IT}") from None


def _lines(path: str, name: str, content: bytes, count: int) -> Iterator[tuple[str, str, list[str]]]:
    """(place, id, further fields) of each line that is not blank."""
    seen: set[str] = set()
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}:{name}:{number}"
        try:
            fields = line.decode("utf-8").strip().split("\t")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: expected UTF-8, got byte {line[error.start]:#04x} at byte {error.start + 1}; {GET_IT}"
            ) from None
        if fields == [""]:
            continue
        if len(fields) != count:
            raise UserError(f"{where}: expected {count} fields between tabs, got {len(fields)}; {GET_IT}")
        if fields[0] in seen:
            raise UserError(f"{where}: field 'id': expected each once, got {fields[0][:40]!r} again; {GET_IT}")
        seen.add(fields[0])
        yield where, fields[0], fields[1:]
    if not seen:
        raise UserError(f"{path}:{name}: expected a line for each sentence, got an empty file; {GET_IT}")


def _text(where: str, text: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: field 'text': expected a sentence, got nothing; {GET_IT}")
    return text.strip()


def _ratings(where: str, fields: list[str]) -> tuple[int, ...]:
    try:
        value = parse_value(fields[-1])
    except ValueError:
        value = fields[-1]
    expected = f"a list of two or more whole numbers from {-MOST_RATING} to {MOST_RATING}"
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where}: field 'ratings': expected {expected}, got {describe(value)}; {GET_IT}")
    for one in value:
        if type(one) is not int or abs(one) > MOST_RATING:
            raise UserError(f"{where}: field 'ratings': expected {expected}, got {describe(one)} among them; {GET_IT}")
    return tuple(value)


def _check_mean(where: str, given: str, sentence: RatedSentence) -> None:
    """Check that a sentence and the ratings under its id belong together."""
    try:
        mean = float(given)
    except ValueError:
        raise UserError(f"{where}: field 'mean': expected a number, got {given[:40]!r}; {GET_IT}") from None
    if not abs(mean - sentence.mean) <= _MEAN_ERROR:
        raise UserError(
            f"{where}: field 'mean': expected the mean {sentence.mean:.4g} of the {len(sentence.ratings)} ratings in "
            f"{RATINGS}, got {mean:.4g}; {GET_IT}"
        )
