"""The published families of models: what their config.json says in our terms, and back.

Names and defaults are those of transformers 5 and of the older files that it still reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.model_config import ModelConfig
from rlhf_jax.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture, classifier: transformers' classes of the language model and of a model with one score.

    prefix: of the base model's tensors. read: config.json -> ModelConfig. write: its inverse, without what ModelConfig
    does not know.
    """

    architecture: str
    classifier: str
    prefix: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


class Fields:
    """The fields of a config.json, read with a clear error for what is missing or of another kind."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; a missing one is the default, or an error without one."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number")
        return value

    def number(self, name: str, default: float) -> float:
        """A number, with a default."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false, with a default."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def one_of(self, names: tuple[str, ...], choices: Mapping[str, str], default: str) -> str:
        """What a word under the first of the names that is there stands for."""
        for name in names:
            if name in self:
                if self.values[name] not in choices:
                    raise self.wrong(name, "one of " + ", ".join(choices))
                return choices[self.values[name]]
        return choices[default]

    def inner(self, name: str) -> Fields:
        """A nested object, empty if missing."""
        value = self.values.get(name)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def refuse(self, name: str, *, unless: Any) -> None:
        """Raises UserError for a setting that this library's transformer does not have."""
        if name in self and self.values[name] != unless:
            raise UserError(f"{self.where}: field {name!r}: found {self.values[name]!r}, only {unless!r} is supported")

    def wrong(self, name: str, wanted: str) -> UserError:
        found = repr(self.values[name]) if name in self else "nothing"
        return UserError(f"{self.where}: field {name!r}: found {found}, wanted {wanted}")


GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
UNGATED = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_new", "gelu_exact": "gelu"}


def scaling_of(rope: Fields, context: int) -> RopeScaling:
    """The stretching that `rope_parameters` or the older `rope_scaling` describes."""
    kind = rope.one_of(
        ("rope_type", "type"),
        # Dynamic scaling begins past max_position_embeddings, which is our context.
        {"default": "none", "dynamic": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"},
        "default",
    )
    if kind == "none":
        return RopeScaling()
    original = rope.integer("original_max_position_embeddings", context)
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor", math.nan))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.number("factor", math.nan),
            original,
            rope.number("low_freq_factor", 1.0),
            rope.number("high_freq_factor", 4.0),
        )
    factor = rope.number("factor", context / original)
    attention: float | None = rope.number("attention_factor", math.nan)
    if "attention_factor" not in rope:
        attention = None
        if "mscale" in rope and "mscale_all_dim" in rope:
            one, all_dim = (0.1 * rope.number(m, 1.0) * math.log(factor) + 1.0 for m in ("mscale", "mscale_all_dim"))
            attention = one / all_dim if factor > 1 else 1.0
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=attention,
    )


def rope_of(fields: Fields, context: int, fraction: float = 1.0, fraction_name: str = "partial_rotary_factor") -> dict:
    """rope_base, rope_scaling and rotary_fraction, from the keys of transformers 5 or of older files."""
    new = fields.inner("rope_parameters")
    if "rope_theta" in new:
        share = new.number("partial_rotary_factor", fraction)
        return {
            "rope_base": new.number("rope_theta", 0.0),
            "rope_scaling": scaling_of(new, context),
            "rotary_fraction": share,
        }
    return {
        "rope_base": fields.number("rope_theta", fields.number("rotary_emb_base", 10_000.0)),
        "rope_scaling": scaling_of(fields.inner("rope_scaling"), context),
        "rotary_fraction": fields.number(fraction_name, fraction),
    }


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of `rope_of`: the older ones, which every reader knows, and those of transformers 5."""
    scaling, written = model.rope_scaling, {}
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
    new = {"rope_type": "default", "rope_theta": model.rope_base} | written
    if model.rotary_fraction != 1.0:
        new["partial_rotary_factor"] = model.rotary_fraction
    return {"rope_theta": model.rope_base, "rope_scaling": written or None, "rope_parameters": new}


def windows_of(fields: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer, by `layer_types` or by the family's own rule."""
    if "sliding_window" not in fields:
        return ()
    window, types = fields.integer("sliding_window"), fields.values.get("layer_types")
    if types is not None:
        known = {"sliding_attention", "full_attention"}
        if not isinstance(types, list) or len(types) != layers or not set(types) <= known:
            raise fields.wrong("layer_types", f"{layers} of {' or '.join(sorted(known))}")
        sliding = [kind == "sliding_attention" for kind in types]
    else:
        sliding = [slides(layer) for layer in range(layers)]
    return tuple(window if slide else 0 for slide in sliding) if any(sliding) else ()


