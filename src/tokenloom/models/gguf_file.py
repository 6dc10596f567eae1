"""GGUF files: metadata and tensor table, checked against the file's size before any tensor is read.

Layout after the GGUF specification of the ggml project (versions 2 and 3, little-endian). The `gguf` package
supplies the constants and the dequantisation; its reader is not used, because it keeps one array per
vocabulary string (seconds for a small model) and cannot say which tensor a broken file breaks.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tokenloom.errors import ModelError

SUPPORTED_QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table. `shape` is row-major (the file's order reversed)."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file.

    `metadata` maps keys to Python values (arrays become lists); `tensors` maps GGUF names to their table
    entries, every one of which is known to lie inside the file and to be of a supported quantisation.
    Raises ModelError, naming the file and the key or tensor at fault, when the file is not readable as such.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ModelError(f"{self.path}: cannot be read ({error})") from error
        self._position = 0
        self._reading = "header"
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        num_tensors, num_keys = self._read_header()
        for _ in range(num_keys):
            self._read_key()
        self._read_tensors(num_tensors)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor as a zero-copy read-only view, uint8 `[rows, bytes per row]`."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)

    def _fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}")

    def _read_header(self) -> tuple[int, int]:
        if self._bytes[:4] != _MAGIC:
            raise self._fail(f"not a GGUF file (magic is {self._bytes[:4]!r}, expected {_MAGIC!r})")
        self._position = 4
        version = self._number("<u4")
        if version not in (2, 3):
            hint = " (big-endian files are not supported)" if version & 0xFFFF == 0 else ""
            raise self._fail(f"GGUF version {version} is not supported{hint}; versions 2 and 3 are")
        return self._number("<u8"), self._number("<u8")

    def _take(self, num_bytes: int) -> int:
        """Reserve the next `num_bytes` and return where they start."""
        start = self._position
        if start + num_bytes > len(self._bytes):
            raise self._fail(f"truncated: {self._reading} ends past the end of the file")
        self._position = start + num_bytes
        return start

    def _number(self, kind: str) -> Any:
        number = self._numbers(kind, 1)[0]
        # A float32 stands for the decimal that its author wrote: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(number))) if kind == "<f4" else number

    def _numbers(self, kind: str, count: int) -> list[Any]:
        start = self._take(np.dtype(kind).itemsize * count)
        return np.frombuffer(self._bytes, kind, count, start).tolist()

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._take(8))
        start = self._take(length)
        # Vocabularies of old converters hold stray bytes; a replacement character keeps the ids aligned.
        return self._bytes[start : start + length].decode("utf-8", "replace")

    def _read_key(self) -> None:
        self._reading = f"the metadata key after {next(reversed(self.metadata), 'the header')!r}"
        key = self._string()
        if key in self.metadata:
            raise self._fail(f"metadata key {key!r} appears twice")
        self._reading = f"metadata key {key!r}"
        self.metadata[key] = self._value(self._number("<u4"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._fail(f"{self._reading} has unknown value type {kind}")
        item_kind, count = self._number("<u4"), self._number("<u8")
        if item_kind == _STRING:
            return [self._string() for _ in range(count)]
        if item_kind in _SCALARS:
            return self._numbers(_SCALARS[item_kind], count)
        raise self._fail(f"{self._reading} is an array of unsupported item type {item_kind}")

    def _read_tensors(self, count: int) -> None:
        if self.metadata.get("split.count", 0) > 1:
            raise self._fail(
                "is one part of a split GGUF (split.count > 1); merge the parts into one file first"
            )
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment must be a power of two, not {alignment!r}")
        table = [self._read_tensor_info() for _ in range(count)]
        start = -(-self._position // alignment) * alignment
        for name, shape, kind, offset in table:
            if name in self.tensors:
                raise self._fail(f"tensor {name!r} appears twice")
            self.tensors[name] = self._place(name, shape, kind, start + offset)

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        self._reading = "the tensor table"
        name = self._string()
        self._reading = f"the table entry of tensor {name!r}"
        num_dimensions = self._number("<u4")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reversed(self._numbers("<u8", num_dimensions)))
        return name, shape, self._number("<u4"), self._number("<u8")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise self._fail(f"tensor {name!r} has unknown quantisation type {kind}") from None
        if quantization.name not in SUPPORTED_QUANTIZATIONS:
            raise self._fail(
                f"tensor {name!r} has quantisation {quantization.name}, which is not supported; "
                f"supported are {', '.join(SUPPORTED_QUANTIZATIONS)}"
            )
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape[-1] % block or 0 in shape:
            raise self._fail(
                f"tensor {name!r} of shape {list(shape)} does not divide into {quantization.name} blocks"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > len(self._bytes):
            raise self._fail(
                f"truncated: tensor {name!r} needs bytes {offset}..{offset + num_bytes}, "
                f"the file has {len(self._bytes)}"
            )
        return GGUFTensor(name, shape, quantization.name, offset, num_bytes)
