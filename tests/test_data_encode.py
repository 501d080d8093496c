"""Which tokens a row holds and which carry loss, by hand."""

import time
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data.batches import PackedRankingRows, RankingRows
from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.encode import (
    chat_ids,
    dialogue_row,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_text,
    ordered_rankings,
    prompt_ids,
    ranking_rows,
    response_ids,
    response_row,
)
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.packing import pack_text
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompt, Ranking, Text
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.tiny_tokenizers import CHATML, GEMMA, LLAMA3, THINKS, load

pytestmark = pytest.mark.core

BYTES = Tokenizer.bytes()
BOS, EOS, PAD = BYTES.bos_id, BYTES.eos_id, BYTES.pad_id
CHAT = (Message("system", "S"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_a_demonstration_has_loss_on_its_completion_and_the_end() -> None:
    rows = encode_demonstrations([Demonstration("ab", " c", "f:1")], BYTES, max_tokens=9, ledger=Ledger())
    assert rows.rows[0] == ([BOS, *ids("ab c"), EOS], [False, False, False, True, True, True])
    assert rows.pad_id == PAD


def test_prompt_and_completion_are_tokenised_apart() -> None:
    tokenizer = Tokenizer.train(["ab ab ab ab"], 259 + 2)
    assert len(tokenizer.encode("ab")) == 1
    rows = encode_demonstrations([Demonstration("a", "b")], tokenizer, max_tokens=9, ledger=Ledger())
    assert rows.rows[0][0] == [tokenizer.bos_id, ord("a"), ord("b"), tokenizer.eos_id]


def test_a_response_that_did_not_end_has_no_end() -> None:
    prompt = prompt_ids(Prompt("p"), BYTES)
    assert response_ids("r", BYTES) == [ord("r"), EOS]
    assert response_ids("r", BYTES, ended=False) == [ord("r")]
    assert response_row(prompt, [7]) == ([BOS, ord("p"), 7], [False, False, True])
    assert ranking_rows(prompt, [[7, EOS], [8]]) == [[BOS, ord("p"), 7, EOS], [BOS, ord("p"), 8]]


def test_only_the_assistants_turns_of_a_dialogue_carry_loss() -> None:
    row, mask = dialogue_row((*CHAT, Message("assistant", "bc")), BYTES)
    first, second = ids("S\n\nHuman: u\n\nAssistant:"), ids("\n\nHuman: v\n\nAssistant:")
    assert row == [BOS, *first, *ids(" a"), EOS, *second, *ids(" bc"), EOS]
    assert mask == [False] * (1 + len(first)) + [True] * 3 + [False] * len(second) + [True] * 4


def test_a_turn_that_nobody_answers_carries_no_loss() -> None:
    row, mask = dialogue_row(CHAT, BYTES)
    assert row[-9:] == ids("Human: v\n\nHuman: v")[-9:]
    assert sum(mask) == len(" a") + 1 and not mask[-1]


def test_a_prompt_of_messages_is_what_a_dialogue_trains() -> None:
    row, _ = dialogue_row((*CHAT, Message("assistant", "bc")), BYTES)
    prompt = chat_ids(CHAT, BYTES)
    assert prompt == row[: len(prompt)] and row[len(prompt) :] == [*ids(" bc"), EOS]
    assert prompt_ids(Prompt("any", turns=CHAT), BYTES) == prompt


def test_a_row_too_long_is_dropped_and_named() -> None:
    ledger = Ledger()
    records = [Demonstration("ab", "c", "f:1"), Demonstration("ab", "cd", "f:2")]
    assert len(encode_demonstrations(records, BYTES, max_tokens=5, ledger=ledger)) == 1
    prompts = encode_prompts([Prompt("abcd", "f:3"), Prompt("abcde", "f:4")], BYTES, max_tokens=5, ledger=ledger)
    assert prompts.rows == [[BOS, *ids("abcd")]] and prompts.sources == [Prompt("abcd")]
    rankings = [Comparison("a", "bc", "b", "f:5"), Comparison("a", "b", "bcd", "f:6")]
    assert len(encode_rankings(rankings, BYTES, max_tokens=5, ledger=ledger)) == 1
    assert [(d.where, d.reason) for d in ledger.decisions] == [(f"f:{n}", "longer than 5 tokens") for n in (2, 4, 6)]
    assert (ledger.accepted, ledger.rejected, ledger.total, ledger.tokens) == (3, 3, 6, 5 + 5 + 5 + 4)


def test_comparisons_and_rankings_share_their_rows() -> None:
    records: list[Comparison | Ranking] = [Comparison("p", "c", "r"), Ranking("p", ("x", "y", "z"), (2, 1, 2))]
    rows = encode_rankings(records, BYTES, max_tokens=9, ledger=Ledger())
    assert rows.rows[0] == ([[BOS, *ids("pc"), EOS], [BOS, *ids("pr"), EOS]], (1, 2))
    assert rows.rows[1][1] == (2, 1, 2) and rows.responses == 3


def test_responses_equal_once_encoded_are_dropped() -> None:
    ledger = Ledger()
    records: list[Comparison | Ranking] = [Comparison("p", "c", "c", "f:1"), Ranking("p", ("x", "x"), (2, 1), "f:2")]
    assert len(encode_rankings(records, BYTES, max_tokens=9, ledger=ledger)) == 0
    assert [d.reason for d in ledger.decisions] == [
        "chosen equals rejected, once encoded",
        "all responses are equal, once encoded",
    ]


def test_equal_responses_are_ties() -> None:
    cases: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("xxy", (1, 2, 3), (1, 1, 2)),
        ("yxx", (1, 2, 3), (1, 2, 2)),
        ("xyxz", (1, 2, 3, 4), (1, 1, 1, 2)),  # y is above and below x
        ("xxyy", (2, 1, 4, 3), (1, 1, 2, 2)),
        ("xxyz", (1, 2, 2, 3), (1, 1, 1, 2)),  # y is tied with one x, so with both
        ("xyxy", (1, 2, 3, 4), ()),
        ("xyx", (3, 2, 1), ()),
        ("xyyz", (1, 3, 3, 4), (1, 3, 3, 4)),  # a tie already: as it was
        ("xyz", (2, 1, 2), (2, 1, 2)),
    ]
    for number, row in enumerate(cases):
        with case(row) as (texts, ranks, wanted):
            for encoded in (False, True):
                ledger, raw = Ledger(), [[1, ord(text)] for text in texts]
                if encoded:
                    rows = ordered_rankings(RankingRows([(raw, ranks)], 9), ledger)
                else:
                    records = [Ranking("p", tuple(texts), ranks, f"f:{number}")]
                    rows = encode_rankings(records, BYTES, max_tokens=9, ledger=ledger)
                assert [found for _, found in rows.rows] == ([wanted] if wanted else [])
                assert (ledger.accepted, ledger.rejected) == ((1, 0) if wanted else (0, 1))
                reasons = [d.reason for d in ledger.decisions]
                if not wanted:
                    assert reasons == ["all ranks are tied, as equal responses are"]
                else:
                    assert reasons == ["equal responses with unlike ranks, which are a tie"] * (wanted != ranks)
                if wanted:  # rows that came past both are tied in the batch
                    own = RankingRows([(raw, ranks)], 9)
                    for batch in (own.batch(np.array([0])), PackedRankingRows(own).batch(np.array([0]))):
                        assert batch.ranks_BK.tolist() == [list(wanted)]


def test_a_response_that_was_cut_is_trained_on_as_it_stands() -> None:
    rows = encode_demonstrations(
        [Demonstration("p", "c", ended=False), Demonstration("p", "c")], BYTES, max_tokens=9, ledger=Ledger()
    )
    assert rows.rows[0] == ([BOS, *ids("pc")], [False, False, True])
    assert rows.rows[1] == ([BOS, *ids("pc"), EOS], [False, False, True, True])
    records: list[Comparison | Ranking] = [
        Comparison("p", "c", "r", ended=(True, False)),
        Ranking(
            "p", ("x", "y", "x"), (1, 2, 3), ended=(True, True, False)
        ),  # x that ended is better than x that was cut
    ]
    rankings = encode_rankings(records, BYTES, max_tokens=9, ledger=Ledger()).rows
    assert rankings[0] == ([[BOS, *ids("pc"), EOS], [BOS, *ids("pr")]], (1, 2))
    assert rankings[1] == ([[BOS, *ids("px"), EOS], [BOS, *ids("py"), EOS], [BOS, *ids("px")]], (1, 2, 3))
    tokenizer = load("gpt2", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    cut = Comparison("any", " a", " b", turns=ASK, ended=(False, True))
    ((chosen, rejected), _) = encode_rankings([cut], tokenizer, max_tokens=50, ledger=Ledger()).rows[0]
    assert chosen == [*rejected[:-2], *tokenizer.encode("a")] and rejected[-1] == tokenizer.special_tokens["<|im_end|>"]


def test_special_text_in_a_prompt_is_plain_text() -> None:
    row = prompt_ids(Prompt("<|endoftext|>"), BYTES)
    assert row == [BOS, *ids("<|endoftext|>")]


ASK = (Message("user", "u"),)


def test_a_published_chat_template_writes_messages() -> None:
    tokenizer = load("gpt2", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    prompt = [
        start,
        *tokenizer.encode("user\nu"),
        end,
        *tokenizer.encode("\n"),
        start,
        *tokenizer.encode("assistant\n"),
    ]
    answer = [*tokenizer.encode("a"), end]
    assert chat_ids(ASK, tokenizer) == prompt_ids(Prompt("any", turns=ASK), tokenizer) == prompt
    assert response_ids(" a", tokenizer, turns=ASK) == answer
    assert response_ids(" a", tokenizer, turns=ASK, ended=False) == answer[:-1]
    records: list[Demonstration | Dialogue] = [
        Demonstration("any", " a", "f:1", turns=ASK),
        Dialogue((*ASK, Message("assistant", "a"), Message("user", "left out")), "f:2"),
    ]
    rows = encode_demonstrations(records, tokenizer, max_tokens=50, ledger=Ledger()).rows
    assert rows[0] == (prompt + answer, [False] * len(prompt) + [True] * len(answer))
    newline = tokenizer.encode("\n")
    assert rows[1] == (rows[0][0] + newline, rows[0][1] + [False] * len(newline))
    rankings = encode_rankings([Comparison("any", " a", " b", turns=ASK)], tokenizer, max_tokens=50, ledger=Ledger())
    assert rankings.rows[0][0] == [prompt + answer, [*prompt, *tokenizer.encode("b"), end]]


def test_a_dialogue_to_pretrain_on_is_written_by_the_template() -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3}
    talk = (*ASK, Message("assistant", "a"))
    document = Text("\n\nHuman: u\n\nAssistant: a", "f:1", talk)
    for start in ("", "<|begin_of_text|>"):
        tokenizer = load("llama3", config, start=start)
        begin, header, end, eot = (
            tokenizer.special_tokens[f"<|{name}|>"]
            for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
        )
        # What stands before every text comes with packing, and so does the end, here the one of the last turn.
        wanted = [] if tokenizer.start_ids else [begin]
        for role, content in talk:
            wanted += [header, *tokenizer.encode(role), end, *tokenizer.encode(f"\n\n{content}"), eot]
        ledger = Ledger()
        assert tokenizer.eos_id == eot and encode_text([document], tokenizer, ledger=ledger) == [wanted[:-1]]
        assert ledger.tokens == len(tokenizer.start_ids) + len(wanted)
    assert encode_text([document], BYTES, ledger=Ledger()) == [ids(document.text)]


def test_a_dialogue_to_pretrain_on_is_the_row_that_fine_tuning_has() -> None:
    talk = (Message("system", "S"), *ASK, Message("assistant", "a"), *ASK, Message("assistant", "b"))
    plain = load("gpt2", {"eos_token": "</s>"})
    metaspace = load("metaspace", {"bos_token": "<s>", "eos_token": "</s>"})
    for tokenizer in (BYTES, plain, metaspace):
        for messages in (talk, talk[:3], talk[:5], (*talk, Message("user", ""))):
            with case((tokenizer.name, messages)):
                (document,) = encode_text([Text("any", messages=messages)], tokenizer, ledger=Ledger())
                whole = [*tokenizer.start_ids, *document, tokenizer.eos_id]
                row = dialogue_row(messages, tokenizer)[0]
                # An answer ends in the middle too; the last one's end, or that of what follows it, is packing's.
                assert whole == row if messages[-1].role == "assistant" else whole == [*row, tokenizer.eos_id]
    assert encode_text([Text("any", messages=talk)], BYTES, ledger=Ledger()) == [
        [*ids("S\n\nHuman: u\n\nAssistant: a"), EOS, *ids("\n\nHuman: u\n\nAssistant: b")]
    ]


def test_text_that_was_rendered_already_and_answers_with_their_prompt_are_remarked() -> None:
    tokenizer = load("gpt2", {"eos_token": "<|im_end|>", "chat_template": CHATML})
    question = "Why is the sky blue?"
    letters = "has the text of a special token, {}, which is encoded as letters; give messages"
    twice = "begins with the prompt again in each answer, which then stands there twice"
    cases: list[tuple[Any, list[str]]] = [
        (Text("<|im_start|>user\nq<|im_end|>", "f:1"), [letters.format("<|im_start|>")]),
        (Text("x <s> y", "f:1"), [letters.format("<s>")]),
        (Text("x < s> y [INST]", "f:1"), []),
        (Prompt("[INST] q [/INST] </s>", "f:1"), [letters.format("</s>")]),
        (Demonstration("q", " a<|endoftext|>", "f:1"), [letters.format("<|endoftext|>")]),
        (Dialogue((*ASK, Message("assistant", "a</s>")), "f:1"), [letters.format("</s>")]),
        (Ranking("q", ("a", "b<bos>"), (1, 2), "f:1"), [letters.format("<bos>")]),
        (Demonstration(question, f" {question} Light.", "f:1"), [twice]),
        (Demonstration("any", f" {question} Light.", "f:1", (Message("user", question),)), [twice]),
        (Comparison(question, f"{question} a", f"\n{question} b", "f:1"), [twice]),
        (Comparison(question, f"{question} a", " b", "f:1"), []),
        (Ranking("Why?", ("Why? a", "Why? b"), (1, 2), "f:1"), []),
    ]
    for record, reasons in cases:
        with case(record):
            ledger = Ledger()
            if isinstance(record, Text):
                encode_text([record], tokenizer, ledger=ledger)
            elif isinstance(record, Prompt):
                encode_prompts([record], tokenizer, max_tokens=99, ledger=ledger)
            elif isinstance(record, Comparison | Ranking):
                encode_rankings([record], tokenizer, max_tokens=99, ledger=ledger)
            else:
                encode_demonstrations([record], tokenizer, max_tokens=99, ledger=ledger)
            assert [tuple(decision) for decision in ledger.decisions] == [("f:1", "remarked", r) for r in reasons]


def test_a_prompt_of_text_stays_text() -> None:
    tokenizer = load("gpt2", {"eos_token": "</s>", "chat_template": CHATML})
    assert prompt_ids(Prompt("a cat"), tokenizer) == tokenizer.encode("a cat")
    assert response_ids(" sat", tokenizer) == [*tokenizer.encode(" sat"), tokenizer.eos_id]
    metaspace = load("metaspace", {"eos_token": "</s>"})
    assert prompt_ids(Prompt("a cat"), metaspace) == [metaspace.special_tokens["<s>"], *metaspace.encode("a cat")]
    assert metaspace.decode(prompt_ids(Prompt("a c"), metaspace) + response_ids("at", metaspace)) == "a cat"


def test_without_a_template_messages_are_written_as_ever() -> None:
    tokenizer = load("gpt2", {"eos_token": "</s>"})
    row, mask = dialogue_row((*ASK, Message("assistant", "a"), *ASK), tokenizer)
    before, answer, after = (tokenizer.encode(text) for text in ("\n\nHuman: u\n\nAssistant:", " a", "\n\nHuman: u"))
    assert row == [*before, *answer, tokenizer.eos_id, *after]
    assert mask == [False] * len(before) + [True] * (len(answer) + 1) + [False] * len(after)


def test_answers_that_a_template_rewrites_are_remarked() -> None:
    tokenizer = load("gpt2", {"eos_token": "<|im_end|>", "chat_template": THINKS})
    ledger = Ledger()
    twice = Dialogue((*ASK, Message("assistant", "a"), *ASK, Message("assistant", "b")), "f:1")
    assert len(encode_demonstrations([twice], tokenizer, max_tokens=99, ledger=ledger)) == 1
    assert [tuple(decision) for decision in ledger.decisions] == [
        ("f:1", "remarked", "answers without loss: 1, which the chat template rewrites once others follow")
    ]


def test_answers_that_no_token_ends_are_remarked() -> None:
    reason = (
        "by the chat template no token ends the answer, so the model does not learn to stop; use a tokenizer with the "
        "template's tokens, or --chat-template FILE"
    )
    answer = Message("assistant", "a")
    for end, stops in (("<|im_end|>", True), ("</s>", True), ("[END]", False), ("", False), ("<|other_end|>", False)):
        tokenizer = load("gpt2", {"eos_token": "</s>", "chat_template": CHATML.replace("<|im_end|>", end)})
        for record in (
            Demonstration("any", " a", "f:1", turns=ASK),
            Dialogue((*ASK, answer), "f:1"),
            Dialogue((*ASK, answer, *ASK, answer, *ASK), "f:1"),
        ):
            with case((end, record)):
                ledger = Ledger()
                assert len(encode_demonstrations([record], tokenizer, max_tokens=99, ledger=ledger)) == 1
                assert [d.reason for d in ledger.decisions] == ([] if stops else [reason])
        ledger = Ledger()
        for plain in (Demonstration("q", " a", "f:1"), Demonstration("any", " a", "f:1", turns=ASK, ended=False)):
            encode_demonstrations([plain], tokenizer, max_tokens=99, ledger=ledger)
        assert not ledger.decisions


def test_messages_that_a_template_refuses_are_named() -> None:
    tokenizer = load("gpt2", {"eos_token": "<end_of_turn>", "chat_template": GEMMA})
    with pytest.raises(UserError, match=r"^f:3: chat template: System role not supported"):
        encode_prompts([Prompt("any", "f:3", turns=CHAT)], tokenizer, max_tokens=99, ledger=Ledger())
    with pytest.raises(UserError, match=r"^f:4: chat template: Roles must alternate"):
        encode_demonstrations([Dialogue((*ASK, *ASK), "f:4")], tokenizer, max_tokens=99, ledger=Ledger())


def test_two_megabytes_in_about_a_second() -> None:
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog, and so on. " * 50], 400)
    records = [Text(f"{n} jumps over the dog, and so on. " * 30, f"f:{n}") for n in range(2000)]
    start = time.process_time()
    docs = encode_text(records, tokenizer, ledger=Ledger())
    rows = pack_text(docs, length=64, start_ids=tokenizer.start_ids, eos_id=tokenizer.eos_id)
    assert time.process_time() - start < 5  # takes 0.4 s
    assert rows.targets == sum(len(doc) + 1 for doc in docs)
