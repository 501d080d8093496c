"""GGUF files that gguf's writer makes here as llama.cpp's converter would, read back under Hugging Face's names."""

import dataclasses
import itertools
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from rlhf_jax.errors import UserError
from rlhf_jax.pretrained import gguf_file, gguf_reader, gguf_tokenizer
from rlhf_jax.pretrained.gguf_reader import packaged_gguf, read_gguf
from rlhf_jax.tokenizers.merges import PATTERNS, pattern_of
from tests.cases import case

pytestmark = pytest.mark.pretrained

Q = gguf.GGMLQuantizationType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm", "gpt2", "gptneox"]

# --- A small converter, after llama.cpp's -----------------------------------------------------------------------------


@dataclasses.dataclass
class Vocabulary:
    """What the tokenizer's metadata says; `settings` are keys after "tokenizer."."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def byte_alphabet() -> list[str]:
    """GPT-2's letter of each byte."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def byte_level(**settings: Any) -> Vocabulary:
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ a", "1 2", "12 3", "ä ¸"]
    tokens = ["<|end|>", *byte_alphabet(), *(merge.replace(" ", "") for merge in merges), "<tool> ", "[PAD266]"]
    types = [CONTROL, *[NORMAL] * 264, USER_DEFINED, UNUSED]
    named = {"ggml.pre": "gpt-2", "ggml.bos_token_id": 0, "ggml.eos_token_id": 0, "chat_template": "{{ messages }}"}
    return Vocabulary("gpt2", tokens, types, merges, settings=named | settings)


