"""Datasets as people have them: each form gives one prompt, with the same ids in every stage and command."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.config import PPOConfig
from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Dialogue,
    Ledger,
    Message,
    Prompt,
    Ranking,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    prompt_ids,
    read_records,
)
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.export import export
from rlhf_jax.feedback.features import rows_of
from rlhf_jax.feedback.records import Judgement
from rlhf_jax.feedback.tasks import read_demonstration_tasks, read_tasks
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from tests.asked import asked_by_chat, asked_by_evaluate
from tests.cases import case
from tests.tiny_tokenizers import CHATML, THINKS, load, unmarked

pytestmark = pytest.mark.core

BYTES = Tokenizer.bytes()
ROLES = {"S": "system", "U": "user", "A": "assistant"}
SHAREGPT = {"S": "system", "U": "human", "A": "gpt"}
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"


def m(said: str, **more: Any) -> list[Any]:
    """ "Uq|Ax" -> messages; `more` goes into the last one."""
    messages = [{"role": ROLES[part[0]], "content": part[1:]} for part in said.split("|")]
    return [*messages[:-1], messages[-1] | more]


def g(said: str) -> list[Any]:
    """ "Uq|Ax" -> messages as ShareGPT has them."""
    return [{"from": SHAREGPT[part[0]], "value": part[1:]} for part in said.split("|")]


def turns(said: str) -> tuple[Message, ...]:
    return tuple(Message(ROLES[part[0]], part[1:]) for part in said.split("|")) if said else ()


PAIR = {"chosen": "c", "rejected": "r"}
SAID = {"chosen": m("Ac"), "rejected": m("Ar")}
WHOLE = {"chosen": m("Uq|Ac"), "rejected": m("Uq|Ar")}
# (row, its prompt as turns, or "=text" for text that is continued as it stands, the kinds that it is read as)
FORMS: list[tuple[dict[str, Any], str, str]] = [
    # TRL: prompt-only, prompt-completion, preference with explicit and with implicit prompt.
    ({"prompt": "The sky is"}, "=The sky is", "prompts"),
    ({"prompt": m("Uq")}, "Uq", "prompts"),
    ({"prompt": "The sky is", "completion": " blue."}, "=The sky is", "prompts demonstrations"),
    ({"prompt": m("Uq"), "completion": m("Ac")}, "Uq", "prompts demonstrations"),
    ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "=The sky is", "prompts comparisons label"),
    ({"prompt": m("SBe.|Uq"), **SAID}, "SBe.|Uq", "prompts comparisons label"),
    (WHOLE, "Uq", "prompts comparisons label"),
    ({"messages": m("Uq|Ac")}, "Uq", "prompts demonstrations dialogues"),
    # Text beside answers that are messages is the user's turn, whatever the kind.
    ({"prompt": "q", **SAID}, "Uq", "prompts comparisons label"),
    ({"prompt": "q", **WHOLE}, "Uq", "prompts comparisons label"),
    ({"prompt": "q", "prompt_id": "7", **WHOLE, "messages": m("Uq|Ac"), "score_chosen": 8.0}, "Uq",
     "prompts comparisons demonstrations dialogues label"),
    ({"prompt": " q ", "chosen": m("SBe.|Uq|Ac"), "rejected": m("SBe.|Uq|Ar")}, "SBe.|Uq", "prompts comparisons label"),
    ({"prompt": "q", "chosen": m("Uq|Ax|Uz|Ac"), "rejected": m("Uq|Ax|Uz|Ar")}, "Uq|Ax|Uz",
     "prompts comparisons label"),
    ({"prompt": "q", "completion": m("Ac")}, "Uq", "prompts demonstrations"),
    ({"prompt": "q", "completion": "c", **SAID}, "Uq", "prompts demonstrations comparisons label"),
    ({"prompt": m("Uq"), "chosen": "c", "rejected": " r"}, "Uq", "prompts comparisons label"),
    ({"prompt": "q", "completion": m("SBe.|Uq|Ac")}, "SBe.|Uq", "prompts demonstrations"),
    ({"prompt": "q", "responses": ["a", m("Ab"), m("Uq|Ad")], "ranks": [1, 2, 2]}, "Uq",
     "prompts rankings label"),
    ({"prompt": "q", "responses": [m("Aa")[0], m("Ab")[0]], "ranks": [2, 1]}, "Uq", "prompts rankings label"),
    ({"prompt": "q", "messages": m("SBe.|Uq|Ax|Uz|Ac")}, "SBe.|Uq", "prompts"),
    ({"prompt": "", "messages": m("SBe.|Uq|Ac")}, "SBe.|Uq", "prompts demonstrations"),
    ({"prompt": "", "messages": m("Uq"), **PAIR}, "Uq", "prompts comparisons label"),
    ({"prompt": "q", "messages": m("SBe.|Uq|Ax"), **PAIR}, "SBe.|Uq", "prompts comparisons demonstrations label"),
    # A question under another name, and a system message beside it.
    ({"instruction": "q", "input": "", "output": "c"}, "Uq", "prompts demonstrations"),
    ({"instruction": "q", "input": "with this", "output": "c", "text": "Below is"}, "Uq\nwith this",
     "prompts demonstrations"),
    ({"instruction": "q", "output": "c", "system": "Be.", "history": []}, "SBe.|Uq", "prompts demonstrations"),
    ({"system": "Be.", "question": "q", **PAIR}, "SBe.|Uq", "prompts comparisons label"),
    ({"system": "", "question": "q", **PAIR}, "Uq", "prompts comparisons label"),
    ({"system_prompt": "Be.", "question": "q", "response": "c", "id": "flan.7"}, "SBe.|Uq", "prompts demonstrations"),
    ({"system": "Be.", "prompt": "q", **PAIR}, "SBe.|Uq", "prompts comparisons label"),
    ({"system": "Be.", **WHOLE}, "SBe.|Uq", "prompts comparisons label"),
    ({"system": "Be.", "messages": m("SBe.|Uq|Ac")}, "SBe.|Uq", "prompts demonstrations dialogues"),
    ({"question": "q", "answer": "#### 4"}, "Uq", "prompts demonstrations"),
    ({"prompt": "", "query": "q", "input": "", **PAIR}, "Uq", "prompts comparisons label"),
    ({"problem": "q", "solution": "2 + 2", "answer": 4}, "Uq", "prompts"),
    ({"query": "q", "responses": ["a", "b"], "ranks": [1, 2]}, "Uq", "prompts rankings label"),
    ({"input": m("Uq"), "output": m("Ac")[0]}, "Uq", "prompts demonstrations"),
    ({"system_message": "Be.", "messages": m("Uq|Ac")}, "SBe.|Uq", "prompts demonstrations dialogues"),
    # What is beside a question is in it already.
    ({"prompt": "a b q", "context": "b", "completion": "c"}, "=a b q", "prompts demonstrations"),
    ({"question": "3 or 4?", "choices": {"text": ["3", "4"], "label": []}, "options": [3, 4], "context": "", **PAIR},
     "U3 or 4?", "prompts comparisons label"),
    ({"messages": m("UA passage. q|Ac"), "context": ["A passage. "], "train": 1, "weight": 1.0}, "UA passage. q",
     "prompts demonstrations dialogues"),
    # ShareGPT, with answers beside as LLaMA-Factory has them.
    ({"conversations": g("SBe.|Uq|Ax|Uz|Ac")}, "SBe.|Uq|Ax|Uz", "prompts demonstrations dialogues"),
    ({"conversations": m("Uq|Ac"), "system": "Be."}, "SBe.|Uq", "prompts demonstrations dialogues"),
    ({"conversations": g("Uq"), "chosen": g("Ac")[0], "rejected": g("Ar")[0]}, "Uq", "prompts comparisons label"),
    # HH-RLHF.
    ({"chosen": HH + " c", "rejected": HH + " r"}, "Uhi|Ayes?|Uwhy", "prompts comparisons label"),
    ({"prompt": "", "chosen": HH + " c", "rejected": HH + " r"}, "Uhi|Ayes?|Uwhy", "prompts comparisons label"),
    ({"prompt": "why", "chosen": HH + " c", "rejected": HH + " r"}, "Uhi|Ayes?|Uwhy", "prompts comparisons label"),
    ({"prompt": HH, "chosen": HH + " c", "rejected": HH + " r"}, "=" + HH, "prompts comparisons label"),
    # Columns of the other files of a concatenation are null, in a row and in a message.
    ({"prompt": None, **WHOLE, "responses": None, "ranks": None, "label": None, "tools": None}, "Uq",
     "prompts comparisons rankings label"),
    ({"prompt": "q", "chosen": None, "rejected": None, "messages": None, "responses": ["a", "b"], "ranks": [1, 2]},
     "=q", "prompts comparisons rankings label"),
    ({"conversations": [message | {"role": None, "content": None} for message in g("Uq|Ac")]}, "Uq",
     "prompts demonstrations dialogues"),
    ({"messages": m("Uq", name=None, weight=None) + m("Ac", tool_calls=None, train=None), "completion": None}, "Uq",
     "prompts demonstrations dialogues"),
]  # fmt: skip


def wanted_ids(prompt: str, tokenizer: TextTokenizer) -> list[int]:
    """The prompt's ids by hand: ChatML's, or those of the Human / Assistant template with eos after an answer."""
    if prompt.startswith("="):
        return [*tokenizer.start_ids, *tokenizer.encode(prompt[1:])]
    if tokenizer is BYTES:
        text = "".join(
            {"S": "{}", "U": "\n\nHuman: {}", "A": "\n\nAssistant: {}\0"}[part[0]].format(part[1:])
            for part in prompt.split("|")
        )
        ids = [BYTES.bos_id, *(text + "\n\nAssistant:").encode()]
        return [BYTES.eos_id if id == 0 else id for id in ids]  # type: ignore[misc]
    start, end = (tokenizer.special_tokens[f"<|im_{name}|>"] for name in ("start", "end"))
    ids, newline = [], tokenizer.encode("\n")
    for message in turns(prompt):
        ids += [start, *tokenizer.encode(f"{message.role}\n{message.content}"), end, *newline]
    return [*ids, start, *tokenizer.encode("assistant\n")]


def rows_by_stage(path: Path, kinds: str, tokenizer: TextTokenizer) -> dict[str, list[list[int]]]:
    """Ids of the file's only row as each stage reads it."""
    found: dict[str, list[list[int]]] = {}
    for kind in set(kinds.split()) - {"label"}:
        records: Any = read_records(path, kind, Ledger())  # type: ignore[call-overload]
        ledger = Ledger()
        if kind == "prompts":
            found[kind] = list(map(list, encode_prompts(records, tokenizer, max_tokens=999, ledger=ledger).rows))
        elif kind in ("demonstrations", "dialogues"):
            rows = encode_demonstrations(records, tokenizer, max_tokens=999, ledger=ledger)
            found[kind] = [list(row[0]) for row in rows.rows]
        else:
            rankings = encode_rankings(records, tokenizer, max_tokens=999, ledger=ledger).rows
            found[kind] = list(map(list, rankings[0][0]))
        assert ledger.accepted == 1 and not ledger.decisions
    return found


