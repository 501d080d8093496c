"""Held-out rows: no prompt on both sides, an exact share, whatever the order, and said."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.data import Comparison, Demonstration, Dialogue, Ledger, Message, Prompt, Ranking, Text, read_records
from rlhf_jax.data.batches import PromptRows, RaggedRows, RankingRows
from rlhf_jax.data.dialogues import render_prompt
from rlhf_jax.data.encode import encode_demonstrations, encode_prompts, encode_rankings
from rlhf_jax.data.records import Record
from rlhf_jax.data.split import held_out_keys, hold_out, hold_out_texts, prompt_key, remark_shared
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.export import export
from rlhf_jax.feedback.records import Judgement
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import ppo, ppo_start, preference, pretrain, reward, sft
from tests.cases import case
from tests.made_runs import random_source

pytestmark = pytest.mark.core

BYTES = Tokenizer.bytes()
ASK, ANSWER, MORE = Message("user", "Why?"), Message("assistant", "So."), Message("user", "And?")


def keys(rows: RaggedRows | RankingRows | PromptRows) -> set[str]:
    return {prompt_key(record) for record in rows.sources}


def test_prompts_that_are_the_same() -> None:
    why = prompt_key(Prompt("Why?"))
    same: list[Record] = [
        Demonstration("Why?", "So."),
        Comparison(" Why?\n", "a", "b"),
        Ranking("any", ("a", "b"), (1, 2), turns=(ASK,)),
        Dialogue((ASK, ANSWER)),
        Dialogue((ASK, ANSWER, MORE, ANSWER)),
        Prompt("any", turns=(ASK, ANSWER, MORE)),
        Comparison("\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:", " a", " b"),
        Prompt("\n\nHuman: Why?\n\nAssistant:"),
    ]
    for record in same:
        with case(record):
            assert prompt_key(record) == why
    hello = Message("assistant", "Hello!")
    others: list[Record] = [
        Prompt("why?"),
        Text("Why?"),
        Dialogue((Message("system", "Be brief."), ASK, ANSWER)),
        Dialogue((hello, ASK, ANSWER)),
        Dialogue((hello, MORE, ANSWER)),
        Demonstration("", "Why?"),
        Demonstration(" ", "So."),
        Comparison("", "a", "b"),
        Comparison("", "a", "c"),
    ]
    found = [why, *(prompt_key(record) for record in others)]
    assert len(set(found)) == len(found)
    assert prompt_key(Comparison("", "b", "a")) == prompt_key(Comparison("", "a", "b"))


def test_an_exact_share_of_the_prompts() -> None:
    # round(N * share), at least 1 if anything can be held out, and never everything.
    cases = [(0, 0.05, 0), (1, 0.05, 0), (2, 0.05, 1), (29, 0.05, 1), (31, 0.05, 2), (1000, 0.05, 50), (1000, 0.0, 0)]
    cases += [(2, 0.9, 1), (3, 0.5, 2), (17, 0.34, 6)]
    for prompts, share, count in cases:
        with case((prompts, share)):
            every = [f"p{number}" for number in range(prompts)]
            held = held_out_keys(every * 3, share)
            assert len(held) == count
            assert held == held_out_keys(random.Random(1).sample(every, prompts), share)
    many = [f"p{number}" for number in range(1000)]
    assert len(held_out_keys(many, 0.05, seed=0) & held_out_keys(many, 0.05, seed=1)) < 15
    # A prompt that is held out stays so when others leave: stages on parts of the data agree.
    held = held_out_keys(many, 0.05)
    assert len(held_out_keys(sorted(held) + many[:200], 0.2) & held) > 40


def test_labels_that_are_noise_cannot_be_known_from_the_other_rows() -> None:
    """A table of the training rows' labels by prompt and answer, the most that can be learned, says nothing."""
    draw = random.Random(0)
    records = []
    for number in range(2000):
        a, b = draw.sample(["yes", "no", "perhaps"], 2)
        records.append(Comparison(f"question {number % 100}", a, b, f"f:{number + 1}"))
    ledger = Ledger()
    rows = encode_rankings(records, BYTES, max_tokens=99, ledger=ledger)
    trained, held = hold_out(rows, 0.05, seed=0, ledger=ledger)
    keys_held = keys(held)
    assert keys(trained).isdisjoint(keys_held) and len(keys_held) == 5 and len(keys(trained)) == 95
    assert (len(trained), len(held)) == (1900, 100)
    places = [n for n, record in enumerate(records) if prompt_key(record) in keys_held]
    assert held.sources == [records[n] for n in places] and held.rows == [rows.rows[n] for n in places]
    won = {(r.prompt, r.chosen, r.rejected) for r in trained.sources}
    assert not any(
        (r.prompt, r.chosen, r.rejected) in won or (r.prompt, r.rejected, r.chosen) in won for r in held.sources
    )
    assert (ledger.accepted, ledger.held_out, ledger.rejected, ledger.undecided) == (1900, 100, 0, 0)
    assert ledger.tokens == sum(len(ids) for responses, _ in trained.rows for ids in responses)
    assert ledger.reasons() == {"held out": {"5 of 100 prompts, to evaluate on": 100}}


