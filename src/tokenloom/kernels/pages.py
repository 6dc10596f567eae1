"""Attention over pages of a sequence, chosen by bounds of their keys, as other operators make it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache

if TYPE_CHECKING:
    from tokenloom.kernels import Kernels


def attend_to_pages(
    kernels: Kernels,
    q: Tensor,
    kv: KVCache,
    layer: int,
    slots: Tensor,
    bounds: Tensor,
    page: int,
    count: int,
    by_group: bool,
) -> Tensor:
    """See `Kernels.attention_over_pages`."""
    index = page_index(kernels, q, len(slots), bounds, page, count, by_group)
    return kernels.attention_at(q, kv, kv.cells(layer, slots.take(index)))


def page_index(
    kernels: Kernels, q: Tensor, length: int, bounds: Tensor, page: int, count: int, by_group: bool
) -> Tensor:
    """Which of `length` tokens each head reads, ascending, `[Hk, m]` or, unless by group, `[Hq, m]`."""
    closed, device = -(-length // page) - 1, q.device
    # A dimension's larger product is with the largest number where q is positive, else with the least.
    both = torch.cat((q[0].clamp_min(0), q[0].clamp_max(0)), -1)
    best = kernels.key_scores(both, bounds, torch.arange(closed, device=device))  # [Hq, pages]
    if by_group:
        best = best.unflatten(0, (bounds.shape[1], -1)).amax(1)
    chosen = kernels.largest(best, count - 1)
    read = (chosen[..., None] * page + torch.arange(page, device=device)).flatten(1)
    last = torch.arange(closed * page, length, device=device).expand(len(read), -1)
    return torch.cat((read, last), 1)
