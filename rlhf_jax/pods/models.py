"""Model configurations for planning: a preset, a config.json, or a Hugging Face folder. Weights are never read."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_jax.config import ModelConfig, from_plain
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.config_fields import Fields
from rlhf_jax.pretrained.families import FAMILIES

# Published shapes. Sources: config.json of meta-llama/Meta-Llama-3-8B and -70B, openai-community/gpt2,
# HuggingFaceTB/SmolLM2-135M.
PRESETS = {
    "llama3-8b": ModelConfig(
        vocab_size=128256,
        context=8192,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        ffn_width=14336,
        rope_base=500_000.0,
        tied=False,
    ),
    "llama3-70b": ModelConfig(
        vocab_size=128256,
        context=8192,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        ffn_width=28672,
        rope_base=500_000.0,
        tied=False,
    ),
    "gpt2": ModelConfig.gpt2(vocab_size=50257, context=1024, width=768, layers=12, heads=12),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        context=8192,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        ffn_width=1536,
        rope_base=100_000.0,
    ),
}


def read_model(text: str) -> ModelConfig:
    """Read a preset, FILE.json (this library's or Hugging Face's), hf:FOLDER, or a run's folder.

    Raises:
      UserError: for anything else.
    """
    if text in PRESETS:
        return PRESETS[text]
    kind, colon, rest = text.partition(":")
    path = Path(rest if colon and kind == "hf" else text)
    file = path / "config.json" if path.is_dir() or (colon and kind == "hf") else path
    if not file.exists():
        raise UserError(f"model: expected one of {', '.join(PRESETS)}, a config.json or hf:FOLDER, got {text!r}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {file}: unreadable: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"model: {file}: expected an object, got {type(values).__name__}")
    if "model_type" in values:
        if values["model_type"] not in FAMILIES:
            raise UserError(
                f"model: {file}: field 'model_type': expected one of {', '.join(FAMILIES)}, "
                f"got {values['model_type']!r}"
            )
        return FAMILIES[values["model_type"]].read(Fields(values, str(file)))
    # A run's config.json has the model under its own key, next to the run's settings.
    inner = values["model"] if isinstance(values.get("model"), dict) else values
    return from_plain(ModelConfig, inner, where=str(file))