def test_every_kind_of_row_is_split_by_prompt() -> None:
    spoken = [Dialogue((Message("user", f"q{n % 9}"), ANSWER, MORE, Message("assistant", str(n)))) for n in range(45)]
    written = [Demonstration(f"q{n % 9}", f" {n}") for n in range(45)]
    prompts = [Prompt(record.prompt) for record in written]
    ledgers = {"sft": Ledger(), "ppo": Ledger()}
    cases: list[tuple[str, Any]] = [
        ("sft", encode_demonstrations([*spoken, *written], BYTES, max_tokens=99, ledger=ledgers["sft"])),
        ("ppo", encode_prompts(prompts, BYTES, max_tokens=9, ledger=ledgers["ppo"])),
    ]
    for kind, rows in cases:
        with case(kind):
            trained, held = hold_out(rows, 0.2, seed=3, ledger=ledgers[kind])
            assert len(keys(held)) == 2 and keys(trained).isdisjoint(keys(held))
            assert len(held) == len(rows) * 2 // 9 and len(trained) + len(held) == len(rows)
            assert ledgers[kind].tokens == sum(len(row[0]) if kind == "sft" else len(row) for row in trained.rows)
    texts = [Text("a b"), Text("c"), Text("a  b\n"), Text("d")]
    for seed in range(6):
        kept, out = hold_out_texts(texts, 0.3, seed=seed, ledger=Ledger())
        assert len({" ".join(text.text.split()) for text in out}) == 1
        assert {" ".join(text.text.split()) for text in out}.isdisjoint(" ".join(text.text.split()) for text in kept)


def test_an_export_of_judgements_does_not_leak(tmp_path: Path) -> None:
    items = [make_item(f"q{n}", ["a", "b", "c"]) for n in range(20)]
    talks = [[Message("user", f"q{n}"), ANSWER, MORE] for n in range(5)]
    items += [make_item(render_prompt(turns), ["a", "b"], turns=turns) for turns in talks]
    judged = [
        Judgement(item.id, who, tuple(range(1, len(item.responses) + 1))) for item in items for who in ("ann", "bob")
    ]
    for form in ("rankings", "trl"):
        with case(form):
            export(items, judged, tmp_path / form, form=form)  # type: ignore[arg-type]
            ledger = Ledger()
            records = read_records(tmp_path / form / f"{form}.jsonl", "rankings", ledger)
            rows = encode_rankings(records, BYTES, max_tokens=99, ledger=ledger)
            trained, held = hold_out(rows, 0.1, seed=0, ledger=ledger)
            # The five dialogues open with the question of an item that is text.
            assert len(keys(held)) == 2 and keys(trained).isdisjoint(keys(held)) and len(keys(trained)) == 18
            assert (ledger.total, ledger.undecided) == (len(records), 0)


def test_files_that_share_prompts_are_remarked_on() -> None:
    ledger = Ledger()
    remark_shared([Prompt("a"), Prompt("b")], [Prompt("c", "f:1"), Demonstration("b", "x", "f:2")], ledger)
    assert [(d.where, d.what) for d in ledger.decisions] == [("f:2", "remarked")]


class _Stop(Exception):
    """Raised in place of training."""


