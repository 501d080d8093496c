"""What is wrong with a Hugging Face folder is said in one line that begins with the file."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.huggingface import read_folder, write_folder
from tests.cases import case
from tests.made_params import random_params, shapes_traced_once  # noqa: F401

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("shapes_traced_once")]

safetensors = pytest.importorskip("safetensors.numpy")

SMALL: dict[str, Any] = {"vocab_size": 43, "context": 32, "width": 24, "layers": 2, "heads": 4, "ffn_width": 28}
LLAMA = ModelConfig(**SMALL, kv_heads=2, head_width=10, tied=False)
GPT2 = ModelConfig.gpt2(**SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in two files, a GPT-2 and a reward model in one each, all of them fine."""
    folder = tmp_path_factory.mktemp("whole")
    write_folder(folder / "llama", random_params(LLAMA), LLAMA, shard_bytes=30_000)
    write_folder(folder / "gpt2", random_params(GPT2), GPT2)
    write_folder(folder / "rm", random_params(LLAMA, True), LLAMA)
    for name in ("llama", "gpt2", "rm"):
        read_folder(folder / name).load()
    return folder


def settings(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of the one file."""

    def damage(folder: Path) -> None:
        held = safetensors.load_file(folder / "model.safetensors")
        change(held)
        safetensors.save_file(held, folder / "model.safetensors")

    return damage


def text(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def cut(keep: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Cuts the one file after keep(bytes of its header, bytes of all)."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: keep(struct.unpack("<Q", content[:8])[0], len(content))])

    return damage


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unnamed(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.more.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(listed))


QUERY = "model.layers.0.self_attn.q_proj.weight"
# (folder, what happens to it, the file or folder that the error begins with, what else it names)
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str, list[str]]] = {
    "no folder": ("gpt2", shutil.rmtree, "", ["no such folder"]),
    "no config": ("gpt2", lambda f: (f / "config.json").unlink(), "", ["config.json"]),
    "config cut": ("gpt2", text("config.json", '{"a": '), "config.json", []),
    "config a list": ("gpt2", text("config.json", "[]"), "config.json", ["list"]),
    "generation a list": ("gpt2", text("generation_config.json", "[]"), "generation_config.json", ["list"]),
    "unknown": ("gpt2", settings(model_type="mamba"), "config.json", ["'mamba'", "gpt2, gpt_neox, llama"]),
    "no kind": ("gpt2", settings(model_type=None), "config.json", ["model_type", "nothing"]),
    "odd kind": ("gpt2", settings(model_type=["gpt2"]), "config.json", ["model_type"]),
    "vision": ("gpt2", settings(model_type="gemma3"), "config.json", ["'gemma3'", "its text part"]),
    "no head": ("gpt2", settings(architectures=["GPT2Model"]), "config.json", ["GPT2Model", "GPT2LMHeadModel"]),
    "quantised": ("gpt2", settings(quantization_config={"bits": 4}), "config.json", ["quantization_config"]),
    "sees all": ("llama", settings(is_causal=False), "config.json", ["is_causal"]),
    "rope": ("llama", settings(rope_scaling={"rope_type": "su"}), "config.json", ["rope_scaling", "rope_type", "su"]),
    "rope factor": (
        "llama",
        settings(rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": -2}),
        "config.json",
        ["factor", "-2"],
    ),
    "labels": ("rm", settings(id2label={"0": "bad", "1": "good"}), "config.json", ["id2label", "one label"]),
    "two labels": ("rm", settings(id2label=None, num_labels=None), "config.json", ["num_labels", "one label"]),
    "bias": ("rm", settings(rlhf_jax={"score_bias": "0"}), "config.json", ["rlhf_jax", "score_bias"]),
    "width": ("llama", settings(hidden_size=32), "model-00001-of-00002.safetensors", ["embed_tokens", "[43, 32]"]),
    "vocabulary": ("llama", settings(vocab_size=44), "model-00001-of-00002.safetensors", ["[43, 24]", "[44, 24]"]),
    "key heads": ("llama", settings(num_key_value_heads=4), "model-00001-of-00002.safetensors", ["k_proj", "[40, 24]"]),
    "more layers": ("llama", settings(num_hidden_layers=3), "", ["model.layers.2.", "(9 of ", "3 layers"]),
    "fewer layers": ("llama", settings(num_hidden_layers=1), "model-0000", ["'model.layers.1.", "no place"]),
    "header cut": ("gpt2", cut(lambda header, size: 8 + header // 2), "model.safetensors", ["truncated"]),
    "data cut": ("gpt2", cut(lambda header, size: size - 1), "model.safetensors", ["truncated"]),
    "empty": ("gpt2", cut(lambda header, size: 0), "model.safetensors", ["truncated"]),
    "folder for a file": ("llama", lambda f: (f / "model.safetensors").mkdir(), "model.safetensors", ["unreadable"]),
    "no shard": ("llama", lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of", ["missing"]),
    "not in its shard": ("llama", unnamed, "model-00002-of", ["'model.more.weight'", "index"]),
    "index cut": ("llama", text("model.safetensors.index.json", "{"), "model.safetensors.index.json", []),
    "index odd": ("llama", text("model.safetensors.index.json", "{}"), "model.safetensors.index.json", ["weight_map"]),
    "pickle": ("gpt2", pickled, "", ["pytorch_model.bin", "safetensors"]),
    "missing": ("rm", tensors(lambda held: held.pop(QUERY)), "", [QUERY, "missing"]),
    "extra": ("rm", tensors(lambda held: held.update(odd=held[QUERY])), "model.safetensors", ["'odd'", "no place"]),
    "head's bias": (
        "rm",
        tensors(lambda held: held.update({"score.bias": np.ones(1, np.float32)})),
        "model.safetensors",
        ["'score.bias'", "no place"],
    ),
    "integers": (
        "rm",
        tensors(lambda held: held.update({QUERY: held[QUERY].astype(np.int8)})),
        "model.safetensors",
        [QUERY, "int8"],
    ),
    "another head": (
        "gpt2",
        tensors(lambda held: held.update({"lm_head.weight": held["transformer.wte.weight"] + 1})),
        "model.safetensors",
        ["'lm_head.weight'", "tie_word_embeddings"],
    ),
}


def test_what_is_wrong_is_one_line_that_names_file_and_field(whole: Path, tmp_path: Path) -> None:
    for number, (name, row) in enumerate(DAMAGES.items()):
        with case(name):
            kind, damage, file, named = row
            folder = tmp_path / f"{number}" / "model"
            shutil.copytree(whole / kind, folder)
            damage(folder)
            with pytest.raises(UserError) as caught:
                read_folder(folder).load()
            message = str(caught.value)
            assert message.startswith(str(folder / file) if file else f"{folder}:")
            assert "\n" not in message and len(message) < 500
            for word in named:
                assert word in message


def test_weights_outside_their_folder_and_pipes_are_not_opened(whole: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in (whole / "llama").glob("model-*"))

    def index(name: str) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            path = folder / "model.safetensors.index.json"
            path.write_text(path.read_text().replace(shards[0], name))

        return damage

    def replaced(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return damage

    outside = str(whole / "llama" / shards[0])
    for number, (kind, damage, said) in enumerate(
        (
            ("llama", index(outside), "expected the name of a file in this folder, got"),
            ("llama", index("../model/" + shards[0]), "expected the name of a file in this folder, got"),
            ("llama", index(".."), "expected the name of a file in this folder, got"),
            ("llama", replaced(shards[0], lambda path: path.symlink_to(outside)), "got a link to"),
            ("llama", replaced(shards[0], os.mkfifo), "expected a file, got a pipe"),
            ("llama", replaced(shards[0], lambda path: path.symlink_to("/dev/zero")), "got a link to"),
            ("gpt2", replaced("model.safetensors", os.mkfifo), "expected a file, got a pipe"),
            ("gpt2", replaced("model.safetensors", lambda path: path.symlink_to(outside)), "got a link to"),
        )
    ):
        with case((number, said)):
            folder = tmp_path / f"{number}" / "model"
            shutil.copytree(whole / kind, folder)
            damage(folder)
            with pytest.raises(UserError) as caught:
                read_folder(folder).load()
            assert said in str(caught.value) and str(folder) in str(caught.value)
    # The hub's cache links from a snapshot to blobs.
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1f3c", tmp_path / "hub" / "blobs"
    shutil.copytree(whole / "gpt2", snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "00ff")
    (snapshot / "model.safetensors").symlink_to("../../blobs/00ff")
    read_folder(snapshot).load()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"out: expected a new or empty folder"):
        write_folder(tmp_path / "out", random_params(GPT2), GPT2)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]


def test_parameters_that_the_family_has_no_place_for(tmp_path: Path) -> None:
    model = LLAMA
    params = random_params(model)
    params["block_0"]["attention"]["query"]["lora_a"] = np.ones((24, 2), np.float32)
    with pytest.raises(UserError, match=r"out: parameter 'block_0.attention.query.lora_a' .*no place"):
        write_folder(tmp_path / "out", params, model)
    del params["block_0"]
    with pytest.raises(UserError, match=r"out: parameter 'block_0.attention.key.kernel' .*requires it"):
        write_folder(tmp_path / "out", params, model)
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_family_can_hold(tmp_path: Path) -> None:
    model = ModelConfig(**SMALL, norm="layer", qk_norm=True)
    with pytest.raises(UserError, match="norm=layer, qk_norm=True"):
        write_folder(tmp_path / "out", random_params(model), model)
