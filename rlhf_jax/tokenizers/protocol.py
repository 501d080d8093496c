"""Interface of the tokenizers, and the file format in which they are saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rlhf_jax.files import write_file
from rlhf_jax.tokenizers.chat_template import ChatTemplate

FORMAT = "rlhf_jax tokenizer"
FORMAT_VERSION = 1
Token = bytes  # inside a tokenizer class, `bytes` is a constructor


class TextTokenizer(Protocol):
    """Common interface of `bpe.Tokenizer` and `huggingface.HuggingFaceTokenizer`."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int:
        """Number of ids that may be sampled or encoded; pad_id may be one above them."""
        ...

    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int:
        """Id for padding; neither eos, nor bos, nor in stop_ids."""
        ...

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Texts of the special tokens that a chat template may write; `encode` treats them as plain text."""
        ...

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Ids at the start of every text; may be empty."""
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
        """Ids of text that continues other text; `encode` may add a leading space, as SentencePiece does."""
        ...

    def encode_sections(self, sections: Sequence[str], stand_ins: Mapping[int, str]) -> list[list[int]]:
        """Ids of each section of one text, tokenized separately; the text of a special token becomes that token.

        Args:
          stand_ins: characters to restore once special tokens are found, as for `str.translate`.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_batch(self, rows: Iterable[Sequence[int]]) -> list[str]: ...
    def token_bytes(self, id: int) -> Token: ...
    def lost(self, text: str) -> str:
        """The characters of a text that its ids do not hold, since the vocabulary has no token for them."""
        ...

    def save(self, path: str | Path) -> None: ...


def write_saved(path: str | Path, tokenizer: TextTokenizer, content: Mapping[str, object]) -> None:
    """Writes the file that `load_tokenizer` reads.

    Args:
      content: further fields, which define the tokenizer.
    """
    saved = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id},
        **content,
    }
    write_file(Path(path), json.dumps(saved, indent=0, ensure_ascii=True) + "\n")


def one_line(error: BaseException) -> str:
    """The text of an error on one line, truncated to 200 characters."""
    return " ".join(str(error).split())[:200]
