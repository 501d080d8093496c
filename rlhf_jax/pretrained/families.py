"""Published model families: conversion between their config.json and ModelConfig, in both directions.

Names and defaults are those of transformers 5 and of the older files that it still reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.attention_config import rope_config, rope_of, scaling_of, window_config, windows_of
from rlhf_jax.pretrained.config_fields import Fields

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
UNGATED = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_new", "gelu_exact": "gelu"}
# Fields of ModelConfig about how a model is run, which no published file holds.
HOW = {"dropout", "dtype", "scan_layers", "remat", "head_chunk"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
      architecture: transformers' class of the language model.
      classifier: transformers' class of the sequence classifier, which is a reward model here.
      prefix: of the base model's tensor names.
      read: config.json -> ModelConfig.
      write: its inverse, for a model that has only parts of this family and whose defaults are written out;
        `family_of` checks both.
    """

    architecture: str
    classifier: str
    prefix: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


def family_of(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The first family that can represent a model of this library.

    Returns:
      (model_type, config.json).

    Raises:
      UserError: if no family has all of the model's parts.
    """
    wanted = _resolved(model)
    for model_type, family in FAMILIES.items():
        try:
            config = {"model_type": model_type, **family.write(wanted)}
            read = family.read(Fields(config, model_type))
        except UserError:
            continue  # the family cannot express a part of the model
        if _resolved(read) == wanted:
            return model_type, config
    sizes = {"vocab_size", "context", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "query_scale"}
    defaults, own = dataclasses.asdict(_resolved(ModelConfig())), dataclasses.asdict(wanted)
    parts = ", ".join(f"{name}={own[name]}" for name in own if name not in sizes and own[name] != defaults[name])
    raise UserError(f"no published family combines these parts of the model: {parts}")


def _resolved(model: ModelConfig) -> ModelConfig:
    """The same model with every default written out, and without the fields that no published file holds."""
    windowed, rotary, scaling = any(model.windows), model.positions == "rotary", model.rope_scaling
    if scaling.kind in ("none", "linear"):
        scaling = RopeScaling("linear", scaling.factor) if scaling.kind == "linear" else RopeScaling()
    local = model.rope_local_base
    if windowed and local is None and scaling.kind == "none":
        local = model.rope_base
    scale = model.head_size**-0.5 if model.query_scale is None else model.query_scale
    as_usual: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(model) if field.name in HOW}
    return dataclasses.replace(
        model,
        vocab_size=model.vocab_rows,
        vocab_multiple=1,
        embedding_rows=None,
        kv_heads=model.key_heads,
        head_width=model.head_size,
        ffn_width=model.hidden_width,
        rope_base=model.rope_base if rotary else 10_000.0,
        rope_scaling=scaling if rotary else RopeScaling(),
        rotary_fraction=model.rotary_fraction if rotary else 1.0,
        rope_local_base=local if windowed and rotary else None,
        windows=model.windows if windowed else (),
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
        ffn_bias=model.bias if model.ffn_bias is None else model.ffn_bias,
        query_scale=round(scale, 12),  # files hold its inverse square
        **as_usual,
    )


def _sizes(fields: Fields, kv_heads: int | None = None) -> dict[str, Any]:
    """Sizes under the keys that Llama and its relatives share.

    Args:
      fields: of config.json.
      kv_heads: default for a missing num_key_value_heads; the number of heads if None.
    """
    heads = fields.integer("num_attention_heads")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "context": fields.integer("max_position_embeddings"),
        "width": fields.integer("hidden_size"),
        "layers": fields.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads if kv_heads is None else kv_heads, null=heads),
        "ffn_width": fields.integer("intermediate_size"),
    }


def _size_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_width,
        "tie_word_embeddings": model.tied,
    }


def _rms_config(model: ModelConfig) -> dict[str, Any]:
    """Keys that the families with RMSNorm share, except Gemma."""
    return {
        **_size_config(model),
        **rope_config(model),
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": ACTIVATIONS[model.activation],
    }


def _head_width(fields: Fields, default: int | None = None) -> int:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return fields.integer("head_dim", width // heads if default is None else default)


def _even_heads(model: ModelConfig) -> None:
    """Raise UserError for a width that transformers' class rejects, whatever head_dim is."""
    if model.width % model.heads:
        raise UserError(f"width: expected a multiple of heads {model.heads}, got {model.width}")


def _read_llama(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **sizes,
        **rope_of(fields, sizes["context"]),
        head_width=_head_width(fields),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.word("hidden_act", GATED, "silu"),
        bias=attention_bias,
        qkv_bias=attention_bias,
        ffn_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    _even_heads(model)
    biases = {"attention_bias": model.bias, "mlp_bias": model.ffn_bias}
    return _rms_config(model) | biases | {"head_dim": model.head_width}


def _read_mistral(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, kv_heads=8)
    return ModelConfig(
        **sizes,
        **rope_of(fields, sizes["context"]),
        head_width=_head_width(fields),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.word("hidden_act", GATED, "silu"),
        windows=windows_of(fields, sizes["layers"], lambda layer: True, typed=False),
        qkv_bias=False,
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    window = window_config(model)["sliding_window"]
    return _rms_config(model) | {"head_dim": model.head_width, "sliding_window": window}


def _read_qwen2(fields: Fields) -> ModelConfig:
    return _read_qwen(fields, head_width=_head_width(fields), qkv_bias=True)


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return _read_qwen(fields, head_width=_head_width(fields, 128), qk_norm=True, bias=bias, qkv_bias=bias)


def _read_qwen(fields: Fields, **parts: Any) -> ModelConfig:
    sizes = _sizes(fields, kv_heads=32)
    first = fields.integer("max_window_layers", 28, least=0)
    there = fields.flag("use_sliding_window", False)
    return ModelConfig(
        **sizes,
        **rope_of(fields, sizes["context"]),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.word("hidden_act", GATED, "silu"),
        windows=windows_of(fields, sizes["layers"], lambda layer: layer >= first, there=there),
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
        **parts,
    )


def _write_qwen2(model: ModelConfig) -> dict[str, Any]:
    first = next((layer for layer, window in enumerate(model.windows) if window), model.layers)
    windows = window_config(model) | {"use_sliding_window": any(model.windows), "max_window_layers": first}
    # Published Qwen2 files have no head_dim.
    wide = {} if model.heads * model.head_size == model.width else {"head_dim": model.head_width}
    return _rms_config(model) | windows | wide


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(model) | {"head_dim": model.head_width, "attention_bias": model.bias}


def _read_gemma2(fields: Fields) -> ModelConfig:
    return _read_gemma(
        fields,
        **rope_of(fields, fields.integer("max_position_embeddings")),
        windows=windows_of(fields, fields.integer("num_hidden_layers"), lambda layer: layer % 2 == 0),
        attention_softcap=fields.number("attn_logit_softcapping", 50.0, null=0.0),
        logit_softcap=fields.number("final_logit_softcapping", 30.0, null=0.0),
    )


def _read_gemma3(fields: Fields) -> ModelConfig:
    context, every = fields.integer("max_position_embeddings"), fields.integer("sliding_window_pattern", 6)
    # Nested by layer type since transformers 5; before, scaling applied only to the layers without a window.
    rope, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")
    whole, local = rope.inner("full_attention"), rope.inner("sliding_attention")
    local.refuse("rope_type", unless="default")
    for part in (whole, local, old, fields):
        part.refuse("partial_rotary_factor", unless=1.0)
    return _read_gemma(
        fields,
        rope_base=whole.number("rope_theta", fields.number("rope_theta", 1_000_000.0)),
        rope_local_base=local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0)),
        rope_scaling=scaling_of(whole, old, context),
        windows=windows_of(fields, fields.integer("num_hidden_layers"), lambda layer: (layer + 1) % every != 0),
        qk_norm=True,
        attention_softcap=fields.number("attn_logit_softcapping", 0.0),
        logit_softcap=fields.number("final_logit_softcapping", 0.0),
    )


def _read_gemma(fields: Fields, **parts: Any) -> ModelConfig:
    fields.refuse("use_bidirectional_attention", unless=False)
    sizes = _sizes(fields, kv_heads=4)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **sizes,
        head_width=_head_width(fields, 256),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        norm_offset=True,
        post_norms=True,
        activation=fields.word("hidden_activation", GATED, "gelu_pytorch_tanh"),
        bias=bias,
        qkv_bias=bias,
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", True),
        query_scale=fields.integer("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=math.sqrt(sizes["width"]),
        **parts,
    )


def _write_gemma2(model: ModelConfig) -> dict[str, Any]:
    return _write_gemma(model) | rope_config(model)


def _write_gemma3(model: ModelConfig) -> dict[str, Any]:
    rope = rope_config(model)
    local_base = 10_000.0 if model.rope_local_base is None else model.rope_local_base
    local = {"rope_type": "default", "rope_theta": local_base}
    parameters = {"full_attention": rope["rope_parameters"], "sliding_attention": local}
    return _write_gemma(model) | rope | {"rope_local_base_freq": local_base, "rope_parameters": parameters}


def _write_gemma(model: ModelConfig) -> dict[str, Any]:
    _even_heads(model)
    windows = window_config(model)
    if windows["sliding_window"] is None:
        windows["sliding_window"] = model.context  # transformers requires a size, even if no layer has the window
    return {
        **_size_config(model),
        **windows,
        "head_dim": model.head_width,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_activation": ACTIVATIONS[model.activation],
        "attention_bias": model.bias,
        "query_pre_attn_scalar": model.head_size if model.query_scale is None else round(model.query_scale**-2),
        "attn_logit_softcapping": model.attention_softcap if model.attention_softcap else None,
        "final_logit_softcapping": model.logit_softcap if model.logit_softcap else None,
    }


def _read_gpt2(fields: Fields) -> ModelConfig:
    fields.refuse("scale_attn_weights", unless=True)
    fields.refuse("scale_attn_by_inverse_layer_idx", unless=False)
    fields.refuse("add_cross_attention", unless=False)
    width = fields.integer("n_embd")
    return ModelConfig.gpt2(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("n_positions"),
        width=width,
        layers=fields.integer("n_layer"),
        heads=fields.integer("n_head"),
        ffn_width=fields.integer("n_inner", 4 * width),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.word("activation_function", UNGATED, "gelu_new"),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.context,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn_width,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tied,
    }


def _read_neox(fields: Fields) -> ModelConfig:
    context, heads = fields.integer("max_position_embeddings"), fields.integer("num_attention_heads")
    attention_bias = fields.flag("attention_bias", True)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        context=context,
        width=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        ffn_width=fields.integer("intermediate_size"),
        **rope_of(fields, context, base_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        residual="parallel" if fields.flag("use_parallel_residual", True) else "sequential",
        activation=fields.word("hidden_act", UNGATED, "gelu"),
        bias=attention_bias,
        qkv_bias=attention_bias,
        ffn_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_neox(model: ModelConfig) -> dict[str, Any]:
    written = {
        **_size_config(model),
        **rope_config(model),
        "rotary_emb_base": model.rope_base,
        "rotary_pct": model.rotary_fraction,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel",
        "hidden_act": ACTIVATIONS[model.activation],
        "attention_bias": model.bias,
    }
    written["rope_parameters"]["partial_rotary_factor"] = model.rotary_fraction
    return {name: value for name, value in written.items() if name not in ("num_key_value_heads", "rope_theta")}


def _read_stablelm(fields: Fields) -> ModelConfig:
    fields.refuse("qk_layernorm", unless=False)
    sizes = _sizes(fields, kv_heads=32)
    return ModelConfig(
        **sizes,
        **rope_of(fields, sizes["context"], share=0.25),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        residual="parallel_shared" if fields.flag("use_parallel_residual", False) else "sequential",
        activation=fields.word("hidden_act", GATED, "silu"),
        qkv_bias=fields.flag("use_qkv_bias", False),
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_stablelm(model: ModelConfig) -> dict[str, Any]:
    written = {
        **_size_config(model),
        **rope_config(model),
        "partial_rotary_factor": model.rotary_fraction,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel_shared",
        "hidden_act": ACTIVATIONS[model.activation],
        "use_qkv_bias": model.qkv_bias,
    }
    written["rope_parameters"]["partial_rotary_factor"] = model.rotary_fraction
    return written


def _family(stem: str, prefix: str, read: Any, write: Any, text: str = "") -> Family:
    return Family(f"{stem}ForCausalLM", f"{stem}{text}ForSequenceClassification", prefix, read, write)


# By model_type. `family_of` tries them in this order for a model of this library.
FAMILIES: dict[str, Family] = {
    "llama": _family("Llama", "model.", _read_llama, _write_llama),
    "qwen2": _family("Qwen2", "model.", _read_qwen2, _write_qwen2),
    "qwen3": _family("Qwen3", "model.", _read_qwen3, _write_qwen3),
    "mistral": _family("Mistral", "model.", _read_mistral, _write_mistral),
    "gpt2": Family("GPT2LMHeadModel", "GPT2ForSequenceClassification", "transformer.", _read_gpt2, _write_gpt2),
    "gpt_neox": _family("GPTNeoX", "gpt_neox.", _read_neox, _write_neox),
    "stablelm": _family("StableLm", "model.", _read_stablelm, _write_stablelm),
    "gemma2": _family("Gemma2", "model.", _read_gemma2, _write_gemma2),
    "gemma3_text": _family("Gemma3", "model.", _read_gemma3, _write_gemma3, text="Text"),
}
