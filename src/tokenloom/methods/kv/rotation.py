"""Keys at other positions than those at which they were stored: rotations add up."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CosSin


def turned(x: Tensor, old: Tensor, new: Tensor, cos_sin: CosSin) -> Tensor:
    """What RoPE would have made of x at other positions.

    Args:
        x: `[..., n, heads, D]`, as RoPE made them at positions `old`, int64 `[n]`.
        new: positions wanted, `[n]`.

    Returns:
        Like x, in float32 at least. Angles are float32: at position p they are off by about p / 2^24, here
        and in RoPE itself.
    """
    (cos, sin), (old_cos, old_sin) = cos_sin(new), cos_sin(old)
    size = old_cos.square() + old_sin.square()  # not 1 where RoPE scales attention (YaRN)
    wide = torch.promote_types(x.dtype, torch.float32)
    by_cos = ((cos * old_cos + sin * old_sin) / size)[:, None].to(wide)
    by_sin = ((sin * old_cos - cos * old_sin) / size)[:, None].to(wide)
    one, other = x.to(wide).chunk(2, -1)
    return torch.cat((one * by_cos - other * by_sin, other * by_cos + one * by_sin), -1)
