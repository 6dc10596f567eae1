"""Random numbers by counter: the same for the same row and key, however a prompt is cut into chunks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Of the Gumbel distribution; what is compared with it has them too.
MEAN, DEVIATION = 0.5772156649, 1.2825498302


def mixed(x: Tensor) -> Tensor:
    """A hash of each number, int64 (a step of SplitMix64)."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30, 64)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27, 64)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31, 64)


def _shifted(x: Tensor, by: int, bits: int) -> Tensor:
    """x >> by, zeros coming in from the left."""
    return (x >> by) & ((1 << (bits - by)) - 1)


@lru_cache(maxsize=1024)
def streams(seed: int, layer: int, num_heads: int, device: torch.device) -> Tensor:
    """One number for each head, int64 `[num_heads]`, to be combined with a row's position by ^."""
    first = mixed(torch.tensor(seed % 2**63, device=device))
    return mixed(mixed(first ^ layer) ^ torch.arange(num_heads, device=device))


def uniform(rows: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Between 0 and 1, both excluded, by the hashes of a row and of a key, broadcast."""
    # There is one for each row and key: 32 bits and in place, where 64 would take thrice as long.
    x = rows.to(torch.int32) ^ keys.to(torch.int32)
    for by, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x ^= _shifted(x, by, 32)
        x *= factor
    return unit(x, dtype)


def unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Between 0 and 1, by 32 bits. Both ends are excluded in float32 too: so only 23 of the bits count."""
    return _shifted(bits, 9, 32).to(dtype).add_(0.5).mul_(2.0**-23)


def noise(kind: str, rows: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the kind gumbel, gaussian or constant, all with the mean of a Gumbel variable; see `uniform`."""
    if kind == "constant":
        return torch.full((), MEAN, dtype=dtype, device=rows.device)
    u = uniform(rows, keys, dtype)
    if kind == "gaussian":
        return u.mul_(2).sub_(1).erfinv_().mul_(2**0.5 * DEVIATION).add_(MEAN)
    return u.log_().neg_().log_().neg_()
