"""Records to token ids, and which of them carry loss.

A row is `[bos] prompt response [eos]`, with prompt and response tokenised apart so that the boundary is exact: the same
row for a demonstration, for a response that the reward model scores, and for one that was sampled. A row that is too
long is dropped and named in the ledger; nothing is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf_jax.data.batches import PromptRows, RaggedRows, RankingRows
from rlhf_jax.data.dialogues import HEADERS, Message, render_message
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompted, Ranking, Text
from rlhf_jax.tokenizer import Tokenizer

Row = tuple[list[int], list[bool]]


def response_row(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Row:
    """(ids, loss mask) of a prompt and a response to it; the response's tokens are the targets.

    prompt_ids start with bos. response_ids end with eos, unless the response never ended.
    """
    return [*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids)


def ranking_rows(prompt_ids: Sequence[int], responses: Iterable[Sequence[int]]) -> list[list[int]]:
    """One row of ids for each response to a prompt, as `response_row` has them, for scoring or for RankingRows."""
    return [[*prompt_ids, *response_ids] for response_ids in responses]


def prompt_ids(prompt: Prompted, tokenizer: Tokenizer) -> list[int]:
    """`[bos] prompt`; a prompt given as messages has an eos after each of the assistant's turns."""
    if not prompt.turns:
        return [tokenizer.bos_id, *tokenizer.encode(prompt.prompt)]
    return chat_ids(prompt.turns, tokenizer)


def chat_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """`[bos] messages` up to the place where the assistant answers, as `dialogue_row` trains it."""
    ids, _, pending = _turns(messages, tokenizer)
    return ids + tokenizer.encode(pending + HEADERS["assistant"])


def response_ids(response: str, tokenizer: Tokenizer, *, ended: bool = True) -> list[int]:
    """Ids of a response; eos follows if it `ended`, rather than ran out of room."""
    ids = tokenizer.encode(response)
    return [*ids, tokenizer.eos_id] if ended else ids


def dialogue_row(messages: Sequence[Message], tokenizer: Tokenizer) -> Row:
    """(ids, loss mask): the content of each of the assistant's turns and an eos after it are targets, nothing else."""
    ids, mask, pending = _turns(messages, tokenizer)
    rest = tokenizer.encode(pending)
    return ids + rest, mask + [False] * len(rest)


def encode_text(records: Iterable[Text], tokenizer: Tokenizer, *, ledger: Ledger) -> list[list[int]]:
    """The documents' ids, without special ids, for `pack_text`; the ledger counts bos and eos."""
    docs = []
    for record in records:
        ids = tokenizer.encode(record.text)
        ledger.keep(record.where, tokens=len(ids) + 2)
        docs.append(ids)
    return docs


def encode_demonstrations(
    records: Iterable[Demonstration | Dialogue],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    ledger: Ledger,
    buckets: tuple[int, ...] = (),
) -> RaggedRows:
    """Rows for supervised fine-tuning, of at most `max_tokens` ids each."""
    rows, kept = [], []
    for record in records:
        if isinstance(record, Dialogue):
            row = dialogue_row(record.messages, tokenizer)
        else:
            row = response_row(prompt_ids(record, tokenizer), response_ids(record.completion, tokenizer))
        if len(row[0]) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
            continue
        ledger.keep(record.where, tokens=len(row[0]))
        rows.append(row)
        kept.append(record)
    return RaggedRows(rows, max_tokens, tokenizer.pad_id, buckets, kept)


def encode_rankings(
    records: Iterable[Comparison | Ranking],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    ledger: Ledger,
    buckets: tuple[int, ...] = (),
) -> RankingRows:
    """Rows for the reward model; a prompt is dropped whole if one of its responses does not fit `max_tokens`."""
    rows, kept = [], []
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    for record in records:
        if isinstance(record, Comparison):
            responses, ranks, same = (record.chosen, record.rejected), (1, 2), "chosen equals rejected"
        else:
            responses, ranks, same = record.responses, record.ranks, "all responses are equal"
        ids = ranking_rows(prompt_ids(record, tokenizer), [response_ids(text, tokenizer) for text in responses])
        if max(map(len, ids)) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
        elif all(row == ids[0] for row in ids):
            ledger.drop(record.where, f"{same}, once encoded")
        else:
            ledger.keep(record.where, tokens=sum(map(len, ids)))
            rows.append((ids, ranks))
            kept.append(record)
    return RankingRows(rows, max_tokens, tokenizer.pad_id, buckets, kept)


def encode_prompts(records: Iterable[Prompted], tokenizer: Tokenizer, *, max_tokens: int, ledger: Ledger) -> PromptRows:
    """Prompts to sample responses for, left-padded to `max_tokens`, which counts bos."""
    rows, kept = [], []
    for record in records:
        ids = prompt_ids(record, tokenizer)
        if len(ids) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
            continue
        ledger.keep(record.where, tokens=len(ids))
        rows.append(ids)
        kept.append(record)
    return PromptRows(rows, max_tokens, tokenizer.pad_id, kept)


def _turns(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool], str]:
    """Ids and mask up to the last assistant turn, and the text after it, which goes on as the caller says."""
    ids, mask, pending = [tokenizer.bos_id], [False], ""
    for message in messages:
        if message.role != "assistant":
            pending += render_message(message)
            continue
        header = tokenizer.encode(pending + HEADERS["assistant"])
        content = [*tokenizer.encode(f" {message.content}"), tokenizer.eos_id]
        ids += header + content
        mask += [False] * len(header) + [True] * len(content)
        pending = ""
    return ids, mask, pending


def _too_long(max_tokens: int) -> str:
    return f"longer than {max_tokens} tokens"
