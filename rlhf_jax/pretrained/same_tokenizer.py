"""Comparison of two tokenizers by what decides the ids of texts and dialogues, and where they end.

Two published folders often spell one tokenizer differently: another name for pad, merges as "a b" or ["a", "b"], a
default that is left out, a comment in the chat template. A run's own tokenizer comes back from an export in Hugging
Face's files. Such tokenizers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.dialogue_template import dialogue_template
from rlhf_jax.tokenizers.chat_template import ChatTemplate
from rlhf_jax.tokenizers.encoders import PackageEncoder
from rlhf_jax.tokenizers.export import as_hugging_face
from rlhf_jax.tokenizers.huggingface import SAMPLING, HuggingFaceTokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer

_NO_IDS = ("trim_offsets",)  # fields of a pre-tokenizer that change offsets alone


def differences(expected: TextTokenizer, got: TextTokenizer) -> list[str]:
    """What decides ids or ends and is not the same, as "NAME: expected …, got …"; empty if all is the same.

    Ids of padding do not count, since padding is masked. `got` may have fewer ids that end a response than `expected`,
    as a reward model's folder names none but the end of a text.
    """
    if expected.fingerprint == got.fingerprint:
        return []
    try:
        pair = as_hugging_face(expected), as_hugging_face(got)
    except UserError:
        return ["vocabulary or pattern: expected the same, got another"]
    first, second = pair
    contents = [_content(tokenizer) for tokenizer in pair]
    pads = {first.pad_id, second.pad_id} - {first.eos_id, second.eos_id, *first.start_ids, *second.start_ids}
    # Above, one of the two has no row of the embedding.
    ids = set(range(min(first.rows, second.rows))) - pads
    parts: list[tuple[str, list[Any]]] = [
        ("vocabulary", [{id: text for id, text in _texts(side).items() if id in ids} for side in pair]),
        ("special tokens", [{t: id for t, id in side.special_tokens.items() if id in ids} for side in pair]),
        ("added tokens", [{a.content: a._asdict() for a in side.added if not a.special} for side in pair]),
        *((name, [content[name] for content in contents]) for name in contents[0]),
        ("ids before a text", [list(side.start_ids) for side in pair]),
        ("end of a text", [side.eos_id for side in pair]),
    ]
    found = [f"{name}: {_first_difference(*sides)}" for name, sides in parts if sides[0] != sides[1]]
    if set(second.stop_ids) - set(first.stop_ids):
        found.append(f"ends of a response: expected {list(first.stop_ids)}, got {list(second.stop_ids)}")
    if template := _template_difference(expected, got):
        found.append(template)
    return found


def _texts(tokenizer: HuggingFaceTokenizer) -> dict[int, str]:
    """The token of each id; a special one is told apart from text of the same letters by `special tokens`."""
    return {**{id: text for text, id in tokenizer.vocabulary.items()}, **{a.id: a.content for a in tokenizer.added}}


def _content(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that decide how a text is cut and merged, spelled alike."""
    content = tokenizer.content
    try:
        # The package completes defaults and writes merges in one way.
        content = json.loads(PackageEncoder(content, tokenizer.name).at("start").to_str())
    except UserError:  # it is not installed
        pass
    model = {name: value for name, value in content["model"].items() if name not in (*SAMPLING, "vocab", "merges")}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"].get("merges", [])]
    scores = content["model"]["vocab"] if isinstance(content["model"]["vocab"], list) else []
    return {
        "merges": merges,
        "scores": scores,
        "model": _without_defaults(model),
        "normalizer": _without_defaults(content.get("normalizer")),
        "pre-tokenizer": _without_defaults(content.get("pre_tokenizer")),
    }


def _without_defaults(part: Any) -> Any:
    """A part of tokenizer.json without fields that say nothing; a sequence is the list of its steps."""
    if isinstance(part, Mapping):
        fields = {name: _without_defaults(value) for name, value in part.items() if name not in _NO_IDS}
        inner = fields.get("normalizers", fields.get("pretokenizers"))
        if part.get("type") == "Sequence" and isinstance(inner, list):
            steps = [step for item in inner if item for step in (item if isinstance(item, list) else [item])]
            return steps if len(steps) > 1 else steps[0] if steps else None
        return {name: value for name, value in fields.items() if value not in (None, "", [])}
    return [_without_defaults(item) for item in part] if isinstance(part, list) else part


def _template_difference(expected: TextTokenizer, got: TextTokenizer) -> str | None:
    """How two chat templates differ; a tokenizer without one renders as `data.dialogues` does."""
    templates = [expected.chat_template, got.chat_template]
    if templates == [None, None]:
        return None
    sides = [
        ChatTemplate(dialogue_template(side)) if template is None else template
        for side, template in zip((expected, got), templates)
    ]
    if sides[0].syntax != sides[1].syntax:
        what = ["the Human / Assistant format" if template is None else "a template" for template in templates]
        other = what[1] if what[0] != what[1] else "one that renders otherwise"
        return f"chat template: expected {what[0]}, got {other}"
    values = [{name: side.tokens.get(name) for name in side.variables} for side in sides]
    return None if values[0] == values[1] else f"chat template: {_first_difference(*values)}"


def _first_difference(expected: Any, got: Any) -> str:
    """The first field or element in which two values differ."""
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = sorted(expected.keys() | got.keys(), key=lambda key: (str(type(key)), key))
        key = next(key for key in keys if expected.get(key) != got.get(key))
        return f"{key!r}: expected {_short(expected.get(key))}, got {_short(got.get(key))}"
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got) and len(got) > 8:
        at = next(at for at, pair in enumerate(zip(expected, got)) if pair[0] != pair[1])
        return f"{at}: expected {_short(expected[at])}, got {_short(got[at])}"
    if isinstance(expected, list) and len(expected) > 8:
        return f"expected {len(expected)}, got {len(got)}"
    return f"expected {_short(expected)}, got {_short(got)}"


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.80}"
