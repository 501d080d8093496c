"""Models out of runs and into runs, by the functions under `rlhf-jax convert`."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import TrainState
from rlhf_jax.cli import convert, generate
from rlhf_jax.config import LoraConfig, ModelConfig, to_plain
from rlhf_jax.config.stages import PPOConfig, PretrainConfig, SFTConfig
from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Dialogue,
    Message,
    Prompt,
    Ranking,
    Text,
    chat_ids,
    dialogue_row,
    have_messages,
)
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.convert import export, import_model, value_network
from rlhf_jax.pretrained.dialogue_template import dialogue_template
from rlhf_jax.pretrained.huggingface import write_folder
from rlhf_jax.pretrained.peft import write_adapter
from rlhf_jax.pretrained.source import Source, on_base, open_source, start_from, with_template
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import release
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.export import as_hugging_face
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers import pretrain
from tests.cases import case
from tests.made_params import random_adapter, random_params, shapes_traced_once  # noqa: F401
from tests.made_runs import write_run
from tests.tiny_tokenizers import CHATML, CORPUS, SPECIAL, ZEPHYR, content_of, load

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("shapes_traced_once")]

TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) + 60
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the four stages with the recipe's kind of model; of SFT an adapter, of the others whole networks.

    `test_sources.py` exports what the stages themselves have written.
    """
    root, tokenizer = tmp_path_factory.mktemp("runs"), Tokenizer.bytes()
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, context=48, width=16, layers=2, heads=4, kv_heads=2, qk_norm=True,
        embedding_scale=4.0,
    )  # fmt: skip
    write_run(root / "base", "pretrain", random_params(model), model, tokenizer)
    fingerprint = open_source(str(root / "base"), stages=("pretrain",)).fingerprint
    beside = {"init": str(root / "base"), "fingerprint": fingerprint, "lora": to_plain(LORA)}
    adapter = random_adapter(model, LORA, trained=True)
    write_run(root / "sft", "sft", adapter, model, tokenizer, base=beside)
    scores = {"score_mean": 0.5, "score_scale": 2.0}
    write_run(root / "judge", "reward", random_params(model, scalar=True), model, tokenizer, **scores)
    both = {"policy": random_params(model, seed=1), "critic": random_params(model, scalar=True, seed=2)}
    # What is handed on is not always what was trained last: it may be the mean of many steps.
    write_run(root / "ppo", "ppo", both, model, tokenizer, released=random_params(model, seed=3))
    return root


@functools.cache
def network(model: ModelConfig, scalar: bool) -> Callable[..., Any]:
    return jax.jit(Transformer(model, scalar=scalar).apply)


def output(source: Source) -> np.ndarray:
    """What a model says of some tokens."""
    return np.asarray(network(source.model, source.scalar)({"params": source.params()}, TOKENS))


RUNS = [("base", ("pretrain",)), ("sft", ("sft",)), ("ppo", ("ppo",)), ("judge", ("reward",))]


def test_an_exported_run_computes_what_the_run_does(runs: Path, tmp_path: Path) -> None:
    for row in RUNS:
        with case(row) as (name, stages):
            said = export(str(runs / name), tmp_path / name)
            before = open_source(str(runs / name), stages=stages)
            after = open_source(f"hf:{tmp_path / name}", stages=stages)
            assert ("SequenceClassification" in said) == before.scalar
            assert (after.score_mean, after.score_scale) == (before.score_mean, before.score_scale)
            assert after.tokenizer.encode("Say grey!") == before.tokenizer.encode("Say grey!")
            assert (after.tokenizer.eos_id, after.tokenizer.bos_id) == (
                before.tokenizer.eos_id,
                before.tokenizer.bos_id,
            )
            values = [output(before), output(after)]
            shared = None if before.scalar else min(value.shape[-1] for value in values)
            first, second = (value if before.scalar else value[..., :shared] for value in values)
            np.testing.assert_allclose(first, second, atol=1e-4)


