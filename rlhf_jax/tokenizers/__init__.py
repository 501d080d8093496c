"""Text to token ids and back: byte-pair encodings in tiktoken, tokenizers of published models, chat templates."""
