"""Adapters as PEFT's folders: back to the bit, and what PEFT makes of fused matrices, scales and names, by hand."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.arrays import flattened, nested
from rlhf_jax.config import LoraConfig, ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.model import stack_blocks
from rlhf_jax.pretrained.peft import base_of, read_adapter, write_adapter
from tests.cases import case
from tests.made_params import random_adapter, shapes_traced_once  # noqa: F401

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("shapes_traced_once")]

SMALL: dict[str, Any] = {"vocab_size": 19, "context": 12, "width": 8, "layers": 2, "heads": 2, "ffn_width": 12}
NEOX: dict[str, Any] = {"norm": "layer", "residual": "parallel", "activation": "gelu_exact", "bias": True}
MODELS = {
    "llama": ModelConfig(**SMALL, kv_heads=1, head_width=6),
    "gpt2": ModelConfig.gpt2(**SMALL),
    "gpt_neox": ModelConfig(**SMALL, **NEOX, tied=False),
}
LORA = LoraConfig(rank=3, alpha=6.0)
BASE = "base_model.model."


def fresh(model: ModelConfig, lora: LoraConfig) -> dict:
    return random_adapter(model, lora, trained=False)


def shaken(adapter: dict) -> dict:
    """Every leaf of whole numbers other than 0, so that products are exact."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.integers(1, 9, leaf.shape).astype(np.float32), adapter)


