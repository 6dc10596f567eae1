"""Weights that stay quantised in memory: GGUF's Q8_0, Q4_0 and Q4_1, repacked for the native kernels.

The layout is drawn in `csrc/formats.h`: eight rows side by side, 32 columns a block. What is written here in
numpy is the reference; the native kernels read the same bytes, and without them `dense` is all that is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from tokenloom.kernels.large_pages import room
from tokenloom.kernels.native import native

GROUP, BLOCK = 8, 32


@dataclass(frozen=True)
class Format:
    """One way to store a block of 32 weights. `code` is the native kernels' number for it."""

    name: str
    code: int
    quant_bytes: int  # per block and row
    halves: int  # float16 numbers per block and row: the scale, and the offset if there is one

    @property
    def row_bytes(self) -> int:
        """Bytes of one block of one row, here and in a GGUF file."""
        return 2 * self.halves + self.quant_bytes


FORMATS = {f.name: f for f in (Format("Q8_0", 0, 32, 1), Format("Q4_0", 1, 16, 1), Format("Q4_1", 2, 16, 2))}


class PackedWeight:
    """A weight `[N, K]` in 8 or 4 bits. K is a multiple of 32.

    Attributes:
        data: uint8 `[ceil(N / 8), K / 32, 8 * row_bytes]`.
    """

    def __init__(self, format: Format, shape: tuple[int, int], data: Tensor) -> None:
        self.format = format
        self.shape = shape
        self.data = data
        self.native = native.Weight(format.code, *shape, data) if native is not None else None

    @classmethod
    def pack(cls, name: str, rows: np.ndarray) -> PackedWeight:
        """From GGUF's rows, uint8 `[N, K / 32 * row_bytes]`."""
        format = FORMATS[name]
        num_rows, blocks = len(rows), rows.shape[1] // format.row_bytes
        padded = -(-num_rows // GROUP) * GROUP
        shape = (padded // GROUP, blocks, GROUP * format.row_bytes)
        packed = room(math.prod(shape)).view(shape)
        data = packed.numpy()
        # A few groups at a time, so that no second copy of a large weight comes to be.
        step = max(1, 2**20 // (blocks * format.row_bytes * GROUP))
        for first in range(0, len(data), step):
            part = np.zeros((min(step, len(data) - first) * GROUP, rows.shape[1]), np.uint8)
            found = rows[first * GROUP : first * GROUP + len(part)]
            part[: len(found)] = found
            by_row = part.reshape(-1, GROUP, blocks, format.row_bytes)
            halves, quants = np.split(by_row, [2 * format.halves], axis=-1)
            # [group, row, block, vector, 4] -> [group, block, vector, row, 4]
            quants = quants.reshape(*quants.shape[:3], -1, 4).transpose(0, 2, 3, 1, 4)
            # [group, row, block, number, 2] -> [group, block, number, row, 2]
            halves = halves.reshape(*halves.shape[:3], -1, 2).transpose(0, 2, 3, 1, 4)
            out = data[first : first + step]
            out[..., : GROUP * format.quant_bytes] = quants.reshape(*out.shape[:2], -1)
            out[..., GROUP * format.quant_bytes :] = halves.reshape(*out.shape[:2], -1)
        width = blocks * BLOCK
        return cls(format, (num_rows, width), packed)

    @classmethod
    def quantize(cls, name: str, weight: Tensor) -> PackedWeight:
        """From numbers `[N, K]`, rounded as GGUF's own tools do."""
        kind = GGMLQuantizationType[name]
        return cls.pack(name, gguf.quants.quantize(weight.to(torch.float32).numpy(), kind))

    def unpacked(self) -> np.ndarray:
        """GGUF's rows again: what `pack` took."""
        f = self.format
        groups, blocks, _ = self.data.shape
        quants, halves = np.split(self.data.numpy(), [GROUP * f.quant_bytes], axis=-1)
        quants = quants.reshape(groups, blocks, -1, GROUP, 4).transpose(0, 3, 1, 2, 4)
        halves = halves.reshape(groups, blocks, -1, GROUP, 2).transpose(0, 3, 1, 2, 4)
        shape = (groups, GROUP, blocks, -1)
        rows = np.concatenate((halves.reshape(shape), quants.reshape(shape)), axis=-1)
        return rows.reshape(groups * GROUP, -1)[: self.shape[0]]

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows as float32, `[len(ids), K]`."""
        if self.native is None:
            return self.dense()[ids]
        out = torch.empty(len(ids), self.shape[1])
        native.unpack(self.native, ids, out, torch.get_num_threads())
        return out

    def dense(self, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """All of it, or consecutive rows, as float32, or as what `out` is where that is given."""
        first, end, _ = (rows or slice(None)).indices(self.shape[0])
        if self.native is not None:
            fits = out is not None and out.dtype == torch.float32 and out.device.type == "cpu"
            numbers = out if out is not None and fits else torch.empty(end - first, self.shape[1])
            native.unpack_rows(self.native, first, numbers, torch.get_num_threads())
        else:
            kind = GGMLQuantizationType[self.format.name]
            numbers = torch.from_numpy(gguf.quants.dequantize(self.unpacked(), kind))[first:end]
        return numbers if out is None or numbers is out else out.copy_(numbers)

    @property
    def num_bytes(self) -> int:
        return self.data.numel()


Weight = Union[Tensor, PackedWeight]  # noqa: UP007 (evaluated, which Python 3.10 cannot with |)


def dense(weight: Weight, rows: slice | None = None, like: Tensor | None = None) -> Tensor:
    """A weight, or consecutive rows of it, as a tensor; a view where it is one already.

    like: whose dtype and device the numbers of a packed weight take; float32 on the CPU without it.
    """
    if isinstance(weight, PackedWeight):
        numbers = weight.dense(rows)
        return numbers if like is None else numbers.to(like.device, like.dtype)
    return weight if rows is None else weight[rows]


def num_bytes(weight: Weight) -> int:
    return weight.num_bytes if isinstance(weight, PackedWeight) else weight.numel() * weight.element_size()
