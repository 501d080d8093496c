"""A model written as a Hugging Face folder and read again is the same model, to the bit."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.arrays import Params
from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.huggingface import (
    as_published,
    flattened,
    parameter_shapes,
    pretrained,
    read_folder,
    write_folder,
)
from rlhf_jax.pretrained.safetensors_files import write_file
from tests.cases import case
from tests.made_params import random_params, shapes_traced_once  # noqa: F401

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("shapes_traced_once")]

safetensors = pytest.importorskip("safetensors.numpy")
SMALL: dict[str, Any] = {"vocab_size": 43, "context": 32, "width": 24, "layers": 2, "ffn_width": 28}
KINDS = {
    "recipe": ModelConfig(**SMALL, heads=3, qk_norm=True, embedding_scale=24**0.5, vocab_multiple=16),
    "llama": ModelConfig(
        **SMALL, heads=4, kv_heads=2, head_width=10, bias=True, tied=False, rope_scaling=RopeScaling("llama3", 8.0, 16)
    ),
    "qwen2": ModelConfig(**SMALL, heads=3, qkv_bias=True, windows=(0, 4)),
    "gpt2": ModelConfig.gpt2(**SMALL, heads=4),
    "gpt_neox": ModelConfig(
        **SMALL, heads=2, norm="layer", residual="parallel", activation="gelu_exact", bias=True, rotary_fraction=0.5
    ),
    "stablelm": ModelConfig(**SMALL, heads=3, norm="layer", residual="parallel_shared", tied=False),
    "gemma": ModelConfig(
        **SMALL,
        heads=4,
        head_width=10,
        norm_offset=True,
        post_norms=True,
        activation="geglu",
        embedding_scale=24**0.5,
        attention_softcap=5.0,
        logit_softcap=3.0,
        qk_norm=True,
        rope_local_base=50.0,
        windows=(4, 0),
    ),
}


def network(model: ModelConfig, scalar: bool = False) -> Any:
    """From parameters to what the model says of some tokens."""
    tokens = np.random.default_rng(1).integers(0, 43, (3, 17)).astype(np.int32)
    return jax.jit(lambda params: Transformer(model, scalar=scalar).apply({"params": params}, tokens))


def assert_same_outputs(
    found: ModelConfig, params: Params, wanted: ModelConfig, its: Params, atol: float, scalar: bool = False
) -> None:
    """By the programs and the parameters where these are equal, which takes no compiler; else by numbers."""
    models = network(found, scalar), network(wanted, scalar)
    if models[0].lower(params).as_text() == models[1].lower(its).as_text():
        assert_same(params, its)
    else:
        np.testing.assert_allclose(models[0](params), models[1](its), atol=atol)


def assert_same(found: Params, wanted: Params) -> None:
    one, two = flattened(found), flattened(wanted)
    assert sorted(one) == sorted(two)
    for path in two:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a GPT-2."""
    folder = tmp_path_factory.mktemp("published")
    for kind in ("llama", "gpt2"):
        write_folder(folder / kind, random_params(KINDS[kind]), KINDS[kind])
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for kind in KINDS:
        with case(kind):
            model = KINDS[kind]
            params = random_params(model)
            out, back = tmp_path / kind / "out", tmp_path / kind / "back"
            write_folder(out, params, model, special_ids={"eos": 2}, shard_bytes=9_000)
            assert len(list(out.glob("model-0000?-of-0000?.safetensors"))) >= 3
            read = read_folder(out)
            again = read.for_tokenizer(43, 2)
            wanted = as_published(params, model)[0]
            assert_same(again.load(), wanted)
            # Where the head is tied no more, its product is summed in another order.
            assert_same_outputs(again.model, again.load(), model, params, atol=1e-5)
            write_folder(back, read.load(), read.model, origin=read.origin, shard_bytes=9_000)
            assert files(back) == files(out)