def test_there_and_back_the_parameters_are_the_same(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "base"), tmp_path / "hf")
    import_model(f"hf:{tmp_path / 'hf'}", tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "again")
    first, again = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("hf", "again"))
    assert first == again
    for name in first:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_an_adapter_alone_goes_out_and_comes_in(runs: Path, tmp_path: Path) -> None:
    said = export(str(runs / "sft"), tmp_path / "adapter", adapter=True)
    assert "adapter of rank 2" in said
    before, after = (
        open_source(str(runs / "sft"), stages=("sft",)),
        open_source(f"peft:{tmp_path / 'adapter'}", stages=("sft",)),
    )
    np.testing.assert_allclose(output(before), output(after), atol=1e-5)
    with pytest.raises(UserError, match=r"expected a run that trained an adapter .*, got a whole network"):
        export(str(runs / "base"), tmp_path / "other", adapter=True)


def test_the_value_network_is_written_as_a_model_with_a_score(runs: Path, tmp_path: Path) -> None:
    assert "SequenceClassification" in export(str(runs / "ppo"), tmp_path / "critic", critic=True)
    saved = RunFolder.open(runs / "ppo", stages=("ppo",)).load_params()["critic"]
    read = open_source(f"hf:{tmp_path / 'critic'}", stages=("reward",)).params()
    np.testing.assert_array_equal(read["score"]["kernel"], saved["score"]["kernel"])
    np.testing.assert_allclose(read["score"]["bias"], saved["score"]["bias"], rtol=1e-6)
    with pytest.raises(UserError, match="expected a ppo run, which has a value network, got a sft run"):
        export(str(runs / "sft"), tmp_path / "none", critic=True)


def test_after_an_alarm_the_value_network_is_that_of_the_released_policy(runs: Path, tmp_path: Path) -> None:
    model = open_source(str(runs / "base"), stages=("pretrain",)).model
    nothing = {"config": {}, "inputs": {}, "model": to_plain(model)}
    run = RunFolder.create(tmp_path / "ppo", stage="ppo", tokenizer=Tokenizer.bytes(), **nothing)
    critics = {step: random_params(model, scalar=True, seed=step) for step in (4, 8)}
    for step, critic in critics.items():
        params = {"policy": random_params(model), "critic": critic}
        Checkpoints(run.checkpoints).save(step, TrainState(jnp.int32(step), params, {}, jax.random.key(0), {}), {})
    release(run, random_params(model), 4)
    found = value_network(open_source(str(run.path), stages=("ppo",))).params()
    jax.tree.map(np.testing.assert_array_equal, found, critics[4])
    shutil.rmtree(run.checkpoints / "00000004")
    with pytest.raises(UserError, match=r"expected the value network of step 4, .* got the steps \[8\]"):
        value_network(open_source(str(run.path), stages=("ppo",)))


