"""Numbers in few bits: a scale and a minimum for each group, and the codes of several tokens in one byte."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 4, 8)


def quantize(x: Tensor, bits: int, dim: int, among: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric uniform codes (KIVI, arXiv 2402.02750, Section 3): x is about `codes * scale + least`.

    Args:
        x: `[...]`, float32 or float64; dim: along which a group lies.
        among: like x along all other dimensions: the numbers whose range counts; None: all of x.

    Returns:
        Codes, uint8 like x; scale and least, float16, with one element along `dim`. A number within the range
        is off by at most half a scale (float16's own rounding is in the wide direction).
    """
    low, high = (x if among is None else among).aminmax(dim=dim, keepdim=True)
    least = low.half()
    # Not above the least number, and a scale not too small: otherwise ends of the range would be cut off.
    lower = (low - low.abs() * 2**-10 - 2**-24).half()
    least = torch.where(least.to(x.dtype) > low, lower, least)
    scale = ((high - least.to(x.dtype)) / (2**bits - 1) * (1 + 2**-10) + 2**-24).half()
    codes = (x - least.to(x.dtype)).div_(scale.to(x.dtype)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, least


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[n, T, C]` -> bytes `[n, T * bits / 8, C]`: a byte holds the same channel of tokens
    T * bits / 8 apart, so that unpacking writes whole rows."""
    parts = codes.view(codes.shape[0], 8 // bits, -1, codes.shape[2])
    packed = parts[:, 0].clone()
    for i in range(1, 8 // bits):
        packed |= parts[:, i] << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes again, uint8 `[n, T, C]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = packed[:, None] >> shifts[:, None, None]
    if bits < 8:
        codes &= 2**bits - 1
    return codes.flatten(1, 2)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, scaled to be orthogonal, float64 `[size, size]`; size: a power of two.

    Raises:
        ValueError: it is none.
    """
    if size & (size - 1):
        raise ValueError(f"hadamard needs heads whose width is a power of two, not {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
