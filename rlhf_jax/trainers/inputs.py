"""Where the records of a stage come from, the user's files or the embedded corpus, and prompts from them to show."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic

from rlhf_jax.config import PreferenceConfig, RewardConfig, RowsConfig
from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Dialogue,
    Ledger,
    Prompt,
    Ranking,
    RankingRows,
    Text,
    encode_rankings,
    read_records,
    render_prompt,
)
from rlhf_jax.data.split import Encoded, hold_out, remark_shared
from rlhf_jax.errors import UserError
from rlhf_jax.model import count_parameters
from rlhf_jax.pretrained.source import Source, Start
from rlhf_jax.runs.lifecycle import fingerprint_of, refuse_empty, refuse_unevaluated, say, say_data, say_unheld

JudgedRecords = Sequence[Comparison | Ranking]
EMBEDDED = "embedded"
# Prompts to show answers to: enough for a few that fit the context.
EXAMPLES = 32


def wants_embedded(field: str, paths: Sequence[str], expected: str) -> bool:
    """True for the embedded corpus, False for files.

    Args:
      field: name of the setting.
      paths: its value.
      expected: kind of records, for the error.

    Raises:
      UserError: if neither is given, or both are.
    """
    if not paths:
        flag = "--" + field.replace("_", "-")
        raise UserError(
            f"{field}: expected files of {expected}, got nothing; use {flag} FILE.jsonl, or {flag} {EMBEDDED} for "
            "Python's own documentation"
        )
    if EMBEDDED in paths and len(paths) > 1:
        raise UserError(
            f"{field}: expected files or {EMBEDDED}, got {' and '.join(paths)}; use ./{EMBEDDED} for a file so named"
        )
    return paths[0] == EMBEDDED


@dataclasses.dataclass(frozen=True)
class Data(Generic[Encoded]):
    """Encoded rows to train on and held-out rows, with the ledger of each.

    Attributes:
      drawn: True if the held-out rows were to be drawn from the others.
    """

    rows: Encoded
    heldout: Encoded
    ledger: Ledger
    heldout_ledger: Ledger
    drawn: bool

    def say(self, start: Start, lines: Sequence[str], **others: Ledger) -> None:
        """Print how much is trained on, and how many parameters; then lines on the length of the run."""
        say_data(self.ledger, count_parameters(start.base or start.params), heldout=self.heldout_ledger, **others)
        if self.drawn:
            say_unheld(self.heldout)
        for line in lines:
            say(line)


def encoded(
    config: RowsConfig,
    encode: Callable[..., Encoded],
    records: tuple[Sequence[Any], Sequence[Any] | None],
    ledgers: tuple[Ledger, Ledger],
    what: str,
) -> Data[Encoded]:
    """Encode training and held-out records; without held-out ones, hold out some of the training rows.

    Args:
      config: settings of the stage.
      encode: (records, ledger=…) -> rows.
      records: training records, and held-out ones or None.
      ledgers: of the training and of the held-out records.
      what: the training records in errors.
    """
    (given, held), (ledger, heldout_ledger) = records, ledgers
    rows = encode(given, ledger=ledger)
    refuse_empty(rows, what, ledger)
    if held is None:
        rows, held_rows = hold_out(rows, config.heldout_fraction, seed=config.seed, ledger=ledger)
        return Data(rows, held_rows, ledger, heldout_ledger, config.heldout_fraction > 0)
    remark_shared(given, held, heldout_ledger)
    held_rows = encode(held, ledger=heldout_ledger)
    refuse_unevaluated(held_rows, heldout_ledger)
    return Data(rows, held_rows, ledger, heldout_ledger, False)


def ranking_rows(
    config: RewardConfig | PreferenceConfig,
    source: Source,
    limit: int,
    given: JudgedRecords | None = None,
    held: JudgedRecords | None = None,
) -> Data[RankingRows]:
    """Training and held-out rankings; the held-out ones are given, of files, or drawn from the training ones.

    Args:
      config: settings of the stage.
      source: the model to start from.
      limit: longest row in tokens.
      given: training records in place of the files of config.
      held: held-out records, likewise.

    Raises:
      UserError: for files that are missing or do not fit.
    """
    ledgers = ledger, heldout_ledger = Ledger(), Ledger()
    if given is None:
        if not config.data:
            raise UserError("data: expected comparisons or rankings, got nothing; use --data FILE.jsonl")
        if EMBEDDED in config.data:
            raise UserError(
                "data: expected files of comparisons or rankings, got embedded, which has none; rlhf-jax recipe "
                "writes some to runs/recipe/rankings.jsonl"
            )
        given = read_records(config.data, "rankings", ledger, columns=config.columns)
    if held is None and config.heldout:
        held = read_records(config.heldout, "rankings", heldout_ledger, columns=config.columns)
    encode = functools.partial(encode_rankings, tokenizer=source.tokenizer, max_tokens=limit, buckets=config.buckets)
    return encoded(config, encode, (given, held), ledgers, "rankings")


def fingerprint_of_rankings(rows: RankingRows | None) -> str:
    """SHA-256 over the content of rankings, regardless of the file and line of each."""
    return fingerprint_of([] if rows is None else [dataclasses.replace(rows, sources=())])


def prompts_of(records: Sequence[Demonstration | Dialogue]) -> list[Prompt]:
    """Prompts of the first demonstrations; of a dialogue, the messages before the assistant's last."""
    prompts = []
    for record in records[:EXAMPLES]:
        if isinstance(record, Demonstration):
            prompts.append(Prompt(record.prompt, record.where, record.turns))
            continue
        places = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        if places and places[-1]:
            turns = record.messages[: places[-1]]
            prompts.append(Prompt(render_prompt(turns), record.where, turns))
    return prompts


def beginnings(texts: Sequence[Text]) -> list[Prompt]:
    """The first words of the first texts, as prompts."""
    short = [text.text[:24] for text in texts[:EXAMPLES]]
    return [Prompt(text[: text.rfind(" ")] if " " in text.strip() else text) for text in short if text.strip()]