def test_a_value_network_is_on_the_base_of_its_reward_model(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_source(str(runs / "base"), stages=("pretrain",))
    wide = dataclasses.replace(base.model, width=24, heads=2)
    judge = random_params(wide, scalar=True, seed=4)
    tuned = random_adapter(wide, LORA, trained=True) | {"score": jax.tree.map(lambda x: 2 * x, judge["score"])}
    whole = random_params(wide, scalar=True, seed=5)
    beside = {"init": base.spec, "fingerprint": base.fingerprint, "lora": to_plain(LORA)}
    policy = random_adapter(base.model, LORA, trained=True)
    judged = write_run(tmp_path / "runs" / "judge", "reward", judge, wide, base.tokenizer)
    record = {
        "config": {"reward": "runs/judge", "name": "ppo"},
        "inputs": {"reward": open_source(str(judged.path), stages=("reward",)).fingerprint},
    }
    other = random_params(base.model, seed=6)
    for name, start, critic, under in (("ppo", policy, tuned, beside), ("whole", other, whole, None)):
        with case(name):
            both = {"policy": start, "critic": critic}
            record["config"]["name"] = name
            run = write_run(tmp_path / "runs" / name, "ppo", both, base.model, base.tokenizer, base=under, **record)
            monkeypatch.chdir(tmp_path)
            export(str(run.path), tmp_path / f"critic-{name}", critic=True)
            found = open_source(f"hf:{tmp_path / f'critic-{name}'}", stages=("reward",))
            assert (found.model.width, found.model.heads) == (24, 2)
            params, kernel = found.params(), judge["block_1"]["attention"]["query"]["kernel"]
            factors = critic["block_1"]["attention"]["query"]
            merged = kernel + 2 * factors["lora_a"] @ factors["lora_b"] if under else factors["kernel"]
            np.testing.assert_allclose(params["block_1"]["attention"]["query"]["kernel"], merged, atol=1e-6)
            np.testing.assert_array_equal(params["score"]["kernel"], critic["score"]["kernel"])
            # From another folder too.
            monkeypatch.chdir(runs)
            again = value_network(open_source(str(run.path), stages=("ppo",)))
            np.testing.assert_allclose(again.params()["block_1"]["attention"]["query"]["kernel"], merged, atol=1e-6)
    shutil.rmtree(judged.path)
    with pytest.raises(UserError, match=r"expected its reward model runs/judge, .* got no such folder; put it back"):
        export(str(run.path), tmp_path / "gone", critic=True)
    write_run(judged.path, "reward", whole, wide, base.tokenizer)
    with pytest.raises(
        UserError, match=r"expected its reward model runs/judge, .* as it was, with fingerprint .*, got"
    ):
        export(str(run.path), tmp_path / "changed", critic=True)


@pytest.fixture(scope="module")
def chat_model() -> ModelConfig:
    """A model with a row for each token of `tiny_tokenizers`."""
    return ModelConfig(vocab_size=600, context=32, width=8, layers=1, heads=2)


def published(folder: Path, model: ModelConfig, config: dict[str, Any], generation: Any) -> Path:
    """A folder as transformers writes it; generation: content of generation_config.json, None for no such file."""
    write_folder(folder, random_params(model), model)
    for name, content in (
        ("tokenizer.json", content_of("gpt2")),
        ("tokenizer_config.json", config),
        ("generation_config.json", generation),
    ):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


END, TURN = SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|im_end|>")
TEXT_ENDS, TURN_ENDS = {"eos_token": "<|endoftext|>"}, {"eos_token": "<|im_end|>"}
# tokenizer_config.json's ends and template, generation_config.json -> that of the export, whose lists end a response.
ENDS: list[tuple[dict[str, Any], Any, Any]] = [
    (TEXT_ENDS | {"chat_template": CHATML}, {"eos_token_id": END, "n": 2}, {"eos_token_id": [END, TURN], "n": 2}),
    (TEXT_ENDS | {"chat_template": CHATML}, None, {"eos_token_id": [END, TURN]}),
    (TEXT_ENDS | {"chat_template": CHATML}, {"eos_token_id": None}, {"eos_token_id": [END, TURN]}),
    (TURN_ENDS | {"chat_template": CHATML}, {"eos_token_id": END}, {"eos_token_id": [TURN, END]}),
    (TURN_ENDS | {"chat_template": CHATML}, {"eos_token_id": [END, 5]}, {"eos_token_id": [TURN, END, 5]}),
    (TURN_ENDS, {"temperature": 0.6}, {"eos_token_id": TURN, "temperature": 0.6}),
    # As published, where nothing is missing.
    (TURN_ENDS | {"chat_template": CHATML}, {"eos_token_id": [END, TURN]}, {"eos_token_id": [END, TURN]}),
    (TEXT_ENDS, {"eos_token_id": END}, {"eos_token_id": END}),
]  # fmt: skip


def test_an_export_names_every_end(chat_model: ModelConfig, tmp_path: Path) -> None:
    for number, row in enumerate(ENDS):
        with case(row) as (config, generation, expected):
            folder = published(tmp_path / f"{number}", chat_model, config, generation)
            export(f"hf:{folder}", tmp_path / f"{number}-out")
            assert json.loads((tmp_path / f"{number}-out" / "generation_config.json").read_text()) == expected
            before, after = (
                open_source(f"hf:{tmp_path / name}", stages=("sft",)).tokenizer
                for name in (str(number), f"{number}-out")
            )
            assert before.fingerprint == after.fingerprint and before.stop_ids == after.stop_ids
            ends = expected["eos_token_id"]
            assert set(after.stop_ids) == set(ends if isinstance(ends, list) else [ends])


TALK = [Message("system", "Be kind."), Message("user", " Hi\n"), Message("assistant", "Yes.")]
TALK += [Message("user", "3 + 4?"), Message("assistant", "\n7 'tis\n\n")]
SPEAKERS: list[tuple[TextTokenizer, str]] = [
    (Tokenizer.bytes(), "<|begin|>"),
    (Tokenizer.train(CORPUS * 3, 450), "<|begin|>"),
    (load("gpt2"), ""),
    (load("llama3", start="<|begin_of_text|>"), "<|begin_of_text|>"),
    (load("metaspace"), "<s> "),  # SentencePiece's space before a text, which follows no special token
    (load("llama2"), "<s>"),
    (load("gemma"), "<s>"),
]


def test_the_format_of_dialogues_as_a_chat_template() -> None:
    for tokenizer, start in SPEAKERS:
        with case(tokenizer.name):
            templated = as_hugging_face(tokenizer).with_template(dialogue_template(tokenizer))
            end = "<|endoftext|>"
            text = f"{start}Be kind.\n\nHuman:  Hi\n\n\nAssistant: Yes.{end}\n\nHuman: 3 + 4?\n\nAssistant:"
            assert templated.chat_template is not None
            assert templated.chat_template.render(TALK[:4], add_generation_prompt=True) == text
            assert templated.chat_template.render(TALK) == f"{text} \n7 'tis\n\n{end}"
            assert templated.stop_ids == tokenizer.stop_ids
            # Llama 2's normalizer adds a space after every special token, and so after an answer's end.
            for talk in (TALK[:2], TALK[1:2], *([TALK[:4], TALK[3:4]] if tokenizer.name != "llama2" else [])):
                assert chat_ids(talk, templated) == chat_ids(talk, tokenizer)
            if tokenizer.name != "llama2":
                assert dialogue_row(TALK, templated) == dialogue_row(TALK, tokenizer)
            with pytest.raises(UserError, match=r"expected user and assistant messages, .* got the role tool"):
                templated.chat_template.render([("tool", "x")])


def test_the_template_that_was_trained_is_exported(runs: Path, tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=600, context=32, width=8, layers=1, heads=2)
    hugging = HuggingFaceTokenizer.from_content(content_of("gpt2"), TEXT_ENDS, rows=600, name="m")
    own = Tokenizer.bytes()
    rows: list[tuple[str, TextTokenizer, dict[str, Any], str | None]] = [
        ("sft", own, {"dialogues": True}, dialogue_template(own)),
        ("ppo", hugging, {"dialogues": True}, dialogue_template(hugging)),
        ("reward", own, {"dialogues": True, "score_mean": 0.0, "score_scale": 1.0}, dialogue_template(own)),
        ("sft", own, {}, dialogue_template(own)),  # from before it was recorded
        ("sft", own, {"dialogues": False}, None),
        ("pretrain", own, {}, None),
        ("pretrain", own, {"dialogues": True}, dialogue_template(own)),  # an import of a tuned model
        ("sft", hugging.with_template(CHATML), {"dialogues": True}, CHATML),
    ]
    for number, row in enumerate(rows):
        with case(row) as (stage, tokenizer, summary, expected):
            params = random_params(model, scalar=stage == "reward")
            write_run(tmp_path / f"{number}", stage, params, model, tokenizer, **summary)
            export(str(tmp_path / f"{number}"), tmp_path / f"out{number}")
            file = tmp_path / f"out{number}" / "chat_template.jinja"
            assert (file.read_text() if file.exists() else None) == expected
            after = open_source(f"hf:{tmp_path / f'out{number}'}", stages=("reward" if stage == "reward" else "sft",))
            if expected is not None:
                assert chat_ids(TALK[:4], after.tokenizer) == chat_ids(TALK[:4], tokenizer)


def adapter_folder(folder: Path, base: str, model: ModelConfig, **files: Any) -> Path:
    """An adapter in PEFT's layout, with files of its own tokenizer."""
    lora = random_adapter(dataclasses.replace(model, scan_layers=False), LORA, trained=True)
    write_adapter(folder, lora, LORA, model, "llama", base=base)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


TURNS = content_of("gpt2") | {
    "added_tokens": [
        *content_of("gpt2")["added_tokens"],
        {"id": 590, "content": "<turn>", "special": True, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False},
    ]
}
BASE_FILES = TEXT_ENDS | {"chat_template": CHATML, "pad_token": "<bos>"}
# An adapter's files -> (eos, every end, chat template, pad) of the model.
ADAPTERS: list[tuple[dict[str, Any], tuple[int, set[int], str | None, int]]] = [
    ({}, (END, {END, TURN}, CHATML, 5)),
    ({"chat_template__jinja": ZEPHYR}, (END, {END}, ZEPHYR, 5)),
    ({"tokenizer_config__json": {"eos_token": "<|im_end|>"}}, (TURN, {END, TURN}, CHATML, 5)),
    ({"tokenizer_config__json": {"chat_template": ZEPHYR, "eos_token": "</s>"}}, (2, {2, END}, ZEPHYR, 5)),
    (
        {"special_tokens_map__json": {"eos_token": "</s>"}, "generation_config__json": {"eos_token_id": [4]}},
        (0, {0, 4}, CHATML, 5),
    ),
    ({"tokenizer__json": content_of("gpt2"), "tokenizer_config__json": TURN_ENDS}, (TURN, {END, TURN}, CHATML, 600)),
    (
        {"tokenizer__json": TURNS, "tokenizer_config__json": {"eos_token": "<turn>"}},
        (590, {590, END, TURN}, CHATML, 600),
    ),
    (
        {
            "tokenizer_config__json": {
                "added_tokens_decoder": {"455": {"content": "<turn>", "special": True}},
                "eos_token": "<turn>",
            }
        },
        (455, {455, END, TURN}, CHATML, 5),
    ),
]


def test_an_adapters_own_tokenizer_is_used(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=600, context=32, width=8, layers=1, heads=2)
    base = published(tmp_path / "base", model, BASE_FILES, {"eos_token_id": END})
    for number, row in enumerate(ADAPTERS):
        with case(row) as (files, (eos, ends, template, pad)):
            folder = adapter_folder(tmp_path / f"{number}", str(base), model, **files)
            source = open_source(f"peft:{folder}", stages=("sft",))
            tokenizer = source.tokenizer
            assert (tokenizer.eos_id, set(tokenizer.stop_ids), tokenizer.pad_id) == (eos, ends, pad)
            assert (tokenizer.chat_template.source if tokenizer.chat_template else None) == template
            assert source.model.vocab_rows == max(600, pad + 1) and source.model.vocab_size == tokenizer.vocab_size
            # A run that goes on training this adapter finds the base with the same rows again.
            start = start_from(source, LORA, lambda: pytest.fail("needs no key"))
            write_run(tmp_path / f"run{number}", "sft", start.params, source.model, tokenizer, base=start.record)
            again = open_source(str(tmp_path / f"run{number}"), stages=("sft",))
            jax.tree.map(np.testing.assert_array_equal, again.params(), source.params())


def test_the_base_of_an_adapter(runs: Path, tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=600, context=32, width=8, layers=1, heads=2)
    base = published(tmp_path / "base", model, BASE_FILES, None)
    folder = adapter_folder(tmp_path / "hub#1", "org/Base-1B", model)
    lost = rf"^{folder}/adapter_config\.json: field 'base_model_name_or_path': expected the folder of .*, got 'org/Base"
    with pytest.raises(UserError, match=lost + r".*; use --base FOLDER \(or peft:ADAPTER#FOLDER\)$"):
        open_source(f"peft:{folder}", stages=("sft",))
    with pytest.raises(UserError, match=r"^base: expected the folder of a published model or of a run, got 'nowhere'"):
        open_source(on_base(f"peft:{folder}", "nowhere"), stages=("sft",))
    given = open_source(on_base(f"peft:{folder}", str(base)), stages=("sft",))
    assert given.base is not None and given.base.spec == f"hf:{base}"
    assert open_source(given.spec, stages=("sft",)).fingerprint == given.fingerprint
    for spec in (f"peft:{folder}#hf:{base}", f"peft:{folder}#{base}"):
        assert open_source(spec, stages=("sft",)).fingerprint == given.fingerprint
    assert on_base("runs/x", "b") == "runs/x" and on_base("peft:x", "") == "peft:x"
    import_model(on_base(f"peft:{folder}", str(base)), tmp_path / "merged")
    # Under an adapter of a run, which keeps the run's tokenizer where the adapter's is the same.
    export(str(runs / "sft"), tmp_path / "own", adapter=True)
    assert (tmp_path / "own" / "tokenizer.json").exists() and (tmp_path / "own" / "chat_template.jinja").exists()
    own = open_source(on_base(f"peft:{tmp_path / 'own'}", str(runs / "base")), stages=("sft",))
    assert isinstance(own.tokenizer, Tokenizer)
    (tmp_path / "own" / "chat_template.jinja").write_text(CHATML)
    own = open_source(f"peft:{tmp_path / 'own'}", stages=("sft",))
    assert own.tokenizer.chat_template is not None and own.tokenizer.chat_template.source == CHATML
    other = adapter_folder(tmp_path / "other", str(base), model, tokenizer__json=content_of("llama3"))
    with pytest.raises(
        UserError, match=rf"^{other}/tokenizer\.json: expected .* as id \d+, as the base model has it, got"
    ):
        open_source(f"peft:{other}", stages=("sft",))


def test_settings_for_an_adapter_and_a_template() -> None:
    with pytest.raises(UserError, match=r"^base: expected an adapter, peft:FOLDER, as init or reward, got 'runs/x'"):
        SFTConfig(name="a", init="runs/x", base="b")
    assert PPOConfig(name="a", init="runs/x", reward="peft:r", base="b").base == "b"
    with pytest.raises(UserError, match=r"^chat_template: expected a model to use it with, got no init"):
        SFTConfig(name="a", chat_template="t")
    with pytest.raises(UserError, match=r"^base: expected an adapter, peft:FOLDER, as the source, got 'runs/x'"):
        convert.Config(source="runs/x", target="hf:y", base="b")
    with pytest.raises(UserError, match=r"^base: expected an adapter, peft:FOLDER, as the model, got 'runs/x'"):
        generate.Config(run="runs/x", base="b")


def test_a_chat_template_in_place_of_the_models_own(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML)
    source = with_template(open_source(str(runs / "sft"), stages=("sft",)), str(file))
    assert source.tokenizer.chat_template is not None and source.tokenizer.chat_template.source == CHATML
    assert source.tokenizer.encode("a") == Tokenizer.bytes().encode("a")
    export(str(runs / "base"), tmp_path / "out", chat_template=str(file))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    for text, message in (("{% if %}", r"t\.jinja: chat template: line 1: Expected"), (" \n", "got the empty file")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            with_template(source, str(file))
    with pytest.raises(UserError, match=r"^chat_template: expected a readable text file, got 'none'"):
        with_template(source, "none")


def test_records_that_are_dialogues() -> None:
    user = (Message("user", "a"),)
    for record, expected in (
        (Text("a"), False),
        (Prompt("a"), False),
        (Prompt("a", turns=user), True),
        (Demonstration("a", "b", turns=user), True),
        (Comparison("a", "b", "c", turns=user), True),
        (Ranking("a", ("b", "c"), (1, 2)), False),
        (Dialogue(user), True),
        ("file:3", False),  # rows that were sampled name their place alone
    ):
        with case(record):
            assert have_messages([Text("x"), record]) == expected


def test_a_model_of_dialogues_that_is_pretrained_further_remains_one(runs: Path, tmp_path: Path) -> None:
    for init, expected in (("base", False), ("ppo", True)):
        with case(init):
            settings: dict[str, Any] = {"row_length": 16, "batch": 2, "steps": 0, "heldout_fraction": 0.0}
            talk = Text("\n\nHuman: a\n\nAssistant: b", messages=(Message("user", "a"), Message("assistant", "b")))
            config = PretrainConfig(init=str(runs / init), out=str(tmp_path / init), **settings)
            pretrain.run(config, texts=[talk])
            assert open_source(str(tmp_path / init), stages=("pretrain",)).dialogues is expected


def test_a_folder_in_use_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        export(str(runs / "base"), tmp_path / "out")


def test_a_target_that_cannot_be_written_is_refused() -> None:
    for target in ["gguf:out", "pypi:out", "hf:", "peft:", ""]:
        with case(target), pytest.raises(UserError, match=f"^target: expected .*hf:FOLDER.* got '{target}'"):
            convert.Config(source="runs/base", target=target)
