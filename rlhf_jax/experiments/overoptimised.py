"""Experiment: the KL penalty β from 0 to large, and best-of-n beside it, against a learned reward.

The gold score is a fixed function; the proxy is a reward model trained on comparisons by it, which has seen answers of
the fine-tuned model only (Gao et al. 2022, arXiv:2210.10760).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.arrays import Params
from rlhf_jax.evaluation.best_of_n import best_of_n_kl, expected_best_of_n
from rlhf_jax.evaluation.frontier import curve_of, fitted, steps_to
from rlhf_jax.evaluation.intervals import over_seeds
from rlhf_jax.experiments.outcome import Outcome, Say, shown
from rlhf_jax.experiments.picture import Panel, Series, curves
from rlhf_jax.experiments.review_models import Judge, ReviewModels, RLHFSizes, demonstrations
from rlhf_jax.experiments.reviews import TOPICS
from rlhf_jax.experiments.toy import fresh

COLUMNS = (("kl", "KL"), ("proxy", "proxy"), ("gold", "gold"), ("best_gold", "gold at its best"), ("turn", "turn, √KL"))


@dataclasses.dataclass(frozen=True)
class Sizes(RLHFSizes):
    """Sizes of the experiment.

    Attributes:
      betas: values of β.
      watched: iterations between measurements.
      pool: answers to each prompt for best-of-n.
    """

    betas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    iterations: int = 80
    watched: int = 8
    pool: int = 256


SHORT = Sizes.short(
    betas=(0.0, 1.0),
    demonstrations=512,
    sft_steps=30,
    comparisons=128,
    reward_steps=8,
    iterations=4,
    watched=2,
    pool=64,
)


class Experiment:
    """The experiment on the KL penalty."""

    def __init__(self, short: bool) -> None:
        self.sizes = sizes = SHORT if short else Sizes()
        self._models = models = ReviewModels(sizes)
        self._tune = models.tuning(sizes.sft_steps, pretrained=False)
        self._compare = models.comparing(sizes.reward_steps)
        self._optimise = models.optimise(sizes.iterations)

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition: the points of each β, and those of best-of-n."""
        sizes, models = self.sizes, self._models
        rows = demonstrations(sizes.demonstrations, np.random.default_rng(seed))
        start, _ = self._tune(fresh(models.model, seed), rows, seed=seed)
        pairs = models.ranked(start, 2 * sizes.comparisons, seed=seed + 3)
        judge = models.judge(self._compare, start, pairs, answers=sizes.pool, seed=seed)
        runs = {}
        for beta in sizes.betas:
            runs[f"β {beta:g}"] = points = self.points(start, judge, beta, seed)
            last = points[-1]
            say(f"  β {beta:g}: KL {last['kl']:.1f}, proxy {last['proxy']:.2f}, gold {last['gold']:.2f}")
        return {
            "accuracy": models.accuracy(judge.params, models.ranked(start, 2 * sizes.comparisons, seed=seed + 4)),
            "start": {"gold": float(judge.start.gold.mean()), "answers": first_answers(judge.start.texts)},
            "best": best_of(judge),
            "runs": runs,
        }

    def points(self, start: Params, judge: Judge, beta: float, seed: int) -> list[dict[str, Any]]:
        """Measurements of the policy in the course of PPO."""
        points: list[dict[str, Any]] = []

        def watch(step: int, policy: Params, _: Any) -> None:
            if step == 1 or step % self.sizes.watched == 0:
                found = self._models.measure(32, policy, start, judge.params, seed=seed + 2)
                points.append(
                    {
                        "iteration": step,
                        "kl": found.kl,
                        "proxy": judge.proxy(found),
                        "gold": float(found.gold.mean()),
                        "answers": first_answers(found.texts),
                    }
                )

        self._models.rlhf(self._optimise, start, judge, seed=seed, kl_coef=beta, watch=watch)
        return points

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        fits = {"RL": rl_fit(found), "best of n": best_fit(found)}
        figures = rows(found)
        for name, fit in (("RL", rl_fit), ("best of n", best_fit)):
            figures[name] = {"turn": [turn_in([one], fit) for one in found]}
        answers = {"SFT": found[0]["start"]["answers"]}
        outcome = Outcome(
            figures,
            COLUMNS,
            picture(found, fits),
            [],
            more={
                "judge_accuracy": [one["accuracy"] for one in found],
                "fits": fits,
                "answers": answers | {arm: points[-1]["answers"] for arm, points in found[0]["runs"].items()},
                "points": [{arm: _without_answers(p) for arm, p in one["runs"].items()} for one in found],
                "best_of_n": [one["best"] for one in found],
            },
        )
        return dataclasses.replace(outcome, sentences=sentences(outcome))


def first_answers(texts: Sequence[str]) -> list[str]:
    """The first answer to each of four topics."""
    each = len(texts) // len(TOPICS)
    return [f"{topic}: {texts[each * i]}" for i, topic in enumerate(TOPICS[:4])]


