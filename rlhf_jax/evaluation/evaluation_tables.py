"""Rows of the tables of an evaluation, as text, for the console and for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Content = Mapping[str, Any]
NONE = "–"


def number(value: float | None, form: str = ".3f") -> str:
    return NONE if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def interval(estimate: Content | None, form: str = ".3f") -> str:
    """An estimate with its interval: 0.712 (0.645 to 0.770)."""
    if estimate is None:
        return NONE
    value, low, high = (number(estimate[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _with_error(estimate: Content | None, form: str = ".2f") -> str:
    if estimate is None:
        return NONE
    error = estimate["standard_error"]
    return number(estimate["value"], form) + ("" if error is None else f" ± {number(error, form)}")


def _value(estimate: Content | None, form: str) -> str:
    return NONE if estimate is None else number(estimate["value"], form)


def _text(name: str, form: str) -> Callable[[Content], str]:
    return lambda model: NONE if not model.get("text") else number(model["text"][name], form)


def _plain(name: str, form: str = ".3f") -> Callable[[Content], str]:
    return lambda model: number(model.get(name), form)


def model_rows(content: Content) -> list[tuple[str, list[str]]]:
    """(figure, its value for each model); a figure that no model has is left out."""
    models: Sequence[Content] = content["models"]
    score = lambda name: lambda model: interval(model.get("scores", {}).get(name), ".2f")  # noqa: E731
    rows: list[tuple[str, Callable[[Content], str]]] = [
        *((f"score by {name}", score(name)) for name in content["scorers"]),
        ("KL to the reference, nats per answer", lambda model: _with_error(model.get("kl"))),
        ("KL to its own model, nats", _plain("kl_to_own_model", ".2f")),
        ("held-out bits per byte", _text("bits_per_byte", ".3f")),
        ("held-out perplexity, per token", _text("perplexity", ",.2f")),
        ("perplexity of its answers, untouched model", _plain("untouched_perplexity", ".1f")),
        ("entropy, nats per token", lambda model: _value(model.get("entropy"), ".3f")),
        ("answers that occur once", _plain("distinct_share")),
        ("distinct-1", _plain("distinct_1")),
        ("distinct-2", _plain("distinct_2")),
        ("distinct-3", _plain("distinct_3")),
        ("self-BLEU", _plain("self_bleu")),
        ("self-BLEU, same prompt", _plain("self_bleu_same_prompt")),
        ("repeated 4-grams", _plain("repetition")),
        ("tokens", lambda model: _value(model.get("tokens"), ".1f")),
        ("words", _plain("words", ".1f")),
        ("characters", _plain("characters", ".1f")),
        ("without an end", _plain("missing_end")),
        ("empty", _plain("empty")),
    ]
    found = [(title, [cell(model) for model in models]) for title, cell in rows]
    return [(title, cells) for title, cells in found if set(cells) - {NONE}]


WIN_HEAD = ("scorer", "model", "over", "win rate", "paired bootstrap", "at equal length", "longer", "ties", "score")


def win_rows(content: Content) -> list[tuple[str, ...]]:
    """Rows of the table of win rates, with the head `WIN_HEAD`."""
    return [
        (
            rate["scorer"],
            rate["first"],
            rate["second"],
            interval(rate["rate"], ".3f"),
            f"{number(rate['bootstrap']['low'])} to {number(rate['bootstrap']['high'])}",
            interval(rate["length_controlled"], ".3f"),
            number(rate["longer"], ".2f"),
            number(rate["ties"], ".2f"),
            interval(rate["score_difference"], "+.2f"),
        )
        for rate in content["win_rates"]
    ]


PEOPLE_HEAD = ("by people: model", "over", "win rate", "ties", "flagged", "over's flagged", "win rate where flagged")


def people_rows(content: Content) -> list[tuple[str, ...]]:
    """Rows of win rates by people with the head `PEOPLE_HEAD`: of each pair all judgements, then those by flag."""
    rows: list[tuple[str, ...]] = []
    for pair in (content.get("people") or {"win_rates": ()})["win_rates"]:
        rate, ties = interval(pair["win_rate"], ".3f"), number(pair["ties"], ".2f")
        rows.append((pair["first"], pair["second"], rate, ties, NONE, NONE, NONE))
        for flag, found in pair["flags"].items():
            flagged = [interval(found[side], ".2f") for side in ("first", "second", "win_rate")]
            # A flag that nobody has set says nothing of the pair.
            if found["win_rate"] is not None:
                rows.append((f"  {flag.replace('_', ' ')}", "", NONE, NONE, *flagged))
    return rows


REWARD_HEAD = ("reward model", "accuracy", "longer wins", "calibration error", "prompts", "pairs")


def reward_rows(content: Content) -> list[tuple[str, ...]]:
    """Rows of the table of reward models, with the head `REWARD_HEAD`."""
    return [
        (
            one["model"],
            interval(one["accuracy"]),
            number(one["longer_wins"]),
            number(one["calibration_error"]),
            f"{one['prompts']:,}",
            f"{one['pairs']:,}",
        )
        for one in content["reward_models"]
    ]


def fit_lines(content: Content) -> list[str]:
    """A sentence on each fit of a score against d = √KL, but for best-of-n by the score itself, which cannot turn."""
    proxy = next(iter(content["scorers"]), "")
    curves: list[tuple[str, Content, tuple[str, ...]]] = [
        (f"best-of-n of {curve['model']}", curve, (proxy,)) for curve in content["best_of_n"]
    ]
    if content["policies"]:
        curves.append((f"policies from {content['policies']['start']}", content["policies"], ()))
    lines = []
    for what, curve, left_out in curves:
        for scorer, fit in curve["fits"].items():
            if fit is not None and scorer not in left_out:
                form = "d(α − βd)" if fit["form"] == "best-of-n" else "d(α − β log d)"
                lines.append(
                    f"{scorer}, {what}: {form} with α {interval(fit['alpha'], '.2f')} and β "
                    f"{interval(fit['beta'], '.2f')}; {_turn(fit, max(curve['kl']) ** 0.5)}"
                )
    return lines


def _turn(fit: Content, most: float) -> str:
    """Where a fitted curve turns, of which `most` was measured."""
    value, high = fit["turn"]["value"], fit["turn"]["high"]
    if value is None:
        return f"it does not turn (measured to d = {most:.2f})"
    at = f"d = {value:.2f} ({number(fit['turn']['low'], '.2f')} to {'∞' if high is None else f'{high:.2f}'})"
    if fit["turned"]:
        return f"it turns at {at}, measured to {most:.2f}"
    return f"it may turn at {at}, which reaches beyond the {most:.2f} that were measured"
