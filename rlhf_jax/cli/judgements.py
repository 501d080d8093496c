"""Implementation of `rlhf-jax feedback`: agreement, export, AI labels, and active choice of the next items."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.data.ledger import Ledger
from rlhf_jax.feedback.agreement import INSTRUCTGPT_AGREEMENT, flags, report
from rlhf_jax.feedback.ai_feedback import STAGES, Judge, judge_items
from rlhf_jax.feedback.database import folder_lock
from rlhf_jax.feedback.export import export
from rlhf_jax.feedback.judged import Judged, item_row, join, judgement_row, read_items, read_judgements
from rlhf_jax.feedback.page import Page, read_page
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.reliability import dawid_skene, estimate
from rlhf_jax.feedback.store import AI, Store
from rlhf_jax.feedback.trust import agreement_with_people
from rlhf_jax.files import write_file
from rlhf_jax.runs.atomic_files import write_json

DIMENSIONS = 128
"""Leading principal components of the backbone's features that `active` keeps."""

if TYPE_CHECKING:
    from rlhf_jax.cli.feedback import Active, Agreement, Ai, Export, Judgements


def page_of(config: Judgements) -> Page:
    """The page's settings: those of the labelling folder, of --page, or the page's own."""
    if not config.labels:
        return read_page(config.page) if config.page else Page()
    with contextlib.closing(Store(Path(config.labels), read_only=True)) as store:
        return store.page()


def read(config: Judgements) -> tuple[list[Item], list[Judgement]]:
    """Reads all items and judgements."""
    if not config.labels:
        ledger = Ledger()
        items = read_items(config.items, ledger)
        if ledger.rejected:
            print(ledger.counts())
        return items, read_judgements(config.judgements, page_of(config))
    with contextlib.closing(Store(Path(config.labels), read_only=True)) as store:
        return store.items(), store.judgements()


def agreement(config: Agreement) -> None:
    """Prints and saves agreement and reliability."""
    judged = join(*read(config))
    names = tuple(page_of(config).flags)
    found: dict[str, Any] = report(judged, flag_names=names, resamples=config.resamples)
    found["reliability"] = reliability(judged, names)
    if config.out:
        write_json(Path(config.out), found)
    print(f"{found['judgements']:,} judgements of {found['items']:,} items by {len(found['labellers'])} labellers")
    print(f"agreement  {_shown(found['pairs']['agreement'])}   InstructGPT's labellers {INSTRUCTGPT_AGREEMENT:.3f}")
    print(f"Fleiss' κ  {_shown(found['pairs']['fleiss_kappa'])}")
    print(f"Krippendorff's α, pairs  {_shown(found['pairs']['krippendorff_alpha']['nominal'])}")
    print(f"Krippendorff's α, ratings (ordinal)  {_shown(found['ratings']['krippendorff_alpha']['ordinal'])}")
    for flag in names:
        alpha = found["flags"][flag]["krippendorff_alpha"]["nominal"]
        print(f"Krippendorff's α, {flag}  {_shown(alpha)}")
    for name, about in found["labellers"].items():
        right = found["reliability"]["labellers"].get(name, {}).get("right")
        print(
            f"{name}: {about['judgements']} judged, with others {_shown(about['agreement'])}, gold "
            f"{_shown(about['gold'])}, estimated right {_shown(right)}"
        )


def reliability(judged: Judged, flag_names: Sequence[str]) -> dict[str, Any]:
    """Estimated reliability of each labeller as plain JSON, for rankings and for each flag that was used."""
    found: dict[str, Any] = {
        "labellers": {name: dataclasses.asdict(one) for name, one in estimate(judged).labellers.items()},
        "flags": {},
    }
    for flag in flag_names:
        table = flags(judged, flag)
        if np.nansum(table.values):
            model = dawid_skene(table)
            about = {name: dataclasses.asdict(one) for name, one in model.labellers.items()}
            found["flags"][flag] = {"share": dataclasses.asdict(model.share), "labellers": about}
    return found


