"""Items sampled on the spot: each model's answers to the same prompts, compared blind, from the command line on."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.queue import Queue, Rules
from rlhf_jax.feedback.sampled import sample_items
from rlhf_jax.feedback.store import Store
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.pretrained.source import Source
from rlhf_jax.tokenizers.bpe import Tokenizer

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
    params = init_params(Transformer(model), jax.random.key(len(spec)))
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
