"""Byte-level BPE: conversion between Hugging Face's list of merges and tiktoken's table of ranks.

A list merges the pairs that it contains, earliest first. A table merges any two neighbours whose joined bytes are a
token, lowest rank first. They agree on every text if each token of the table, encoded alone, reduces to two parts that
the list merges into it, with the merges in the same order as the ranks. Proof: let x and y be neighbours in some text
whose joined bytes are token m. Nothing was ever merged across the two ends of xy, or one of the ends would no longer
exist; so the inside was merged as it is when m stands alone, and x, y are the two parts to which m alone reduces.
Hence the table only ever has the choices of the list, and makes the same ones.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

Pair = tuple[bytes, bytes]

# Patterns that split text before merging, named after the models that introduced them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OURS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
# Each matches every character, so nothing is lost between two matches, and means the same to Oniguruma, which Hugging
# Face uses, as to tiktoken's Rust engine.
PATTERNS = frozenset((GPT2, LLAMA3, QWEN2, O200K, _OURS))
# GPT-2's pattern after digits were split off: a digit ends a run of white space as the end of the text does. Hugging
# Face counts a few characters as digits that are too new for the engine's \p{N}.
_DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
_GPT2_DIGITS = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+|[{_DIGIT}]| ?[^\s\p{{L}}{_DIGIT}]+|\s+(?![^\s{_DIGIT}])|\s+"
# Syntax in tiktoken's named encodings -> equivalent syntax for Oniguruma.
_TO_ONIGURUMA = {
    r"\s++$": r"\s++\z",
    r"\p{N}{1,3}+": r"(?>\p{N}{1,3})",
    r"(?s).{1,64}": r"(?m:.{1,64})",
}

# Combining marks newer than Unicode 9, which Hugging Face normalizes by: it neither reorders nor composes them.
_NEW_MARKS = re.compile(
    "([\u05c8-\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9\U000105d2\U000105da\U000105e4\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eac"
    "\U00010ecb-\U00010ecf\U00010ef0-\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070"
    "\U0001133b\U00011380-\U000113d0\U0001145e\U00011839-\U0001183a\U00011930-\U00011943\U000119e0\U00011a34\U00011a47"
    "\U00011a99\U00011d42-\U00011d45\U00011d97\U00011f41-\U00011f42\U0001611e-\U0001612f\U00016d63-\U00016d6a"
    "\U00016ff0-\U00016ff1\U0001d127-\U0001d128\U0001d250-\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee-\U0001e5ef\U0001e6e3-\U0001e6f5])"
)


@functools.cache
def _letters() -> list[str]:
    """The letter for each byte in a vocabulary: itself if printable, else the next from U+0100."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_letters())}


def to_letters(token: bytes) -> str:
    """Writes a token as in vocabularies: b" a" is "Ġa"."""
    letters = _letters()
    return "".join(letters[byte] for byte in token)


def from_letters(text: str) -> bytes | None:
    """Inverse of `to_letters`; None if a character does not represent a byte."""
    table = _bytes_of_letters()
    try:
        return bytes([table[letter] for letter in text])
    except KeyError:
        return None


_NEVER = 1 << 62  # the rank of bytes that are not a token


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> Pair | None:
    """The two parts to which a token of two or more bytes reduces alone; None if three or more parts remain."""
    ends = list(range(len(token) + 1))
    order = [ranks.get(token[at : at + 2], _NEVER) for at in range(len(token) - 1)]
    while len(ends) > 3:
        lowest = min(order)
        if lowest == _NEVER:
            return None
        at = order.index(lowest)
        del ends[at + 1], order[at]
        if at < len(order):
            order[at] = ranks.get(token[ends[at] : ends[at + 2]], _NEVER)
        if at:
            order[at - 1] = ranks.get(token[ends[at - 1] : ends[at + 1]], _NEVER)
    return token[: ends[1]], token[ends[1] :]


