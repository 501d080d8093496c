"""Tokenizers that are spelled otherwise are the same; of those that are not, what differs is named."""

import dataclasses
import json
from typing import Any

import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.dialogue_template import dialogue_template
from rlhf_jax.pretrained.same_tokenizer import differences
from rlhf_jax.pretrained.source import same_tokenizer
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.chat_template import ChatTemplate
from rlhf_jax.tokenizers.export import as_hugging_face
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from tests.cases import case
from tests.made_runs import random_source
from tests.tiny_tokenizers import CHATML, CORPUS, LLAMA3, content_of, load, unmarked

pytestmark = pytest.mark.pretrained

CONFIG = {"eos_token": "</s>", "bos_token": "<s>"}
CHAT = CONFIG | {"chat_template": CHATML}


def made(
    config: dict[str, Any],
    *,
    kind: str = "llama3",
    model: dict[str, Any] | None = None,
    rows: int = 900,
    stops: list[int] | None = None,
    **parts: Any,
) -> HuggingFaceTokenizer:
    """A tokenizer with changes to tokenizer.json and to its model."""
    content = content_of(kind) | parts
    content["model"] = content["model"] | (model or {})
    return HuggingFaceTokenizer.from_content(content, config, rows=rows, name="m", ids={"eos": stops})


def spelled_merges(kind: str) -> list[str]:
    return [" ".join(merge) for merge in content_of(kind)["model"]["merges"]]


def flagged(kind: str, text: str, **flags: bool) -> list[dict[str, Any]]:
    return [token | flags if token["content"] == text else token for token in content_of(kind)["added_tokens"]]


def sequence(steps: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", steps: list(parts)}


COMMENTED = "{# as published #}" + CHATML.replace("{% if add", "{#- the prompt -#}{% if add")
QUOTED = CHATML.replace("'assistant'", '"assistant"').replace("message.content", "message['content']")
OWN, TRAINED = Tokenizer.bytes(), Tokenizer.train(CORPUS * 3, 400)
SAME: list[tuple[TextTokenizer, TextTokenizer]] = [
    (made(CONFIG), made(CONFIG | {"pad_token": "<bos>"})),
    (made(CONFIG), made(CONFIG | {"pad_token": "[PAD]"})),  # a token more
    (made(CONFIG | {"pad_token": "<bos>"}), made(CONFIG | {"pad_token": "<|im_start|>"})),
    (made(CONFIG), made(CONFIG, model={"merges": spelled_merges("llama3")})),
    (made(CONFIG, kind="llama2"), made(CONFIG, kind="llama2", model={"merges": spelled_merges("llama2")})),
    (made(CONFIG), made(CONFIG, model={"dropout": 0.1, "continuing_subword_prefix": ""})),
    (made(CONFIG), made(CONFIG, truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0})),
    (made(CONFIG), made(CONFIG | {"model_max_length": 9, "eos_token": {"content": "</s>"}}, rows=1000)),
    # Sequences of no step, of one, and of sequences.
    (made(CONFIG), made(CONFIG, normalizer={"type": "Sequence", "normalizers": []})),
    (made(CONFIG, kind="llama2"), made(CONFIG, kind="llama2", pre_tokenizer=sequence("pretokenizers"))),
    (made(CONFIG), made(CONFIG, pre_tokenizer=sequence("pretokenizers", content_of("llama3")["pre_tokenizer"]))),
    (
        made(CONFIG, kind="llama2"),
        made(
            CONFIG,
            kind="llama2",
            normalizer=sequence("normalizers", sequence("normalizers"), content_of("llama2")["normalizer"]),
        ),
    ),
    (made(CHAT), made(CHAT | {"chat_template": COMMENTED})),
    (made(CHAT), made(CHAT | {"chat_template": unmarked(CHATML)})),
    (made(CHAT), made(CHAT | {"chat_template": QUOTED})),
    (made(CHAT), made(CHAT | {"bos_token": "<bos>"})),  # which this template does not write
    (made(CONFIG, stops=[2, 3]), made(CONFIG)),
    (OWN, as_hugging_face(OWN)),
    (as_hugging_face(TRAINED), TRAINED),
    (OWN, as_hugging_face(OWN).with_template(dialogue_template(OWN))),
    (load("llama2"), load("llama2").with_template(dialogue_template(load("llama2")))),
]
ENDS = CONFIG | {"eos_token": "<|im_end|>"}
OTHER: list[tuple[TextTokenizer, TextTokenizer, str]] = [
    (made(CONFIG), made(ENDS), "end of a text: expected 2, got 4"),
    (made(CONFIG), made(CONFIG, stops=[2, 3]), "ends of a response: expected [2], got [2, 3]"),
    (made(CHAT), made(CHAT | {"chat_template": LLAMA3}), "chat template: expected a template, got one that renders"),
    (made(CHAT), made(CHAT | {"chat_template": CHATML.replace("<|im_end|>\n", "<|im_end|>")}), "one that renders"),
    (made(CHAT), made(CONFIG), "chat template: expected a template, got the Human / Assistant format"),
    (OWN, as_hugging_face(OWN).with_template(CHATML), "expected the Human / Assistant format, got a template"),
    (
        made(CONFIG | {"chat_template": LLAMA3}),
        made(CONFIG | {"chat_template": LLAMA3, "bos_token": "<bos>"}),
        "chat template: 'bos_token': expected '<s>', got '<bos>'",
    ),
    (
        made(CONFIG),
        made(CONFIG, added_tokens=flagged("llama3", "<bos>", special=False)),
        "special tokens: '<bos>': exp",
    ),
    (
        made(CONFIG),
        made(CONFIG, added_tokens=flagged("llama3", "<think>", lstrip=True)),
        "added tokens: '<think>': exp",
    ),
    (made(CONFIG), made(CONFIG, normalizer={"type": "NFC"}), "normalizer: expected nothing, got {'type': 'NFC'}"),
    (
        made(CONFIG),
        made(CONFIG, normalizer=sequence("normalizers", {"type": "NFC"}, {"type": "Lowercase"})),
        "normalizer: expected nothing, got [{'type': 'NFC'}, {'type': 'Lowercase'}]",
    ),
    (made(CONFIG), made(CONFIG, pre_tokenizer=content_of("gpt2")["pre_tokenizer"]), "pre-tokenizer: "),
    (made(CONFIG), made(CONFIG, model={"ignore_merges": True}), "model: 'ignore_merges': expected False, got True"),
    (made(CONFIG), made(CONFIG, model={"merges": spelled_merges("llama3")[:-1]}), "merges: expected "),
    (made(CONFIG), made(CONFIG, model={"merges": spelled_merges("llama3")[::-1]}), "merges: 0: expected ["),
    (load("llama3"), load("llama3", start="<bos>"), "ids before a text: expected [], got [5]"),
    (OWN, TRAINED, "vocabulary: 256: expected '<|endoftext|>', got 'he'"),
    (load("gpt2"), load("llama2"), "vocabulary: 0: expected '<|endoftext|>', got '<unk>'"),
]


