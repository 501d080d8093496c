"""Inter-annotator agreement: pairwise agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha, bootstrap intervals.

Every statistic is a function of sums over items, so the bootstrap over items is one matrix product: how often each item
was drawn, times the sums of each item. The unit is a pair of responses for preferences, a response for ratings and
flags; units of one item are drawn together. A preference has no natural direction, so the coefficients count each in
both directions: chance agreement then does not depend on which response a file lists first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.evaluation import intervals
from rlhf_jax.feedback.judged import Judged
from rlhf_jax.feedback.records import FLAGS, Item, Judgement

INSTRUCTGPT_AGREEMENT = 0.726
"""Share of pairs on which InstructGPT's training labellers agreed, ± 0.015 (Ouyang et al. 2022, section 3.4)."""

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")
Floats = NDArray[np.float64]
_MOST_DRAWN = 2**22  # numbers drawn at a time in the bootstrap: 32 MiB


@dataclasses.dataclass(frozen=True)
class Table:
    """Labels of U units by L labellers.

    Attributes:
      values: labels, [U, L], NaN for a missing label.
      item: index of each unit's item, [U].
      labellers: names of the L labellers.
    """

    values: Floats
    item: NDArray[np.int64]
    labellers: tuple[str, ...]

    def of(self, *labellers: str) -> Table:
        """The columns of the given labellers."""
        places = [self.labellers.index(name) for name in labellers]
        return dataclasses.replace(self, values=self.values[:, places], labellers=labellers)

    def mirrored(self) -> Table:
        """The table with every preference in both directions, [2 U, L]."""
        both = np.concatenate([self.values, -self.values])
        return dataclasses.replace(self, values=both, item=np.concatenate([self.item, self.item]))


@dataclasses.dataclass(frozen=True)
class Estimate(intervals.Estimate):
    """An estimate with its 95% interval, and the number of units that it is based on."""

    units: int


