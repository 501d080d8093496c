"""Encoding of records to token ids and loss masks.

A row is `[bos] prompt response [eos]`, with prompt and response tokenized separately so that the boundary is exact. The
row is the same for a demonstration, for a response scored by the reward model, and for a sampled one. A row that is too
long is dropped and recorded in the ledger; nothing is cut.

Messages are rendered with the tokenizer's chat template (chat_template.py), if a published model has one, else with the
Human / Assistant template. A prompt given as text is used unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

from rlhf_jax.data import chat
from rlhf_jax.data.batches import PromptRows, RaggedRows, RankingRows, tied_ranks
from rlhf_jax.data.dialogues import HEADERS, Message, of_tools, render_message
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompted, Ranking, Record, Text, texts_of
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.chat_template import SpecialTexts
from rlhf_jax.tokenizers.protocol import TextTokenizer

Row = tuple[list[int], list[bool]]
_REPEATED = 20  # characters of a prompt that an answer does not begin with by chance


def response_row(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Row:
    """(ids, loss mask) of a prompt and a response to it; the response's tokens are the targets.

    Args:
      prompt_ids: start with bos.
      response_ids: end with eos, unless the response did not end.
    """
    return [*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids)


def ranking_rows(prompt_ids: Sequence[int], responses: Iterable[Sequence[int]]) -> list[list[int]]:
    """One row of ids per response to a prompt, as in `response_row`, for scoring or for RankingRows."""
    return [[*prompt_ids, *response_ids] for response_ids in responses]


def prompt_ids(prompt: Prompted, tokenizer: TextTokenizer) -> list[int]:
    """Ids of `[bos] prompt`; a prompt given as messages has an end-of-turn token after each assistant turn."""
    if not prompt.turns:
        return [*tokenizer.start_ids, *tokenizer.encode(prompt.prompt)]
    return chat_ids(prompt.turns, tokenizer)


def chat_ids(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[int]:
    """Ids of `[bos] messages` with the header of the assistant's answer, as in the rows of `dialogue_row`."""
    if tokenizer.chat_template is not None:
        return chat.chat_ids(messages, tokenizer)
    ids, _, pending = _turns(messages, tokenizer)
    return ids + _continuation_ids(pending + HEADERS["assistant"], ids, tokenizer)


def response_ids(
    response: str, tokenizer: TextTokenizer, *, turns: Sequence[Message] = (), ended: bool = True
) -> list[int]:
    """Ids of a response, with eos if it `ended` rather than reached the length limit.

    Args:
      turns: the prompt's messages, if it was given as messages. A chat template then renders the full response, without
        its leading space, as the assistant's next message, and ends it with its end of turn.
      ended: False for a response that was cut off at the length limit.
    """
    if turns and tokenizer.chat_template is not None:
        return chat.chat_response_ids(turns, response.removeprefix(" "), tokenizer, ended=ended)
    ids = tokenizer.encode_continuation(response)
    return [*ids, tokenizer.eos_id] if ended else ids


