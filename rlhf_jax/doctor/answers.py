"""Checks of the rows that are trained on: loss masks, the end of an answer, special tokens."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import rich.text

from rlhf_jax.data import Demonstration, Dialogue, Ledger, encode_demonstrations, encode_rankings
from rlhf_jax.data.records import texts_of
from rlhf_jax.doctor.checks import STAGES, Check, LeftOut, Measured
from rlhf_jax.doctor.patient import AMONG, Patient, Row
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.tokenizers.protocol import TextTokenizer

# Fewest characters of a text that does not stand in an answer by chance.
TELLING = 12
# Rows that are shown, and their most tokens.
SHOWN, MOST_SHOWN = 3, 96
# Shares of rows that a run may drop, and that may have the same remark.
MOST_DROPPED, MOST_REMARKED = 0.5, 0.1
SPECIAL_TEXTS = ("<|endoftext|>", "</s>", "<s>", "<|im_end|>", "<|eot_id|>", "<pad>", "<eos>", "<bos>", "[EOS]")


class Encoded(NamedTuple):
    """A demonstration with its row."""

    record: Demonstration | Dialogue
    row: Row


def encoded(patient: Patient) -> list[Encoded]:
    """The first demonstrations and their rows.

    Raises:
      LeftOut: if there is none.
    """
    some = patient.records.demonstrations[:AMONG]
    context = patient.opened.model.context if patient.source is not None else 1 << 20
    rows = encode_demonstrations(some, patient.tokenizer, max_tokens=context, ledger=Ledger())
    if not len(rows):
        raise LeftOut("no demonstrations; give some with --data")
    return [Encoded(record, row) for record, row in zip(rows.sources, rows.rows, strict=True)]


def targets_of(row: Row) -> list[int]:
    """The tokens of a row that are learned."""
    return [id for id, target in zip(*row, strict=True) if target]


def shares(found: Iterable[tuple[bool, str]]) -> tuple[int, int, str]:
    """(number of rows, number that are wrong, where the first of these is)."""
    listed = list(found)
    wrong = [where for right, where in listed if not right]
    return len(listed), len(wrong), wrong[0] if wrong else ""


def eos_learned(patient: Patient) -> Measured:
    """Demonstrations whose last target is an end token."""
    stops = patient.tokenizer.stop_ids
    if not any(isinstance(record, Dialogue) or record.ended for record, _ in encoded(patient)):
        return Measured(False, "all answers are marked as cut, so that none has an end")
    total, wrong, first = shares(
        (any(id in stops for id in targets_of(row)[-1:]), record.where)
        for record, row in encoded(patient)
        if isinstance(record, Dialogue) or record.ended
    )
    return Measured(not wrong, _of("answers end with a target that ends them", total, wrong, first))


def eos_scored(patient: Patient) -> Measured:
    """Ranked responses, but for those that are marked as cut, that end with an end token."""
    records, stops = patient.records.comparisons[:AMONG], patient.tokenizer.stop_ids
    context = patient.opened.model.context
    rankings = encode_rankings(records, patient.tokenizer, max_tokens=context, ledger=Ledger())
    if not len(rankings):
        raise LeftOut("no comparisons; give some with --data")
    total, wrong, first = shares(
        (ids[-1] in stops, record.where)
        for record, (responses, _) in zip(rankings.sources, rankings.rows, strict=True)
        for ids, ended in zip(responses, record.ended or [True] * len(responses), strict=True)
        if ended
    )
    return Measured(not wrong, _of("responses end with an end token", total, wrong, first))


def loss_mask(patient: Patient) -> Measured:
    """Rows whose targets are the answers, and nothing of the prompts."""
    total, wrong, first = shares(
        (_only_answers(record, row, patient.tokenizer), record.where) for record, row in encoded(patient)
    )
    return Measured(not wrong, _of("rows have the answers as targets, and these alone", total, wrong, first))


def _only_answers(record: Demonstration | Dialogue, row: Row, tokenizer: TextTokenizer) -> bool:
    targets = targets_of(row)
    if not targets:
        return isinstance(record, Dialogue) and len(record.unlearned) > 0
    learned = tokenizer.decode([id for id in targets if id not in tokenizer.special_ids])
    if isinstance(record, Demonstration) and tokenizer.chat_template is None and not record.rest:
        return _plain(learned) == _plain(record.completion) or tokenizer.lost(record.completion) != ""
    turns = record.messages if isinstance(record, Dialogue) else record.turns
    answers = [message.text for message in turns if message.role == "assistant"]
    answers += [record.completion] if isinstance(record, Demonstration) else []
    if not turns:
        return _plain(record.completion) in _plain(learned) if isinstance(record, Demonstration) else True
    others = [_plain(message.text) for message in turns if message.role != "assistant"]
    asked = [text for text in others if len(text) >= TELLING and text not in _plain(" ".join(answers))]
    return not any(text in _plain(learned) for text in asked)


def _plain(text: str) -> str:
    return " ".join(text.split())


def special_from_text(patient: Patient) -> Measured:
    """Special tokens that text is encoded to."""
    tokenizer, special = patient.tokenizer, patient.tokenizer.special_ids
    records = patient.records
    some = (*records.demonstrations, *records.comparisons, *records.prompts, *records.texts)[:AMONG]
    texts = [*SPECIAL_TEXTS, *tokenizer.special_tokens, *(text[:2000] for one in some for text in texts_of(one))]
    total, wrong, first = shares(
        (
            not special.intersection((*_own(tokenizer.encode(text), tokenizer), *tokenizer.encode_continuation(text))),
            repr(text[:40]),
        )
        for text in texts
    )
    pad = tokenizer.pad_id
    if pad == tokenizer.eos_id or pad in tokenizer.stop_ids:
        return Measured(False, f"padding has the id of an end token, {pad}")
    return Measured(not wrong, _of("texts have no special token", total, wrong, first))


def _own(ids: Sequence[int], tokenizer: TextTokenizer) -> Sequence[int]:
    """The ids of a text without those at the start of every text."""
    start = tokenizer.start_ids
    return ids[len(start) :] if start and tuple(ids[: len(start)]) == tuple(start) else ids


def rows_used(patient: Patient) -> Measured:
    """Rows that a run did not use, or used with a remark, by its ledgers."""
    paths = [] if patient.run is None else sorted(patient.run.path.glob("ledger*.json"))
    if not paths:
        raise LeftOut("no ledger, which a run writes at its end")
    worst = (0.0, "no row is dropped or remarked on")
    for path in paths:
        ledger = read_json(path)
        rows = max(int(ledger["total"]), 1)
        for what, most in (("dropped", MOST_DROPPED), ("remarked", MOST_REMARKED)):
            counts = collections.Counter[str]()
            for reason, count in ledger["reasons"].get(what, {}).items():
                # A dialogue whose earlier answers a template rewrites is learned as it should be.
                if not reason.startswith("answers without loss"):
                    counts[reason if what == "dropped" else reason[:40]] += count
            share = (sum(counts.values()) if what == "dropped" else max(counts.values(), default=0)) / rows
            if share / most > worst[0]:
                reason = counts.most_common(1)[0][0]
                worst = (share / most, f"{share:.0%} of the rows in {path.name} are {what}, most: {reason}")
    return Measured(worst[0] <= 1, worst[1])


def _of(what: str, total: int, wrong: int, first: str) -> str:
    where = f", not so {first}" if first else ""
    return f"{total - wrong:,} of {total:,} {what}{where}"


def shown_rows(patient: Patient) -> list[rich.text.Text]:
    """A few rows, their targets between ⟦ and ⟧, in bold green on a terminal; the rest is dim.

    Returns:
      A line for each; [] without demonstrations.
    """
    try:
        rows = [row for _, row in encoded(patient)[:SHOWN]]
    except LeftOut:
        return []
    lines = []
    for ids, mask in rows:
        # Of a long row, what is around the beginning of its first answer.
        learned = list(mask).index(True) if any(mask) else 0
        start = max(min(learned - MOST_SHOWN // 2, len(ids) - MOST_SHOWN), 0)
        line, inside = rich.text.Text("…" if start else ""), False
        for id, target in list(zip(ids, mask, strict=True))[start : start + MOST_SHOWN]:
            if target != inside:
                line.append("⟦" if target else "⟧", style="green")
                inside = target
            line.append(_token(id, patient.tokenizer), style="bold green" if target else "dim")
        more = len(ids) > start + MOST_SHOWN
        line.append("…" if more else "⟧" if inside else "", style="green")
        lines.append(line)
    return lines


def _token(id: int, tokenizer: TextTokenizer) -> str:
    """A token as people read it: its text without control characters, or the name of a special token."""
    if id in tokenizer.special_ids:
        named = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>", tokenizer.pad_id: "<pad>"}
        own = {other: text for text, other in tokenizer.special_tokens.items()}
        return own.get(id) or named.get(id, f"<{id}>")
    text = tokenizer.token_bytes(id).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


TEMPLATE = "with messages, use a tokenizer that has the template's tokens, or --chat-template FILE"
ANSWERS = (
    Check(
        "eos-learned",
        "demonstrations whose last target is an end token",
        'all but those with "ended": false',
        f"the model cannot learn to stop: {TEMPLATE}; with text, report it",
        ("sft", "published"),
        eos_learned,
    ),
    Check(
        "eos-scored",
        "ranked responses that end with an end token",
        "all but those that are marked as cut",
        f"the reward model cannot tell whole answers from cut ones: {TEMPLATE}",
        ("reward",),
        eos_scored,
    ),
    Check(
        "loss-mask",
        "rows whose targets are the answer alone",
        "all",
        "the model learns prompts, or not its whole answers: look at the rows that are shown, and at a chat template's "
        "{% generation %}",
        ("sft", "published"),
        loss_mask,
    ),
    Check(
        "rows-used",
        "rows in ledger.json that are dropped, or that have the same remark",
        f"at most {MOST_DROPPED:.0%}, and at most {MOST_REMARKED:.0%}",
        "look at these rows: --max-tokens or --prompt-length for long ones, messages in place of rendered text, other "
        "held-out rows than those of training",
        STAGES,
        rows_used,
    ),
    Check(
        "special-from-text",
        "texts, those of special tokens among them, that are encoded without a special token",
        "all, and padding is not an end token",
        "a prompt can end or forge a turn: remove such texts from the data, and report the tokenizer",
        (*STAGES, "published"),
        special_from_text,
    ),
)