def sentencepiece(words: list[str], **settings: Any) -> Vocabulary:
    """<unk>, <s>, </s>, 256 bytes, the words with falling scores, their characters, one control token."""
    characters = sorted({character for word in words for character in word} - set(words))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *characters, "[INST]"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words + characters), CONTROL]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words) + len(characters))] + [0.0]
    named = {"ggml.pre": "default", "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0}
    return Vocabulary("llama", tokens, types, scores=scores, settings=named | settings)


def small_config(architecture: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """Some of a config.json, by the newer families' names. Heads are grouped, their width is not width / heads."""
    grouped = architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm")
    own_width = architecture in ("llama", "qwen3", "gemma2", "gemma3")
    return {
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if grouped else 4,
        "head_dim": 12 if own_width else 8,
        "max_position_embeddings": 96,
        "norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "rotary": 4,
        "sliding_window": 7,
    }


def shapes(architecture: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes, with every tensor that is optional but an output matrix."""
    vocab, width, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    found: dict[str, tuple[int, ...]] = {}
    if architecture == "gpt2":
        found |= {"transformer.wte.weight": (vocab, width), "transformer.wpe.weight": (96, width)}
        matrices = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
        for layer in range(2):
            for name, shape in matrices.items():
                found |= {
                    f"transformer.h.{layer}.{name}.weight": shape,
                    f"transformer.h.{layer}.{name}.bias": shape[1:],
                }
            for name, part in itertools.product(("ln_1", "ln_2"), ("weight", "bias")):
                found[f"transformer.h.{layer}.{name}.{part}"] = (width,)
        return found | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    if architecture == "gptneox":
        found |= {"gpt_neox.embed_in.weight": (vocab, width), "embed_out.weight": (vocab, width)}
        matrices = {"attention.query_key_value": (3 * width, width), "attention.dense": (width, width)}
        matrices |= {"mlp.dense_h_to_4h": (inner, width), "mlp.dense_4h_to_h": (width, inner)}
        for layer in range(2):
            for name, shape in matrices.items():
                found |= {f"gpt_neox.layers.{layer}.{name}.weight": shape}
                found |= {f"gpt_neox.layers.{layer}.{name}.bias": shape[:1]}
            for name, part in itertools.product(("input_layernorm", "post_attention_layernorm"), ("weight", "bias")):
                found[f"gpt_neox.layers.{layer}.{name}.{part}"] = (width,)
        return found | {f"gpt_neox.final_layer_norm.{part}": (width,) for part in ("weight", "bias")}
    found["model.embed_tokens.weight"] = (vocab, width)
    for layer in range(2):
        at = f"model.layers.{layer}."
        found |= {
            at + "self_attn.q_proj.weight": (q_rows, width),
            at + "self_attn.k_proj.weight": (kv_rows, width),
            at + "self_attn.v_proj.weight": (kv_rows, width),
            at + "self_attn.o_proj.weight": (width, q_rows),
            at + "mlp.gate_proj.weight": (inner, width),
            at + "mlp.up_proj.weight": (inner, width),
            at + "mlp.down_proj.weight": (width, inner),
            at + "input_layernorm.weight": (width,),
            at + "post_attention_layernorm.weight": (width,),
        }
        if architecture in ("llama", "qwen2", "stablelm"):
            found |= {at + f"self_attn.{x}_proj.bias": (rows,) for x, rows in zip("qkv", (q_rows, kv_rows, kv_rows))}
        if architecture == "llama":
            found |= {at + "self_attn.o_proj.bias": (width,), at + "mlp.up_proj.bias": (inner,)}
        if architecture in ("gemma2", "gemma3"):
            found |= {at + f"{x}_feedforward_layernorm.weight": (width,) for x in ("pre", "post")}
        if architecture in ("qwen3", "gemma3"):
            found |= {at + f"self_attn.{x}_norm.weight": (config["head_dim"],) for x in "qk"}
        if architecture == "stablelm":
            found |= {at + f"{x}_layernorm.bias": (width,) for x in ("input", "post_attention")}
            for x, heads in (("q", 4), ("k", 2)):
                found |= {at + f"self_attn.{x}_layernorm.norms.{head}.weight": (8,) for head in range(heads)}
    found["model.norm.weight"] = (width,)
    return found | ({"model.norm.bias": (width,)} if architecture == "stablelm" else {})


def converted(architecture: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter writes them; names by gguf's own table."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    stacked: dict[str, list[np.ndarray]] = {}
    out = {}
    for name, x in tensors.items():
        if architecture == "llama" and re.search(r"[qk]_proj", name):
            n = heads if "q_proj" in name else groups
            x = x.reshape(n, 2, len(x) // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight", name):
            x = x.T
        if architecture == "gptneox" and "query_key_value" in name:
            rows = x.reshape(heads, 3, -1, *x.shape[1:])
            x = np.concatenate([rows[:, part].reshape(-1, *x.shape[1:]) for part in range(3)])
        if ".norms." in name:
            merged = re.sub(r"\.norms\.\d+", "", name)
            stacked.setdefault(merged, []).append(x)
            name, x = merged, np.stack(stacked[merged])
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        out[new] = np.ascontiguousarray(x)
    return out


def metadata(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes for the config; keys after the architecture's name."""
    keys: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
    }
    if architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3"):
        keys |= {"attention.head_count_kv": config["num_key_value_heads"], "rope.freq_base": config["rope_theta"]}
        keys["attention.layer_norm_rms_epsilon"] = config["norm_eps"]
        if architecture != "qwen2":
            keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    else:
        keys["attention.layer_norm_epsilon"] = config["norm_eps"]
    if architecture == "llama":
        keys |= {"rope.dimension_count": config["head_dim"], "vocab_size": config["vocab_size"]}
    if architecture in ("stablelm", "gptneox"):
        keys |= {"rope.dimension_count": config["rotary"], "use_parallel_residual": config.get("parallel", False)}
        keys["attention.head_count_kv"] = config["num_key_value_heads"]
    if architecture.startswith("gemma"):
        keys["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return keys


def write(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    vocabulary: Vocabulary,
    kinds: Mapping[str, Q] | None = None,
) -> Path:
    """One GGUF file; a key of value None is left out, a tensor that is not in kinds is float32."""
    writer = gguf.GGUFWriter(path, architecture)
    every = {
        f"{architecture}.{key}": value for key, value in keys.items() if not key.startswith(("general.", "split."))
    }
    every |= {key: value for key, value in keys.items() if key.startswith(("general.", "split."))}
    every |= {"tokenizer.ggml.model": vocabulary.model}
    every |= {f"tokenizer.{key}": value for key, value in vocabulary.settings.items()}
    for key, value in every.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    for name, x in tensors.items():
        kind = Q.F32 if kinds is None else kinds.get(name, Q.F32)
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=None if kind in (Q.F32, Q.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(wanted: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in wanted.items()}


def model_file(
    path: Path, architecture: str = "llama", vocabulary: Vocabulary | None = None, changes: dict[str, Any] | None = None
) -> Path:
    """A whole small model; changes: of metadata keys and of tensors, such as "blk.0.attn_q.weight"; None leaves out."""
    vocabulary = byte_level() if vocabulary is None else vocabulary
    config = small_config(architecture, vocabulary)
    tensors = converted(architecture, config, random_tensors(shapes(architecture, config)))
    keys = {} if changes is None else changes
    arrays = {name: x for name, x in keys.items() if name.endswith((".weight", ".bias"))}
    tensors = {name: x for name, x in (tensors | arrays).items() if x is not None}
    keys = {name: value for name, value in keys.items() if name not in arrays}
    return write(path, architecture, metadata(architecture, config) | keys, tensors, vocabulary)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# --- Tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_come_back_under_their_names(path: Path) -> None:
    for architecture in ARCHITECTURES:
        with case(architecture):
            config = small_config(architecture, byte_level())
            tensors = random_tensors(shapes(architecture, config))
            write(
                path,
                architecture,
                metadata(architecture, config),
                converted(architecture, config, tensors),
                byte_level(),
            )
            model = read_gguf(path)
            assert set(model.names()) == set(tensors)
            for name, wanted in tensors.items():
                found = model.tensor(name)
                assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
                if architecture.startswith("gemma") and name.endswith("norm.weight"):
                    wanted = (wanted + 1) - 1  # the bits that adding one cost are gone
                np.testing.assert_array_equal(found, wanted, err_msg=name)
            assert model.config["tie_word_embeddings"] == (architecture != "gptneox")
            assert model.where(name) == str(path)


def test_rows_of_a_head_by_hand(path: Path) -> None:
    """llama.cpp rotates rows (0, 1), (2, 3) of a head; Hugging Face (0, 2), (1, 3)."""
    keys = {"attention.key_length": 4, "attention.value_length": 4, "rope.dimension_count": 4}
    rows = np.repeat(np.arange(8, dtype=np.float32)[:, None], 32, axis=1)
    q_rows = np.concatenate([rows, rows + 8])
    files = {"blk.0.attn_k.weight": rows, "blk.0.attn_q.weight": q_rows, "blk.0.attn_k.bias": rows[:, 0]}
    model = read_gguf(model_file(path, changes=keys | files))
    assert model.tensor("model.layers.0.self_attn.k_proj.weight")[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert model.tensor("model.layers.0.self_attn.k_proj.bias").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    q = model.tensor("model.layers.0.self_attn.q_proj.weight")[:, 5].tolist()
    assert q == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]


def test_quantised_tensors_are_what_gguf_makes_of_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in itertools.product([96, 1 << 18], [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1]):
        with case(row) as (chunk, kind):
            monkeypatch.setattr(gguf_file, "CHUNK", chunk)
            config = small_config("qwen2", byte_level())
            tensors = random_tensors(shapes("qwen2", config))
            kinds = {"token_embd.weight": kind, "blk.1.ffn_down.weight": kind}
            write(path, "qwen2", metadata("qwen2", config), converted("qwen2", config, tensors), byte_level(), kinds)
            model = read_gguf(path)
            for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
                wanted = gguf.dequantize(gguf.quantize(tensors[name], kind), kind)
                np.testing.assert_array_equal(model.tensor(name), wanted)
                assert 0 < np.abs(wanted - tensors[name]).max() < 0.5


def test_container_is_read_as_gguf_reads_it(path: Path) -> None:
    model_file(
        path, changes={"general.languages": ["en", "ä"], "general.sampling.temp": 0.1, "rope.freq_base": -0.5e-3}
    )
    values, stored = gguf_file.parse(path)
    reader = gguf.GGUFReader(path)
    assert set(values) == {name for name in reader.fields if not name.startswith("GGUF.")}
    for name, value in values.items():
        assert np.all(np.asarray(value) == np.asarray(reader.fields[name].contents())) or np.float32(
            value
        ) == np.float32(reader.fields[name].contents()), name
    assert values["general.sampling.temp"] == 0.1  # not 0.10000000149011612
    for tensor in reader.tensors:
        where = stored[tensor.name]
        assert (where.start, where.size) == (tensor.data_offset, tensor.n_bytes)
        assert where.shape == tuple(tensor.shape[::-1]) and where.type == tensor.tensor_type


# --- Configs ---------------------------------------------------------------------------------------------------------


def test_config_of_llama(path: Path) -> None:
    vocabulary = byte_level()
    assert read_gguf(model_file(path)).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary.tokens),
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 96,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": True,
    }


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 24}
SECOND_NORMS = [f"blk.{layer}.ffn_norm.{part}" for layer in range(2) for part in ("weight", "bias")]
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"attention.sliding_window": 9}, {"model_type": "mistral", "sliding_window": 9}),
    ("llama", {"attention.head_count_kv": [2, 2]}, {"num_key_value_heads": 2}),
    ("llama", {"rope.freq_base": None}, {"rope_theta": 10000.0}),
    ("llama", {"output.weight": np.ones((267, 32), np.float32)}, {"tie_word_embeddings": False}),
    ("qwen2", {}, {"head_dim": 8, "use_sliding_window": False, "rope_scaling": None}),
    ("qwen2", YARN, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}}),
    ("qwen3", {}, {"model_type": "qwen3", "head_dim": 12, "attention_bias": False}),
    ("gemma2", {}, {"query_pre_attn_scalar": 12, "sliding_window": 7, "attn_logit_softcapping": 50.0}),
    ("gemma2", {}, {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 30.0}),
    ("gemma3", {}, {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 2}),
    ("gemma3", {"attention.sliding_window": None}, {"layer_types": ["full_attention"] * 2}),
    ("gemma3", {"rope.freq_base": None}, {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}),
    (
        "gemma3",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": None},
    ),
    ("stablelm", {}, {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True}),
    ("stablelm", {}, {"use_parallel_residual": False}),
    ("stablelm", dict.fromkeys(SECOND_NORMS), {"use_parallel_residual": True}),
    ("gpt2", {}, {"n_embd": 32, "n_inner": 64, "n_positions": 96, "n_head": 4, "n_layer": 2}),
    ("gptneox", {}, {"rotary_pct": 0.5, "use_parallel_residual": False, "tie_word_embeddings": False}),
    ("gptneox", {"use_parallel_residual": True}, {"use_parallel_residual": True, "model_type": "gpt_neox"}),
]