def response_text(prompt_ids: Sequence[int], response_ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """Text of a sampled response, without the token that ends it and without special tokens."""
    if response_ids and response_ids[-1] in tokenizer.stop_ids:
        response_ids = response_ids[:-1]
    # Decoded alone, a response would lose its leading space: SentencePiece strips one at the start of a text.
    return tokenizer.decode([*prompt_ids, *response_ids])[len(tokenizer.decode(prompt_ids)) :]


def rest_ids(
    turns: Sequence[Message], rest: Sequence[Message], tokenizer: TextTokenizer, *, ended: bool = True
) -> list[int]:
    """Ids of several messages that answer the turns, the first and the last by the assistant.

    They follow `chat_ids(turns)`, and both are the row of the dialogue; the last message has its end if it `ended`.
    """
    if tokenizer.chat_template is not None:
        return chat.chat_rest_ids(turns, rest, tokenizer, ended=ended)
    ids = dialogue_row([*turns, *rest], tokenizer)[0][len(chat_ids(turns, tokenizer)) :]
    return ids if ended else ids[:-1]


def observation_ids(turns: Sequence[Message], observation: Message, tokenizer: TextTokenizer) -> list[int]:
    """Ids of what follows a sampled answer, and ends where the next answer begins.

    Args:
      turns: the prompt's messages; without any, the observation is text that continues the answer.
      observation: a message; of text, its role is not used.

    Raises:
      UserError: if it cannot be rendered.
    """
    if not turns:
        return tokenizer.encode_continuation(observation.content)
    if tokenizer.chat_template is not None:
        return chat.chat_observation_ids(turns, observation, tokenizer)
    _refuse_tools([observation])
    return tokenizer.encode_continuation(render_message(observation) + HEADERS["assistant"])


def dialogue_row(messages: Sequence[Message], tokenizer: TextTokenizer, *, unlearned: Collection[int] = ()) -> Row:
    """(ids, loss mask) of a dialogue: only the content and the end of each assistant turn are targets.

    With a chat template, some answers may carry no loss (`chat.chat_row`), and messages after the last answer to learn
    are left out.

    Args:
      unlearned: places of assistant turns that carry no loss.
    """
    if tokenizer.chat_template is not None:
        learned = [at for at, message in enumerate(messages) if message.role == "assistant" and at not in unlearned]
        return chat.chat_row(messages[: max(learned, default=len(messages)) + 1], tokenizer, unlearned=unlearned)
    ids, mask, pending = _turns(messages, tokenizer, unlearned)
    rest = _continuation_ids(pending, ids, tokenizer)
    return ids + rest, mask + [False] * len(rest)


def encode_text(records: Iterable[Text], tokenizer: TextTokenizer, *, ledger: Ledger) -> list[list[int]]:
    """Ids of the documents, without special ids, for `pack_text`; the ledger also counts those that it adds."""
    docs = []
    for record in records:
        with _named(record.where):
            ids = _document_ids(record, tokenizer)
        ledger.keep(record.where, tokens=len(tokenizer.start_ids) + len(ids) + 1)
        _remark_special([record.text], record.where, tokenizer, ledger)
        _remark_lost(record, tokenizer, ledger)
        docs.append(ids)
    return docs


def encode_demonstrations(
    records: Iterable[Demonstration | Dialogue],
    tokenizer: TextTokenizer,
    *,
    max_tokens: int,
    ledger: Ledger,
    buckets: tuple[int, ...] = (),
) -> RaggedRows:
    """Encodes rows for supervised fine-tuning, of at most `max_tokens` ids each."""
    rows, kept = [], []
    for record in records:
        with _named(record.where):
            if isinstance(record, Dialogue):
                row = dialogue_row(record.messages, tokenizer, unlearned=record.unlearned)
            else:
                row = response_row(prompt_ids(record, tokenizer), _completion_ids(record, tokenizer))
        if len(row[0]) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
            continue
        ledger.keep(record.where, tokens=len(row[0]))
        _remark_lost(record, tokenizer, ledger)
        unlearned = _answers(record) - _targets(row[1])
        if unlearned > 0:
            reason = f"answers without loss: {unlearned}, which the chat template rewrites once others follow"
            ledger.remark(record.where, reason)
        if tokenizer.chat_template is not None:
            _remark_endless(record, row, tokenizer, ledger)
        if isinstance(record, Dialogue):
            _remark_special([message.content for message in record.messages], record.where, tokenizer, ledger)
        else:
            _remark_special([record.prompt, record.completion], record.where, tokenizer, ledger)
            _remark_repeated(record, [record.completion], ledger)
        rows.append(row)
        kept.append(record)
    return RaggedRows(rows, max_tokens, tokenizer.pad_id, buckets, kept)


def _remark_endless(record: Demonstration | Dialogue, row: Row, tokenizer: TextTokenizer, ledger: Ledger) -> None:
    """Remarks on messages whose last answer has no end, as where the template's end of a turn is no special token."""
    if isinstance(record, Demonstration) and not (record.turns and record.ended):
        return
    targets = [id for id, target in zip(*row, strict=True) if target]
    if targets and targets[-1] not in tokenizer.stop_ids:
        reason = "by the chat template no token ends the answer, so the model does not learn to stop"
        ledger.remark(record.where, f"{reason}; use a tokenizer with the template's tokens, or --chat-template FILE")


def encode_rankings(
    records: Iterable[Comparison | Ranking],
    tokenizer: TextTokenizer,
    *,
    max_tokens: int,
    ledger: Ledger,
    buckets: tuple[int, ...] = (),
) -> RankingRows:
    """Encodes rows for the reward model; a prompt is dropped if any of its responses exceeds `max_tokens`.

    Responses that are equal once encoded are ties; a prompt without two that differ in rank is dropped.
    """
    rows, kept = [], []
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    for record in records:
        if isinstance(record, Comparison):
            responses, ranks, same = (record.chosen, record.rejected), (1, 2), "chosen equals rejected"
        else:
            responses, ranks, same = record.responses, record.ranks, "all responses are equal"
        with _named(record.where):
            ends = record.ended or [True] * len(responses)
            if record.rests:
                answers = [
                    rest_ids(record.turns, rest, tokenizer, ended=ended)
                    for rest, ended in zip(record.rests, ends, strict=True)
                ]
            else:
                answers = [
                    response_ids(text, tokenizer, turns=record.turns, ended=ended)
                    for text, ended in zip(responses, ends, strict=True)
                ]
            ids = ranking_rows(prompt_ids(record, tokenizer), answers)
        if max(map(len, ids)) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
        elif tied := _ordered(ids, ranks, record.where, ledger, same):
            _remark_special([record.prompt, *responses], record.where, tokenizer, ledger)
            _remark_repeated(record, responses, ledger)
            _remark_lost(record, tokenizer, ledger)
            rows.append((ids, tied))
            kept.append(record)
    return RankingRows(rows, max_tokens, tokenizer.pad_id, buckets, kept)


def ordered_rankings(rankings: RankingRows, ledger: Ledger) -> RankingRows:
    """The rows that `encode_rankings` would keep of rows that are encoded already; the ledger numbers them from 1."""
    rows = []
    for number, (ids, ranks) in enumerate(rankings.rows, start=1):
        if tied := _ordered(ids, ranks, f"rankings:{number}", ledger, "all responses are equal"):
            rows.append((ids, tied))
    return dataclasses.replace(rankings, rows=rows, sources=())


def _ordered(
    ids: Sequence[Sequence[int]], ranks: Sequence[int], where: str, ledger: Ledger, same: str
) -> tuple[int, ...]:
    """Ranks with equal rows of ids tied, () if they order nothing, recorded in the ledger either way."""
    tied = tied_ranks(ids, ranks)
    if all(list(row) == list(ids[0]) for row in ids):
        ledger.drop(where, f"{same}, once encoded")
        return ()
    if len(set(tied)) == 1:
        ledger.drop(where, "all ranks are tied" + ("" if tied == tuple(ranks) else ", as equal responses are"))
        return ()
    ledger.keep(where, tokens=sum(map(len, ids)))
    if tied != tuple(ranks):
        ledger.remark(where, "equal responses with unlike ranks, which are a tie")
    return tied


def encode_prompts(
    records: Iterable[Prompted], tokenizer: TextTokenizer, *, max_tokens: int, ledger: Ledger
) -> PromptRows:
    """Encodes prompts to sample responses for, left-padded to `max_tokens`, which includes bos."""
    rows, kept = [], []
    for record in records:
        with _named(record.where):
            ids = prompt_ids(record, tokenizer)
        if len(ids) > max_tokens:
            ledger.drop(record.where, _too_long(max_tokens))
            continue
        ledger.keep(record.where, tokens=len(ids))
        _remark_special([record.prompt], record.where, tokenizer, ledger)
        _remark_lost(record, tokenizer, ledger)
        rows.append(ids)
        kept.append(record)
    return PromptRows(rows, max_tokens, tokenizer.pad_id, kept)


def _remark_special(texts: Iterable[str], where: str, tokenizer: TextTokenizer, ledger: Ledger) -> None:
    """Remarks on a row that a chat template seems to have rendered already: its special tokens stay letters."""
    special = SpecialTexts.of(tuple(tokenizer.special_tokens))
    if found := next(filter(None, map(special.first_within, texts)), None):
        ledger.remark(where, f"has the text of a special token, {found}, which is encoded as letters; give messages")


def _remark_repeated(record: Prompted, responses: Sequence[str], ledger: Ledger) -> None:
    """Remarks on responses that all begin with the prompt, as in files whose answers are full texts."""
    prompt = (record.turns[-1].content if record.turns else record.prompt).strip()
    if len(prompt) >= _REPEATED and all(text.strip().startswith(prompt) for text in responses):
        ledger.remark(record.where, "begins with the prompt again in each answer, which then stands there twice")


def _completion_ids(record: Demonstration, tokenizer: TextTokenizer) -> list[int]:
    if record.rest:
        return rest_ids(record.turns, record.rest, tokenizer, ended=record.ended)
    return response_ids(record.completion, tokenizer, turns=record.turns, ended=record.ended)


def _remark_lost(record: Record, tokenizer: TextTokenizer, ledger: Ledger) -> None:
    """Records characters that the ids of a record do not hold."""
    lost = "".join(sorted(set(tokenizer.lost("".join(texts_of(record))))))
    if lost:
        some = " ".join(f"U+{ord(character):04X}" for character in lost[:8]) + (" …" if len(lost) > 8 else "")
        ledger.remark(record.where, f"characters that the vocabulary has no token for are lost: {some}")


def _document_ids(record: Text, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a document without start ids and eos; a dialogue is rendered as to fine-tune on it."""
    if not record.messages:
        return tokenizer.encode(record.text)
    if tokenizer.chat_template is None:
        ids = dialogue_row(record.messages, tokenizer)[0]
    else:
        ids = chat.dialogue_ids(record.messages, tokenizer)
    start = list(tokenizer.start_ids)
    ids = ids[len(start) :] if ids[: len(start)] == start else ids
    # Packing ends every document.
    return ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids


def _turns(
    messages: Sequence[Message], tokenizer: TextTokenizer, unlearned: Collection[int] = ()
) -> tuple[list[int], list[bool], str]:
    """Ids and mask up to the last assistant turn, and the text after it, which the caller continues."""
    _refuse_tools(messages)
    ids = list(tokenizer.start_ids)
    mask, pending = [False] * len(ids), ""
    for place, message in enumerate(messages):
        if message.role != "assistant":
            pending += render_message(message)
            continue
        header = _continuation_ids(pending + HEADERS["assistant"], ids, tokenizer)
        content = [*tokenizer.encode_continuation(f" {message.content}"), tokenizer.eos_id]
        ids += header + content
        mask += [False] * len(header) + [place not in unlearned] * len(content)
        pending = ""
    return ids, mask, pending


def _refuse_tools(messages: Sequence[Message]) -> None:
    """Raises UserError for what the Human / Assistant template has no place for."""
    for message in messages:
        if name := of_tools(message):
            raise UserError(
                f"field {name!r}: expected messages of text alone for a model without a chat template, got tools; use "
                "--chat-template FILE, or leave the row out"
            )


def _continuation_ids(text: str, before: Sequence[int], tokenizer: TextTokenizer) -> list[int]:
    """Ids of text that continues `before`; if `before` holds no more than start ids, the text is encoded as a start."""
    return tokenizer.encode_continuation(text) if len(before) > len(tokenizer.start_ids) else tokenizer.encode(text)


def _answers(record: Demonstration | Dialogue) -> int:
    if not isinstance(record, Dialogue):
        return 1
    return sum(message.role == "assistant" for message in record.messages) - len(record.unlearned)


def _targets(mask: Sequence[bool]) -> int:
    """Number of contiguous runs of targets in a row."""
    return sum(here and not before for before, here in zip([False, *mask], mask))


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Prefixes errors with the record's source."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _too_long(max_tokens: int) -> str:
    return f"longer than {max_tokens} tokens"
