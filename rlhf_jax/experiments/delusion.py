"""Delusion: a model that takes its own answers for evidence believes them; exact in a toy, and learned.

A person lives in one of C towns, each as likely. A demonstrator who knows names the right town with probability c, else
one of the others. A model that imitates demonstrators cannot know the town. If it conditions on its own answer a as if
a demonstrator had given it, P(true | a) = c; the answer was its own doing, so the truth is P(true | do(a)) = 1 / C.

Source: Ortega et al. 2021, "Shaking the foundations: delusions in sequence models for interaction and control"
(arXiv:2110.10819).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.experiments.toy import Fit, Words, answer, first_words, fresh, small_model
from rlhf_jax.stages import sft

TOWNS = tuple("Accra Bern Cairo Dakar".split())
_QUESTION, _SURE = "where ?", "really ?"
_LENGTH = 10


@dataclasses.dataclass(frozen=True)
class Beliefs:
    """Probabilities after one answer a, with the answer as an observation, and as an action of one's own.

    Attributes:
      true: that a is true.
      again: that a demonstrator who is asked next gives the same answer.
    """

    true: float
    again: float


def exact(towns: int, competence: float) -> tuple[Beliefs, Beliefs]:
    """(Conditioning on an answer, intervening), by Bayes' rule.

    Args:
      towns: C.
      competence: c, the probability that a demonstrator names the right town.
    """
    likelihood_TA = np.full((towns, towns), (1 - competence) / (towns - 1))
    np.fill_diagonal(likelihood_TA, competence)
    prior_T = np.full(towns, 1 / towns)
    given_T = prior_T * likelihood_TA[:, 0]
    given_T /= given_T.sum()
    # An action tells nothing of the town: the belief stays the prior.
    return tuple(  # type: ignore[return-value]
        Beliefs(float(belief_T[0]), float(belief_T @ likelihood_TA[:, 0])) for belief_T in (given_T, prior_T)
    )


class Student:
    """A small model of the dialogue "where? Bern. really? yes", whose programs all seeds share.

    Args:
      competence: of the demonstrators.
      steps: updates, on 64 dialogues each.
      dialogues: number of dialogues.
    """

    def __init__(self, competence: float, steps: int, dialogues: int) -> None:
        self.competence, self.dialogues = competence, dialogues
        self.words = Words([*TOWNS, *_QUESTION.split(), *_SURE.split(), "yes", "no"])
        self.model = small_model(len(self.words), context=_LENGTH + 4, width=32, layers=1)
        self.fit = Fit(sft.make_update, self.model, rate=5e-3, steps=steps, batch=64)

    def learned(self, seed: int) -> dict[str, float]:
        """Beliefs in its own answers of a model that imitates, and of one that was told whether its answers are true.

        Returns:
          "imitation" and "intervention": mean P(yes) after its own answers; "true": the share that is true.
        """
        draws = np.random.default_rng(seed)
        towns = draws.integers(len(TOWNS), size=self.dialogues)
        wrong = (towns + draws.integers(1, len(TOWNS), size=self.dialogues)) % len(TOWNS)
        told = np.where(draws.random(self.dialogues) < self.competence, towns, wrong)
        pairs = [
            (_QUESTION, f"{TOWNS[said]} {_SURE} {_reply(said == town)}") for said, town in zip(told, towns, strict=True)
        ]
        imitator, _ = self.fit(fresh(self.model, seed), self.words.rows(pairs, _LENGTH), seed=seed)
        asked = self.words.prompts([_QUESTION], len(_QUESTION.split()) + 1)
        asked = jax.tree.map(lambda x: jnp.repeat(x, -(-self.dialogues // 4), axis=0), asked)
        answers = answer(self.model, self.words, imitator, asked, length=1, seed=seed)[: self.dialogues]
        # Other people's towns: the model's own answers are about these.
        towns = draws.integers(len(TOWNS), size=self.dialogues)
        true = np.array([said == TOWNS[town] for said, town in zip(answers, towns, strict=True)])
        pairs = [(f"{_QUESTION} {said} {_SURE}", _reply(good)) for said, good in zip(answers, true, strict=True)]
        corrected, _ = self.fit(imitator, self.words.rows(pairs, _LENGTH), seed=seed)
        found = {"true": float(true.mean())}
        for name, params in (("imitation", imitator), ("intervention", corrected)):
            found[name] = float(self._sure(params, answers).mean())
        return found

    def _sure(self, params: object, answers: list[str]) -> Floats:
        prompts = self.words.prompts([f"{_QUESTION} {said} {_SURE}" for said in answers], _LENGTH - 2)
        return first_words(self.model, params, prompts)[:, self.words.encode("yes")[0]]


def _reply(true: bool) -> str:
    return "yes" if true else "no"