def merges_of(ranks: Mapping[bytes, int]) -> tuple[list[Pair], bool]:
    """Returns (list of merges of a table, True if it makes every token).

    A token that the list does not make is used only if it is a full piece of text.
    """
    pairs = [last_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    made = [pair for pair in pairs if pair is not None]
    return made, len(made) == len(pairs)


def table_of(model: Mapping[str, Any], special: Collection[int]) -> list[tuple[bytes, int]] | None:
    """Table of ranks that encodes like the model in a `tokenizer.json`.

    Args:
      model: its field "model".
      special: ids that no text may encode to; their tokens are left out.

    Returns:
      (token, id) in the order of the ranks; None unless the table is shown to be exact. A byte may have no token, see
      `unknown_characters`.
    """
    plain = model.get("type") == "BPE" and not model.get("dropout") and not model.get("byte_fallback")
    if not plain or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    ids = {token: id for text, id in model["vocab"].items() if (token := from_letters(text)) and id not in special}
    rules = _rules(model["merges"])
    if rules is None or any(bytes([byte]) not in ids for byte in _CONTINUES):
        return None
    if any(made not in ids or left not in ids or right not in ids for made in rules for left, right in rules[made]):
        return None
    ranks = {bytes([byte]): byte for byte in range(256) if bytes([byte]) in ids}
    for made, places in rules.items():
        ranks[made] = 256 + min(places.values())
    # With ignore_merges, a piece that is itself a token is encoded as that token without merging, as in tiktoken.
    if model.get("ignore_merges"):
        last = 256 + len(model["merges"])
        ranks.update((token, last + n) for n, token in enumerate(sorted(ids.keys() - ranks.keys())))
    place, never = {}, set()
    for token in ranks:
        if len(token) == 1:
            continue
        pair = last_pair(token, ranks)
        if pair is None:
            never.add(token)
        elif pair not in rules.get(token, {}):
            return None
        else:
            place[token] = rules[token][pair]
    order = sorted(place, key=ranks.__getitem__)
    if order != sorted(place, key=place.__getitem__):
        return None
    # A token in `never` can only be used as a full piece, which needs ignore_merges.
    kept = [token for token in sorted(ranks, key=ranks.__getitem__) if token not in never or model.get("ignore_merges")]
    return [(token, ids[token]) for token in kept]


def unknown_characters(tokens: Collection[bytes]) -> re.Pattern[str]:
    """Pattern that matches a character whose first byte in UTF-8 is not a token."""
    parts = []
    for byte in (*range(0x80), *range(0xC2, 0xF5)):
        if bytes([byte]) not in tokens:
            more = 0 if byte < 0x80 else 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
            first = byte if not more else (byte & 0x3F >> more) << 6 * more
            low, high = max(first, _SHORTEST[more]), min(first + (1 << 6 * more) - 1, 0x10FFFF)
            parts.append(f"\\U{low:08x}-\\U{high:08x}")
    return re.compile(f"[{''.join(parts)}]" if parts else "(?!)")


_CONTINUES = range(0x80, 0xC0)  # continuation bytes in UTF-8
_SHORTEST = (0, 0x80, 0x800, 0x10000)  # the first character with 0, 1, 2 or 3 continuation bytes


def _rules(merges: Collection[str | list[str]]) -> dict[bytes, dict[Pair, int]] | None:
    """Maps token -> pair -> place in the list; None if a pair occurs twice or is not of byte-level tokens."""
    rules: dict[bytes, dict[Pair, int]] = {}
    for place, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        pair = tuple(map(from_letters, parts))
        if len(pair) != 2 or not pair[0] or not pair[1]:
            return None
        made = rules.setdefault(pair[0] + pair[1], {})
        if pair in made:
            return None
        made[pair[0], pair[1]] = place
    return rules


def pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """Exact tiktoken pattern for the field "pre_tokenizer" of a tokenizer.json; None if there is none."""
    match _flat(pre_tokenizer):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return r"(?s).+"
        case [{"type": "ByteLevel", "add_prefix_space": False} as level] if level.get("use_regex", True):
            return GPT2
        case [
            {"type": "Digits", "individual_digits": bool(alone)},
            {"type": "ByteLevel", "add_prefix_space": False} as level,
        ] if level.get("use_regex", True):
            return _GPT2_DIGITS if alone else _GPT2_DIGITS.replace(f"[{_DIGIT}]|", f"[{_DIGIT}]+|")
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": bool(invert)},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, invert) in (("Isolated", False), ("Removed", True)) and pattern in PATTERNS:
            return pattern
    return None


def _flat(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def to_oniguruma(pattern: str) -> str | None:
    """Converts a tiktoken pattern for Hugging Face; None if it might mean something else there."""
    for ours, theirs in _TO_ONIGURUMA.items():
        pattern = pattern.replace(ours, theirs)
    odd = "$" in pattern or "(?s" in pattern or "(?x" in pattern or "[[" in pattern or "&&" in pattern
    return None if odd or re.search(r"\{[\d,]+\}\+|(?<!\[)\^", pattern) else pattern


def nfc(text: str) -> str:
    """Unicode normalization form NFC, as Hugging Face computes it."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return "".join(
        part if at % 2 else unicodedata.normalize("NFC", part) for at, part in enumerate(_NEW_MARKS.split(text))
    )