def started(monkeypatch: pytest.MonkeyPatch, trainer: Any, config: Any) -> Any:
    """The config with which a trainer would begin to train."""
    model = ModelConfig(vocab_size=BYTES.vocab_size, context=24, width=8, layers=1, heads=1)

    def stop(folder: Any, config: Any, *_: Any, **__: Any) -> None:
        raise _Stop(config)

    def model_of(config: Any, spec: str, **_: Any) -> Any:
        return random_source(model, scalar=spec == "judge")

    monkeypatch.setattr(trainer, "open_for", model_of)
    if trainer is ppo:
        monkeypatch.setattr(ppo_start, "open_for", model_of)
    monkeypatch.setattr(trainer, "train", stop)
    with pytest.raises(_Stop) as stopped:
        trainer.run(config)
    return stopped.value.args[0]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_trainers_say_what_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{n % 21}", "chosen": "a" * (n // 21 + 1), "rejected": "b"} for n in range(63)]
    pairs = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "long" * 9, "chosen": "a", "rejected": "b"}])
    one = write(tmp_path / "one.jsonl", [{"prompt": "p", "completion": str(n)} for n in range(5)])
    texts = write(tmp_path / "texts.jsonl", [{"text": "abc"}, {"text": "defghijk"}, {"text": " "}])
    long = write(tmp_path / "long.jsonl", [{"prompt": "long" * 9, "chosen": "a", "rejected": "b"}] * 2)
    said = write(
        tmp_path / "said.jsonl",
        [{"prompt": p, "completion": c} for p, c in (("new", "x"), ("long" * 9, "x"), ("p", " "))],
    )
    shared = write(tmp_path / "shared.jsonl", [rows[4], {"prompt": "new", "chosen": "a", "rejected": "b"}])
    short: dict[str, Any] = {
        "prompt_length": 9,
        "pretraining_row_length": 8,
        "episode": EpisodeConfig(response_length=4),
    }
    mix: dict[str, Any] = {"pretraining_data": (texts,), "pretraining_batch": 4, "pretraining_coef": 1.0}
    cases: list[tuple[Any, Any, int, list[str]]] = [
        # 60 rows are left of 63, and one epoch of them is two batches of 32.
        (reward, {"data": (pairs,)}, 2, ["64 rows: 60 kept, 0 cut, 1 dropped, 3 held out\n",
            "held out 3: 1 of 21 prompts, to evaluate on (first at ",
            " 1.07 epochs"]),
        (reward, {"data": (pairs,), "heldout": (shared,), "steps": 1}, 1, ["64 rows: 63 kept, 0 cut, 1 dropped\n",
            "heldout: 2 rows: 2 kept, 0 cut, 0 dropped\n  remarked 1: also trained on: its prompt"]),
        (ppo, {"data": (pairs,), "steps": 1, "reward": "judge", **short, **mix},
            1, ["pretraining_data: 3 rows: 2 kept, 0 cut, 1 dropped\n  dropped 1: empty text (first at ",
                "\n1 steps of 32 prompts are 0.508 epochs of 63 prompts; 31 of them are never drawn\n",
                "\n1 steps of 4 rows of the pretraining mix are 2 epochs of 2 rows"]),
        (pretrain, {"data": (texts,), "heldout": (texts,), "tokenizer": "bytes", "steps": 1, "init": ""}, 1, [
            "heldout: 3 rows: 2 kept, 0 cut, 1 dropped\n", "  remarked 2: also trained on"]),
        (pretrain, {"data": (texts,), "heldout": (texts,), "tokenizer": "bytes", "steps": 3, "batch": 64, "init": ""},
            3, ["\n3 steps of 64 rows are 192 epochs of 1 rows\nwarning: more than some 40 passes over the same text ",
                "; use more text, or fewer steps (1)\n"]),
        (sft, {"data": (one,), "steps": 1}, 1, ["warning: nothing is held out, as all rows have the same prompt"]),
        (sft, {"data": (one,), "heldout": (said,), "steps": 1}, 1, ["heldout: 3 rows: 1 kept, 0 cut, 2 dropped\n",
            "  dropped 1: longer than 24 tokens (first at ", "  dropped 1: empty completion (first at "]),
        (preference, {"data": (pairs,), "heldout": (pairs,), "steps": 1}, 1, [
            "heldout: 64 rows: 63 kept, 0 cut, 1 dropped\n", "  remarked 64: also trained on: its prompt"]),
        # The rows that scores are centred on.
        (reward, {"data": (pairs,), "demonstrations": (said,), "steps": 1}, 1, [
            "demonstrations: 3 rows: 1 kept, 0 cut, 2 dropped\n"]),
    ]  # fmt: skip
    for number, (trainer, settings, steps, wanted) in enumerate(cases):
        with case((settings, wanted)):
            given = {"init": "tiny", "out": str(tmp_path / str(number)), "batch": 32, **settings}
            config = trainer.Config(**given)
            assert started(monkeypatch, trainer, config).steps == steps
            said = capsys.readouterr().err
            assert all(text in said for text in wanted), said
    long_answers = write(tmp_path / "answers.jsonl", [{"prompt": "p", "completion": "long" * 9}] * 2)
    for trainer, paths, heldout in (
        (reward, {"data": (pairs,)}, long),
        (preference, {"data": (pairs,)}, long),
        (sft, {"data": (one,)}, long_answers),
    ):
        config = trainer.Config(init="tiny", out=str(tmp_path / "none"), heldout=(heldout,), **paths)
        with (
            case(trainer.__name__),
            pytest.raises(
                UserError, match=r"heldout: none of 2 held-out rows is left to evaluate on; 2 dropped, the first at "
            ),
        ):
            trainer.run(config)
        assert not (tmp_path / "none").exists()
    centring = reward.Config(
        init="tiny", out=str(tmp_path / "none"), data=(pairs,), heldout=(shared,), demonstrations=(long_answers,)
    )
    with pytest.raises(UserError, match=r"demonstrations: expected some of at most 24 tokens to center the scores on"):
        reward.run(centring)
    assert not (tmp_path / "none").exists()
    blank = write(tmp_path / "blank.jsonl", [{"text": " "}])
    mix["pretraining_data"] = (blank,)
    with pytest.raises(
        UserError, match=r"pretraining_data: none of 1 texts of the pretraining mix is left to train on"
    ):
        ppo.run(ppo.Config(init="tiny", reward="judge", out=str(tmp_path / "none"), data=(pairs,), **short, **mix))
    with pytest.raises(
        UserError, match=r"heldout: none of 1 held-out rows is left to evaluate on; 1 dropped, the first"
    ):
        pretrain.run(pretrain.Config(out=str(tmp_path / "none"), data=(texts,), heldout=(blank,)))
    assert not (tmp_path / "none").exists()
