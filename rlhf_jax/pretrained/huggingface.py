"""Models in Hugging Face's folder layout: config.json, *.safetensors with their index, tokenizer, chat template.

Tensors are read one at a time and placed on the devices; they are written one file at a time. A round trip is
bit-exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, flattened, nested
from rlhf_jax.config import ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.files import UNFINISHED, sync_folder
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.config_fields import Fields
from rlhf_jax.pretrained.families import FAMILIES, family_of
from rlhf_jax.pretrained.safetensors_files import SafetensorsFolder, write_tensors
from rlhf_jax.pretrained.weights import BUFFERS, Tensor, head_of, join, shape_in_file, split, tensors_of
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.checkpoint import first_bad
from rlhf_jax.tokenizers.published_files import as_ids

SHARD_BYTES = 2 * 2**30
OURS = "rlhf_jax"  # the key of config.json for values that transformers has no key for


class Tensors(Protocol):
    """Named tensors of a file or of a folder of files, read one at a time."""

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> np.ndarray: ...

    def where(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model whose tensors are not yet read.

    Attributes:
      where: name of the model in errors.
      model_type: key of FAMILIES.
      model: its vocab_size is the file's until `for_tokenizer` reduces it.
      scalar: True for a score head instead of a language head.
      origin: record from which `write_folder` reproduces the files.
      tensors: reader of the tensors.
    """

    where: str
    model_type: str
    model: ModelConfig
    scalar: bool
    origin: dict[str, Any]
    tensors: Tensors

    def for_tokenizer(self, vocab_size: int, pad_id: int) -> Pretrained:
        """The same model with logits for the tokenizer's ids only, and an embedding row for an added pad token.

        Rows that only pad the embedding to a round size thus get no probability.

        Raises:
          UserError: if the tokenizer has ids beyond the embedding.
        """
        rows = self.model.vocab_rows
        if vocab_size > rows:
            raise UserError(
                f"{self.where}: its tokenizer has ids up to {vocab_size - 1}, its embedding has {rows} rows"
            )
        model = dataclasses.replace(self.model, vocab_size=vocab_size, embedding_rows=max(rows, pad_id + 1))
        return dataclasses.replace(self, model=model)

    def load(self, place: Callable[[str, np.ndarray], jax.Array] | None = None, dtype: str = "float32") -> Params:
        """Read the parameters as nested dicts; the host holds one tensor at a time.

        Args:
          place: (dotted path, host array) -> array on the devices; by default the default device.
          dtype: of the parameters.

        Raises:
          UserError: for a tensor that is missing, has another shape or type, or has no place in the model.
        """
        table = tensors_of(self.model_type, self.model, scalar=self.scalar)
        held = self._held(table)
        shapes = parameter_shapes(self.model, self.scalar)

        def placed(path: str, value: np.ndarray) -> jax.Array:
            host = np.asarray(value, jnp.dtype(dtype), order="C")
            return jnp.asarray(host) if place is None else place(path, host)

        flat: dict[str, Any] = {}
        for tensor in table:
            expected = shape_in_file(tensor, tuple(shapes[path] for path in tensor.ours), self.origin["rows"])
            # No variable may keep the tensor alive past this line, or two would be in memory.
            parts = split(tensor, self._checked(held[tensor.name], expected), self.model)
            flat |= {path: placed(path, part) for path, part in zip(tensor.ours, parts, strict=True)}
            del parts
        if self.scalar:
            ours = Fields(self.origin["config"], _config_file(self.where)).inner(OURS)
            flat["score.bias"] = placed("score.bias", np.full(1, ours.number("score_bias", 0.0)))
        return nested(flat)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of config.json's content and of every file of tensors."""
        digest = hashlib.sha256(json.dumps(self.origin["config"], sort_keys=True).encode())
        for path in sorted({self.tensors.where(name) for name in self.tensors.names()}):
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _held(self, table: Sequence[Tensor]) -> dict[str, str]:
        """Map names of the table to names in the file, which may lack the prefix of the base model."""
        prefix = FAMILIES[self.model_type].prefix
        head = head_of(self.model_type)
        held = {}
        for name in self.tensors.names():
            full = name if name.startswith((prefix, head, "score.")) else prefix + name
            if not full.endswith(BUFFERS):
                held[full] = name
        missing = [tensor.name for tensor in table if tensor.name not in held]
        if missing:
            raise UserError(
                f"{self.where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(table)} are); "
                f"config.json describes a {self.model_type} of {self.model.layers} layers"
            )
        # A reward model's file may still have its language head; a file with tied embeddings may repeat it.
        extra = sorted(set(held) - {tensor.name for tensor in table} - {head})
        if extra:
            name = held[extra[0]]
            raise UserError(
                f"{self.tensors.where(name)}: tensor {name!r} has no place in the model of config.json "
                f"({len(extra)} such tensors)"
            )
        if self.model.tied and not self.scalar and head in held:
            embedding, unembedding = (self._digest(held[name]) for name in (table[0].name, head))
            if embedding != unembedding:
                raise UserError(
                    f"{self.tensors.where(held[head])}: tensor {head!r} is not the embedding, to which config.json "
                    "ties it; set its field 'tie_word_embeddings' to false"
                )
        return held

    def _checked(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self.tensors.tensor(name)
        at = f"{self.tensors.where(name)}: tensor {name!r}"
        if value.shape != shape:
            raise UserError(f"{at}: expected shape {list(shape)} by config.json, got {list(value.shape)}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f"{at}: expected unquantised floating-point numbers, got {value.dtype}")
        if bad := first_bad(value):
            raise UserError(f"{at}: expected finite numbers, got {bad}; the file is damaged, copy it again")
        return value

    def _digest(self, name: str) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.tensors.tensor(name)).view(np.uint8).data).digest()