def test_config(path: Path) -> None:
    for row in CASES:
        with case(row) as (architecture, keys, wanted):
            config = read_gguf(model_file(path, architecture, changes=keys)).config
            assert {key: config[key] for key in wanted} == wanted


def llama3_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, old: int) -> np.ndarray:
    """llama.cpp's rope_freqs.weight, in plain Python."""
    divisors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        if wave < old / high:
            divisors.append(1.0)
        elif wave > old / low:
            divisors.append(factor)
        else:
            smooth = (old / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_found_again(path: Path) -> None:
    for row in [(64, 32.0), (128, 8.0)]:
        with case(row) as (head_dim, factor):
            divisors = llama3_divisors(500000.0, head_dim, factor, 1.0, 4.0, 8192)
            divisors[0] = np.nextafter(np.float32(1), np.float32(0))  # another converter's rounding
            scaling = gguf_reader._llama3_scaling(gguf_file.GgufFields(path, {}), divisors, 500000.0)
            assert scaling == {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }


def test_divisors_of_another_rule_are_refused(path: Path) -> None:
    assert (
        read_gguf(model_file(path, changes={"rope_freqs.weight": np.ones(6, np.float32)})).config["rope_scaling"]
        is None
    )
    for odd in (
        [1, 2, 1, 3, 4, 5],
        [1, 1, 1, 1, 1, 8],
        [1, 0.5, 2, 3, 4, 5],
        [1, 0, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, np.inf],
    ):
        with pytest.raises(UserError, match=r"model.gguf: tensor rope_freqs.weight: no rope_scaling of type llama3"):
            read_gguf(model_file(path, changes={"rope_freqs.weight": np.array(odd, np.float32)}))


# --- Byte-level tokenizers -------------------------------------------------------------------------------------------


def tokenizer_of(path: Path, vocabulary: Vocabulary, architecture: str = "llama") -> Tokenizer:
    return Tokenizer.from_str(json.dumps(read_gguf(model_file(path, architecture, vocabulary)).tokenizer))


def test_byte_level_tokenizer(path: Path) -> None:
    vocabulary = byte_level()
    tokenizer = tokenizer_of(path, vocabulary)
    encoded = tokenizer.encode("the the 1234中<|end|> <tool> a")
    spelled = ["the", "Ġthe", "Ġ", "123", "4", "ä¸", "Ń", "<|end|>", "Ġ", "<tool> ", "a"]
    assert encoded.tokens == spelled
    assert encoded.ids == [vocabulary.tokens.index(token) for token in spelled]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the the 1234中<|end|> <tool> a"
    assert tokenizer.token_to_id("[PAD266]") is None  # no token, only a row of the embedding
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    assert special == ["<|end|>"]


CUT = [
    ("gpt-2", ["Hi", "'", "LL", "Ġ1234", "!!", "ĊĊĠ", "Ġx"]),
    ("default", ["Hi", "'", "LL", "Ġ1234", "!!", "ĊĊĠ", "Ġx"]),
    ("mpt", ["Hi", "'", "LL", "Ġ1234", "!!", "ĊĊĠ", "Ġx"]),
    ("smollm", ["Hi", "'", "LL", "Ġ", "1", "2", "3", "4", "!!", "ĊĊĠ", "Ġx"]),
    ("llama-bpe", ["Hi", "'LL", "Ġ", "123", "4", "!!ĊĊ", "Ġ", "Ġx"]),
    ("qwen2", ["Hi", "'LL", "Ġ", "1", "2", "3", "4", "!!ĊĊ", "Ġ", "Ġx"]),
    ("tekken", ["Hi", "'LL", "Ġ", "1", "2", "3", "4", "!!ĊĊ", "Ġ", "Ġx"]),
    *(
        (pre, ["Hi", "'LL", "Ġ", "1", "2", "3", "4", "!!ĊĊ", "Ġ", "Ġx"])
        for pre in ("deepseek-r1-qwen", "qwen35", "kormo")
    ),
    *(
        (pre, ["Hi", "'LL", "Ġ", "1", "2", "3", "4", "!!ĊĊ", "Ġ", "Ġx"])
        for pre in ("bailingmoe", "hunyuan", "stablelm2")
    ),
    *((pre, ["Hi'LL", "Ġ", "123", "4", "!!ĊĊ", "Ġ", "Ġx"]) for pre in ("gpt-4o", "llama4", "kanana2")),
    *(
        (pre, ["Hi", "'LL", "Ġ", "123", "4", "!!ĊĊ", "Ġ", "Ġx"])
        for pre in ("falcon3", "glm4", "deepseek-v3", "minicpm5")
    ),
    ("seed-coder", ["Hi", "'LL", "Ġ", "1", "2", "3", "4", "!!", "ĊĊ", "Ġ", "Ġx"]),
    ("deepseek-coder", ["Hi", "'", "LL", "Ġ", "1", "2", "3", "4", "!!", "Ċ", "Ċ", "Ġ", "Ġx"]),
    ("command-r", ["Hi", "'", "LL", "Ġ", "1", "2", "3", "4", "!!", "ĊĊĠ", "Ġx"]),
    ("bloom", ["Hi'LL", "Ġ1234", "!!ĊĊĠ", "Ġx"]),
    ("viking", ["Hi'LL", "Ġ", "1", "2", "3", "4", "!!ĊĊĠ", "Ġx"]),
    ("exaone4", ["Hi", "'", "LL", "Ġ1234", "!!", "ĊĊĠ", "Ġx"]),
]
# Other text, where patterns part that agree above.
CUT_OTHERWISE = [
    ("llama4", "aBc//\n", ["a", "Bc", "//\n"]),
    ("gpt-4o", "IT'S ééÉ", ["IT'S", " éé", "É"]),
    ("tekken", "IT'S", ["IT", "'S"]),
    ("qwen35", "नि नि", ["नि", " नि"]),
    ("deepseek-r1-qwen", "नि", ["न", "ि"]),
    ("deepseek-v3", "a中文カ#x +", ["a", "中文カ", "#x", " +"]),
    ("deepseek-coder", "a中文1", ["a", "中文", "1"]),
    ("seed-coder", "a\n\nb", ["a", "\n\n", "b"]),
    ("bloom", "a, b(c", ["a", ",", " b", "(", "c"]),
]


def test_how_text_is_cut(path: Path) -> None:
    for row in CUT:
        with case(row) as (pre, pieces):
            tokenizer = tokenizer_of(path, byte_level(**{"ggml.pre": pre}))
            found = tokenizer.pre_tokenizer.pre_tokenize_str("Hi'LL 1234!!\n\n  x")
            assert [piece for piece, _ in found] == pieces
    for other in CUT_OTHERWISE:
        with case(other) as (pre, text, pieces):
            tokenizer = tokenizer_of(path, byte_level(**{"ggml.pre": pre}))
            found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
            assert [text[start:end] for _, (start, end) in found] == pieces
    # As published, so that tiktoken encodes.
    for pre in ("gpt-4o", "llama4", "llama-bpe", "qwen2", "deepseek-r1-qwen"):
        made = read_gguf(model_file(path, vocabulary=byte_level(**{"ggml.pre": pre}))).tokenizer
        assert pattern_of(made["pre_tokenizer"]) in PATTERNS, pre


def test_normal_form_and_whole_pieces(path: Path) -> None:
    # e and an acute accent are é, two bytes, in normal form C.
    assert len(tokenizer_of(path, byte_level(**{"ggml.pre": "qwen2"})).encode("e\u0301").ids) == 2
    assert len(tokenizer_of(path, byte_level(**{"ggml.pre": "gpt-2"})).encode("e\u0301").ids) == 3
    whole = byte_level(**{"ggml.pre": "llama-bpe"})
    whole.tokens[-1], whole.types[-1] = "xyz", NORMAL  # a token that no merge makes
    assert tokenizer_of(path, whole).encode("xyz", add_special_tokens=False).tokens == ["xyz"]


AROUND = [
    ({}, False, False),
    ({"ggml.add_bos_token": True}, True, False),
    ({"ggml.pre": "llama-bpe"}, True, False),
    ({"ggml.pre": "llama-bpe", "ggml.add_bos_token": False, "ggml.add_eos_token": True}, False, True),
    ({"ggml.pre": "llama-bpe", "ggml.bos_token_id": None}, False, False),
]


def test_special_tokens_around_a_text(path: Path) -> None:
    for row in AROUND:
        with case(row) as (settings, bos, eos):
            model = read_gguf(model_file(path, vocabulary=byte_level(**settings)))
            tokens = Tokenizer.from_str(json.dumps(model.tokenizer)).encode("a").tokens
            assert tokens == ["<|end|>"] * bos + ["a"] + ["<|end|>"] * eos
            assert (model.tokenizer_config["add_bos_token"], model.tokenizer_config["add_eos_token"]) == (bos, eos)
            assert model.tokenizer_config["eos_token"] == "<|end|>" and model.tokenizer_config["pad_token"] is None
            assert model.tokenizer_config["chat_template"] == "{{ messages }}"


def test_every_end_that_a_file_names(path: Path) -> None:
    settings = {"ggml.eot_token_id": 5, "ggml.eom_token_id": 6}
    assert read_gguf(model_file(path, vocabulary=byte_level(**settings))).end_ids == (0, 5, 6)


def test_a_special_token_that_a_file_has_none_of(path: Path) -> None:
    for none in (None, 2**32 - 1):
        with case(none):
            settings = {"ggml.padding_token_id": none, "ggml.unknown_token_id": none}
            model = read_gguf(model_file(path, vocabulary=byte_level(**settings)))
            assert (
                model.end_ids == (0,)
                and model.config["pad_token_id"] is None
                and model.tokenizer_config["unk_token"] is None
            )


# --- SentencePiece ---------------------------------------------------------------------------------------------------

RUNS = ["▁" * length for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)]  # those of Llama and Mistral
WORDS = ["▁t", "he", "▁a", "in", "▁the", "an", "ana", "ab", "aba", "aa", "aaa", "nan", "▁an", "thin", "▁thin", "ing"]


