"""Tokenizers: byte-pair encodings in tiktoken, tokenizers of published models, chat templates."""
