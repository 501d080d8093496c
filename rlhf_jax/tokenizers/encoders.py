"""Two encoders for a tokenizer.json: tiktoken, if `merges.table_of` shows it to be exact, and the package `tokenizers`.

Both treat the texts of special tokens as plain text: they match only added tokens that are not special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import tiktoken

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.tokenizers.added_tokens import Added
from rlhf_jax.tokenizers.merges import from_letters, nfc, unknown_characters

if TYPE_CHECKING:
    import tokenizers

Content = Mapping[str, Any]
Place = Literal["start", "special", "text"]  # what precedes a text: nothing, a special token, other text


def steps(part: Content | None, name: str) -> list[Content]:
    """Lists the steps of a normalizer, decoder, …, in order.

    Args:
      name: the field in which a sequence holds its steps.
    """
    if part is None:
        return []
    return [step for inner in part[name] for step in steps(inner, name)] if part["type"] == "Sequence" else [part]


def bytes_of(text: str, decoder: Sequence[Content]) -> bytes:
    """Bytes of a token of a vocabulary, by the decoder's steps."""
    for step in decoder:
        kind = step["type"]
        if kind == "ByteLevel":
            token = from_letters(text)
            return text.encode("utf-8") if token is None else token
        if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        if kind == "Metaspace":
            text = text.replace(step["replacement"], " ")
        if kind == "Replace" and "String" in step["pattern"]:
            text = text.replace(step["pattern"]["String"], step["content"])
    return text.encode("utf-8")


class RankEncoder:
    """tiktoken encoder with a table from ranks to ids: ranks give the order of merges, which ids need not.

    A text with a character that has no token (SmolLM2 lacks seven control characters) is encoded by the package.
    """

    def __init__(
        self,
        pattern: str,
        table: Sequence[tuple[bytes, int]],
        added: Collection[Added],
        *,
        composes: bool,
        package: Callable[[], PackageEncoder],
    ):
        ranks = {token: rank for rank, (token, _) in enumerate(table)}
        self._encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = [id for _, id in table]
        self._unknown, self._package = unknown_characters(ranks.keys()), package
        self._compose = nfc if composes else str
        # Tokens that are not normalized are matched in the original text, the others then in the composed text.
        self._first = _finder([token for token in added if not token.normalized], str)
        self._then = _finder([token for token in added if token.normalized], self._compose)

    def encode(self, text: str, place: Place) -> list[int]:
        """Ids of the text; the same at every place."""
        if self._unknown.search(self._compose(text)):
            return self._package().encode(text, place)
        ids: list[int] = []
        for outer in self._first(text):
            for part in [outer] if isinstance(outer, int) else self._then(self._compose(outer)):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids += [self._ids[rank] for rank in self._encoding.encode_ordinary(part)]
        return ids


def _finder(added: Sequence[Added], compose: Callable[[str], str]) -> Callable[[str], Iterable[str | int]]:
    """Returns a function that splits a text at added tokens, each given as its id; the longest match wins."""
    ids = {compose(token.content): None if token.special else token.id for token in added}
    if not any(id is not None for id in ids.values()):
        return lambda text: [text]
    pattern = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))

    def find(text: str) -> Iterator[str | int]:
        start = 0
        for match in pattern.finditer(text):
            id = ids[match[0]]
            # A special token is skipped, and with it any added token inside its text.
            if id is not None:
                yield from (text[start : match.start()], id)
                start = match.end()
        yield text[start:]

    return find


class PackageEncoder:
    """Encoder with the package `tokenizers`, for SentencePiece's BPE, Unigram and other patterns."""

    def __init__(self, content: Content, where: str):
        """Makes an encoder; `where` names the file in errors."""
        self._content = {**content, "truncation": None, "padding": None, "post_processor": None}
        self._where = where
        self._made: dict[Place, tokenizers.Tokenizer] = {}
        self.at("start")

    def at(self, place: Place) -> tokenizers.Tokenizer:
        """Tokenizer for text at a place: a leading space is added only at the start of a text.

        Raises:
          UserError: if the package is not installed or cannot read the file.
        """
        if place in self._made:
            return self._made[place]
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self._where}: needs the package tokenizers; run: {install_command('hf')}") from None
        content = {
            **self._content,
            "normalizer": _placed(self._content.get("normalizer"), place),
            "pre_tokenizer": _placed(self._content.get("pre_tokenizer"), place),
        }
        try:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        # The package raises nothing more specific.
        except Exception as error:  # noqa: BLE001
            raise UserError(f"{self._where}: {' '.join(str(error).split())[:200]}") from None
        for entry in content.get("added_tokens") or []:
            # The package numbers added tokens itself, without gaps.
            if not entry["special"] and (id := tokenizer.token_to_id(entry["content"])) != entry["id"]:
                raise UserError(
                    f"{self._where}: field 'added_tokens': expected id {id} for {entry['content']!r}, the next without "
                    f"a gap, got {entry['id']}"
                )
        tokenizer.encode_special_tokens = True
        self._made[place] = tokenizer
        return tokenizer

    def encode(self, text: str, place: Place) -> list[int]:
        """Ids of text at a place."""
        return list(self.at(place).encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes a row with the package."""
        return str(self.at("start").decode(ids, skip_special_tokens=True))


def _placed(part: Content | None, place: Place) -> Content | None:
    """A normalizer or pre-tokenizer for text at a place, without the leading space if none is added there.

    Prepend and ByteLevel also add one after each special token; Metaspace does if its scheme is "always".
    """
    if part is None or place == "start":
        return part
    kind = part["type"]
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [step for inner in part[name] if (step := _placed(inner, place)) is not None]}
    if kind == "Metaspace" and (place == "text" or part.get("prepend_scheme") == "first"):
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if kind == "Prepend" and place == "text":
        return None
    if kind == "ByteLevel" and place == "text":
        return {**part, "add_prefix_space": False}
    return part
