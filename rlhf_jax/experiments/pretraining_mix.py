"""Experiment: the pretraining mix γ against what PPO forgets of its pretraining text, with larger β beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.arrays import Params, TokenBatch
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm, shown
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import PretrainedSizes, ReviewModels, RLHFSizes, demonstrations, pages
from rlhf_jax.experiments.toy import fresh
from rlhf_jax.logprobs import sequence_logps

COLUMNS = (
    ("perplexity", "perplexity of pages"),
    ("gold", "gold"),
    ("proxy", "proxy"),
    ("kl", "KL to SFT"),
    ("norms", "‖γ ∇text‖ / ‖∇PPO‖"),
)
FIRST = 5
"""Iterations over which the norms of the gradients are compared."""


@dataclasses.dataclass(frozen=True)
class Sizes(PretrainedSizes, RLHFSizes):
    """Sizes of the experiment.

    Attributes:
      gammas: values of γ, at the first of the betas.
      betas: values of β; those after the first are without a mix.
      mixed: pages in an update of PPO.
      heldout: pages of the measurement.
    """

    gammas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0)
    betas: tuple[float, ...] = (0.01, 0.1, 0.3)
    mixed: int = 32
    heldout: int = 1024


SHORT = Sizes.short(gammas=(0.0, 1.0), betas=(0.01, 1.0), mixed=4, heldout=16)


class Experiment:
    """The experiment on the pretraining mix."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._pretrain, self._tune = models.pretraining(sizes), models.tuning(sizes.sft_steps, pretrained=True)
        self._compare = models.comparing(sizes.reward_steps)
        self._optimise = {
            gamma: models.optimise(
                sizes.iterations, pretraining_coef=gamma, pretraining_batch=sizes.mixed if gamma else 0
            )
            for gamma in sizes.gammas
        }
        self._logps = jax.jit(lambda params, rows: sequence_logps(models.model, params, rows))

    def perplexity(self, params: Params, rows: TokenBatch) -> float:
        """exp of the mean loss of a token of the rows."""
        logps, tokens = self._logps(params, rows)
        return math.exp(-float(logps.sum()) / float(tokens.sum()))

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: model -> measures."""
        sizes, models, draws = self.sizes, self._models, np.random.default_rng(seed)
        text, heldout = pages(sizes.pages, draws), pages(sizes.heldout, draws)
        base, _ = self._pretrain(fresh(models.model, seed), text, seed=seed)
        tuned, _ = self._tune(base, demonstrations(sizes.demonstrations, draws), seed=seed)
        pairs = models.ranked(tuned, 2 * sizes.comparisons, seed=seed + 3)
        judge = models.judge(self._compare, tuned, pairs, answers=64, seed=seed)
        found: dict[str, dict[str, float]] = {}

        def measured(name: str, params: Params, norms: Sequence[float] = ()) -> None:
            answers = models.measure(64, params, tuned, judge.params, seed=seed + 2)
            found[name] = {
                "perplexity": self.perplexity(params, heldout),
                "gold": float(answers.gold.mean()),
                "proxy": judge.proxy(answers),
                "kl": answers.kl,
                "norms": float(np.mean(norms)) if norms else math.nan,
            }
            say(f"  {name}: perplexity {found[name]['perplexity']:.2f}, gold {found[name]['gold']:.2f}")

        measured("pretrained", base)
        measured("SFT", tuned)
        for gamma, beta in [(gamma, sizes.betas[0]) for gamma in sizes.gammas] + [(0.0, b) for b in sizes.betas[1:]]:
            norms: list[float] = []

            def watch(step: int, _: Params, metrics: dict[str, Any], norms: list[float] = norms) -> None:
                if step <= FIRST and "pretraining_norm" in metrics:
                    norms.append(float(metrics["pretraining_norm"] / metrics["ppo_norm"]))

            policy = models.rlhf(
                self._optimise[gamma],
                tuned,
                judge,
                seed=seed,
                kl_coef=beta,
                watch=watch,
                text=text if gamma else None,
            )
            measured(arm(gamma, beta), policy, norms)
        return found

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        first = self.sizes.betas[0]
        outcome = Outcome(by_arm(found), COLUMNS, "", [])
        # Each arm's place is its mean; the whiskers are of the perplexity.
        paths = {
            f"γ from 0 to {max(self.sizes.gammas):g}, β {first:g}": [arm(gamma, first) for gamma in self.sizes.gammas],
            f"β from {first:g} to {max(self.sizes.betas):g}, no mix": [arm(0.0, beta) for beta in self.sizes.betas],
            "SFT": ["SFT"],
        }
        series = []
        for colour, (name, arms) in enumerate(paths.items()):
            places = [(outcome.estimate(one, "gold").value, outcome.estimate(one, "perplexity")) for one in arms]
            series.append(Series.of(name, places, colour=colour))
        picture = curves("What RLHF forgets", [Panel("perplexity of held-out pages", "gold score", series)])
        sentences = []
        for name in (arm(gamma, first) for gamma in self.sizes.gammas[1:]):
            perplexity, gold = (outcome.change(name, arm(0.0, first), measure) for measure in ("perplexity", "gold"))
            sentences.append(
                f"{name} against no mix: perplexity {perplexity}, gold {gold}; the norm of its gradient is "
                f"{shown(outcome.estimate(name, 'norms'))} of PPO's at the start"
            )
        return dataclasses.replace(outcome, picture=picture, sentences=sentences)


def arm(gamma: float, beta: float) -> str:
    """Name of a row."""
    return f"γ {gamma:g}, β {beta:g}"
