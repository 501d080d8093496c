"""Preference optimization: files of comparisons or rankings in, a run folder out."""

from __future__ import annotations

import dataclasses
import functools

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import METHODS
from rlhf_jax.data import Prompt, have_messages
from rlhf_jax.data.preferences import PreferenceRows, preference_rows
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout_preferences import Logps, evaluate_preferences, logps_of
from rlhf_jax.lora import attach
from rlhf_jax.optim import first_key
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_for, start_from
from rlhf_jax.runs.length import run_length
from rlhf_jax.runs.lifecycle import Finished, complete, exclusive, longest_row, say
from rlhf_jax.stages.preference import STAGE, Config, Frozen, make_update
from rlhf_jax.trainers.inputs import EXAMPLES, JudgedRecords, fingerprint_of_rankings, ranking_rows
from rlhf_jax.trainers.one_network import heldout_figures, once_a_step, open_folder, train
from rlhf_jax.trainers.ppo_start import difference, open_reference, reference_params

# Default number of passes over the data.
EPOCHS = 1.0


@exclusive
def run(config: Config, *, records: JudgedRecords | None = None, heldout: JudgedRecords | None = None) -> Finished:
    """Train the model of config.init on preferences; resumes from the latest checkpoint of the same run.

    Args:
      config: settings of the stage.
      records: comparisons and rankings in place of the files that the config names.
      heldout: held-out ones, likewise.

    Raises:
      UserError: for settings or files that do not fit.
    """
    if not config.init:
        raise UserError("init: expected a fine-tuned model, got nothing; use --init FOLDER or --init hf:FOLDER")
    source = open_for(config, config.init, stages=LANGUAGE)
    method, model = METHODS[config.method], source.network()
    limit = longest_row(config.max_tokens, config.buckets, model.config.context)
    data = ranking_rows(config, source, limit, records, heldout)
    rankings, held = data.rows, data.heldout
    rows = preference_rows(rankings, source.tokenizer, unrelated=method.unpaired)
    held_rows = preference_rows(held, source.tokenizer, unrelated=method.unpaired) if len(held) else None
    inputs = {
        "init": source.fingerprint,
        "rankings": fingerprint_of_rankings(rankings),
        "heldout": fingerprint_of_rankings(held),
    }
    length = run_length(config, len(rows), epochs=EPOCHS, what="rankings")
    # Written out, so that a run that resumes on other devices has the same batches, and so that its folder says them.
    config = dataclasses.replace(
        config,
        epochs=None,
        steps=length.steps,
        batch=length.batch,
        sft_coef=config.likelihood_weight,
        **{name: value for name, value in config.coefficients.items() if name != "alpha"},
    )
    start = start_from(source, config.lora, lambda: first_key(config.seed))
    reference = start.params if method.reference else None
    if config.reference:
        other = _open_reference(config, source)
        inputs["reference"] = other.fingerprint
        reference = reference_params(other, start, config.lora)
    folder = open_folder(config, STAGE, model.config, source, start, inputs)
    if folder.finished:
        return Finished(folder, folder.summary)
    data.say(start, length.lines)
    if method.unpaired:
        _say_baseline(config, rows)

    @functools.cache
    def reference_logps() -> Logps | None:
        if reference is None or held_rows is None:
            return None
        full = attach(start.base, reference, config.lora.scale)
        return logps_of(model, full, held_rows, batch_size=length.batch)

    @once_a_step
    def held_out(state: TrainState) -> tuple[float | None, float | None, int]:
        if held_rows is None:
            return None, None, 0
        full = attach(start.base, state.params, config.lora.scale)
        policy = logps_of(model, full, held_rows, batch_size=length.batch)
        return evaluate_preferences(policy, reference_logps(), held_rows, config)

    state = train(
        folder,
        config,
        start,
        rows,
        functools.partial(make_update, model, config=config),
        frozen=(Frozen(reference, start.base),),
        evaluate=(
            None if held_rows is None else lambda state: dict(zip(("loss", "accuracy"), held_out(state), strict=False))
        ),
        # A forward pass of the reference model, and for KTO one more of both for responses to other prompts.
        flops_per_token=(config.lora.passes + method.reference) * model.config.flops_per_token(limit),
        show=("loss", "accuracy", "margin"),
    )
    loss, right, pairs = held_out(state)
    summary = {
        "dialogues": source.dialogues or have_messages(rankings.sources),
        "prompts": len(rows),
        "steps": length.steps,
        "epochs": length.epochs,
        "heldout_loss": loss,
        **heldout_figures(right, pairs, held.ordered),
    }
    shown = (held if len(held) else rankings).sources[:EXAMPLES]
    examples = [Prompt(record.prompt, record.where, record.turns) for record in shown]
    return complete(folder, summary, examples, data.ledger, heldout=data.heldout_ledger)


def _open_reference(config: Config, source: Source) -> Source:
    """The reference model, which must have the policy's architecture."""
    other = open_reference(config, source)
    if (found := difference(source, other)) is not None:
        field, expected, got = found
        raise UserError(
            f"{other.where}: {field}: expected {expected} as in the initial policy {source.where}, got {got}; the "
            "reference must have the policy's architecture"
        )
    return other


def _say_baseline(config: Config, rows: PreferenceRows) -> None:
    """Print what KTO makes of pairs, and how many prompts have no response to another prompt."""
    without = sum(not ids for ids, _ in rows.unrelated)
    say(
        f"{config.method}: of each pair, the chosen response counts as desirable and the rejected one as "
        "undesirable; its baseline is of responses to other prompts"
        + (f", which {without:,} of {len(rows):,} prompts lack" if without else "")
    )