def rows_by_label(path: Path, folder: Path, tokenizer: TextTokenizer) -> dict[str, list[list[int]]]:
    """Ids of the file's only row as `label` and `feedback` read it, and as the stages read their exports."""
    (item,) = read_tasks([path])
    found = {"label": rows_of(item, tokenizer, ended=True)}
    judgement = Judgement(item.id, "ann", tuple(range(1, len(item.responses) + 1)))
    for form in ("rankings", "comparisons", "trl"):
        export([item], [judgement], folder, form=form)
        lines = (folder / f"{form}.jsonl").read_text().splitlines()
        path.write_text(lines[0] + "\n")
        found |= {f"{form} {kind}": ids for kind, ids in rows_by_stage(path, "prompts rankings", tokenizer).items()}
    return found


def test_each_form_has_one_prompt_in_every_stage_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    for tokenizer in (BYTES, load("gpt2", {"eos_token": "<|im_end|>", "chat_template": unmarked(CHATML)})):
        evaluated = asked_by_evaluate([row for row, _, _ in FORMS], tmp_path, monkeypatch, tokenizer)
        assert evaluated == {tuple(wanted_ids(prompt, tokenizer)) for _, prompt, _ in FORMS}
        for one in FORMS:
            with case((tokenizer.name, one)) as (_, (row, prompt, kinds)):
                path.write_text(json.dumps(row) + "\n")
                ids = wanted_ids(prompt, tokenizer)
                found = rows_by_stage(path, kinds, tokenizer)
                if not prompt.startswith("="):
                    found["generate --chat, prompts"] = asked_by_chat(path, monkeypatch, tokenizer)
                if "label" not in kinds and not isinstance(row.get("answer"), int):
                    (item,) = read_demonstration_tasks([path])
                    asked = prompt_ids(Prompt(item.prompt, turns=item.turns), tokenizer)
                    found |= {"label --demonstrations, prompts": [asked]}
                if "label" in kinds:
                    found |= rows_by_label(path, tmp_path / "export", tokenizer)
                for stage, rows in found.items():
                    for row_ids in rows:
                        assert row_ids[: len(ids)] == ids, stage
                        assert (len(row_ids) == len(ids)) == stage.endswith("prompts"), stage


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # An answer that is text does not show where the prompt in it ends.
    ("comparisons", {"chosen": "It is blue.", "rejected": "It is green."},
     "field 'prompt': missing; the row's fields are 'chosen', 'rejected'; where it ends in answers that are text"),
    ("prompts", {"chosen": "It is blue.", "rejected": "It is green."}, "field 'prompt': missing"),
    ("comparisons", {"ask": "q", **PAIR}, "it is read from one of prompt, instruction, question, problem, query, inp"),
    ("comparisons", SAID, "field 'prompt': missing"),
    ("prompts", {"prompt": None}, "field 'prompt': expected text, got null"),
    ("demonstrations", {"question": "q", "problem": "q", "answer": "a"},
     "field 'problem': expected one field with the prompt; remove or rename one, got 'question' as well"),
    ("comparisons", {"prompt": "p", "question": "q", **PAIR}, "field 'question': expected one field with the prompt"),
    ("demonstrations", {"problem": "q", "solution": "2 + 2", "answer": "4"},
     "field 'solution': expected one field with the answer; remove or rename one, got 'answer' as well"),
    ("demonstrations", {"prompt": "q", "messages": m("Uq|Ax"), "response": "x"}, "field 'response': expected one fiel"),
    ("demonstrations", {"instruction": "q", "context": "A passage.", "response": "x"}, "field 'context': expected"),
    ("comparisons", {"prompt": m("Uq"), **SAID, "messages": m("Uother|Ax")}, "field 'messages': expected messages t"),
    ("demonstrations", {"prompt": "q", "completion": m("SBe.|Uq|Ac"), **WHOLE}, "field 'chosen': expected mess"),
    ("prompts", {"prompt": "other", "messages": m("Uq|Ax")}, "field 'prompt': expected one of the user's turns"),
    ("comparisons", {"prompt": "other", **WHOLE}, "field 'prompt': expected one of the user's turns"),
    ("comparisons", {"prompt": "other", "chosen": HH + " c", "rejected": HH + " r"}, "field 'prompt': expected one of"),
    ("comparisons", {"prompt": m("Uother"), **WHOLE}, "field 'prompt': expected the messages that each answer begins"),
    ("comparisons", {"prompt": m("Uq|Ax"), **SAID}, "field 'prompt': expected messages that end with the user's turn"),
    ("prompts", {"prompt": m("Uq|Ax")}, "field 'prompt': expected messages that end with the user's turn"),
    ("comparisons", {"prompt": "q", **PAIR, "responses": ["a", "b"], "ranks": [1, 2]}, "a ranking or a comparison alo"),
    ("dialogues", {"messages": m("Uq|Ax"), "conversations": g("Uq|Ax")}, "field 'conversations': expected one field"),
    ("dialogues", {"system": "Be.", "messages": m("SNo.|Uq|Ax")}, "field 'system': expected the system message that"),
    ("prompts", {"prompt": "q", "system": "Be.", "system_prompt": "Be."}, "field 'system_prompt': expected one field"),
    ("prompts", {"prompt": "q", "system": ["Be."]}, "field 'system': expected text, got a list of 1"),
    ("demonstrations", {"prompt": "q", "completion": m("Aa|Uz|Ab")}, "field 'completion': expected one message of the"),
    # A prompt or an answer beside a dialogue that it is not part of.
    *((kind, {"instruction": "To French.", "messages": m("Uq|Ax")}, "field 'instruction': expected one of the user's")
      for kind in ("text", "demonstrations", "dialogues", "prompts")),
    *((kind, {"prompt": m("Uother"), "messages": m("Uq|Ax")}, "field 'messages': expected messages that begin with th")
      for kind in ("text", "demonstrations", "dialogues", "prompts")),
    ("dialogues", {"messages": m("Uq|Ax"), "completion": "B"}, "field 'completion': expected one field with the answe"),
    ("text", {"conversations": g("Uq|Ax"), "response": "B"}, "field 'response': expected one field with the answer"),
    # Unpaired preferences.
    *((kind, {"messages": m("Uq|Ax"), "label": label}, "field 'label': expected no unpaired preferences")
      for kind in ("text", "demonstrations", "dialogues", "rankings") for label in (False, 1, 0.0)),
    ("demonstrations", {"question": "q", "answer": "c", "label": 1.0}, "field 'label': expected no unpaired"),
    ("demonstrations", {"prompt": "q", "completion": "c", "label": False}, "field 'label': expected no unpaired"),
    ("comparisons", {"prompt": "q", "completion": "c", "label": True}, "field 'label': expected no unpaired"),
    ("rankings", {"prompt": m("Uq"), "completion": m("Ac"), "label": 0}, "field 'label': expected no unpaired"),
    # The same under other names, and as text.
    *((kind, row | {name: value}, f"field {name!r}: expected no unpaired preferences")
      for kind, row in (("demonstrations", {"prompt": "q", "completion": "c"}), ("dialogues", {"messages": m("Uq|Ax")}))
      for name, value in (("label", "false"), ("label", "Chosen"), ("label", "rejected"), ("kto_tag", True),
                          ("kto_tag", False), ("is_correct", False), ("correct", 0.0), ("desirable", "False"),
                          ("chosen", True), ("rejected", False))),
    ("comparisons", {"prompt": "q", **PAIR, "label": 0}, "field 'label': expected the better answer in 'chosen', no v"),
    ("comparisons", {"prompt": m("Uq"), **SAID, "label": "rejected"}, "field 'label': expected the better answer in '"),
    # An answer that was cut, by the names that samplers have for it.
    *((kind, row | {name: value}, f"field {name!r}: expected 'ended': false beside a completion that was cut")
      for kind, row in (("demonstrations", {"prompt": "q", "completion": "c"}), ("dialogues", {"messages": m("Uq|Ax")}),
                        ("text", {"messages": m("Uq|Ax")}), ("demonstrations", {"question": "q", "answer": "a"}),
                        ("text", {"text": "t"}))
      for name, value in (("finish_reason", "length"), ("stop_reason", "MAX_TOKENS"), ("truncated", True),
                          ("is_truncated", 1))),
    # Messages that were written as text, by JSON or by Python.
    *(("demonstrations", {"prompt": "q", "completion": write(m("Ax"))}, "field 'completion': expected text or a list o")
      for write in (str, json.dumps, lambda said: f" {json.dumps(said[0])}")),
    *((kind, {"prompt": write(g("Uq")), "chosen": "a", "rejected": "b"}, "field 'prompt': expected text or a list of m")
      for kind in ("comparisons", "prompts") for write in (str, json.dumps)),
    ("comparisons", {"prompt": "q", "chosen": str(m("Uq|Ax")), "rejected": str(m("Uq|Ay"))}, "field 'chosen': expecte"),
    ("rankings", {"prompt": "q", "responses": [json.dumps(m("Ax")), "b"], "ranks": [1, 2]}, "field 'responses[0]': ex"),
    ("prompts", {"prompt": '["How are you?", "And you?"]'}, "field 'prompt': expected text or a list of messages, and"),
    # A part of the question that is not in it.
    *(("demonstrations", {"question": "q", name: "A passage.", "answer": "a"}, f"field {name!r}: expected a question t")
      for name in ("passage", "document", "article", "paragraph", "story")),
    ("prompts", {"messages": m("Uq"), "documents": [{"title": "T", "text": "A passage."}]}, "field 'documents': expec"),
    *(("demonstrations", {"question": "q", name: "hm", "answer": "a"}, f"field {name!r}: expected a row without it")
      for name in ("reasoning", "thinking")),
    ("prompts", {"prompt": "q", "context": "A passage."}, "field 'context': expected a question that has its text in"),
    ("dialogues", {"messages": m("Uq|Ax"), "context": ["A passage."]}, "field 'context': expected a question that has"),
    ("comparisons", {**WHOLE, "context": "A passage."}, "field 'context': expected a question that has its text in it"),
    ("demonstrations", {"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}, "field 'choices': expected a que"),
    ("prompts", {"question": "2 + 2?", "options": {"A": 3, "B": 4}}, "field 'options': expected a question that has"),
    # Marks of cut responses under the name of another form.
    ("comparisons", {"prompt": "q", **PAIR, "ended": [True, False]}, "field 'ended': expected 'ended_chosen' and"),
    ("rankings", {"prompt": "q", **PAIR, "ended": False}, "field 'ended': expected 'ended_chosen' and 'ended_rejec"),
    ("rankings", {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "ended_chosen": False},
     "field 'ended_chosen': expected 'ended' beside responses, with"),
    ("demonstrations", {"prompt": "q", "completion": "c", "ended_rejected": False}, "field 'ended_rejected': expected"),
    # What a row says beside its text or its messages.
    *((kind, row | mark, f"field '{next(iter(mark))}': expected ")
      for kind, row in (("text", {"text": "t"}), ("prompts", {"prompt": "q"}), ("dialogues", {"messages": m("Uq|Ax")}))
      for mark in ({"weight": 0}, {"train": False}, {"train": 0}, {"train": 0.0}, {"loss_mask": [0]},
                   {"sample_weight": 0.5}, {"weights": [0, 1]}, {"loss_weight": 0}, {"mask": [False]},
                   {"completion_mask": [0, 1]}, {"assistant_masks": [1]})),
    ("dialogues", {"messages": m("Uq|Ax"), "functions": [{"name": "f"}]}, "field 'functions': expected a row without"),
    ("comparisons", {"prompt": "q", **PAIR, "weight": 0.5}, "field 'weight': expected 1, as every row counts once"),
    ("demonstrations", {"instruction": "q", "output": "x", "history": [["a", "b"]]}, "field 'history': expected a row"),
    ("text", {"messages": m("Uq|Ax"), "images": ["a.png"]}, "field 'images': expected a row without it"),
    # What a message says beside its role and content.
    ("dialogues", {"messages": m("Uq|Ax", logprobs=[{"id": "1"}])},
     "field 'messages[1].logprobs': expected a message of role and content, with weight or train at most"),
    ("dialogues", {"messages": m("Uq|Ax", function_call={"name": "f"})}, "field 'messages[1].function_call': expected"),
    ("dialogues", {"messages": m("Uq|Ax", reasoning_content="hm")}, "field 'messages[1].reasoning_content': expected"),
    ("dialogues", {"messages": m("Uq|Ax", loss_mask=0)}, "field 'messages[1].loss_mask': expected a message of role"),
    ("dialogues", {"conversations": [{"from": "human", "value": "q", "name": "Ann"}]}, "field 'conversations[0].name'"),
    ("dialogues", {"conversations": [{"from": "observation", "value": "q"}]}, "'conversations[0].from': expected one "),
    ("prompts", {"prompt": m("Uq", name="Ann")}, "field 'prompt[0].name': expected a message of role and content"),
    ("comparisons", {"prompt": "q", "chosen": m("Ac", thinking="hm"), "rejected": m("Ar")}, "field 'chosen[0].thinkin"),
    ("rankings", {"prompt": "q", "responses": ["a", m("Ab", prefix=True)], "ranks": [1, 2]}, "'responses[1][0].prefix"),
    ("dialogues", {"messages": m("Uq|Ax", weight=0.5)}, "field 'messages[1].weight': expected 0 or 1, got the number "),
    ("dialogues", {"messages": m("Uq|Ax", weight=True)}, "field 'messages[1].weight': expected 0 or 1, got the truth"),
    ("dialogues", {"messages": m("Uq|Ax", train="no")}, "field 'messages[1].train': expected true or false, got the t"),
    ("dialogues", {"messages": m("Uq|Ax", train=True, weight=0)}, "field 'messages[1].train': expected the same as it"),
    ("dialogues", {"messages": m("Uq", weight=1) + m("Ax")}, "field 'messages[0].weight': expected it on the assistan"),
    ("comparisons", {"prompt": "q", "chosen": m("Ac", weight=0), "rejected": m("Ar")}, "field 'chosen': expected no w"),
    ("demonstrations", {"prompt": m("Uq|Ax", weight=1) + m("Uz"), "completion": "c"}, "field 'prompt': expected no "),
    ("demonstrations", {"prompt": "z", "completion": m("Uq|Ax", train=True) + m("Uz|Ac")}, "field 'completion': exp"),
    ("text", {"messages": m("Uq|Ax", train=False)}, "field 'messages': expected no weight 0 or train false"),
]  # fmt: skip


def test_what_cannot_be_read_with_certainty_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for one in REFUSED:
        with case(one) as (kind, row, message):
            path.write_text("\n" + json.dumps(row) + "\n")
            with pytest.raises(UserError) as error:
                read_records(path, kind, Ledger())
            assert f"{path}:2: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
            if kind in ("comparisons", "rankings") and "label" not in row:
                with pytest.raises(UserError, match=r"data\.jsonl:2: "):
                    read_tasks([path])


def test_what_looks_like_it_and_is_not_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for kind, row in (
        ("demonstrations", {"prompt": "As JSON.", "completion": '{"value": 3, "role": "x"}', "is_correct": True}),
        ("demonstrations", {"prompt": "List two.", "completion": '["a", "b"]', "label": "sports", "correct": "B"}),
        ("demonstrations", {"prompt": '["a", "b"] are what?', "completion": "c", "finish_reason": "stop"}),
        ("demonstrations", {"prompt": "q", "completion": "c", "finish_reason": "length", "ended": False}),
        ("demonstrations", {"prompt": "[INST] q", "completion": "c", "truncated": False, "documents": ["q"]}),
        ("comparisons", {"prompt": "q", **PAIR, "label": 1, "status": "unchanged", "winner": "model_a", "tie": False}),
        ("text", {"text": json.dumps(m("Uq|Ax")), "label": 0, "reasoning": "hm"}),
        ("comparisons", {"prompt": "q", **PAIR, "reasoning": "The first is true.", "thinking": "hm"}),
        ("demonstrations", {"prompt": "q", "completion": "c", "reasoning": "", "thinking": None}),
    ):
        with case(row):
            path.write_text(json.dumps(row) + "\n")
            ledger = Ledger()
            assert len(read_records(path, kind, ledger)) == 1 and not ledger.decisions  # type: ignore[call-overload]


TIES = [
    ("status", "tie"),
    ("winner", "tie (bothbad)"),
    ("preference", "Tied"),
    ("label", "tie"),
    ("is_tie", True),
    ("tie", 1),
]


def test_a_comparison_that_its_row_calls_a_tie_is_dropped(tmp_path: Path) -> None:
    path, ledger = tmp_path / "data.jsonl", Ledger()
    path.write_text("".join(json.dumps({"prompt": "q", **PAIR, name: value}) + "\n" for name, value in TIES))
    assert read_records(path, "comparisons", ledger) == []
    assert [decision.reason for decision in ledger.decisions] == [f"a tie, by its field {name!r}" for name, _ in TIES]


def test_answers_and_columns_of_the_forms_are_read_as_their_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    asked = "\n\nHuman: q\n\nAssistant:"
    for row, record in (
        ({"instruction": "q", "output": "c"}, Demonstration(asked, " c", turns=turns("Uq"))),
        ({"query": "q", **PAIR}, Comparison(asked, " c", " r", turns=turns("Uq"))),
        (
            {"query": "q", "responses": ["a", "b"], "ranks": [4, 2]},
            Ranking(asked, (" a", " b"), (2, 1), "", turns("Uq")),
        ),
        ({"conversations": g("Uq|Ac")}, Dialogue(turns("Uq|Ac"))),
        ({"problem": "q"}, Prompt(asked, turns=turns("Uq"))),
    ):
        with case((row, record)):
            path.write_text(json.dumps(row) + "\n")
            kind = f"{type(record).__name__.lower()}s"
            assert read_records(path, kind, Ledger()) == [record]  # type: ignore[call-overload]


COLUMNS = [
    ("prompts", {"task": "p", "question": "q"}, ["prompt=task"], Prompt("p")),
    ("prompts", {"task": "q"}, ["question=task"], Prompt("\n\nHuman: q\n\nAssistant:", turns=turns("Uq"))),
    ("demonstrations", {"problem": "p", "solution": "s", "answer": "4"}, ["prompt=problem", "completion=solution"],
     Demonstration("p", "s")),
    ("comparisons", {"prompt": "old", "ask": "p", "good": "c", "bad": "r"},
     ["prompt=ask", "chosen=good", "rejected=bad"], Comparison("p", "c", "r")),
    ("dialogues", {"talk": g("Uq|Ac")}, ["messages=talk"], Dialogue(turns("Uq|Ac"))),
]  # fmt: skip


def test_fields_under_other_names_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for one in COLUMNS:
        with case(one) as (kind, row, columns, record):
            path.write_text(json.dumps(row) + "\n")
            assert read_records(path, kind, Ledger(), columns=columns) == [record]
    for wrong, message in (
        (["prompt=nothing"], r"data\.jsonl:1: field 'nothing': missing; .*; columns say that it is 'prompt'"),
        (["title=talk"], "columns: expected fields among prompt, .*, got 'title'"),
    ):
        with case(wrong), pytest.raises(UserError, match=message):
            read_records(path, "prompts", Ledger(), columns=wrong)
    for entries in (("prompt",), ("=task",), ("prompt=",), ("prompt=a", "prompt=b")):
        with case(entries), pytest.raises(UserError, match="columns: expected "):
            PPOConfig(columns=entries)


UNLEARNED = [
    (m("Uq|Aaa", weight=0) + m("Ur|Abb", weight=1), (1,), ["bb"]),
    (m("Uq|Aaa", train=True) + m("Ur|Abb", train=False), (3,), ["aa"]),
    (
        m("SBe.|Uq", train=False) + m("Aaa", weight=0.0) + m("Ur|Abb") + m("Us|Acc", weight=0, train=False),
        (2, 6),
        ["bb"],
    ),
    ([g("Uq")[0], g("Aaa")[0] | {"weight": 0}, *g("Ur|Abb")], (1,), ["bb"]),
]


def test_a_turn_that_is_not_to_be_learned_carries_no_loss(tmp_path: Path) -> None:
    path, ledger = tmp_path / "data.jsonl", Ledger()
    config = {"eos_token": "<|im_end|>"}
    for messages, unlearned, learned in UNLEARNED:
        for source in (CHATML, unmarked(CHATML), THINKS, None):
            with case((messages, source)):
                path.write_text(json.dumps({"messages": messages}) + "\n")
                records = read_records(path, "dialogues", ledger)
                assert records[0].unlearned == unlearned
                tokenizer = BYTES if source is None else load("gpt2", config | {"chat_template": source})
                rows = encode_demonstrations(records, tokenizer, max_tokens=99, ledger=ledger)
                ids, mask = rows.rows[0]
                targets = tokenizer.decode(id for id, target in zip(ids, mask) if target)
                assert targets.replace("<think>\n\n</think>\n\n", "").split() == learned
                assert not ledger.decisions
    path.write_text(json.dumps({"messages": m("Uq|Aaa", weight=0)}) + "\n")
    assert read_records(path, "demonstrations", ledger) == []
    assert ledger.decisions[-1].reason == "no assistant turn that is to be learned"


PARTED = [
    ("Uq|Aa|Ur|Ab", "Uq|Ac", "Uq"),
    ("Uq|Ac", "Uq|Aa|Ur|Ab", "Uq"),
    ("Uq|Aa|Ur|Ab", "Uq|Aa|Us|Ab", "Uq"),
    ("SBe.|Uq|Aa|Ur|Ab|Us|Ac", "SBe.|Uq|Aa|Ur|Ad|Us|Ac", "SBe.|Uq|Aa|Ur"),
    ("Uq|Aa|Ur|Ab", "Uq|Aa", "Uq"),
]


def transcript(said: str) -> str:
    return "".join({"U": "\n\nHuman: ", "A": "\n\nAssistant: "}[part[0]] + part[1:] for part in said.split("|"))


def test_dialogues_that_part_before_the_last_answer_keep_their_turns(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chatml = load("gpt2", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    for chosen, rejected, shared in PARTED:
        rows: list[dict[str, Any]] = [
            {"chosen": m(chosen), "rejected": m(rejected)},
            {"prompt": "q", "chosen": m(chosen), "rejected": m(rejected)},
        ]
        if not chosen.startswith("S"):
            rows.append({"chosen": transcript(chosen), "rejected": transcript(rejected)})
            rows.append({"prompt": m("Uq"), "chosen": m(chosen)[1:], "rejected": m(rejected)[1:]})
            rows.append({"prompt": "q", "chosen": m(chosen)[1:], "rejected": m(rejected)[1:]})
        for row in rows:
            with case(row):
                path.write_text(json.dumps(row) + "\n")
                for tokenizer in (chatml, BYTES):
                    (ids,) = (r for r, _ in encode_rankings(
                        read_records(path, "comparisons", Ledger()), tokenizer, max_tokens=99, ledger=Ledger()
                    ).rows)  # fmt: skip
                    whole = [wanted_ids(said, tokenizer) for said in (chosen, rejected)]
                    # What follows the last answer's end is the header of the next.
                    end = tokenizer.eos_id
                    assert ids == [own[: len(own) - own[::-1].index(end)] for own in whole]
                    (prompt,) = encode_prompts(
                        read_records(path, "prompts", Ledger()), tokenizer, max_tokens=99, ledger=Ledger()
                    ).rows
                    assert prompt == wanted_ids(shared, tokenizer)
                with pytest.raises(UserError, match=r"data\.jsonl:1: .*differ in their last answer alone"):
                    read_tasks([path])
    ledger = Ledger()
    useless = [
        {"chosen": m("Uq|Aa|Ur"), "rejected": m("Uq|Ac")},
        {"chosen": m("Ah|Uq|Aa"), "rejected": m("Ai|Ur|Ab")},
        {"chosen": m("SBe.|Ah|Uq|Aa"), "rejected": m("SBe.|Ai|Ur|Ab")},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in useless))
    assert read_records(path, "comparisons", ledger) == []
    assert [decision.reason for decision in ledger.decisions] == [
        "chosen does not end with an assistant turn",
        "chosen and rejected share no turn of the user",
        "chosen and rejected share no turn of the user",
    ]
