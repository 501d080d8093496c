"""The container format of GGUF: typed metadata, and tensors that are dequantised one at a time.

The file is parsed here, not by `gguf.GGUFReader`: that takes 14 s for the vocabulary of a current model (0.7 s here),
and a damaged length makes it run on without end (docs/lab-notebook.md). Errors name the field of a damaged file. The
`gguf` package (extra `hf`) dequantises.

Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError, install_command

Array = np.ndarray

# Weights dequantised at a time, so that the temporaries of a chunk stay in the processor's cache.
CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class Stored:
    """Location of a tensor in the file.

    Attributes:
      type: ggml's type number.
      shape: slowest axis first.
      start: offset in the file, in bytes.
      size: in bytes.
    """

    type: int
    shape: tuple[int, ...]
    start: int
    size: int


# Value types of the specification: the number in the file -> struct's code. 8 is text, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9


def gguf_package() -> tuple[ModuleType, ModuleType]:
    """Import gguf.constants and gguf.quants.

    Raises:
      UserError: if the package is not installed.
    """
    try:
        from gguf import constants, quants
    except ImportError:
        raise UserError(f"reading a GGUF file requires the gguf package; run: {install_command('hf')}") from None
    return constants, quants


class _Cursor:
    """Sequential reader of the bytes before the tensors; `what` names the field in errors."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0

    def numbers(self, code: str, count: int, what: str) -> tuple:
        """Unpack `count` numbers; a damaged count must not request more memory than the file has bytes."""
        size = struct.calcsize(f"<{code}") * count
        if size > len(self.data) - self.at:
            raise UserError(f"{self.path}: {what}: the file is truncated, it ends at byte {len(self.data)}")
        self.at += size
        return struct.unpack_from(f"<{count}{code}", self.data, self.at - size)

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        if length > len(self.data) - self.at:
            raise UserError(f"{self.path}: {what}: the file is truncated, it ends at byte {len(self.data)}")
        self.at += length
        try:
            return str(self.data[self.at - length : self.at], "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {what}: damaged, it is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _TEXT:
            return self.text(what)
        if kind == _FLOAT32:
            # The shortest decimal of these 32 bits is the number in the original config: 1e-05, not
            # 9.999999747378752e-06.
            return float(str(np.float32(self.number("f", what))))
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _ARRAY:
            inner, count = self.number("I", what), self.number("Q", what)
            if inner in _NUMBERS:
                return list(self.numbers(_NUMBERS[inner], count, what))
            if inner == _TEXT:
                return [self.text(f"{what}[{i}]") for i in range(count)]
            kind = inner
        raise UserError(f"{self.path}: {what}: value type {kind} is unknown; the file is damaged or too new")


def parse(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Parse a file's header.

    Returns:
      All metadata and the location of every tensor, by GGUF's names.

    Raises:
      UserError: for a file that is not GGUF, truncated or damaged, naming the field.
    """
    constants, quants = gguf_package()
    try:
        data = np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise UserError(f"{path}: not a readable file: {error.strerror}") from None
    except ValueError as error:  # an empty file
        raise UserError(f"{path}: not a readable file: {error}") from None
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: expected b'GGUF' at the start, got {bytes(data[:4])!r}")
    cursor.at = 4
    version = cursor.number("I", "GGUF version")
    if version not in (2, 3):
        hint = " (big-endian files are not read)" if version & 0xFFFF == 0 else ""
        raise UserError(f"{path}: GGUF version: expected 2 or 3, got {version}{hint}")
    tensor_count, value_count = cursor.numbers("Q", 2, "the counts of tensors and values")

    values: dict[str, Any] = {}
    for index in range(value_count):
        key = cursor.text(f"metadata key {index} of {value_count}")
        if key in values:
            raise UserError(f"{path}: {key} occurs twice; the file is damaged")
        values[key] = cursor.value(cursor.number("I", key), key)
    found = []
    for index in range(tensor_count):
        name = cursor.text(f"name of tensor {index} of {tensor_count}")
        dims = cursor.numbers("Q", cursor.number("I", f"tensor {name}"), f"tensor {name}")
        found.append((name, dims, *cursor.numbers("I", 1, f"tensor {name}"), *cursor.numbers("Q", 1, f"tensor {name}")))

    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment: expected a positive integer, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    usable: set[int] = set()
    stored: dict[str, Stored] = {}
    for name, dims, kind, offset in found:
        if name in stored:
            raise UserError(f"{path}: tensor {name} occurs twice; the file is damaged")
        if kind not in usable:
            _check_type(f"{path}: tensor {name}", kind, constants, quants)
            usable.add(kind)
        block, size = constants.GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(dims))
        if not shape or 0 in shape or shape[-1] % block:
            raise UserError(
                f"{path}: tensor {name}: expected rows of a multiple of {block} weights, got shape {list(shape)}"
            )
        stored[name] = Stored(kind, shape, start + offset, math.prod(shape) // block * size)
        end = start + offset + stored[name].size
        if end > len(data):
            raise UserError(f"{path}: tensor {name}: the file is truncated, it has {len(data)} of {end} bytes")
    return values, stored


def _check_type(where: str, kind: int, constants: ModuleType, quants: ModuleType) -> None:
    """Check a quantisation type by dequantising one block of zeros, since the package does not list supported types."""
    try:
        quant = constants.GGMLQuantizationType(kind)
        quants.dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[quant][1]), np.uint8), quant)
    except (ValueError, KeyError):
        raise UserError(
            f"{where}: ggml type {kind} is newer than the installed gguf; run: pip install -U gguf"
        ) from None
    except NotImplementedError:
        raise UserError(f"{where}: type {quant.name} cannot be dequantised; expected e.g. F16, Q8_0 or Q4_K") from None


def load(path: Path, stored: Stored) -> Array:
    """Dequantise a tensor to float32, in the file's layout, with the temporaries of one chunk at a time.

    Raises:
      UserError: if the file has changed since it was parsed.
    """
    constants, quants = gguf_package()
    quant = constants.GGMLQuantizationType(stored.type)
    block, size = constants.GGML_QUANT_SIZES[quant]
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r", offset=stored.start, shape=(stored.size,)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no longer readable: {error}") from None
    values = np.empty(math.prod(stored.shape), np.float32)
    blocks = max(1, CHUNK // block)
    for first in range(0, stored.size // size, blocks):
        # One long row, because gguf loops in Python over groups of 16 rows.
        piece = data[first * size : (first + blocks) * size].reshape(1, -1)
        values[first * block : (first + blocks) * block] = quants.dequantize(piece, quant)[0]
    return values.reshape(stored.shape)


class GgufFields:
    """Typed access to the metadata; a leading "." in a key stands for the architecture's name."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values
        self.architecture = "general"

    def key(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key

    def has(self, key: str) -> bool:
        return self.key(key) in self.values

    def wrong(self, key: str, expected: str) -> UserError:
        if not self.has(key):
            return UserError(f"{self.path}: {self.key(key)} is missing, expected {expected}")
        got = repr(self.values[self.key(key)])
        return UserError(f"{self.path}: {self.key(key)}: expected {expected}, got {got[:80]}")

    def _get(self, key: str, kinds: tuple[type, ...], expected: str, default: Any) -> Any:
        if default is not None and not self.has(key):
            return default
        value = self.values.get(self.key(key))
        if type(value) not in kinds:
            raise self.wrong(key, expected)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, (str,), "a text", default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, (bool,), "true or false", default)

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, (float, int), "a number", default))

    def texts(self, key: str) -> list[str]:
        return self._list(key, (str,), "a list of texts")

    def reals(self, key: str) -> list[float]:
        return self._list(key, (float, int), "a list of numbers")

    def _list(self, key: str, kinds: tuple[type, ...], expected: str) -> list:
        items = self._get(key, (list,), expected, None)
        if not items or any(type(item) not in kinds for item in items):
            raise self.wrong(key, expected)
        return items

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list with one entry per layer is accepted if all are equal."""
        value = self._get(key, (int, list), "a positive integer", default)
        if isinstance(value, list):
            value = value[0] if len(set(value)) == 1 else None
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive integer, the same for all layers")
        return value

    def refuse_what_no_config_can_say(self) -> None:
        """Reject keys that change the model in a way that no config.json can express.

        Raises:
          UserError: for such a key, and for one part of a split model.
        """
        if self.text("general.type", "model") != "model":
            raise self.wrong("general.type", "'model'")
        if self.has("split.count") and self.count("split.count") > 1:
            raise UserError(
                f"{self.path}: split.count {self.values['split.count']}: one part of a split model; join the parts with"
                " llama.cpp's llama-gguf-split --merge"
            )
        for key, harmless in {
            ".expert_count": (0,),
            ".attention.causal": (True,),
            ".attention.scale": (0.0,),
            ".attention.clamp_kqv": (0.0,),
            ".attention.max_alibi_bias": (0.0,),
            ".logit_scale": (0.0, 1.0),
            ".residual_scale": (0.0, 1.0),
            ".embedding_scale": (0.0, 1.0),
            ".rope.scaling.yarn_log_multiplier": (0.0,),
        }.items():
            if self.has(key) and self.values[self.key(key)] not in harmless:
                raise self.wrong(key, f"{harmless[0]} (such models are not supported)")
