"""Stage 1, pretraining: text files in, a run folder out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax

from rlhf_jax.arrays import TrainState
from rlhf_jax.data import Ledger, Text, TokenRows, encode_text, pack_text, read_records
from rlhf_jax.data.split import hold_out_texts, remark_shared
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, count_parameters, init_params
from rlhf_jax.optim import first_key
from rlhf_jax.pretrained.source import LANGUAGE, Start, open_for, start_from
from rlhf_jax.runs.lifecycle import (
    Finished,
    complete,
    create_run,
    exclusive,
    fingerprint_of,
    refuse_empty,
    refuse_unevaluated,
    say,
    say_data,
    say_epochs,
    say_unheld,
)
from rlhf_jax.stages.pretrain import STAGE, Config, make_update
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers.inputs import beginnings, wants_embedded
from rlhf_jax.trainers.one_network import train

# From here on, another pass over the same text is worth nothing: Muennighoff et al. 2023, Scaling Data-Constrained
# Language Models (four passes are almost as good as new text).
PASSES = 40


@exclusive
def run(config: Config, *, texts: Sequence[Text] | None = None, heldout: Sequence[Text] | None = None) -> Finished:
    """Pretrain on text and write a run folder; resumes from the latest checkpoint of the same run.

    Args:
      config: settings of the stage.
      texts: records in place of the files (or the embedded corpus) that the config names.
      heldout: held-out records, likewise.

    Raises:
      UserError: for settings or files that do not fit.
    """
    ledger, heldout_ledger = Ledger(), Ledger()
    if texts is None:
        texts, heldout = _records(config, ledger, heldout_ledger)
    splitting = heldout is None and config.heldout_fraction > 0
    if heldout is None:
        texts, heldout = hold_out_texts(texts, config.heldout_fraction, seed=config.seed, ledger=ledger)
    else:
        refuse_unevaluated(heldout, heldout_ledger)
        remark_shared(texts, heldout, heldout_ledger)
    refuse_empty(texts, "texts", ledger)
    source = open_for(config, config.init, stages=LANGUAGE) if config.init else None
    tokenizer = _tokenizer(config, texts) if source is None else source.tokenizer
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    if source is not None:
        model_config = dataclasses.replace(source.model, dropout=config.model.dropout)
        if config.row_length > model_config.context:
            raise UserError(f"row_length: expected at most the context {model_config.context}, got {config.row_length}")
    inputs = {"texts": fingerprint_of(texts), "heldout": fingerprint_of(heldout)}
    model, origin = Transformer(model_config), None
    if source is None:
        start = Start(init_params(model, jax.random.key(config.seed)), None, None)
    else:
        inputs["init"], origin = source.fingerprint, source.origin
        start = start_from(source, config.lora, lambda: first_key(config.seed))
    folder = create_run(
        config, stage=STAGE, model=model_config, tokenizer=tokenizer, inputs=inputs, origin=origin, base=start.record
    )
    if folder.finished:
        return Finished(folder, folder.summary)
    rows = pack(texts, tokenizer, config.row_length, ledger)
    heldout_rows = pack(heldout, tokenizer, config.row_length, heldout_ledger)
    say_data(ledger, count_parameters(start.base or start.params), heldout=heldout_ledger)
    say_epochs(rows, batch=config.batch, steps=config.steps)
    if config.steps > (enough := math.ceil(PASSES * len(rows) / config.batch)):
        say(
            f"warning: more than some {PASSES} passes over the same text teach next to nothing new and are learnt by "
            f"heart; use more text, or fewer steps ({enough:,})"
        )
    if splitting:
        say_unheld(heldout_rows)
    heldout_bytes = sum(len(text.text.encode()) for text in heldout)

    def evaluate(state: TrainState) -> dict[str, float]:
        params = attach(start.base, state.params, config.lora.scale)
        loss, targets = mean_loss(model, params, heldout_rows, batch_size=config.batch)
        return {"loss": loss, "bits_per_byte": loss * targets / math.log(2) / max(heldout_bytes, 1)}

    state = train(
        folder,
        config,
        start,
        rows,
        functools.partial(make_update, model, microbatches=config.microbatches, lora_scale=config.lora.scale),
        evaluate=evaluate if len(heldout_rows) else None,
        flops_per_token=config.lora.passes * model_config.flops_per_token(config.row_length),
        best_metric="eval/loss" if len(heldout_rows) else None,
    )
    figures = evaluate(state) if len(heldout_rows) else {}
    summary = {
        "parameters": count_parameters(start.base or start.params),
        "training_tokens": rows.targets,
        "heldout_loss": figures.get("loss"),
        "heldout_bits_per_byte": figures.get("bits_per_byte"),
        # Its own messages do not count: they may be a few among texts, too few to learn a turn's end from.
        "dialogues": source is not None and source.dialogues,
    }
    return complete(folder, summary, beginnings(heldout or texts), ledger, heldout=heldout_ledger)


def pack(texts: Sequence[Text], tokenizer: TextTokenizer, row_length: int, ledger: Ledger) -> TokenRows:
    """Pack texts into rows of `row_length` input tokens, with block-diagonal attention over documents."""
    return pack_text(
        encode_text(texts, tokenizer, ledger=ledger),
        length=row_length + 1,
        start_ids=tokenizer.start_ids,
        eos_id=tokenizer.eos_id,
    )


def _records(config: Config, ledger: Ledger, heldout_ledger: Ledger) -> tuple[Sequence[Text], Sequence[Text] | None]:
    """Training and held-out texts; None if those are to be held out from the training texts."""
    embedded = wants_embedded("data", config.data, "text")
    texts = load_corpus().texts if embedded else read_records(config.data, "text", ledger)
    if config.heldout:
        return texts, read_records(config.heldout, "text", heldout_ledger)
    return texts, load_corpus().development.texts if embedded else None


def _tokenizer(config: Config, texts: Sequence[Text]) -> Tokenizer:
    if config.tokenizer == "bpe":
        return Tokenizer.train((text.text for text in texts), config.model.vocab_size)
    return Tokenizer.bytes() if config.tokenizer == "bytes" else Tokenizer.named(config.tokenizer)
