"""What a config.json says in our terms, by hand-written pairs of both; what it must not say unnoticed."""

import dataclasses
import math
from typing import Any

import pytest

from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.config_fields import Fields
from rlhf_jax.pretrained.families import FAMILIES, family_of
from tests.cases import case

pytestmark = pytest.mark.pretrained

# The sizes that every config.json has, and as ModelConfig calls them.
SIZES = {
    "vocab_size": 43,
    "max_position_embeddings": 48,
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "intermediate_size": 80,
}
OURS: dict[str, Any] = {"vocab_size": 43, "context": 48, "width": 1024, "layers": 3, "heads": 64, "ffn_width": 80}
GPT2 = {"vocab_size": 43, "n_positions": 48, "n_embd": 1024, "n_layer": 3, "n_head": 64}
GEMMA: dict[str, Any] = {
    "kv_heads": 4,
    "head_width": 256,
    "norm_epsilon": 1e-6,
    "norm_offset": True,
    "post_norms": True,
    "activation": "geglu",
    "query_scale": 1 / 16,
    "embedding_scale": 32.0,
    "qkv_bias": False,
    "ffn_bias": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


def read(model_type: str, **changes: Any) -> ModelConfig:
    config = (GPT2 if model_type == "gpt2" else SIZES) | changes
    return FAMILIES[model_type].read(Fields(config, "config.json"))


DEFAULTS = [
    ("llama", {"head_width": 16, "kv_heads": 64, "norm_epsilon": 1e-6, "qkv_bias": False}),
    ("mistral", {"head_width": 16, "kv_heads": 8, "norm_epsilon": 1e-6, "windows": (4096,) * 3, "qkv_bias": False}),
    ("qwen2", {"head_width": 16, "kv_heads": 32, "norm_epsilon": 1e-6, "qkv_bias": True}),
    ("qwen3", {"head_width": 128, "kv_heads": 32, "norm_epsilon": 1e-6, "qkv_bias": False, "qk_norm": True}),
    (
        "gemma2",
        GEMMA | {"windows": (4096, 0, 4096), "attention_softcap": 50.0, "logit_softcap": 30.0, "tied": True},
    ),
    (
        "gemma3_text",
        GEMMA | {"windows": (4096,) * 3, "rope_base": 1e6, "rope_local_base": 1e4, "qk_norm": True, "tied": True},
    ),
    (
        "stablelm",
        {"kv_heads": 32, "norm": "layer", "rotary_fraction": 0.25, "qkv_bias": False},
    ),
    (
        "gpt_neox",
        {
            "kv_heads": 64,
            "norm": "layer",
            "rotary_fraction": 0.25,
            "residual": "parallel",
            "activation": "gelu_exact",
            "bias": True,
            "qkv_bias": True,
            "ffn_bias": True,
        },
    ),
]


def test_missing_keys_are_transformers_defaults() -> None:
    for row in DEFAULTS:
        with case(row) as (model_type, wanted):
            assert read(model_type) == ModelConfig(**{**OURS, "tied": False, "ffn_bias": False, **wanted})


def test_missing_keys_are_gpt2s_defaults() -> None:
    assert read("gpt2") == ModelConfig.gpt2(**OURS | {"ffn_width": 4096}, tied=True, norm_epsilon=1e-5)


OLDER_AND_NEWER = [
    (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9}},
        {
            "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9},
        },
    ),
    (
        "gpt_neox",
        {"rotary_emb_base": 500, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    (
        "gpt_neox",
        {"rotary_emb_base": 500, "rotary_pct": 0.5},
        {"rotary_pct": 0.5, "rope_parameters": {"rope_theta": 500.0}},
    ),
    (
        "stablelm",
        {"rope_theta": 500, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    (
        "gemma3_text",
        {"rope_theta": 1e3, "rope_local_base_freq": 50, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50},
            }
        },
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
]


def test_older_files_say_the_same() -> None:
    for row in OLDER_AND_NEWER:
        with case(row) as (model_type, older, newer):
            assert read(model_type, **older) == read(model_type, **newer)
            assert read(model_type, **older) != read(model_type)


WITHOUT_EFFECT = [
    ("llama", {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rope_parameters": None}),
    ("llama", {"pretraining_tp": 2, "torch_dtype": "float16", "dtype": "bfloat16", "sliding_window": 4}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),  # stretches past the context alone
    ("mistral", {"layer_types": ["sliding_attention"] * 3, "attention_bias": True}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}),
    ("gemma2", {"hidden_act": "gelu"}),
    ("gpt2", {"n_ctx": 7, "n_inner": None, "reorder_and_upcast_attn": True}),
]


def test_keys_that_say_nothing_change_nothing() -> None:
    for row in WITHOUT_EFFECT:
        with case(row) as (model_type, changes):
            assert read(model_type, **changes) == read(model_type)


def test_null_is_no_missing_key() -> None:
    assert read("mistral", sliding_window=None).windows == ()
    assert read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).attention_softcap == 0.0
    assert read("gemma2", final_logit_softcapping=None).logit_softcap == 0.0


def test_yarn_with_the_factors_of_deepseek() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
    both = read("llama", rope_scaling=scaling | {"mscale": 1.0, "mscale_all_dim": 0.5}).rope_scaling
    assert both.amplitude == pytest.approx((0.1 * 1.3862944 + 1) / (0.05 * 1.3862944 + 1), rel=1e-6)
    zero = read("llama", rope_scaling=scaling | {"mscale": 1.0, "mscale_all_dim": 0.0}).rope_scaling
    assert zero == RopeScaling("yarn", 4.0, 12)
    # Without its factor: how much longer the context is than the trained one.
    assert read("llama", rope_scaling=scaling | {"factor": None}).rope_scaling.factor == 4.0


REFUSED = [
    ("llama", {"hidden_act": "relu"}, "hidden_act"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: field 'rope_type'"),
    ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling: field 'type'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor': expected a number, got nothing"),
    ("llama", {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling"),
    (
        "llama",
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5}},
        "rope_parameters, got another; remove one",
    ),
    ("llama", {"rope_theta": float("nan")}, "rope_theta"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers': expected a whole number, got nothing"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"vocab_size": True}, "vocab_size"),
    ("mistral", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", ["sliding_attention"], "full_attention"]}, "layer_types"),
    ("qwen2", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "sliding_attention"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
]


def test_what_would_change_the_maths_is_refused() -> None:
    for row in REFUSED:
        with case(row) as (model_type, changes, named):
            with pytest.raises(UserError) as caught:
                read(model_type, **changes)
            assert str(caught.value).startswith("config.json: ") and named in str(caught.value)
            assert "\n" not in str(caught.value)


OLDER_ROPE = {"rope_theta", "rope_scaling", "rope_local_base_freq"}
OLDER_ROPE |= {"partial_rotary_factor", "rotary_pct", "rotary_emb_base"}
OWN = {
    "llama": ModelConfig(heads=8, kv_heads=2, tied=False),
    "llama_biases": ModelConfig(bias=True, rope_scaling=RopeScaling("linear", 2.0, original_context=3)),
    "qwen2": ModelConfig(qkv_bias=True, windows=(0, 0, 7, 7), head_width=10, vocab_size=1001, vocab_multiple=8),
    "qwen3": ModelConfig(qk_norm=True, windows=(7, 0, 7, 0), dropout=0.1, dtype="bfloat16", remat="full"),
    "mistral": ModelConfig(heads=3, head_width=6),  # transformers' Llama wants a width divisible by the heads
    "mistral_window": ModelConfig(windows=(7, 7, 7, 7)),
    "gpt2": ModelConfig.gpt2(activation="gelu_exact", rope_base=1.0, windows=(0, 0, 0, 0)),
    "gpt_neox": ModelConfig(
        norm="layer", residual="parallel", activation="gelu", bias=True, rotary_fraction=0.5, rope_base=500.0
    ),
    "stablelm": ModelConfig(norm="layer", residual="parallel_shared", rotary_fraction=0.25, qkv_bias=True),
    "gemma2": ModelConfig(
        norm_offset=True,
        post_norms=True,
        activation="geglu",
        embedding_scale=128**0.5,
        query_scale=1 / math.sqrt(28),  # its last bit is not that of 28**-0.5
        logit_softcap=30.0,
    ),
    "gemma3_text": ModelConfig(
        norm_offset=True,
        post_norms=True,
        activation="geglu",
        embedding_scale=128**0.5,
        qk_norm=True,
        windows=(7, 7, 0, 7),
        rope_local_base=50.0,
    ),
}


OWN["gemma3_text_one_base"] = dataclasses.replace(OWN["gemma3_text"], rope_local_base=None)


def test_a_model_of_our_own_finds_the_family_that_has_its_parts() -> None:
    for name in OWN:
        with case(name):
            model_type, config = family_of(OWN[name])
            assert name.startswith(model_type)
            found = FAMILIES[model_type].read(Fields(config, "config.json"))
            # Written out, since what a part is by default is a family's own matter.
            for part in ("head_size", "key_heads", "hidden_width", "vocab_rows", "gated", "rotary_width"):
                assert getattr(found, part) == getattr(OWN[name], part), part
            for part in (
                "norm",
                "norm_epsilon",
                "residual",
                "activation",
                "tied",
                "bias",
                "qk_norm",
                "embedding_scale",
            ):
                assert getattr(found, part) == getattr(OWN[name], part), part
            assert [found.window(i) for i in range(4)] == [OWN[name].window(i) for i in range(4)]
            # Old readers and new ones find the whole of the rotation in keys of their own.
            for others in ({"rope_parameters"}, OLDER_ROPE):
                half = {name: value for name, value in config.items() if name not in others}
                assert FAMILIES[model_type].read(Fields(half, "config.json")) == found


def test_gemma_has_a_window_size_even_if_no_layer_has_the_window() -> None:
    # transformers makes the mask of a window for it in any case, and wants its size.
    config = family_of(OWN["gemma2"])[1]
    assert (config["sliding_window"], set(config["layer_types"])) == (256, {"full_attention"})


NO_FAMILY = [
    (ModelConfig(rotary_fraction=0.5), "rotary_fraction=0.5"),
    (ModelConfig(norm="layer", qk_norm=True), "norm=layer, qk_norm=True"),
    (ModelConfig(post_norms=True), "post_norms=True"),
    (ModelConfig(windows=(7, 7, 7, 8)), "windows=(7, 7, 7, 8)"),
    (ModelConfig(activation="gelu_exact"), "activation=gelu_exact"),
]


def test_parts_that_no_family_has_together_are_named() -> None:
    for row in NO_FAMILY:
        with case(row) as (model, named):
            with pytest.raises(UserError, match="no published family") as caught:
                family_of(model)
            assert named in str(caught.value)