def joined_by_score(text: str, vocabulary: Vocabulary) -> list[str]:
    """SentencePiece's BPE: the adjacent pair whose token scores best, the leftmost of equals, until there is none."""
    scores = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types)
        if kind == NORMAL
    }
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [
        out
        for piece in pieces
        for out in ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


def with_runs() -> Vocabulary:
    vocabulary = sentencepiece([*RUNS, *WORDS])
    for run in RUNS:
        vocabulary.scores[vocabulary.tokens.index(run)] = -1e9
    return vocabulary


def test_merges_from_scores_join_as_the_scores_do(path: Path) -> None:
    vocabulary = with_runs()
    tokenizer = tokenizer_of(path, vocabulary)
    rng = random.Random(0)
    texts = ["".join(rng.choices("  tthheaanbigé\n", k=rng.randrange(1, 40))) for _ in range(300)]
    texts += [character * length for character in " a" for length in range(1, 50)]
    for text in texts:
        wanted = joined_by_score("▁" + text.replace(" ", "▁"), vocabulary)
        assert tokenizer.encode(text, add_special_tokens=False).tokens == wanted, repr(text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("[INST] an").tokens == ["<s>", "[INST]", "▁", "▁an"]


def test_no_space_before_a_text_and_tokens_of_spaces(path: Path) -> None:
    """As in Gemma: user-defined tokens of spaces, the longest is taken; tabs that are joined but no token alone."""
    vocabulary = sentencepiece([*WORDS, "\t\t"], **{"ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    at = vocabulary.tokens.index("\t")
    vocabulary.tokens[at], vocabulary.types[at] = "  ", USER_DEFINED
    tokenizer = tokenizer_of(path, vocabulary)
    assert tokenizer.encode("an   a").tokens == ["an", "  ", "▁a"]
    assert tokenizer.encode("\t\t\ta").ids == [vocabulary.tokens.index(t) for t in ("\t\t", "<0x09>", "a")]
    assert tokenizer.decode(tokenizer.encode("\t\t\ta   in").ids) == "\t\t\ta   in"


# --- Errors ----------------------------------------------------------------------------------------------------------


NO_MODEL = [
    ("llama", {"block_count": None}, r"llama.block_count is missing, expected a positive integer"),
    ("llama", {"block_count": 0}, r"llama.block_count: expected a positive integer.*, got 0"),
    ("llama", {"embedding_length": "wide"}, r"llama.embedding_length: expected a positive integer, got 'wide'"),
    (
        "llama",
        {"attention.head_count_kv": [2, 1]},
        r"head_count_kv: expected a positive integer, the same.*, got \[2, 1\]",
    ),
    ("llama", {"attention.layer_norm_rms_epsilon": None}, r"llama.attention.layer_norm_rms_epsilon is missing"),
    ("llama", {"rope.dimension_count": 6}, r"rope.dimension_count: expected 12, the width of a head.*, got 6"),
    ("llama", {"attention.value_length": 6}, r"llama.attention.value_length: expected 12.*, got 6"),
    ("qwen2", {"attention.head_count": 5}, r"attention.head_count: expected a divisor of .*_length 32.*, got 5"),
    (
        "llama",
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
        r"expected 'none', 'linear' or .*, got 'longrope'",
    ),
    ("llama", {"rope.scaling.type": "yarn"}, r"rope.scale_linear is missing|rope.scaling.factor is missing"),
    ("llama", {"expert_count": 8}, r"llama.expert_count: expected 0 \(such models are not supported\), got 8"),
    ("llama", {"attention.causal": False}, r"llama.attention.causal: expected .*, got False"),
    ("gptneox", {"attention.head_count_kv": 2}, r"gptneox.attention.head_count_kv: expected 4.*, got 2"),
    ("llama", {"general.type": "adapter"}, r"general.type: expected 'model'.*, got 'adapter'"),
    ("llama", {"general.alignment": 0}, r"general.alignment: expected a positive integer, got 0"),
    ("llama", {"token_embd.weight": None}, r"tensor token_embd.weight is missing"),
    ("llama", {"token_embd.weight": np.zeros((9, 32), np.float32)}, r"token_embd.weight has 9 rows for 267 "),
    ("llama", {"blk.1.attn_q.weight": None}, r"tensor blk.1.attn_q.weight is missing"),
    ("llama", {"block_count": 2**31}, r"block_count: expected no more than the file's \d+ tensors, got 2147483648"),
    ("llama", {"output_norm.weight": None}, r"tensor output_norm.weight is missing"),
    ("gpt2", {"position_embd.weight": None}, r"tensor position_embd.weight is missing"),
    ("qwen2", {f"blk.{n}.ffn_up.weight": None for n in (0, 1)}, r"tensor blk.0.ffn_up.weight is missing"),
    (
        "llama",
        {"blk.01.attn_q.weight": np.zeros((48, 32), np.float32)},
        r"tensor blk.01.attn_q.weight is not one of",
    ),
    ("llama", {"split.count": 2}, r"split.count 2: one part of a split model"),
    ("llama", {"block_count": 3}, r"tensor blk.2.attn_k.bias is missing"),
    ("llama", {"block_count": 1}, r"tensor blk.1.\w+.\w+: llama.block_count is 1"),
    ("llama", {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}, r"ffn_gate_exps.weight is not one of"),
]


def test_what_a_model_cannot_be(path: Path) -> None:
    for row in NO_MODEL:
        with case(row) as (architecture, keys, message):
            with pytest.raises(UserError, match=rf"model\.gguf: .*(?:{message})") as caught:
                read_gguf(model_file(path, architecture, changes=keys))
            assert "\n" not in str(caught.value)


def without(vocabulary: Vocabulary, token: str) -> Vocabulary:
    vocabulary.types[vocabulary.tokens.index(token)] = UNUSED
    return vocabulary


NO_TOKENIZER = [
    (byte_level(**{"ggml.pre": "kimi-k2"}), r"tokenizer.ggml.pre: expected one of default, gpt-2.*, got 'kimi-k2'"),
    (byte_level(**{"ggml.pre": None}), r"tokenizer.ggml.pre is missing"),
    (byte_level(**{"ggml.eos_token_id": 267}), r"tokenizer.ggml.eos_token_id: expected the id of a token, got 267"),
    (without(byte_level(), "th"), r"tokenizer.ggml.merges\[0\]: 't h' joins no two tokens"),
    (dataclasses.replace(byte_level(), merges=["th"]), r"merges\[0\]: 'th' joins no two tokens"),
    (dataclasses.replace(byte_level(), merges=[]), r"tokenizer.ggml.merges is missing"),
    (dataclasses.replace(byte_level(), model="bert"), r"tokenizer.ggml.model: expected 'gpt2'.*, got 'bert'"),
    (dataclasses.replace(byte_level(), types=[1]), r"token_type: expected one type for each of 267 tokens, got \[1\]"),
    (
        sentencepiece(["▁a", "an"], **{"ggml.remove_extra_whitespaces": True}),
        r"remove_extra_whitespaces: expected none .*, got True",
    ),
    (dataclasses.replace(sentencepiece(["ab"]), scores=[]), r"tokenizer.ggml.scores is missing"),
    (
        dataclasses.replace(sentencepiece(["ab", "ba"]), scores=[-1.0] * 264),
        r"scores: 2 tokens share -1.0, 'ab' among them",
    ),
    (without(sentencepiece(["ab"]), "<0x00>"), r"expected all 256 byte tokens or none, got 255"),
    (without(sentencepiece(["né"]), "é"), r"'né' contains 'é', which is not a token"),
]


def test_what_a_tokenizer_cannot_be(path: Path) -> None:
    for row in NO_TOKENIZER:
        with case(row) as (vocabulary, message):
            with pytest.raises(UserError, match=rf"model\.gguf: .*{message}") as caught:
                read_gguf(model_file(path, vocabulary=vocabulary))
            assert "\n" not in str(caught.value)


def test_a_token_twice_and_a_user_defined_space(path: Path) -> None:
    twice = sentencepiece(["ab"])
    twice.tokens[-1] = "ab"
    with pytest.raises(UserError, match=r"tokens: ids 259 and 262 are both 'ab'"):
        read_gguf(model_file(path, vocabulary=twice))
    spaced = sentencepiece(["ab"])
    spaced.tokens[-1], spaced.types[-1] = "  ", USER_DEFINED
    with pytest.raises(UserError, match=r"tokens\[262\]: user-defined '  ' with a space in it"):
        read_gguf(model_file(path, vocabulary=spaced))


def test_runs_that_an_order_joins_otherwise_are_refused(path: Path) -> None:
    scores = {2: 0.0, 3: -1.0, 11: -1.0, 4: -2.0, 5: -2.0}
    vocabulary = sentencepiece(["a" * length for length in scores])
    for length, score in scores.items():
        vocabulary.scores[vocabulary.tokens.index("a" * length)] = score
    with pytest.raises(UserError, match=r"scores: 2 tokens share -2.0, 'aaaa' among them, so the order"):
        read_gguf(model_file(path, vocabulary=vocabulary))
    assert not gguf_tokenizer._joined_alike({2: 0.0, 100: 0.0})  # would take too long to try


def test_a_file_cut_anywhere_is_called_truncated(path: Path) -> None:
    whole = model_file(path).read_bytes()
    for length in [0, 3, 4, 7, 12, 23, 30, *range(40, len(whole) - 1, len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"model\.gguf: .*(truncated|not a GGUF file|not a readable file)"
        ) as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)


DAMAGED = [
    (0, b"PK\x03\x04", r"not a GGUF file: expected b'GGUF' at the start, got b'PK\\x03\\x04'"),
    (4, struct.pack("<I", 1), r"GGUF version: expected 2 or 3, got 1$"),
    (4, struct.pack(">I", 3), r"big-endian files are not read"),
    (8, struct.pack("<Q", 2**60), r"truncated"),
    (16, struct.pack("<Q", 2**60), r"metadata key \d+ of|value type|truncated"),
    (24, struct.pack("<Q", 2**60), r"metadata key 0 of \d+: the file is truncated"),
    (32, b"\xff\xfe", r"metadata key 0 of \d+: damaged, it is not UTF-8"),
    (24 + 8 + 20, struct.pack("<I", 99), r"general.architecture: value type 99 is unknown"),
]


def test_damaged_headers(path: Path) -> None:
    for row in DAMAGED:
        with case(row) as (at, new, message):
            data = bytearray(model_file(path).read_bytes())
            data[at : at + len(new)] = new
            path.write_bytes(data)
            with pytest.raises(UserError, match=rf"model\.gguf: .*{message}"):
                read_gguf(path)


def test_tensor_types(path: Path) -> None:
    data = model_file(path).read_bytes()
    entry = b"token_embd.weight" + struct.pack("<IQQI", 2, 32, 267, 0)
    for kind, message in (
        (9, "type Q8_1 cannot be dequantised"),
        (250, "ggml type 250 is newer than the installed gguf"),
    ):
        path.write_bytes(data.replace(entry, entry[:-4] + struct.pack("<I", kind)))
        with pytest.raises(UserError, match=rf"model\.gguf: tensor token_embd.weight: {message}"):
            read_gguf(path)
    path.write_bytes(data.replace(entry, b"token_embd.weight" + struct.pack("<IQQI", 2, 31, 267, 8)))
    with pytest.raises(
        UserError, match=r"token_embd.weight: expected rows of a multiple of 32 weights, got shape \[267, 31\]"
    ):
        read_gguf(path)
    entry = b"token_embd.weight" + struct.pack("<IQ", 2, 32)
    path.write_bytes(data.replace(entry, entry[:-8] + struct.pack("<Q", 2**40)))
    with pytest.raises(UserError, match=r"tensor token_embd.weight: the file is truncated, it has \d+ of \d+ bytes"):
        read_gguf(path)


def test_other_refusals(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"absent.gguf: not a readable file: No such file or directory$"):
        read_gguf(tmp_path / "absent.gguf")
    config = small_config("llama", byte_level())
    write(path, "falcon", metadata("llama", config), {}, byte_level())
    with pytest.raises(UserError, match=r"general.architecture: expected one of llama, qwen2.*, got 'falcon'"):
        read_gguf(path)
    model = read_gguf(model_file(path))
    with pytest.raises(UserError, match=r"there is no tensor 'lm_head.weight'; it has model"):
        model.tensor("lm_head.weight")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model.gguf: no longer readable"):
        model.tensor("model.norm.weight")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="requires the gguf package; run: pip install 'gguf>="):
        read_gguf(path)


def test_a_model_that_does_not_fit_its_config(path: Path) -> None:
    model = read_gguf(model_file(path, changes={"blk.0.attn_q.weight": np.zeros((6, 32), np.float32)}))
    with pytest.raises(UserError, match=r"tensor model.layers.0.self_attn.q_proj.weight: shape \[6, 32\] does not fit"):
        model.tensor("model.layers.0.self_attn.q_proj.weight")


# --- Installed packages ----------------------------------------------------------------------------------------------


def install(root: Path, name: str, files: list[str], recorded: bool = True) -> None:
    """A distribution as pip leaves it."""
    info = root / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if recorded:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, f"{info.name}/METADATA"]))