def test_the_recipes_kind_is_an_untied_qwen3(tmp_path: Path) -> None:
    architecture = write_folder(
        tmp_path / "out", random_params(KINDS["recipe"]), KINDS["recipe"], special_ids={"eos": 2}
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert architecture == "Qwen3ForCausalLM"
    assert config["architectures"] == [architecture] and config["model_type"] == "qwen3"
    assert (config["vocab_size"], config["tie_word_embeddings"], config["eos_token_id"]) == (48, False, 2)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 2}
    # Whoever may read the one may read the other.
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be written: .*Is a directory") as error:
        write_file(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    assert "\n" not in str(error.value)


def test_bfloat16(tmp_path: Path) -> None:
    model = KINDS["gpt2"]
    params = random_params(model)
    write_folder(tmp_path / "out", params, model, dtype="bfloat16")
    read = read_folder(tmp_path / "out")
    assert read.origin["dtype"] == "bfloat16"
    assert_same(read.load(), jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(read.load(dtype="bfloat16"))} == {jnp.dtype("bfloat16")}
    write_folder(tmp_path / "back", read.load(), read.model, origin=read.origin)
    assert files(tmp_path / "back") == files(tmp_path / "out")


def test_norms_that_are_finer_than_the_rest_stay_so(tmp_path: Path) -> None:
    model = KINDS["llama"]
    write_folder(tmp_path / "out", random_params(model), model, dtype="bfloat16")
    file = tmp_path / "out" / "model.safetensors"
    held = safetensors.load_file(file)
    held |= {name: value.astype(np.float32) * np.float32(1.001) for name, value in held.items() if "norm" in name}
    safetensors.save_file(held, file)
    read = read_folder(tmp_path / "out")
    write_folder(tmp_path / "back", read.load(), read.model, origin=read.origin)
    assert_same(read_folder(tmp_path / "back").load(), read.load())


def test_a_reward_model_keeps_its_bias(tmp_path: Path) -> None:
    for kind in ["recipe", "gpt2"]:
        with case(kind):
            model = KINDS[kind]
            params = random_params(model, scalar=True)
            out, back = tmp_path / kind / "out", tmp_path / kind / "back"
            write_folder(out, params, model, special_ids={"pad": 42}, extras={"score_mean": 0.5})
            config = json.loads((out / "config.json").read_text())
            assert config["rlhf_jax"] == {"score_bias": float(params["score"]["bias"][0]), "score_mean": 0.5}
            assert config["id2label"] == {"0": "LABEL_0"} and config["pad_token_id"] == 42
            read = read_folder(out)
            assert read.scalar
            assert_same(read.load(), as_published(params, model)[0])
            assert_same_outputs(read.model, read.load(), model, params, atol=1e-6, scalar=True)
            write_folder(back, read.load(), read.model, origin=read.origin)
            assert files(back) == files(out)


def test_a_published_model_becomes_a_reward_model_with_a_pad(tmp_path: Path) -> None:
    model = KINDS["llama"]
    write_folder(tmp_path / "lm", random_params(model), model)
    read = read_folder(tmp_path / "lm").for_tokenizer(43, 43)
    params = random_params(read.model, scalar=True)
    with_head = params | {"unembedding": read.load()["unembedding"]}
    write_folder(tmp_path / "rm", with_head, read.model, origin=read.origin, special_ids={"pad": 43, "eos": 2})
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (44, 43)
    assert_same(read_folder(tmp_path / "rm").load(), params)


def test_each_parameter_is_placed_once_and_one_tensor_is_held(tmp_path: Path) -> None:
    model = KINDS["gpt2"]
    params = random_params(model)
    write_folder(tmp_path / "out", params, model)
    folder = read_folder(tmp_path / "out")
    alive: list[weakref.ref] = []

    class Watched:
        """The folder's tensors; counts those that are still in memory when the next is read."""

        names, where = folder.tensors.names, folder.tensors.where

        def tensor(self, name: str) -> np.ndarray:
            assert not [value for value in alive if value() is not None], name
            value = folder.tensors.tensor(name)
            alive.append(weakref.ref(value))
            return value

    placed: dict[str, tuple[int, ...]] = {}

    def place(path: str, host: np.ndarray) -> jax.Array:
        assert path not in placed and host.flags.c_contiguous and host.dtype == np.float32
        placed[path] = host.shape
        return jnp.array(host, copy=True)

    read = pretrained(folder.where, folder.origin["config"], Watched())
    assert_same(read.load(place=place), params)
    assert placed == parameter_shapes(model, scalar=False)
    assert len(alive) > 20


def test_reading_onto_eight_devices(tmp_path: Path) -> None:
    model = KINDS["llama"]
    params = random_params(model)
    write_folder(tmp_path / "out", params, model)
    mesh = jax.make_mesh((8,), ("data",))

    def place(path: str, host: np.ndarray) -> jax.Array:
        split = PartitionSpec("data") if host.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(host, NamedSharding(mesh, split))

    loaded = read_folder(tmp_path / "out").load(place=place)
    kernel = loaded["block_0"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 40)}
    assert_same(loaded, params)


def test_files_of_gpt2_as_they_were_published(published: Path, tmp_path: Path) -> None:
    """Without the prefix, with the mask as a buffer, without architectures, with torch_dtype."""
    shutil.copytree(published / "gpt2", tmp_path / "model")

    file = tmp_path / "model" / "model.safetensors"
    held = {name.removeprefix("transformer."): value for name, value in safetensors.load_file(file).items()}
    held["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.uint8))
    held["lm_head.weight"] = held["wte.weight"].copy()
    safetensors.save_file(held, file)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["architectures"], config["dtype"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    read = read_folder(tmp_path / "model")
    assert_same(read.load(), read_folder(published / "gpt2").load())
    write_folder(tmp_path / "back", read.load(), read.model, origin=read.origin)
    assert files(tmp_path / "back") == files(published / "gpt2")


def test_only_the_tokenizers_ids_have_a_logit(published: Path) -> None:
    read = read_folder(published / "llama").for_tokenizer(41, 43)
    params = read.load()
    assert params["embedding"].shape == (44, 24) and params["unembedding"].shape == (24, 44)
    assert jax.eval_shape(network(read.model), params).shape[-1] == 41
    with pytest.raises(UserError, match=r"llama: its tokenizer has ids up to 43, its embedding has 43 rows"):
        read_folder(published / "llama").for_tokenizer(44, 0)


def test_the_fingerprint_sees_every_file(published: Path, tmp_path: Path) -> None:
    before = read_folder(published / "llama").fingerprint
    shutil.copytree(published / "llama", tmp_path / "model")
    assert read_folder(tmp_path / "model").fingerprint == before
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_folder(tmp_path / "model").fingerprint != before
