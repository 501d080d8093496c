"""Items sampled on the spot: each model's answers to the same prompts, compared blind, from the command line on."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import inference
from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.encode import prompt_ids
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.features import rows_of
from rlhf_jax.feedback.queue import Queue, Rules
from rlhf_jax.feedback.sampled import sample_items
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import read_tasks
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.source import Source
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.random_params import initialized
from tests.tiny_tokenizers import CHATML, load

pytestmark = pytest.mark.feedback

PROMPTS = [
    Prompt("red blue ->", "prompts.jsonl:1"),
    Prompt("\n\nHuman: Hi\n\nAssistant:", "prompts.jsonl:2", (Message("user", "Hi"),)),
    Prompt("a longer prompt than those ->", "prompts.jsonl:3"),
]


def source(spec: str, **_: object) -> Source:
    """A model that never learned, another for each name."""
    tokenizer = Tokenizer.bytes()
    model = ModelConfig(vocab_size=tokenizer.vocab_size, context=64, width=16, layers=1, heads=2)
    params = initialized(Transformer(model), jax.random.key(len(spec)))
    return Source(
        where=spec,
        spec=spec,
        stage="sft",
        model=model,
        tokenizer=tokenizer,
        scalar=False,
        origin=None,
        own=lambda: params,
        identify=lambda: spec,
    )


def test_each_model_answers_each_prompt() -> None:
    models = [source("runs/a"), source("runs/other")]
    items = sample_items(models, PROMPTS, samples=2, max_new_tokens=6, temperature=1.0, seed=3)
    assert [item.prompt for item in items] == [prompt.prompt for prompt in PROMPTS]
    assert all(item.sources == ("runs/a", "runs/a", "runs/other", "runs/other") for item in items)
    assert all(len(item.responses) == 4 and len(set(item.responses)) > 1 for item in items)
    assert items[1].turns == PROMPTS[1].turns
    assert items == sample_items(models, PROMPTS, samples=2, max_new_tokens=6, temperature=1.0, seed=3)
    alone = sample_items([models[0], models[0]], PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
    # The same model twice is no pair of copies: each column has draws of its own.
    assert any(item.responses[0] != item.responses[1] for item in alone)


def test_a_response_without_an_end_is_marked_as_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, eos = Tokenizer.bytes(), Tokenizer.bytes().eos_id
    # At the limit with its end, cut, ended at once, a blank that was cut, an end in the middle of the room.
    sampled_ids = ([104, 105, eos], [104, 105, 33], [eos], [32], [104, eos])
    calls = iter(sampled_ids)

    def generate(*_: object, **__: object) -> Any:
        tokens = np.tile(next(calls), (inference.ROWS, 1))
        return SimpleNamespace(tokens=tokens, mask=np.ones_like(tokens, bool))

    monkeypatch.setattr(inference, "generate", generate)
    (item,) = sample_items([source(f"runs/{n}") for n in range(5)], PROMPTS[:1], max_new_tokens=3)
    assert item.responses == ("hi", "hi!", "", " ", "h") and item.ended == (True, False, True, False, True)
    asked, rows = prompt_ids(PROMPTS[0], tokenizer), rows_of(item, tokenizer, ended=True)
    # What is trained on is what stood there, with an end where there was one.
    assert rows == [[*asked, *ids] for ids in sampled_ids]
    assert rows_of(item, tokenizer, ended=False)[0] == rows[0][:-1]
    # A chat model's turn ends by its own token, and a dialogue's answer is without the space around it.
    chat = load("gpt2", {"eos_token": "<|endoftext|>", "chat_template": CHATML})
    turn, text = chat.special_tokens["<|im_end|>"], chat.encode("hi")
    calls = iter(([*text, turn], [*text, *text], [*text, chat.eos_id]))
    models = [dataclasses.replace(source(f"runs/{n}"), tokenizer=chat) for n in range(3)]
    (item,) = sample_items(models, PROMPTS[1:2], max_new_tokens=len(text) * 2)
    assert item.responses == ("hi", "hihi", "hi") and item.ended == (True, False, True)


ASK, ANSWER, BLANK = ({"role": role, "content": said} for role, said in zip(("user", *["assistant"] * 2), "qa "))
HH = "\n\nHuman: q\n\nAssistant:"
USELESS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "q", "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen equals rejected"),
    ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "chosen equals rejected"),
    ({"chosen": f"{HH} a", "rejected": f"{HH} a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": "", "rejected": ""}, "chosen equals rejected"),
    ({"chosen": [ASK, BLANK], "rejected": [ASK, ANSWER]}, "empty chosen response"),
    ({"chosen": f"{HH} a", "rejected": HH}, "empty rejected response"),
]


def test_rows_that_are_no_item_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [("a", "b"), ("a", "a"), ("a", " "), ("a", "b"), ("b", "a"), ("c", "c")]
    rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as end:
        main(["label", "labels", "--data", "pairs.jsonl", "--no-serve"])
    assert end.value.code == 0
    assert capsys.readouterr().err.splitlines() == [
        "6 rows: 2 kept, 0 cut, 4 dropped",
        "  dropped 2: chosen equals rejected (first at pairs.jsonl:2)",
        "  dropped 1: empty rejected response (first at pairs.jsonl:3)",
        "  dropped 1: the same prompt and responses as in an earlier row (first at pairs.jsonl:4)",
        "  remarked 1: the same as an earlier row (first at pairs.jsonl:4)",
        "  remarked 1: the opposite of pairs.jsonl:1: the same two responses the other way round (first at "
        "pairs.jsonl:5)",
        "every one of them is in labels/ledger.json",
        "labels: 2 items, 2 of them new",
    ]
    decided = json.loads(Path("labels/ledger.json").read_text())["rows"]
    assert {row["where"] for row in decided} == {f"pairs.jsonl:{line}" for line in (2, 3, 4, 5, 6)}
    # In every form: messages, dialogues, transcripts.
    for row, reason in USELESS:
        with case(row):
            good = {"prompt": "p", "chosen": "a", "rejected": "b"}
            Path("one.jsonl").write_text("\n".join(map(json.dumps, (row, good))))
            ledger = Ledger()
            assert [item.responses for item in read_tasks(["one.jsonl"], ledger=ledger)] == [("a", "b")]
            assert [(d.where, d.what, d.reason) for d in ledger.decisions] == [("one.jsonl:1", "dropped", reason)]
    Path("none.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(SystemExit) as end:
        main(["label", "labels", "--data", "none.jsonl", "--no-serve"])
    assert end.value.code == 2
    assert (
        "none.jsonl: expected one JSON object on each line, got none to label, the last at none.jsonl:1: chosen equals"
        in (capsys.readouterr().err)
    )


def test_what_cannot_be_sampled_is_named() -> None:
    models = [source("runs/a"), source("runs/other")]
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:3: expected 1 to 24 tokens for runs/a \(its context of 64 .*, got 30"
    ):
        sample_items(models, PROMPTS, max_new_tokens=40)
    with pytest.raises(UserError, match="expected 2 to 9 responses to a prompt, got 2 runs with 5 samples each"):
        sample_items(models, PROMPTS, samples=5)


def test_two_runs_are_compared_blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_jax.pretrained.source.open_source", source)
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} ->"}) for n in range(12)))
    flags = ["labels", "--run", "runs/a", "--run", "runs/other", "--prompts", "prompts.jsonl", "--max-new-tokens", "6"]
    for _ in range(2):  # the second time adds nothing
        with pytest.raises(SystemExit) as end:
            main(["label", *flags, "--no-serve", "--temperature", "1"])
        assert end.value.code == 0
    with contextlib.closing(Store(Path("labels"))) as store:
        assert [item.sources for item in store.items()] == [("runs/a", "runs/other")] * 12
        queue, ann = Queue(store, Rules()), store.add_labeller("ann")
        orders = {queue.order(ann, item) for item in store.items()}
        assert orders == {(0, 1), (1, 0)}
