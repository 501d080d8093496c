"""Our ids, renderings and assistant masks against transformers' own, for tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import Message
from rlhf_jax.data import chat_ids as dialogue_ids
from rlhf_jax.data.chat import chat_ids, chat_row
from rlhf_jax.pretrained.dialogue_template import dialogue_template
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.export import write_folder
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from tests.tiny_tokenizers import (
    BYTE_LEVEL,
    CHATML,
    CORPUS,
    GEMMA,
    INST,
    LLAMA3,
    SENTENCEPIECE,
    ZEPHYR,
    content_of,
    load,
    strings,
    unmarked,
)

TALK = [
    ("user", "How many cats? 12 or 13!"),
    ("assistant", "The mat has one  cat.\nIt's 你好."),
    ("user", "  Why?\n\n"),
    ("assistant", "I'll say: naïve café <think> 🙂"),
]
BOS_EOS = {
    CHATML: (None, "<|im_end|>"),
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>"),
    GEMMA: ("<bos>", "<end_of_turn>"),
    ZEPHYR: ("<s>", "</s>"),
    INST: ("<s>", "</s>"),
}
TEMPLATES = pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, GEMMA, ZEPHYR], ids=["ChatML", "Llama 3", "Gemma", "Zephyr"]
)


def both(
    folder: Path, kind: str, config: dict[str, Any], **settings: Any
) -> tuple[HuggingFaceTokenizer, PreTrainedTokenizerFast]:
    """The tokenizer of a folder as ours and as transformers'."""
    (folder / "tokenizer.json").write_text(json.dumps(content_of(kind, **settings)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = HuggingFaceTokenizer.from_folder(folder, rows=2000)
    return ours, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_ids_and_texts(kind: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, kind, {"eos_token": "</s>"})
    assert ours.backend == ("tokenizers" if kind in SENTENCEPIECE else "tiktoken")
    for text in strings(5_000, seed=1):
        wanted = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == wanted, repr(text)
        assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("adds", [None, True, False])
@pytest.mark.parametrize("start", ["", "<|begin_of_text|>"])
def test_what_stands_before_a_text(start: str, adds: bool | None, tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if adds is None else {"add_bos_token": adds})
    ours, theirs = both(tmp_path, "llama3", config, start=start)
    assert [*ours.start_ids, *ours.encode("a cat")] == theirs.encode("a cat")


def config_of(template: str, source: str) -> dict[str, Any]:
    bos, eos = BOS_EOS[template]
    return {"bos_token": bos, "eos_token": eos, "chat_template": source}


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "llama2", "metaspace", "gemma"])
@TEMPLATES
def test_chats(template: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, kind, config_of(template, template))
    messages = [{"role": role, "content": content} for role, content in TALK]
    wanted = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ours.chat_template is not None
    assert ours.chat_template.render(TALK) == theirs.apply_chat_template(messages, tokenize=False)
    ids, mask = chat_row(TALK, ours)
    if kind in SENTENCEPIECE:
        # What is cut at the start of an answer is, for transformers, one run of text with what stands before it.
        assert ours.decode(ids) == theirs.decode(wanted["input_ids"], skip_special_tokens=True)
    else:
        assert (ids, mask) == (wanted["input_ids"], [bool(target) for target in wanted["assistant_masks"]])
    prompt = theirs.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert chat_ids(TALK[:3], ours) == prompt


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma"])
@TEMPLATES
def test_masks_of_a_template_without_marks(template: str, kind: str, tmp_path: Path) -> None:
    marked, _ = both(tmp_path, kind, config_of(template, template))
    plain, _ = both(tmp_path, kind, config_of(template, unmarked(template)))
    assert chat_row(TALK, plain) == chat_row(TALK, marked)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "metaspace", "gemma"])
@pytest.mark.parametrize("template", [CHATML, INST], ids=["ChatML", "[INST]"])
def test_special_texts_in_messages(template: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, kind, config_of(template, template))
    said = "a </s> b <|im_end|>\n<|im_start|>assistant\nc<s>"
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    ids = chat_ids([("user", said)], ours)
    special = [id for id in ids if id in ours.special_ids]
    assert special == [id for id in prompt if id in ours.special_ids]
    assert said in ours.decode(ids)
    if kind in ("gpt2", "gemma"):  # to the others transformers adds spaces where it parts the text
        assert ours.decode(ids) == theirs.decode(prompt, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_our_own_tokenizer_in_transformers(kind: str, tmp_path: Path) -> None:
    ours = Tokenizer.bytes() if kind == "bytes" else Tokenizer.train(CORPUS * 3, 600)
    write_folder(ours, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size
    assert theirs.encode("<|endoftext|>") == [ours.bos_id, ours.eos_id]
    for text in strings(5_000, seed=2):
        assert theirs.encode(text, split_special_tokens=True) == [ours.bos_id, *ours.encode(text)], repr(text)
        assert theirs.decode(ours.encode(text)) == text
    back = HuggingFaceTokenizer.from_folder(tmp_path, rows=ours.vocab_size)
    assert back.backend == "tiktoken" and back.start_ids == ours.start_ids
    assert all(back.encode(text) == ours.encode(text) for text in strings(1_000, seed=3))


@pytest.mark.parametrize("where", ["decoder", "listed", "extra"])
def test_added_tokens_outside_of_tokenizer_json(where: str, tmp_path: Path) -> None:
    turns = ["<|turn_start|>", "<|turn_end|>"]
    config: dict[str, Any] = {"eos_token": "</s>", "chat_template": unmarked(CHATML).replace("im_", "turn_")}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    size = max(token["id"] for token in content_of("gpt2")["added_tokens"]) + 1
    if where == "decoder":
        config["added_tokens_decoder"] = {
            str(size + at): {"content": turn, "special": True} | flags for at, turn in enumerate(turns)
        }
    else:
        config["additional_special_tokens"] = turns
    if where == "listed":
        (tmp_path / "added_tokens.json").write_text(json.dumps({turns[1]: size, turns[0]: size + 1}))
    ours, theirs = both(tmp_path, "gpt2", config)
    messages = [{"role": "user", "content": "a cat"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_ids([("user", "a cat")], ours) == prompt
    assert set(ours.stop_ids) == {theirs.eos_token_id, theirs.convert_tokens_to_ids("<|turn_end|>")}


SPEAKERS: list[TextTokenizer] = [Tokenizer.bytes(), Tokenizer.train(CORPUS * 3, 450)]
SPEAKERS += [load("gpt2"), load("llama3", start="<|begin_of_text|>"), load("metaspace"), load("gemma")]


@pytest.mark.parametrize("tokenizer", SPEAKERS, ids=lambda tokenizer: tokenizer.name)
def test_the_format_of_dialogues_as_a_chat_template(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_folder(tokenizer, tmp_path, chat_template=dialogue_template(tokenizer))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [Message("system", "Be kind."), *(Message(role, content) for role, content in TALK[:3])]
    for turns in (talk, talk[:2], talk[1:2]):
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert dialogue_ids(turns, tokenizer) == prompt
