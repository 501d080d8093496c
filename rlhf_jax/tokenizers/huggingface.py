"""Tokenizer of a published model, from Hugging Face files: tokenizer.json, tokenizer_config.json and others.

If a tiktoken encoding gives the same ids for every text (`merges.table_of`), tiktoken encodes; else the package
`tokenizers` does. Two things differ from transformers on purpose. The text of a special token is always plain text. And
pad is never eos: a model without a separate pad token gets a pad id above its embedding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.tokenizers.added_tokens import Added, collect, role_of
from rlhf_jax.tokenizers.bpe import pieces
from rlhf_jax.tokenizers.chat_template import ChatTemplate
from rlhf_jax.tokenizers.encoders import PackageEncoder, Place, RankEncoder, bytes_of, steps
from rlhf_jax.tokenizers.merges import pattern_of, table_of
from rlhf_jax.tokenizers.protocol import Token, write_saved
from rlhf_jax.tokenizers.published_files import (
    ADDED,
    CONFIG,
    FILES,
    ROLES,
    SPECIAL_MAP,
    TEMPLATE,
    TOKENIZER,
    as_ids,
    ids_of,
    parse,
    read_text,
)

SAMPLING = ("dropout", "alpha", "nbest_size")  # fields of a model in tokenizer.json that make its encoding random
# tiktoken's regex engine overflows near a million characters of white space; Hugging Face's does not.
_LONGEST_SPACE = 250_000


class HuggingFaceTokenizer:
    """Tokenizer of a published model; immutable, equal if the fingerprints are.

    vocab_size is the largest id with a token, plus one: embedding rows above it, which only round up the size, are
    never sampled. pad_id may be `rows`, one above the embedding: it has no embedding row in the model and no logit.
    """

    def __init__(
        self, files: Mapping[str, str], *, rows: int, name: str, ids: Mapping[str, Any], folder: Path | None = None
    ):
        """Makes a tokenizer from the content of its files.

        Args:
          files: name -> text: tokenizer.json, and tokenizer_config.json, special_tokens_map.json, added_tokens.json,
            chat_template.jinja.
          rows: rows of the model's embedding.
          name: name for reports; not part of the fingerprint.
          ids: "bos", "eos" and "pad" from the model's config, used if the files do not specify them; several eos ids
            are added to stop_ids, as is the end of a turn in the chat template.
          folder: folder of the files, for errors.

        Raises:
          UserError: naming the file and what is missing or wrong in it.
        """
        self.name = name
        self.rows = rows
        self.files = {name: files[name] for name in FILES if name in files}
        self._where = {file: f"{name}: {file}" if folder is None else f"{folder / file}" for file in FILES}
        self._ids = {role: as_ids(ids.get(role), f"{name}: {role}_token_id") for role in ROLES}
        parsed = {file: parse(self.files.get(file), self._where[file]) for file in FILES if file != TEMPLATE}
        self.content = parsed[TOKENIZER]
        config = {**parsed[SPECIAL_MAP], **parsed[CONFIG]}
        try:
            self.vocabulary = _vocabulary(self.content)
            self.added = collect(self.content, config, parsed[ADDED], self.vocabulary, self._where)
            self._roles(config)
            self.backend: Literal["tiktoken", "tokenizers"] = "tokenizers"
            self._encoder = self._choose_encoder()
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{self._where[TOKENIZER]}: {type(error).__name__}: {error}; is the file complete?"
            ) from None

    @classmethod
    def from_folder(cls, folder: str | Path, *, rows: int) -> HuggingFaceTokenizer:
        """Loads the tokenizer of a model folder, in the layout of `save_pretrained` and the Hub.

        Args:
          rows: rows of the model's embedding.

        Raises:
          UserError: if tokenizer.json is missing, or a file is damaged.
        """
        folder = Path(folder)
        files = {name: text for name in FILES if (text := read_text(folder / name)) is not None}
        if TOKENIZER not in files:
            raise UserError(
                f"{folder}: no tokenizer.json in it; let transformers write one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return cls(files, rows=rows, name=folder.resolve().name, ids=ids_of(folder), folder=folder)

    @classmethod
    def from_content(
        cls,
        tokenizer: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        rows: int,
        name: str,
        ids: Mapping[str, Any] | None = None,
    ) -> HuggingFaceTokenizer:
        """Makes a tokenizer from the parsed content of tokenizer.json and tokenizer_config.json."""
        files = {
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        }
        return cls(files, rows=rows, name=name, ids=ids if ids is not None else {})

    def with_template(self, source: str) -> HuggingFaceTokenizer:
        """The same tokenizer with another chat template."""
        files = {**self.files, TEMPLATE: source}
        return HuggingFaceTokenizer(files, rows=self.rows, name=self.name, ids=self._ids)

    def with_folder(self, folder: Path) -> HuggingFaceTokenizer:
        """This tokenizer with the files of a folder that has a tokenizer's files or some of them, such as an adapter's.

        Raises:
          UserError: if its tokenizer.json gives ids of this tokenizer's text to other text.
        """
        own = {name: text for name in FILES if (text := read_text(folder / name)) is not None}
        if not own:
            return self
        config = parse(own.get(CONFIG), str(folder / CONFIG))
        if TOKENIZER in own:
            files = {CONFIG: self.files.get(CONFIG, "{}"), **own}
        else:
            whole = {**parse(self.files.get(CONFIG), self._where[CONFIG]), **config}
            files = {**self.files, **own, CONFIG: json.dumps(whole, ensure_ascii=False, indent=2)}
        if TEMPLATE not in own:
            files.pop(TEMPLATE, None)
            if not config.get("chat_template") and self.chat_template is not None:
                files[TEMPLATE] = self.chat_template.source
        ids = {**self._ids, **ids_of(folder)}
        made = type(self)(files, rows=self.rows, name=folder.resolve().name, ids=ids, folder=folder)
        texts = {id: text for text, id in self.vocabulary.items()}
        for text, id in made.vocabulary.items():
            if id < self.rows and id not in self.special_ids and texts.get(id, text) != text:
                raise UserError(
                    f"{folder / TOKENIZER}: expected {texts[id]!r} as id {id}, as the base model has it, got {text!r}"
                )
        return made

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], path: str | Path) -> HuggingFaceTokenizer:
        """Makes a tokenizer from the parsed file of `save`; called by `load_tokenizer`.

        Raises:
          UserError: naming the path, if the file is damaged.
        """
        try:
            tokenizer = cls(dict(saved["files"]), rows=saved["rows"], name=saved["name"], ids=saved["ids"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged tokenizer file: {type(error).__name__}: {error}") from None
        if tokenizer.fingerprint != saved.get("fingerprint"):
            raise UserError(f"{path}: damaged tokenizer file: its content does not match its fingerprint")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the full tokenizer as JSON; `load_tokenizer` needs nothing else."""
        ids = self._ids | {"eos": list(self.stop_ids)}
        content = {"kind": "huggingface", "backend": self.backend, "rows": self.rows, "ids": ids}
        write_saved(path, self, {**content, "files": self.files})

    def write_folder(self, folder: str | Path) -> None:
        """Writes the original files, byte for byte, for transformers to read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            write_file(Path(folder) / name, text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that determines the ids of a text or of messages."""
        content = {key: value for key, value in self.content.items() if key not in ("truncation", "padding")}
        template = self.chat_template
        if self.added != [Added.of(entry) for entry in self.content.get("added_tokens") or []]:
            content["added_tokens"] = [entry._asdict() for entry in self.added]
        parts = [content, self.eos_id, self.bos_id, self.pad_id, self.start_ids, self.stop_ids, self.special_tokens]
        parts += [template.source, template.tokens] if template else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, as in transformers with `add_special_tokens=False, split_special_tokens=True`.

        Only white space of more than 250,000 characters, which is passed to tiktoken in parts, may be split elsewhere.

        Raises:
          UserError: if text contains a lone surrogate, or a text that the model's own table makes a special token.
        """
        return self._encode(text, "start")

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that continues other text, without the leading space that SentencePiece adds to a text."""
        return self._encode(text, "text")

    def encode_sections(self, sections: Sequence[str], stand_ins: Mapping[int, str]) -> list[list[int]]:
        """Ids of each section of one text, tokenized separately; the text of a special token becomes that token.

        Args:
          stand_ins: characters to restore once special tokens are found, as for `str.translate`.
        """
        rows: list[list[int]] = []
        place: Place = "start"
        for section in sections:
            row: list[int] = []
            for part in self._cut(section):
                if isinstance(part, int):
                    row.append(part)
                    place = "special"
                elif part:
                    row += self._encode(part.translate(stand_ins), place)
                    place = "text"
            rows.append(row)
        return rows

    def lost(self, text: str) -> str:
        """The characters of a text that its ids do not hold, since the vocabulary has no token for them, in order.

        A byte-level vocabulary that lacks a byte drops it without a word; others have a token for all unknown ones.
        """
        for character in set(text) - self._holds.keys():
            # White space alone may be added or stripped, and a lone surrogate is refused by `encode`.
            if character.isspace() or 0xD800 <= ord(character) < 0xE000:
                self._holds[character] = True
                continue
            ids = self._encoder.encode(character, "text")
            held = b"".join(self._bytes.get(id, b"") for id in ids if id != self._unknown)
            whole = held.decode("utf-8", errors="replace").strip()
            self._holds[character] = bool(whole) and ("\ufffd" not in whole or character == "\ufffd")
        return "".join(sorted(character for character in set(text) if not self._holds[character]))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special ids; bytes that are not UTF-8 become U+FFFD.

        A tokenizer that adds a leading space to a text also strips one from the front of any row.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        plain = [id for id in map(self._checked, ids) if id not in self.special_ids]
        if isinstance(self._encoder, PackageEncoder):
            return self._encoder.decode(plain)
        return b"".join(self._bytes.get(id, b"") for id in plain).decode("utf-8", errors="replace")

    def decode_batch(self, rows: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def token_bytes(self, id: int) -> Token:
        """Bytes of a token, the same at every place; b"" for a special id and for an id without a token."""
        id = self._checked(id)
        return b"" if id in self.special_ids else self._bytes.get(id, b"")

    def _checked(self, id: int) -> int:
        id = int(id)
        if not 0 <= id < self.vocab_size and id != self.pad_id:
            raise UserError(f"token id {id} is outside the vocabulary of {self.vocab_size} ids")
        return id

    @functools.cached_property
    def _bytes(self) -> dict[int, Token]:
        decoder = steps(self.content.get("decoder"), "decoders")
        tokens = {id: bytes_of(text, decoder) for text, id in self.vocabulary.items()}
        return tokens | {added.id: added.content.encode("utf-8") for added in self.added}

    def _encode(self, text: str, place: Place) -> list[int]:
        longest = _LONGEST_SPACE if self.backend == "tiktoken" else max(len(text), 1)
        return [id for piece in pieces(text, longest) for id in self._refused(self._encoder.encode(piece, place))]

    def _refused(self, ids: list[int]) -> list[int]:
        """Returns the ids.

        Raises:
          UserError: if a special one is among them, which only the tables of some models produce.
        """
        if not self._never.isdisjoint(ids):
            id = next(id for id in ids if id in self._never)
            name = next(name for name, special in self.special_tokens.items() if special == id)
            raise UserError(
                f"tokenizer {self.name}: expected a text without {name!r}, which would become a special token"
            )
        return ids

    def _cut(self, text: str) -> Iterator[str | int]:
        """Splits the text at special tokens, given as their ids; some strip the white space next to them."""
        start = 0
        for match in self._special_pattern.finditer(text):
            yield text[start : match.start()]
            yield self.special_tokens[match[int(match.lastindex or 0)]]
            start = match.end()
        yield text[start:]

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        about = {added.content: added for added in self.added}
        parts = []
        for text in sorted(self.special_tokens, key=len, reverse=True):
            left = r"\s*" if text in about and about[text].lstrip else ""
            right = r"\s*" if text in about and about[text].rstrip else ""
            parts.append(f"{left}({re.escape(text)}){right}")
        return re.compile("|".join(parts) if parts else "(?!)")

    def _roles(self, config: Mapping[str, Any]) -> None:
        """Sets the special ids and the chat template."""
        names = {**self.vocabulary, **{added.content: added.id for added in self.added}}
        texts = {id: text for text, id in names.items()}
        variables = {key: text for key, value in config.items() if key.endswith("_token") and (text := role_of(value))}
        eos, bos, pad = (self._role(role, config, names.get(variables.get(f"{role}_token", ""))) for role in ROLES)
        if eos is None or eos not in texts:
            raise UserError(
                f"{self._where[CONFIG]}: expected 'eos_token' here or 'eos_token_id' in config.json, got no "
                "end-of-text token"
            )
        self.eos_id: int = eos
        self.bos_id: int | None = bos if bos is not None and bos in texts else None
        for role, id in (("eos", self.eos_id), ("bos", self.bos_id)):
            if id is not None:
                variables.setdefault(f"{role}_token", texts[id])
        self.chat_template = self._template(config, variables)
        self.start_ids = self._starts()
        marked = {added.id for added in self.added if added.special}
        stops = [eos, *(id for id in self._ids["eos"] if id in texts)]
        if self.chat_template is not None:
            # Gemma ends turns with another token than texts, and not every file lists it.
            end = self.chat_template.turn_end([texts[id] for id in sorted(texts) if id in marked or id == eos])
            stops += [names[end]] if end is not None else []
        self.stop_ids = tuple(dict.fromkeys(stops))
        taken = {*self.start_ids, *self.stop_ids} | ({self.bos_id} if self.bos_id is not None else set())
        above = [id for id in texts if id >= self.rows and (id not in marked or id in taken)]
        if above:
            raise UserError(
                f"{self._where[TOKENIZER]}: expected an id below {self.rows}, the rows of the model's embedding, "
                f"got {above[0]} of {texts[above[0]]!r}"
            )
        self.vocab_size = max(id for id in texts if id < self.rows) + 1
        # Some models pad with a token that also occurs in text; it cannot be used as pad.
        self.pad_id = self.rows if pad is None or pad not in marked - taken or pad >= self.rows else pad
        special = marked | taken
        self.special_tokens = {texts[id]: id for id in sorted(texts) if id in special and id < self.rows}
        self.special_ids = frozenset(self.special_tokens.values()) | {self.pad_id}
        # An unknown character becomes <unk>, which is allowed: it neither ends nor masks anything.
        model = self.content["model"]
        unknown = model.get("unk_id") if model.get("unk_token") is None else names.get(model["unk_token"])
        self._never = frozenset(special) - ({unknown} - taken)
        self._unknown: int | None = unknown
        # Character -> True if the vocabulary can write it, for those that were asked for.
        self._holds: dict[str, bool] = {}

    def _role(self, role: str, config: Mapping[str, Any], named: int | None) -> int | None:
        """The id named in tokenizer_config.json, else that of the model's config."""
        # A null bos_token means no bos: Qwen's config.json has a bos id with which the model was never trained.
        if named is not None or (role == "bos" and "bos_token" in config) or not self._ids[role]:
            return named
        return self._ids[role][0]

    def _starts(self) -> tuple[int, ...]:
        """Ids that tokenizer.json adds before a text. Like transformers, this ignores `add_bos_token`."""
        starts: list[int] = []
        for step in steps(self.content.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                for part in step["single"]:
                    if "SpecialToken" not in part:
                        break
                    starts += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            elif step["type"] in ("BertProcessing", "RobertaProcessing"):
                starts.append(step["cls"][1])
        return tuple(starts)

    def _template(self, config: Mapping[str, Any], variables: Mapping[str, str]) -> ChatTemplate | None:
        source = self.files.get(TEMPLATE, config.get("chat_template"))
        where = self._where[TEMPLATE] if TEMPLATE in self.files else f"{self._where[CONFIG]}: field 'chat_template'"
        if isinstance(source, Mapping):
            source = [{"name": name, "template": template} for name, template in source.items()]
        if isinstance(source, list):
            if not all(
                isinstance(e, Mapping) and {type(e.get("name")), type(e.get("template"))} == {str} for e in source
            ):
                raise UserError(f"{where}: expected a template or a list of them with 'name' and 'template'")
            return ChatTemplate.named(source, variables, where=where)
        if not isinstance(source, str | None):
            raise UserError(f"{where}: expected a template, a list of them, or null, got {source!r:.100}")
        return ChatTemplate(source, variables, where=where) if source and source.strip() else None

    def _choose_encoder(self) -> RankEncoder | PackageEncoder:
        """Chooses tiktoken if it is exact, and sets `backend`."""
        # Dropout of merges, a setting for the training of some models, would give a text other ids each time.
        model = {name: value for name, value in self.content["model"].items() if name not in SAMPLING}
        added = [entry._asdict() for entry in self.added]
        content = {**self.content, "model": model, "added_tokens": added}
        package = functools.cache(lambda: PackageEncoder(content, self._where[TOKENIZER]))
        normalizer = self.content.get("normalizer")
        pattern = pattern_of(self.content.get("pre_tokenizer"))
        odd = any(a.single_word or a.lstrip or a.rstrip for a in self.added if not a.special)
        if pattern is not None and not odd and (normalizer is None or normalizer.get("type") == "NFC"):
            table = table_of(model, self.special_ids | self._never)
            if table is not None:
                self.backend = "tiktoken"
                return RankEncoder(pattern, table, self.added, composes=normalizer is not None, package=package)
        return package()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceTokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({self.name!r}, vocab_size={self.vocab_size}, backend={self.backend!r})"


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    vocab = content["model"]["vocab"]
    # Unigram lists [token, score]; the index is the id.
    return dict(vocab) if isinstance(vocab, dict) else {token: id for id, (token, _) in enumerate(vocab)}
