"""Export of judgements as training data: rankings, comparisons, TRL's and HH-RLHF's forms, and demonstrations.

An export is a folder with one JSONL file and manifest.json with its SHA-256 and counts; the same judgements give the
same bytes. Ranks train the reward model, and `ended` tells it which responses were cut; labeller, seconds, ratings,
flags, comments and rationale are in fields that data/reader.py ignores. Judgements and pairs without information are
left out and counted by reason.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.data.dialogues import Message, is_hh, prompt_row, render, render_prompt, split_hh, split_shared
from rlhf_jax.data.jsonl import read_rows
from rlhf_jax.data.reader import record_of
from rlhf_jax.data.records import Comparison, Demonstration, Ranking, cut_marks
from rlhf_jax.data.rows import Useless
from rlhf_jax.data.written import is_written
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judged import Judged, join
from rlhf_jax.feedback.records import Form, Item, Judgement
from rlhf_jax.feedback.store import AI, dense
from rlhf_jax.feedback.trust import trusted
from rlhf_jax.files import UNFINISHED
from rlhf_jax.runs.atomic_files import MANIFEST, read_manifest, seal

FORMS: tuple[Form, ...] = ("rankings", "comparisons", "trl", "hh", "demonstrations")
KIND = "rlhf_jax feedback"
CONSENSUS = "consensus"
BESIDE = ("ratings", "flags", "comments", "sources", "ended")  # fields with one value for each response
Said = tuple[Item, tuple[int, ...], dict[str, Any]]  # an item, dense ranks, and further fields
_Row = tuple[dict[str, Any], Comparison | Ranking | Demonstration]


def export(
    items: Iterable[Item],
    judgements: Iterable[Judgement],
    folder: str | Path,
    *,
    form: Form = "rankings",
    consensus: bool = False,
    weights: Mapping[str, float] | None = None,
    models: bool = False,
) -> dict[str, Any]:
    """Write FORM.jsonl and a manifest into a folder, replacing an earlier export there.

    "rankings" has one row per judgement, "demonstrations" one per answer that a labeller wrote, the other forms one row
    per ordered pair. Prompts given as messages stay
    messages, except for "hh", which writes transcripts with a plain-text prompt as the human's turn. Quiz items are
    left out.

    Args:
      items: the items that were judged.
      judgements: of these items.
      folder: to write into; it may hold nothing but an earlier export.
      form: format of the rows.
      consensus: write one ranking per item, by `consensus_ranks`, instead of one per judgement.
      weights: of the labellers in the consensus, e.g. their estimated reliabilities; by default 1 each.
      models: include judgements by models, which `trusted` must accept.

    Returns:
      The manifest.

    Raises:
      UserError: for inputs that `join` or `trusted` rejects, for a folder with other files in it, and if the written
        rows would not read back as the same records.
    """
    judged = join(items, judgements)
    folder = Path(folder)
    path = folder / f"{form}.jsonl"
    _refuse_other_files(folder)
    agreements = trusted(judged) if models else {}
    left_out: collections.Counter[str] = collections.Counter()
    pairs_left_out: collections.Counter[str] = collections.Counter()
    rows: list[_Row]
    if form == "demonstrations":
        if consensus:
            raise UserError("consensus: expected none for demonstrations, of which each is one labeller's own")
        rows = list(_demonstrations(judged, models, left_out))
    else:
        said = list(_said(judged, models, left_out))
        if consensus:
            said = _agreed(said, weights, left_out)
        rows = [row for one in said for row in _rows(*one, form, pairs_left_out)]
    folder.mkdir(parents=True, exist_ok=True)
    # A folder without a manifest is incomplete, so the manifest is deleted first and written last.
    for old in [folder / MANIFEST, *(folder / f"{name}.jsonl" for name in FORMS)]:
        old.unlink(missing_ok=True)
    _write(path, rows, "demonstrations" if form == "demonstrations" else "rankings")
    counts = {
        "judgements": len(judged.judgements),
        "rows": len(rows),
        "items": len({row["item"] for row, _ in rows} if form == "demonstrations" else {i.id for i, _, _ in said}),
        "left_out": dict(sorted(left_out.items())),
        "pairs_left_out": dict(sorted(pairs_left_out.items())),
        "rows_of": dict(sorted(collections.Counter(row["labeller"] for row, _ in rows).items())),
    }
    agreed = {name: {"agreement": share.value, "pairs": share.units} for name, share in agreements.items()}
    seal(folder, {"kind": KIND, "form": form, "consensus": consensus, "counts": counts, "models": agreed})
    return read_manifest(folder)


def consensus_ranks(rankings: Sequence[Sequence[int]], weights: Sequence[float]) -> tuple[int, ...]:
    """Ranks by the weighted Borda count Σ_l w_l (responses that l ranks below - responses that l ranks above).

    Args:
      rankings: ranks of the same responses by each labeller l.
      weights: w_l.

    Returns:
      Ranks, 1 is best; equal counts are ties.
    """
    score = [
        round(sum(w * sum((r > ranks[k]) - (r < ranks[k]) for r in ranks) for ranks, w in zip(rankings, weights)), 6)
        for k in range(len(rankings[0]))
    ]
    return tuple(1 + sum(other > own for other in set(score)) for own in score)


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder for the export, got a file")
    own = {MANIFEST, *(f"{form}.jsonl" for form in FORMS)}
    own |= {name + UNFINISHED for name in own}
    others = sorted({path.name for path in folder.iterdir()} - own) if folder.exists() else []
    if others:
        raise UserError(f"{folder}: expected an empty folder or an earlier export, got {others[0]} in it")


def _said(judged: Judged, models: bool, left_out: collections.Counter[str]) -> Iterable[Said]:
    for item, judgement in judged.judgements:
        reason = _useless(item, judgement, models)
        if reason:
            left_out[reason] += 1
            continue
        about: dict[str, Any] = {"item": item.id, "labeller": judgement.labeller, "seconds": judgement.seconds}
        if judgement.ratings:
            about["ratings"] = list(judgement.ratings)
        if judgement.flags:
            about["flags"] = [sorted(flags) for flags in judgement.flags]
        if judgement.comments:
            about["comments"] = list(judgement.comments)
        if judgement.rationale:
            about["rationale"] = judgement.rationale
        about |= _of_responses(item)
        yield item, dense(judgement.ranks), about


def _of_responses(item: Item) -> dict[str, list[Any]]:
    """The item's own fields with one value for each response."""
    return {name: list(values) for name, values in (("sources", item.sources), ("ended", item.ended)) if values}


