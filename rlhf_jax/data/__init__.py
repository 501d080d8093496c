"""Data pipeline from files to batches: records, ledger, dialogues, encoding, packing and batching."""

from rlhf_jax.data.batches import (
    PromptRows,
    RaggedRows,
    RankingRows,
    Rows,
    TokenRows,
    batch_at,
    bucket_length,
    new_lengths,
    order,
)
from rlhf_jax.data.dialogues import Message, render, render_prompt, split_hh
from rlhf_jax.data.encode import (
    chat_ids,
    dialogue_row,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_text,
    observation_ids,
    prompt_ids,
    ranking_rows,
    response_ids,
    response_row,
    response_text,
)
from rlhf_jax.data.gopher import as_messages, extract_dialogues
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.packing import pack_text
from rlhf_jax.data.reader import read_records
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompt, Ranking, Record, Text, have_messages

__all__ = [
    "Comparison",
    "Demonstration",
    "Dialogue",
    "Ledger",
    "Message",
    "Prompt",
    "PromptRows",
    "RaggedRows",
    "Ranking",
    "RankingRows",
    "Record",
    "Rows",
    "Text",
    "TokenRows",
    "as_messages",
    "batch_at",
    "bucket_length",
    "chat_ids",
    "dialogue_row",
    "encode_demonstrations",
    "encode_prompts",
    "encode_rankings",
    "encode_text",
    "extract_dialogues",
    "have_messages",
    "new_lengths",
    "observation_ids",
    "order",
    "pack_text",
    "prompt_ids",
    "ranking_rows",
    "read_records",
    "render",
    "render_prompt",
    "response_ids",
    "response_row",
    "response_text",
    "split_hh",
]