def export_judgements(config: Export) -> None:
    """Writes the export and prints its row counts."""
    items, judgements = read(config)
    weights = None
    if config.consensus == "reliability":
        # A labeller worse than chance gets weight 0, not a negative one; the agreement report shows who that is.
        found = estimate(join(items, judgements)).labellers
        names = {judgement.labeller for judgement in judgements}
        weights = {name: max(found[name].precision.value, 0.0) if name in found else 1.0 for name in names}
    manifest = export(
        items,
        judgements,
        config.out,
        form=config.form,
        consensus=bool(config.consensus),
        weights=weights,
        models=config.models,
    )
    print(f"{config.out}: {manifest['counts']['rows']:,} rows; {json.dumps(manifest['counts'], ensure_ascii=False)}")


def ai(config: Ai) -> None:
    """Labels the items that the model has not judged yet, and prints its agreement with people."""
    from rlhf_jax.pretrained.source import open_source

    items, judgements = read(config)
    name = AI + (config.name or config.judge.replace(":", " ").replace("/", " ").strip()[-60:])
    done = {judgement.item for judgement in judgements if judgement.labeller == name}
    judge = Judge(open_source(config.judge, stages=STAGES), batch=config.batch)
    answers = judge_items(
        [i for i in items if i.id not in done and len(i.responses) > 1],
        judge.log_odds,
        name,
        principle=config.principle,
    )
    if config.out:
        rows = (json.dumps(judgement_row(one), ensure_ascii=False) + "\n" for one in answers.judgements)
        write_file(Path(config.out), "".join(rows))
    else:
        with folder_lock(Path(config.labels)), contextlib.closing(Store(Path(config.labels))) as store:
            store.record(answers.judgements)
    judged = join(items, [*judgements, *answers.judgements])
    share, pairs = agreement_with_people(judged, name) if name in judged.labellers else (None, 0)
    print(
        f"{name}: {len(answers.judgements):,} items judged; of {answers.pairs:,} pairs {answers.turned:.1%} changed "
        f"with the order. Agreement with people on {pairs:,} pairs: {_shown(None if share is None else vars(share))}"
    )


def active(config: Active) -> None:
    """Chooses the items to label next, and writes them to a file or moves them to the front of the queue."""
    from rlhf_jax.data.batches import RankingRows
    from rlhf_jax.evaluation.heldout import scores_of
    from rlhf_jax.feedback.features import hidden_states, rows_of, standardized
    from rlhf_jax.feedback.next_items import asked, next_by_ensemble, next_by_heads
    from rlhf_jax.pretrained.source import LANGUAGE, open_source

    items, judgements = read(config)
    items = [item for item in items if len(item.responses) > 1]
    done = asked(judgements)
    left = [item for item in items if item.kind == "task" and item.id not in done]
    if config.features:
        sources, wanted = [open_source(config.features, stages=LANGUAGE)], items
    else:
        sources, wanted = [open_source(run, stages=("reward",)) for run in config.run], left
    rows = [[rows_of(item, source.tokenizer, ended=bool(config.run)) for item in wanted] for source in sources]
    fits = [
        all(len(ids) <= source.model.context for source, of_item in zip(sources, several) for ids in of_item)
        for several in zip(*rows)
    ]
    kept = list(itertools.compress(wanted, fits))
    rows = [list(itertools.compress(own, fits)) for own in rows]
    if config.features:
        states = hidden_states(sources[0], list(itertools.chain.from_iterable(rows[0])))
        chosen = next_by_heads(kept, standardized(states, DIMENSIONS), judgements, config.count)
    else:
        scores = []
        for source, own in zip(sources, rows):
            ranked = RankingRows(
                [(several, range(1, len(several) + 1)) for several in own],
                source.model.context,
                source.tokenizer.pad_id,
            )
            found = scores_of(source.network(), source.params(), ranked) if own else np.zeros((0, 2))
            scores.append(np.concatenate([row[: len(several)] for row, several in zip(found, own)] or [np.zeros(0)]))
        chosen = next_by_ensemble(kept, np.array(scores), judgements, config.count)
    too_long = sum(not fit for item, fit in zip(wanted, fits) if item.id not in done)
    if config.out:
        write_file(Path(config.out), "".join(json.dumps(item_row(item), ensure_ascii=False) + "\n" for item in chosen))
    else:
        with folder_lock(Path(config.labels)), contextlib.closing(Store(Path(config.labels))) as store:
            store.ask_first([item.id for item in chosen])
    where = config.out or f"{config.labels}: next in the queue"
    print(f"{where}: {len(chosen)} of {len(left)} items; {too_long} too long to read")


def _shown(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
