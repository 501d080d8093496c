"""A model as labeller: its preferences by hand, and what cancels when the order is turned round."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Message, chat_ids
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.ai_feedback import Judge, judge_items, question, ranks_of
from rlhf_jax.feedback.judged import join
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.trust import agreement_with_people
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.source import Source
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.random_params import initialized

pytestmark = pytest.mark.feedback

ITEMS = [
    Item("1", "Say it.", ("long one", "ok", "middle")),
    Item("2", "", ("a", "bb"), turns=(Message("system", "Be brief."), Message("user", "Hi"))),
    Item("3", "", ("same", "size")),
]


@pytest.fixture(scope="module")
def source() -> Source:
    tokenizer = Tokenizer.bytes()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context=256, width=16, layers=1, heads=2)
    params = initialized(Transformer(config), jax.random.key(0))
    return Source(
        where="tiny",
        spec="tiny",
        stage="sft",
        model=config,
        tokenizer=tokenizer,
        scalar=False,
        origin=None,
        own=lambda: params,
        identify=lambda: "",
    )


def test_log_odds_are_those_of_the_whole_model(source: Source) -> None:
    judge = Judge(source, batch=2)
    texts = ["short?", "a question that is longer than the other", "x" * 300]
    found = judge.log_odds(texts)
    assert np.isnan(found[2])
    model, params = source.network(), source.params()
    apply = jax.jit(model.apply)
    for text, odds in zip(texts[:2], found):
        ids = [*chat_ids((Message("user", text),), source.tokenizer), ord(" ")]
        logits = apply({"params": params}, np.array([ids]))[0, -1]
        assert odds == pytest.approx(float(logits[ord("A")] - logits[ord("B")]), abs=1e-5)
    np.testing.assert_allclose(judge.log_odds(texts[1::-1]), found[1::-1], atol=1e-5)


def test_a_taste_for_a_letter_or_a_place_cancels(source: Source) -> None:
    def likes_length_and_a(texts: Sequence[str]) -> np.ndarray:
        first, second = zip(*(text.split("(A) ")[1].split("\n\nChoose")[0].split("\n\n(B) ") for text in texts))
        return np.array([0.5 * (len(a) - len(b)) + 3.0 for a, b in zip(first, second)])

    answers = judge_items(ITEMS, likes_length_and_a, "stub")
    assert [j.ranks for j in answers.judgements] == [(1, 3, 2), (2, 1), (1, 1)]
    assert {j.labeller for j in answers.judgements} == {"ai:stub"}
    # Log-odds 3 + h one way and 3 - h the other, h = 3, 1, -2; -0.5; 0: with h = 3 they are 6 and 0, no A; with the
    # others A is the answer to both, so the better response changes.
    assert answers.pairs == 5 and answers.turned == pytest.approx(4 / 5)
    whole = judge_items(ITEMS, Judge(source).log_odds, "ai:tiny")
    swapped = [Item(i.id, i.prompt, i.responses[::-1], i.turns) for i in ITEMS]
    turned = judge_items(swapped, Judge(source).log_odds, "ai:tiny")
    assert [j.ranks[::-1] for j in turned.judgements] == [j.ranks for j in whole.judgements]


def test_ranks_are_by_the_sum_of_probabilities() -> None:
    # Sums 0.5 + 0.9 + 0.4 = 1.8, 0.5 + 0.1 + 0.6 = 1.2, 0.5 + 0.6 + 0.4 = 1.5.
    assert ranks_of(np.array([[0.5, 0.9, 0.4], [0.1, 0.5, 0.6], [0.6, 0.4, 0.5]])) == (1, 3, 2)


def test_what_is_asked() -> None:
    text = question(ITEMS[1], "a", " bb", "Be kind.")
    assert text == (
        "Here is what was said so far:\n\nBe brief.\n\nHuman: Hi\n\nTwo responses follow.\n\n(A) a\n\n(B) bb\n\n"
        "Be kind.\n\nAnswer with one letter, A or B."
    )
    assert question(ITEMS[2], "a", "b", "p").startswith("Two responses")


def test_what_does_not_fit_is_skipped(source: Source) -> None:
    long = Item("4", "x" * 400, ("a", "b"))
    answers = judge_items([ITEMS[2], long], Judge(source).log_odds, "tiny")
    assert [bool(j.skip) for j in answers.judgements] == [False, True] and answers.judgements[1].ranks == ()


def test_agreement_with_people_counts_each_person_and_each_pair_once() -> None:
    people = [Judgement("1", "ann", (1, 3, 2)), Judgement("1", "bob", (3, 1, 2)), Judgement("2", "ann", (1, 1))]
    model = [Judgement("1", "ai:m", (1, 3, 2)), Judgement("2", "ai:m", (1, 2)), Judgement("1", "ai:n", (1, 2, 3))]
    share, pairs = agreement_with_people(join(ITEMS, people + model), "ai:m")
    # All 3 pairs of item 1 as ann has them, none as bob has them.
    assert share is not None and share.value == pytest.approx(3 / 6) and pairs == 3


def test_answers_must_be_one_token_apart(source: Source) -> None:
    class Odd:
        chat_template = None

        def encode_continuation(self, text: str) -> list[int]:
            return list(text.encode()) * (2 if "B" in text else 1)

    odd: Any = Odd()
    with pytest.raises(UserError, match="tiny: expected answers A and B whose token ids differ in the last only"):
        Judge(dataclasses.replace(source, tokenizer=odd))
