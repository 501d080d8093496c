"""What every tokenizer has, and the file that one is saved to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rlhf_jax.tokenizers.chat_template import ChatTemplate

FORMAT = "rlhf_jax tokenizer"
FORMAT_VERSION = 1
Token = bytes  # inside a tokenizer class, `bytes` is a constructor


class TextTokenizer(Protocol):
    """What `bpe.Tokenizer` and `huggingface.HuggingFaceTokenizer` have in common."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int:
        """Ids from 0 that may be sampled or encoded; pad_id may be one above them."""
        ...

    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int:
        """Neither eos, nor bos, nor in stop_ids."""
        ...

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Texts that a chat template may write for a special token; `encode` takes them as plain text."""
        ...

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before a text; may be empty."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response, eos first."""
        ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]: ...
    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that goes on after other text; `encode` may put a space before it, as SentencePiece does."""
        ...

    def encode_sections(self, sections: Sequence[str], stand_ins: Mapping[int, str]) -> list[list[int]]:
        """Ids of each section of one running text, tokenised apart, where a special token's text is that token.

        stand_ins: characters to put back once special tokens are found, as `str.translate` takes them.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_batch(self, rows: Iterable[Sequence[int]]) -> list[str]: ...
    def token_bytes(self, id: int) -> Token: ...
    def save(self, path: str | Path) -> None: ...


def write_saved(path: str | Path, tokenizer: TextTokenizer, content: Mapping[str, object]) -> None:
    """Writes the file that `load_tokenizer` reads. content: what the tokenizer is made of."""
    saved = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id},
        **content,
    }
    # A crash half-way must leave the old file or the new one.
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(saved, indent=0, ensure_ascii=True) + "\n", encoding="utf-8")
    partial.replace(path)


def one_line(error: BaseException) -> str:
    """The text of an error on one line, cut at 200 characters."""
    return " ".join(str(error).split())[:200]