def window_config(model: ModelConfig) -> dict[str, Any]:
    """sliding_window and layer_types."""
    sizes = {window for window in model.windows if window}
    if len(sizes) > 1:
        raise UserError(f"windows: found sizes {sorted(sizes)}, the families of Hugging Face have one")
    types = ["sliding_attention" if model.window(layer) else "full_attention" for layer in range(model.layers)]
    return {"sliding_window": sizes.pop() if sizes else None, "layer_types": types}


def _shape(fields: Fields) -> dict[str, Any]:
    """What Llama's relatives call alike."""
    heads = fields.integer("num_attention_heads")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "context": fields.integer("max_position_embeddings"),
        "width": fields.integer("hidden_size"),
        "layers": fields.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "ffn_width": fields.integer("intermediate_size"),
    }


def _shape_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_rows,
        "max_position_embeddings": model.context,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "intermediate_size": model.hidden_width,
        "tie_word_embeddings": model.tied,
    }


def _head_width(fields: Fields, default: int | None = None) -> int:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return fields.integer("head_dim", width // heads if default is None else default)


def _gated(fields: Fields, default: str = "silu") -> Any:
    return fields.one_of(("hidden_activation", "hidden_act"), GATED, default)


def _read_llama(fields: Fields) -> ModelConfig:
    shape = _shape(fields)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **shape,
        **rope_of(fields, shape["context"]),
        head_width=_head_width(fields),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=_gated(fields),
        bias=attention_bias,
        qkv_bias=attention_bias,
        ffn_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shape_config(model),
        **rope_config(model),
        "head_dim": model.head_size,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": ACTIVATIONS[model.activation],
        "attention_bias": model.bias,
        "mlp_bias": bool(model.ffn_bias),
    }


def _read_mistral(fields: Fields) -> ModelConfig:
    shape = _shape(fields)
    # A config without the key is of the first release, whose window is transformers' default.
    windowed = fields if "sliding_window" in fields.values else Fields({"sliding_window": 4096}, fields.where)
    return ModelConfig(
        **shape,
        **rope_of(fields, shape["context"]),
        head_width=_head_width(fields),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=_gated(fields),
        windows=windows_of(windowed, shape["layers"], lambda layer: True),
        qkv_bias=False,
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    written = _write_llama(model) | {"sliding_window": window_config(model)["sliding_window"]}
    return {name: value for name, value in written.items() if name not in ("attention_bias", "mlp_bias")}


def _read_qwen2(fields: Fields) -> ModelConfig:
    return dataclasses.replace(
        _read_qwen(fields),
        head_width=_head_width(Fields({**fields.values, "head_dim": None}, fields.where)),
        qkv_bias=True,
    )


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        _read_qwen(fields), head_width=_head_width(fields, 128), qk_norm=True, bias=bias, qkv_bias=bias
    )


def _read_qwen(fields: Fields) -> ModelConfig:
    shape = _shape(fields)
    windows: tuple[int, ...] = ()
    if fields.flag("use_sliding_window", False):
        first = fields.integer("max_window_layers", 28)
        windows = windows_of(fields, shape["layers"], lambda layer: layer >= first)
    return ModelConfig(
        **shape,
        **rope_of(fields, shape["context"]),
        # Families whose heads have another width say so; this only has to be a possible one.
        head_width=2,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=_gated(fields),
        windows=windows,
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_qwen2(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shape_config(model),
        **rope_config(model),
        **window_config(model),
        "use_sliding_window": any(model.windows),
        "max_window_layers": next((i for i, window in enumerate(model.windows) if window), model.layers),
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": ACTIVATIONS[model.activation],
    }


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(model) | {"head_dim": model.head_size, "attention_bias": model.bias}


def _read_gemma2(fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    context = fields.integer("max_position_embeddings")
    return dataclasses.replace(
        _read_gemma(fields),
        **rope_of(fields, context),
        windows=windows_of(fields, layers, lambda layer: layer % 2 == 0),
        attention_softcap=_softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(fields, "final_logit_softcapping", 30.0),
    )


def _read_gemma3(fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    context = fields.integer("max_position_embeddings")
    every = fields.integer("sliding_window_pattern", 6)
    rope = fields.inner("rope_parameters")
    # Nested by the kind of layer since transformers 5.
    whole, local = rope.inner("full_attention"), rope.inner("sliding_attention")
    old = fields.inner("rope_scaling")
    if scaling_of(local, context).kind != "none":
        raise local.wrong("rope_type", "'default'")
    return dataclasses.replace(
        _read_gemma(fields),
        rope_base=whole.number("rope_theta", fields.number("rope_theta", 1_000_000.0)),
        rope_local_base=local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0)),
        rope_scaling=scaling_of(whole if "rope_type" in whole else old, context),
        windows=windows_of(fields, layers, lambda layer: (layer + 1) % every != 0),
        qk_norm=True,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", 0.0),
        logit_softcap=_softcap(fields, "final_logit_softcapping", 0.0),
    )


def _softcap(fields: Fields, name: str, default: float) -> float:
    """A soft cap; null says that there is none, a missing key that it is the family's."""
    return fields.number(name, default if name not in fields.values else 0.0)


def _read_gemma(fields: Fields) -> ModelConfig:
    fields.refuse("use_bidirectional_attention", unless=False)
    shape = _shape(fields)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **shape,
        head_width=_head_width(fields, 256),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        norm_offset=True,
        post_norms=True,
        activation=_gated(fields, "gelu_pytorch_tanh"),
        bias=bias,
        qkv_bias=bias,
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", True),
        query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=math.sqrt(shape["width"]),
    )


