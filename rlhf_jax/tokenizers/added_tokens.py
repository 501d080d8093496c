"""Added tokens of a published tokenizer, collected from the files that may name them.

tokenizer.json lists most of them. Some models keep others, often the token that ends a turn, in `added_tokens_decoder`
of tokenizer_config.json, in added_tokens.json, or only as the text of a special token. They are collected and get
their ids as in transformers, which adds them to the tokenizer of tokenizer.json.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError

Content = Mapping[str, Any]
# In transformers' order, which decides the ids of those that no file gives an id.
SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
EXTRAS = ("extra_special_tokens", "additional_special_tokens")

_NO_TOKEN = ("none", "null")


class Added(NamedTuple):
    """An entry of "added_tokens": text that is matched before any merge."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool

    @classmethod
    def of(cls, entry: Content) -> Added:
        return cls(*(entry[field] for field in cls._fields))


def collect(
    tokenizer: Content, config: Content, listed: Content, vocab: Mapping[str, int], where: Mapping[str, str]
) -> list[Added]:
    """Lists all added tokens; a token of tokenizer.json takes its flags from `added_tokens_decoder`, if it is there.

    Args:
      tokenizer: content of tokenizer.json.
      config: content of tokenizer_config.json, completed by special_tokens_map.json.
      listed: content of added_tokens.json, used without an `added_tokens_decoder`, as in transformers.
      vocab: text -> id of the model's own tokens.
      where: name of a file -> how errors name it.

    Raises:
      UserError: for an entry that is malformed, or whose id contradicts tokenizer.json.
    """
    found = {added.content: added for added in map(Added.of, tokenizer.get("added_tokens") or [])}
    ids = {**vocab, **{text: added.id for text, added in found.items()}}
    texts = {id: text for text, id in ids.items()}
    for role in SPECIAL_ROLES:
        value = config.get(f"{role}_token")
        none = not value or value == -1 or (isinstance(value, Mapping) and not value.get("content"))
        if not none and text_of(value) is None:
            place = f"{where['tokenizer_config.json']}: field '{role}_token'"
            raise _wrong(place, "a token's text, an object with it as 'content', or null", value)
    named = dict.fromkeys(text for role in SPECIAL_ROLES if (text := role_of(config.get(f"{role}_token"))))
    extras = dict.fromkeys(_extras(config, where["tokenizer_config.json"]))

    def following() -> int:
        last = max((added.id for added in found.values()), default=-1)
        return max(len(vocab), last + 1)

    entries = sorted(_decoder(config, where["tokenizer_config.json"]))
    place = f"{where['tokenizer_config.json']}: field 'added_tokens_decoder'"
    if not entries:
        place = where["added_tokens.json"]
        entries = sorted(_listed(listed, {**named, **extras}, place))
    for entry in entries:
        if entry.content in named:
            entry = entry._replace(special=True)
        expected = ids.get(entry.content, following())
        if entry.id != expected or texts.get(entry.id, entry.content) != entry.content:
            other = f"is {texts[entry.id]!r} in tokenizer.json" if entry.id in texts else "is another by tokenizer.json"
            raise UserError(
                f"{place}: expected id {expected} for {entry.content!r}, got {entry.id}, which {other}; correct the "
                "file, or save the tokenizer with transformers again"
            )
        found[entry.content] = entry
        ids[entry.content], texts[entry.id] = entry.id, entry.content
    missing = [text for text in named if text not in ids]
    for text in [*missing, *(text for text in extras if text not in found and text not in missing)]:
        id = ids.get(text, following())
        if texts.get(id, text) != text:
            raise UserError(
                f"{where['tokenizer_config.json']}: expected tokens of tokenizer.json, got {text!r} without an id; "
                f"id {id}, the next, is {texts[id]!r}"
            )
        found[text] = Added(id, text, True, False, False, False, False)
        ids[text], texts[id] = id, text
    return list(found.values())


def text_of(value: object) -> str | None:
    """Text of a token in tokenizer_config.json, given as a string or as an object with "content"; None if empty."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def role_of(value: object) -> str | None:
    """Text of the token with a role; None if there is none, which some files write as the text "None" or "null"."""
    text = text_of(value)
    return None if text is not None and text.lower() in _NO_TOKEN else text


def _decoder(config: Content, where: str) -> Iterator[Added]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise UserError(f"{where}: field 'added_tokens_decoder': expected an object, got {type(decoder).__name__}")
    for id, entry in decoder.items():
        wrong = functools.partial(_wrong, f"{where}: field 'added_tokens_decoder[{id}]'")
        if not id.isdecimal():
            raise wrong("an id for its name", id)
        if not isinstance(entry, Mapping) or text_of(entry) is None:
            raise wrong("an object with the token's text as 'content'", entry)
        flags = {"special": False, "lstrip": False, "rstrip": False, "single_word": False}
        flags |= {"normalized": not entry.get("special", False)}
        flags |= {name: entry[name] for name in flags if name in entry}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise wrong("true or false for its flags", dict(entry))
        yield Added(int(id), entry["content"], **flags)


def _listed(listed: Content, special: Mapping[str, None], where: str) -> Iterator[Added]:
    """Entries of added_tokens.json, which are special if tokenizer_config.json names them."""
    for text, id in listed.items():
        if isinstance(id, bool) or not isinstance(id, int) or id < 0 or not text:
            raise _wrong(f"{where}: field {text!r}", "the id of a token", id)
        yield Added(id, text, text in special, text not in special, False, False, False)


def _extras(config: Content, where: str) -> Iterator[str]:
    """Texts of further special tokens: a list, or an object of named ones."""
    for name in EXTRAS:
        value = config.get(name) or []
        # transformers 5 names the special tokens of a model, such as {"image_token": "<image>"}.
        items: Sequence[object] = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(items, list):
            raise _wrong(f"{where}: field {name!r}", "a list of tokens", value)
        for item in items:
            text = text_of(item)
            if text is None:
                raise _wrong(f"{where}: field {name!r}", "a list of tokens", item)
            yield text


def _wrong(place: str, expected: str, got: object) -> UserError:
    return UserError(f"{place}: expected {expected}, got {got!r:.100}")