def assert_same(found: dict, wanted: dict) -> None:
    assert sorted(flattened(found)) == sorted(flattened(wanted))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def made(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A folder as PEFT would write it."""
    folder.mkdir()
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_dora": False, "megatron_core": "m"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def test_there_and_back(tmp_path: Path) -> None:
    every = LoraConfig(rank=3, alpha=0.7, targets=("query", "key", "value", "out", "up", "down"))
    some = LoraConfig(rank=2, alpha=6.0, targets=("key", "value", "down"))
    rng = np.random.default_rng(1)
    head = {"kernel": rng.normal(size=(8, 1)).astype(np.float32), "bias": np.array([0.1], np.float32)}
    for row in itertools.product(MODELS, [False, True]):
        with case(row) as (model_type, scalar):
            model = MODELS[model_type]
            for lora in (every, some):
                for adapter in (fresh(model, lora), shaken(fresh(model, lora))):
                    whole = adapter | {"score": head} if scalar else adapter
                    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
                    write_adapter(folder, whole, lora, model, model_type, base="some/model")
                    found, settings = read_adapter(folder, model, model_type)
                    assert_same(found, whole)
                    assert settings == lora
                    assert base_of(folder) == "some/model"


def test_what_is_written_for_gpt2(tmp_path: Path) -> None:
    adapter = shaken(fresh(MODELS["gpt2"], LORA))
    del adapter["block_1"]["ffn"]["down"]
    adapter["score"] = {"kernel": np.ones((8, 1), np.float32), "bias": np.zeros(1, np.float32)}
    (tmp_path / "a.unfinished" / "of_a_killed_process").mkdir(parents=True)
    write_adapter(tmp_path / "a", adapter, LORA, MODELS["gpt2"], "gpt2", base="gpt2", dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "gpt2",
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"c_attn": 9},
        "alpha_pattern": {"c_attn": 18},
        # c_proj alone would be the feed-forward layer's too, which the second block's has none of.
        "target_modules": ["c_attn", "attn.c_proj", "c_fc", "h.0.mlp.c_proj"],
        "modules_to_save": ["score"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
    }
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}
    assert tensors[BASE + "score.weight"].shape == (1, 8)
    assert tensors[BASE + "transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (3, 8)
    assert tensors[BASE + "transformer.h.0.mlp.c_fc.lora_B.weight"].shape == (12, 3)
    a, b = (tensors[f"{BASE}transformer.h.1.attn.c_attn.lora_{half}.weight"].astype(np.float32) for half in "AB")
    ours = adapter["block_1"]["attention"]
    products = [ours[name]["lora_a"] @ ours[name]["lora_b"] for name in ("query", "key", "value")]
    np.testing.assert_array_equal((b @ a).T, np.concatenate(products, axis=1))


def test_neox_interleaves_by_head(tmp_path: Path) -> None:
    adapter = shaken(fresh(MODELS["gpt_neox"], LORA))
    write_adapter(tmp_path / "a", adapter, LORA, MODELS["gpt_neox"], "gpt_neox", base="pythia")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = f"{BASE}gpt_neox.layers.1.attention.query_key_value"
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    for part, name in enumerate(("query", "key", "value")):
        ours = adapter["block_1"]["attention"][name]
        wanted = (ours["lora_a"] @ ours["lora_b"]).T
        for head in range(2):
            start = (3 * head + part) * 4
            np.testing.assert_array_equal(product[start : start + 4], wanted[4 * head : 4 * head + 4])


def test_a_fused_matrix_of_peft_is_shared(tmp_path: Path) -> None:
    """Of a rank that three blocks would have, too, and before training, when B is 0."""
    for size in [0.0, 1.0]:
        with case(size):
            a, b = np.arange(1.0, 25).reshape(3, 8), size * np.arange(1.0, 73).reshape(24, 3)
            stem = f"{BASE}transformer.h.0.attn.c_attn"
            folder = made(tmp_path / f"{size}", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, r=3)
            adapter, lora = read_adapter(folder, MODELS["gpt2"], "gpt2")
            assert lora == LoraConfig(rank=3, alpha=4.0, targets=("query", "key", "value"))
            a, b = a.astype(np.float32), b.astype(np.float32)
            parts = {"query": b[:8], "key": b[8:16], "value": b[16:]}
            modules = {name: {"lora_a": a.T, "lora_b": part.T} for name, part in parts.items()}
            assert_same(adapter, {"block_0": {"attention": modules}})


SCALES = [
    ({}, 4 / 2),
    ({"use_rslora": True}, 4 / 2**0.5),
    ({"alpha_pattern": {r"layers\.[1-9]\.mlp\.up_proj": 3}}, 3 / 2),
    ({"alpha_pattern": {"up_proj": 5, "mlp.up_proj": 7}, "r": 8, "rank_pattern": {"^model.+up_proj": 2}}, 5 / 2),
    ({"use_rslora": True, "r": 16, "rank_pattern": {"up_proj": 2}}, 4 / 2**0.5),
    ({"alpha_pattern": {"p_proj": 5, "layers.11.mlp.up_proj": 5}, "target_modules": "all-linear"}, 4 / 2),
    ({"target_modules": r".*\.(up|gate)_proj", "init_lora_weights": "gaussian", "layers_pattern": "layers"}, 4 / 2),
]


def test_a_modules_own_scale(tmp_path: Path) -> None:
    for number, row in enumerate(SCALES):
        with case(row) as (config, scale):
            a, b = np.arange(1.0, 17).reshape(2, 8), np.arange(1.0, 25).reshape(12, 2)
            stem = f"{BASE}model.layers.1.mlp.up_proj"
            folder = made(tmp_path / f"{number}", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, **config)
            adapter, lora = read_adapter(folder, MODELS["llama"], "llama")
            module = adapter["block_1"]["ffn"]["up"]
            np.testing.assert_allclose(module["lora_a"] @ module["lora_b"] * lora.scale, (b @ a).T * scale, rtol=1e-6)
            if not {"alpha_pattern", "rank_pattern"} & set(config):
                np.testing.assert_array_equal(module["lora_b"], b.T)
            # Written again it is the same adapter, of the module's own rank.
            again = tmp_path / f"{number} again"
            write_adapter(again, adapter, lora, MODELS["llama"], "llama", base="x")
            assert_same(read_adapter(again, MODELS["llama"], "llama")[0], adapter)


def test_stacked_blocks_get_the_same_modules_of_the_same_rank(tmp_path: Path) -> None:
    model = dataclasses.replace(MODELS["llama"], layers=3, scan_layers=True)
    stems = {1: f"{BASE}model.layers.1.mlp.up_proj", 2: f"{BASE}model.layers.2.mlp.up_proj"}
    tensors = {}
    for rank, stem in stems.items():
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = np.ones((rank, 8)), np.ones((12, rank))
    folder = made(tmp_path / "a", tensors, rank_pattern={"layers.1.mlp.up_proj": 1}, lora_alpha=2)
    adapter, lora = read_adapter(folder, model, "llama")
    whole = stack_blocks(adapter, model)["blocks"]["ffn"]["up"]
    products = whole["lora_a"] @ whole["lora_b"] * lora.scale
    # alpha / r · r: nothing in the first, 2 in each of the others.
    np.testing.assert_array_equal(products, np.ones((3, 8, 12)) * np.array([0.0, 2.0, 2.0])[:, None, None])


def test_names_with_and_without_prefix_and_adapter(tmp_path: Path) -> None:
    for number, prefix in enumerate([BASE + "model.", "model.", BASE, ""]):
        with case(prefix):
            # A pair of zeros is a pair, outside a fused matrix.
            a, b = np.zeros((2, 8), np.float16), np.zeros((12, 2), np.float16)
            stem, score = f"{prefix}layers.0.mlp.up_proj", f"{BASE}score.modules_to_save.default.weight"
            tensors: dict[str, np.ndarray] = {
                f"{stem}.lora_A.default.weight": a,
                f"{stem}.lora_B.default.weight": b,
                score: np.ones((1, 8)),
            }
            folder = made(tmp_path / f"{number}", tensors, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
            adapter, lora = read_adapter(folder, MODELS["llama"], "llama")
            one = np.ones((8, 1), np.float32)
            wanted = {"lora_a": np.zeros((8, 2), np.float32), "lora_b": np.zeros((2, 12), np.float32)}
            assert_same(
                adapter, {"block_0": {"ffn": {"up": wanted}}, "score": {"kernel": one, "bias": np.zeros(1, np.float32)}}
            )
            assert lora.targets == ("up",)


PAIR = {
    f"{BASE}model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 8), np.float32),
    f"{BASE}model.layers.0.mlp.up_proj.lora_B.weight": np.ones((12, 2), np.float32),
}
UP_A, UP_B = PAIR
ONE = np.ones((2, 8), np.float32)


REFUSED_CONFIGS = [
    ({"peft_type": "LOHA"}, "field 'peft_type': expected 'LORA', got 'LOHA'"),
    ({"use_dora": True}, "field 'use_dora': expected nothing (only plain LoRA is supported), got True"),
    ({"bias": "lora_only"}, "field 'bias': expected 'none', got 'lora_only'"),
    ({"lora_bias": True}, "field 'lora_bias': expected nothing (only plain LoRA is supported), got True"),
    ({"a_method_of_2030": {"on": 1}}, "LoRA is supported), got {'on': 1}"),
    ({"init_lora_weights": "pissa_niter_4"}, "(other values change the base's own weights), got 'pissa_niter_4'"),
    ({"layers_pattern": ["h"]}, "field 'layers_pattern': expected nothing or ['layers'], got ['h']"),
    ({"r": None}, "field 'r': expected a whole number, got nothing"),
    ({"lora_alpha": 0}, "field 'lora_alpha': expected more than 0, got 0"),
    ({"alpha_pattern": {"up_(": 2}}, "alpha_pattern: expected a regular expression, got 'up_('"),
    ({"task_type": "SEQ_CLS"}, "score.weight' is missing, but adapter_config.json has task_type SEQ_CLS"),
    ({"r": 3}, "lora_A.weight': expected shape [3, 8], got [2, 8]"),
    ({"rank_pattern": {"up_proj": 5}}, "lora_A.weight': expected shape [5, 8], got [2, 8]"),
]


def test_configs_that_are_refused(tmp_path: Path) -> None:
    for number, row in enumerate(REFUSED_CONFIGS):
        with case(row) as (config, message):
            folder = made(tmp_path / f"{number}", PAIR, **config)
            with pytest.raises(UserError) as error:
                read_adapter(folder, MODELS["llama"], "llama")
            assert message in str(error.value)
            assert str(folder) in str(error.value)
            assert "\n" not in str(error.value)


REFUSED_TENSORS = [
    ({}, "expected LoRA tensors, got none"),
    ({UP_A: PAIR[UP_A]}, f"tensor '{UP_A}': expected its lora_B too, got none"),
    (PAIR | {UP_A.removeprefix(BASE): ONE}, "lora_A.weight' too"),
    (PAIR | {UP_B: ONE}, "expected shape [12, 2], got [2, 8]"),
    (PAIR | {f"{BASE}score.weight": ONE}, "score.weight': expected shape [1, 8], got [2, 8]"),
    (
        PAIR | {f"{BASE}lm_head.lora_A.weight": ONE},
        f"tensor '{BASE}lm_head.lora_A.weight': expected lora_A and lora_B of",
    ),
    (PAIR | {f"{BASE}model.embed_tokens.lora_embedding_A": ONE}, "expected lora_A and lora_B of q_proj, k_proj"),
    (PAIR | {f"{BASE}model.embed_tokens.weight": ONE}, "no place in a llama of 2 layers"),
    (PAIR | {UP_A.replace("layers.0", "layers.2"): ONE}, "no place in a llama of 2 layers"),
    (
        PAIR | {UP_A.replace("lora_A.weight", "lora_magnitude_vector"): ONE},
        "lora_magnitude_vector': expected lora_A",
    ),
]


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    for number, row in enumerate(REFUSED_TENSORS):
        with case(row) as (tensors, message):
            folder = made(tmp_path / f"{number}", tensors)
            with pytest.raises(UserError) as error:
                read_adapter(folder, MODELS["llama"], "llama")
            assert message in str(error.value)
            assert str(folder / "adapter_model.safetensors") in str(error.value)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGES = [
    (cut, "adapter_model.safetensors: truncated or damaged"),
    (pickled, "no such file; adapter_model.bin is a pickle"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "adapter_config.json: expected an object, got list",
    ),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: unreadable"),
    (lambda folder: folder.rename(folder.with_name("b")), "no such folder"),
]


def test_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    for number, row in enumerate(DAMAGES):
        with case(row) as (damage, message):
            folder = made(tmp_path / f"{number}", PAIR)
            damage(folder)
            with pytest.raises(UserError, match=message):
                read_adapter(folder, MODELS["llama"], "llama")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    llama, gpt2 = MODELS["llama"], MODELS["gpt2"]
    adapter = fresh(llama, LORA)
    with pytest.raises(UserError, match=r"'block_0\.attention\.query\.kernel' has no place in an adapter of a llama"):
        wrong = nested(flattened(adapter) | {"block_0.attention.query.kernel": np.ones((8, 12))})
        write_adapter(tmp_path / "a", wrong, LORA, llama, "llama", base="x")
    with pytest.raises(UserError, match=r"'block_0\.ffn\.gate\.lora_a' has no place in an adapter of a gpt2"):
        write_adapter(tmp_path / "a", fresh(ModelConfig(**SMALL), LORA), LORA, gpt2, "gpt2", base="x")
    with pytest.raises(UserError, match="got no LoRA"):
        write_adapter(tmp_path / "a", {}, LORA, llama, "llama", base="x")
    assert not list(tmp_path.iterdir())
    write_adapter(tmp_path / "a", adapter, LORA, llama, "llama", base="x")
    with pytest.raises(UserError, match="a: expected a new or empty folder"):
        write_adapter(tmp_path / "a", adapter, LORA, llama, "llama", base="x")
    with pytest.raises(UserError, match=r"field 'base_model_name_or_path': expected .*, got nothing"):
        base_of(made(tmp_path / "b", PAIR))
