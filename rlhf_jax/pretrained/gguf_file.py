"""The container of a GGUF file: its metadata read with types, and its tensors, dequantised one at a time.

It is parsed here, so that an error can name the field of a damaged file; the `gguf` package (extra `hf`) dequantises.
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

from rlhf_jax.errors import UserError

Array = np.ndarray

# Weights dequantised at a time: the temporaries of a chunk stay in the processor's cache.
CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ggml's type number, the shape with the slowest axis first, bytes of the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    size: int


# Value types of the specification: the number in the file -> struct's code. 8 is text, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9


def gguf_package() -> tuple[ModuleType, ModuleType]:
    """gguf.constants and gguf.quants."""
    try:
        from gguf import constants, quants
    except ImportError:
        raise UserError('reading a GGUF file needs the gguf package; run: pip install "rlhf_jax[hf]"') from None
    return constants, quants


class _Cursor:
    """Reads the bytes before the tensors in order; every read says what it was reading."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0

    def numbers(self, code: str, count: int, what: str) -> tuple:
        """Checked first: a damaged count must not ask for more memory than the file has bytes."""
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
            # The shortest decimal of these 32 bits is what the config said: 1e-05, not 9.999999747378752e-06.
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
        raise UserError(f"{self.path}: {what}: value type {kind} is not known; the file is damaged or too new")


def parse(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """All metadata and where all tensors lie, by GGUF's names."""
    constants, quants = gguf_package()
    try:
        data = np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise UserError(f"{path}: not a readable file: {error.strerror}") from None
    except ValueError as error:  # an empty file
        raise UserError(f"{path}: not a readable file: {error}") from None
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: it starts with {bytes(data[:4])!r}, wanted b'GGUF'")
    cursor.at = 4
    version = cursor.number("I", "GGUF version")
    if version not in (2, 3):
        hint = " (big-endian files are not read)" if version & 0xFFFF == 0 else ""
        raise UserError(f"{path}: GGUF version {version}, wanted 2 or 3{hint}")
    tensor_count, value_count = cursor.numbers("Q", 2, "the counts of tensors and values")

    values: dict[str, Any] = {}
    for index in range(value_count):
        key = cursor.text(f"metadata key {index} of {value_count}")
        if key in values:
            raise UserError(f"{path}: {key} is there twice; the file is damaged")
        values[key] = cursor.value(cursor.number("I", key), key)
    found = []
    for index in range(tensor_count):
        name = cursor.text(f"name of tensor {index} of {tensor_count}")
        dims = cursor.numbers("Q", cursor.number("I", f"tensor {name}"), f"tensor {name}")
        found.append((name, dims, *cursor.numbers("I", 1, f"tensor {name}"), *cursor.numbers("Q", 1, f"tensor {name}")))

    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment {alignment!r}, wanted a positive integer")
    start = -(-cursor.at // alignment) * alignment
    usable: set[int] = set()
    stored: dict[str, Stored] = {}
    for name, dims, kind, offset in found:
        if name in stored:
            raise UserError(f"{path}: tensor {name} is there twice; the file is damaged")
        if kind not in usable:
            _check_type(f"{path}: tensor {name}", kind, constants, quants)
            usable.add(kind)
        block, size = constants.GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(dims))
        if not shape or 0 in shape or shape[-1] % block:
            raise UserError(f"{path}: tensor {name}: shape {list(shape)}, wanted rows of a multiple of {block} weights")
        stored[name] = Stored(kind, shape, start + offset, math.prod(shape) // block * size)
        end = start + offset + stored[name].size
        if end > len(data):
            raise UserError(f"{path}: tensor {name}: the file is truncated, it has {len(data)} of {end} bytes")
    return values, stored


def _check_type(where: str, kind: int, constants: ModuleType, quants: ModuleType) -> None:
    """Dequantises one block of zeros: only the package knows what it can do."""
    try:
        quant = constants.GGMLQuantizationType(kind)
        quants.dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[quant][1]), np.uint8), quant)
    except (ValueError, KeyError):
        raise UserError(f"{where}: ggml type {kind} is new to the installed gguf; run: pip install -U gguf") from None
    except NotImplementedError:
        raise UserError(f"{where}: type {quant.name} cannot be dequantised; wanted e.g. F16, Q8_0 or Q4_K") from None


def load(path: Path, stored: Stored) -> Array:
    """The tensor as the file has it, float32; beside it only one chunk's temporaries are in memory."""
    constants, quants = gguf_package()
    quant = constants.GGMLQuantizationType(stored.type)
    block, size = constants.GGML_QUANT_SIZES[quant]
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r", offset=stored.start, shape=(stored.size,)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable any more: {error}") from None
    values = np.empty(math.prod(stored.shape), np.float32)
    blocks = max(1, CHUNK // block)
    for first in range(0, stored.size // size, blocks):
        # One long row: gguf would loop in Python over groups of 16 rows.
        piece = data[first * size : (first + blocks) * size].reshape(1, -1)
        values[first * block : (first + blocks) * block] = quants.dequantize(piece, quant)[0]
    return values.reshape(stored.shape)


class GgufFields:
    """The metadata, read with types; a leading "." stands for the architecture's name."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values
        self.architecture = "general"

    def key(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key

    def has(self, key: str) -> bool:
        return self.key(key) in self.values

    def wrong(self, key: str, wanted: str) -> UserError:
        if not self.has(key):
            return UserError(f"{self.path}: {self.key(key)} is missing, wanted {wanted}")
        found = repr(self.values[self.key(key)])
        return UserError(f"{self.path}: {self.key(key)} is {found[:80]}, wanted {wanted}")

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        if default is not None and not self.has(key):
            return default
        value = self.values.get(self.key(key))
        if type(value) not in kinds:
            raise self.wrong(key, wanted)
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

    def _list(self, key: str, kinds: tuple[type, ...], wanted: str) -> list:
        found = self._get(key, (list,), wanted, None)
        if not found or any(type(item) not in kinds for item in found):
            raise self.wrong(key, wanted)
        return found

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of one for each layer counts if all are equal."""
        value = self._get(key, (int, list), "a positive integer", default)
        if isinstance(value, list):
            value = value[0] if len(set(value)) == 1 else None
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive integer, the same for all layers")
        return value

    def refuse_what_no_config_can_say(self) -> None:
        """Keys that change the model in a way that none of the configs below has a word for."""
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
                raise self.wrong(key, f"{harmless[0]}; such models are not supported")
