"""What is asked next: what the labels leave open, what reward models disagree about, and never what was asked."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Comparison, Ledger, Message, encode_rankings
from rlhf_jax.feedback.features import hidden_states, principal, rows_of, standardized
from rlhf_jax.feedback.next_items import next_by_ensemble, next_by_heads
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.model import Transformer, stack_blocks
from rlhf_jax.pretrained.source import Source
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.random_params import initialized

pytestmark = pytest.mark.feedback

# Responses differ in the first feature alone, in the second alone, or in none.
FIRST, SECOND, NONE = ([1.0, 0.0], [-1.0, 0.0]), ([0.0, 1.0], [0.0, -1.0]), ([0.5, 0.5], [0.5, 0.5])


def made(kinds: list[tuple[list[float], list[float]]]) -> tuple[list[Item], np.ndarray]:
    return [make_item(f"p{n}", ["a", "b"]) for n in range(len(kinds))], np.array(list(itertools.chain(*kinds)))


def test_what_the_labels_leave_open_is_asked() -> None:
    items, features = made([FIRST] * 6 + [SECOND] * 6 + [NONE])
    for known, wanted in ((range(5), items[6:8]), (range(6, 11), items[:2])):
        said = [Judgement(items[n].id, "ann", (1, 2) if n != 2 else (2, 1)) for n in known]
        assert next_by_heads(items, features, said, 2) == wanted
    # No label: one of each, before a second of the first.
    assert next_by_heads(items, features, [], 2) == [items[0], items[6]]
    assert {item.id for item in next_by_heads(items, features, [], 99)} == {item.id for item in items}


def test_what_a_person_was_asked_and_quizzes_are_not_asked() -> None:
    items, features = made([FIRST, SECOND, SECOND])
    quiz = Item("quiz", "", ("a", "b"), kind="quiz", gold=(1, 2))
    said = [Judgement(items[1].id, "ann", (), skip="cannot say"), Judgement(items[2].id, "ai:judge", (1, 2))]
    stray = Judgement("of no item here", "ann", (1, 2))
    features = np.concatenate([features, [[9.0, 9.0], [-9.0, -9.0]]])
    # The second feature is that of more pairs, and so first.
    assert next_by_heads([*items, quiz], features, [*said, stray], 9) == [items[2], items[0]]
    scores = np.array([[0.0, 0, 0, 9, 0, 3, 9, 0], [0.0, 0, 9, 0, 3, 0, 0, 9]])
    assert next_by_ensemble([*items, quiz], scores, said, 9) == [items[2], items[0]]
    assert next_by_heads([quiz], features[-2:], [], 1) == []


def test_responses_that_were_never_asked_about_come_first() -> None:
    items = [make_item("p", ["a", "b"]), make_item("p", ["b", "c"]), make_item("q", ["b", "c"]), make_item("p", "de")]
    _, features = made([FIRST] * 4)
    said = [Judgement(items[0].id, "ann", (1, 2))]
    assert next_by_heads(items, features, said, 1) == [items[2]]  # "b" after another prompt is another response
    assert next_by_heads(items, features, said, 3) == [items[2], items[3], items[1]]


def test_a_models_answers_teach_the_heads_nothing() -> None:
    items, features = made([FIRST] * 4 + [SECOND] * 4)
    said = [Judgement(item.id, "ai:judge", (1, 2)) for item in items[:3]]
    assert next_by_heads(items, features, said, 1) == [items[0]]


def test_an_item_of_several_responses_counts_by_its_pairs() -> None:
    items = [make_item("p", ["a", "b", "c"]), make_item("q", ["a", "b"])]
    scores = np.array([[0.0, 0, 9, 2, 0], [0.0, 0, -9, -2, 0]])
    assert next_by_ensemble(items, scores, [], 1) == [items[0]]
    scores = np.array([[0.0, 0, 9, 1, 0], [0.0, 0, -9, 0, 0]])
    assert next_by_ensemble(items, scores, [], 5) == items


def test_the_reward_models_read_what_they_are_trained_on() -> None:
    for turns in [(), (Message("user", "Hi"),)]:
        with case(turns):
            item, tokenizer = make_item("Hi", ["yes", "no"], turns=turns), Tokenizer.bytes()
            space = " " if turns else ""
            record = Comparison("Hi", space + "yes", space + "no", turns=turns)
            ((wanted, _),) = encode_rankings([record], tokenizer, max_tokens=99, ledger=Ledger()).rows
            assert rows_of(item, tokenizer, ended=True) == list(wanted)
            assert rows_of(item, tokenizer, ended=False) == [ids[:-1] for ids in wanted]


def test_hidden_states_are_those_after_half_of_the_blocks() -> None:
    tokenizer = Tokenizer.bytes()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context=64, width=16, layers=3, heads=2, windows=(2, 0, 0))
    params = initialized(Transformer(config), jax.random.key(0))
    ids = [[1 + n % 7] * (1 + n % 9) + [n % 50] for n in range(40)]
    # The blocks above the middle add nothing once what they write into the stream is 0.
    silent = params | {"block_2": jax.tree.map(np.zeros_like, params["block_2"])}
    states = jax.jit(lambda params, tokens: Transformer(config).apply(params, tokens, method="hidden"))
    hidden = {n: np.asarray(states({"params": silent}, np.array([ids[n]])))[0] for n in (0, 8)}
    scanned = dataclasses.replace(config, scan_layers=True)
    about: dict[str, Any] = {"where": "", "spec": "", "stage": "sft", "origin": None, "identify": lambda: ""}
    for model, own in ((config, params), (scanned, stack_blocks(params, scanned))):
        source = Source(model=model, tokenizer=tokenizer, scalar=False, own=functools.partial(dict, own), **about)
        found = hidden_states(source, ids)
        for n, wanted in hidden.items():
            np.testing.assert_allclose(found[n], np.concatenate([wanted.mean(axis=0), wanted[-1]]), atol=1e-5)


def test_features_are_standardized_and_turned_to_the_principal_axes() -> None:
    random = np.random.default_rng(0)
    states = random.standard_normal((500, 3)) * [5.0, 0.1, 1.0] + [100.0, 0.0, -3.0]
    states[:, 1] += 0.05 * states[:, 0]
    features = standardized(states)
    np.testing.assert_allclose(features.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.mean(np.sum(features**2, axis=1)), 1.0)
    leading = standardized(states, 2)
    gram = leading.T @ leading
    values = np.linalg.eigvalsh(features.T @ features)[::-1]
    np.testing.assert_allclose(gram, np.diag(values[:2]), atol=1e-9)
    # More features than rows: the same components, but for their signs.
    wide = random.standard_normal((5, 8))
    tall = np.concatenate([wide, np.zeros((4, 8))])
    np.testing.assert_allclose(np.abs(principal(wide, 3)), np.abs(principal(tall, 3)[:5]), atol=1e-9)