def _useless(item: Item, judgement: Judgement, models: bool) -> str:
    """Reason to leave out a judgement, "" for none; data/reader.py's wording where it would drop the row itself."""
    if item.kind == "quiz":
        return "of a quiz item"
    if judgement.labeller.startswith(AI) and not models:
        return "by a model"
    if judgement.skip:
        return "skipped"
    if len(item.responses) < 2:
        return "a demonstration"
    if len(set(judgement.ranks)) == 1:
        return "all ranks are tied"
    if len(set(item.responses)) == 1:
        return "all responses are equal"
    if any(not text.strip() for text in item.responses):
        return "an empty response"
    if any(message.role == "system" for message in item.turns[1:]):
        return "a system message in the middle"
    if not item.turns and all(map(is_hh, item.responses)):
        return "responses that are transcripts"
    if any(map(is_written, item.responses)):
        return "responses that are messages as text"
    return ""


def _demonstrations(judged: Judged, models: bool, left_out: collections.Counter[str]) -> Iterable[_Row]:
    """The answers that labellers wrote.

    After a prompt given as text an answer continues the text: a space comes between them, unless there is white space
    already, or the item's own responses begin without one.
    """
    for item, judgement in judged.judgements:
        reason = _useless(item, judgement, models) if item.kind == "quiz" or judgement.skip else ""
        text = judgement.demonstration
        if judgement.labeller.startswith(AI) and not models:
            reason = "by a model"
        elif not reason and not text.strip():
            reason = "no answer written"
        elif any(message.role == "system" for message in item.turns[1:]):
            reason = "a system message in the middle"
        elif is_written(text):
            reason = "an answer that is messages as text"
        if reason:
            left_out[reason] += 1
            continue
        about: dict[str, Any] = {"item": item.id, "labeller": judgement.labeller, "seconds": judgement.seconds}
        if judgement.corrects is not None:
            about["corrects"] = item.responses[judgement.corrects]
        if judgement.rationale:
            about["rationale"] = judgement.rationale
        if item.turns:
            asked: dict[str, Any] = prompt_row(item.turns)
            answer: Any = [{"role": "assistant", "content": text}]
            record = Demonstration(item.prompt, f" {text}", turns=item.turns)
        else:
            joined = text[:1].isspace() or item.prompt[-1:].isspace() or not item.prompt
            spaced = any(response[:1].isspace() for response in item.responses) or not item.responses
            asked, answer = {"prompt": item.prompt}, text if joined or not spaced else f" {text}"
            record = Demonstration(item.prompt, answer)
        yield {**asked, "completion": answer, **about}, record


def _agreed(
    said: Iterable[Said], weights: Mapping[str, float] | None, left_out: collections.Counter[str]
) -> list[Said]:
    """One ranking per item, with mean ratings, flags given by at least half of those asked, and summed seconds.

    Comments and rationales are kept as they are, by labeller.
    """
    agreed = []
    for _, group in itertools.groupby(said, key=lambda one: one[0].id):
        several = list(group)
        item, abouts = several[0][0], [about for _, _, about in several]
        names = [about["labeller"] for about in abouts]
        shares = [1.0 if weights is None else weights[name] for name in names]
        ranks = consensus_ranks([ranks for _, ranks, _ in several], shares)
        if len(set(ranks)) == 1:
            left_out["tied by the consensus"] += len(several)
            continue
        about: dict[str, Any] = {"item": item.id, "labeller": CONSENSUS, "labellers": names}
        about["seconds"] = round(sum(one["seconds"] for one in abouts), 3)
        if ratings := [one["ratings"] for one in abouts if "ratings" in one]:
            about["ratings"] = [_mean([rating for rating in column if rating is not None]) for column in zip(*ratings)]
        if flags := [one["flags"] for one in abouts if "flags" in one]:
            about["flags"] = [_half(column, len(flags)) for column in zip(*flags)]
        if comments := [(name, one["comments"]) for name, one in zip(names, abouts) if "comments" in one]:
            about["comments"] = [
                {name: texts[place] for name, texts in comments if texts[place]} for place in range(len(ranks))
            ]
        reasons = {name: one["rationale"] for name, one in zip(names, abouts) if "rationale" in one}
        about |= {"rationale": reasons} if reasons else {}
        about |= _of_responses(item)
        agreed.append((item, ranks, about))
    return agreed


