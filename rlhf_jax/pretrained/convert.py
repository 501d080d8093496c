"""Models out of runs, for others to load, and published models into runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.config import to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.lora import merge
from rlhf_jax.pretrained.huggingface import SHARD_BYTES, as_published, write_folder
from rlhf_jax.pretrained.peft import write_adapter
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_source, unstacked
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.tokenizers.export import write_folder as write_tokenizer


def open_any(spec: str) -> Source:
    """What `spec` names, a language model or a reward model."""
    if not spec.startswith(("hf:", "peft:")):
        return open_source(spec, stages=(*LANGUAGE, "reward"))
    try:
        return open_source(spec, stages=LANGUAGE)
    except UserError as error:
        if "found a score head" not in str(error):
            raise
    return open_source(spec, stages=("reward",))


def export(
    spec: str,
    folder: Path,
    *,
    adapter: bool = False,
    critic: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a model in Hugging Face's layout, or its adapter in PEFT's; returns a line that says what.

    Args:
      critic: the value network of a PPO run, in place of its policy.
    """
    source = open_any(spec)
    if adapter:
        return _export_adapter(source, folder, dtype or "float32")
    params = critic_params(source) if critic else source.params()
    tokenizer = source.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    extras: dict[str, Any] = {}
    if source.scalar and not critic:
        extras = {"score_mean": source.score_mean, "score_scale": source.score_scale}
    written = write_folder(
        folder,
        *unstacked(jax.device_get(params), source.model),
        origin=source.origin,
        special_ids={role: id for role, id in ids.items() if id is not None},
        extra_files=lambda path: write_tokenizer(tokenizer, path),
        dtype=dtype,
        extras=extras or None,
        shard_bytes=shard_bytes,
    )
    return f"{folder}: {written}"


def import_model(spec: str, folder: Path) -> str:
    """Makes the folder of a run that holds a published model, as a stage would; returns a line that says so."""
    source = open_any(spec)
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
        facts = {"score_mean": source.score_mean, "score_scale": source.score_scale} if source.scalar else {}
        run.finish({"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), **facts})
    return f"{folder}: {run.stage} run of {source.model.layers} layers, width {source.model.width}"


def critic_params(source: Source) -> Params:
    """The value network of a PPO run, whole."""
    if source.stage != "ppo":
        raise UserError(f"{source.where}: found a {source.stage} run, wanted a ppo run, which has a value network")
    critic = RunFolder.open(source.spec, stages=("ppo",)).load_params()["critic"]
    if source.base is None or source.lora is None:
        return critic
    whole: Params = merge(source.base.params(), critic, source.lora.scale)
    return {name: value for name, value in whole.items() if name != "unembedding"}


def _export_adapter(source: Source, folder: Path, dtype: str) -> str:
    if source.lora is None or source.base is None:
        raise UserError(f"{source.where}: found a whole network, wanted a run that trained an adapter (--lora.rank)")
    origin = source.origin
    if origin is None:
        origin = as_published(*unstacked(jax.device_get(source.base.params()), source.model))[2]
    base = source.base.spec.removeprefix("hf:")
    adapter, model = unstacked(jax.device_get(source.own()), source.model)
    write_adapter(folder, adapter, source.lora, model, origin["model_type"], base=base, dtype=dtype)
    return f"{folder}: adapter of rank {source.lora.rank} for {base}"