def test_what_decides_no_ids_does_not_count() -> None:
    for row in SAME:
        with case([repr(side) for side in row]):
            assert differences(*row) == []


def test_what_decides_ids_or_ends_is_named() -> None:
    for expected, got, what in OTHER:
        with case(what):
            found = differences(expected, got)
            assert any(what in part for part in found), found


def test_two_sources_with_one_tokenizer() -> None:
    model = ModelConfig(vocab_size=470, context=8, width=8, layers=1, heads=2)
    plain = dataclasses.replace(random_source(model, "first"), tokenizer=made(CONFIG))
    padded = dataclasses.replace(random_source(model, "second"), tokenizer=made(CONFIG | {"pad_token": "[PAD]"}))
    same_tokenizer(plain, padded)
    same_tokenizer(padded, plain)
    small = dataclasses.replace(plain, where="small", model=dataclasses.replace(model, vocab_size=464))
    with pytest.raises(
        UserError, match=r"^small: its vocabulary of 464 tokens is not that of second \(465 tokens\); .* 464"
    ):
        same_tokenizer(padded, small)
    other = dataclasses.replace(plain, where="other", tokenizer=made(ENDS))
    with pytest.raises(
        UserError, match=r"^other: its tokenizer is not that of first; end of a text: .* got 4; .* train"
    ):
        same_tokenizer(plain, other)


def test_the_program_of_a_template() -> None:
    same = ["a{{ b.role }}{% if c %}x{% endif %}", "a{# n #}{{ b['role'] }}{%- if c -%}x{% endif %}", "{{'a'}}"]
    assert ChatTemplate(same[0]).syntax == ChatTemplate(same[1]).syntax != ChatTemplate(same[2]).syntax
    marked = "{% generation %}{{ b }}c{% endgeneration %}d"
    assert ChatTemplate(marked).syntax == ChatTemplate("{{ b }}cd").syntax != ChatTemplate("{{ b }}d").syntax
    assert ChatTemplate("{{ b.items }}").syntax != ChatTemplate("{{ b['items'] }}").syntax
    assert json.loads(json.dumps(ChatTemplate("{% for m in ms %}{{ m }}{% endfor %}").syntax))
