"""Dropout whose every number is a function of its place: any cut into windows sees the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BLOCK = 64


def keep_mask(
    key: tuple[int | str, ...], begin: int, end: int, width: int, rate: float, dtype: torch.dtype
) -> Tensor:
    """What rows `begin .. end` are multiplied by, `[end - begin, width]`: 0, or 1 / (1 - rate).

    key: says which tensor this is, e.g. (seed, pass, layer, site).
    """
    first = begin // _BLOCK
    generator = torch.Generator()
    blocks = []
    for block in range(first, -(-end // _BLOCK)):
        digest = hashlib.blake2b(repr((*key, block)).encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        blocks.append(torch.rand(_BLOCK, width, generator=generator))
    kept = torch.cat(blocks)[begin - first * _BLOCK : end - first * _BLOCK] >= rate
    return kept.to(dtype) / (1 - rate)