def test_the_model_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "one_model").mkdir()
    model_file(tmp_path / "one_model" / "small.gguf")
    install(tmp_path, "one-model", ["one_model/__init__.py", "one_model/small.gguf"])
    assert packaged_gguf("one-model") == tmp_path / "one_model" / "small.gguf"
    assert read_gguf(packaged_gguf("one-model")).config["model_type"] == "llama"

    install(tmp_path, "no-model", ["no_model/__init__.py"])
    install(tmp_path, "unrecorded", [], recorded=False)
    install(tmp_path, "two-models", ["two/a.gguf", "two/b.gguf"])
    install(tmp_path, "lost-model", ["lost/a.gguf"])
    for name, message in {
        "never-heard-of-it": "is not installed; run: pip install never-heard-of-it",
        "": "is not installed",
        "no-model": "expected one .gguf file, got 0$",
        "unrecorded": "expected one .gguf file, got 0$",
        "two-models": "expected one .gguf file, got 2: two/a.gguf, two/b.gguf",
        "lost-model": "a.gguf is missing; run: pip install --force-reinstall lost-model",
    }.items():
        with pytest.raises(UserError, match=message):
            packaged_gguf(name)


def test_reading_needs_no_jax() -> None:
    code = "import sys, rlhf_jax.pretrained.gguf_reader; sys.exit('jax' in sys.modules or 'gguf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
