"""Attention over pages of a sequence, chosen by bounds of their keys, as other operators make it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache

if TYPE_CHECKING:
    from tokenloom.kernels import Kernels, Pages


def attend_to_pages(kernels: Kernels, q: Tensor, kv: KVCache, layer: int, pages: Pages) -> Tensor:
    """See `Kernels.attention_over_pages`."""
    index = page_index(kernels, q, pages)
    return kernels.attention_at(q, kv, kv.cells(layer, pages.slots.take(index)))


def page_index(kernels: Kernels, q: Tensor, pages: Pages) -> Tensor:
    """Which tokens each head reads, ascending, `[Hk, m]` or, unless by group, `[Hq, m]`."""
    length, size, device = len(pages.slots), pages.size, q.device
    closed = -(-length // size) - 1
    # A dimension's larger product is with the largest number where q is positive, else with the least.
    both = torch.cat((q[0].clamp_min(0), q[0].clamp_max(0)), -1)
    best = kernels.key_scores(both, pages.bounds, torch.arange(closed, device=device))  # [Hq, pages]
    if pages.by_group:
        best = best.unflatten(0, (pages.bounds.shape[1], -1)).amax(1)
    chosen = kernels.largest(best, pages.count - 1)
    read = (chosen[..., None] * size + torch.arange(size, device=device)).flatten(1)
    last = torch.arange(closed * size, length, device=device).expand(len(read), -1)
    return torch.cat((read, last), 1)
