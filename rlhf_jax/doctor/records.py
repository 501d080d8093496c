"""Data for the checks: the files that the user names, those that the run names, or the embedded corpus of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Dialogue,
    Ledger,
    Prompt,
    Ranking,
    Text,
    encode_rankings,
    read_records,
)
from rlhf_jax.data.dialogues import FullMessage
from rlhf_jax.data.forms import COMPLETIONS, dialogue_field
from rlhf_jax.data.rows import Row
from rlhf_jax.data.split import hold_out
from rlhf_jax.data.tables import read_rows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers.inputs import EMBEDDED, beginnings, prompts_of

COMPARED = ("chosen", "rejected", "responses", "ranks")


@dataclasses.dataclass(frozen=True)
class Records:
    """Rows of data by their kind.

    Attributes:
      demonstrations: demonstrations and dialogues.
      comparisons: comparisons and rankings.
      prompts: prompts to sample answers to.
      texts: documents.
      about: where they are from.
      trained: True if the comparisons are those that the reward model was trained on.
    """

    demonstrations: Sequence[Demonstration | Dialogue] = ()
    comparisons: Sequence[Comparison | Ranking] = ()
    prompts: Sequence[Prompt] = ()
    texts: Sequence[Text] = ()
    about: str = "no data"
    trained: bool = False


def records_of(
    run: RunFolder | None, tokenizer: TextTokenizer, data: Sequence[str], columns: Sequence[str], *, scalar: bool
) -> Records:
    """The data of a run or of a published model.

    Args:
      run: the run; None for a published model.
      tokenizer: its tokenizer.
      data: files that the user names, in place of the run's.
      columns: fields of these files under other names.
      scalar: True for a reward model.

    Raises:
      UserError: for a file that the user names and that cannot be read.
    """
    if data:
        stage = "" if run is None else run.stage
        found = _of_stage(stage or _stage_of(data, scalar), data, columns)
        return dataclasses.replace(found, about=", ".join(data))
    if run is None:
        return Records()
    config = run.config
    named = [path for field in ("heldout", "data") for path in config.get(field) or ()]
    if EMBEDDED in named or (not named and _in_recipe(run)):
        return _embedded(run)
    files = {field: _there(run, config.get(field) or ()) for field in ("heldout", "data", "demonstrations")}
    names = tuple(config.get("columns") or ())
    if run.stage in ("reward", "preference"):
        return _compared(run, tokenizer, files, names)
    if paths := files["data"] or files["heldout"]:
        kept = {"kind": config["kind"]} if "kind" in config else {}
        return dataclasses.replace(_of_stage(run.stage, paths, names, **kept), about=", ".join(paths))
    return _shown(run)


def _of_stage(stage: str, paths: Sequence[str], columns: Sequence[str], kind: str = "demonstrations") -> Records:
    """The records of files, read as a stage reads them."""
    ledger = Ledger()
    if stage == "pretrain":
        texts = read_records(paths, "text", ledger)
        return Records(texts=texts, prompts=beginnings(texts))
    if stage == "ppo":
        return Records(prompts=read_records(paths, "prompts", ledger, columns=columns))
    if stage == "sft":
        found: Sequence[Demonstration | Dialogue]
        if kind == "dialogues":
            found = read_records(paths, "dialogues", ledger, columns=columns)
        else:
            found = read_records(paths, "demonstrations", ledger, columns=columns)
        return Records(demonstrations=found, prompts=_prompts(found))
    pairs = read_records(paths, "rankings", ledger, columns=columns)
    return Records(comparisons=pairs, prompts=_prompts(pairs))


def _stage_of(paths: Sequence[str], scalar: bool) -> str:
    """The stage whose kind of rows the files of a published model have."""
    if scalar:
        return "reward"
    for path in paths:
        for where, fields in read_rows(path):
            row = Row(where, fields)
            if any(fields.get(name) is not None for name in COMPARED):
                return "reward"
            return "sft" if row.among(COMPLETIONS) or dialogue_field(row) else "ppo"
    return "ppo"


def _prompts(records: Sequence[Any]) -> list[Prompt]:
    """The prompts of demonstrations, dialogues, comparisons and rankings, each once."""
    found = []
    for record in records:
        if isinstance(record, Comparison | Ranking):
            found.append(Prompt(record.prompt, record.where, record.turns))
        else:
            found += prompts_of([record])
    return list(dict.fromkeys(found))


def _there(run: RunFolder, paths: Sequence[str]) -> list[str]:
    """Files that a run names, as they are or from the folder that it was started in; [] unless all are there."""
    found = [run.find(path) for path in paths]
    return [path for path in found if path is not None] if all(found) else []


def _compared(
    run: RunFolder, tokenizer: TextTokenizer, files: Mapping[str, list[str]], columns: Sequence[str]
) -> Records:
    """Held-out comparisons of a reward model or of preference optimization; those of training if none are."""
    paths = files["heldout"] or files["data"]
    if not paths:
        return _shown(run)
    records: Sequence[Comparison | Ranking] = read_records(paths, "rankings", Ledger(), columns=columns)
    about, trained = ", ".join(paths), not files["heldout"]
    if not files["heldout"] and run.config["heldout_fraction"]:
        limit = run.config.get("max_tokens") or int(run.model["context"])
        rows = encode_rankings(records, tokenizer, max_tokens=limit, ledger=Ledger())
        _, held = hold_out(rows, run.config["heldout_fraction"], seed=run.config["seed"], ledger=Ledger())
        if len(held):
            records, about, trained = held.sources, f"the held-out rows of {about}", False
    demonstrations: Sequence[Demonstration | Dialogue] = ()
    if files["demonstrations"]:
        demonstrations = read_records(files["demonstrations"], "demonstrations", Ledger())
    return Records(demonstrations, records, _prompts(records), about=about, trained=trained)


def _in_recipe(run: RunFolder) -> bool:
    """True for a stage of `rlhf-jax recipe`, which gives its stages the embedded corpus."""
    return (run.path.absolute().parent / "seconds.json").exists()


def _embedded(run: RunFolder) -> Records:
    """The embedded corpus, with the rankings of a recipe that were sampled from it."""
    corpus, rankings = load_corpus(), run.path.absolute().parent / "rankings.jsonl"
    about = "Python's own documentation"
    if run.stage in ("reward", "preference"):
        ranked: Sequence[Ranking | Comparison] = ()
        if rankings.exists():
            ranked, about = read_records(rankings, "rankings", Ledger()), f"{about}, {rankings}"
        return Records(corpus.development.demonstrations, ranked, _prompts(ranked), about=about, trained=True)
    if run.stage == "pretrain":
        return Records(texts=corpus.texts, prompts=beginnings(corpus.texts), about=about)
    demonstrations = corpus.demonstrations if run.stage == "sft" else corpus.development.demonstrations
    return Records(demonstrations, prompts=corpus.development.prompts, about=about)


def _shown(run: RunFolder) -> Records:
    """The prompts to which the run has shown answers, if its data is not there."""
    path = run.path / "samples.json"
    if not path.exists():
        return Records()
    samples = [sample for sample in read_json(path)["samples"] if "prompt" in sample]
    prompts = [
        Prompt(sample["prompt"], "", tuple(FullMessage.of(turn) for turn in sample.get("messages", ())))
        for sample in samples
    ]
    return Records(prompts=prompts, about=f"the prompts in {path}")