def _mean(values: Sequence[int]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _half(given: Iterable[Iterable[str]], asked: int) -> list[str]:
    counts = collections.Counter(flag for flags in given for flag in flags)
    return sorted(flag for flag, count in counts.items() if 2 * count >= asked)


def _rows(item: Item, ranks: tuple[int, ...], about: dict[str, Any], form: Form, left_out: Any) -> Iterable[_Row]:
    """(row, record that it must read back as) of a judgement: one, or one per ordered pair."""
    asked: dict[str, Any] = prompt_row(item.turns) if item.turns else {"prompt": item.prompt}
    space = " " if item.turns else ""
    if form == "rankings":
        texts = tuple(space + text for text in item.responses)
        record = Ranking(item.prompt, texts, ranks, turns=item.turns, ended=item.ended)
        yield {**asked, "responses": list(item.responses), "ranks": list(ranks), **about}, record
        return
    for first, second in itertools.combinations(range(len(ranks)), 2):
        if ranks[first] == ranks[second]:
            left_out["tied"] += 1
            continue
        best, worst = (first, second) if ranks[first] < ranks[second] else (second, first)
        chosen, rejected = item.responses[best], item.responses[worst]
        if chosen == rejected:
            left_out["chosen equals rejected"] += 1
            continue
        beside = {key: value for key, value in about.items() if key not in BESIDE}
        for name in BESIDE:
            if name in about:
                beside[f"{name}_chosen"], beside[f"{name}_rejected"] = about[name][best], about[name][worst]
        ended = cut_marks([item.ended[best], item.ended[worst]]) if item.ended else ()
        pair = Comparison(item.prompt, space + chosen, space + rejected, turns=item.turns, ended=ended)
        if form == "hh":
            transcripts = _transcripts(item, chosen, rejected)
            if transcripts is None:
                left_out["no transcript says it"] += 1
                continue
            texts, pair = transcripts[0], dataclasses.replace(transcripts[1], ended=ended)
            yield {"chosen": texts[0], "rejected": texts[1], **beside}, pair
        elif not item.turns and all(map(is_hh, (chosen, rejected))):
            # Reading takes them for full dialogues, whatever the prompt is.
            left_out["responses that are transcripts"] += 1
        elif form == "trl" and item.turns:
            answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            yield {**asked, "chosen": answers[0], "rejected": answers[1], **beside}, pair
        else:
            yield {**asked, "chosen": chosen, "rejected": rejected, **beside}, pair


def _transcripts(item: Item, chosen: str, rejected: str) -> tuple[tuple[str, str], Comparison] | None:
    """Both dialogues as transcripts, and their record; None if they would read back as other turns."""
    if item.turns:
        turns = list(item.turns)
    elif is_hh(item.prompt) and item.prompt.endswith("\n\nAssistant:"):
        turns = split_hh(item.prompt)[:-1]
    else:
        turns = [Message("user", item.prompt)]
    chosen, rejected = (text if not item.turns and text.startswith(" ") else f" {text}" for text in (chosen, rejected))
    prompt = render_prompt(turns)
    texts = (prompt + chosen, prompt + rejected)
    talks = [split_hh(text) for text in texts] if all(map(is_hh, texts)) else []
    # An answer that goes on with turns of its own reads back as those turns.
    read = split_shared(*talks) if talks and all(len(talk) == len(turns) + 1 for talk in talks) else None
    if read != (turns, chosen, rejected) or render(split_hh(texts[0])) != texts[0]:
        return None
    return texts, Comparison(prompt, chosen, rejected, turns=tuple(turns))


def _write(path: Path, rows: Sequence[_Row], kind: Literal["rankings", "demonstrations"]) -> None:
    """Write the rows atomically, after checking that they read back as the same records.

    Raises:
      UserError: if a row reads back as another record.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for row, _ in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for (_, record), (where, fields) in zip(rows, read_rows(unfinished), strict=True):
        try:
            survives = record_of(where, fields, kind) == record
        except (UserError, Useless):
            survives = False
        if not survives:
            unfinished.unlink()
            raise UserError(
                f"item {fields['item']}: its prompt or responses do not survive a round trip through {path.name}; "
                "export another form, or rankings"
            )
    unfinished.replace(path)
