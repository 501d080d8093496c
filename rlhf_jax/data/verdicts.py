"""Fields beside an answer that say what it is worth or how it ended, under the names that datasets have for them.

An answer that was judged bad, or that was cut, must not be learned as a good and complete one: its row is refused by
name. A comparison that its own row calls a tie orders nothing and is dropped.
"""

from __future__ import annotations

from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError

# They tell good answers from bad ones, both of which are in such a file; the others are refused where they say no.
VERDICTS = ("label", "kto_tag")
ASSERTED = ("is_correct", "correct", "desirable", "is_preferred", "is_chosen")
TIES = ("status", "winner", "preference", "label", "verdict", "choice")
CUTS = {
    **dict.fromkeys(("finish_reason", "stop_reason"), ("length", "max_tokens", "max_length", "token_limit")),
    **dict.fromkeys(("truncated", "is_truncated"), ("true", "1", "1.0")),
}
_YES, _NO = ("true", "1", "1.0", "chosen"), ("false", "0", "0.0", "rejected")


def refuse_unpaired(row: Row, answers: tuple[str, ...]) -> None:
    """Raises UserError for an answer with a verdict, of which only the good ones could be learned as they are.

    Args:
      answers: fields that have an answer.
    """
    for name in row.among(("chosen", "rejected")):
        if isinstance(row.fields[name], bool):
            raise _unpaired(row, name)
    if not row.among(answers):
        return
    for name in row.among((*VERDICTS, *ASSERTED)):
        if _said(row, name) in _NO or (name in VERDICTS and _said(row, name) in _YES):
            raise _unpaired(row, name)


def refuse_opposite(row: Row) -> None:
    """Raises UserError for a comparison whose verdict is against its chosen answer, as far as it can be told."""
    if _said(row, "label") in _NO:
        raise row.wrong("label", describe(row.fields["label"]), "the better answer in 'chosen', no verdict against it")


def tie(row: Row) -> str | None:
    """The field by which a comparison is a tie; None if there is none."""
    for name in row.among(TIES):
        if _said(row, name).startswith("tie") or _said(row, name) in ("draw", "tied"):
            return name
    return next((name for name in row.among(("tie", "is_tie")) if _said(row, name) in _YES), None)


def refuse_cut(row: Row) -> None:
    """Raises UserError for an answer that was cut at a length limit and is not marked as such."""
    if "ended" in row:
        return
    for name, values in CUTS.items():
        if name in row and _said(row, name) in values:
            raise row.wrong(
                name,
                describe(row.fields[name]),
                "'ended': false beside a completion that was cut, which is trained on without an end; leave others out",
            )


def _unpaired(row: Row, name: str) -> UserError:
    return row.wrong(
        name,
        describe(row.fields[name]),
        "no unpaired preferences; give 'chosen' and 'rejected', or the good answers alone, without the field",
    )


def _said(row: Row, name: str) -> str:
    """A field's truth value, number or text, in lower case; "" for others."""
    value = row.fields.get(name)
    return str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