def _write_gemma2(model: ModelConfig) -> dict[str, Any]:
    return _write_gemma(model) | rope_config(model)


def _write_gemma3(model: ModelConfig) -> dict[str, Any]:
    rope = rope_config(model)
    local = {"rope_type": "default", "rope_theta": model.rope_local_base}
    return _write_gemma(model) | {
        "rope_theta": model.rope_base,
        "rope_local_base_freq": model.rope_local_base,
        "rope_scaling": rope["rope_scaling"],
        "rope_parameters": {"full_attention": rope["rope_parameters"], "sliding_attention": local},
    }


def _write_gemma(model: ModelConfig) -> dict[str, Any]:
    scale = model.head_size**-0.5 if model.query_scale is None else model.query_scale
    return {
        **_shape_config(model),
        **window_config(model),
        "head_dim": model.head_size,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_activation": ACTIVATIONS[model.activation],
        "attention_bias": model.bias,
        "query_pre_attn_scalar": round(scale**-2, 6),
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logit_softcap or None,
    }


def _read_gpt2(fields: Fields) -> ModelConfig:
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        fields.refuse(name, unless=usual)
    width = fields.integer("n_embd")
    return ModelConfig.gpt2(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("n_positions"),
        width=width,
        layers=fields.integer("n_layer"),
        heads=fields.integer("n_head"),
        ffn_width=fields.integer("n_inner", 4 * width),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.one_of(("activation_function",), UNGATED, "gelu_new"),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_rows,
        "n_positions": model.context,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.hidden_width,
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
        **rope_of(fields, context, 0.25, "rotary_pct"),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        residual="parallel" if fields.flag("use_parallel_residual", True) else "sequential",
        activation=fields.one_of(("hidden_act",), UNGATED, "gelu"),  # type: ignore[arg-type]
        bias=attention_bias,
        qkv_bias=attention_bias,
        ffn_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_neox(model: ModelConfig) -> dict[str, Any]:
    rope = rope_config(model)
    rope["rope_parameters"]["partial_rotary_factor"] = model.rotary_fraction
    return {
        **{name: value for name, value in _shape_config(model).items() if name != "num_key_value_heads"},
        "rotary_emb_base": model.rope_base,
        "rotary_pct": model.rotary_fraction,
        "rope_scaling": rope["rope_scaling"],
        "rope_parameters": rope["rope_parameters"],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel",
        "hidden_act": ACTIVATIONS[model.activation],
        "attention_bias": model.bias,
    }


def _read_stablelm(fields: Fields) -> ModelConfig:
    fields.refuse("qk_layernorm", unless=False)
    shape = _shape(fields)
    return ModelConfig(
        **shape,
        **rope_of(fields, shape["context"], 0.25),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        residual="parallel_shared" if fields.flag("use_parallel_residual", False) else "sequential",
        activation=_gated(fields),
        qkv_bias=fields.flag("use_qkv_bias", False),
        ffn_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_stablelm(model: ModelConfig) -> dict[str, Any]:
    rope = rope_config(model)
    rope["rope_parameters"]["partial_rotary_factor"] = model.rotary_fraction
    return {
        **_shape_config(model),
        **rope,
        "partial_rotary_factor": model.rotary_fraction,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.residual == "parallel_shared",
        "hidden_act": ACTIVATIONS[model.activation],
        "use_qkv_bias": bool(model.qkv_bias),
    }


def _family(stem: str, prefix: str, read: Any, write: Any, text: str = "") -> Family:
    return Family(f"{stem}ForCausalLM", f"{stem}{text}ForSequenceClassification", prefix, read, write)


# By model_type. In the order in which a family is looked for that can hold a model of our own.
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
