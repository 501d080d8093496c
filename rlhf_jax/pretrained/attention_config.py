"""Rotary positions and sliding windows in a config.json.

Both the older and the newer keys of transformers are read, and both are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.config_fields import Fields

# Dynamic scaling only changes positions past max_position_embeddings, which is the longest context here.
ROPE_TYPES = {"default": "none", "dynamic": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
SLIDING, FULL = "sliding_attention", "full_attention"


def rope_of(
    fields: Fields,
    context: int,
    *,
    base_key: str = "rope_theta",
    share_key: str = "partial_rotary_factor",
    share: float | None = None,
) -> dict[str, Any]:
    """Read rope_base, rope_scaling and rotary_fraction, from the keys of transformers 5 or of older files.

    Args:
      fields: of config.json.
      context: tokens, the default of original_max_position_embeddings.
      base_key: key of the base in older files.
      share_key: key of the fraction of a head that is rotated, in older files.
      share: default of that fraction; None for families that rotate the whole head.

    Returns:
      Arguments of ModelConfig.

    Raises:
      UserError: for a scaling or a fraction that is not supported.
    """
    new, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")

    def number(name: str, default: float) -> float:
        return new.number(name, old.number(name, default))

    fraction = number("partial_rotary_factor", fields.number(share_key, 1.0 if share is None else share))
    if share is None and fraction != 1.0:
        raise UserError(
            f"{fields.where}: field {share_key!r}: expected 1.0, the only value of this family, got {fraction}"
        )
    return {
        "rope_base": number("rope_theta", fields.number(base_key, 10_000.0)),
        "rope_scaling": scaling_of(new, old, context),
        "rotary_fraction": fraction,
    }


def scaling_of(new: Fields, old: Fields, context: int) -> RopeScaling:
    """Read the RoPE scaling from `rope_parameters` or the older `rope_scaling`.

    Raises:
      UserError: if both are present and differ.
    """
    if not old.values:
        return _scaling(new, context)
    scaling = _scaling(old, context)
    if new.values and _scaling(new, context) != scaling:
        raise UserError(f"{old.where}: expected the scaling of rope_parameters, got another; remove one of the two")
    return scaling


def _scaling(rope: Fields, context: int) -> RopeScaling:
    kind = rope.word("rope_type" if "rope_type" in rope else "type", ROPE_TYPES, "default")
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    original = rope.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeScaling("llama3", rope.number("factor"), original, low, high)
    factor = rope.number("factor", context / original)
    attention = rope.number("attention_factor") if "attention_factor" in rope else None
    mscale, all_dims = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if attention is None and mscale and all_dims:
        stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
        attention = (mscale * stretch + 1.0) / (all_dims * stretch + 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=attention,
    )


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """The keys that `rope_of` reads, except rotary_fraction: the older ones, which every reader has, and the newer."""
    scaling = model.rope_scaling
    written: dict[str, Any] = {}
    if scaling.kind != "none":
        written = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    return {
        "rope_theta": model.rope_base,
        "rope_scaling": written or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | written,
    }


def windows_of(
    fields: Fields, layers: int, slides: Callable[[int], bool], *, there: bool = True, typed: bool = True
) -> tuple[int, ...]:
    """The attention window of each layer in tokens, from `layer_types` or else from the family's rule.

    Args:
      fields: of config.json.
      layers: number of layers.
      slides: the family's rule: True for a layer with the window.
      there: False if another key disables the window in all layers.
      typed: False if the family has no `layer_types`; they are accepted if they agree with its rule.

    Returns:
      One window per layer, 0 for full attention; () if all layers have full attention.

    Raises:
      UserError: for `layer_types` that contradict the other keys.
    """
    window = fields.integer("sliding_window", 4096, null=0) if there else 0
    sliding = [bool(window) and slides(layer) for layer in range(layers)]
    if "layer_types" in fields:
        types = fields.values["layer_types"]
        if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
            raise fields.wrong("layer_types", f"{layers} of {SLIDING} or {FULL}")
        named = [kind == SLIDING for kind in types]
        if any(named) and not window:
            raise fields.wrong("layer_types", f"{FULL} only, since the other keys disable the window")
        if named != sliding and not typed:
            raise fields.wrong("layer_types", f"{SLIDING if window else FULL} only (this family has one kind of layer)")
        sliding = named
    return tuple(window if slide else 0 for slide in sliding) if any(sliding) else ()


def window_config(model: ModelConfig) -> dict[str, Any]:
    """The keys sliding_window (None without a window) and layer_types; of several window sizes, the largest."""
    window = max(model.windows, default=0)
    types = [SLIDING if model.window(layer) else FULL for layer in range(model.layers)]
    return {"sliding_window": window if window else None, "layer_types": types}
