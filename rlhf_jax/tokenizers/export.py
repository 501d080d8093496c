"""Export of a `Tokenizer` to the Hugging Face format: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.tokenizers.bpe import BYTES_PATTERN, Tokenizer
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.merges import merges_of, to_letters, to_oniguruma
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.tokenizers.published_files import TEMPLATE

NAMES = {"eos": "<|endoftext|>", "bos": "<|begin|>", "pad": "<|pad|>"}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of a tokenizer.json that gives the same ids in transformers, with bos at the start of a text.

    Raises:
      UserError: if the pattern may mean something else to Hugging Face's regex engine, or a token has the text of a
        special one.
    """
    ids = {tokenizer.token_bytes(id): id for id in range(tokenizer.eos_id)}
    ids.pop(b"", None)
    merges, all_made = merges_of(ids)
    special = {NAMES["eos"]: tokenizer.eos_id, NAMES["bos"]: tokenizer.bos_id, NAMES["pad"]: tokenizer.pad_id}
    vocab = {to_letters(token): id for token, id in ids.items()}
    taken = [name for name in special if name in vocab]
    if taken:
        raise UserError(
            f"tokenizer {tokenizer.name}: expected no token with the text of a special one, got {taken[0]!r}"
        )
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pre_tokenizer: dict[str, Any] = level
    # Without merges, any split gives the same ids.
    if tokenizer.pattern != BYTES_PATTERN or merges:
        pattern = to_oniguruma(tokenizer.pattern)
        if pattern is None:
            raise UserError(
                f"tokenizer {tokenizer.name}: expected a pattern that Hugging Face's regex engine reads as tiktoken's "
                f"does, got {tokenizer.pattern!r}"
            )
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, level]}
    bos = {"id": NAMES["bos"], "type_id": 0}
    texts = [{"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **_FLAGS} for name, id in special.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": bos}, texts[0]],
            "pair": [{"SpecialToken": bos}, *texts],
            "special_tokens": {NAMES["bos"]: {"id": NAMES["bos"], "ids": [tokenizer.bos_id], "tokens": [NAMES["bos"]]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken encodes a piece that is itself a token without merging.
            "ignore_merges": not all_made,
            "vocab": vocab | special,
            "merges": [[to_letters(left), to_letters(right)] for left, right in merges],
        },
    }


def to_hugging_face_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of the matching tokenizer_config.json."""
    ids = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": name for role, name in NAMES.items()},
        "added_tokens_decoder": {str(ids[role]): {"content": name, **_FLAGS} for role, name in NAMES.items()},
        "clean_up_tokenization_spaces": False,
    }


def as_hugging_face(tokenizer: TextTokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer as transformers would read it from the files that `write_folder` writes.

    Raises:
      UserError: as `to_hugging_face`.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer: expected a Tokenizer or a HuggingFaceTokenizer, got {type(tokenizer).__name__}")
    content, config = to_hugging_face(tokenizer), to_hugging_face_config(tokenizer)
    return HuggingFaceTokenizer.from_content(content, config, rows=tokenizer.vocab_size, name=tokenizer.name)


def write_folder(tokenizer: TextTokenizer, folder: str | Path, *, chat_template: str | None = None) -> None:
    """Writes a tokenizer of either kind in the files that transformers reads.

    Args:
      chat_template: source of a template for a tokenizer without one.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.write_folder(folder)
    elif isinstance(tokenizer, Tokenizer):
        content, config = to_hugging_face(tokenizer), to_hugging_face_config(tokenizer)
        files = {"tokenizer.json": content, "tokenizer_config.json": config}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, part in files.items():
            text = json.dumps(part, ensure_ascii=False, indent=2) + "\n"
            write_file(Path(folder) / name, text)
    else:
        raise TypeError(f"tokenizer: expected a Tokenizer or a HuggingFaceTokenizer, got {type(tokenizer).__name__}")
    if chat_template is not None:
        write_file(Path(folder) / TEMPLATE, chat_template)