def best_of(judge: Judge) -> dict[str, Any]:
    """KL, proxy and gold score of the best of n answers of the start, for n up to 64."""
    pool = judge.start
    proxy, gold = (x.reshape(len(TOPICS), -1) for x in ((pool.score - judge.mean) / judge.scale, pool.gold))
    steps = steps_to(min(64, proxy.shape[1]))
    columns = np.array(steps) - 1
    return {
        "n": steps,
        "kl": [best_of_n_kl(n) for n in steps],
        "proxy": expected_best_of_n(proxy).mean(axis=0)[columns].tolist(),
        "gold": expected_best_of_n(proxy, gold).mean(axis=0)[columns].tolist(),
    }


def rows(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Arm -> measure -> value of each seed: the fine-tuned model, the last policy of each β, and best-of-n."""
    figures = {"SFT": {"kl": [0.0] * len(found), "proxy": [0.0] * len(found), "gold": [_start(one) for one in found]}}
    for arm in found[0]["runs"]:
        runs = [one["runs"][arm] for one in found]
        figures[arm] = {name: [points[-1][name] for points in runs] for name in ("kl", "proxy", "gold")}
        figures[arm]["best_gold"] = [max(point["gold"] for point in points) for points in runs]
    for n in (4, 16, 64):
        at = found[0]["best"]["n"].index(n)
        figures[f"best of {n}"] = {name: [one["best"][name][at] for one in found] for name in ("kl", "proxy", "gold")}
    return figures


def rl_fit(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Gao's curve for RL through the points of all β, with bootstrap intervals over the seeds given."""
    points = [[point for run in one["runs"].values() for point in run] for one in found]
    d_SD = np.sqrt([[point["kl"] for point in own] for own in points])
    gain_SD = np.array([[point["gold"] - _start(one) for point in own] for one, own in zip(found, points, strict=True)])
    return fitted("rl", d_SD, gain_SD, seed=0)


def best_fit(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Gao's curve for best-of-n, likewise."""
    gain_SD = np.array([one["best"]["gold"] for one in found])
    return fitted("best-of-n", np.sqrt(found[0]["best"]["kl"]), gain_SD - gain_SD[:, :1], seed=0)


def turn_in(found: Sequence[Mapping[str, Any]], fit: Any) -> float:
    """√KL at which the fitted gold score turns; NaN if it does not."""
    made = fit(found)
    turn = None if made is None else made["turn"]["value"]
    return math.nan if turn is None else float(turn)


def picture(found: Sequence[Mapping[str, Any]], fits: Mapping[str, Any]) -> str:
    """Proxy and gold score against √KL for each β and best-of-n, means over the seeds, with the fits."""
    d_most = max(math.sqrt(point["kl"]) for one in found for run in one["runs"].values() for point in run)
    start = float(np.mean([_start(one) for one in found]))
    panels = []
    for name, title in (("proxy", "proxy: score of the reward model"), ("gold", "gold score")):
        series = []
        for colour, arm in enumerate(found[0]["runs"]):
            runs = [one["runs"][arm] for one in found]
            d = np.mean(np.sqrt([[point["kl"] for point in run] for run in runs]), axis=0)
            means = [over_seeds([run[at][name] for run in runs]) for at in range(len(d))]
            curve = [(0.0, start if name == "gold" else 0.0), *zip(d.tolist(), (m.value for m in means), strict=True)]
            # Those of every point would hide the curves.
            spreads = [(math.nan, math.nan)] * len(means) + [(means[-1].low, means[-1].high)]
            series.append(Series(f"PPO, {arm}", curve, spreads, colour=colour))
        best = np.mean([one["best"][name] for one in found], axis=0)
        d = np.sqrt(found[0]["best"]["kl"])
        series.append(Series("best of n, to 64", list(zip(d.tolist(), best.tolist(), strict=True)), colour=6))
        if name == "gold":
            for number, (form, fit) in enumerate(fits.items()):
                if fit is not None:
                    end = d_most if form == "RL" else float(d[-1])
                    at = np.linspace(0.0, end, 60)
                    points = list(zip(at.tolist(), (start + curve_of(fit, at)).tolist(), strict=True))
                    label = "d(α − β log d)" if form == "RL" else "d(α − βd)"
                    series.append(Series(f"fit {label}", points, dots=False, dashed=True, colour=7 - 2 * number))
        panels.append(Panel(title, "√KL to the fine-tuned model, √nats", series))
    return curves("Over-optimisation of a learned reward", panels)


def sentences(outcome: Outcome) -> list[str]:
    """The turn of the gold score, and what hacked answers look like."""
    fit = outcome.more["fits"]["RL"]
    turn = outcome.estimate("RL", "turn")
    accuracy = over_seeds(outcome.more["judge_accuracy"])
    said = [f"reward model: right on {shown(accuracy)} of new pairs"]
    if fit is not None and not math.isnan(turn.value):
        within = "within" if fit["turned"] else "not surely within"
        said.append(
            f"the gold score of RL turns at √KL {shown(turn)} in the fits of each seed, {within} what was measured"
        )
    answers = outcome.more["answers"]
    return [*said, *(f"{arm}: {' | '.join(texts)}" for arm, texts in answers.items())]


def _start(one: Mapping[str, Any]) -> float:
    return float(one["start"]["gold"])


def _without_answers(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in point.items() if name != "answers"} for point in points]