def preferences(judged: Judged, *, gold: bool = False) -> Table:
    """Table of preferences for each pair (a, b) of an item's responses: 1 if a is ranked better, -1 if b, 0 for a tie.

    Args:
      judged: items and judgements.
      gold: append a column "gold" from the items' gold ranks.
    """

    def orders(ranks: tuple[int, ...]) -> Floats | None:
        if not ranks:
            return None
        first, second = _pairs(len(ranks))
        array = np.array(ranks)
        return np.sign(array[second] - array[first]).astype(np.float64)

    table = _table(judged, lambda item: len(item.responses) * (len(item.responses) - 1) // 2, lambda j: orders(j.ranks))
    if not gold:
        return table
    columns = [orders(item.gold) for item in judged.items.values()]
    sizes = np.bincount(table.item, minlength=len(columns))
    column = np.concatenate([np.full(n, np.nan) if c is None else c for n, c in zip(sizes, columns)] or [np.zeros(0)])
    values = np.concatenate([table.values, column[:, None]], axis=1)
    return Table(values, table.item, (*table.labellers, "gold"))


def ratings(judged: Judged) -> Table:
    """Table of the ratings of each response, 1 to 7."""

    def labels(judgement: Judgement) -> Floats | None:
        return np.array([np.nan if r is None else r for r in judgement.ratings], np.float64)

    return _table(judged, lambda item: len(item.responses), labels)


def flags(judged: Judged, flag: str) -> Table:
    """Table of one flag for each response: 1 flagged, 0 not flagged, NaN for a labeller who was not asked."""

    def labels(judgement: Judgement) -> Floats | None:
        return np.array([flag in flags for flags in judgement.flags], np.float64)

    return _table(judged, lambda item: len(item.responses), labels)


def agreement(table: Table, **drawing: int) -> Estimate | None:
    """Pairwise agreement: the share of pairs of labellers that prefer the same response; ties are left out.

    (Σ C(f, 2) + C(s, 2)) / Σ C(f + s, 2), with f labellers for one response of a pair and s for the other

    Args:
      table: preferences.
      **drawing: `resamples` (1000) and `seed` (0) of the bootstrap, also in the functions below.

    Returns:
      The estimate, None if no two labellers ordered the same pair; the same in the functions below.
    """
    first, second = np.sum(table.values > 0, axis=1), np.sum(table.values < 0, axis=1)
    alike, all_pairs = _choose_2(first) + _choose_2(second), _choose_2(first + second)
    return _bootstrap(table, np.stack([alike, all_pairs], axis=1), lambda s: _ratio(s[:, 0], s[:, 1]), **drawing)


def agreement_with_others(table: Table, labeller: str, **drawing: int) -> Estimate | None:
    """Pairwise agreement of one labeller with each of the others; ties are left out."""
    own = table.of(labeller).values
    product = own * table.of(*(name for name in table.labellers if name != labeller)).values
    alike, differ = np.sum(product > 0, axis=1), np.sum(product < 0, axis=1)
    return _bootstrap(table, np.stack([alike, alike + differ], axis=1), lambda s: _ratio(s[:, 0], s[:, 1]), **drawing)


def cohen_kappa(table: Table, **drawing: int) -> Estimate | None:
    """Cohen's κ of two labellers, for nominal categories: (p_o - p_e) / (1 - p_e).

    p_o is the observed agreement, p_e the agreement expected from each labeller's own use of the categories.

    Raises:
      ValueError: unless the table has two columns.

    Source: Cohen 1960.
    """
    if len(table.labellers) != 2:
        raise ValueError(f"expected 2 labellers, got {len(table.labellers)}")
    table, onehot_ULC = _coded(table)
    confusion_UCC = np.einsum("uc,uk->uck", onehot_ULC[:, 0], onehot_ULC[:, 1])

    def kappa(sums_SF: Floats) -> Floats:
        confusion = sums_SF.reshape(len(sums_SF), *confusion_UCC.shape[1:])
        shares = confusion / np.sum(confusion, axis=(1, 2), keepdims=True)
        observed = np.einsum("scc->s", shares)
        expected = np.einsum("sc,sc->s", shares.sum(axis=1), shares.sum(axis=2))
        return _ratio(observed - expected, 1.0 - expected)

    return _bootstrap(table, _flat(confusion_UCC), kappa, **drawing)


def fleiss_kappa(table: Table, **drawing: int) -> Estimate | None:
    """Fleiss' κ, for nominal categories: (P̄ - P̄_e) / (1 - P̄_e).

    P̄ is the mean over units of the share of labeller pairs that agree, P̄_e = Σ p_c² with p_c the share of category c
    among all labels. Units with two or more labels count; if their numbers of labels differ, this is the usual
    extension of Fleiss' coefficient.

    Source: Fleiss 1971.
    """
    table, onehot_ULC = _coded(table)
    counts_UC = onehot_ULC.sum(axis=1)
    labels_U = counts_UC.sum(axis=1)
    useful = (labels_U > 1).astype(np.float64)
    alike_U = _ratio(np.sum(counts_UC * (counts_UC - 1), axis=1), labels_U * (labels_U - 1), instead=0.0)
    sums_UF = np.concatenate([alike_U[:, None], useful[:, None], counts_UC * useful[:, None]], axis=1)

    def kappa(sums_SF: Floats) -> Floats:
        shares = _ratio(sums_SF[:, 2:], np.sum(sums_SF[:, 2:], axis=1, keepdims=True))
        expected = np.sum(shares**2, axis=1)
        return _ratio(_ratio(sums_SF[:, 0], sums_SF[:, 1]) - expected, 1.0 - expected)

    return _bootstrap(table, sums_UF, kappa, **drawing)


def krippendorff_alpha(table: Table, level: Level, **drawing: int) -> Estimate | None:
    """Krippendorff's α = 1 - D_o / D_e, for any number of labellers and with missing labels.

    From the coincidences o_ck = Σ_u n_uc (n_uk - [c = k]) / (m_u - 1), with n_uc of the m_u labels of unit u being c:
    D_o = Σ o_ck δ²_ck / n, D_e = Σ n_c n_k δ²_ck / (n (n - 1)).

    Args:
      table: labels.
      level: δ² is [c ≠ k] for "nominal", (c - k)² for "interval", (Σ_{g=c..k} n_g - (n_c + n_k) / 2)² for "ordinal".
      **drawing: as for `agreement`.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability.
    """
    values = np.unique(table.values[~np.isnan(table.values)])
    table, onehot_ULC = _coded(table)
    counts_UC = onehot_ULC.sum(axis=1)
    labels_U = counts_UC.sum(axis=1)
    both_UCC = counts_UC[:, :, None] * (counts_UC[:, None, :] - np.eye(len(values)))
    coincidences_UCC = np.where(labels_U > 1, 1.0 / np.maximum(labels_U - 1, 1), 0.0)[:, None, None] * both_UCC

    def alpha(sums_SF: Floats) -> Floats:
        seen_SCC = sums_SF.reshape(len(sums_SF), len(values), len(values))
        counts_SC = seen_SCC.sum(axis=2)
        total_S = counts_SC.sum(axis=1)
        distance = _distances(level, values, counts_SC)
        observed = np.sum(seen_SCC * distance, axis=(1, 2))
        expected = np.einsum("sc,sk,sck->s", counts_SC, counts_SC, np.broadcast_to(distance, seen_SCC.shape))
        return 1.0 - _ratio((total_S - 1) * observed, expected)

    return _bootstrap(table, _flat(coincidences_UCC), alpha, **drawing)


def report(
    judged: Judged, *, flag_names: Iterable[str] = FLAGS, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All statistics as plain JSON; an estimate is {value, low, high, units}, null where it is undefined.

    Args:
      judged: items and judgements.
      flag_names: flags of the page.
      resamples: of the bootstrap.
      seed: of the bootstrap.
    """
    drawing = {"resamples": resamples, "seed": seed}

    def plain(estimate: Estimate | None) -> dict[str, float] | None:
        return None if estimate is None else dataclasses.asdict(estimate)

    def coefficients(table: Table, levels: Iterable[Level]) -> dict[str, Any]:
        return {
            "fleiss_kappa": plain(fleiss_kappa(table, **drawing)),
            "krippendorff_alpha": {level: plain(krippendorff_alpha(table, level, **drawing)) for level in levels},
        }

    pairs, golden = preferences(judged), preferences(judged, gold=True)
    names = judged.labellers
    flagged = {flag: flags(judged, flag) for flag in flag_names}
    share, kappa = _matrices(pairs, drawing)
    return {
        "items": len({item.id for item, _ in judged.judgements}),
        "judgements": sum(not judgement.skip for _, judgement in judged.judgements),
        "skipped": sum(bool(judgement.skip) for _, judgement in judged.judgements),
        "yardstick": {"agreement": INSTRUCTGPT_AGREEMENT, "source": "Ouyang et al. 2022, section 3.4"},
        "pairs": {
            "agreement": plain(agreement(pairs, **drawing)),
            "ties": _share(pairs.values, 0.0),
            **coefficients(pairs.mirrored(), LEVELS),
        },
        "ratings": coefficients(ratings(judged), LEVELS),
        "flags": {
            flag: {"share": _share(table.values, 1.0), **coefficients(table, ("nominal",))}
            for flag, table in flagged.items()
        },
        "labellers": {
            name: {
                **_work(judged, name),
                "agreement": plain(agreement_with_others(pairs, name, **drawing)),
                "gold": plain(agreement(golden.of(name, "gold"), **drawing)),
                "ties": _share(pairs.of(name).values, 0.0),
                "flags": {flag: _share(table.of(name).values, 1.0) for flag, table in flagged.items()},
            }
            for name in names
        },
        "matrix": {
            "labellers": list(names),
            "agreement": [[plain(cell) for cell in row] for row in share],
            "cohen_kappa": [[plain(cell) for cell in row] for row in kappa],
        },
    }


def _matrices(pairs: Table, drawing: dict[str, int]) -> tuple[list[list[Estimate | None]], ...]:
    """Agreement and Cohen's kappa of every two labellers, with None on the diagonal."""
    names = pairs.labellers
    share: list[list[Estimate | None]] = [[None] * len(names) for _ in names]
    kappa: list[list[Estimate | None]] = [[None] * len(names) for _ in names]
    for i, j in itertools.combinations(range(len(names)), 2):
        both = pairs.of(names[i], names[j])
        share[i][j] = share[j][i] = agreement(both, **drawing)
        kappa[i][j] = kappa[j][i] = cohen_kappa(both.mirrored(), **drawing)
    return share, kappa


def _work(judged: Judged, name: str) -> dict[str, Any]:
    own = [judgement for _, judgement in judged.judgements if judgement.labeller == name]
    done = [judgement.seconds for judgement in own if not judgement.skip]
    return {
        "judgements": len(done),
        "skipped": len(own) - len(done),
        "median_seconds": float(np.median(done)) if done else None,
    }


def _table(judged: Judged, units: Callable[[Item], int], labels: Callable[[Judgement], Floats | None]) -> Table:
    ids = {id: place for place, id in enumerate(judged.items)}
    sizes = np.array([units(item) for item in judged.items.values()], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = {name: place for place, name in enumerate(judged.labellers)}
    values = np.full((int(starts[-1]), len(columns)), np.nan)
    for item, judgement in judged.judgements:
        if judgement.skip:
            continue
        column = labels(judgement)
        if column is not None and len(column):
            place = ids[item.id]
            values[starts[place] : starts[place + 1], columns[judgement.labeller]] = column
    return Table(values, np.repeat(np.arange(len(sizes)), sizes), judged.labellers)


def _coded(table: Table) -> tuple[Table, Floats]:
    """The units with two or more labels, and their one-hot labels [U, L, C].

    The categories are all values in the table, in ascending order.
    """
    categories = np.unique(table.values[~np.isnan(table.values)])
    kept = np.sum(~np.isnan(table.values), axis=1) > 1
    table = dataclasses.replace(table, values=table.values[kept], item=table.item[kept])
    return table, (table.values[:, :, None] == categories).astype(np.float64)


def _distances(level: Level, values: Floats, counts_SC: Floats) -> Floats:
    """δ² between every two categories, [1 or S, C, C]."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))[None]
    if level == "interval":
        return np.square(values[:, None] - values)[None]
    if level != "ordinal":
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    # Subtracting half of a value's own count makes the difference of two the sum between them with halved ends.
    middle_SC = np.cumsum(counts_SC, axis=1) - counts_SC / 2
    return np.square(middle_SC[:, :, None] - middle_SC[:, None, :])


def _bootstrap(
    table: Table, sums_UF: NDArray[Any], statistic: Callable[[Floats], Floats], *, resamples: int = 1000, seed: int = 0
) -> Estimate | None:
    """A statistic of the summed rows, with its 2.5% and 97.5% quantiles over items resampled with replacement.

    Args:
      table: the units' items.
      sums_UF: terms of the sums, per unit; items with all zeros are left out.
      statistic: [S, F] -> [S], NaN where it is undefined.
      resamples: number of resamples.
      seed: of the resampling.
    """
    counted = sums_UF.any(axis=1)
    ids, place = np.unique(table.item[counted], return_inverse=True)
    sums_IF = np.zeros((len(ids), sums_UF.shape[1]))
    np.add.at(sums_IF, place, sums_UF[counted])
    value = statistic(sums_IF.sum(axis=0, keepdims=True))[0] if len(ids) else np.nan
    if np.isnan(value):
        return None
    random = np.random.default_rng(seed)
    part = max(_MOST_DRAWN // max(sums_IF.shape), 1)
    drawn = []
    for start in range(0, resamples, part):
        times_SI = random.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=min(part, resamples - start))
        drawn.append(statistic(times_SI.astype(np.float64) @ sums_IF))
    # The coefficient of a resample with a single category is undefined; such resamples are left out.
    spread = np.concatenate(drawn) if drawn else np.zeros(0)
    spread = spread[~np.isnan(spread)]
    low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (np.nan, np.nan)
    if np.isnan(low):
        low = high = value
    return Estimate(float(value), float(low), float(high), int(counted.sum()))


@functools.cache
def _pairs(responses: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(responses, 1)


def _flat(array: Floats) -> Floats:
    return array.reshape(len(array), int(np.prod(array.shape[1:])))


def _choose_2(n: NDArray[Any]) -> NDArray[Any]:
    return n * (n - 1) // 2


def _ratio(a: NDArray[Any], b: NDArray[Any], instead: float = np.nan) -> Floats:
    """a / b, or `instead` where b is 0 or within rounding error of it."""
    tiny = np.abs(b) < 1e-12
    return np.where(tiny, instead, a / np.where(tiny, 1.0, b))


def _share(values: Floats, of: float) -> float | None:
    given = values[~np.isnan(values)]
    return float(np.mean(given == of)) if len(given) else None
