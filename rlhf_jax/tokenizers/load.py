"""Loading of the tokenizers of run folders."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.protocol import FORMAT, FORMAT_VERSION, TextTokenizer, one_line


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Loads a tokenizer of either kind that `save` wrote.

    Raises:
      UserError: naming the file and the problem.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable tokenizer file: {one_line(error)}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(f"{path}: expected the tokenizer.json of a run folder, got another file")
    if saved.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format_version: expected {FORMAT_VERSION}, got {saved.get('format_version')!r}")
    if saved.get("kind") == "huggingface":
        # Imported here: only models from Hugging Face need its packages.
        from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.from_saved(saved, path)
    try:
        tokens = {int(id): base64.b64decode(token, validate=True) for id, token in saved["tokens"].items()}
        tokenizer = Tokenizer(saved["name"], saved["pattern"], {token: id for id, token in tokens.items()})
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error) as error:
        raise UserError(f"{path}: damaged tokenizer file: {type(error).__name__}: {one_line(error)}") from None
    if tokenizer.fingerprint != saved.get("fingerprint"):
        raise UserError(f"{path}: damaged tokenizer file: its content does not match its fingerprint")
    return tokenizer
