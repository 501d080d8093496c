"""Held-out comparisons of models: win rates and shares by hand; responses to each prompt."""

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.data import PromptRows
from rlhf_jax.evaluation.samples import distinct_share, sample_responses, win_rate
from rlhf_jax.model import Transformer
from tests.random_params import initialized

pytestmark = pytest.mark.core


def test_responses_are_those_to_their_prompts_also_where_slots_are_passed_on() -> None:
    model = Transformer(ModelConfig(vocab_size=9, context=8, width=8, layers=1, heads=1))
    params = jax.tree.map(lambda x: 2 * np.asarray(x), initialized(model, jax.random.key(0)))
    prompts = PromptRows([[1], [2, 3], [4], [5, 6], [7]], 2, 0)
    told = {"samples": 3, "batch_size": 8, "max_new_tokens": 5, "eos_id": 8, "pad_id": 0}
    apart = sample_responses(model, params, prompts, jax.random.key(1), **told)
    assert [len(row) for row in apart] == [3] * 5
    lengths = {len(ids) for row in apart for ids in row}
    assert len(lengths) > 2 and all(8 not in ids[:-1] for row in apart for ids in row)
    # A row's draws are its own, so the same ones come out.
    assert sample_responses(model, params, prompts, jax.random.key(1), slots=3, **told) == apart
    with pytest.raises(ValueError, match="slots: expected 0 or more, got -1"):
        sample_responses(model, params, prompts, jax.random.key(1), slots=-1, **told)


def test_win_rate_by_hand() -> None:
    # Outcomes 1, 1, 0.5, 1: mean 0.875, deviation 0.25, margin 1.96 * 0.25 / 2; the upper end is cut.
    rate, interval = win_rate(np.array([3.0, 2.0, 4.0, 7.0]), np.array([2.0, 1.0, 4.0, 1.0]))
    assert rate == 0.875
    assert interval == pytest.approx([0.63, 1.0])


def test_win_rate_of_several_answers_is_over_all_pairs_of_a_prompt() -> None:
    # First prompt: 3 beats 2 and 1, 1 loses to 2 and ties with 1: 0.625. Second: 2 loses to 5 and ties with 2,
    # twice: 0.25.
    rate, interval = win_rate(np.array([[3.0, 1.0], [2.0, 2.0]]), np.array([[2.0, 1.0], [5.0, 2.0]]))
    assert rate == 0.4375
    # Two prompts 0.375 apart: the standard error of their mean is half of that.
    assert interval == pytest.approx([0.4375 - 1.96 * 0.1875, 0.4375 + 1.96 * 0.1875])
    # Sides may have different numbers of answers; one answer against itself is a tie.
    assert win_rate(np.array([[1.0, 3.0], [1.0, 3.0]]), np.array([2.0, 2.0]))[0] == 0.5


def test_distinct_share_counts_answers_given_once() -> None:
    assert distinct_share(["a", "b", "a", "c"]) == 0.5
