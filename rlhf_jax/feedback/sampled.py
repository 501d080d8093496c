"""Items for blind comparison, with responses sampled from each model to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from rlhf_jax.data.encode import prompt_ids
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import MOST_RESPONSES, Item
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.generate import uniform_numbers
from rlhf_jax.inference import ROWS, Sampler
from rlhf_jax.pretrained.source import Source


def sample_items(
    models: Sequence[Source],
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[Item]:
    """Sample `samples` responses of each model to each prompt, and make an item of them.

    The same seed gives the same items. A prompt whose responses are all equal is kept as a tie; leaving it out would
    exaggerate the difference between the models.

    Args:
      models: sources of the responses.
      prompts: one item each.
      samples: responses of each model.
      max_new_tokens: maximum length of a response, in tokens.
      temperature: of sampling.
      seed: of sampling.

    Returns:
      The distinct items, with the models as sources.

    Raises:
      UserError: for a prompt that does not fit a model's context with its response, and unless there are 2 to 9
        responses.
    """
    if not 2 <= len(models) * samples <= MOST_RESPONSES:
        raise UserError(
            f"expected 2 to {MOST_RESPONSES} responses to a prompt, got {len(models)} runs with {samples} samples each"
        )
    columns = [
        _responses(
            model, prompts, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + number
        )
        for number, model in enumerate(models)
    ]
    items = {}
    for prompt, answers in zip(prompts, zip(*columns, strict=True), strict=True):
        responses, ended = zip(*(one for several in answers for one in several), strict=True)
        if prompt.turns:
            responses = tuple(text.strip() for text in responses)
        sources = [model.where for model in models for _ in range(samples)]
        item = make_item(prompt.prompt, responses, turns=prompt.turns, sources=sources, ended=ended)
        items[item.id] = item
    return list(items.values())


def _responses(
    model: Source, prompts: Sequence[Prompt], *, samples: int, max_new_tokens: int, temperature: float, seed: int
) -> list[list[tuple[str, bool]]]:
    """(text, True if it ended) of each response to each prompt."""
    sampler = Sampler(model, seed, max_new_tokens=max_new_tokens, temperature=temperature)
    rows = [prompt_ids(prompt, model.tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        if not 1 <= len(ids) <= sampler.room:
            raise UserError(
                f"{prompt.where}: expected 1 to {sampler.room} tokens for {model.where} (its context of "
                f"{model.model.context} less --max-new-tokens {max_new_tokens}), got {len(ids)}"
            )
    order = [place for place in range(len(rows)) for _ in range(samples)]
    parts = range(-(-len(order) // ROWS))
    numbers = [uniform_numbers(jax.random.fold_in(sampler.key, part), ROWS, max_new_tokens) for part in parts]
    answers = sampler.responses([rows[place] for place in order], np.concatenate(numbers))
    return [answers[place * samples : (place + 1) * samples] for place in range(len(rows))]