def download_hint(name: str) -> str:
    """How to get the folder of a model that a hub knows as ORG/NAME; "" for any other name."""
    # runs/ is where the stages write, also before there is one.
    if not re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", name) or Path(name).parent.exists():
        return ""
    folder = name.partition("/")[2]
    return (
        f"; for the model of the Hugging Face hub, run: hf download {name} --local-dir {folder}, and give hf:{folder}"
    )


def read_folder(folder: str | Path) -> Pretrained:
    """Open the model in a folder.

    Raises:
      UserError: for an unknown model type, and for files that are missing, truncated or not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected one with a config.json and safetensors files"
            + download_hint(str(folder))
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json in it; expected a model's folder in Hugging Face's layout")
    config, generation = read_json(folder / "config.json"), None
    if isinstance(config, dict) and "format_version" in config and "model_type" not in config:
        raise UserError(f"{folder}: expected a published model's folder, got a run's; for the run, leave out hf:")
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
        if not isinstance(generation, dict):
            raise UserError(f"{folder}/generation_config.json: expected an object, got {type(generation).__name__}")
    return pretrained(str(folder), config, SafetensorsFolder(folder), generation_config=generation)


def pretrained(
    where: str, config: Any, tensors: Tensors, *, generation_config: dict[str, Any] | None = None
) -> Pretrained:
    """Open a model from the content of its config.json and a reader of its tensors.

    Raises:
      UserError: for a config that this library's transformer cannot represent, and if there are no tensors.
    """
    at = _config_file(where)
    if not isinstance(config, dict):
        raise UserError(f"{at}: expected an object, got {type(config).__name__}")
    fields = Fields(config, at)
    if config.get("model_type") == "gemma3":
        raise fields.wrong("model_type", "gemma3_text, its text part")
    model_type = fields.word("model_type", {name: name for name in sorted(FAMILIES)})
    family = FAMILIES[model_type]
    architectures = [family.architecture] if "architectures" not in fields else config["architectures"]
    scalar = architectures == [family.classifier]
    if not scalar and architectures != [family.architecture]:
        raise fields.wrong("architectures", f"['{family.architecture}'] or ['{family.classifier}']")
    if scalar:
        _one_label(fields)
    if "quantization_config" in fields:
        raise UserError(f"{at}: field 'quantization_config': expected none (unquantised weights), got one")
    fields.refuse("is_causal", unless=True)
    try:
        model = family.read(fields)
    except UserError as error:
        # ModelConfig's errors do not name the file.
        raise UserError(str(error) if str(error).startswith(at) else f"{at}: {error}") from None
    names = tensors.names()
    if not names:
        raise UserError(f"{where}: expected tensors, got none")
    # The shortest names are small tensors. Norms may have a wider dtype than the rest, and only it loses nothing.
    norms = [name for name in names if "norm" in name or "ln_" in name]
    dtypes = [tensors.tensor(min(some, key=len)).dtype for some in (names, norms) if some]
    origin = {
        "model_type": model_type,
        "config": config,
        "generation_config": generation_config,
        "dtype": str(jnp.result_type(*dtypes)),
        "rows": model.vocab_rows,
    }
    return Pretrained(where, model_type, model, scalar, origin, tensors)


def write_folder(
    folder: str | Path,
    params: Params,
    model: ModelConfig,
    *,
    origin: Mapping[str, Any] | None = None,
    special_ids: Mapping[str, int] | None = None,
    stop_ids: Sequence[int] = (),
    extra_files: Callable[[Path], None] | None = None,
    dtype: str | None = None,
    extras: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model that transformers, vLLM and llama.cpp's converter can read.

    Args:
      folder: must not exist, or be empty; it appears once it is complete.
      params: of a language model, or with a `score` head.
      model: configuration of the parameters.
      origin: record of the published model that these parameters started from; if None, the first family that can
        represent the model is used.
      special_ids: bos, eos and pad, written to config.json if given.
      stop_ids: ids that end a response. transformers and vLLM stop where generation_config.json says, so it lists all.
      extra_files: writes the tokenizer's files into the folder it is given.
      dtype: of the tensors; by default the origin's, or that of the parameters.
      extras: values that transformers has no key for, written under "rlhf_jax" in config.json.
      shard_bytes: maximum size of a file.

    Returns:
      The name of transformers' class.

    Raises:
      UserError: for a folder in use, and for a model that no family can represent.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder, got an existing file or a folder with files")
    ids = {} if special_ids is None else special_ids
    scalar, own = "score" in params, origin is None
    if origin is None:
        params, model, origin = as_published(params, model)
    rows = origin["rows"]
    if scalar and rows <= ids.get("pad", 0) < model.vocab_rows:
        rows = model.vocab_rows  # transformers' class finds the last token by the pad id, which needs an embedding row
    known_ids = {f"{role}_token_id": id for role, id in ids.items() if id < rows}
    kind = jnp.dtype(origin["dtype"] if dtype is None else dtype)
    family = FAMILIES[origin["model_type"]]
    architecture = family.classifier if scalar else family.architecture
    config = {**origin["config"], "architectures": [architecture], "vocab_size": rows, "dtype": str(kind)}
    config.pop("torch_dtype", None)
    flat = flattened(params)
    given = {} if extras is None else dict(extras)
    if scalar:
        flat.pop("unembedding", None)  # an adapter's base still has it
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        given = {"score_bias": float(np.asarray(flat.pop("score.bias"))[0])} | given
    if scalar or own:
        config |= known_ids
    if given:
        config[OURS] = {**config.get(OURS, {}), **given}
    generation = origin["generation_config"]
    if generation is None and special_ids is not None:
        generation = known_ids
    ends = [id for id in stop_ids if id < rows]
    if ends:
        generation = _with_ends({} if generation is None else generation, ends)

    table = {tensor.name: tensor for tensor in tensors_of(origin["model_type"], model, scalar=scalar)}
    odd = sorted(set(flat) ^ {path for tensor in table.values() for path in tensor.ours})
    if odd:
        trouble = "has no place for it" if odd[0] in flat else "requires it"
        raise UserError(f"{folder}: parameter {odd[0]!r} ({len(odd)} such): {architecture} {trouble}")

    def in_file(name: str) -> np.ndarray:
        parts = tuple(np.asarray(flat[path]) for path in table[name].ours)
        return join(table[name], parts, model, rows).astype(kind)

    sizes = {name: sum(flat[path].size for path in tensor.ours) * kind.itemsize for name, tensor in table.items()}
    with _appearing(folder) as unfinished:
        write_tensors(unfinished, _shards(sizes, shard_bytes), in_file)
        write_json(unfinished / "config.json", config)
        if generation is not None and not scalar:
            write_json(unfinished / "generation_config.json", generation)
        if extra_files is not None:
            extra_files(unfinished)
    return architecture


def as_published(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig, dict[str, Any]]:
    """Convert a model of this library to a published family.

    Returns:
      (parameters, configuration, origin).

    Raises:
      UserError: if no family has all of its parts.
    """
    embedding = np.asarray(params["embedding"])
    if model.embedding_scale != 1.0 and not model.post_norms:
        # Only Gemma scales embeddings. For other families, scale the table itself and untie the unembedding.
        params = {**params, "embedding": embedding * np.float32(model.embedding_scale)}
        if model.tied and "score" not in params:
            params["unembedding"] = embedding.T
        model = dataclasses.replace(model, tied=False, embedding_scale=1.0)
    model_type, config = family_of(model)
    origin = {
        "model_type": model_type,
        "config": config,
        "generation_config": None,
        "dtype": str(embedding.dtype),
        "rows": model.vocab_rows,
    }
    return params, model, origin


def parameter_shapes(model: ModelConfig, scalar: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by dotted path."""
    module = Transformer(model, scalar=scalar)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is renamed to `folder` on success."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    sync_folder(folder.parent)


def _with_ends(generation: Mapping[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """Content of generation_config.json with every id that ends a response; unchanged if it lists them already."""
    listed = as_ids(generation.get("eos_token_id"), "generation_config.json: field 'eos_token_id'")
    if set(stop_ids) <= set(listed):
        return dict(generation)
    ends = list(dict.fromkeys([*stop_ids, *listed]))
    return {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _config_file(where: str) -> str:
    """Prefix of errors about the config."""
    return f"{where}/config.json" if Path(where).is_dir() else where


def _one_label(fields: Fields) -> None:
    """Raise UserError for a classifier with more than one label; transformers writes no key for its default of two."""
    name = "id2label" if "id2label" in fields else "num_labels"
    count = len(fields.inner(name).values) if name == "id2label" else fields.integer(name, 2)
    if count != 1:
        raise fields.wrong(name, "one label (a reward model has one score)")


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Split names into shards of at most `most` bytes; a larger tensor gets a shard to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
