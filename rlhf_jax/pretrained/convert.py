"""Export of runs for other tools, and import of published models as runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.lora import is_adapter
from rlhf_jax.pretrained.dialogue_template import dialogue_template
from rlhf_jax.pretrained.huggingface import SHARD_BYTES, as_published, write_folder
from rlhf_jax.pretrained.peft import write_adapter
from rlhf_jax.pretrained.source import LANGUAGE, PUBLISHED, Source, on_base, open_source, unstacked, with_template
from rlhf_jax.runs.checkpoint import Checkpoints, fingerprint, load_params, saved_steps
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.sealed import RELEASED
from rlhf_jax.tokenizers.export import write_folder as write_tokenizer


def open_any(spec: str) -> Source:
    """Open the language model or the reward model that `spec` names."""
    return open_source(spec, stages=(*LANGUAGE, "reward"))


def export(
    spec: str,
    folder: Path,
    *,
    adapter: bool = False,
    critic: bool = False,
    chat_template: str = "",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model in Hugging Face's layout, or its adapter in PEFT's.

    Args:
      spec: a run's folder or a published model, as for `open_source`.
      folder: must not exist, or be empty.
      adapter: write the LoRA adapter only.
      critic: write the value network of a PPO run instead of its policy.
      chat_template: file of a chat template in place of the model's own.
      dtype: of the tensors; by default that of the published model, float32 for an adapter.
      shard_bytes: maximum size of a file.

    Returns:
      A one-line summary for the user.

    Raises:
      UserError: for a folder in use, and for a model that cannot be written in that form.
    """
    source = with_template(open_any(spec), chat_template)
    if adapter:
        return _export_adapter(source, folder, dtype or "float32")
    if critic:
        source = value_network(source)
    tokenizer = source.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    extras: dict[str, Any] = {}
    if source.scalar and not critic:
        extras = reward_facts(source)
    written = write_folder(
        folder,
        *unstacked(jax.device_get(source.params()), source.model),
        origin=source.origin,
        special_ids={role: id for role, id in ids.items() if id is not None},
        stop_ids=tokenizer.stop_ids,
        extra_files=_tokenizer_files(source),
        dtype=dtype,
        extras=extras or None,
        shard_bytes=shard_bytes,
    )
    return f"{folder}: {written}"


def import_model(spec: str, folder: Path, *, chat_template: str = "") -> str:
    """Make a run folder that holds a published model, as a stage would, and return a one-line summary.

    Args:
      spec: as for `open_source`.
      folder: of the run.
      chat_template: file of a chat template in place of the model's own.
    """
    source = with_template(open_any(spec), chat_template)
    run = RunFolder.create(
        folder,
        stage="reward" if source.scalar else "pretrain",
        config={"source": source.spec},
        model=to_plain(source.model),
        tokenizer=source.tokenizer,
        inputs={"source": source.fingerprint},
        origin=source.origin,
    )
    if not run.finished:
        params = source.params()
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.random.key(0), {})
        Checkpoints(run.checkpoints, keep_last=1).save(0, state, {})
        facts = reward_facts(source) if source.scalar else {}
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        run.finish({"parameters": count, "dialogues": source.dialogues, **facts})
    return f"{folder}: {run.stage} run of {source.model.layers} layers, width {source.model.width}"


def reward_facts(source: Source) -> dict[str, Any]:
    """Facts of a reward model that are stored with it, as far as known: mean and scale of its scores, its warnings."""
    facts = {"score_mean": source.score_mean, "score_scale": source.score_scale}
    known: dict[str, Any] = {name: value for name, value in facts.items() if value is not None}
    return known | ({"warnings": list(source.warnings)} if source.warnings else {})


def value_network(source: Source) -> Source:
    """The value network of a PPO run, with the base and the architecture of what it started from.

    That is the reward model, or the policy's start if the reward was of functions alone.

    Raises:
      UserError: if the source is not a PPO run with a value network, or its reward model is not there or has changed.
    """
    if source.stage != "ppo":
        raise UserError(f"{source.where}: expected a ppo run, which has a value network, got a {source.stage} run")
    run = RunFolder.open(source.spec, stages=("ppo",))
    # After an alarm that of the released policy, not what came of both.
    released = max(saved_steps(run.path / RELEASED), default=None)
    if released is not None and released not in saved_steps(run.checkpoints):
        raise UserError(
            f"{source.where}: expected the value network of step {released}, whose policy is released, got the steps "
            f"{saved_steps(run.checkpoints)}; an alarm ended the run, and what came after that step is not kept as good"
        )
    params = run.load_params() if released is None else load_params(run.checkpoints, released)
    if "critic" not in params:
        raise UserError(f"{source.where}: expected a ppo run with a value network (--estimator gae), got one without")
    critic, start, base = jax.tree.map(jnp.asarray, params["critic"]), source, source.base
    if run.config.get("reward"):
        start = _reward_model(source, run)
        shared = start.lora == source.lora and is_adapter(start.own())
        base = None if source.lora is None else start.base if shared else start
    return dataclasses.replace(
        source,
        model=start.model,
        origin=start.origin,
        scalar=True,
        own=lambda: critic,
        identify=lambda: fingerprint(critic),
        base=base,
    )


def _reward_model(source: Source, run: RunFolder) -> Source:
    """The reward model of a PPO run."""
    spec = run.config["reward"]
    at = spec if spec.startswith(PUBLISHED) else run.find(spec)
    if at is None:
        raise UserError(
            f"{source.where}: expected its reward model {spec}, which the value network started from, got no such "
            "folder; put it back"
        )
    found = open_source(on_base(at, run.config.get("base", "")), stages=("reward",))
    if found.fingerprint != run.inputs["reward"]:
        raise UserError(
            f"{source.where}: expected its reward model {spec}, which the value network started from, as it was, with "
            f"fingerprint {run.inputs['reward'][:12]}, got {found.fingerprint[:12]}"
        )
    return found


def _export_adapter(source: Source, folder: Path, dtype: str) -> str:
    if source.lora is None or source.base is None:
        raise UserError(f"{source.where}: expected a run that trained an adapter (--lora.rank), got a whole network")
    origin = source.origin
    if origin is None:
        origin = as_published(*unstacked(jax.device_get(source.base.params()), source.model))[2]
    base = source.base.spec.removeprefix("hf:")
    adapter, model = unstacked(jax.device_get(source.own()), source.model)
    if not is_adapter(adapter):
        raise UserError(
            f"{source.where}: expected the factors A and B of an adapter, got the moving average of their product "
            "(--ema-decay), whose rank is full; use hf:FOLDER for the merged model"
        )
    files = _tokenizer_files(source)
    write_adapter(folder, adapter, source.lora, model, origin["model_type"], base=base, dtype=dtype, extra_files=files)
    return f"{folder}: adapter of rank {source.lora.rank} for {base}"


def _tokenizer_files(source: Source) -> Callable[[Path], None]:
    """Writes the tokenizer's files into a folder, with the chat template that was trained."""
    tokenizer = source.tokenizer
    template = dialogue_template(tokenizer) if source.dialogues and tokenizer.chat_template is None else None
    return lambda folder: write_tokenizer(tokenizer, folder, chat_template=template)
