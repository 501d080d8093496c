"""Byte-level tokenizers: raw bytes, a byte-pair encoding trained on the user's corpus, or a named tiktoken encoding.

Every tokenizer adds three special ids above the encoding's ranks: end of text (eos), begin of text (bos) and padding
(pad). No text is ever encoded to one of them, so no text can end, begin or mask a row.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import rustbpe
import tiktoken

from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.chat_template import ChatTemplate
from rlhf_jax.tokenizers.protocol import Token, one_line, write_saved

SPECIAL_IDS = 3

# Pieces that a token never crosses. Bytes: any split is correct, short ones are fast. Words: GPT-4's pattern.
BYTES_PATTERN = r"(?s).{1,64}"
WORDS_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The regex engine below tiktoken backtracks over white space and overflows its stack near a million characters.
MAX_SPACE_RUN = 4096

# tiktoken downloads "gpt2" from other addresses than "r50k_base", which is the same encoding.
_SAME_ENCODING = {"gpt2": "r50k_base"}


class Tokenizer:
    """A tiktoken encoding with additional eos, bos and pad ids; immutable, equal if the fingerprints are."""

    def __init__(self, name: str, pattern: str, ranks: dict[Token, int]):
        """Makes a tokenizer from a table of ranks.

        Args:
          name: name for reports; not part of the fingerprint.
          pattern: regular expression that splits text into pieces.
          ranks: token bytes -> id; must contain all 256 single bytes, so that any text can be encoded.

        Raises:
          UserError: if a byte is missing or two tokens share an id.
        """
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise UserError(
                f"tokenizer {name}: expected a token for each of 256 bytes, got none for {len(missing)}, the first is "
                f"{missing[0]:#04x}"
            )
        if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
            raise UserError(
                f"tokenizer {name}: expected {len(ranks)} different ids from 0, one per token, got "
                f"{len(set(ranks.values()))} from {min(ranks.values())}"
            )
        self.name = name
        self.pattern = pattern
        self._ranks = dict(ranks)
        self._bytes = {id: token for token, id in ranks.items()}
        # No special tokens here: the texts of the encoding's own special tokens are encoded as plain text.
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={})
        # eos comes first: for GPT-2 it is then 50256, the id that its pretrained weights use.
        first = max(ranks.values()) + 1
        self.eos_id, self.bos_id, self.pad_id = first, first + 1, first + 2
        self.start_ids, self.stop_ids = (self.bos_id,), (self.eos_id,)
        self.special_tokens: Mapping[str, int] = {}  # no text is a special token
        self.chat_template: ChatTemplate | None = None

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Makes the byte tokenizer: every byte of UTF-8 is a token, and the byte is its id."""
        return cls("bytes", BYTES_PATTERN, {bytes([byte]): byte for byte in range(256)})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-pair encoding on a corpus, deterministically.

        Args:
          texts: the corpus; streamed.
          vocab_size: number of ids: 256 bytes, the merges, 3 special ids. A small corpus may give fewer merges.

        Raises:
          UserError: if vocab_size is less than 259.

        Source: Sennrich et al. 2016 (arXiv:1508.07909).
        """
        if vocab_size < 256 + SPECIAL_IDS:
            raise UserError(
                f"vocab_size: expected at least {256 + SPECIAL_IDS} (256 bytes and 3 special ids), got {vocab_size}"
            )
        trainer = rustbpe.Tokenizer()
        parts = (piece for text in texts for piece in pieces(text))
        trainer.train_from_iterator(parts, vocab_size - SPECIAL_IDS, pattern=WORDS_PATTERN)
        return cls("bpe", WORDS_PATTERN, {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    @classmethod
    def named(cls, name: str) -> Tokenizer:
        """Loads a tiktoken encoding, such as "gpt2" or "cl100k_base"; downloaded once, then read from the cache.

        Raises:
          UserError: for an unknown name; and if neither network nor cache has it, with the alternatives.
        """
        known = sorted(tiktoken.list_encoding_names())
        if name not in known:
            raise UserError(
                f"tokenizer: expected one of tiktoken's {', '.join(known)}, got {name!r}; or use 'bytes' or a trained "
                "one"
            )
        candidates = [name, _SAME_ENCODING[name]] if name in _SAME_ENCODING else [name]
        problems = []
        for candidate in candidates:
            try:
                encoding = tiktoken.get_encoding(candidate)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged file is a ValueError
                problems.append(f"{type(error).__name__}: {one_line(error)}")
                continue
            # tiktoken has no public API for these two, and a run folder must store them.
            return cls(name, encoding._pat_str, encoding._mergeable_ranks)
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "unset")
        raise UserError(
            f"tokenizer {name!r}: tiktoken could not load its rank file ({problems[0]}). Offline, set"
            f" TIKTOKEN_CACHE_DIR (now {cache}) to a folder that holds it, copied from a machine with network; or use"
            " 'bytes', a tokenizer trained on your corpus, or the tokenizer.json of another run"
        )

    def save(self, path: str | Path) -> None:
        """Writes the full tokenizer as JSON; `load_tokenizer` needs nothing else, no network and no cache."""
        write_saved(path, self, self._content())

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the three special ones: the rows that a model's embedding needs."""
        return self.pad_id + 1

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset((self.eos_id, self.bos_id, self.pad_id))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of pattern and tokens; equal exactly if every text gets the same ids."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode("ascii")).hexdigest()

    def lost(self, text: str) -> str:
        """The characters of a text that its ids do not hold: none, as every byte has a token."""
        return ""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; "<|endoftext|>" in it is encoded as those 13 characters.

        Raises:
          UserError: if text contains a lone surrogate, which is not valid in UTF-8.
        """
        if len(text) <= MAX_SPACE_RUN and text.isascii():
            return self._encoding.encode_ordinary(text)
        return [id for piece in pieces(text) for id in self._encoding.encode_ordinary(piece)]

    def encode_continuation(self, text: str) -> list[int]:
        """Same as `encode`."""
        return self.encode(text)

    def encode_sections(self, sections: Sequence[str], stand_ins: Mapping[int, str]) -> list[list[int]]:
        """`encode` of each section, with the characters in stand_ins restored; no text is a special token."""
        return [self.encode(section.translate(stand_ins)) for section in sections]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text. A plain loop: tiktoken's threads cost more than they gain on short texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", errors="replace")

    def decode_batch(self, rows: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def token_bytes(self, id: int) -> Token:
        """Bytes of a token; b"" for a special id and for an id that a named encoding leaves unused."""
        id = int(id)
        if not 0 <= id < self.vocab_size:
            raise UserError(f"token id {id} is outside the vocabulary of {self.vocab_size} ids")
        return self._bytes.get(id, b"")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"

    def _content(self) -> dict[str, object]:
        tokens = {str(id): base64.b64encode(self._bytes[id]).decode("ascii") for id in sorted(self._bytes)}
        return {"pattern": self.pattern, "tokens": tokens}


def pieces(text: str, longest: int = MAX_SPACE_RUN) -> Iterator[str]:
    """Splits text inside runs of white space of more than `longest` characters.

    Raises:
      UserError: if text contains a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text: expected UTF-8, got a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None
    if len(text) <= longest:
        yield text
        return
    start = 0
    for run in _long_space(longest).finditer(text):
        for cut in range(run.start() + longest, run.end(), longest):
            yield text[start:cut]
            start = cut
    yield text[start:]


@functools.cache
def _long_space(longest: int) -> re.Pattern[str]:
    return re.compile(rf"\s{{{longest + 1},}}")
