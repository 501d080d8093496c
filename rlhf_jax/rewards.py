"""Rewards as weighted sums of terms: a reward model's score, and functions of text, some of them ready-made here.

A reward function is f(prompts, completions, **columns) -> one number for each completion, as in TRL. It runs on the
host, between sampling and the update (`rlhf_jax.reward_functions`); `compose` adds the terms up inside the compiled
update. The functions of this module take their options by keyword:

    rlhf-jax ppo … --reward-function "rlhf_jax.rewards:too_long(most=40)" "rlhf_jax.rewards:repetition" …
    ppo.run(config, reward_funcs=[functools.partial(too_long, most=40), repetition])
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.errors import UserError
from rlhf_jax.masked import masked_mean

MODEL = "model"
"""Name of the reward model's term."""
ABSTENTIONS = ("i don't know", "i do not know", "i'm not sure", "i am not sure", "i can't tell", "i cannot tell")
"""Phrases by which an answer says that it gives none."""
HEDGES = ("i think", "i believe", "probably", "perhaps", "maybe", "might be")
"""Phrases by which an answer says that it may be wrong."""


class Terms(NamedTuple):
    """Terms of a composed reward; the reward model's, if there is one, comes first.

    Attributes:
      names: names in the metrics, each once.
      weights: factors of the terms in the sum.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]


def compose(
    terms: Terms,
    model_B: Array | None,
    value_BN: Array,
    axis_name: str | None = None,
    counted_B: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The reward of each response, Σ_n w_n r_n over the terms that apply to it, and the mean of each term.

    Args:
      terms: names and weights.
      model_B: normalized score of the reward model, or None without one.
      value_BN: value of each function; NaN where the function does not apply.
      axis_name: mapped axis over which the rows are split; the means are then shares, to be summed over it.
      counted_B: True for the responses that the means are over; by default all.

    Returns:
      (reward [B], {"reward/NAME": mean of the term over the responses that it applies to, 0 if to none}).
    """
    columns = [] if model_B is None else [(model_B, jnp.ones(model_B.shape, bool))]
    columns += [(value_BN[:, n], ~jnp.isnan(value_BN[:, n])) for n in range(value_BN.shape[1])]
    reward_B = jnp.zeros(value_BN.shape[0], jnp.float32)
    metrics = {}
    for name, weight, (term_B, applies_B) in zip(terms.names, terms.weights, columns, strict=True):
        reward_B += weight * jnp.where(applies_B, term_B, 0.0)
        counted = applies_B if counted_B is None else applies_B & counted_B
        metrics[f"reward/{name}"] = masked_mean(term_B, counted, axis_name)
    return reward_B, metrics


def ensemble(scores_NB: Array, *, how: Literal["mean", "worst", "cautious"] = "mean", k: float = 1.0) -> Array:
    """One score [B] from those of N reward models, which an optimizer exploits less than any one of them.

    Args:
      scores_NB: scores of each model, on one scale.
      how: "mean"; "worst", the lowest score; "cautious", mean - k times the standard deviation between the models
        (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization").
      k: factor of "cautious".
    """
    if how == "worst":
        return jnp.min(scores_NB, axis=0)
    mean_B = jnp.mean(scores_NB, axis=0)
    return mean_B if how == "mean" else mean_B - k * jnp.std(scores_NB, axis=0)


def judged(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    judges: Sequence[Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]],
    how: Literal["mean", "worst", "cautious"] = "mean",
    k: float = 1.0,
) -> list[float]:
    """The `ensemble` of several judges (prompts, completions) -> scores, such as `load(run).score` of several runs."""
    scores_NB = jnp.asarray([judge(prompts, completions) for judge in judges], jnp.float32)
    return [float(score) for score in ensemble(scores_NB, how=how, k=k)]


def too_long(completions: Sequence[Any], *, most: int = 100) -> list[float]:
    """0 up to `most` words, then -1 for each further `most`."""
    return [-max(len(text_of(completion).split()) - most, 0) / most for completion in completions]


def repetition(completions: Sequence[Any], *, n: int = 3) -> list[float]:
    """Minus the share of the n-grams of words that occurred before in the completion: 0 for none, above -1."""
    found = []
    for completion in completions:
        words = text_of(completion).lower().split()
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        found.append((len(set(grams)) - len(grams)) / max(len(grams), 1))
    return found


def matches(completions: Sequence[Any], *, pattern: str, whole: bool = True) -> list[float]:
    """1 where the regular expression matches the completion, without white space around it, else 0.

    Args:
      completions: answers.
      pattern: regular expression of Python's `re`; a dot takes line breaks as well.
      whole: match the whole completion, not a part of it.

    Raises:
      UserError: if the pattern is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"pattern: expected a regular expression, got {pattern!r}: {error}") from error
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(text_of(completion).strip()) is not None) for completion in completions]


def is_json(completions: Sequence[Any], *, keys: Sequence[str] = ()) -> list[float]:
    """1 where the completion is a JSON object with these keys, or any JSON if there are none, else 0."""

    def reads(text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return not keys or (isinstance(value, dict) and all(key in value for key in keys))

    return [float(reads(text_of(completion))) for completion in completions]


def honest_payoff(
    completions: Sequence[Any],
    answer: Sequence[Any],
    *,
    right: float = 1.0,
    hedged_right: float = 0.5,
    abstained: float = 0.0,
    hedged_wrong: float = -2.0,
    wrong: float = -4.0,
    abstentions: Sequence[str] = ABSTENTIONS,
    hedges: Sequence[str] = HEDGES,
) -> list[float | None]:
    """A payoff under which it is best to answer what one knows, and to say so where one does not.

    The default values are Schulman's (2023, "Reinforcement Learning from Human Feedback: Progress and Challenges").

    Args:
      completions: answers.
      answer: column of the right answers, each a text or a list of texts; None where there is none, and no payoff.
      right, hedged_right, abstained, hedged_wrong, wrong: payoffs. An answer is right if it says a right answer in
        whole words, whatever the case, and does not abstain.
      abstentions, hedges: phrases that count as such.
    """

    def says(text: str, phrases: Sequence[Any]) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(str(phrase).lower())}(?!\w)", text) for phrase in phrases)

    def payoff(text: str, answers: Any) -> float | None:
        if answers is None:
            return None
        if says(text, abstentions):
            return abstained
        if says(text, answers if isinstance(answers, list | tuple) else [answers]):
            return hedged_right if says(text, hedges) else right
        return hedged_wrong if says(text, hedges) else wrong

    texts = [text_of(completion).lower().replace("\u2019", "'") for completion in completions]
    return [payoff(text, answers) for text, answers in zip(texts, answer, strict=True)]


def verified(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    claims: Callable[[str], Sequence[str]],
    holds: Callable[[Any, str], bool | None],
) -> list[float]:
    """Mean over the claims of a completion of 1 for one that holds, -1 for one that does not, 0 if that is not known.

    Args:
      prompts: prompts.
      completions: answers.
      claims: the claims in the text of a completion; one without any gets 0.
      holds: (prompt, claim) -> whether the claim holds, None if it cannot be told.
    """
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        verdicts = [holds(prompt, claim) for claim in claims(text_of(completion))]
        values = [0.0 if verdict is None else 1.0 if verdict else -1.0 for verdict in verdicts]
        found.append(sum(values) / max(len(values), 1))
    return found


def text_of(completion: Any) -> str:
    """Text of a completion that is text, or messages as in TRL."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] or "" for message in completion)
