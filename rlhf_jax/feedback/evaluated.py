"""Blind comparison of the answers of an evaluation: items from answers.jsonl, and win rates from the judgements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.dialogues import render_prompt
from rlhf_jax.data.forms import prompt_alone
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import MOST_RESPONSES, Item
from rlhf_jax.feedback.store import AI, Store
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.feedback.win_rates import win_rates


def items_of_answers(rows: Iterable[Mapping[str, Any]], models: Sequence[str]) -> list[Item]:
    """One item per prompt, with the first answer of each model.

    A prompt to which all answers are equal is kept as a tie: leaving it out would exaggerate the differences.

    Args:
      rows: rows of answers.jsonl.
      models: names of the models, the sources of the responses.

    Raises:
      UserError: unless there are 2 to 9 models.
    """
    if not 2 <= len(models) <= MOST_RESPONSES:
        raise UserError(
            f"people: expected 2 to {MOST_RESPONSES} models to compare, with those of best-of-n, got {len(models)}"
        )
    items = []
    for row in rows:
        fields = {name: row[name] for name in ("prompt", "tools") if name in row}
        turns = () if isinstance(row["prompt"], str) else prompt_alone(Row(row["where"], fields)).turns
        answers = [row["answers"][name][0] for name in models]
        items.append(
            make_item(
                render_prompt(turns) if turns else row["prompt"],
                [answer["answer"] for answer in answers],
                turns=turns,
                sources=models,
                ended=[answer["ended"] is not False for answer in answers],
            )
        )
    return items


def people_figures(store: Store, items: Sequence[Item], models: Sequence[str]) -> dict[str, Any] | None:
    """Judgements by people of these items: how many, and the win rates of each model over those before it, by flag.

    Args:
      store: the labelling folder.
      items: items of the evaluation; those of others in the folder do not count.
      models: names of the models, the baseline first.

    Returns:
      Plain JSON; None without a judgement.
    """
    ids = {item.id for item in items}
    judgements = [
        judgement
        for judgement in store.each_judgement()
        if judgement.item in ids and judgement.ranks and not judgement.labeller.startswith(AI)
    ]
    if not judgements:
        return None
    return {
        "folder": str(store.folder),
        "items": len({judgement.item for judgement in judgements}),
        "of": len(ids),
        "judgements": len(judgements),
        "labellers": len({judgement.labeller for judgement in judgements}),
        "win_rates": sorted(
            (_oriented(pair, models) for pair in win_rates(items, judgements, tuple(store.page().flags))),
            key=lambda pair: (models.index(pair["second"]), models.index(pair["first"])),
        ),
    }


def _oriented(pair: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A pair as the later model over the earlier one."""
    if models.index(pair["first"]) > models.index(pair["second"]):
        return pair
    flags = {
        name: {"first": found["second"], "second": found["first"], "win_rate": _turned(found["win_rate"])}
        for name, found in pair["flags"].items()
    }
    turned = {"first": pair["second"], "second": pair["first"], "win_rate": _turned(pair["win_rate"])}
    return pair | turned | {"flags": flags}


def _turned(rate: dict[str, float] | None) -> dict[str, float] | None:
    if rate is None:
        return None
    return rate | {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"]}
