"""Published forms of data: our ids of each row against transformers' rendering of the messages that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data import Ledger, encode_demonstrations, encode_prompts, encode_rankings, encode_text, read_records
from tests.tiny_tokenizers import CHATML, LLAMA3, TOOLS_CHATML, TOOLS_LLAMA, ZEPHYR, unmarked
from tests_interop.test_interop_tokenizer import both, config_of

HH = "\n\nHuman: Why?\n\nAssistant: Light.\n\nHuman: What  light?\n\nAssistant: "


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BE = {"role": "system", "content": "Be brief."}
ASK = user("Why is the sky blue? 12, naïve café")
TALK = [user("Why?"), says("Light."), user("What  light?")]
# (row, the kinds that it is read as, its prompt, its answers) with both as transformers takes them
FORMS: list[tuple[dict[str, Any], str, list[Any], list[Any]]] = [
    ({"prompt": [ASK]}, "prompts", [ASK], []),
    ({"messages": [BE, *TALK, says("Blue.")]}, "prompts demonstrations dialogues text", [BE, *TALK], [[says("Blue.")]]),
    ({"prompt": [ASK], "completion": [says("It is.")]}, "prompts demonstrations", [ASK], [[says("It is.")]]),
    (
        {"prompt": [BE, ASK], "chosen": [says("It is.")], "rejected": [says("No")]},
        "prompts comparisons",
        [BE, ASK],
        [[says("It is.")], [says("No")]],
    ),
    (
        {"chosen": [*TALK, says("It is.")], "rejected": [*TALK, says("No")]},
        "prompts comparisons",
        TALK,
        [[says("It is.")], [says("No")]],
    ),
    (
        {"prompt": ASK["content"], "chosen": [ASK, says("It is.")], "rejected": [ASK, says("No")], "score_chosen": 1.0},
        "prompts comparisons",
        [ASK],
        [[says("It is.")], [says("No")]],
    ),
    (
        {"chosen": [ASK, says("a"), user("b"), says("c")], "rejected": [ASK, says("d")]},
        "prompts comparisons",
        [ASK],
        [[says("a"), user("b"), says("c")], [says("d")]],
    ),
    ({"chosen": HH + "It is.", "rejected": HH + "No"}, "prompts comparisons", TALK, [[says("It is.")], [says("No")]]),
    (
        {"instruction": "Why?", "input": "It is blue.", "output": "Light."},
        "prompts demonstrations",
        [user("Why?\nIt is blue.")],
        [[says("Light.")]],
    ),
    (
        {"system": "Be brief.", "question": ASK["content"], "chosen": "It is.", "rejected": "No"},
        "prompts comparisons",
        [BE, ASK],
        [[says("It is.")], [says("No")]],
    ),
    (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Light."}], "system": None},
        "prompts dialogues",
        [user("Why?")],
        [[says("Light.")]],
    ),
    (
        {"query": "Why?", "responses": ["a", "b"], "ranks": [2, 1]},
        "prompts rankings",
        [user("Why?")],
        [[says("a")], [says("b")]],
    ),
]


def read(path: Path, row: dict[str, Any], kind: Any, tokenizer: Any) -> list[list[int]]:
    """The ids of a row as its stage has them."""
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    records: Any = read_records(path, kind, Ledger())
    if kind == "text":
        texts = encode_text(records, tokenizer, ledger=Ledger())
        return [[*tokenizer.start_ids, *ids, tokenizer.eos_id] for ids in texts]
    if kind == "prompts":
        return [list(ids) for ids in encode_prompts(records, tokenizer, max_tokens=999, ledger=Ledger()).rows]
    if kind in ("comparisons", "rankings"):
        return [list(ids) for ids in encode_rankings(records, tokenizer, max_tokens=999, ledger=Ledger()).rows[0][0]]
    return [list(ids) for ids, _ in encode_demonstrations(records, tokenizer, max_tokens=999, ledger=Ledger()).rows]


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR], ids=["ChatML", "Llama 3", "Zephyr"])
def test_each_form_is_what_transformers_renders(template: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, kind, config_of(template, unmarked(template)))
    end = ours.stop_ids[-1]
    for row, kinds, prompt, answers in FORMS:
        wanted = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = [theirs.apply_chat_template([*prompt, *answer], return_dict=False) for answer in answers]
        # A response ends with its turn: a template may go on with a line feed before the next.
        ended = [ids[: len(ids) - ids[::-1].index(end)] for ids in whole]
        for stage in kinds.split():
            found = read(tmp_path / "data.jsonl", row, stage, ours)
            if stage == "prompts":
                assert found == [wanted], row
                continue
            assert all(ids[: len(wanted)] == wanted for ids in found), row
            dialogue = "messages" in row or "conversations" in row
            expected = whole if dialogue else ended
            if stage == "text":
                # A document to pretrain on ends with one EOS, which packing puts there; a template may have its own.
                expected = [ids if ids[-1] == ours.eos_id else [*ids, ours.eos_id] for ids in expected]
            assert found == expected, (stage, row)


def test_turns_that_are_not_learned(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, "qwen2", config_of(CHATML, CHATML))
    messages = [*TALK[:1], TALK[1] | {"weight": 0}, TALK[2], says("Blue.")]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    records = read_records(tmp_path / "data.jsonl", "dialogues", Ledger())
    ((ids, mask),) = encode_demonstrations(records, ours, max_tokens=999, ledger=Ledger()).rows
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marks = [bool(target) for target in found["assistant_masks"]]
    first = len(theirs.apply_chat_template(messages[:2], return_dict=False))
    assert ids == found["input_ids"]
    assert list(mask) == [False] * first + marks[first:] and any(marks[:first])


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "The time.", "parameters": {"type": "object"}}}


def calls(arguments: Any, content: str | None = None) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


WARM, RESULT = user("Is it warm in Köln?"), {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 20}'}
OURS, THEIRS = calls('{"town":"Köln"}'), calls({"town": "Köln"})
# (row with OpenAI's text as arguments, kinds, its prompt, its answers) with both as transformers takes them
TOOL_FORMS: list[tuple[dict[str, Any], str, list[Any], list[Any]]] = [
    (
        {"messages": [WARM, OURS, RESULT, says("Yes.")], "tools": [WEATHER, TIME], "parallel_tool_calls": False},
        "prompts demonstrations dialogues text",
        [WARM, THEIRS, RESULT],
        [[says("Yes.")]],
    ),
    ({"messages": [BE, WARM, OURS], "tools": [WEATHER]}, "prompts dialogues text", [BE, WARM], [[THEIRS]]),
    ({"messages": [BE, WARM, THEIRS], "tools": json.dumps([WEATHER])}, "prompts dialogues", [BE, WARM], [[THEIRS]]),
    ({"prompt": [WARM], "completion": [OURS], "tools": [WEATHER]}, "prompts demonstrations", [WARM], [[THEIRS]]),
    ({"prompt": [WARM, OURS, RESULT], "tools": [TIME, WEATHER]}, "prompts", [WARM, THEIRS, RESULT], []),
    (
        {"prompt": [BE, WARM], "chosen": [OURS], "rejected": [says("Who knows?")], "tools": [WEATHER]},
        "prompts comparisons",
        [BE, WARM],
        [[THEIRS], [says("Who knows?")]],
    ),
    (
        {"chosen": [WARM, OURS, RESULT, says("Yes.")], "rejected": [WARM, says("No.")], "tools": [WEATHER]},
        "prompts comparisons",
        [WARM],
        [[THEIRS, RESULT, says("Yes.")], [says("No.")]],
    ),
]


# The second is used for tools alone.
SEVERAL = [{"name": "default", "template": unmarked(CHATML)}, {"name": "tool_use", "template": TOOLS_CHATML}]


@pytest.mark.parametrize("template", [TOOLS_CHATML, TOOLS_LLAMA, SEVERAL], ids=["Hermes", "Llama 3.1", "tool_use"])
def test_tools_are_what_transformers_renders(template: Any, tmp_path: Path) -> None:
    end = "<|eot_id|>" if template == TOOLS_LLAMA else "<|im_end|>"
    config = {"bos_token": "<|begin_of_text|>", "eos_token": end, "chat_template": template}
    ours, theirs = both(tmp_path, "llama3", config)

    def rendered(messages: list[Any], tools: list[Any], **more: Any) -> list[int]:
        return theirs.apply_chat_template(messages, tools=tools, return_dict=False, **more)

    for row, kinds, prompt, answers in TOOL_FORMS:
        tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        wanted = rendered(prompt, tools, add_generation_prompt=True)
        assert WEATHER["function"]["description"] in theirs.decode(wanted)
        whole = [rendered([*prompt, *answer], tools) for answer in answers]
        ended = [ids[: len(ids) - ids[::-1].index(ours.eos_id)] for ids in whole]
        for stage in kinds.split():
            found = read(tmp_path / "data.jsonl", row, stage, ours)
            if stage == "prompts":
                assert found == [wanted], row
            elif stage == "text":
                assert found == [ids if ids[-1] == ours.eos_id else [*ids, ours.eos_id] for ids in whole], row
            else:
                assert found == (whole if "messages" in row else ended), (stage, row)
                assert all(ids[: len(wanted)] == wanted for ids in found), row
