"""Scores against the distance from the start: best-of-n for every n, and policies of several runs, with Gao's fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.arms import Arm
from rlhf_jax.evaluation.best_of_n import best_of_n_kl, expected_best_of_n
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.evaluation.overoptimisation import Form, fit_gold


def steps_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 … up to `most`, which is the last: about evenly spaced in KL."""
    powers = [2**k for k in range(most.bit_length())]
    return sorted({n for power in powers for n in (power, power * 3 // 2) if n <= most} | {most})


def best_of_curve(pool: Arm, proxy: str, *, seed: int) -> dict[str, Any] | None:
    """Expected scores of best-of-n by the proxy, for n up to the pool's answers per prompt; None without scores.

    Prompts of which an answer lacks a score are left out.
    """
    known = np.all([np.isfinite(x).all(axis=1) for x in pool.scores.values()], axis=0)
    if not known.any():
        return None
    steps = steps_to(len(pool.answers[0]))
    columns = np.array(steps) - 1
    means_PN = {
        name: expected_best_of_n(pool.scores[proxy][known], x[known])[:, columns] for name, x in pool.scores.items()
    }
    kl = [best_of_n_kl(n) for n in steps]
    return {
        "model": pool.name,
        "prompts": int(known.sum()),
        "n": steps,
        "kl": kl,
        "scores": {name: x.mean(axis=0).tolist() for name, x in means_PN.items()},
        "fits": {name: fitted("best-of-n", np.sqrt(kl), x - x[:, :1], seed=seed) for name, x in means_PN.items()},
    }


def policies_curve(arms: Sequence[Arm], start: Arm, *, seed: int) -> dict[str, Any] | None:
    """Scores of several policies against their KL to one of the arms, where they started; None for fewer than two.

    Args:
      arms: policies that have their KL to the start, by its answers; a KL below 0, which is chance, counts as 0.
      start: the arm of the reference.
      seed: of the bootstrap.
    """
    kls = {}
    for arm in arms:
        values = [answer.kl for several in arm.answers for answer in several]
        if arm.kind == "model" and arm.name != start.name and None not in values:
            kls[arm.name] = max(float(np.mean(np.array(values, np.float64))), 0.0)
    if len(kls) < 2:
        return None
    policies = sorted((arm for arm in arms if arm.name in kls), key=lambda arm: kls[arm.name])
    kl = [0.0, *(kls[arm.name] for arm in policies)]
    scores, fits = {}, {}
    for name in start.scores:
        columns = np.stack([arm.scores[name].mean(axis=1) for arm in (start, *policies)], axis=1)
        columns = columns[np.isfinite(columns).all(axis=1)]
        if len(columns):
            scores[name] = columns.mean(axis=0).tolist()
            fits[name] = fitted("rl", np.sqrt(kl), columns - columns[:, :1], seed=seed)
    names = [start.name, *(arm.name for arm in policies)]
    return {"start": start.name, "models": names, "kl": kl, "scores": scores, "fits": fits}


def fitted(form: Form, d: Floats, gain: Floats, *, seed: int) -> dict[str, Any] | None:
    """A fit as plain JSON, with null for infinity; None for too few different points."""
    try:
        return plain(fit_gold(form, d, gain, seed=seed))
    except UserError:
        return None


def plain(value: Any) -> Any:
    """A value of dataclasses, arrays and numbers as plain JSON; null for numbers that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(vars(value)[field.name]) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def curve_of(fit: Mapping[str, Any], d: Floats) -> Floats:
    """The fitted gain at d, from a fit as plain JSON."""
    alpha, beta = fit["alpha"]["value"], fit["beta"]["value"]
    return alpha * d - beta * (d**2 if fit["form"] == "best-of-n" else d * np.log(np.where(d > 0, d, 1.0)))
